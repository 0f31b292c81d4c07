"""The quantized linear layer as one custom operator, `fptquant::linear`, for eager mode and torch.compile.

Packed weights are no tensors, so a compiled graph cannot hold them. It holds a *handle* instead, an int64
tensor that is a buffer of the layer: a graph from vLLM's compile cache therefore always meets the weights of
the model that is running, and no scale of a checkpoint is baked into a graph.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from fptquant.format import block_hadamard, quantize_per_tensor
from vllm_fptquant.kernels.base import CpuKernel, LinearWeights
from vllm_fptquant.kernels.library import register

# Rows that are rotated and quantized at a time: few enough for the cache, and for temporaries whose memory
# the allocator reuses instead of returning it to the system (fresh pages cost more than the arithmetic).
CHUNK = 128


class PreparedLinear:
    """All that one layer does to its input: rotate, quantize, multiply, add the bias."""

    def __init__(self, kernel: CpuKernel, weights: LinearWeights, rotation: tuple[Tensor, Tensor] | None) -> None:
        """Takes the input quantizer from `weights` and, for T_d, the factors of `hadamard_factors`."""
        self.kernel = kernel
        self.rotation = rotation
        self.input_scale = weights.input_scale
        self.low, self.high = (bound.item() for bound in weights.bounds)

    def __call__(self, x: Tensor, bias: Tensor | None, scale: Tensor | None = None, *, undo: bool = False) -> Tensor:
        """Computes (..., N) of the type of `x` (..., K), rounded to it once.

        Args:
            x: (..., K).
            bias: (N,) or None.
            scale: (rows, 1), what `x` is multiplied by first.
            undo: divide by `scale` again, before the bias is added.
        """
        if x.dim() > 2:
            return self(x.flatten(0, -2), bias, scale, undo=undo).view(*x.shape[:-1], -1)
        output = self.kernel.matmul(self.codes(x, scale))
        if undo and scale is not None:
            output.div_(scale)
        if bias is not None:
            output += bias
        return output.to(x.dtype)

    def codes(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """What the kernel multiplies, for `x` (M, K): float32 (M, K)."""
        if len(x) <= CHUNK:
            return self._codes(x, scale)
        codes = torch.empty(x.shape)
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            self._codes(x[rows], None if scale is None else scale[rows], codes[rows])
        return codes

    def _codes(self, x: Tensor, scale: Tensor | None, out: Tensor | None = None) -> Tensor:
        if scale is not None:
            x = x * scale
        if self.rotation is not None:
            x = block_hadamard(x, *self.rotation)
        if self.input_scale is None:
            return x.float() if out is None else out.copy_(x)
        return quantize_per_tensor(x, self.input_scale, self.low, self.high, out)


_prepared: dict[int, PreparedLinear] = {}
_next_handle = itertools.count()


def register_prepared(layer: torch.nn.Module, prepared: PreparedLinear) -> Tensor:
    """Keeps `prepared` for as long as `layer` lives, and returns its handle: int64 ()."""
    handle = next(_next_handle)
    _prepared[handle] = prepared
    weakref.finalize(layer, _prepared.pop, handle, None)
    return torch.tensor(handle, dtype=torch.int64)


def replace_prepared(handle: Tensor, prepared: PreparedLinear) -> None:
    """Puts `prepared` behind a handle that graphs hold already."""
    _prepared[int(handle.item())] = prepared


def linear(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    """Computes the layer behind `handle`: (..., K) to (..., out_features), in the type of `x`."""
    output: Tensor = torch.ops.fptquant.linear(x, handle, bias, out_features)
    return output


def _linear_cpu(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return _prepared[int(handle.item())](x, bias)


def _linear_fake(x: Tensor, handle: Tensor, bias: Tensor | None, out_features: int) -> Tensor:
    return x.new_empty((*x.shape[:-1], out_features))


register("linear(Tensor x, Tensor handle, Tensor? bias, int out_features) -> Tensor", _linear_cpu, _linear_fake, "CPU")
