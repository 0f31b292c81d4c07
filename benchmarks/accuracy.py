"""Perplexity of SmolLM2 at every preset, simulated and served, and how far the two are apart.

Model: SmolLM2-135M-Instruct, a dequantized GGUF. Text: the first windows of tests/data/wiki.test.txt. All ranges are
static. Checkpoints are kept in `--work` and results are written as they come, so an interrupted run continues.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "scripts"))
RECIPE = ["--recipe", "fptquant-light"]  # of rows that name none
ROWS = {
    "w4a16": ["--precision", "w4a16"],
    "w4a8": ["--precision", "w4a8"],
    "w4a8kv8": ["--precision", "w4a8kv8"],
    "w4a8kv8, S_n off": ["--precision", "w4a8kv8", "--without", "S_n"],
    "w4a8kv8, no transform": ["--precision", "w4a8kv8", "--recipe", "gptq"],
    "w4a4kv8": ["--precision", "w4a4kv8"],
    "w4a4kv4": ["--precision", "w4a4kv4"],
    "w4a4kv4, KV per head": ["--precision", "w4a4kv4", "--kv-strategy", "head"],
    "w4a4kv4, S_n off": ["--precision", "w4a4kv4", "--without", "S_n"],
    "w4a4kv4-symmetric": ["--precision", "w4a4kv4-symmetric"],
    "w4a4kv4, no transform": ["--precision", "w4a4kv4", "--recipe", "gptq"],
    "w4a8kv8, fptquant": ["--precision", "w4a8kv8", "--recipe", "fptquant"],
    "w4a4kv4, fptquant": ["--precision", "w4a4kv4", "--recipe", "fptquant"],
    "w4a8kv8, nearest": ["--precision", "w4a8kv8", "--rounding", "nearest"],
}


def main() -> None:
    """Quantizes, evaluates, prints one table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "accuracy")
    parser.add_argument("--windows", type=int, default=20)
    parser.add_argument("--only", nargs="*", choices=list(ROWS))
    arguments = parser.parse_args()
    from fetch_smollm2 import fetch

    source = fetch()
    results_file = arguments.work / "results.json"
    results = json.loads(results_file.read_text()) if results_file.is_file() else {}
    for name in ["float32", *(arguments.only or ROWS)]:
        if name not in results:
            checkpoint = source if name == "float32" else quantize(source, arguments.work, name)
            results[name] = evaluate(checkpoint, arguments.windows)
            arguments.work.mkdir(parents=True, exist_ok=True)
            results_file.write_text(json.dumps(results, indent=2) + "\n")
    print(f"\nperplexity, {arguments.windows} windows of 512 tokens of wiki.test.txt, static\n")
    print(
        "| SmolLM2-135M | simulated | served, exact mode | difference | greedy, exact mode | served, as users run it |"
    )
    print("|---|---|---|---|---|---|")
    for name, row in results.items():
        exact, difference = "-", "-"
        if row["exact"] is not None:
            exact, difference = f"{row['exact']:.4f}", f"{100 * abs(row['exact'] / row['simulated'] - 1):.5f} %"
        print(f"| {name} | {row['simulated']:.4f} | {exact} | {difference} | {row['greedy']} | {row['served']:.4f} |")


def quantize(source: Path, work: Path, name: str) -> Path:
    """The checkpoint of a row, made if it isn't there."""
    output = work / name.replace(",", "").replace(" ", "-")
    if not output.is_dir():
        fptquant = Path(sys.executable).parent / "fptquant"
        subprocess.run([fptquant, "quantize", source, "-o", output, *RECIPE, *ROWS[name]], check=True)
    return output


def evaluate(checkpoint: Path, count: int) -> dict[str, float | str | None]:
    """Perplexity simulated, served, and served in exact mode, where 20 greedy continuations are compared too."""
    from fptquant.evaluation.equivalence import check_greedy
    from fptquant.evaluation.perplexity import evaluation_windows, measure, transformers_scorer
    from fptquant.evaluation.vllm_backend import VLLMEngine
    from fptquant.loading import load_model, open_source
    from fptquant.simulate.install import set_exact

    source = open_source(checkpoint)
    windows = evaluation_windows(source.tokenizer, ROOT / "tests" / "data" / "wiki.test.txt", count, 512)
    model = load_model(source)
    set_exact(model)
    row: dict[str, float | str | None] = {"exact": None, "greedy": "-"}
    row["simulated"] = measure(map(transformers_scorer(model), windows), 512).perplexity
    engine = VLLMEngine(checkpoint, 513)
    row["served"] = measure(map(engine.score, windows), 512).perplexity
    engine.close()
    if has_quantized_cache(model):
        engine = VLLMEngine(checkpoint, 513, exact=True)
        row["exact"] = measure(map(engine.score, windows), 512).perplexity
        starts = torch.linspace(0, 400, 20, dtype=torch.int64).tolist()
        prompts = torch.stack([windows[i % count, start : start + 32] for i, start in enumerate(starts)])
        row["greedy"] = check_greedy(model, engine, prompts, new_tokens=16).measured
        engine.close()
    print(checkpoint.name, row, file=sys.stderr, flush=True)
    return row


def has_quantized_cache(model: torch.nn.Module) -> bool:
    """Exact mode needs an attention that is ours."""
    return any(name.endswith("k_scale") for name, _ in model.named_buffers())


if __name__ == "__main__":
    main()
