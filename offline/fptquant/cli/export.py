"""`fptquant export`: a checkpoint for software that doesn't know this package."""

from __future__ import annotations

import shlex
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from fptquant.calibration.formats import require_text
from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import Checkpoint, Device, refuse_given, require_checkpoint
from fptquant.console import RichStages, err, facts, info, out
from fptquant.errors import FPTQuantError
from fptquant.run.publication import Publication
from fptquant.units import megabytes

if TYPE_CHECKING:
    from torch import Tensor

    from fptquant.export.record import ExportRecord
    from fptquant.loading import Source


class Online(StrEnum):
    """What becomes of Hadamards in front of layers."""

    undo = "undo"
    keep = "keep"


@command()
def export(
    context: typer.Context,
    checkpoint: Checkpoint,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write the export to")],
    target: Annotated[
        str,
        typer.Option(
            "--format", help="compressed-tensors, which stock vLLM and transformers load; or float, for all others"
        ),
    ] = "compressed-tensors",
    online: Annotated[
        Online,
        typer.Option(
            help="online Hadamards (T_d, T_h): undo them in the weights, or keep them for vLLM on one GPU, "
            "which wasn't run on hardware"
        ),
    ] = Online.undo,
    quality: Annotated[
        int,
        typer.Option(
            min=0, help="windows of text that calibration left over to compare export and checkpoint on; 0: don't"
        ),
    ] = 4,
    text: Annotated[
        Path | None, typer.Option(show_default="left-over calibration text", help="text to compare on")
    ] = None,
    length: Annotated[int, typer.Option(min=8, help="tokens in each window of --text")] = 512,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an existing export or checkpoint when the new one is complete")
    ] = False,
    device: Device = "auto",
) -> None:
    """Write CHECKPOINT for stock vLLM and transformers: what they can't compute is replaced, listed and measured."""
    from fptquant.export.formats import require_format

    if not quality:
        refuse_given(context, ("text", "length"), "is for a comparison, and --quality 0 makes none")
    if text is None:
        refuse_given(context, ("length",), "is for --text, and left-over windows have the calibration's length")
    require_format(target, online=online.value)
    require_checkpoint(checkpoint)
    empty = output.expanduser().is_dir() and not any(output.expanduser().iterdir())
    Publication(output, overwrite=overwrite or empty).require_apart(checkpoint.expanduser(), "the checkpoint")
    if text is not None:
        require_text(text)

    from fptquant.devices import choose_device

    place = choose_device(device)

    from fptquant.export.write import prepare
    from fptquant.loading import open_source

    quiet_transformers()
    with err.status("checking the checkpoint"):
        source = open_source(checkpoint.expanduser(), device=place)
        exporter = prepare(source, output, format=target, online=online.value, overwrite=overwrite or empty)
        tokens = _tokens(source, quality, text, length)
    _show(exporter.run(tokens, RichStages()), output)


def _tokens(source: Source, windows: int, text: Path | None, length: int) -> Tensor | None:
    """What to measure on; None, with a note, where there is nothing."""
    from fptquant.evaluation.perplexity import evaluation_windows
    from fptquant.export.quality import left_over

    if not windows:
        return None
    if text is not None:
        source.require_length("--length", length)
        return evaluation_windows(source.tokenizer, text, windows, length).to(source.device)
    try:
        return left_over(source, windows)
    except FPTQuantError as error:
        err.print(f"note: quality is not measured: {error}; give --text FILE", markup=False, soft_wrap=True)
        return None


def _show(record: ExportRecord, output: Path) -> None:
    """What was written, what it lost, and what to do with it."""
    table = facts()
    for kind, count in record.layers.items():
        table.add_row(f"{count} layers", kind)
    table.add_row("weights before", megabytes(record.checkpoint_bytes))
    table.add_row("weights after", megabytes(record.export_bytes))
    info.print(f"{output}", markup=False, highlight=False, soft_wrap=True)
    info.print(table)
    out.print("what could not be kept:")
    for loss in record.losses:
        out.print(f"  - {loss}", markup=False, highlight=False, soft_wrap=True)
    if record.quality is not None:
        out.print(record.quality.line(), highlight=False, soft_wrap=True)
    line = shlex.join(["vllm", "serve", str(output)])
    info.print(f"next: {line}    # on CPUs --dtype {record.cpu_dtype()}", markup=False, highlight=False, soft_wrap=True)
