"""SmolLM2 (a dequantized GGUF): function preserved, accuracy of the default recipe."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptquant.evaluation.equivalence import check_function_preserved
from fptquant.evaluation.perplexity import measure, transformers_scorer
from fptquant.loading import Source, load_model, open_source
from fptquant.recipe import Recipe
from fptquant.run.job import open_job


def test_random_transforms_preserve_the_function(source: Source, windows: torch.Tensor) -> None:
    """T6: relative logit change below 1e-4, perplexity change below 0.01."""
    job = open_job(source.path, Recipe())
    job.transforms.randomize_(torch.Generator().manual_seed(0), strength=0.1)
    check, transformed = check_function_preserved(job, windows[:2])
    assert check.passed, check
    before = measure(map(transformers_scorer(load_model(source)), windows[:2]), 512).perplexity
    after = measure(map(transformers_scorer(transformed), windows[:2]), 512).perplexity
    assert after == pytest.approx(before, abs=0.01)


def test_accuracy_without_end_to_end_training(default_checkpoint: Path, windows: torch.Tensor) -> None:
    """Static w4a8kv8 at or below 26.5 on 20 windows of wiki.test, where float32 has 22.17."""
    model = load_model(open_source(default_checkpoint))
    result = measure(map(transformers_scorer(model), windows), 512)
    assert result.predicted_tokens == 20 * 511
    assert 22 < result.perplexity <= 26.5
