"""Measures one checkpoint in vLLM, in this process; prints one JSON object. Run by `bench.py`, one process each.

Prefill: one prompt of 1024 tokens, one token out. Decode: time per step from the difference between a long and a
short generation, so that prefill and start-up drop out. Every figure is the median of `--repeats` runs after a warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time

PREFILL, SHORT, LONG = 1024, 8, 72


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--additional-config", type=json.loads, default={})
    arguments = parser.parse_args()
    # One process, so that its resident size is the server's.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import psutil
    import torch
    from vllm import LLM, SamplingParams

    engine = LLM(
        model=arguments.model,
        dtype="float32",
        max_model_len=PREFILL + 64,
        max_num_batched_tokens=PREFILL + 64,
        max_num_seqs=8,
        enforce_eager=not arguments.compiled,
        enable_prefix_caching=False,
        additional_config=arguments.additional_config,
    )
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, prompt_length: int, new_tokens: int) -> float:
        prompts = torch.randint(1000, 40000, (batch, prompt_length), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        return elapsed

    def prefill() -> float:
        return PREFILL / seconds(1, PREFILL, 1)

    def decode(batch: int) -> float:
        return batch * (LONG - SHORT) / (seconds(batch, 16, LONG) - seconds(batch, 16, SHORT))

    def median(measure: object, *args: int) -> float:
        measure(*args)  # type: ignore[operator]
        return statistics.median(measure(*args) for _ in range(arguments.repeats))  # type: ignore[operator]

    result = {
        "prefill_tokens_per_second": median(prefill),
        "decode_1_tokens_per_second": median(decode, 1),
        "decode_8_tokens_per_second": median(decode, 8),
        "resident_bytes": psutil.Process().memory_info().rss,
        "threads": torch.get_num_threads(),
    }
    print(json.dumps(result))


if __name__ == "__main__":
    main()
