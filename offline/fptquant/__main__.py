"""`python -m fptquant`: the `fptquant` command."""

from fptquant.cli import main

main()
