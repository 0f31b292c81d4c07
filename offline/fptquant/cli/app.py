"""The command itself: what all subcommands have in common, and how it ends."""

from __future__ import annotations

import inspect
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

import fptquant
from fptquant import console
from fptquant.errors import FPTQuantError, is_device_lost, is_disk_full, is_out_of_memory
from fptquant.files import first_line

app = typer.Typer(
    name="fptquant",
    help="Static INT4 quantization of Hugging Face checkpoints with function-preserving transforms.",
    epilog="`fptquant COMMAND --help` says more. NO_COLOR=1 in the environment takes the colours away.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
)
_INTERRUPTED = 128 + signal.SIGINT  # exit status; Typer's answer to Ctrl-C
_TERMINATED = 128 + signal.SIGTERM
_PANEL = "Output"  # of the help

Quiet = Annotated[
    bool,
    typer.Option("--quiet", "-q", rich_help_panel=_PANEL, help="print results and errors only: no plan, no progress"),
]
Verbose = Annotated[
    bool,
    typer.Option(
        "--verbose", "-v", rich_help_panel=_PANEL, help="print what libraries log, and where errors come from"
    ),
]
LogFile = Annotated[
    Path | None,
    typer.Option(
        "--log-file",
        show_default="none",
        rich_help_panel=_PANEL,
        help="append what is printed to this file, with times",
    ),
]


def command(name: str | None = None, **options: Any) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Adds a function to the command, with the options that all subcommands have: see `typer.Typer.command`."""

    def add(function: Callable[..., None]) -> Callable[..., None]:
        def run(*, quiet: bool, verbose: bool, log_file: Path | None, **arguments: Any) -> None:
            if quiet and verbose:
                raise FPTQuantError("--quiet and --verbose: give one of them")
            console.configure(quiet=quiet, verbose=verbose, log_file=log_file)
            console.log(f"fptquant {fptquant.__version__}: {' '.join(sys.argv[1:])}")
            function(**arguments)

        kind = inspect.Parameter.KEYWORD_ONLY
        own = inspect.signature(function, eval_str=True)
        added = [
            inspect.Parameter("quiet", kind, default=False, annotation=Quiet),
            inspect.Parameter("verbose", kind, default=False, annotation=Verbose),
            inspect.Parameter("log_file", kind, default=None, annotation=LogFile),
        ]
        parameters = [parameter.replace(kind=kind) for parameter in own.parameters.values()] + added
        run.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
        run.__name__, run.__doc__ = function.__name__, function.__doc__
        app.command(name, **options)(run)
        return function

    return add


def _version(show: bool) -> None:
    if show:
        console.out.print(f"fptquant {fptquant.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="print the version")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Entry point: a user's mistake is one line and exit status 2, never a stack trace."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(_TERMINATED))  # what was begun is cleaned up, as on Ctrl-C
    try:
        app(prog_name="fptquant")
    except FPTQuantError as error:
        _fail(str(error), error)
    except (MemoryError, RuntimeError, OSError) as error:
        if is_device_lost(error):
            _fail(f"the device failed ({first_line(error)}): run again, on --device cpu if it fails there again", error)
        if is_disk_full(error):
            _fail(
                "the disk is full: free some space, or set TMPDIR to a directory on another one, and run again", error
            )
        if not is_out_of_memory(error):
            raise
        _fail("out of memory: free some, or give shorter or fewer sequences", error)
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED):
            if not _fails_first():
                raise
            resumable = sys.argv[1:2] == ["quantize"] or (sys.argv[1:2] == ["sensitivity"] and "--json" in sys.argv)
            console.complain(
                "interrupted" + ": run the same command again, without --fresh, to continue" * resumable, style=None
            )
        raise
    finally:
        console.close()


def _fail(message: str, error: BaseException) -> NoReturn:
    if _fails_first():
        console.complain(f"error: {' '.join(message.split())}", error)
    sys.exit(2)


def _fails_first() -> bool:
    """Whether no other process of the run has failed before, so that the user reads one line."""
    parallel = sys.modules.get("fptquant.parallel")  # it imports torch
    return parallel is None or bool(parallel.fails_first())


def quiet_transformers() -> None:
    """Has transformers say nothing that the user can't do anything about, unless everything is asked for."""
    if console.verbose():
        return
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()
