"""Makes or measures a GGUF in llama.cpp, in an environment of its own, with `measure_speed.py`'s procedure and keys.

Knows nothing of fptquant or vLLM. Run by `bench.py --llama-cpp`.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import random
import resource
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

SHORT, LONG = 8, 72
PROMPT = 16  # tokens of a prompt before decoding
PREFILL = 1024


def main() -> None:
    """Runs one of the two; measuring prints a JSON object."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    making = commands.add_parser("quantize")
    making.add_argument("source", type=Path)
    making.add_argument("output", type=Path)
    making.add_argument("type", choices=["ALL_F32", "MOSTLY_Q8_0", "MOSTLY_Q4_0"])
    measuring = commands.add_parser("measure")
    measuring.add_argument("model", type=Path)
    measuring.add_argument("--threads", type=int, default=1)
    measuring.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    llama_cpp.llama_log_set(QUIET, ctypes.c_void_p(0))
    if arguments.command == "quantize":
        quantize(arguments.source, arguments.output, arguments.type)
    else:
        print(json.dumps(measure(arguments.model, arguments.threads, arguments.repeats)))


def drop(level: int, text: bytes, data: Any) -> None:
    """Takes llama.cpp's log."""


QUIET = llama_cpp.llama_log_callback(drop)


def quantize(source: Path, output: Path, kind: str) -> None:
    """Writes a GGUF whose weights have another type.

    Raises:
        SystemExit: llama.cpp could not.
    """
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.ftype = getattr(llama_cpp, f"LLAMA_FTYPE_{kind}")
    parameters.allow_requantize = True
    partial = output.with_suffix(".partial")
    if llama_cpp.llama_model_quantize(os.fsencode(source), os.fsencode(partial), ctypes.byref(parameters)):
        raise SystemExit(f"llama.cpp could not make {kind} of '{source}'")
    partial.replace(output)


def measure(path: Path, threads: int, repeats: int) -> dict[str, float]:
    """Tokens per second: medians of `repeats` runs after one that warms up."""
    llama_cpp.llama_backend_init()
    model = llama_cpp.llama_model_load_from_file(os.fsencode(path), llama_cpp.llama_model_default_params())
    if not model:
        raise SystemExit(f"llama.cpp can't load '{path}'")

    def median(tokens_per_second: Callable[..., float], *sizes: int) -> float:
        tokens_per_second(model, threads, *sizes)
        return statistics.median([tokens_per_second(model, threads, *sizes) for _ in range(repeats)])

    return {
        "prefill_tokens_per_second": median(prefill),
        "decode_1_tokens_per_second": median(decode, 1),
        "decode_8_tokens_per_second": median(decode, 8),
        "resident_bytes": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss,
        "threads": threads,
    }


class Context:
    """A KV cache for `sequences` of up to `length` tokens each, and the batch that is filled for a step."""

    def __init__(self, model: Any, threads: int, sequences: int, length: int) -> None:
        """Reserves both."""
        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx, parameters.n_seq_max = sequences * length, sequences
        parameters.n_batch = max(length, sequences)
        parameters.n_threads = parameters.n_threads_batch = threads
        self.context = llama_cpp.llama_init_from_model(model, parameters)
        self.batch = llama_cpp.llama_batch_init(parameters.n_batch, 0, 1)
        self.words = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(model))

    def step(self, tokens: list[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted).

        Raises:
            SystemExit: llama.cpp could not.
        """
        self.batch.n_tokens = len(tokens)
        for index, (token, position, sequence, wanted) in enumerate(tokens):
            self.batch.token[index], self.batch.pos[index] = token, position
            self.batch.n_seq_id[index], self.batch.seq_id[index][0] = 1, sequence
            self.batch.logits[index] = wanted
        if llama_cpp.llama_decode(self.context, self.batch):
            raise SystemExit("llama.cpp could not decode a batch")

    def likeliest(self, index: int) -> int:
        """The most likely successor of the batch's token `index`; waits for it."""
        logits = llama_cpp.llama_get_logits_ith(self.context, index)
        return int(np.ctypeslib.as_array(logits, shape=(self.words,)).argmax())

    def free(self) -> None:
        """Gives the memory back."""
        llama_cpp.llama_batch_free(self.batch)
        llama_cpp.llama_free(self.context)


def prefill(model: Any, threads: int) -> float:
    """Tokens per second of one prompt of 1024 random tokens, with the first token behind it."""
    context = Context(model, threads, 1, PREFILL)
    prompt = [(random.randrange(1000, 40000), place, 0, place == PREFILL - 1) for place in range(PREFILL)]
    start = time.perf_counter()
    context.step(prompt)
    context.likeliest(PREFILL - 1)
    elapsed = time.perf_counter() - start
    context.free()
    return PREFILL / elapsed


def decode(model: Any, threads: int, sequences: int) -> float:
    """Tokens per second of greedy decoding, all sequences in one batch, between the 8th and the 72nd step."""
    context = Context(model, threads, sequences, 256)
    for sequence in range(sequences):
        context.step([(random.randrange(1000, 40000), place, sequence, place == PROMPT - 1) for place in range(PROMPT)])
    tokens = [random.randrange(1000, 40000) for _ in range(sequences)]
    start = 0.0
    for step in range(LONG):
        if step == SHORT:
            start = time.perf_counter()
        context.step([(token, PROMPT + step, sequence, True) for sequence, token in enumerate(tokens)])
        tokens = [context.likeliest(index) for index in range(sequences)]
    elapsed = time.perf_counter() - start
    context.free()
    return sequences * (LONG - SHORT) / elapsed


if __name__ == "__main__":
    main()
