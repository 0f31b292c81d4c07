"""The `fptquant` command, a module a subcommand; each imports what it needs when it runs: help answers at once."""

# the order is that of the help
from fptquant.cli import quantize, verify, evaluate, serve, chat  # noqa: F401, I001
from fptquant.cli import inspection, report, export, push, sensitivity, doctor, lists  # noqa: F401
from fptquant.cli.app import app, main

__all__ = ["app", "main"]
