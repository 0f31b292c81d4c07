"""A checkpoint with a constant first token: vLLM gives the simulation's log-probabilities and tokens, bit for bit."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptquant.evaluation.equivalence import check_greedy, check_served_exactly
from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source
from fptquant.simulate.install import set_exact
from tests.conftest import EXCERPT, bound
from tests.vllm_fptquant.serving import TRANSFORMS, quantized

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


# Two workers. vLLM's CPU worker makes the buffers between pipeline stages only when it warms a compiled model up.
TENSOR = {"tensor_parallel_size": 2}
PIPELINE = {"pipeline_parallel_size": 2, "enforce_eager": False}


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Path]:
    """With S_n and without."""
    return {
        scaled: quantized(tmp_path_factory.mktemp("sink"), transforms=TRANSFORMS + ["S_n"] * scaled)
        for scaled in (True, False)
    }


@pytest.mark.parametrize(
    ("residual_scale", "options"),
    [(True, {}), (False, {}), (True, TENSOR), (True, PIPELINE)],
    ids=["S_n", "no S_n", "tensor parallel", "pipeline parallel"],
)
def test_served_equals_simulated(
    residual_scale: bool, options: dict[str, Any], checkpoints: dict[bool, Path], forked_workers: None
) -> None:
    """Prompts with and without the token, prefill and decode; the head is quantized too."""
    out = checkpoints[residual_scale]
    source = open_source(out)
    model = load_model(source)
    set_exact(model)
    engine = VLLMEngine(out, 128, exact=True, num_gpu_blocks_override=64, **options)
    for special_tokens in (True, False):
        windows = evaluation_windows(source.tokenizer, EXCERPT, 3, 80, special_tokens=special_tokens)
        assert bool((windows[:, 0] == 0).all()) is special_tokens
        exact = check_served_exactly(transformers_scorer(model), engine.score, windows)
        greedy = check_greedy(model, engine, windows[:, :40], new_tokens=8)
        assert exact.passed and greedy.passed, (exact, greedy)
    engine.close()


def test_the_constants_matter(checkpoints: dict[bool, Path], tmp_path: Path) -> None:
    """Guards the test above: other constants give other predictions, at the token itself and behind it."""
    out = Path(shutil.copytree(checkpoints[False], tmp_path / "out"))
    source = open_source(out)
    windows = evaluation_windows(source.tokenizer, EXCERPT, 1, 60, special_tokens=True)
    before = transformers_scorer(load_model(source))(windows[0])
    tensors = load_file(out / "model.safetensors")
    for changed, where in (
        ("model.norm.sink_output", slice(0, 1)),
        ("model.layers.0.self_attn.k_sink", slice(1, None)),
    ):
        altered = {**tensors, changed: tensors[changed] + 1}
        save_file(bound(altered, out), out / "model.safetensors", metadata={"format": "pt"})
        after = transformers_scorer(load_model(source, recorded=False))(windows[0])
        assert not torch.allclose(after[where], before[where], atol=1e-3)
    assert torch.equal(after[:1], before[:1])  # what follows the token itself depends on `sink_output` alone
