"""The quantized linear layer on GPUs: plain torch that the compiler fuses with the norm, around one kernel."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from fptquant.checkpoint import block_hadamard, quantize
from vllm_fptquant.kernels.base import GpuKernel, LinearWeights


class ScaledInput(NamedTuple):
    """Input of a projection under residual scaling: it goes through vLLM's layers in place of a tensor.

    Attributes:
        x: (T, K), still to be multiplied by `scale`.
        scale: S, float32 (T, 1).
        undo: divide the product by `scale` again.
    """

    x: Tensor
    scale: Tensor
    undo: bool


class GpuLinear(torch.nn.Module):
    """All that one layer does to its input: scale, rotate, quantize, multiply, add the bias.

    Every value of the checkpoint is a buffer: a graph from vLLM's compile cache meets those of the model that runs.
    """

    left: Tensor
    right: Tensor
    input_scale: Tensor
    low: Tensor
    high: Tensor
    zero_point: Tensor

    def __init__(self, kernel: GpuKernel, weights: LinearWeights, rotation: tuple[Tensor, Tensor] | None) -> None:
        """Takes the input quantizer from `weights` and, for T_d, the factors of `hadamard_factors`."""
        super().__init__()
        self.kernel = kernel
        self.rotated = rotation is not None
        if rotation is not None:
            for name, factor in zip(("left", "right"), rotation, strict=True):
                self.register_buffer(name, factor.to(weights.codes.device), persistent=False)
        self.quantized = weights.input_scale is not None
        if weights.input_scale is not None:
            self.register_buffer("input_scale", weights.input_scale, persistent=False)
            low, high = weights.bounds
            self.register_buffer("low", low, persistent=False)
            self.register_buffer("high", high, persistent=False)
        self.adds_zero_point = weights.codes_hold_zero_point
        if self.adds_zero_point:
            self.register_buffer("zero_point", weights.zero_point.float(), persistent=False)

    def forward(self, x: Tensor | ScaledInput, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N) of the kernel's type."""
        scale, undo = None, False
        if isinstance(x, ScaledInput):
            x, scale, undo = x
        if undo and not self.quantized:
            scale = None  # it would cancel
        shape = x.shape[:-1]
        x = x.reshape(-1, x.shape[-1])
        output = self.kernel(self.codes(x, scale), self.row_scale(len(x), scale if undo else None))
        if bias is not None:
            output = output + bias
        result: Tensor = output.view(*shape, -1)
        return result

    def codes(self, x: Tensor, scale: Tensor | None) -> Tensor:
        """What the kernel multiplies, for `x` (M, K): int8 (M, K), or `x` itself where it is not quantized."""
        if scale is not None:
            x = x * scale  # float32
        if self.rotated:
            x = block_hadamard(x, self.left, self.right)
        if not self.quantized:
            return x.to(self.kernel.dtype)
        codes = quantize(x, self.input_scale, self.low, self.high)
        if self.adds_zero_point:
            codes = codes + self.zero_point
        return codes.to(torch.int8)

    def row_scale(self, rows: int, scale: Tensor | None) -> Tensor | None:
        """Input scale of every row, float32 (rows,), contiguous: Marlin reads as many floats without a check."""
        if not self.quantized:
            return None
        return self.input_scale.repeat(rows) if scale is None else self.input_scale / scale.flatten()
