"""Where a quantized model is off in chats: KL divergence from the original by position, on the original's own answers.

    python benchmarks/chat_positions.py ORIGINAL CHECKPOINT ...      # --prompts 16; --parts

Prompts are those of generation.py, answers the original's greedy ones that end by themselves. Positions: *begin* and
*end* are the chat template's first and last token of a turn, *prompt* what else is in front of the answer, *stop* the
position that predicts the token which ends the answer. `--parts` leaves one part of the checkpoint in floating point
at a time: inputs, cache, head or weights.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from generation import prompts
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.calibration.chats import ANSWER, BATCH, answers
from fptquant.calibration.text import sink_token
from fptquant.loading import Source, load_model, open_source
from fptquant.run.chats import end_tokens
from fptquant.run.job import job_of
from fptquant.run.models import transformed
from fptquant.simulate import SimulatedLinear, simulated_linears
from fptquant.simulate.attention import KVQuantizer

PARTS = ("inputs", "cache", "head", "weights")


def main() -> None:
    """Prints a line for each checkpoint, and for each part of it in floating point."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("original", type=Path)
    parser.add_argument("checkpoints", type=Path, nargs="+")
    parser.add_argument("--prompts", type=int, default=16)
    parser.add_argument("--parts", action="store_true")
    arguments = parser.parse_args()
    source = open_source(arguments.original)
    original, ends = load_model(source), end_tokens(source)
    chats: list[tuple[list[int], list[int]]] = []
    asked = prompts(source.tokenizer, arguments.prompts)
    for at in range(0, len(asked), BATCH):
        some = asked[at : at + BATCH]
        written = answers(original, some, ends, ANSWER)
        chats += [(prompt, answer) for prompt, answer in zip(some, written, strict=True) if answer[-1] in ends]
    expected = [log_probabilities(original, prompt + answer) for prompt, answer in chats]
    print(f"{len(chats)} of {len(asked)} answers of the original end by themselves")
    first = sink_token(source.tokenizer, "auto")
    for path in arguments.checkpoints:
        model = load_model(open_source(path), recorded=False)
        print(f"{path.name}: " + by_position(model, chats, expected, first), flush=True)
        if not arguments.parts:
            continue
        unquantized = dict(simulated_linears(transformed(job_of(path, source.path))))
        for part in PARTS:
            with in_floating_point(model, part, unquantized, source):
                print(f"{path.name}, {part} in floating point: " + by_position(model, chats, expected, first))


def log_probabilities(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    """(tokens - 1, vocabulary), of all tokens but the first."""
    with torch.no_grad():
        logits: Tensor = model(torch.tensor([tokens]), use_cache=False).logits[0, :-1]
        return logits.float().log_softmax(-1)


def by_position(
    model: PreTrainedModel, chats: Iterable[tuple[list[int], list[int]]], expected: Iterable[Tensor], first: int | None
) -> str:
    """Mean KL divergence at each kind of position, and what becomes of the token that ends an answer."""
    found: dict[str, list[float]] = {}
    ending: list[tuple[float, float, float]] = []
    for (prompt, answer), before in zip(chats, expected, strict=True):
        after = log_probabilities(model, prompt + answer)
        for kind, kl in zip(kinds(prompt, answer, first), (before.exp() * (before - after)).sum(-1), strict=True):
            found.setdefault(kind, []).append(float(kl))
        end = answer[-1]
        ending.append((float(before[-1, end]), float(after[-1, end]), float(after[-1].argmax() == end)))
    means = "  ".join(f"{kind} {sum(values) / len(values):.3f}" for kind, values in found.items())
    was, now, top = (sum(column) / len(ending) for column in zip(*ending, strict=True))
    return f"{means};  log p of the end {now:.2f} ({was:.2f}), most likely in {top:.0%}"


def kinds(prompt: list[int], answer: list[int], first: int | None) -> list[str]:
    """What each token but the last of a chat is; `first` is the template's first token, `answer` ends in its last."""
    marks = {first: "begin", answer[-1]: "end"}
    found = ["first", *(marks.get(token, "prompt") for token in prompt[1:-1])]
    return [*found, *["answer"] * (len(answer) - 1), "stop"]


@contextmanager
def in_floating_point(
    model: PreTrainedModel, part: str, unquantized: dict[str, SimulatedLinear], source: Source
) -> Iterator[None]:
    """Leaves a part of a checkpoint's simulation in floating point: one of `PARTS`."""
    head = source.architecture.head
    undo: list[Callable[[], None]] = []

    def put(owner: Any, name: str, value: Any) -> None:
        before = getattr(owner, name)
        undo.append(lambda: setattr(owner, name, before))
        setattr(owner, name, value)

    for name, linear in simulated_linears(model):
        if part == "inputs" or (part == "head" and name == head):
            put(linear, "low", None)
        if part == "weights" or (part == "head" and name == head):
            put(linear, "codes", None)
            put(linear, "weight", unquantized[name].weight)
    for module in model.modules() if part == "cache" else ():
        if isinstance(getattr(module, "kv_quantizer", None), KVQuantizer):
            put(module.kv_quantizer, "sides", set())
    try:
        yield
    finally:
        for step in reversed(undo):
            step()


if __name__ == "__main__":
    main()
