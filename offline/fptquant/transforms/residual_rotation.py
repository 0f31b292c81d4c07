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
    folds_gains = True

    def __init__(self, shape: Shape, options: RotationOptions, generator: torch.Generator) -> None:
        """Starts at the identity or a Hadamard matrix with random signs; `align` is for those who saw activations."""
        super().__init__(shape, options, generator)
        self.skew = nn.Parameter(torch.zeros(shape.hidden, shape.hidden))
        start = torch.eye(shape.hidden, dtype=torch.float64)
        if options.start != "identity":
            start = starting_rotation(shape.hidden, generator)
        self.register_buffer("start", start)
        self.start: Tensor
        self._reused: Tensor | None = None
        self._cached: tuple[tuple[int, int, torch.dtype], Tensor] | None = None

    @classmethod
    def obstacle(cls, architecture: Architecture) -> str | None:
        """A gain behind the writing layer is in no weight that R could be merged with."""
        return "blocks end in norms, with gains that rotations don't pass" if architecture.post_norms else None

    @property
    def start_is_measured(self) -> bool:
        """Whether the start is taken from activations, which is so with `start: klt`."""
        return bool(self.options.start == "klt")

    @torch.no_grad()
    def align(self, covariance: Tensor) -> None:
        """Puts the principal axes K of activations in front of the Hadamard matrix H: R = K H cayley(P).

        Where all elements of H are equally large, each channel of x K H has the mean variance of all (the KLT-enhanced
        rotation of MambaQuant, arXiv 2501.13484). H by itself gives a channel what covariances add to that.

        Args:
            covariance: (hidden, hidden) float64, of what reads the residual behind its norms.
        """
        axes = torch.linalg.eigh(covariance).eigenvectors
        largest = axes.gather(0, axes.abs().argmax(0, keepdim=True))
        self.start.copy_(axes * largest.sign() @ self.start)  # signs are the solver's otherwise

    def rotation(self, dtype: torch.dtype) -> Tensor:
        """R (hidden, hidden); computed once per value of the parameter when no gradient is needed."""
        if self._reused is not None and self._reused.dtype == dtype:
            return self._reused
        if torch.is_grad_enabled() and self.skew.requires_grad:
            return self.start.to(dtype) @ cayley(self.skew.to(dtype))
        key = (self.skew._version, self.start._version, dtype)
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
