"""Serves one checkpoint on vLLM: log-probabilities and greedy tokens; as a program, in its own process, as JSON."""

from __future__ import annotations

import argparse
import json
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


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("request", type=Path, help="JSON: prompts (lists of token ids), max_tokens")
    parser.add_argument("output", type=Path)
    parser.add_argument("--compile", choices=["eager", "aot_eager", "inductor"], help="torch.compile with this backend")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--options", type=json.loads, default={}, metavar="JSON", help="of fptquant")
    parser.add_argument("--gpu", type=int, metavar="CAPABILITY", help="pretend to have it, and emulate its kernels")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    arguments = parser.parse_args()

    for name, value in ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    if arguments.gpu:
        from tests.vllm_fptquant import gpu_emulation

        gpu_emulation.define_operators()
        for target, value in (gpu_emulation.WORKSPACE, *gpu_emulation.pretended_platform(arguments.gpu)):
            patch(target, value).start()

    request = json.loads(arguments.request.read_text())
    results = serve_tokens(
        arguments.model,
        request["prompts"],
        request["max_tokens"],
        dtype=arguments.dtype,
        tensor_parallel_size=arguments.tensor_parallel,
        additional_config={"fptquant": arguments.options},
        **(compiled(arguments.compile) if arguments.compile else {}),
    )
    arguments.output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
