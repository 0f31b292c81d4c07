"""CUTLASS's int8 product, as vLLM compiles it for Turing to Hopper: 1 byte per weight."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from vllm_fptquant.kernels.base import GpuKernel, LinearSpec, LinearWeights


class CutlassInt8Kernel(GpuKernel):
    """Int8 times int8 in int32; `q z` of asymmetric 8-bit activations is taken off in int32 as well.

    The sum becomes float32, is multiplied by the channel's and then by the row's scale, and rounds to 16 bits once.
    """

    name = "cutlass-int8"
    operators = ("cutlass_scaled_mm", "cutlass_scaled_mm_azp")
    weight: Tensor
    weight_scale: Tensor
    correction: Tensor

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """Quantized activations, sizes that are multiples of 16."""
        if spec.scheme.activations.bits == 16:
            return "needs quantized activations, these have 16 bits"
        if not 75 <= capability < 100:
            return f"vLLM compiles it for compute capability 7.5 to 9.0, not {capability / 10}"
        if spec.in_features % 16 or spec.out_features % 16:
            return f"needs sizes that are multiples of 16, not {spec.in_features} by {spec.out_features}"
        return None

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Keeps the codes as they are: (N, K), whose transpose is the column-major matrix that CUTLASS reads."""
        super().__init__(weights, dtype)
        self.register_buffer("weight", weights.codes.contiguous(), persistent=False)
        self.register_buffer("weight_scale", weights.weight_scale, persistent=False)
        self.asymmetric = weights.codes_hold_zero_point
        if self.asymmetric:
            correction = weights.codes.sum(1, dtype=torch.int32) * weights.zero_point
            self.register_buffer("correction", correction, persistent=False)

    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Multiplies int8 codes (M, K) by the weight in a CUTLASS operator, scaled and rounded to 16 bits."""
        operands = {
            "a": codes,
            "b": self.weight.t(),
            "scale_a": row_scale,
            "scale_b": self.weight_scale,
            "out_dtype": self.dtype,
        }
        if self.asymmetric:
            product: Tensor = ops.cutlass_scaled_mm_azp(**operands, azp_adj=self.correction)
        else:
            product = ops.cutlass_scaled_mm(**operands)
        return product
