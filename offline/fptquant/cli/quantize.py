"""`fptquant quantize`."""

from __future__ import annotations

import shlex
import sys
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import (
    OF_RECIPE,
    Calibration,
    Device,
    Memory,
    Model,
    Precision,
    Rounding,
    Sequences,
    given,
    listed,
    require_start,
)
from fptquant.console import RichStages, err, facts, info, needs_table, out, plan_table, show_notes
from fptquant.errors import FPTQuantError
from fptquant.files import require_model
from fptquant.recipe_files import shipped_recipes
from fptquant.run.publication import Publication
from fptquant.units import duration, megabytes, parse_size

if TYPE_CHECKING:
    from fptquant.report.summary import Summary


@command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write the quantized checkpoint to")],
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, or a YAML file")] = "fptquant",
    precision: Precision = None,
    calibration: Calibration = None,
    calibration_config: Annotated[
        str | None, typer.Option(show_default=OF_RECIPE, help="configuration name of the dataset")
    ] = None,
    calibration_split: Annotated[str | None, typer.Option(show_default=OF_RECIPE, help="split of the dataset")] = None,
    calibration_field: Annotated[
        str | None,
        typer.Option(
            show_default=OF_RECIPE,
            help="column of the dataset: text, chats (through the chat template) or token ids",
        ),
    ] = None,
    sequences: Sequences = None,
    length: Annotated[
        int | None, typer.Option(show_default=OF_RECIPE, help="tokens in each calibration sequence")
    ] = None,
    chats: Annotated[
        float | None,
        typer.Option(
            show_default=OF_RECIPE,
            help="share of the calibration sequences that are chats, whose answers the model writes itself, e.g. 0.5",
        ),
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(show_default=OF_RECIPE, help="draws the calibration windows and the signs of Hadamards"),
    ] = None,
    without: Annotated[str, typer.Option(show_default="none", help="transforms to switch off, e.g. T_k,S_n")] = "",
    rounding: Rounding = None,
    kv_strategy: Annotated[
        str | None,
        typer.Option(show_default=OF_RECIPE, help="KV cache scales per tensor or per head: tensor, head"),
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(
            show_default=OF_RECIPE,
            help="more bits where measurements say they help most: sites=N, extra_bytes=N or target_kl=X",
        ),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(show_default=OF_RECIPE, help="of what stays in floating point: auto, float32, bfloat16, float16"),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="replace an existing output when the new one is complete")
    ] = False,
    fresh: Annotated[
        bool, typer.Option("--fresh", help="start over, whatever an unfinished run has left to continue from")
    ] = False,
    device: Device = "auto",
    compute_dtype: Annotated[
        str | None,
        typer.Option(
            show_default=OF_RECIPE,
            help="of products with weights in end-to-end training: float32, bfloat16, or auto, which is float32 "
            "as long as bfloat16 wasn't measured on a GPU",
        ),
    ] = None,
    residency: Annotated[
        Memory, typer.Option(help="what is in memory: resident (all of the model), streamed (a layer at a time), auto")
    ] = Memory.auto,
    max_memory: Annotated[
        str | None,
        typer.Option(show_default="what is free there", help="of the device that the run may take, e.g. 8GB; for auto"),
    ] = None,
    quality: Annotated[
        int,
        typer.Option(
            min=0,
            help="windows of text that calibration left over to compare the result with the original on; 0: don't",
        ),
    ] = 4,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing")] = False,
) -> None:
    """Quantize MODEL and write a checkpoint that vLLM serves."""
    fields = given(precision=precision, seed=seed, dtype=dtype)
    fields["calibration"] = given(
        source=calibration,
        config=calibration_config,
        split=calibration_split,
        field=calibration_field,
        sequences=sequences,
        length=length,
        chats=chats,
    )
    if rounding is not None:
        fields["rounding"] = {"method": rounding}
    if compute_dtype is not None:
        fields["training"] = {"compute_dtype": compute_dtype}
    if budget is not None:
        name, equals, value = budget.partition("=")
        if not equals:
            raise FPTQuantError(f"--budget: '{budget}' is no limit: give sites=N, extra_bytes=N or target_kl=X")
        fields["budget"] = {name: value}
    chosen = require_start(model, recipe, fields, kv_strategy=kv_strategy, without=listed(without))
    limit = None if max_memory is None else parse_size("--max-memory", max_memory)
    publication, folder = Publication(output, overwrite=overwrite), require_model(model)
    if folder is not None:
        publication.require_apart(folder)

    from fptquant.devices import choose_device

    place = choose_device(device)

    from fptquant import parallel, pipeline
    from fptquant.progress import Stages
    from fptquant.run.job import open_job
    from fptquant.run.memory import choose_residency, room_for
    from fptquant.run.times import expected_seconds

    place = parallel.start(place)
    quiet_transformers()
    checking = err.status("checking model, recipe and calibration text")
    with checking if parallel.is_main() else nullcontext():
        job = open_job(model, chosen, leave_out=recipe in shipped_recipes(), device=place)
        wanted: Any = None if residency is Memory.auto else residency.value
        job = replace(job, residency=choose_residency(job, wanted, limit), room=room_for(place, limit))
        if dry_run:
            pipeline.prepare(job, output, overwrite=overwrite, fresh=fresh, dry_run=True)
    if parallel.is_main():
        shown, expected = (out if dry_run else info), expected_seconds(job, quality)
        shown.print(f"plan: {job.source.path} -> {output}", markup=False, highlight=False, soft_wrap=True)
        shown.print(plan_table(job, expected))
        show_notes(job.source)
        if dry_run:
            out.print(needs_table(job, expected))
            out.print("dry run: nothing was written")
    if dry_run:
        return
    stages = RichStages(expected) if parallel.is_main() else Stages()
    summary = pipeline.quantize(
        job, output, overwrite=overwrite, fresh=fresh, stages=stages, quality=quality, command=sys.argv[1:]
    )
    if parallel.is_main():
        _show(summary, model, output)


def _show(summary: Summary, model: str, output: Path) -> None:
    """What was made, how good it is, and what to do with it."""
    from fptquant.cli.serve import serve_command

    table = facts()
    for name, seconds in summary.seconds.items():
        table.add_row(name, f"{duration(seconds)}, peak memory {megabytes(summary.peak_bytes[name])}")
    table.add_row("time in all", duration(sum(summary.seconds.values())))
    table.add_row("peak memory", megabytes(summary.peak_memory_bytes))
    table.add_row("weights before", megabytes(summary.source_bytes))
    table.add_row("weights after", megabytes(summary.output_bytes))
    table.add_row("bits for a weight", f"{summary.bits_per_weight:.2f} on average, head and embedding apart")
    info.print(f"{output}", markup=False, highlight=False, soft_wrap=True)
    info.print(table)
    if summary.budget:
        info.print(summary.budget, soft_wrap=True)
    for note in summary.notes:
        info.print(f"note: {note}", soft_wrap=True)
    if summary.quality is not None:
        info.print(summary.quality.line(), highlight=False, soft_wrap=True)
    if summary.warning:
        err.print(f"warning: {summary.warning}", style="red", markup=False, highlight=False, soft_wrap=True)
    info.print("next:", highlight=False)
    for what, line in (
        ("verify", shlex.join(["fptquant", "verify", str(output), "--against", model])),
        ("evaluate", shlex.join(["fptquant", "evaluate", str(output), "--text", "FILE"])),
        ("serve", f"{shlex.join(['fptquant', 'serve', str(output)])}    # {shlex.join(serve_command(str(output)))}"),
    ):
        info.print(f"  {what:<9} {line}", markup=False, highlight=False, soft_wrap=True)
