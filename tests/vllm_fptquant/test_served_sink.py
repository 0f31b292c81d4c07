"""A checkpoint with a constant first token: vLLM gives the simulation's log-probabilities and tokens, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptquant import pipeline, planning
from fptquant.evaluation.equivalence import check_greedy, check_served_exactly
from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.simulation.install import set_exact
from tests.conftest import TEXT, build_model, build_tokenizer

pytestmark = [pytest.mark.vllm, pytest.mark.slow]
TRANSFORMS = ["T_k", "T_v", "T_u", "T_r", "T_d"]


def quantized(path: Path, **fields: Any) -> Path:
    """A tiny checkpoint whose second layer is steady."""
    model = build_model("gqa", hidden_size=64, intermediate_size=128, head_dim=32)
    model.save_pretrained(path / "model")
    build_tokenizer(bos=True).save_pretrained(path / "model")
    (path / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    calibration = {"source": str(path / "text.txt"), "sequences": 4, "length": 64}
    recipe = Recipe.parse({"precision": "w4a4kv4", "calibration": calibration, **fields})
    pipeline.quantize(planning.plan(path / "model", recipe), path / "out")
    tensors = load_file(path / "out" / "model.safetensors")
    tensors["model.layers.1.self_attn.sink_steady"].fill_(1)
    save_file(tensors, path / "out" / "model.safetensors", metadata={"format": "pt"})
    return path / "out"


@pytest.mark.parametrize("residual_scale", [True, False], ids=["S_n", "no S_n"])
def test_served_equals_simulated(residual_scale: bool, tmp_path: Path) -> None:
    """Prompts with and without the token, prefill and decode."""
    out = quantized(tmp_path, transforms=TRANSFORMS + ["S_n"] * residual_scale)
    source = open_source(out)
    model = load_model(source)
    set_exact(model)
    engine = VLLMEngine(out, 128, exact=True)
    for special_tokens in (True, False):
        windows = evaluation_windows(source.tokenizer, TEXT, 3, 80, special_tokens=special_tokens)
        assert bool((windows[:, 0] == 0).all()) is special_tokens
        exact = check_served_exactly(transformers_scorer(model), engine.score, windows)
        greedy = check_greedy(model, engine, windows[:, :40], new_tokens=8)
        assert exact.passed and greedy.passed, (exact, greedy)
    engine.close()


def test_the_constants_matter(tmp_path: Path) -> None:
    """Guards the test above: other constants give other predictions, at the token itself and behind it."""
    out = quantized(tmp_path, transforms=TRANSFORMS)
    source = open_source(out)
    windows = evaluation_windows(source.tokenizer, TEXT, 1, 60, special_tokens=True)
    before = transformers_scorer(load_model(source))(windows[0])
    tensors = load_file(out / "model.safetensors")
    for changed, where in (
        ("model.norm.sink_output", slice(0, 1)),
        ("model.layers.0.self_attn.k_sink", slice(1, None)),
    ):
        altered = {**tensors, changed: tensors[changed] + 1}
        save_file(altered, out / "model.safetensors", metadata={"format": "pt"})
        after = transformers_scorer(load_model(source))(windows[0])
        assert not torch.allclose(after[where], before[where], atol=1e-3)
    assert torch.equal(after[:1], before[:1])  # what follows the token itself depends on `sink_output` alone
