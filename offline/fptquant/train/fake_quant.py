"""Quantize and dequantize with gradients for the input, the scale and the bounds."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fptquant.format import code_bounds
from fptquant.options.train import Estimator


class _FakeQuantize(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor, low: Tensor, high: Tensor, trust: bool) -> Tensor:
        ratio = x / scale
        ctx.save_for_backward(ratio, scale, low, high)  # codes are rounded again: a tensor less to keep
        ctx.trust = trust
        return torch.round(ratio).clamp_(low, high).mul_(scale)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None, None]:
        (gradient,) = gradients
        ratio, scale, low, high = ctx.saved_tensors
        codes = torch.round(ratio).clamp_(low, high)
        below, above = ratio < low, ratio > high
        inside = ~(below | above)
        passed = (ratio - codes).abs_() <= 0.5 if ctx.trust else inside
        for_scale = for_low = for_high = None
        if ctx.needs_input_grad[1]:
            for_scale = (gradient * (codes - ratio * inside)).sum_to_size(scale.shape)
        if ctx.needs_input_grad[2]:
            for_low = (gradient * below * scale).sum_to_size(low.shape)
        if ctx.needs_input_grad[3]:
            for_high = (gradient * above * scale).sum_to_size(high.shape)
        return gradient * passed, for_scale, for_low, for_high, None


def fake_quantize(x: Tensor, scale: Tensor, low: Tensor, high: Tensor, estimator: Estimator = "ste") -> Tensor:
    """`s * clamp(round(x / s), low, high)`, with the values of `fptquant.format.quantize`.

    Gradients: "ste" is straight through inside of the range and zero outside, with LSQ's gradient for the scale
    (Esser et al., arXiv 1902.08153) and s on clipped values for the bounds. "trust" lets the gradient of `x` pass
    where the value moved by at most half a step (QuEST, arXiv 2502.05003): values just outside count as inside.

    Args:
        x: any shape, float32.
        scale: positive, broadcastable to `x`.
        low: smallest code minus zero point, broadcastable.
        high: largest code minus zero point, broadcastable.
        estimator: of the gradient of `x`.
    """
    result: Tensor = _FakeQuantize.apply(x, scale, low, high, estimator == "trust")  # type: ignore[no-untyped-call]
    return result


def straight_through_round(x: Tensor) -> Tensor:
    """Rounds, with the gradient of the identity."""
    return x + (torch.round(x) - x).detach()


class StaticQuantizer(nn.Module):
    """A static quantizer whose scale and zero point are parameters."""

    def __init__(self, scale: Tensor, zero_point: Tensor | None, bits: int, estimator: Estimator = "ste") -> None:
        """Starts at given values.

        Args:
            scale: positive, any shape that broadcasts to what is quantized.
            zero_point: of the same shape; None for symmetric.
            bits: width of the codes.
            estimator: see `fake_quantize`.
        """
        super().__init__()
        self.bits, self.estimator = bits, estimator
        self.log_scale = nn.Parameter(scale.detach().float().log())
        self.zero_point = None if zero_point is None else nn.Parameter(zero_point.detach().float())

    def forward(self, x: Tensor) -> Tensor:
        """Quantizes and dequantizes `x` at the present scale and zero point, with gradients for both."""
        scale = self.log_scale.exp()
        zero_point = torch.zeros_like(scale)
        if self.zero_point is not None:
            half = 2.0 ** (self.bits - 1)
            zero_point = straight_through_round(self.zero_point).clamp(-half, half - 1)
        return fake_quantize(x, scale, *code_bounds(zero_point, self.bits), self.estimator)

    @torch.no_grad()
    def values(self) -> tuple[Tensor, Tensor]:
        """Scale (float32) and zero point (int32) as they are now."""
        scale = self.log_scale.exp()
        if self.zero_point is None:
            return scale, torch.zeros_like(scale, dtype=torch.int32)
        half = 2 ** (self.bits - 1)
        return scale, torch.round(self.zero_point).clamp(-half, half - 1).to(torch.int32)
