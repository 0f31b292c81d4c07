"""How far a model's predictions are from the original's: perplexity, KL divergence and top-1 agreement in one pass."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from transformers import PreTrainedModel

from fptquant.report.compare import Comparison, compare_logits
from fptquant.train.teacher import Teacher


@torch.no_grad()
def compare(model: PreTrainedModel, teacher: Teacher, sequences: Iterable[int]) -> Comparison:
    """Compares a model with the original on the teacher's windows.

    Args:
        model: any with the vocabulary of the original.
        teacher: the original's final hidden states, and the windows (sequences, length).
        sequences: indices of the windows to use.
    """
    triples = (
        (
            teacher.windows[sequence],
            teacher.head(teacher.hidden(sequence)[:-1]),
            model(teacher.windows[sequence][None], use_cache=False).logits[0, :-1],
        )
        for sequence in sequences
    )
    return compare_logits(triples)[1]
