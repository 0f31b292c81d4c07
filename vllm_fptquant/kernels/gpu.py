"""The quantized linear layer on GPUs: plain torch that the compiler fuses with the norm, around one kernel."""

from __future__ import annotations

from typing import ClassVar, NamedTuple

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm import envs

from fptquant.errors import FPTQuantError
from fptquant.format import hadamard_factors, quantize
from fptquant.format.steps import Arrangement, Hadamard, Offset, OutputStep, Shift
from vllm_fptquant.kernels.base import GpuKernel, LinearWeights, run_outputs
from vllm_fptquant.kernels.library import register

HADACORE_LARGEST = 2**15


class ScaledInput(NamedTuple):
    """Input of a projection under residual scaling: it goes through vLLM's layers in place of a tensor.

    Attributes:
        x: (T, K), still to be multiplied by `scale`.
        scale: S, float32 (T, 1), of RowScale and Undo, or of a norm before a layer that has neither.
    """

    x: Tensor
    scale: Tensor


class GpuLinear(torch.nn.Module):
    """All that one layer does to its input: its steps, in an order that suits 16-bit inputs and outputs.

    By the rule of rows (`fptquant.format.steps`) S comes behind the input steps, which so get 16-bit numbers, and Undo
    is part of the kernel's row scale, before output steps: the product alone can be too large for 16 bits. Shift, which
    the rule is not true of, comes behind S, and Offset is divided by it.

    Every value of the checkpoint is a buffer: a graph from vLLM's compile cache meets those of the model that runs.
    """

    input_scale: Tensor
    low: Tensor
    high: Tensor
    zero_point: Tensor
    shift: Tensor
    offset: Tensor

    def __init__(
        self, kernel: GpuKernel, weights: LinearWeights, steps: Arrangement, *, fast_hadamard: bool = False
    ) -> None:
        """Takes the steps' tensors from `weights`.

        Args:
            kernel: with the weights.
            weights: of the layer.
            steps: of the layer.
            fast_hadamard: see `Hadacore`.

        Raises:
            FPTQuantError: a step that can't be computed here, or not in this order.
        """
        super().__init__()
        for step in steps.online:
            homogeneous = isinstance(step, OutputStep) and step.homogeneous
            if not homogeneous and not isinstance(step, Hadamard | Shift | Offset):
                raise FPTQuantError(f"{weights.name}: can't compute the step {step} on GPUs: serve on CPUs")
        self.kernel = kernel
        device = weights.codes.device
        self.inputs = torch.nn.ModuleList(
            make_rotation(step.block, fast_hadamard, kernel.dtype, device)
            for step in steps.inputs
            if isinstance(step, Hadamard)
        )
        self.outputs, self.undone, self.rows = steps.outputs, steps.undone, weights.rows
        self.shifted = steps.shifted
        if self.shifted:  # of the whole layer, at once
            offset = torch.cat([part["output_offset"] for part in weights.online])
            self.register_buffer("shift", weights.online[0]["input_shift"], persistent=False)
            self.register_buffer("offset", offset, persistent=False)
            self.outputs = tuple(step for step in steps.outputs if not isinstance(step, Offset))
        out_features, in_features = weights.codes.shape
        read = {tensor.name for step in self.outputs for tensor in step.tensors(in_features, out_features)}
        self.online = [sorted(read & tensors.keys()) for tensors in weights.online]  # names; the tensors are buffers
        for part, names in enumerate(self.online):
            for name in names:
                self.register_buffer(f"{name}_{part}", weights.online[part][name], persistent=False)
        self.quantized = weights.input_scale is not None
        self.adds_zero_point = weights.codes_hold_zero_point
        if weights.input_scale is not None:
            self.register_buffer("input_scale", weights.input_scale, persistent=False)
            for name, bound in zip(("low", "high"), weights.bounds, strict=True):
                self.register_buffer(name, bound, persistent=False)
        if self.adds_zero_point:
            self.register_buffer("zero_point", weights.zero_point.float(), persistent=False)

    def forward(self, x: Tensor | ScaledInput, bias: Tensor | None) -> Tensor:
        """(..., K) to (..., N) of the kernel's type."""
        x, scale = x if isinstance(x, ScaledInput) else (x, None)
        if self.undone and not self.quantized:
            scale = None  # RowScale and Undo cancel
        rows = x.reshape(-1, x.shape[-1])
        for rotation in self.inputs:
            rows = rotation(rows)
        scaled = rows if scale is None else rows * scale  # float32
        if self.shifted:
            scaled = scaled - self.shift
        undo = scale if self.undone else None
        output = self.kernel(self.codes(scaled), self.row_scale(len(rows), undo))
        if self.shifted:
            output = (output + (self.offset if undo is None else self.offset / undo)).to(output.dtype)
        if self.outputs:
            output = self._behind(output, scaled if undo is None else scaled / undo).to(output.dtype)
        if bias is not None:
            output = output + bias
        result: Tensor = output.view(*x.shape[:-1], -1)
        return result

    def codes(self, x: Tensor) -> Tensor:
        """What the kernel multiplies, for `x` (M, K): int8 (M, K), or 16-bit numbers where it is not quantized."""
        if not self.quantized:
            return x.to(self.kernel.dtype)
        codes = quantize(x, self.input_scale, self.low, self.high)
        if self.adds_zero_point:
            codes = codes + self.zero_point
        return codes.to(torch.int8)

    def _behind(self, y: Tensor, x: Tensor) -> Tensor:
        """Output steps by their definition: the compiler makes what it can of them."""
        bound = []
        for part, names in enumerate(self.online):
            tensors = {name: self.get_buffer(f"{name}_{part}") for name in names}
            bound.append([step.bind(tensors, x.device, False) for step in self.outputs])
        return run_outputs(bound, self.rows, y, x)

    def row_scale(self, rows: int, scale: Tensor | None) -> Tensor | None:
        """Input scale of every row, float32 (rows,).

        A new tensor and no slice of a larger buffer: Marlin reads as many floats as there are rows without a check.
        """
        if not self.quantized:
            return None
        return self.input_scale.repeat(rows) if scale is None else self.input_scale / scale.flatten()


class BlockHadamard(torch.nn.Module):
    """T_d, exact but for the rounding of float32 sums: a product of 16-bit numbers with +-1 on tensor cores.

    H_block is H_a (x) H_b. The product is with the whole H_b, which tensor cores multiply faster than GPUs multiply
    two small float32 matrices; sums and differences of its float32 result do what is left of larger blocks.
    """

    matrix: Tensor
    norm: Tensor
    largest: ClassVar[int] = 512  # b: every layer holds its own matrix

    def __init__(self, block: int, dtype: torch.dtype, device: torch.device) -> None:
        """Makes the matrix in `dtype`, float16 or bfloat16, that of the inputs.

        Raises:
            FPTQuantError: in vLLM's batch-invariant mode, whose promise the product doesn't keep.
        """
        super().__init__()
        if envs.VLLM_BATCH_INVARIANT:  # the order of its sums is cuBLAS's choice, by the number of rows
            raise FPTQuantError(
                "VLLM_BATCH_INVARIANT would change the online Hadamard transform: unset it, "
                "or quantize without T_d and T_h"
            )
        size = min(block, self.largest)
        signs = torch.kron(*hadamard_factors(size)).sign()
        self.register_buffer("matrix", signs.to(device, dtype), persistent=False)
        self.doublings = (block // size).bit_length() - 1
        norm = torch.tensor(block**-0.5, dtype=torch.float32, device=device)  # the default type is the model's
        self.register_buffer("norm", norm, persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """16-bit (M, K) to float32 (M, K)."""
        size = len(self.matrix)
        y = torch.ops.fptquant.mm_float32(x.reshape(-1, size), self.matrix)
        for _ in range(self.doublings):
            first, second = y.view(-1, 2, size).unbind(1)
            y = torch.stack((first + second, first - second), 1)
            size *= 2
        result: Tensor = y.view(x.shape) * self.norm
        return result


def _multiply(x: Tensor, matrix: Tensor) -> Tensor:
    return torch.mm(x, matrix, out_dtype=torch.float32)


def _multiply_fake(x: Tensor, matrix: Tensor) -> Tensor:
    return x.new_empty((x.shape[0], matrix.shape[1]), dtype=torch.float32)


# An operator of our own: only CUDA has this product of 16-bit matrices that is not rounded to 16 bits.
register("mm_float32(Tensor x, Tensor matrix) -> Tensor", _multiply, _multiply_fake)


class Hadacore(torch.nn.Module):
    """T_d by vLLM's kernel in 16 bits: faster, and other codes than the format's; only where the user asks for it."""

    def __init__(self, block: int) -> None:
        """`block` is a power of two."""
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """(M, K) to (M, K) of the same 16-bit type."""
        blocks: Tensor = ops.hadacore_transform(x=x.reshape(-1, self.block), inplace=False)
        return blocks.view(x.shape)


def make_rotation(block: int, fast: bool, dtype: torch.dtype, device: torch.device) -> BlockHadamard | Hadacore:
    """T_d on blocks of this size of inputs of this type."""
    return Hadacore(block) if fast else BlockHadamard(block, dtype, device)


def require_hadacore(layer: str, block: int, capability: int | None) -> None:
    """Refuses `fast_hadamard` where vLLM's kernel can't transform blocks of this size.

    Raises:
        FPTQuantError: names the layer and the limit.
    """
    if capability is not None and capability >= 80 and block <= HADACORE_LARGEST:
        return
    raise FPTQuantError(
        f"{layer}: fast_hadamard needs a GPU of compute capability 8.0 and blocks of up to {HADACORE_LARGEST}, "
        f"these have {block}: leave it out"
    )
