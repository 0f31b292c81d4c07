"""What greedy continuations look like: do they end by themselves, do they repeat themselves.

Sources of the definitions: seq-rep-n is from Welleck et al. 2020, "Neural text generation with unlikelihood training";
that a text repeats itself where it ends in a phrase of two tokens at least that is there three times in a row is from
Holtzman et al. 2020, "The curious case of neural text degeneration".
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import endings

from fptquant.calibration.text import encode

if TYPE_CHECKING:
    from fptquant.evaluation.vllm_backend import VLLMEngine

ORDER = 4  # n of seq-rep-n
SHORTEST, TIMES = 2, 3  # of a loop: tokens of its phrase, and how often it is there
REQUEST = "Summarize this passage in one sentence:\n\n{passage}"


@dataclass(frozen=True)
class Continuation:
    """What followed a prompt."""

    tokens: list[int]  # without the token that ended it
    stopped: bool  # ended by itself within the limit


def seq_rep(tokens: Sequence[int], order: int = ORDER) -> float:
    """Share of n-grams that were there before: 1 - unique / all; 0 where there are none."""
    grams = [tuple(tokens[at : at + order]) for at in range(len(tokens) - order + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def ends_in_loop(tokens: Sequence[int], shortest: int = SHORTEST, times: int = TIMES) -> bool:
    """Whether the last tokens are a phrase of `shortest` tokens or more, `times` times in a row."""
    for length in range(shortest, len(tokens) // times + 1):
        end = list(tokens[-length * times :])
        if end == end[:length] * times:
            return True
    return False


def prompts(tokenizer: Any, count: int) -> list[list[int]]:
    """Tokens of requests to summarize passages of both test texts; without a chat template the passages alone."""
    found = []
    for row in endings.passages(count, ("wiki", "moby")):
        text = str(row["sentence"])
        if tokenizer.chat_template is not None:
            messages = [{"role": "user", "content": REQUEST.format(passage=text)}]
            text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
            found.append(encode(tokenizer, text))
        else:
            found.append(list(tokenizer(text)["input_ids"]))
    return found


def generate(engine: VLLMEngine, prompts: Sequence[Sequence[int]], limit: int) -> list[Continuation]:
    """Greedy continuations of `limit` tokens at most, all submitted together."""
    from vllm import SamplingParams

    sampling = SamplingParams(max_tokens=limit, temperature=0.0)
    requests = [{"prompt_token_ids": list(prompt)} for prompt in prompts]
    found = []
    for request in engine.engine.generate(requests, sampling, use_tqdm=False):
        output = request.outputs[0]
        stopped = output.finish_reason == "stop"
        found.append(Continuation(list(output.token_ids)[: -1 if stopped else None], stopped))
    return found


def summary(continuations: Sequence[Continuation]) -> dict[str, float]:
    """Rates and means over continuations."""
    count = len(continuations)
    return {
        "prompts": count,
        "stopped": sum(one.stopped for one in continuations) / count,
        "loops": sum(ends_in_loop(one.tokens) for one in continuations) / count,
        "seq_rep": sum(seq_rep(one.tokens) for one in continuations) / count,
        "tokens": sum(len(one.tokens) for one in continuations) / count,
    }
