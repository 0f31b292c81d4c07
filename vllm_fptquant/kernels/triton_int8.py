"""vLLM's int8 product in Triton: 1 byte per weight, any size, the int8 kernel of Blackwell GPUs."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.compressed_tensors.triton_scaled_mm import triton_scaled_mm

from vllm_fptquant.kernels.base import GpuKernel, LinearSpec, LinearWeights, codes_refusal
from vllm_fptquant.kernels.library import register


class TritonInt8Kernel(GpuKernel):
    """Int8 times int8 in int32, to float32, times the row's and then the channel's scale, to 16 bits once."""

    name = "triton-int8"
    weight: Tensor
    weight_scale: Tensor

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """Activations whose `q - z` fits a byte."""
        too_old = "Triton needs compute capability 8.0" if capability < 80 else None
        return codes_refusal(spec.scheme.activations) or too_old

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Keeps the codes as they are, (N, K)."""
        super().__init__(weights, dtype)
        self.register_buffer("weight", weights.codes.contiguous(), persistent=False)
        self.register_buffer("weight_scale", weights.weight_scale, persistent=False)

    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Multiplies int8 codes (M, K) by the weight, scaled and rounded to 16 bits, in vLLM's Triton kernel."""
        output: Tensor = torch.ops.fptquant.triton_int8(codes, self.weight, row_scale, self.weight_scale, self.dtype)
        return output


def _multiply(codes: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    output: Tensor = triton_scaled_mm(
        input=codes, weight=weight.t(), scale_a=row_scale, scale_b=weight_scale, out_dtype=dtype
    )
    return output


def _multiply_fake(
    codes: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype
) -> Tensor:
    return codes.new_empty((codes.shape[0], weight.shape[0]), dtype=dtype)


# An operator of our own: vLLM has one from 0.33 on only, and tracing through the kernel's launch depends on versions.
register(
    "triton_int8(Tensor codes, Tensor weight, Tensor row_scale, Tensor weight_scale, ScalarType dtype) -> Tensor",
    _multiply,
    _multiply_fake,
)
