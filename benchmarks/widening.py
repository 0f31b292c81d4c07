"""From how many tokens on 4-bit weights that are widened for CUTLASS take less time than Marlin.

`python benchmarks/bench_gpu.py --widening` prints the table from which a GPU's row of `WIDEN_FROM`
(`vllm_fptquant/kernels/marlin_cutlass.py`) is taken.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch.utils.benchmark import Timer

from fptquant.format import ActivationScheme, LinearScheme, WeightScheme

# N and K of Llama-3-8B's layers: qkv, o, gate and up, down
SHAPES = ((6144, 4096), (4096, 4096), (28672, 4096), (4096, 14336))
TOKENS = (64, 128, 256, 512, 1024, 2048, 4096, 8192, 16384)


class Row(NamedTuple):
    """Seconds of all shapes together: Marlin's product, CUTLASS's with widened weights, widening alone."""

    tokens: int
    marlin: float
    widened: float
    alone: float


def sweep(
    tokens: Sequence[int],
    shapes: Sequence[tuple[int, int]],
    device: torch.device,
    dtype: torch.dtype,
    seconds: float = 0.2,
) -> list[Row]:
    """Times both ways of the kernel, on random weights and codes.

    Args:
        tokens: of a step.
        shapes: N and K of layers.
        device: CUDA's.
        dtype: of outputs.
        seconds: how long each product is repeated; its time is the median.
    """
    from vllm_fptquant.kernels.base import LinearWeights
    from vllm_fptquant.kernels.marlin_cutlass import MarlinCutlassKernel, widen

    totals = {count: [0.0, 0.0, 0.0] for count in tokens}
    for n, k in shapes:
        weights = LinearWeights(
            scheme=LinearScheme(weights=WeightScheme(), activations=ActivationScheme()),
            codes=torch.randint(-8, 8, (n, k), dtype=torch.int8, device=device),
            weight_scale=torch.full((n,), 2.0**-8, device=device),
            input_scale=torch.tensor(0.01, device=device),
            input_zero_point=None,
        )
        kernel = MarlinCutlassKernel(weights, dtype)
        wide = torch.empty(kernel.padded_n, kernel.padded_k, dtype=torch.int8, device=device)
        alone = median("widen(packed, wide)", seconds, widen=widen, packed=kernel.weight, wide=wide)
        for count in tokens:
            codes = torch.randint(-128, 128, (count, k), dtype=torch.int8, device=device)
            row_scale = torch.full((count,), 0.01, device=device)
            for way, widen_from in enumerate((count + 1, count)):
                kernel.widen_from = widen_from
                totals[count][way] += median("f(x, s)", seconds, f=kernel, x=codes, s=row_scale)
            totals[count][2] += alone
    return [Row(count, *times) for count, times in totals.items()]


def median(statement: str, seconds: float, **names: object) -> float:
    """Seconds of a statement; torch's timer waits for the GPU."""
    return float(Timer(statement, globals=names).blocked_autorange(min_run_time=seconds).median)


def break_even(rows: Sequence[Row]) -> int | None:
    """The fewest tokens from which on widening was faster at every larger number; None where it never was."""
    found = None
    for row in sorted(rows, reverse=True):
        if row.widened >= row.marlin:
            break
        found = row.tokens
    return found


def print_sweep() -> None:
    """Measures and prints this GPU's table."""
    rows = sweep(TOKENS, SHAPES, torch.device("cuda"), torch.bfloat16)
    capability = "".join(map(str, torch.cuda.get_device_capability()))
    print(f"\n{torch.cuda.get_device_name()} (capability {capability}), torch {torch.__version__}\n")
    print("| a layer of Llama-3-8B, ms | Marlin | widened, CUTLASS | widening alone |\n|---|---|---|---|")
    for row in rows:
        cells = " | ".join(f"{time * 1e3:.3f}" for time in row[1:])
        print(f"| {row.tokens} tokens | {cells} |")
    print(f"\nwidening pays from {break_even(rows)} tokens on")
