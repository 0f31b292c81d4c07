"""`python -m fptquant.cli`: the `fptquant` command."""

from fptquant.cli import main

main()
