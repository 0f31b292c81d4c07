"""Perplexity of a model before and after all transforms are merged into it at random values; nothing is quantized.

    python benchmarks/merging.py MODEL [--windows 12]

What it moves by is float32's rounding, or an error. Those transforms that the family can't have are left out.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from fptquant.evaluation.perplexity import evaluation_windows, layer_by_layer, measure
from fptquant.loading import load_model
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.run.models import transformed

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "wiki.test.txt"


def main() -> None:
    """Prints both perplexities."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--windows", type=int, default=12)
    parser.add_argument("--length", type=int, default=512)
    parser.add_argument("--strength", type=float, default=0.2, help="standard deviation of what parameters move by")
    arguments = parser.parse_args()
    job = open_job(arguments.model, Recipe.load("fptquant").changed("merging"), leave_out=True)
    job.transforms.randomize_(torch.Generator().manual_seed(0), arguments.strength)
    windows = evaluation_windows(job.source.tokenizer, TEXT, arguments.windows, arguments.length)
    merged = transformed(job, "streamed")
    for name, model in (("original", load_model(job.source, residency="streamed")), ("merged", merged)):
        scores = layer_by_layer(model, job.source.architecture, windows)
        print(f"{name}: {measure(scores, arguments.length).perplexity:.5f}", flush=True)


if __name__ == "__main__":
    main()
