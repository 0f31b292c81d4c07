"""What vLLM's engine answers as an embedding model, and after other weights were loaded, is the reference's."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from fptquant import pipeline
from fptquant.evaluation.equivalence import check_greedy, check_served_exactly
from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.format import CheckpointConfig
from fptquant.loading import load_model, open_source
from fptquant.simulate.install import set_exact
from tests.conftest import EXCERPT, build_tokenizer
from tests.families import make_job
from tests.vllm_fptquant.serving import NEW_TOKENS, TOLERANCE, TRANSFORMS, altered
from tests.vllm_fptquant.tiny_llama import HIDDEN, VOCAB, TinyLlama

FIELDS: dict[str, Any] = {
    "activations": {"bits": 4, "symmetric": False},
    "kv_cache": {"bits": 4, "strategy": "head"},
    "transforms": {"down_hadamard": {"block": 32}, "residual_scale": True},
}

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


def test_embeddings_and_other_weights(tmp_path: Path, one_process: None) -> None:
    from vllm import LLM, SamplingParams

    models = [TinyLlama.random(CheckpointConfig.model_validate(FIELDS), seed=seed) for seed in range(2)]
    first, second = (str(model.write(tmp_path / str(index))) for index, model in enumerate(models))
    build_tokenizer(bos=False).save_pretrained(first)  # vLLM embeds nothing without one
    options = {"dtype": "float32", "enforce_eager": True, "max_model_len": 128, "num_gpu_blocks_override": 64}
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    requests = [{"prompt_token_ids": prompt} for prompt in prompts]
    embedding = LLM(first, runner="pooling", convert="embed", **options)
    embeddings = [answer.outputs.embedding for answer in embedding.embed(requests)]
    generating = LLM(first, skip_tokenizer_init=True, **options)
    sampling = SamplingParams(temperature=0, max_tokens=NEW_TOKENS, detokenize=False, ignore_eos=True)
    for model, path in zip(models, (first, second), strict=True):
        if model is not models[0]:
            generating.collective_rpc("reload_weights", kwargs={"weights_path": path})
            generating.reset_prefix_cache()
        answers = [list(answer.outputs[0].token_ids) for answer in generating.generate(requests, sampling)]
        assert answers == [model.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    for engine in (embedding, generating):
        engine.llm_engine.engine_core.shutdown()
    models[0].weights["lm_head.weight"] = torch.eye(VOCAB, HIDDEN)  # logits are the hidden states then
    for prompt, found in zip(prompts, embeddings, strict=True):
        hidden = models[0].logits(torch.tensor(prompt))[-1, :HIDDEN]
        served = torch.tensor(found, dtype=torch.float64)
        torch.testing.assert_close(served, hidden / hidden.norm(), rtol=0, atol=TOLERANCE)


def test_other_experts(tmp_path: Path, one_process: None) -> None:
    """Routers, experts and a shared one are replaced in a running engine, and again; bit for bit."""
    fields = {"precision": "w4a4kv4", "rounding": {"method": "nearest"}, "transforms": [*TRANSFORMS, "S_n"]}
    pipeline.quantize(make_job("qwen2_moe", tmp_path, **fields), tmp_path / "out")
    checkpoints = (tmp_path / "out", altered(tmp_path / "out"))
    windows = evaluation_windows(open_source(checkpoints[0]).tokenizer, EXCERPT, 2, 40, special_tokens=True)
    engine = VLLMEngine(checkpoints[0], 128, exact=True, num_gpu_blocks_override=64)
    for served in checkpoints:
        if served is not checkpoints[0]:
            engine.engine.collective_rpc("reload_weights", kwargs={"weights_path": str(served)})
            engine.engine.reset_prefix_cache()
        for checkpoint in checkpoints:
            model = load_model(open_source(checkpoint), recorded=False)
            set_exact(model)
            checks = (
                check_served_exactly(transformers_scorer(model), engine.score, windows),
                check_greedy(model, engine, windows[:, :20], new_tokens=NEW_TOKENS),
            )
            assert [check.passed for check in checks] == [checkpoint is served] * 2, checks
    engine.close()
