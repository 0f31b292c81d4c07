"""The `fptquant` command; each subcommand imports what it needs, so that `fptquant --help` answers at once."""

from __future__ import annotations

import json
import signal
import sys
from contextlib import nullcontext
from dataclasses import asdict, replace
from enum import StrEnum
from functools import partial
from pathlib import Path
from tempfile import gettempdir
from typing import TYPE_CHECKING, Annotated, Any, NoReturn

import typer
from rich.markup import escape
from rich.table import Table

import fptquant
from fptquant.console import RichStages, err, megabytes, needs_table, out, plan_table, show_notes
from fptquant.errors import FPTQuantError, is_device_lost, is_disk_full, is_out_of_memory, unknown
from fptquant.files import first_line, require_writable
from fptquant.progress import Stages

if TYPE_CHECKING:
    from fptquant.recipe import Recipe

app = typer.Typer(
    name="fptquant",
    help="Static INT4 quantization of Hugging Face checkpoints with function-preserving transforms.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)
_INTERRUPTED = 128 + signal.SIGINT  # exit status; Typer's answer to Ctrl-C
_TERMINATED = 128 + signal.SIGTERM


class Backend(StrEnum):
    """What runs the model."""

    transformers = "transformers"
    vllm = "vllm"


Model = Annotated[str, typer.Argument(help="directory of a Hugging Face checkpoint, or a hub name")]
# the names are spelt out here, because the registries that know them import torch (a test compares)
Precision = Annotated[
    str | None,
    typer.Option(
        help="one of: w4a8kv8, w4a8kv8-g128, w4a8kv8-g64, w4a8kv8-g32, w4a4kv4, w4a4kv8, w4a8, w4a16, w4a4kv4-symmetric"
    ),
]
# by the recipe's field that it sets
OPTIONS = {
    "precision": "--precision",
    "seed": "--seed",
    "dtype": "--dtype",
    "calibration.source": "--calibration",
    "calibration.config": "--calibration-config",
    "calibration.split": "--calibration-split",
    "calibration.field": "--calibration-field",
    "calibration.sequences": "--sequences",
    "calibration.length": "--length",
    "rounding.method": "--rounding",
    "budget": "--budget",
    "training.compute_dtype": "--compute-dtype",
}


class Memory(StrEnum):
    """What of a model is in memory."""

    auto = "auto"
    resident = "resident"
    streamed = "streamed"


Device = Annotated[
    str,
    typer.Option(
        help="what computes: auto (torch's accelerator, else the CPU), cpu, cuda, cuda:1, ...; only run on CPUs so far"
    ),
]
Rounding = Annotated[str | None, typer.Option(help="weight rounding: nearest, gptq, quantease")]


@app.command()
def quantize(
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="directory to write the quantized checkpoint to")],
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, or a YAML file")] = "fptquant",
    precision: Precision = None,
    calibration: Annotated[
        str | None,
        typer.Option(help="text file, dataset (file, directory, hub name), or 'builtin'; text:FILE takes JSON as text"),
    ] = None,
    calibration_config: Annotated[str | None, typer.Option(help="configuration name of the dataset")] = None,
    calibration_split: Annotated[str | None, typer.Option(help="split of the dataset")] = None,
    calibration_field: Annotated[
        str | None, typer.Option(help="column of the dataset: text, chats (through the chat template) or token ids")
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="number of calibration sequences")] = None,
    length: Annotated[int | None, typer.Option(help="tokens in each calibration sequence")] = None,
    seed: Annotated[int | None, typer.Option(help="draws the calibration windows and the signs of Hadamards")] = None,
    without: Annotated[str, typer.Option(help="transforms to switch off, e.g. T_k,S_n")] = "",
    rounding: Rounding = None,
    kv_strategy: Annotated[
        str | None, typer.Option(help="KV cache scales per tensor or per head: tensor, head")
    ] = None,
    budget: Annotated[
        str | None,
        typer.Option(help="more bits where measurements say they help most: sites=N, extra_bytes=N or target_kl=X"),
    ] = None,
    dtype: Annotated[
        str | None, typer.Option(help="of what stays in floating point: auto, float32, bfloat16, float16")
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
            help="of products with weights in end-to-end training: float32, bfloat16, or auto, which is float32 "
            "as long as bfloat16 wasn't measured on a GPU"
        ),
    ] = None,
    residency: Annotated[
        Memory, typer.Option(help="what is in memory: resident (all of the model), streamed (a layer at a time), auto")
    ] = Memory.auto,
    max_memory: Annotated[
        str | None,
        typer.Option(help="of the device that the run may take, e.g. 8GB (default: what is free there); decides auto"),
    ] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="check everything, print the plan, write nothing")] = False,
) -> None:
    """Quantize MODEL and write a checkpoint that vLLM serves."""
    from fptquant import parallel, pipeline
    from fptquant.devices import choose_device
    from fptquant.evaluation.vllm_backend import on_gpu
    from fptquant.recipe import Recipe, shipped_recipes
    from fptquant.run.job import open_job
    from fptquant.run.memory import choose_residency, parse_size, room_for
    from fptquant.run.publication import Publication

    place = parallel.start(choose_device(device))
    changes = {"precision": precision, "seed": seed, "dtype": dtype}
    fields: dict[str, Any] = {key: value for key, value in changes.items() if value is not None}
    options = {
        "source": calibration,
        "config": calibration_config,
        "split": calibration_split,
        "field": calibration_field,
        "sequences": sequences,
        "length": length,
    }
    fields["calibration"] = {key: value for key, value in options.items() if value is not None}
    if rounding is not None:
        fields["rounding"] = {"method": rounding}
    if compute_dtype is not None:
        fields["training"] = {"compute_dtype": compute_dtype}
    if budget is not None:
        name, equals, value = budget.partition("=")
        if not equals:
            raise FPTQuantError(f"--budget: '{budget}' is no limit: give sites=N, extra_bytes=N or target_kl=X")
        fields["budget"] = {name: value}
    chosen = _without(Recipe.load(recipe).changed("options", OPTIONS, **fields), without)
    if kv_strategy is not None:
        kept = chosen.precision.model_dump(mode="json")
        if kept["kv_cache"]["bits"] == 16:
            raise FPTQuantError("--kv-strategy: the KV cache is not quantized at this precision: leave it out")
        kept["kv_cache"]["strategy"] = kv_strategy
        chosen = chosen.changed(options={"precision.kv_cache.strategy": "--kv-strategy"}, precision=kept)

    limit = None if max_memory is None else parse_size("--max-memory", max_memory)
    Publication(output, overwrite=overwrite)  # the quickest check
    _quiet_transformers()
    checking = err.status("checking model, recipe and calibration text")
    with checking if parallel.is_main() else nullcontext():
        job = open_job(model, chosen, leave_out=recipe in shipped_recipes(), device=place)
        wanted: Any = None if residency is Memory.auto else residency.value
        job = replace(job, residency=choose_residency(job, wanted, limit), room=room_for(place, limit))
        if dry_run:
            pipeline.prepare(job, output, overwrite=overwrite, fresh=fresh, dry_run=True)
    if parallel.is_main():
        out.print(plan_table(job, output))
        show_notes(job.source)
        if dry_run:
            out.print(needs_table(job))
            out.print("dry run: nothing was written")
    if dry_run:
        return
    stages = RichStages() if parallel.is_main() else Stages()
    summary = pipeline.quantize(job, output, overwrite=overwrite, fresh=fresh, stages=stages)
    if not parallel.is_main():
        return
    table = Table(title=f"{output}", show_header=False)
    for name, seconds in summary.seconds.items():
        table.add_row(name, f"{seconds:.1f} s, {megabytes(summary.peak_bytes[name])}")
    table.add_row("peak memory", megabytes(summary.peak_memory_bytes))
    table.add_row("weights before", megabytes(summary.source_bytes))
    table.add_row("weights after", megabytes(summary.output_bytes))
    table.add_row("bits for a weight", f"{summary.bits_per_weight:.2f} on average, head and embedding apart")
    out.print(table)
    if summary.budget:
        out.print(summary.budget, soft_wrap=True)
    for note in summary.notes:
        out.print(f"note: {note}", soft_wrap=True)
    precise = "" if on_gpu() else " --dtype float32"  # vLLM takes 16 bits otherwise
    out.print(f"serve it: vllm serve {output} --quantization fptquant{precise}", soft_wrap=True)


@app.command()
def verify(
    checkpoint: Annotated[Path, typer.Argument(help="directory that `fptquant quantize` wrote")],
    against: Annotated[str, typer.Option(help="the original model")],
    text: Annotated[
        Path | None, typer.Option(help="text to compare on (default: the shipped calibration text)")
    ] = None,
    windows: Annotated[int, typer.Option(min=1)] = 4,
    length: Annotated[int, typer.Option(min=8)] = 256,
    vllm: Annotated[bool, typer.Option("--vllm/--no-vllm", help="compare through vLLM too, when installed")] = True,
    device: Device = "auto",
) -> None:
    """Check that a checkpoint is what it claims to be; exit status 1 when a figure is out of tolerance."""
    from importlib import resources

    from fptquant.devices import CPU, choose_device
    from fptquant.evaluation.equivalence import (
        check_function_preserved,
        check_greedy,
        check_read_back,
        check_recorded,
        check_served,
        check_served_exactly,
        check_unaltered,
    )
    from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
    from fptquant.evaluation.vllm_backend import VLLMEngine, on_gpu, vllm_installed
    from fptquant.loading import open_source
    from fptquant.run.job import job_of
    from fptquant.simulate.install import set_exact

    _quiet_transformers()
    vllm = vllm and vllm_installed()
    open_source(checkpoint).require_length("--length", length, generated=int(vllm))
    # vLLM wants nearly all of a GPU's memory for itself
    place = CPU if device == "auto" and vllm and on_gpu() else choose_device(device)
    job = job_of(checkpoint, against, device=place)
    if text is None:
        text = Path(str(resources.files("fptquant") / "data" / "wiki.calib.txt"))
    tokens = evaluation_windows(job.source.tokenizer, text, windows, length).to(place)
    checks = [check_unaltered(checkpoint)]
    with err.status("original and transformed model"):
        check, transformed = check_function_preserved(job, tokens)
        checks.append(check)
    with err.status("simulated model and checkpoint read back"):
        check, simulated = check_read_back(job, transformed, checkpoint, tokens)
        checks += [check, check_recorded(simulated, checkpoint)]
    if vllm:
        with err.status("vLLM, as users run it"):
            engine = VLLMEngine(checkpoint, length + 1)
            checks.append(check_served(transformers_scorer(simulated), engine.score, tokens))
            engine.close()
        if job.config.kv_cache.bits < 16 and not on_gpu():
            with err.status("vLLM, exact mode"):
                set_exact(simulated)
                engine = VLLMEngine(checkpoint, length + 1, exact=True)
                checks.append(check_served_exactly(transformers_scorer(simulated), engine.score, tokens))
                checks.append(check_greedy(simulated, engine, tokens[:, : length // 2], new_tokens=16))
                engine.close()
    table = Table("check", "measured", "limit", "", title=f"{checkpoint} on {windows} windows of {length} tokens")
    for check in checks:
        table.add_row(check.name, check.measured, check.limit, "ok" if check.passed else "FAILED")
    out.print(table)
    if not vllm:
        out.print("through vLLM: not checked" + ("" if vllm_installed() else " (vLLM is not installed)"))
    if not all(check.passed for check in checks):
        raise typer.Exit(1)


@app.command()
def evaluate(
    model: Model,
    text: Annotated[Path, typer.Option(help="UTF-8 text file, compressed or not")],
    windows: Annotated[int, typer.Option(min=1, help="non-overlapping windows from the start of the text")] = 20,
    length: Annotated[int, typer.Option(min=8, help="tokens in each window")] = 512,
    backend: Annotated[Backend, typer.Option(help="transformers (the simulation) or vllm")] = Backend.transformers,
    special_tokens: Annotated[
        bool,
        typer.Option("--special-tokens", help="start every window with the tokenizer's BOS, where it has one"),
    ] = False,
    json_file: Annotated[Path | None, typer.Option("--json", help="also write the result to this file")] = None,
    device: Device = "auto",
) -> None:
    """Measure perplexity."""
    from fptquant.calibration.text import require_known
    from fptquant.devices import CPU, choose_device
    from fptquant.evaluation.perplexity import evaluation_windows, layer_by_layer, measure
    from fptquant.evaluation.vllm_backend import VLLMEngine
    from fptquant.loading import load_model, open_source

    _quiet_transformers()
    if json_file:
        require_writable("--json", json_file)
    if backend is Backend.vllm and device != "auto":
        raise FPTQuantError("--device: with --backend vllm, vLLM chooses the device itself: leave it out")
    place = CPU if backend is Backend.vllm else choose_device(device)
    source = open_source(model, device=place)
    show_notes(source)
    source.require_length("--length", length, generated=int(backend is Backend.vllm))
    if backend is Backend.vllm:
        source.weights.require_alone()
    tokens = evaluation_windows(source.tokenizer, text, windows, length, special_tokens=special_tokens).to(place)
    require_known(int(tokens.max()), source.config.vocab_size)
    stages = RichStages()
    with stages.stage("evaluate", "lower --windows or --length"):
        if backend is Backend.vllm:
            engine = VLLMEngine(source.path, length + 1)
            result = measure(map(engine.score, stages.track(tokens, windows)), length)
            engine.close()
        else:
            network, layers = load_model(source, residency="streamed"), source.architecture.shape(source.config).layers
            track = partial(stages.track, total=layers)
            result = measure(layer_by_layer(network, source.architecture, tokens, track), length)
    settings = {"model": model, "text": str(text), "backend": backend.value, "special_tokens": special_tokens}
    table = Table(show_header=False)
    for key, value in {**settings, **asdict(result)}.items():
        table.add_row(key.replace("_", " "), f"{value:.4f}" if key == "perplexity" else str(value))
    out.print(table)
    if json_file:
        content = json.dumps({**asdict(result), "settings": settings, "version": fptquant.__version__}, indent=2)
        json_file.write_text(content + "\n", encoding="utf-8")


class Granularity(StrEnum):
    """What is quantized together in one measurement."""

    kind = "kind"
    layer = "layer"


@app.command()
def sensitivity(
    model: Model,
    recipe: Annotated[str, typer.Option(help="name of a shipped recipe, or a YAML file")] = "fptquant-light",
    precision: Precision = None,
    by: Annotated[
        Granularity, typer.Option(help="kind: each kind of site in all layers; layer: in each layer by itself")
    ] = Granularity.kind,
    kinds: Annotated[str, typer.Option(help="which kinds of site, e.g. down_input,keys (default: all)")] = "",
    text: Annotated[Path | None, typer.Option(help="text to measure on (default: the calibration windows)")] = None,
    windows: Annotated[int, typer.Option(min=1, help="windows to measure on")] = 4,
    length: Annotated[int, typer.Option(min=8, help="tokens in each window")] = 256,
    calibration: Annotated[
        str | None,
        typer.Option(help="text file, dataset (file, directory, hub name), or 'builtin'; text:FILE takes JSON as text"),
    ] = None,
    sequences: Annotated[int | None, typer.Option(help="number of calibration sequences")] = None,
    rounding: Rounding = None,
    top: Annotated[int, typer.Option(min=1, help="rows to print, the worst first")] = 40,
    json_file: Annotated[
        Path | None, typer.Option("--json", help="keep the results here as they come; run again to go on")
    ] = None,
    plot_file: Annotated[Path | None, typer.Option("--plot", help="draw them (.png, .svg, .pdf)")] = None,
    device: Device = "auto",
) -> None:
    """Measure which parts of MODEL quantization hurts most: one is quantized, all else stays in floating point.

    Transforms are where the recipe starts them, not trained.
    """
    from fptquant import pipeline
    from fptquant.calibration.text import fingerprint
    from fptquant.devices import choose_device
    from fptquant.evaluation.perplexity import evaluation_windows
    from fptquant.layers.scratch import scratch_in
    from fptquant.recipe import Recipe, shipped_recipes
    from fptquant.run.job import open_job
    from fptquant.run.memory import choose_residency, room_for
    from fptquant.run.needs import scratch_limit
    from fptquant.sensitivity import KINDS, Probe, require_measurable, sites_of
    from fptquant.sensitivity.results import Results, check_plot, measure_all, missing, plot

    options = {"source": calibration, "sequences": sequences}
    fields: dict[str, Any] = {"calibration": {key: value for key, value in options.items() if value is not None}}
    if precision is not None:
        fields["precision"] = precision
    if rounding is not None:
        fields["rounding"] = {"method": rounding}
    if plot_file:
        check_plot(plot_file)
    _quiet_transformers()
    chosen = Recipe.load(recipe).changed("options", OPTIONS, **fields)
    place = choose_device(device)
    job = open_job(model, chosen, leave_out=recipe in shipped_recipes(), device=place)
    show_notes(job.source)
    require_measurable(job)
    sites = sites_of(job, [part.strip() for part in kinds.split(",") if part.strip()] or KINDS)
    if not sites:
        raise FPTQuantError(f"recipe '{job.recipe.name}' quantizes none of these sites")
    if text:
        job.source.require_length("--length", length)
        special_tokens = job.recipe.calibration.special_tokens
        tokens = evaluation_windows(job.source.tokenizer, text, windows, length, special_tokens=special_tokens)
        tokens = tokens.to(place)
    else:
        tokens = job.windows[:windows, :length]
        if tokens.shape != (windows, length):
            raise FPTQuantError(
                f"the calibration text was cut into {job.windows.shape[0]} sequences of {job.windows.shape[1]} tokens: "
                "lower --windows or --length, or give a --text"
            )
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
    table = Table("site", "layer", "KL (nats per token)", "perplexity", "change")
    for row in results.worst_first(per_layer=per_layer)[:top]:
        layer = "all" if row.layer is None else str(row.layer)
        found = row.effect
        change = f"{found.perplexity - reference:+.3f}"
        table.add_row(row.kind, layer, f"{found.kl:.5f}", f"{found.perplexity:.3f}", change)
    out.print(table)
    out.print(f"in floating point: perplexity {reference:.3f} on {windows} windows of {length} tokens")
    if plot_file:
        plot(results, plot_file, job.source.path.resolve().name)


@app.command()
def doctor() -> None:
    """Show what this machine would serve with, and compare its kernels with the format; exit status 1 on a failure."""
    from fptquant.evaluation.vllm_backend import vllm_installed

    if not vllm_installed():
        raise FPTQuantError("vLLM is not installed, so nothing can be served here: run scripts/install.sh")
    from vllm_fptquant import doctor as examination

    for name, version in examination.versions().items():
        out.print(f"{name} {version}", highlight=False)
    out.print(f"device: {examination.device_name()}", highlight=False)
    table = Table("layer", "kernel", "", "result", "")
    failed = False
    for result in examination.check_kernels():
        failed |= result.status == "fail"
        table.add_row(result.layer, result.kernel, "serves" if result.chosen else "", result.status, result.detail)
    out.print(table)
    if failed:
        raise typer.Exit(1)


@app.command()
def families() -> None:
    """List the model families that can be quantized and served, and what holds for them."""
    from fptquant.report.families import COLUMNS, rows

    table = Table(*COLUMNS)
    table.columns[0].no_wrap = True
    for row in rows():
        table.add_row(*map(escape, row))
    out.print(table)


@app.command()
def recipes(
    name: Annotated[str, typer.Argument(help="print all settings of this recipe (a name, or a YAML file)")] = "",
    fields: Annotated[bool, typer.Option("--fields", help="list what a recipe may set, with the defaults")] = False,
) -> None:
    """List the shipped recipes, the precisions and the transforms; or what is in a recipe."""
    import yaml

    from fptquant.recipe import PRECISIONS, Recipe, settings, shipped_recipes
    from fptquant.transforms import TRANSFORMS

    if name:
        typer.echo(yaml.safe_dump(Recipe.load(name).to_dict(), sort_keys=False), nl=False)
        return
    if fields:
        table = Table("field", "default", "")
        for setting in settings(Recipe):
            table.add_row(*map(escape, setting))
        out.print(table)
        return
    table = Table("recipe", "description")
    for name in shipped_recipes():
        table.add_row(name, Recipe.load(name).description)
    out.print(table)
    out.print(f"precisions: {', '.join(PRECISIONS)}\ntransforms: {', '.join(TRANSFORMS)}")


def _version(show: bool) -> None:
    if show:
        out.print(f"fptquant {fptquant.__version__}")
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
        app()
    except FPTQuantError as error:
        _fail(str(error))
    except (MemoryError, RuntimeError, OSError) as error:
        if is_device_lost(error):
            _fail(f"the device failed ({first_line(error)}): run again, on --device cpu if it fails there again")
        if is_disk_full(error):
            _fail("the disk is full: free some space, or set TMPDIR to a directory on another one, and run again")
        if not is_out_of_memory(error):
            raise
        _fail("out of memory: free some, or give shorter or fewer sequences")
    except SystemExit as stop:
        if stop.code in (_INTERRUPTED, _TERMINATED):
            if not _fails_first():
                raise
            resumable = sys.argv[1:2] == ["quantize"] or (sys.argv[1:2] == ["sensitivity"] and "--json" in sys.argv)
            err.print("interrupted" + ": run the same command again, without --fresh, to continue" * resumable)
        raise


def _fail(message: str) -> NoReturn:
    if _fails_first():
        line = " ".join(message.split())
        err.print(f"error: {line}", style="red", markup=False, highlight=False, soft_wrap=True)
    sys.exit(2)


def _fails_first() -> bool:
    """Whether no other process of the run has failed before, so that the user reads one line."""
    parallel = sys.modules.get("fptquant.parallel")  # it imports torch
    return parallel is None or bool(parallel.fails_first())


def _without(recipe: Recipe, names: str) -> Recipe:
    from fptquant.transforms import TRANSFORMS

    kept: dict[str, Any] = recipe.to_dict()["transforms"]
    for name in filter(None, (part.strip() for part in names.split(","))):
        if name not in TRANSFORMS:
            raise unknown("transform", name, TRANSFORMS)
        kept.pop(name, None)
    return recipe.changed("--without", transforms=kept)


def _quiet_transformers() -> None:
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    main()
