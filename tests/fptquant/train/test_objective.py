"""Losses against their definitions, and computed in pieces."""

import math

import pytest
import torch
from torch import Tensor

from fptquant.options.train import Objective
from fptquant.train import objective
from fptquant.train.objective import divergence, sequence_loss

NONE = torch.full((6,), -100)


@pytest.fixture
def logits() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    return torch.randn(6, 50, generator=generator), torch.randn(6, 50, generator=generator) * 2


def test_jensen_shannon(logits: tuple[Tensor, Tensor]) -> None:
    q, p = (t.softmax(-1).double() for t in logits)
    m = (p + q) / 2
    expected = ((p * (p / m).log() + q * (q / m).log()).sum() / 2).float()
    assert torch.isclose(divergence(*logits, NONE, "jsd", 0), expected)
    assert torch.isclose(divergence(*logits[::-1], NONE, "jsd", 0), expected)  # symmetric
    assert divergence(logits[0], logits[0], NONE, "jsd", 0).abs() < 1e-6
    apart = torch.eye(2).mul(2e4)
    assert torch.isclose(divergence(apart[:1], apart[1:], NONE, "jsd", 0), torch.tensor(math.log(2)))


def test_gradient_of_jensen_shannon(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = (t.double().requires_grad_() for t in logits)
    p, q = teacher.softmax(-1), student.softmax(-1)
    m = (p + q) / 2
    expected = ((p * (p / m).log() + q * (q / m).log()).sum() / 2) * 3
    (divergence(student, teacher, NONE, "jsd", 0) * 3).backward()
    assert torch.allclose(student.grad, torch.autograd.grad(expected, student)[0].float().double(), atol=1e-6)


def test_kl(logits: tuple[Tensor, Tensor]) -> None:
    student, teacher = logits
    expected = torch.nn.functional.kl_div(
        student.log_softmax(-1), teacher.log_softmax(-1), log_target=True, reduction="sum"
    )
    assert torch.isclose(divergence(student, teacher, NONE, "kl", 0), expected)
    assert torch.isclose(divergence(student, teacher, NONE, "kl_top", 50), expected)
    best = teacher.topk(3).indices
    expected = divergence(student.gather(-1, best), teacher.gather(-1, best), NONE, "kl", 0)
    assert torch.isclose(divergence(student, teacher, NONE, "kl_top", 3), expected)


def test_cross_entropy_leaves_out_the_last_token(logits: tuple[Tensor, Tensor]) -> None:
    labels = torch.tensor([3, 1, 4, 1, 5, -100])
    expected = -logits[0].log_softmax(-1)[range(5), labels[:5]].sum()
    assert torch.isclose(divergence(logits[0], None, labels, "cross_entropy", 0), expected)


@pytest.mark.parametrize("kind", ["jsd", "kl", "kl_top", "cross_entropy"])
def test_pieces_make_no_difference(kind: Objective, monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(1)
    weight = torch.randn(40, 8, generator=generator, requires_grad=True)
    teacher_weight = torch.randn(40, 8, generator=generator)
    hidden = torch.randn(10, 8, generator=generator, requires_grad=True)
    target, labels = torch.randn(10, 8, generator=generator), torch.randint(0, 40, (10,), generator=generator)
    found = []
    for size in (100, 3):
        monkeypatch.setattr(objective, "_TOKENS", size)
        weight.grad = None
        loss, gradient = sequence_loss(
            hidden, lambda h: h @ weight.T, target, lambda h: h @ teacher_weight.T, labels, kind, 5, 0.5
        )
        found.append((torch.tensor(loss), gradient, weight.grad))
    whole = divergence(hidden @ weight.T, target @ teacher_weight.T, labels, kind, 5) / 20
    found.append((whole.detach(), *torch.autograd.grad(whole, (hidden, weight))))
    for several in zip(*found, strict=True):
        assert all(torch.allclose(several[0], other, atol=1e-5) for other in several[1:])
