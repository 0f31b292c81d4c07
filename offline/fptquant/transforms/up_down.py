"""T_u: one positive scale per MLP channel, merged into up and down weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fptquant.transforms.base import Transform
from fptquant.wiring import Place, Role, Shape


class UpDownTransform(Transform):
    """W_up' = diag(s) W_up, W_down' = W_down diag(1 / s); never the gate, whose activation is not homogeneous.

    FPTQuant section 3.1; method.md 1.3.
    """

    name = "T_u"

    def __init__(self, shape: Shape, options: Any, generator: torch.Generator) -> None:
        """Starts at the identity."""
        super().__init__(shape, options, generator)
        self.log_scale = nn.Parameter(torch.zeros(shape.layers, shape.intermediate))  # s = exp(.) > 0

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Scales what up_proj puts out."""
        return values * self.log_scale[place.layer].to(values.dtype).exp() if place.role is Role.UP else values

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Scales the columns of down_proj inversely."""
        return values * torch.exp(-self.log_scale[place.layer].to(values.dtype)) if place.role is Role.DOWN else values
