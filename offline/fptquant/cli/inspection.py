"""`fptquant inspect`: what a checkpoint is."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from fptquant.cli.app import command
from fptquant.cli.options import Checkpoint, require_checkpoint
from fptquant.console import facts, grid, out
from fptquant.units import megabytes


@command("inspect")
def inspect_(
    checkpoint: Checkpoint,
    as_json: Annotated[bool, typer.Option("--json", help="print JSON")] = False,
) -> None:
    """Show what CHECKPOINT is: precision, sizes by part, bits per weight, transforms, where it comes from."""
    require_checkpoint(checkpoint)
    from fptquant.report.inspection import inspect

    found = inspect(checkpoint.expanduser())
    if as_json:
        typer.echo(json.dumps(found, indent=2))
        return
    shown = facts()
    for section in ("model", "provenance"):
        for key, value in found[section].items():
            if value not in ("", None):
                shown.add_row(key.replace("_", " "), str(value))
    sizes = grid("part", "weights", "size", "bits per weight")
    for name, part in [*found["parts"].items(), ("all", found["all"])]:
        bits = f"{part['bits_per_weight']:.2f}" if part["weights"] else ""
        sizes.add_row(name, f"{part['weights'] / 1e6:,.1f} million", megabytes(part["bytes"]), bits)
    out.print(f"{checkpoint}", markup=False, highlight=False, soft_wrap=True)
    out.print(shown)
    out.print(sizes)
    if found["quality"]:
        from fptquant.report.quality import Quality

        out.print(Quality(**found["quality"]).line(), highlight=False, soft_wrap=True)
    if found["warning"]:
        out.print(f"warning: {found['warning']}", style="red", markup=False, highlight=False, soft_wrap=True)
