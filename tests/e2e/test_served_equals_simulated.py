"""The same checkpoint through vLLM and through the simulation."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fptquant.evaluation.equivalence import check_greedy, check_served
from fptquant.evaluation.perplexity import transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", params=["default_checkpoint", "unscaled_checkpoint"])
def pair(request: pytest.FixtureRequest) -> Iterator[tuple[torch.nn.Module, VLLMEngine]]:
    """Simulation and engine of a checkpoint with S_n, then of one without."""
    checkpoint: Path = request.getfixturevalue(request.param)
    engine = VLLMEngine(checkpoint, 513)
    yield load_model(open_source(checkpoint)), engine
    engine.close()


def test_perplexity(pair: tuple[torch.nn.Module, VLLMEngine], windows: torch.Tensor) -> None:
    model, engine = pair
    check = check_served(transformers_scorer(model), engine.score, windows[:3])
    assert check.passed, check


def test_greedy_tokens_of_20_prompts(pair: tuple[torch.nn.Module, VLLMEngine], windows: torch.Tensor) -> None:
    """Decoding in vLLM, batched and with its KV cache, equals one prefill of the simulation."""
    model, engine = pair
    check = check_greedy(model, engine, windows[:, :32], new_tokens=12)
    assert check.passed, check
