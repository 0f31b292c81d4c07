"""`fptquant report`: a page about a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from fptquant.cli.app import command
from fptquant.cli.options import Checkpoint, require_checkpoint
from fptquant.console import out
from fptquant.errors import FPTQuantError
from fptquant.files import first_line, require_writable
from fptquant.report.ours import require_ours


@command()
def report(
    checkpoint: Checkpoint,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", show_default="CHECKPOINT/fptquant/report.html", help="HTML file to write"),
    ] = None,
    sensitivity: Annotated[
        Path | None,
        typer.Option(
            show_default="CHECKPOINT/fptquant/sensitivity.json, if there is one",
            help="what `fptquant sensitivity MODEL --json FILE` measured",
        ),
    ] = None,
) -> None:
    """Write one HTML page about CHECKPOINT: quality, ranges, losses, time and memory, recipe, where it comes from.

    The page needs no other file and asks no server for anything. A report that is there is written anew.
    """
    require_checkpoint(checkpoint)
    folder = checkpoint.expanduser()
    if output is None:
        try:
            (folder / "fptquant").mkdir(exist_ok=True)
        except OSError as error:
            raise FPTQuantError(f"'{folder}' can't be written to ({first_line(error)}): give --output") from None
    file = folder / "fptquant" / "report.html" if output is None else output.expanduser()
    require_writable("--output", file)
    if sensitivity is not None and not sensitivity.is_file():
        raise FPTQuantError(f"--sensitivity: '{sensitivity}' is not a file")
    require_ours(file)

    from fptquant.report import page

    page.write(page.render(folder, sensitivity), file)
    out.print(f"{file}", markup=False, highlight=False, soft_wrap=True)
