"""The transforms of FPTQuant, one file each; `TRANSFORMS` is the registry and the order they are merged in."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fptquant.format import TransformRecord
from fptquant.options.transforms import FPTQUANT, TransformOptions
from fptquant.transforms.base import Transform
from fptquant.transforms.down_hadamard import DownHadamard
from fptquant.transforms.input_hadamard import InputHadamard
from fptquant.transforms.norm_scale import NormScale
from fptquant.transforms.query_key import QueryKeyTransform
from fptquant.transforms.residual_rotation import ResidualRotation
from fptquant.transforms.residual_scale import ResidualScale
from fptquant.transforms.up_down import UpDownTransform
from fptquant.transforms.value import ValueTransform
from fptquant.wiring import Place, Shape

# T_u must come before T_d: W_down diag(1 / s) H; T_r before T_s, and both and T_v before T_h: W R diag(s) B. The others
# act on different sides or roles and commute.
TRANSFORMS: dict[str, type[Transform]] = {
    transform.name: transform
    for transform in (
        QueryKeyTransform,
        ValueTransform,
        UpDownTransform,
        ResidualRotation,
        NormScale,
        InputHadamard,
        DownHadamard,
        ResidualScale,
    )
}

__all__ = ["FPTQUANT", "TRANSFORMS", "Transform", "TransformOptions", "TransformSet"]


class TransformSet(nn.Module):
    """The transforms of one model, applied together."""

    def __init__(self, options: Mapping[str, Any], shape: Shape, seed: int) -> None:
        """Builds the named transforms at their starting values.

        Args:
            options: transform name to its options, e.g. `{"T_d": HadamardOptions(block=64)}`.
            shape: sizes of the model.
            seed: for the random signs of Hadamard starting points.
        """
        super().__init__()
        self.transforms = nn.ModuleDict()
        for name, transform in TRANSFORMS.items():
            if name in options:  # a generator each, so that switching one off doesn't move the others
                generator = torch.Generator().manual_seed(seed)
                self.transforms[name] = transform.form(shape)(shape, options[name], generator)

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Applies each transform's `inputs` in turn, last to first if `transposed`: `values` (..., in) C or C^T."""
        transforms = list(self)
        for transform in reversed(transforms) if transposed else transforms:
            values = transform.inputs(place, values, transposed=transposed)
        return values

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Applies each transform's `outputs` in turn: L `values`, for each vector of (..., out)."""
        for transform in self:
            values = transform.outputs(place, values)
        return values

    def merge(self, place: Place, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Weight and bias at `place` after all transforms, in the dtype given."""
        for transform in self:
            weight, bias = transform.merge(place, weight, bias)
        return weight, bias

    def gain(self, place: Place, dtype: torch.dtype) -> Tensor | None:
        """Multiplies the gains (hidden,) that transforms want of the norm in front of `place`; None for one."""
        return _product([transform.gain(place, dtype) for transform in self])

    def head_gain(self, place: Place, dtype: torch.dtype) -> Tensor | None:
        """Multiplies the factors (head_dim,) that transforms want of the norm over heads at `place`; None for one."""
        return _product([transform.head_gain(place, dtype) for transform in self])

    @contextmanager
    def reused(self, dtype: torch.dtype) -> Iterator[None]:
        """Lets each transform compute what doesn't depend on the layer once within the context (`Transform.reused`)."""
        with ExitStack() as stack:
            for transform in self:
                stack.enter_context(transform.reused(dtype))
            yield

    def __iter__(self) -> Any:
        """The transforms that are on, in the order they are merged."""
        return iter(self.transforms.values())

    @property
    def folds_gains(self) -> bool:
        """Whether the gains of norms go into the weights behind them, because one of the transforms needs that.

        Elsewhere gains stay. They make channels small that are far larger than others in the residual (hundreds of
        times in Gemma): 8 bits hold what a norm puts out, and less of what it would put out without.
        """
        return any(transform.folds_gains for transform in self)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of the transforms that are on."""
        return tuple(self.transforms)

    def record(self) -> TransformRecord:
        """What a checkpoint says of them."""
        online = {field: value for transform in self for field, value in transform.online().items()}
        return TransformRecord(merged=tuple(transform.name for transform in self if transform.merged), **online)

    def metrics(self) -> dict[str, float]:
        """What to watch while training, by name."""
        return {f"{name}/{key}": v for name, t in self.transforms.items() for key, v in t.metrics().items()}  # type: ignore[operator]

    def randomize_(self, generator: torch.Generator, strength: float = 0.5) -> None:
        """Moves all parameters to random values (tests of function preservation)."""
        for transform in self:
            transform.randomize_(generator, strength)


def _product(gains: list[Tensor | None]) -> Tensor | None:
    found = [gain for gain in gains if gain is not None]
    return math.prod(found[1:], start=found[0]) if found else None
