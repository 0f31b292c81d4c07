"""What enters a down projection."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.utils.checkpoint import checkpoint


def gated_product(activation: Callable[[Tensor], Tensor], gate: Tensor, up: Tensor) -> Tensor:
    """activation(gate) * up, each (..., intermediate).

    Where something is trained it is computed again in the backward pass, for it is the widest of what would be kept.
    """

    def product(gate: Tensor, up: Tensor) -> Tensor:
        return activation(gate) * up

    if not (gate.requires_grad or up.requires_grad):
        return product(gate, up)
    found: Tensor = checkpoint(product, gate, up, use_reentrant=False, preserve_rng_state=False)
    return found
