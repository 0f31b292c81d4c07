"""Every family through vLLM: log-probabilities and tokens of the simulation, bit for bit."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.evaluation.equivalence import check_greedy, check_served_exactly
from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source
from fptquant.run.job import Job
from fptquant.simulate.install import set_exact
from tests.conftest import EXCERPT
from tests.families import BY_FAMILY, SHIFTED, WINDOW, family_of, make_job, possible

LENGTH = 60  # of prompts
CHUNKED, CHUNK = 112, 16  # of those that are computed in chunks, and of these
BLOCK = 32  # tokens of a block of vLLM's cache
RECIPES = {  # their transforms, as far as the family can have them
    "w4a8kv8": ["T_k", "T_v", "T_u", "T_r"],
    "w4a8kv8-g32": ["T_k", "T_v", "T_u", "T_r", "S_n"],
    "w4a4kv4": ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"],
}
# The first variant of each family at 8 bits, the last, with windows where there are any, at 4.
CASES = [
    (variant, bits) for names in BY_FAMILY.values() for variant, bits in ((names[0], "w4a8kv8"), (names[-1], "w4a4kv4"))
]
CASES.append(("mistral3, ministral3", "w4a4kv4"))  # of a multimodal model, the text part
CASES += [("llama", "w4a8kv8-g32"), ("qwen3", "w4a8kv8-g32"), ("mixtral", "w4a8kv8-g32")]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(("variant", "precision"), CASES)
def test_served_equals_simulated(variant: str, precision: str, tmp_path: Path, one_process: None) -> None:
    """Prompts are longer than a window, and start with the constant token; prefill and decoding.

    At 4 bits inputs and keys are shifted.
    """
    assert LENGTH > 2 * WINDOW
    transforms = possible(variant, RECIPES[precision])
    fields = {"precision": precision, "rounding": {"method": "nearest"}, "transforms": transforms}
    if precision == "w4a4kv4":
        fields |= SHIFTED
    require_served(make_job(variant, tmp_path, **fields), tmp_path)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_tied_head_is_served(tmp_path: Path, one_process: None) -> None:
    kept = [name for name in RECIPES["w4a4kv4"] if name != "T_r"]
    fields = {"precision": "w4a4kv4", "transforms": kept, "head_bits": 16, "rounding": {"method": "nearest"}}
    job = make_job("qwen2", tmp_path, **fields)
    assert job.tied
    require_served(job, tmp_path)


@pytest.mark.vllm
@pytest.mark.slow
def test_a_budget_over_experts_is_served(tmp_path: Path, one_process: None) -> None:
    """Inputs of some experts at 8 bits, of others at 4; T_h in front of them, and not of the router."""
    budget = {"sites": 9, "windows": 2, "length": 24}
    fields = {"precision": "w4a4kv4", "rounding": {"method": "nearest"}, "budget": budget}
    require_served(make_job("qwen2_moe", tmp_path, transforms=["T_k", "T_h", "T_d", "S_n"], **fields), tmp_path)
    bought = json.loads((tmp_path / "out" / "fptquant" / "budget.json").read_text())["choices"]
    kinds = [choice["kind"] for choice in bought if choice["kind"] in ("down_input", "gate_up_input")]
    assert 0 < len(kinds) < 4, bought


def require_served(job: Job, tmp_path: Path) -> None:
    """As the simulation computes, in exact mode."""
    pipeline.quantize(job, tmp_path / "out")
    source = open_source(tmp_path / "out")
    model = load_model(source)
    set_exact(model)
    engine = VLLMEngine(tmp_path / "out", 128, exact=True, num_gpu_blocks_override=64)
    windows = evaluation_windows(source.tokenizer, EXCERPT, 2, LENGTH, special_tokens=True)
    checks = (
        check_served_exactly(transformers_scorer(model), engine.score, windows),
        check_greedy(model, engine, windows[:, : LENGTH // 2], new_tokens=WINDOW),
    )
    engine.close()
    assert all(check.passed for check in checks), checks


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["qwen2 with windows", "gemma2 with windows"])
def test_windows_on_stock_attention(variant: str, tmp_path: Path, one_process: None) -> None:
    """As users serve: a tie that falls the other way moves the rows behind it, a window or a bound that is missing
    nearly all."""
    job = make_job(variant, tmp_path, precision="w4a8kv8", rounding={"method": "nearest"}, transforms=[])
    pipeline.quantize(job, tmp_path / "out")
    source = open_source(tmp_path / "out")
    engine = VLLMEngine(tmp_path / "out", 128, num_gpu_blocks_override=64)
    windows = evaluation_windows(source.tokenizer, EXCERPT, 3, LENGTH, special_tokens=True)
    simulated = transformers_scorer(load_model(source))
    difference = torch.stack([engine.score(window) - simulated(window) for window in windows]).abs()
    engine.close()
    assert (difference < 1e-4).float().mean() > 0.6, difference


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("variant", ["mistral with windows", "gemma3_text with windows"])
def test_a_constant_first_token_that_leaves_windows(variant: str, tmp_path: Path, one_process: None) -> None:
    """Prompts in chunks, whose blocks are freed once a window has left them, and prompts that begin in vLLM's cache."""
    fields = {"rounding": {"method": "nearest"}, "transforms": possible(variant, RECIPES["w4a4kv4"])}
    job = make_job(variant, tmp_path, precision="w4a4kv4", **fields)
    assert job.config.sink is not None and WINDOW < CHUNK
    pipeline.quantize(job, tmp_path / "out")
    source = open_source(tmp_path / "out")
    model = load_model(source)
    set_exact(model)
    options = {"max_num_batched_tokens": CHUNK, "enable_prefix_caching": True, "block_size": BLOCK}
    engine = VLLMEngine(tmp_path / "out", 128, exact=True, num_gpu_blocks_override=64, **options)
    windows = evaluation_windows(source.tokenizer, EXCERPT, 2, CHUNKED, special_tokens=True)
    exact = check_served_exactly(transformers_scorer(model), engine.score, windows)
    greedy = [check_greedy(model, engine, windows, new_tokens=WINDOW) for _ in range(2)]
    assert exact.passed and all(check.passed for check in greedy), (exact, greedy)
    (answer,) = engine.engine.generate({"prompt_token_ids": windows[0].tolist()}, use_tqdm=False)
    assert answer.num_cached_tokens == CHUNKED // BLOCK * BLOCK  # whole blocks
    attention = family_of(variant).layer_modules(model)[0].get_submodule(family_of(variant).attention)
    attention.get_buffer("k_sink").add_(1)
    assert not check_served_exactly(transformers_scorer(model), engine.score, windows).passed
    engine.close()


@pytest.mark.vllm
def test_float16_for_gemma_is_refused(tmp_path: Path, one_process: None) -> None:
    job = make_job("gemma3_text", tmp_path, precision="w4a8kv8", rounding={"method": "nearest"}, transforms=[])
    pipeline.quantize(job, tmp_path / "out")
    with pytest.raises(FPTQuantError, match="^float16 doesn't hold .* Gemma3ForCausalLM: serve with --dtype bfloat16$"):
        VLLMEngine(tmp_path / "out", 128, dtype="float16")
