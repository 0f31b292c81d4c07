"""Mixtures of experts through vLLM in the ways beside those of `test_served_families.py`: split, and compiled."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fptquant import pipeline
from fptquant.loading import load_model, open_source
from tests.families import make_job
from tests.vllm_fptquant.serve_tokens import compiled, serve_tokens
from tests.vllm_fptquant.serving import NEW_TOKENS, TOLERANCE, served_apart

PROMPTS = [[0, 17, 5, 99, 3, 8, 120, 44, 7, 61], [7, 211, 30, 4, 4, 18, 9], [0, 300, 2, 71, 33]]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "split"), [("qwen2_moe", True), ("qwen3_moe with windows", False)], ids=["split", "compiled"]
)
def test_served_is_simulated(variant: str, split: bool, tmp_path: Path, one_process: None) -> None:
    """Not in exact mode: a tie that falls the other way moves the rows behind it; a part of an expert, nearly all."""
    transforms = ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"]
    job = make_job(variant, tmp_path, precision="w4a8kv8", rounding={"method": "nearest"}, transforms=transforms)
    pipeline.quantize(job, tmp_path / "out")
    if split:
        answers = serve_tokens(tmp_path / "out", PROMPTS, NEW_TOKENS, tensor_parallel_size=2)
    else:
        answers = served_apart(tmp_path / "out", PROMPTS, **compiled("eager"))
    model, differences = load_model(open_source(tmp_path / "out")), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = model(torch.tensor([prompt + answer["tokens"]])).logits[0].log_softmax(-1)[:-1]
        differences.append((torch.tensor(answer["logprobs"]) - expected).abs().amax(-1))
    assert (torch.cat(differences) < TOLERANCE).float().mean() > 0.6, differences


@pytest.mark.vllm
def test_expert_parallelism_is_refused() -> None:
    from types import SimpleNamespace

    from fptquant.errors import FPTQuantError
    from vllm_fptquant.models import experts

    split = SimpleNamespace(parallel_config=SimpleNamespace(enable_expert_parallel=True))
    with pytest.raises(FPTQuantError, match="leave --enable-expert-parallel out"):
        experts.require_servable(split)


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("variant", "options"), [("qwen2_moe", compiled("eager")), ("mixtral", {})], ids=["compiled", "eager"]
)
def test_gpu_path(variant: str, options: dict[str, Any], tmp_path: Path) -> None:
    """Inside vLLM's engine on emulated kernels, in 16 bits: see `test_served_tiny.py`, test_gpu_path.

    In float16, as vLLM 0.32's attention in bfloat16 ends with an illegal instruction on some virtual CPUs with AMX.
    """
    transforms = ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"]
    job = make_job(variant, tmp_path, precision="w4a8kv8", rounding={"method": "nearest"}, transforms=transforms)
    pipeline.quantize(job, tmp_path / "out")
    answers = served_apart(tmp_path / "out", PROMPTS, gpu=80, dtype="float16", **options)
    model, differences = load_model(open_source(tmp_path / "out")), []
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = model(torch.tensor([prompt + answer["tokens"]])).logits[0].log_softmax(-1)[:-1]
        differences.append((torch.tensor(answer["logprobs"]) - expected).abs().mean(-1))
    assert torch.cat(differences).mean() < 0.2, differences
