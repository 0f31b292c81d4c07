"""Serves one checkpoint on vLLM, in a process of its own: log-probabilities and greedy tokens as JSON."""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from unittest.mock import patch

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("VLLM_ENABLE_V1_MULTIPROCESSING", "0")


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("model", type=Path)
    parser.add_argument("request", type=Path, help="JSON: prompts (lists of token ids), max_tokens")
    parser.add_argument("output", type=Path)
    parser.add_argument("--compile", choices=["eager", "inductor"], help="torch.compile with this backend")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--kernel")
    parser.add_argument("--gpu", type=int, metavar="CAPABILITY", help="pretend to have it, and emulate its kernels")
    parser.add_argument("--tensor-parallel", type=int, default=1)
    parser.add_argument("--pipeline-parallel", type=int, default=1)
    arguments = parser.parse_args()

    from vllm import LLM, SamplingParams

    if arguments.gpu:
        from tests.vllm_fptquant import gpu_emulation

        gpu_emulation.define_operators()
        for target, value in (gpu_emulation.WORKSPACE, *gpu_emulation.pretended_platform(arguments.gpu)):
            patch(target, value).start()

    request = json.loads(arguments.request.read_text())
    vocab = json.loads((arguments.model / "config.json").read_text())["vocab_size"]
    llm = LLM(
        str(arguments.model),
        dtype=arguments.dtype,
        quantization="fptquant",
        enforce_eager=arguments.compile is None,
        max_model_len=128,
        max_num_seqs=8,
        max_logprobs=vocab,
        skip_tokenizer_init=True,
        tensor_parallel_size=arguments.tensor_parallel,
        pipeline_parallel_size=arguments.pipeline_parallel,
        additional_config={"fptquant": {"kernel": arguments.kernel}} if arguments.kernel else {},
        compilation_config={"mode": "DYNAMO_TRACE_ONCE", "backend": arguments.compile} if arguments.compile else {},
    )
    sampling = SamplingParams(
        temperature=0,
        max_tokens=request["max_tokens"],
        prompt_logprobs=vocab,
        logprobs=vocab,
        detokenize=False,
        ignore_eos=True,
    )
    results = []
    for answer in llm.generate([{"prompt_token_ids": prompt} for prompt in request["prompts"]], sampling):
        prompt_rows = answer.prompt_logprobs[1:]  # position 0 has no prediction
        rows = [*prompt_rows, *answer.outputs[0].logprobs]
        results.append(
            {
                "tokens": list(answer.outputs[0].token_ids),
                "logprobs": [[row[token].logprob for token in range(vocab)] for row in rows],
            }
        )
    arguments.output.write_text(json.dumps(results))


if __name__ == "__main__":
    main()
