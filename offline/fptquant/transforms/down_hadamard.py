"""T_d: a block Hadamard transform at the input of down_proj, run online."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import PositiveInt, field_validator
from torch import Tensor

from fptquant.architectures import Role, Shape
from fptquant.checkpoint import hadamard_factors
from fptquant.errors import FPTQuantError
from fptquant.transforms.base import Transform, TransformOptions


class DownHadamardOptions(TransformOptions):
    """Block size: a power of two that divides the intermediate size; `auto` takes the largest."""

    block: PositiveInt | Literal["auto"] = "auto"

    @field_validator("block")
    @classmethod
    def _power_of_two(cls, block: int | str) -> int | str:
        if isinstance(block, int) and block & (block - 1):
            raise ValueError(f"block must be a power of two, got {block}")
        return block


class DownHadamard(Transform):
    """h' = h blockdiag(H_b / sqrt(b)) online, W_down' = W_down blockdiag(H_b / sqrt(b)) (method.md 1.4)."""

    name = "T_d"
    Options = DownHadamardOptions

    def __init__(self, shape: Shape, options: DownHadamardOptions, generator: torch.Generator) -> None:
        """Settles the block size; FPTQuantError when it does not divide the intermediate size."""
        super().__init__(shape, options, generator)
        largest = shape.intermediate & -shape.intermediate
        self.block = largest if options.block == "auto" else options.block
        if shape.intermediate % self.block:
            raise FPTQuantError(
                f"T_d: block {self.block} does not divide the intermediate size {shape.intermediate}; "
                f"use a power of two up to {largest}, or 'auto'"
            )

    def merge(self, role: Role, layer: int, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """Multiplies each block of columns of down_proj by the (symmetric, orthonormal) Hadamard matrix."""
        if role is not Role.DOWN:
            return weight, bias
        left, right = (factor.to(weight.dtype) for factor in hadamard_factors(self.block))
        signs = torch.kron(left, torch.sign(right))
        blocks = weight.reshape(-1, self.block)
        return (blocks @ signs / self.block**0.5).view(weight.shape), bias
