"""Marlin: 4-bit weights on integer tensor cores (int8 activations), and weight-only layers."""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm import _custom_ops as ops
from vllm.model_executor.layers.quantization.utils.marlin_utils import marlin_padded_nk, marlin_permute_scales
from vllm.scalar_type import scalar_types

from fptquant.format import pack_codes
from vllm_fptquant.checks import require_exact
from vllm_fptquant.kernels.base import GpuKernel, LinearSpec, LinearWeights, codes_refusal


class Marlin(GpuKernel):
    """What both kernels share: the weights' layout and the call.

    vLLM's own linear method for int8 activations isn't used: it quantizes each token by its own range, and fails
    on scales per channel (it multiplies by a missing `input_global_scale`).
    """

    operators: ClassVar[tuple[str, ...]] = ("marlin_gemm", "gptq_marlin_repack")
    int8: ClassVar[bool]
    weight: Tensor
    weight_scale: Tensor

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Pads to Marlin's tiles with codes of zero and scales of zero, then packs."""
        super().__init__(weights, dtype)
        n, k = weights.codes.shape
        bits = 4 if weights.scheme.weights.code_bits == 4 else 8
        self.weight_type = scalar_types.uint4b8 if bits == 4 else scalar_types.uint8b128
        self.out_features = n
        self.padded_n, self.padded_k = marlin_padded_nk(size_n=n, size_k=k)
        codes = pad(weights.codes, (0, self.padded_k - k, 0, self.padded_n - n))
        scale = pad(require_exact(f"{weights.name}.weight_scale", weights.weight_scale, dtype), (0, self.padded_n - n))
        words = pack_codes(codes, bits).t().contiguous()  # GPTQ's layout: (K / codes in a word, N)
        size = {"size_k": self.padded_k, "size_n": self.padded_n}
        weight = ops.gptq_marlin_repack(b_q_weight=words, num_bits=bits, is_a_8bit=self.int8, **size)
        self.register_buffer("weight", weight, persistent=False)
        permuted = marlin_permute_scales(s=scale[None], group_size=-1, is_a_8bit=self.int8, **size)
        self.register_buffer("weight_scale", permuted, persistent=False)

    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Multiplies codes or 16-bit inputs (M, K) by the packed weight in vLLM's Marlin operator; (M, N)."""
        output = multiply(
            pad_inputs(codes, self.padded_k), row_scale, self.weight, self.weight_scale, self.weight_type.id
        )
        return output if self.padded_n == self.out_features else output[:, : self.out_features].contiguous()


class MarlinInt8Kernel(Marlin):
    """4-bit weights times int8 activations in int32, one float32 scale per row, one 16-bit scale per channel.

    Each thread block converts its part of the sum over K to float32, multiplies it by both scales and adds the
    parts in float32, which are rounded to 16 bits once. With scales of groups, which are int16 numbers in the sum, it
    has none for the channel: that would come behind the rounding.
    """

    name = "marlin-int8"
    int8 = True

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """4-bit weights; activations whose `q - z` fits a byte."""
        weights, activations = spec.scheme.weights, spec.scheme.activations
        if activations.bits < 16 and weights.group_size is not None:
            return "multiplies int8 activations by 4-bit weights with a scale for each channel, not for groups as well"
        if activations.bits < 16 and weights.bits != 4:
            return f"multiplies int8 activations by 4-bit weights only, these have {weights.bits} bits"
        return codes_refusal(activations) or turing_refusal(spec, capability)


class MarlinKernel(Marlin):
    """Weight-only layers: weights become 16-bit numbers in registers, sums are float32. Not integer arithmetic.

    4-bit weights are scaled after the sum was rounded to 16 bits, and then round once more.
    """

    name = "marlin"
    int8 = False

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """Activations that are not quantized."""
        if spec.scheme.activations.bits != 16:
            return "computes in floating point: only for activations that are not quantized"
        return turing_refusal(spec, capability)


def pad_inputs(codes: Tensor, padded_k: int) -> Tensor:
    """Codes or 16-bit inputs (M, K), with zeros up to the K of the packed weight: (M, padded_k)."""
    return codes if padded_k == codes.shape[-1] else pad(codes, (0, padded_k - codes.shape[-1]))


def multiply(codes: Tensor, row_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, type_id: int) -> Tensor:
    """Multiplies in vLLM's Marlin operator.

    Args:
        codes: int8 or 16-bit (M, padded_k).
        row_scale: float32 (M,), None for 16-bit inputs.
        weight: repacked, int32.
        weight_scale: permuted, 16-bit (1, padded_n).
        type_id: vLLM's number of the weights' type.

    Returns:
        (M, padded_n) of the type of `weight_scale`.
    """
    output: Tensor = torch.ops.vllm.marlin_gemm(
        a=codes,
        b_q_weight=weight,
        b_bias=None,
        b_scales=weight_scale,
        a_scales=row_scale,
        global_scale=None,
        b_zeros=None,
        workspace=None,  # vLLM's own
        b_q_type_id=type_id,
        size_m=codes.shape[0],
        size_n=weight_scale.shape[1],
        size_k=codes.shape[1],
        use_atomic_add=False,
        use_fp32_reduce=True,
        is_zp_float=False,
    )
    return output


def turing_refusal(spec: LinearSpec, capability: int) -> str | None:
    """Says why a GPU is too old, or needs float16, since Turing has no bfloat16; None where it can."""
    if capability < 75:
        return "needs compute capability 7.5"
    if capability < 80 and spec.dtype != torch.float16:
        return "needs --dtype float16 on GPUs of compute capability 7.5"
    return None
