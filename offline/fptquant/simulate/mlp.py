"""A gated MLP with a linear layer for each projection, where a family's own class has no such thing."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def gated(activation: Callable[[Tensor], Tensor], gates: Tensor, ups: Tensor) -> Tensor:
    """activation(gates) * ups; computed again backward, as it is the widest of what would be kept."""

    def product(gates: Tensor, ups: Tensor) -> Tensor:
        return activation(gates) * ups

    if not (gates.requires_grad or ups.requires_grad):
        return product(gates, ups)
    result: Tensor = checkpoint(product, gates, ups, use_reentrant=False, preserve_rng_state=False)
    return result


class GatedMLP(nn.Module):
    """An MLP without biases; an expert is one."""

    def __init__(self, gate_proj: nn.Linear, up_proj: nn.Linear, down_proj: nn.Linear, act_fn: nn.Module) -> None:
        """Takes the three projections and the activation behind the gate."""
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj, self.act_fn = gate_proj, up_proj, down_proj, act_fn

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Args: x (..., hidden), and S (..., 1) where `down_proj` scales by it. Returns: (..., hidden)."""
        h = gated(self.act_fn, self.gate_proj(x), self.up_proj(x))
        y: Tensor = self.down_proj(h) if scale is None else self.down_proj(h, scale)
        return y


def linear_of(weight: Tensor) -> nn.Linear:
    """A layer without bias, with this weight (N, K)."""
    linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, device="meta")
    linear.weight = nn.Parameter(weight, requires_grad=False)
    return linear
