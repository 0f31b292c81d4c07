"""Losses between the next-token distributions of the student and of the original model."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from fptquant.options.train import Objective

Head = Callable[[Tensor], Tensor]

_TOKENS = 128  # logits of so many tokens are in memory at a time


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
    p = torch.log_softmax(teacher.float(), -1)
    if objective == "jsd":
        result: Tensor = _JensenShannon.apply(student.float(), p)  # type: ignore[no-untyped-call]
        return result
    return (p.exp() * (p - torch.log_softmax(student.float(), -1))).sum()


class _JensenShannon(torch.autograd.Function):
    """(KL(p | m) + KL(q | m)) / 2 with m = (p + q) / 2, summed over rows.

    d/dz of the logits z of q is q (log q / m - KL(q | m)) / 2, far fewer passes over the vocabulary than autograd's.
    """

    @staticmethod
    def forward(ctx: Any, student: Tensor, p: Tensor) -> Tensor:
        q = torch.log_softmax(student, -1)
        m = torch.logaddexp(p, q).sub_(math.log(2))
        weight = q.exp()
        terms = q.sub_(m).mul_(weight)  # q log q / m
        divergence = terms.sum(-1, keepdim=True)
        total = (p.exp() * m.sub_(p)).sum().neg_() + divergence.sum()
        ctx.save_for_backward(terms.sub_(weight.mul_(divergence)))
        return total / 2

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        return ctx.saved_tensors[0] * (gradients[0] / 2), None


def sequence_loss(
    hidden: Tensor,
    head: Head,
    target: Tensor | None,
    teacher_head: Head,
    labels: Tensor,
    objective: Objective,
    top: int,
    share: float = 1.0,
) -> tuple[float, Tensor]:
    """Mean loss over the tokens of a sequence, and its gradient: piece by piece, since all logits would not fit.

    What the student's head trains gets its gradients here; the caller passes the gradient of `hidden` on.

    Args:
        hidden: the student's input to its head (tokens, hidden).
        head: the student's, to logits.
        target: the original model's input to its head (tokens, hidden).
        teacher_head: the original model's.
        labels: see `divergence`.
        objective: see `divergence`.
        top: see `divergence`.
        share: of this sequence in the loss of a step.

    Returns:
        The loss and its gradient (tokens, hidden), both times `share`.
    """
    leaf, total = hidden.detach().requires_grad_(), 0.0
    for start in range(0, len(leaf), _TOKENS):
        rows = slice(start, start + _TOKENS)
        with torch.no_grad():
            teacher = None if target is None else teacher_head(target[rows])
        loss = divergence(head(leaf[rows]), teacher, labels[rows], objective, top) * (share / len(leaf))
        loss.backward()  # type: ignore[no-untyped-call]
        total += float(loss.detach())
    assert leaf.grad is not None
    return total, leaf.grad
