"""Speed of static INT4 on a GPU at Llama-3-8B's sizes, beside what vLLM itself offers, in one table from one run.

    python benchmarks/bench_gpu.py --work DIR           # all rows; about 2 minutes each on an H100
    python benchmarks/bench_gpu.py --only bfloat16 "fptquant w4a8kv8" --profile
    python benchmarks/bench_gpu.py --widening           # products alone: from how many tokens on weights are widened

Random weights (`synthetic.py`), compiled, CUDA graphs, each row in a process of its own (`measure_speed.py`), its log
beside the results.
"""

from __future__ import annotations

import argparse
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import synthetic
import torch
import widening

ROOT = Path(__file__).resolve().parent.parent
PROMPTS, LENGTH, BATCHES = 8, 2048, (1, 16, 128)
BASELINE = "bfloat16"
DUMMY = {"load_format": "dummy"}


def kernel(name: str) -> dict[str, Any]:
    """Engine arguments that ask for one of our kernels."""
    return option(kernel=name)


def option(**given: Any) -> dict[str, Any]:
    """Engine arguments with options of ours."""
    return {"additional_config": {"fptquant": given}}


W4A8, W4A4 = synthetic.fptquant_config(8, 8), synthetic.fptquant_config(4, 4)
# checkpoint's directory, its quantization, engine arguments
ROWS: dict[str, tuple[str, Any, dict[str, Any]]] = {
    BASELINE: ("plain", None, DUMMY),
    "fptquant w4a8kv8": ("w4a8kv8", W4A8, {}),
    "fptquant w4a4kv4": ("w4a4kv4", W4A4, {}),
    "fptquant w4a8kv8, widened from 1024": ("w4a8kv8", W4A8, option(widen_from=1024)),
    "fptquant w4a8kv8, cutlass-int8": ("w4a8kv8", W4A8, kernel("cutlass-int8")),
    "compressed-tensors W4A16": ("ct-w4a16", synthetic.W4A16, {}),
    "compressed-tensors W8A8, dynamic": ("ct-w8a8", synthetic.W8A8, {}),
    "fp8, dynamic": ("plain", None, {**DUMMY, "quantization": "fp8"}),
    "fptquant w4a8kv8, humming-int8": ("w4a8kv8", W4A8, kernel("humming-int8,cutlass-int8")),
}


def main() -> None:
    """Measures every row, prints the table, keeps results as they come."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=ROOT / "out" / "bench-gpu", help="checkpoints, logs and results")
    parser.add_argument("--only", nargs="*", choices=ROWS, default=list(ROWS), metavar="ROW")
    parser.add_argument("--profile", action="store_true", help="which operators take the time, in the rows' logs")
    parser.add_argument("--widening", action="store_true", help="time products with widened weights, and nothing else")
    arguments = parser.parse_args()
    if not torch.cuda.is_available():
        raise SystemExit("torch finds no GPU here; on a CPU: make bench")
    if arguments.widening:
        widening.print_sweep()
        return
    arguments.work.mkdir(parents=True, exist_ok=True)
    kept = arguments.work / "results.json"
    results: dict[str, dict[str, float]] = json.loads(kept.read_text()) if kept.is_file() else {}
    failed = []
    for name in arguments.only:
        print(f"==> {name}", file=sys.stderr, flush=True)
        result = measure(arguments.work, name, arguments.profile)
        if result is None:
            failed.append(name)
            continue
        results[name] = result
        kept.write_text(json.dumps(results, indent=2) + "\n")
    print_table(results)
    if failed:
        raise SystemExit(f"failed: {'; '.join(failed)}; logs are in {arguments.work}")


def measure(work: Path, name: str, profile: bool) -> dict[str, float] | None:
    """Runs `measure_speed.py` on one row; None where it failed, with the log's end on stderr."""
    directory, quantization, engine = ROWS[name]
    checkpoint, log = work / directory, work / f"{name.replace(' ', '-').replace(',', '')}.log"
    if not (checkpoint / "done").is_file():
        shutil.rmtree(checkpoint, ignore_errors=True)
        synthetic.write(checkpoint, quantization, "cuda")
        (checkpoint / "done").touch()
        torch.cuda.empty_cache()
    settings = {
        "skip_tokenizer_init": True,
        "max_num_batched_tokens": 8192,
        "compilation_config": {"cudagraph_capture_sizes": list(BATCHES)},
        **engine,
    }
    command = [sys.executable, str(ROOT / "benchmarks" / "measure_speed.py"), str(checkpoint), "--compiled"]
    command += ["--dtype", "bfloat16", "--prompts", str(PROMPTS), "--prompt-length", str(LENGTH)]
    command += ["--batches", *map(str, BATCHES), "--engine", json.dumps(settings)]
    command += ["--profile"] if profile else []
    with log.open("w") as stderr:
        done = subprocess.run(command, stdout=subprocess.PIPE, stderr=stderr, text=True, check=False)
    if done.returncode:
        print("\n".join(log.read_text().splitlines()[-15:]), file=sys.stderr, flush=True)
        return None
    result: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return result


def print_table(results: dict[str, dict[str, float]]) -> None:
    """Tokens per second, with the ratio to bfloat16 where that was measured."""
    metrics = ["prefill_tokens_per_second", *(f"decode_{batch}_tokens_per_second" for batch in BATCHES)]
    base = results.get(BASELINE)
    print(f"\n{torch.cuda.get_device_name()}, torch {torch.__version__}\n")
    heads = [f"prefill {PROMPTS} x {LENGTH} tok/s", *(f"decode batch {batch} tok/s" for batch in BATCHES)]
    print(f"| Llama-3-8B sizes, random weights | {' | '.join(heads)} |\n|---{'|---' * len(metrics)}|")
    for name, row in results.items():
        ratios = [f" ({row[metric] / base[metric]:.2f}x)" if base else "" for metric in metrics]
        cells = (f"{row[metric]:.0f}{ratio}" for metric, ratio in zip(metrics, ratios, strict=True))
        print(f"| {name} | {' | '.join(cells)} |")


if __name__ == "__main__":
    main()
