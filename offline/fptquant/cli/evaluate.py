"""`fptquant evaluate`."""

from __future__ import annotations

import json
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

import fptquant
from fptquant.calibration.formats import AS_TEXT, recognise
from fptquant.cli.app import command, quiet_transformers
from fptquant.cli.options import Backend, Device, Model
from fptquant.console import RichStages, facts, out, show_notes
from fptquant.errors import FPTQuantError
from fptquant.files import require_model, require_writable


@command()
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
    json_file: Annotated[
        Path | None, typer.Option("--json", show_default="none", help="also write the result to this file")
    ] = None,
    device: Device = "auto",
) -> None:
    """Measure perplexity."""
    require_model(model)
    if json_file:
        require_writable("--json", json_file)
    if backend is Backend.vllm and device != "auto":
        raise FPTQuantError("--device: with --backend vllm, vLLM chooses the device itself: leave it out")
    recognise(Path(str(text).removeprefix(AS_TEXT)))

    from fptquant.calibration.text import require_known
    from fptquant.devices import CPU, choose_device
    from fptquant.evaluation.perplexity import evaluation_windows, layer_by_layer, measure
    from fptquant.evaluation.vllm_backend import VLLMEngine
    from fptquant.loading import load_model, open_source

    quiet_transformers()
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
    shown = facts()
    out.print(f"{model} on {text}", markup=False, highlight=False, soft_wrap=True)
    for key, value in {"backend": backend.value, "special_tokens": special_tokens, **asdict(result)}.items():
        shown.add_row(key.replace("_", " "), f"{value:.4f}" if key == "perplexity" else str(value))
    out.print(shown)
    if json_file:
        content = json.dumps({**asdict(result), "settings": settings, "version": fptquant.__version__}, indent=2)
        json_file.write_text(content + "\n", encoding="utf-8")
