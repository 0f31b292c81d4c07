"""Time of "calibrate and round" in each of several processes, and what of it all of them do.

    OMP_NUM_THREADS=1 python benchmarks/bench_processes.py MODEL
    torchrun --nproc-per-node 2 benchmarks/bench_processes.py MODEL

Nothing is written. "CPU s" is what counts beside other work; what is indented is part of it.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections.abc import Callable
from typing import Any

import torch

from fptquant import parallel
from fptquant.calibration import layerwise, moments
from fptquant.layers.constants import record_sink
from fptquant.quantize import ranges
from fptquant.quantize.rounding import gptq
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.run.models import transformed

ROWS = {"all": 0.0, "  range search": 0.0, "  factors of Hessians": 0.0, "  Hessians": 0.0, "  rounding": 0.0}


def timed(row: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """Adds CPU seconds of the calls to a row."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.process_time()
        result = function(*args, **kwargs)
        ROWS[row] += time.process_time() - start
        return result

    return call


def main() -> None:
    """Measures, and prints a table for each process."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="gptq")
    parser.add_argument("--precision", default="w4a4kv4")
    parser.add_argument("--sequences", type=int, default=16)
    parser.add_argument("--length", type=int, default=512)
    arguments = parser.parse_args()
    parallel.start()
    calibration = {"sequences": arguments.sequences, "length": arguments.length}
    recipe = Recipe.load(arguments.recipe).changed(precision=arguments.precision, calibration=calibration)
    job = open_job(arguments.model, recipe)
    model = transformed(job)
    record_sink(model, job.source.architecture, job.windows)
    ranges._search = timed("  range search", ranges._search)
    gptq._unit_factor = timed("  factors of Hessians", gptq._unit_factor)
    moments.summed_squares = timed("  Hessians", moments.summed_squares)
    layerwise.rounded_weights = timed("  rounding", layerwise.rounded_weights)

    def calibrate() -> None:
        for _ in layerwise.calibrate_and_round(model, job.source.architecture, recipe, job.windows):
            pass

    parallel.wait()
    start = time.perf_counter()
    timed("all", calibrate)()
    seconds = time.perf_counter() - start
    rank, count = parallel.ranks()
    for process in range(count):
        parallel.wait()
        if process == rank:
            what = f"process {rank} of {count}, {torch.get_num_threads()} threads, {seconds:.1f} s"
            print(f"\n| {what} | CPU s |\n|---|---|")
            print("\n".join(f"| {row} | {cpu:.1f} |" for row, cpu in ROWS.items()), flush=True)


if __name__ == "__main__":
    main()
