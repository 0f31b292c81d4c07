"""The quantized linear layer on CPUs, and the custom operator `fptquant::linear` that hides it from torch.compile.

Packed weights are no tensors, so a compiled graph cannot hold them. It holds a *handle* instead, an int64
tensor: of the layer where the operator hides it, of the weights where the kernel is traced. A graph therefore always
meets the weights of the model that is running, and no number of a checkpoint's tensors is baked into a graph.
"""

from __future__ import annotations

import itertools
import weakref

import torch
from torch import Tensor

from fptquant.format import quantize, quantize_per_tensor
from fptquant.format.steps import Arrangement, Offset
from vllm_fptquant.kernels.base import CpuKernel, LinearWeights, run_outputs
from vllm_fptquant.kernels.library import register

# Rows that go through input steps and the quantizer at a time: few enough for the cache, and for temporaries whose
# memory the allocator reuses instead of returning it to the system (fresh pages cost more than the arithmetic).
CHUNK = 128


class PreparedLinear:
    """All that one layer does to its input: its steps, looked up once."""

    def __init__(self, kernel: CpuKernel, weights: LinearWeights, steps: Arrangement, *, exact: bool = False) -> None:
        """Takes the steps' tensors from `weights`; `exact` is for `InputStep.bind`."""
        self.kernel = kernel
        device, tensors = weights.codes.device, weights.online
        self.inputs = tuple(step.bind(tensors[0], device, exact) for step in steps.inputs)
        self.offset: Tensor | None = None
        if steps.outputs == (Offset(),):  # of all that is fused, at once
            self.offset = torch.cat([part["output_offset"] for part in tensors])
        self.outputs = [[step.bind(part, device, exact) for step in steps.outputs] for part in tensors]
        self.rows, self.plain = weights.rows, not steps.outputs
        self.undone = steps.undone
        self.input_scale = weights.input_scale
        self.low, self.high = (bound.item() for bound in weights.bounds)
        # what a graph clamps to, where that hangs on a tensor of the checkpoint
        self.traced_bounds = None if weights.input_zero_point is None else weights.bounds
        scale = None if self.input_scale is None else self.input_scale.item()
        # of the input: layers that have the same make the same codes
        self.quantizer = scale, self.low, self.high, kernel.code_type

    def __call__(self, x: Tensor, bias: Tensor | None, scale: Tensor | None = None) -> Tensor:
        """Computes (..., N) of the type of `x` (..., K), rounded to it once.

        Args:
            x: (..., K).
            bias: (N,) or None.
            scale: S (rows, 1) of RowScale and Undo, or of a norm before a layer that has neither. None where the caller
                sees to S, by the rule of rows (`fptquant.format.steps`), or there is none.
        """
        if x.dim() > 2:
            return self(x.flatten(0, -2), bias, scale).view(*x.shape[:-1], -1)
        if self.plain or self.offset is not None:
            output = self.kernel.matmul(self.codes(x, scale))
            if self.offset is not None:
                output += self.offset
        else:
            online = self._online(x, scale)
            output = run_outputs(self.outputs, self.rows, self.kernel.matmul(self._quantized(online)), online)
        if self.undone and scale is not None:
            output.div_(scale)
        if bias is not None:
            output += bias
        return output.to(x.dtype)

    def codes(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """What the kernel multiplies, for `x` (M, K): (M, K) of its `code_type`."""
        if torch.compiler.is_compiling() or len(x) <= CHUNK:
            return self._quantized(self._online(x, scale))
        codes = torch.empty(x.shape, dtype=self.kernel.code_type)
        for start in range(0, len(x), CHUNK):
            rows = slice(start, start + CHUNK)
            self._quantized(self._online(x[rows], None if scale is None else scale[rows]), codes[rows])
        return codes

    def _online(self, x: Tensor, scale: Tensor | None) -> Tensor:
        if scale is not None:
            x = x * scale  # float32
        for step in self.inputs:
            x = step(x)
        return x

    def _quantized(self, x: Tensor, out: Tensor | None = None) -> Tensor:
        if self.input_scale is None:
            return x.float() if out is None else out.copy_(x)
        code_type = self.kernel.code_type
        if code_type == torch.float32:
            return quantize_per_tensor(x, self.input_scale, self.low, self.high, out)
        if torch.compiler.is_compiling() and self.traced_bounds is not None:
            codes = quantize(x, self.input_scale, *self.traced_bounds)
        else:
            codes = quantize_per_tensor(x, self.input_scale, self.low, self.high)
        if self.kernel.code_offset is not None:
            codes += self.kernel.code_offset
        return codes.to(code_type) if out is None else out.copy_(codes)


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
