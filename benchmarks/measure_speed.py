"""Measures one checkpoint in vLLM, in this process; prints one JSON object. Run by `bench.py` and `bench_gpu.py`.

Prefill: prompts of equal length, one token out of each. Decode: time per step from the difference between a long and
a short generation, so that prefill and start-up drop out. Every figure is the median of `--repeats` runs after a
warm-up.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable

SHORT, LONG = 8, 72


def main() -> None:
    """Parses arguments, measures, prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="torch.compile instead of eager")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--prompts", type=int, default=1, help="of the prefill")
    parser.add_argument("--prompt-length", type=int, default=1024, help="of the prefill")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8], help="of the decoding")
    parser.add_argument("--profile", action="store_true", help="also print to stderr which operators take the time")
    parser.add_argument("--engine", type=json.loads, default={}, help="more arguments of vllm.LLM, as JSON")
    arguments = parser.parse_args()
    # One process, so that its resident size is the server's.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    import psutil
    import torch
    from vllm import LLM, SamplingParams

    longest = arguments.prompt_length + 64
    settings = {
        "dtype": arguments.dtype,
        "max_model_len": longest,
        "max_num_batched_tokens": longest,
        "max_num_seqs": max(arguments.prompts, *arguments.batches),
        "enforce_eager": not arguments.compiled,
        "enable_prefix_caching": False,
    }
    engine = LLM(model=arguments.model, **(settings | arguments.engine))
    generator = torch.Generator().manual_seed(0)

    def seconds(batch: int, prompt_length: int, new_tokens: int) -> float:
        prompts = torch.randint(1000, 40000, (batch, prompt_length), generator=generator).tolist()
        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True, detokenize=False)
        start = time.perf_counter()
        outputs = engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        elapsed = time.perf_counter() - start
        assert all(len(output.outputs[0].token_ids) == new_tokens for output in outputs)
        return elapsed

    def prefill() -> float:
        tokens: int = arguments.prompts * arguments.prompt_length
        return tokens / seconds(arguments.prompts, arguments.prompt_length, 1)

    def decode(batch: int) -> float:
        return batch * (LONG - SHORT) / (seconds(batch, 16, LONG) - seconds(batch, 16, SHORT))

    def median(measure: Callable[..., float], *args: int) -> float:
        measure(*args)
        return statistics.median([measure(*args) for _ in range(arguments.repeats)])

    result = {
        "prefill_tokens_per_second": median(prefill),
        **{f"decode_{batch}_tokens_per_second": median(decode, batch) for batch in arguments.batches},
        "resident_bytes": psutil.Process().memory_info().rss,
        "threads": torch.get_num_threads(),
    }
    if arguments.profile:
        order = f"self_{'cuda' if torch.cuda.is_available() else 'cpu'}_time_total"
        cases = [("prefill", arguments.prompts, arguments.prompt_length, 1)]
        cases += [(f"decode batch {batch}, {SHORT} tokens", batch, 16, SHORT) for batch in arguments.batches]
        for title, *sizes in cases:
            with torch.profiler.profile() as trace:
                seconds(*sizes)
            table = trace.key_averages().table(sort_by=order, row_limit=25, max_name_column_width=70)
            print(f"==> {title}\n{table}", file=sys.stderr)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
