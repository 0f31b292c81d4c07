"""Serves one checkpoint on vLLM: log-probabilities and greedy tokens."""

from __future__ import annotations

import json
import multiprocessing
import os
from pathlib import Path
from typing import Any
from unittest.mock import patch

ENVIRONMENT = {
    "VLLM_CPU_KVCACHE_SPACE": "1",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "OMP_NUM_THREADS": "1",
    "HF_HUB_OFFLINE": "1",
    "VLLM_ENABLE_V1_MULTIPROCESSING": "0",
}


def compiled(backend: str) -> dict[str, Any]:
    """The engine's options for a model under torch.compile."""
    return {"enforce_eager": False, "compilation_config": {"mode": "DYNAMO_TRACE_ONCE", "backend": backend}}


def serve_tokens(checkpoint: Path, prompts: list[list[int]], max_tokens: int, **options: Any) -> list[dict[str, Any]]:
    """Greedy tokens of each prompt, and log-probabilities (tokens - 1, vocabulary) of prompt and answer."""
    from vllm import LLM, SamplingParams

    vocab = json.loads((checkpoint / "config.json").read_text())["vocab_size"]
    settings = {"quantization": "fptquant", "dtype": "float32", "enforce_eager": True, **options}
    llm = LLM(
        str(checkpoint),
        max_model_len=128,
        max_num_seqs=8,
        max_logprobs=vocab,
        skip_tokenizer_init=True,
        **settings,
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=max_tokens,
        prompt_logprobs=vocab,
        logprobs=vocab,
        detokenize=False,
        ignore_eos=True,
    )
    results = []
    for answer in llm.generate([{"prompt_token_ids": prompt} for prompt in prompts], sampling):
        prompt_rows = answer.prompt_logprobs[1:]  # position 0 has no prediction
        rows = [*prompt_rows, *answer.outputs[0].logprobs]
        results.append(
            {
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": [[row[token].logprob for token in range(vocab)] for row in rows],
            }
        )
    llm.llm_engine.engine_core.shutdown()
    return results


def write_tokens(
    output: Path, checkpoint: Path, prompts: list[list[int]], max_tokens: int, gpu: int | None, options: dict[str, Any]
) -> None:
    """`serve_tokens` in a process of its own; the answers go to a file, as JSON.

    Args:
        output: the file.
        checkpoint: to serve.
        prompts: token ids.
        max_tokens: of each answer.
        gpu: pretends to have one of this capability, and emulates its kernels.
        options: of the engine; `workers`: how it starts them, "spawn" where that isn't said.
    """
    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if gpu:
        from tests.vllm_fptquant import gpu_emulation

        gpu_emulation.define_operators()
        for target, found in (gpu_emulation.WORKSPACE, *gpu_emulation.pretended_platform(gpu)):
            patch(target, found).start()
    if workers := options.pop("workers", None):
        context = multiprocessing.get_context(workers)
        patch("vllm.v1.executor.multiproc_executor.get_mp_context", lambda: context).start()
    output.write_text(json.dumps(serve_tokens(checkpoint, prompts, max_tokens, **options)))
