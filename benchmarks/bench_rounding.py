"""Time and memory of scales, ranges and rounding at the sizes of real layers, on this CPU, in one table.

    OMP_NUM_THREADS=1 python benchmarks/bench_rounding.py
    OMP_NUM_THREADS=2 python benchmarks/bench_rounding.py --only round_gptq --sizes 14336x4096

Random weights and inputs; each row in a process of its own. "extra" is the peak of resident memory over what the
arguments take, in GB and in float64 matrices (K, K), result included; "CPU s" is what counts beside other work.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor

from fptquant.calibration.moments import second_moment
from fptquant.quantize import (
    InputRangeOptions,
    RangeOptions,
    WeightRangeOptions,
    search_input_range,
    search_range,
    weight_scales,
)
from fptquant.quantize.rounding import ROUNDERS, RoundingOptions

TOKENS = 64 * 512  # of the calibration by default
HESSIAN_TOKENS = 4096  # fewer than columns: as near to singular as real Hessians are
KV_WIDTH, KV_HEADS = 1024, 8
SIZES = ["2048x6144", "2048x11264", "5632x2048", "4096x6144", "14336x4096"]  # K x N


def inputs(columns: int, tokens: int) -> Tensor:
    """(tokens, K) of channels that differ in size by a factor of 30."""
    x = torch.randn(tokens, columns, generator=torch.Generator().manual_seed(1))
    return x.mul_(torch.logspace(-1, 0.5, columns)[torch.randperm(columns, generator=torch.Generator().manual_seed(2))])


def weights(columns: int, rows: int) -> Tensor:
    """(N, K) float32."""
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(0))


def prepare_rounding(method: str, columns: int, rows: int) -> Callable[[], object]:
    """One of the methods, at 4 bits."""
    weight, options = weights(columns, rows), RoundingOptions(method=method)
    scale = weight_scales(weight, 4, WeightRangeOptions(method="minmax"))
    hessian = second_moment(inputs(columns, HESSIAN_TOKENS))
    return lambda: ROUNDERS[method](weight, scale, 4, hessian, options)


def prepare_scales(method: str, columns: int, rows: int) -> Callable[[], object]:
    """Channel scales with an importance of columns, as before GPTQ."""
    weight, importance = weights(columns, rows), torch.rand(columns)
    return lambda: weight_scales(weight, 4, WeightRangeOptions(method=method), importance)


def prepare_moment(weighted: bool, columns: int, rows: int) -> Callable[[], object]:
    """The Hessian of all calibration tokens."""
    seen = inputs(columns, TOKENS)
    importance = torch.rand(64, 512) if weighted else None
    return lambda: second_moment(seen, importance)


def prepare_input_range(columns: int, rows: int) -> Callable[[], object]:
    """The range of a layer's input."""
    seen = inputs(columns, TOKENS)
    return lambda: search_input_range(seen, 8, False, InputRangeOptions())


def prepare_kv_range(columns: int, rows: int) -> Callable[[], object]:
    """A range per head of keys, 8 heads of 128, whatever the size of the layer."""
    seen = inputs(KV_WIDTH, TOKENS).view(KV_HEADS, -1)
    return lambda: [search_range(head, 4, False, RangeOptions()) for head in seen]


FUNCTIONS: dict[str, Callable[[int, int], Callable[[], object]]] = {
    "weight_scales minmax": lambda k, n: prepare_scales("minmax", k, n),
    "weight_scales lp": lambda k, n: prepare_scales("lp", k, n),
    "search_range kv": prepare_kv_range,
    "search_input_range": prepare_input_range,
    "second_moment": lambda k, n: prepare_moment(False, k, n),
    "second_moment weighted": lambda k, n: prepare_moment(True, k, n),
    "round_gptq": lambda k, n: prepare_rounding("gptq", k, n),
    "round_quantease": lambda k, n: prepare_rounding("quantease", k, n),
}


def resident(field: str) -> int:
    """Bytes of resident memory: now (VmRSS) or at most so far (VmHWM)."""
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    return 1024 * int(status.split(f"{field}:")[1].split()[0])


def measure(name: str, columns: int, rows: int) -> dict[str, float]:
    """Seconds, CPU seconds and peak extra bytes of one call, in this process."""
    call = FUNCTIONS[name](columns, rows)
    Path("/proc/self/clear_refs").write_text("5", encoding="utf-8")  # the peak counts from here
    before, start, busy = resident("VmRSS"), time.perf_counter(), time.process_time()
    call()
    seconds, cpu = time.perf_counter() - start, time.process_time() - busy
    return {"seconds": seconds, "cpu": cpu, "extra": resident("VmHWM") - before}


def main() -> None:
    """Measures every row and prints the table as it comes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="*", choices=FUNCTIONS, default=list(FUNCTIONS), metavar="FUNCTION")
    parser.add_argument("--sizes", nargs="*", default=SIZES, metavar="KxN")
    parser.add_argument("--one", nargs=2, metavar=("FUNCTION", "KxN"), help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.one:
        name, size = arguments.one
        print(json.dumps(measure(name, *map(int, size.split("x")))))
        return
    print(f"{torch.get_num_threads()} threads\n")
    print(
        "| function | K x N | s | CPU s | extra GB | extra in float64 (K, K) |\n|---|---|---|---|---|---|", flush=True
    )
    for name in arguments.only:
        for size in arguments.sizes:
            command = [sys.executable, __file__, "--one", name, size]
            result = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
            extra, square = result["extra"], 8 * int(size.split("x")[0]) ** 2
            times = f"{result['seconds']:.2f} | {result['cpu']:.2f}"
            print(f"| {name} | {size} | {times} | {extra / 1e9:.2f} | {extra / square:.1f} |", flush=True)


if __name__ == "__main__":
    main()
