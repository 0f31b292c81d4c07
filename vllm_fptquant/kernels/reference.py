"""The checkpoint's own arithmetic in plain torch: exact, 4 bytes per weight, for every scheme."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.format import quantized_linear
from fptquant.format.arithmetic import EXACT_FLOAT32, accumulator_bound
from vllm_fptquant.kernels.base import CpuKernel, LinearSpec, LinearWeights


class ReferenceKernel(CpuKernel):
    """Integer codes held in floating point; also the weight-only layers (16-bit activations)."""

    name = "reference"

    @classmethod
    def can_implement(cls, spec: LinearSpec) -> str | None:
        """Refuses other devices than CPUs; there it computes every layer."""
        if spec.device != "cpu":
            return f"runs on CPUs, not on '{spec.device}'"
        return None

    def __init__(self, weights: LinearWeights) -> None:
        """Converts the codes to float32, or to float64 where the integer sum could exceed 2^24."""
        scheme = weights.scheme
        self.output_scale = weights.output_scale
        dtype = torch.float32
        if scheme.activations.bits < 16:
            bound = accumulator_bound(weights.codes.shape[1], scheme.activations.bits, scheme.weights.code_bits)
            if bound > EXACT_FLOAT32:
                dtype = torch.float64
        self.codes = weights.codes.to(dtype)

    def matmul(self, codes: Tensor) -> Tensor:
        """Multiplies codes (M, K) by the format's own arithmetic; float32 (M, N)."""
        return quantized_linear(codes.to(self.codes.dtype), self.codes, self.output_scale)
