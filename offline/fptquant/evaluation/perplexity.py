"""Perplexity over non-overlapping windows from the start of a text."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from fptquant.calibration.formats import read_text
from fptquant.calibration.text import encode, leading_tokens
from fptquant.errors import FPTQuantError
from fptquant.layers.inputs import Track, window_logits
from fptquant.wiring import Architecture

# Log probabilities of each window's tokens 1..L-1 given those before: (L - 1,) float32.
Scorer = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Perplexity:
    """A measured perplexity and what it was measured on."""

    perplexity: float
    predicted_tokens: int
    windows: int
    length: int
    seconds: float


def evaluation_windows(
    tokenizer: PreTrainedTokenizerBase, text: Path, windows: int, length: int, *, special_tokens: bool = False
) -> Tensor:
    """The first `windows` windows of a text file, without overlap.

    Args:
        tokenizer: of the model.
        text: UTF-8 file, which may be compressed; `text:` in front takes JSON and the like as text.
        windows: how many.
        length: tokens in each, special tokens included.
        special_tokens: start every window with the tokens that the tokenizer puts first, or else its BOS.

    Returns:
        (windows, length) int64.

    Raises:
        FPTQuantError: unreadable or too short.
    """
    content = read_text(text)
    prefix = []
    if special_tokens:
        bos = tokenizer.bos_token_id
        prefix = leading_tokens(tokenizer) or ([] if bos is None else [int(bos)])
    body = length - len(prefix)
    tokens = encode(tokenizer, content)
    if len(tokens) < windows * body:
        raise FPTQuantError(
            f"text '{text}' has {len(tokens)} tokens, but {windows} windows of {length} need {windows * body}: "
            "lower --windows or --length"
        )
    body_tokens = torch.tensor(tokens[: windows * body]).view(windows, body)
    return torch.cat((torch.tensor(prefix, dtype=torch.int64).repeat(windows, 1), body_tokens), 1)


def measure(scores: Iterable[Tensor], length: int) -> Perplexity:
    """Exp of the mean negative log likelihood over all predicted tokens.

    Args:
        scores: log probabilities (L - 1,) of each window.
        length: L.
    """
    start, total, tokens, count = time.perf_counter(), 0.0, 0, 0
    for log_probabilities in scores:
        total -= float(log_probabilities.double().sum())
        tokens += log_probabilities.numel()
        count += 1
    return Perplexity(math.exp(total / tokens), tokens, count, length, round(time.perf_counter() - start, 1))


def layer_by_layer(
    model: PreTrainedModel, architecture: Architecture, windows: Tensor, track: Track = iter
) -> Iterator[Tensor]:
    """Scores all windows (windows, length) while each layer is in memory once; as `transformers_scorer` does.

    Args:
        model: streamed or not.
        architecture: its family.
        windows: (windows, length) tokens.
        track: passes on the index of each layer that all windows have been through.

    Yields:
        (L - 1,) for each window.
    """
    for window, logits in zip(windows, window_logits(model, architecture, windows, track), strict=True):
        yield _log_probabilities(logits, window)


def _log_probabilities(logits: Tensor, window: Tensor) -> Tensor:
    """(L - 1,) of a window (L,), given its logits (1, L, vocabulary)."""
    return torch.log_softmax(logits[0, :-1].float(), -1).gather(-1, window[1:, None])[:, 0]


def transformers_scorer(model: torch.nn.Module) -> Scorer:
    """Scores windows with a model loaded in transformers (for our checkpoints: the simulation)."""

    @torch.no_grad()
    def score(window: Tensor) -> Tensor:
        return _log_probabilities(model(window[None], use_cache=False).logits, window)

    return score
