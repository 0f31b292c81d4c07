"""T_u: one positive scale per MLP channel, merged into up and down weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.transforms.base import Transform
from fptquant.wiring import SHARED, Place, Role, Shape


class UpDownTransform(Transform):
    """W_up' = diag(s) W_up, W_down' = W_down diag(1 / s); never the gate, whose activation is not homogeneous.

    FPTQuant section 3.1; method.md 1.3. Each expert of a mixture has its own s.
    """

    name = "T_u"

    def __init__(self, shape: Shape, options: Any, generator: torch.Generator) -> None:
        """Starts at the identity."""
        super().__init__(shape, options, generator)
        if shape.mixtures < shape.layers:
            self._add("log_scale", (shape.layers, shape.intermediate))  # s = exp(.) > 0, as of the others
        if shape.mixtures:
            self._add("log_scale_experts", (shape.layers, shape.experts, shape.expert_width))
        if shape.shared_width:
            self._add("log_scale_shared", (shape.layers, shape.shared_width))
        self.log_scale: Tensor
        self.log_scale_experts: Tensor
        self.log_scale_shared: Tensor

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Scales what up_proj puts out."""
        return values * self._log_scale(place).to(values.dtype).exp() if place.role is Role.UP else values

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Scales the columns of down_proj inversely."""
        return values * torch.exp(-self._log_scale(place).to(values.dtype)) if place.role is Role.DOWN else values

    def _log_scale(self, place: Place) -> Tensor:
        if place.expert is None:
            return self.log_scale[place.layer]
        if place.expert == SHARED:
            return self.log_scale_shared[place.layer]
        return self.log_scale_experts[place.layer, place.expert]
