"""T_s: one positive scale per channel between a norm and the linear layers that read it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from fptquant.options.transforms import NormScaleOptions
from fptquant.transforms.base import Transform
from fptquant.wiring import Place, Role, Shape

_SMALLEST = 1e-5  # of a channel's largest magnitude
_NORMS = {  # which of a layer's norms is read
    Role.QUERY: 0, Role.KEY: 0, Role.VALUE: 0, Role.GATE: 1, Role.UP: 1, Role.ROUTER: 1, Role.SHARED_GATE: 1,
}  # fmt: skip


class NormScale(Transform):
    """x' = x diag(1 / s) in the norm's gain, W' = W diag(s) in the linear layers behind it.

    SmoothQuant (arXiv 2211.10438) eq. 3 and 4; trained, it is the equivalent transformation of OmniQuant
    (arXiv 2308.13137) without shifts and the scaling between norms and layers of OSTQuant (arXiv 2501.13987).
    """

    name = "T_s"
    in_gains = True

    def __init__(self, shape: Shape, options: NormScaleOptions, generator: torch.Generator) -> None:
        """Starts at the identity; `start` is for those who have seen activations."""
        super().__init__(shape, options, generator)
        self.log_scale = nn.Parameter(torch.zeros(shape.layers, 2, shape.hidden))  # s = exp(.) > 0

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Scales the columns of what reads a norm."""
        if place.role not in _NORMS:
            return values
        return values * self.log_scale[place.layer, _NORMS[place.role]].to(values.dtype).exp()

    def gain(self, place: Place, dtype: torch.dtype) -> Tensor | None:
        """Returns 1 / s, by which the norm's gain is multiplied."""
        return torch.exp(-self.log_scale[place.layer, _NORMS[place.role]].to(dtype))

    @property
    def start_is_measured(self) -> bool:
        """Whether the start is taken from activations, which is so where `alpha` is given."""
        return self.options.alpha is not None

    def seen_in_weights(self) -> dict[str, nn.Parameter]:
        """None: the other half is in gains."""
        return {}

    @torch.no_grad()
    def start(self, place: Place, inputs: Tensor, weights: Tensor) -> None:
        """Sets s = max|x|^alpha / max|w|^(1 - alpha), each (hidden,) the largest magnitude of a channel."""
        alpha: float = self.options.alpha
        logs: list[Any] = [values.clamp_min(_SMALLEST).log() for values in (inputs, weights)]
        self.log_scale[place.layer, _NORMS[place.role]] = alpha * logs[0] - (1 - alpha) * logs[1]
