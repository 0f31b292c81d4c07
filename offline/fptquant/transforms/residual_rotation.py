"""T_r: one rotation of the residual stream, merged into every weight that reads or writes it."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from fptquant.options.transforms import RotationOptions
from fptquant.transforms.base import Transform
from fptquant.transforms.orthogonal import cayley, starting_rotation
from fptquant.wiring import Architecture, Place, Role, Shape

_WRITERS = (Role.OUTPUT, Role.DOWN)


class ResidualRotation(Transform):
    """x' = x R with R = start cayley(P), orthogonal by construction (method.md 1.5).

    Norm gains must have been folded into the following weights, so that RMSNorm commutes with R.
    """

    name = "T_r"
    substitute = "T_h"
    shared = True

    def __init__(self, shape: Shape, options: RotationOptions, generator: torch.Generator) -> None:
        """Starts at the identity or at a Hadamard matrix with random signs."""
        super().__init__(shape, options, generator)
        self.skew = nn.Parameter(torch.zeros(shape.hidden, shape.hidden))
        start = torch.eye(shape.hidden, dtype=torch.float64)
        if options.start == "hadamard":
            start = starting_rotation(shape.hidden, generator)
        self.register_buffer("start", start)
        self.start: Tensor
        self._reused: Tensor | None = None
        self._cached: tuple[tuple[int, torch.dtype], Tensor] | None = None

    @classmethod
    def obstacle(cls, architecture: Architecture) -> str | None:
        """A gain behind the writing layer is in no weight that R could be merged with."""
        return "blocks end in norms, with gains that rotations don't pass" if architecture.post_norms else None

    def rotation(self, dtype: torch.dtype) -> Tensor:
        """R (hidden, hidden); computed once per value of the parameter when no gradient is needed."""
        if self._reused is not None and self._reused.dtype == dtype:
            return self._reused
        if torch.is_grad_enabled() and self.skew.requires_grad:
            return self.start.to(dtype) @ cayley(self.skew.to(dtype))
        key = (self.skew._version, dtype)
        if self._cached is None or self._cached[0] != key:
            self._cached = key, self.start.to(dtype) @ cayley(self.skew.to(dtype))
        return self._cached[1]

    @contextmanager
    def reused(self, dtype: torch.dtype) -> Iterator[None]:
        """Solves for R once; its gradient is collected and passed on at the end."""
        rotation = self.start.to(dtype) @ cayley(self.skew.to(dtype))
        self._reused = rotation.detach().requires_grad_(rotation.requires_grad)
        try:
            yield
            if self._reused.grad is not None:
                rotation.backward(self._reused.grad)  # type: ignore[no-untyped-call]
        finally:
            self._reused = None

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """W R where the residual is read, and for the embedding."""
        if place.role in _WRITERS:
            return values
        rotation = self.rotation(values.dtype)
        return values @ (rotation.mT if transposed else rotation)

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Y R where the residual is written: W' = R^T W, b' = b R."""
        return values @ self.rotation(values.dtype) if place.role in _WRITERS else values
