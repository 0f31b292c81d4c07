"""`fptquant sensitivity`."""

from __future__ import annotations

from dataclasses import replace
from enum import StrEnum
from pathlib import Path
from tempfile import gettempdir
from typing import Annotated

import typer

from fptquant.calibration.formats import require_text
from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import (
    Calibration,
    Device,
    Model,
    Precision,
    Rounding,
    Sequences,
    given,
    listed,
    require_start,
)
from fptquant.console import RichStages, grid, out, show_notes
from fptquant.errors import FPTQuantError
from fptquant.files import require_writable
from fptquant.options.sensitivity import KINDS, check_plot, require_kinds
from fptquant.recipe_files import shipped_recipes


class Granularity(StrEnum):
    """What is quantized together in one measurement."""

    kind = "kind"
    layer = "layer"


@command()
def sensitivity(
    model: Model,
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, or a YAML file")] = "fptquant-light",
    precision: Precision = None,
    by: Annotated[
        Granularity, typer.Option(help="kind: each kind of site in all layers; layer: in each layer by itself")
    ] = Granularity.kind,
    kinds: Annotated[str, typer.Option(show_default="all", help="which kinds of site, e.g. down_input,keys")] = "",
    text: Annotated[
        Path | None, typer.Option(show_default="the calibration windows", help="text to measure on")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="windows to measure on")] = 4,
    length: Annotated[int, typer.Option(min=8, help="tokens in each window")] = 256,
    calibration: Calibration = None,
    sequences: Sequences = None,
    rounding: Rounding = None,
    top: Annotated[int, typer.Option(min=1, help="rows to print, the worst first")] = 40,
    json_file: Annotated[
        Path | None,
        typer.Option("--json", show_default="none", help="keep the results here as they come; run again to go on"),
    ] = None,
    plot_file: Annotated[
        Path | None, typer.Option("--plot", show_default="none", help="draw them (.png, .svg, .pdf)")
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure which parts of MODEL quantization hurts most: one is quantized, all else stays in floating point.

    Transforms are where the recipe starts them, not trained.
    """
    fields = given(precision=precision)
    fields["calibration"] = given(source=calibration, sequences=sequences)
    if rounding is not None:
        fields["rounding"] = {"method": rounding}
    chosen = require_start(model, recipe, fields)
    require_kinds(listed(kinds))
    data = chosen.calibration
    if text is not None:
        require_text(text)
    elif windows > data.sequences or length > data.length:
        raise FPTQuantError(
            f"the calibration text is cut into {data.sequences} sequences of {data.length} tokens: "
            "lower --windows or --length, or give a --text"
        )
    if json_file:
        require_writable("--json", json_file)
    if plot_file:
        check_plot(plot_file)

    from fptquant.devices import choose_device

    place = choose_device(device)

    from fptquant import pipeline
    from fptquant.calibration.text import fingerprint
    from fptquant.evaluation.perplexity import evaluation_windows
    from fptquant.layers.scratch import scratch_in
    from fptquant.run.job import open_job
    from fptquant.run.memory import choose_residency, room_for
    from fptquant.run.needs import scratch_limit
    from fptquant.sensitivity import Probe, require_measurable, sites_of
    from fptquant.sensitivity.results import Results, measure_all, missing, plot

    quiet_transformers()
    job = open_job(model, chosen, leave_out=recipe in shipped_recipes(), device=place)
    show_notes(job.source)
    require_measurable(job)
    sites = sites_of(job, listed(kinds) or KINDS)
    if not sites:
        raise FPTQuantError(f"recipe '{job.recipe.name}' quantizes none of these sites")
    if text:
        job.source.require_length("--length", length)
        special_tokens = job.recipe.calibration.special_tokens
        tokens = evaluation_windows(job.source.tokenizer, text, windows, length, special_tokens=special_tokens)
        tokens = tokens.to(place)
    else:
        tokens = job.windows[:windows, :length]
    settings = {
        "model": job.source.fingerprint(),
        "recipe": job.recipe.digest(),
        "calibration": fingerprint(job.windows),
        "measured on": fingerprint(tokens),
    }
    results = Results(settings, json_file)
    stages, per_layer = RichStages(), by is Granularity.layer
    groups = missing(sites, results, per_layer=per_layer)
    if groups:
        room = room_for(place, None)
        job = replace(job, residency=choose_residency(job, None, None), room=room)
        network = pipeline.started(job, stages)
        probe = Probe(job, network, tokens)
        with scratch_in(Path(gettempdir()), scratch_limit(room)):
            with stages.stage("fit sites", "lower --sequences or calibration.length"):
                for _ in stages.track(probe.calibrate(site for group in groups.values() for site in group), job.layers):
                    pass
            with stages.stage("measure", "lower --windows or --length"):
                for _ in stages.track(measure_all(probe, groups, results), len(groups)):
                    pass
    assert results.unquantized is not None
    reference = results.unquantized.perplexity
    shown = grid("site", "layer", "KL (nats per token)", "perplexity", "change")
    for row in results.worst_first(per_layer=per_layer)[:top]:
        layer = "all" if row.layer is None else str(row.layer)
        found = row.effect
        change = f"{found.perplexity - reference:+.3f}"
        shown.add_row(row.kind, layer, f"{found.kl:.5f}", f"{found.perplexity:.3f}", change)
    out.print(shown)
    out.print(f"in floating point: perplexity {reference:.3f} on {windows} windows of {length} tokens")
    if plot_file:
        plot(results, plot_file, job.source.path.resolve().name)
