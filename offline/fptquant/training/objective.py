"""Losses between the next-token distributions of the student and of the original model."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Objective = Literal["jsd", "kl", "kl_top", "cross_entropy"]
Head = Callable[[Tensor], Tensor]

_TOKENS = 128  # logits of so many tokens are in memory at a time
_MIXED = 0.5


def divergence(student: Tensor, teacher: Tensor | None, labels: Tensor, objective: Objective, top: int) -> Tensor:
    """Sum over tokens of one loss, in float32.

    Args:
        student: logits (tokens, vocabulary).
        teacher: logits of the original model; not used by cross_entropy.
        labels: next tokens (tokens,), -100 where there is none; only used by cross_entropy.
        objective: "jsd" is the Jensen-Shannon divergence (FPTQuant, method.md 4.2); "kl" is KL(teacher | student);
            "kl_top" is KL over the teacher's `top` most likely tokens, both renormalized (OSTQuant's KL-Top);
            "cross_entropy" needs no teacher (SpinQuant).
        top: tokens of "kl_top".
    """
    if objective == "cross_entropy":
        return torch.nn.functional.cross_entropy(student.float(), labels, reduction="sum", ignore_index=-100)
    assert teacher is not None
    if objective == "kl_top":
        teacher, chosen = torch.topk(teacher, min(top, teacher.shape[-1]), -1)
        student = student.gather(-1, chosen)
    p, q = torch.log_softmax(teacher.float(), -1), torch.log_softmax(student.float(), -1)
    if objective == "jsd":
        m = torch.logaddexp(p, q) + torch.log(torch.tensor(_MIXED))
        return _MIXED * (_kl(p, m) + _kl(q, m))
    return _kl(p, q)


def _kl(p: Tensor, q: Tensor) -> Tensor:
    """KL(p | q) of log probabilities, summed."""
    return (p.exp() * (p - q)).sum()


def sequence_loss(
    hidden: Tensor,
    head: Head,
    target: Tensor | None,
    teacher_head: Head,
    labels: Tensor,
    objective: Objective,
    top: int,
) -> Tensor:
    """Mean loss over the tokens of some sequences; the logits are computed in pieces, and again when differentiating.

    Args:
        hidden: the student's input to its head (tokens, hidden).
        head: the student's, to logits.
        target: the original model's input to its head (tokens, hidden).
        teacher_head: the original model's.
        labels: see `divergence`.
        objective: see `divergence`.
        top: see `divergence`.
    """

    def piece(part: Tensor, start: int) -> Tensor:
        rows = slice(start, start + part.shape[0])
        with torch.no_grad():
            teacher = None if target is None else teacher_head(target[rows])
        return divergence(head(part), teacher, labels[rows], objective, top)

    total = hidden.new_zeros(())
    for start in range(0, hidden.shape[0], _TOKENS):
        part = checkpoint(piece, hidden[start : start + _TOKENS], start, use_reentrant=False)
        assert isinstance(part, Tensor)
        total = total + part
    return total / hidden.shape[0]
