"""The same checkpoint through vLLM and through the simulation."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from fptquant.evaluation.equivalence import check_greedy, check_served, check_served_exactly
from fptquant.evaluation.perplexity import transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source
from fptquant.simulate.install import set_exact

pytestmark = pytest.mark.vllm


@pytest.fixture(scope="module", params=["default_checkpoint", "unscaled_checkpoint"])
def checkpoint(request: pytest.FixtureRequest) -> Path:
    """One with S_n, then one without."""
    path: Path = request.getfixturevalue(request.param)
    return path


def test_no_systematic_difference_as_users_run_it(
    checkpoint: Path, windows: torch.Tensor, request: pytest.FixtureRequest
) -> None:
    """Of the first, the engine has a process of its own."""
    if "unscaled_checkpoint" in request.node.name:
        request.getfixturevalue("one_process")
    engine = VLLMEngine(checkpoint, 513)
    check = check_served(transformers_scorer(load_model(open_source(checkpoint))), engine.score, windows[:3])
    engine.close()
    assert check.passed, check


def test_bits_perplexity_and_greedy_tokens_of_20_prompts(
    checkpoint: Path, windows: torch.Tensor, one_process: None
) -> None:
    """Log probabilities; then decoding, batched and with the KV cache, against one prefill of the simulation."""
    model = load_model(open_source(checkpoint))
    set_exact(model)
    engine = VLLMEngine(checkpoint, 513, exact=True)
    checks = (
        check_served_exactly(transformers_scorer(model), engine.score, windows[:1]),
        check_greedy(model, engine, windows[:, :32], new_tokens=12),
    )
    engine.close()
    assert all(check.passed for check in checks), checks
