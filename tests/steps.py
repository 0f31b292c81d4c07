"""Steps that the package doesn't have, as a later format may bring them, such as a low-rank branch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from fptquant.format.steps import OutputStep, Step, StepTensor


@dataclass(frozen=True)
class Branch(OutputStep):
    """y + (x A^T) B^T."""

    rank: int = 3
    homogeneous = True

    def tensors(self, in_features: int, out_features: int) -> tuple[StepTensor, ...]:
        return (
            StepTensor("branch_in", (self.rank, in_features), torch.float32, inputs=1),
            StepTensor("branch_out", (out_features, self.rank), torch.float32, outputs=0),
        )

    def bind(
        self, tensors: Mapping[str, Tensor], device: torch.device, exact: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        inner, outer = tensors["branch_in"], tensors["branch_out"]
        return lambda y, x: y + x.float() @ inner.T @ outer.T


@dataclass(frozen=True)
class Mystery(Step):
    """Of no kind that an executor knows."""
