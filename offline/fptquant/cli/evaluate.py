"""`fptquant evaluate`: perplexity on a text, or scores on tasks of lm-eval."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

import fptquant
from fptquant.calibration.formats import require_text
from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import Backend, Device, Model, given, listed, refuse_given
from fptquant.console import RichStages, err, grid, log, out, show_notes, verbose
from fptquant.errors import FPTQuantError
from fptquant.evaluation.vllm_backend import require_vllm
from fptquant.files import require_model, require_writable

if TYPE_CHECKING:
    from fptquant.evaluation.perplexity import Perplexity
    from fptquant.evaluation.tasks import Score
    from fptquant.loading import Source

_DTYPES = ("float32", "bfloat16", "float16")


@command()
def evaluate(
    context: typer.Context,
    model: Model,
    text: Annotated[
        Path | None, typer.Option(show_default="none", help="for perplexity: UTF-8 text file, compressed or not")
    ] = None,
    windows: Annotated[int, typer.Option(min=1, help="non-overlapping windows from the start of the text")] = 20,
    length: Annotated[int, typer.Option(min=8, help="tokens in each window")] = 512,
    tasks: Annotated[
        str, typer.Option(show_default="none", help="for scores: tasks or groups of lm-eval, e.g. arc_easy,hellaswag")
    ] = "",
    limit: Annotated[
        int | None, typer.Option(min=1, show_default="all", help="samples of each task, the first ones")
    ] = None,
    shots: Annotated[
        int | None, typer.Option(min=0, show_default="the task's", help="examples in front of each sample of a task")
    ] = None,
    include_path: Annotated[
        Path | None, typer.Option(show_default="none", help="directory with further task files, as lm-eval takes it")
    ] = None,
    against: Annotated[
        str | None, typer.Option(show_default="none", help="evaluate this model, too, and show it beside")
    ] = None,
    backend: Annotated[Backend, typer.Option(help="transformers (the simulation) or vllm")] = Backend.transformers,
    special_tokens: Annotated[
        bool,
        typer.Option("--special-tokens", help="start every window with the tokenizer's BOS, where it has one"),
    ] = False,
    json_file: Annotated[
        Path | None, typer.Option("--json", show_default="none", help="also write the result to this file")
    ] = None,
    device: Device = "auto",
    dtype: Annotated[
        str | None,
        typer.Option(show_default="float32 on CPUs, else the model's", help="of activations, with --backend vllm"),
    ] = None,
) -> None:
    """Measure perplexity on a text, or what lm-eval's tasks say; beside another model's, the original's for example."""
    names, models = listed(tasks), [model] if against is None else [model, against]
    for name in models:
        require_model(name)
    if json_file:
        require_writable("--json", json_file)
    if (text is None) == (not names):
        raise FPTQuantError("evaluate: give either --text, for perplexity, or --tasks")
    if text is not None:
        refuse_given(context, ("limit", "shots", "include_path"), "is for --tasks, not for --text")
    else:
        refuse_given(context, ("windows", "length", "special_tokens"), "is for --text, not for --tasks")
    if backend is Backend.vllm and device != "auto":
        raise FPTQuantError("--device: with --backend vllm, vLLM chooses the device itself: leave it out")
    if dtype is not None and (backend is not Backend.vllm or text is None or dtype not in _DTYPES):
        raise FPTQuantError(f"--dtype: goes with --backend vllm and --text, and is one of {', '.join(_DTYPES)}")
    if backend is Backend.vllm:
        require_vllm()
    if text is not None:
        require_text(text)
        results = [_perplexity(name, text, windows, length, backend, special_tokens, device, dtype) for name in models]
        content = _show_perplexity(results, models, text, backend, special_tokens)
    else:
        scores = _scores(models, names, include_path, limit, shots, backend, device)
        content = _show_scores(scores, models, limit, shots, backend)
    if json_file:
        content["version"] = fptquant.__version__
        json_file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _open(model: str, backend: Backend, device: str) -> Source:
    from fptquant.devices import CPU, choose_device

    place = CPU if backend is Backend.vllm else choose_device(device)
    from fptquant.loading import open_source

    quiet_transformers()
    source = open_source(model, device=place)
    show_notes(source)
    if backend is Backend.vllm:
        source.weights.require_alone()
    return source


def _perplexity(
    model: str,
    text: Path,
    windows: int,
    length: int,
    backend: Backend,
    special_tokens: bool,
    device: str,
    dtype: str | None,
) -> Perplexity:
    source = _open(model, backend, device)
    from fptquant.calibration.text import require_known
    from fptquant.evaluation.perplexity import evaluation_windows, layer_by_layer, measure
    from fptquant.evaluation.vllm_backend import VLLMEngine
    from fptquant.loading import load_model

    source.require_length("--length", length, generated=int(backend is Backend.vllm))
    tokens = evaluation_windows(source.tokenizer, text, windows, length, special_tokens=special_tokens)
    require_known(int(tokens.max()), source.config.vocab_size)
    stages = RichStages()
    with stages.stage("evaluate", "lower --windows or --length"):
        if backend is Backend.vllm:
            engine = VLLMEngine(source.path, length + 1, **given(dtype=dtype))
            result = measure(map(engine.score, stages.track(tokens, windows)), length)
            engine.close()
        else:
            network, layers = load_model(source, residency="streamed"), source.architecture.shape(source.config).layers
            track = partial(stages.track, total=layers)
            result = measure(layer_by_layer(network, source.architecture, tokens.to(source.device), track), length)
    return result


def _show_perplexity(
    results: list[Perplexity], models: list[str], text: Path, backend: Backend, special_tokens: bool
) -> dict[str, Any]:
    """Prints a column for each model, and returns what goes into the file."""
    shown = grid("", *_headers(models))
    for key in asdict(results[0]):
        values = [getattr(result, key) for result in results]
        cells = [f"{value:.4f}" if key == "perplexity" else str(value) for value in values]
        shown.add_row(key.replace("_", " "), *cells)
    _say(f"{model} on {text} ({backend.value})" for model in models)
    out.print(shown)
    settings = {"model": models[0], "text": str(text), "backend": backend.value, "special_tokens": special_tokens}
    content = {**asdict(results[0]), "settings": settings}
    if len(models) > 1:
        content["against"] = {"model": models[1], **asdict(results[1])}
    return content


def _scores(
    models: list[str],
    names: list[str],
    include_path: Path | None,
    limit: int | None,
    shots: int | None,
    backend: Backend,
    device: str,
) -> list[list[Score]]:
    """The scores of each model."""
    import logging

    from fptquant.evaluation.tasks import Tasks

    if not verbose():
        logging.getLogger("lm_eval").setLevel(logging.ERROR)
    found, chosen = [], Tasks(names, include_path)
    for model in models:
        with err.status(f"{model}: {', '.join(names)}"):
            log(f"{model}: {', '.join(names)}")
            source = _open(model, backend, device)
            found.append(chosen.run(source, vllm=backend is Backend.vllm, limit=limit, shots=shots))
    return found


def _show_scores(
    scores: list[list[Score]], models: list[str], limit: int | None, shots: int | None, backend: Backend
) -> dict[str, Any]:
    """Prints a column for each model, and returns what goes into the file."""
    shown = grid("task", "metric", "samples", *_headers(models))
    others = [{(score.task, score.metric): score for score in found} for found in scores]
    for score in scores[0]:
        cells = []
        for found in others:
            other = found[score.task, score.metric]
            cells.append(f"{other.value:.4f}" + ("" if other.error is None else f" ± {other.error:.4f}"))
        shown.add_row(score.task, score.metric, "" if score.samples is None else str(score.samples), *cells)
    _say(f"{model} ({backend.value})" for model in models)
    out.print(shown)
    if limit is not None:
        out.print(f"on the first {limit} samples of each task only")
    settings = {"model": models[0], "limit": limit, "shots": shots, "backend": backend.value}
    content: dict[str, Any] = {"scores": [asdict(score) for score in scores[0]], "settings": settings}
    if len(models) > 1:
        content["against"] = {"model": models[1], "scores": [asdict(score) for score in scores[1]]}
    return content


def _headers(models: list[str]) -> list[str]:
    """A column a model, by the last part of its path."""
    names = [Path(model).name for model in models]
    return [""] if len(names) == 1 else names


def _say(lines: Any) -> None:
    for line in lines:
        out.print(line, markup=False, highlight=False, soft_wrap=True)
