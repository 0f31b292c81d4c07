"""Our GPTQ recipes beside llm-compressor's GPTQ: time, memory and perplexity on one model and one text.

Model: SmolLM2-135M-Instruct, a dequantized GGUF, in float32. W4A16: 4-bit weights with a symmetric scale for each
output channel; all linear layers but the head. Both calibrate on the same 64 windows of 512 tokens of the shipped
text, token by token the same, with one thread. Perplexity of both with one scorer: what llm-compressor wrote is
dequantized by its own libraries, and both models run in transformers, on the first windows of
tests/data/wiki.test.txt. llm-compressor gets an environment of its own, `.venv-peers`. Rows are kept in `--work`.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from watch import Usage, watch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
PEER = "llmcompressor==0.14.0.1"
VENV = ".venv-peers"
PYTHON = ROOT / VENV / "bin" / "python"
PRECISION = "w4a16"
# Arguments of `fptquant quantize`, and of peers_llmcompressor.py.
OURS = {
    "fptquant 0.1, rtn": ["--recipe", "rtn"],
    "fptquant 0.1, gptq": ["--recipe", "gptq"],
    "fptquant 0.1, fptquant-light": ["--recipe", "fptquant-light"],
}
THEIRS = {
    "llm-compressor 0.14, GPTQ": [],
    "llm-compressor 0.14, GPTQ, observer mse": ["--observer", "memoryless_mse"],
}
FLOAT = "float32"


def main() -> None:
    """Measures what is missing and prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "peers")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=[FLOAT, *OURS, *THEIRS])
    arguments = parser.parse_args()
    from fetch_smollm2 import fetch
    from fptquant.recipe import Recipe
    from fptquant.run.job import open_job

    source, work = fetch(), arguments.work
    work.mkdir(parents=True, exist_ok=True)
    tokens = work / "tokens.safetensors"
    # those of every recipe here: the first token is no constant, since the KV cache isn't quantized
    windows = open_job(source, Recipe.load("gptq").changed("peers.py", precision=PRECISION)).windows
    save_file({"tokens": windows}, tokens)
    file = work / "peers.json"
    rows: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
    for name in arguments.only or [FLOAT, *OURS, *THEIRS]:
        if name not in rows:
            rows[name] = measure(name, source, tokens, arguments)
            file.write_text(json.dumps(rows, indent=1) + "\n")
            print(name, rows[name], file=sys.stderr, flush=True)
    print(table(rows, arguments.windows, tuple(windows.shape)))


def measure(name: str, source: Path, tokens: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Quantizes in a process of its own, which is measured, and scores the result."""
    if name == FLOAT:
        return {"perplexity": perplexity(source, arguments.windows)}
    output = arguments.work / name.replace(",", "").replace(" ", "-")
    shutil.rmtree(output, ignore_errors=True)
    log = output.with_name(f"{output.name}.log")
    if name in OURS:
        command = [sys.executable, "-m", "fptquant.cli", "quantize", source, "-o", output, "--fresh"]
        command += ["--precision", PRECISION, *OURS[name]]
        usage = finished(watch(command, log, {"OMP_NUM_THREADS": "1"}), log)
        scored = output
    else:
        make_environment()
        script = Path(__file__).with_name("peers_llmcompressor.py")
        environment = {"OMP_NUM_THREADS": "1", "PYTHONPATH": "", "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "0"}
        command = [PYTHON, script, "quantize", source, output, "--tokens", tokens, *THEIRS[name]]
        usage = finished(watch(command, log, environment), log)
        scored = output.with_name(f"{output.name}-float")
        shutil.rmtree(scored, ignore_errors=True)
        command = [PYTHON, script, "export", output, scored, "--original", source]
        subprocess.run(command, check=True, env={**os.environ, **environment})
        require_4_bits(source, scored)
    size = sum(weights.stat().st_size for weights in output.glob("*.safetensors"))
    return asdict(usage) | {"bytes": size, "perplexity": perplexity(scored, arguments.windows)}


def finished(usage: Usage, log: Path) -> Usage:
    """What a command took.

    Raises:
        SystemExit: it failed.
    """
    if usage.status:
        raise SystemExit(f"failed with status {usage.status}; the end of {log}:\n{log.read_text()[-2000:]}")
    return usage


def make_environment() -> None:
    """Installs llm-compressor and the torch that we run; kept until either changes."""
    from environments import TORCH_INDEX_URL, WITHOUT_WAITING, Environment

    torch_build = f"torch=={version('torch')}"
    environment = Environment(VENV)

    def fill() -> None:
        options = ["--extra-index-url", TORCH_INDEX_URL, *WITHOUT_WAITING]
        environment.pip("install", "--quiet", "--no-deps", torch_build, *options)
        # torch is named once more, or a CUDA build of several GB would replace it
        environment.pip("install", "--quiet", PEER, torch_build)

    environment.filled_once(f"{PEER} {torch_build}", fill)


def require_4_bits(source: Path, exported: Path) -> None:
    """Checks that an exported model has the original's tensors, and 16 values at most in each row of its projections.

    Raises:
        SystemExit: something else was quantized than we compare with.
    """
    before, after = (load_file(folder / "model.safetensors") for folder in (source, exported))
    if before.keys() != after.keys():
        raise SystemExit(f"'{exported}' has other tensors than '{source}'")
    for name, weight in after.items():
        if "_proj" not in name:
            alike = torch.equal(weight, before[name])
        else:
            alike = all(len(row.unique()) <= 16 for row in weight)
        if not alike:
            raise SystemExit(f"'{exported}': {name} is not what W4A16 without the head leaves of it")


def perplexity(checkpoint: Path, count: int) -> float:
    """As `fptquant evaluate` measures it: windows of 512 tokens without overlap or special tokens."""
    from fptquant.evaluation.perplexity import evaluation_windows, measure, transformers_scorer
    from fptquant.loading import load_model, open_source

    source = open_source(checkpoint)
    windows = evaluation_windows(source.tokenizer, ROOT / "tests" / "data" / "wiki.test.txt", count, 512)
    return measure(map(transformers_scorer(load_model(source)), windows), 512).perplexity


def table(rows: dict[str, dict[str, Any]], windows: int, calibration: tuple[int, ...]) -> str:
    """All rows, in Markdown."""
    sequences, length = calibration
    lines = [
        f"SmolLM2-135M, {PRECISION}, per channel, symmetric, head in floating point; calibration on {sequences} x "
        f"{length} tokens;",
        f"perplexity on {windows} x 512 tokens of wiki.test.txt; one thread; whole processes, start included.",
        "",
        "| | minutes | CPU minutes | peak GB | anonymous GB | checkpoint MB | perplexity |",
        "|---|---|---|---|---|---|---|",
    ]
    for name, row in rows.items():
        cells = ["-"] * 5
        if "seconds" in row:
            cells = [f"{row['seconds'] / 60:.1f}", f"{row['cpu'] / 60:.1f}"]
            cells += [f"{row['peak'] / 1e9:.2f}", f"{row['anonymous'] / 1e9:.2f}", f"{row['bytes'] / 1e6:.0f}"]
        lines.append(f"| {name} | {' | '.join(cells)} | {row['perplexity']:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
