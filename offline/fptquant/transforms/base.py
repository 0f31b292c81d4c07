"""The protocol every transform follows."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from fptquant.wiring import Architecture, Place, Shape


class Transform(nn.Module):
    """A pair of transforms that cancel: what it does to the two sides of each linear layer.

    A layer's weight W becomes L W C, its bias L b. A transform overrides `outputs`, which multiplies by L, and
    `inputs`, which multiplies by C. Both act on the last dimension, so that they serve for weights (`merge`) and, where
    no merged weight is wanted, for activations: (L W C) x = L (W (C x)). What runs online (T_d, T_h, S_n) is carried
    out by the layers themselves; what it overrides is the part that goes into the weights, if any.

    Parameters start at fixed values and are kept in float32; everything is computed in the dtype of the values given
    (float64 when a checkpoint is written, float32 when training) and is differentiable.
    """

    name: ClassVar[str]
    merged: ClassVar[bool] = True  # something of it goes into weights or norms
    in_gains: ClassVar[bool] = False  # of the layers' norms
    folds_gains: ClassVar[bool] = False  # needs the gains of norms in the weights behind them
    restriction: ClassVar[str] = ""  # what another form of the transform is, for users to read
    substitute: ClassVar[str | None] = None  # what shipped recipes have where a family can't have this transform
    shared: ClassVar[bool] = False  # by all layers, embedding and head; it is trained at a rate of its own

    def __init__(self, shape: Shape, options: Any, generator: torch.Generator) -> None:
        """Takes the sizes of the model, the transform's options and a generator for random starting values."""
        super().__init__()
        self.shape = shape
        self.options = options

    @classmethod
    def obstacle(cls, architecture: Architecture) -> str | None:
        """Why the models of a family can't have this transform; None where they can."""
        return None

    @classmethod
    def form(cls, shape: Shape) -> type[Transform]:
        """What stands for this transform in a model of this shape: itself, or a restricted one where it isn't exact."""
        return cls

    def _add(self, name: str, size: tuple[int, ...], *, trained: bool = True) -> None:
        """A parameter of zeros; a constant where it is not `trained`."""
        if trained:
            self.register_parameter(name, nn.Parameter(torch.zeros(size)))
        else:
            self.register_buffer(name, torch.zeros(size), persistent=False)

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """`values` (..., in) C, or C^T if `transposed`; all layers that share an input have the same C.

        Of the embedding, the rows (..., hidden) are these values.
        """
        return values

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """L `values`, for each vector of (..., out)."""
        return values

    def merge(self, place: Place, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Transformed weight L W C (out, in) and bias L b (out,) at the given place."""
        weight = self.outputs(place, self.inputs(place, weight).mT).mT
        return weight, None if bias is None else self.outputs(place, bias)

    def gain(self, place: Place, dtype: torch.dtype) -> Tensor | None:
        """Gain (hidden,) that the norm gets whose output is read at `place`; None for one."""
        return None

    def head_gain(self, place: Place, dtype: torch.dtype) -> Tensor | None:
        """Factor (head_dim,) on the norm over each head of what is put out at `place`; None for one."""
        return None

    def online(self) -> dict[str, Any]:
        """Fields of the format's `TransformRecord` for what runs online: the layers' steps come from them."""
        return {}

    @contextmanager
    def reused(self, dtype: torch.dtype) -> Iterator[None]:
        """Within this context the transform may compute what does not depend on the layer once, also for gradients.

        Any number of backward passes may run inside; the gradients reach the parameters when it ends.
        """
        yield

    @property
    def start_is_measured(self) -> bool:
        """Whether the starting value is taken from activations (`fptquant.calibration.starts`)."""
        return False

    def seen_in_weights(self) -> dict[str, nn.Parameter]:
        """Parameters both halves of which are in weights, so that an objective on weights alone says what is good."""
        return dict(self.named_parameters())

    def metrics(self) -> dict[str, float]:
        """What to watch while training, by name."""
        return {}

    @torch.no_grad()
    def randomize_(self, generator: torch.Generator, strength: float = 0.5) -> None:
        """Moves every parameter to a random, trained-looking value (for tests of function preservation)."""
        for parameter in self.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * strength)
