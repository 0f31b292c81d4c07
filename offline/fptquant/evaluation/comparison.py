"""How far a model's predictions are from the original's: perplexity, KL divergence and top-1 agreement in one pass."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.train.teacher import Teacher


@dataclass(frozen=True)
class Comparison:
    """Means over all predicted tokens."""

    perplexity: float
    kl: float  # KL(original | model), nats per token
    agreement: float  # share of tokens with the same most likely successor


@torch.no_grad()
def compare(model: PreTrainedModel, teacher: Teacher, sequences: Iterable[int]) -> Comparison:
    """Compares a model with the original on the teacher's windows.

    Args:
        model: any with the vocabulary of the original.
        teacher: the original's final hidden states, and the windows (sequences, length).
        sequences: indices of the windows to use.
    """
    loss = kl = 0.0
    agreeing = tokens = 0
    for sequence in sequences:
        window = teacher.windows[sequence]
        found: Tensor = model(window[None], use_cache=False).logits[0, :-1].float().log_softmax(-1)
        expected = teacher.head(teacher.hidden(sequence)[:-1]).float().log_softmax(-1)
        loss -= float(found.gather(-1, window[1:, None]).double().sum())
        kl += float((expected.exp() * (expected - found)).double().sum())
        agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum())
        tokens += len(found)
    return Comparison(math.exp(loss / tokens), kl / tokens, agreeing / tokens)
