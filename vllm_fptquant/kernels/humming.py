"""Humming: true INT4 x INT4, and int8 activations times 4-bit weights, compiled for each layer on the user's GPU.

vLLM's own use of Humming is not ours: it lets the kernel quantize the input, may exchange the activation type for
another one with dynamic scales, and has the kernel scale channels and split K between thread blocks. The kernel
rounds to 16 bits before it applies a channel's scale and again after, and it adds the parts of a split sum as 16-bit
numbers. So we only let it compute the integer sum and round that to float16, once, and do the scaling ourselves.
"""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any, ClassVar

import torch
from torch import Tensor
from vllm.utils import humming  # imports the package itself at the first use
from vllm.utils.import_utils import has_humming

from fptquant.format import pack_codes
from fptquant.format.arithmetic import accumulator_bound
from vllm_fptquant.kernels.base import GpuKernel, LinearSpec, LinearWeights, codes_refusal
from vllm_fptquant.kernels.library import register

TILE_N, TILE_K = 256, 128  # sizes are padded to multiples of these, as vLLM does
HALF_MAX = 65504
INT32_MAX = 2**31 - 1
# Batch-invariant: one thread block computes the whole sum over K of an output, in int32.
COMPUTE = json.dumps({"gemm_type": "dense", "use_batch_invariant": True, "use_f16_accum": False})


class Humming(GpuKernel):
    """What both kernels share.

    The kernel returns h = float16(sum * 2^-p), with the smallest p for which no sum overflows. The output is
    h * (2^p * s_w[n]) * s[m] in float32, rounded to 16 bits: h has 11 significant bits, so the result is at most one
    unit in the last place away from the one of the exact sum, in float16 and in bfloat16. Sums up to 2048 are exact.
    """

    activation_type: ClassVar[str]
    activation_packing: ClassVar[int]  # codes per byte of the input
    weight: Tensor
    unit: Tensor
    shift: Tensor
    channel_scale: Tensor

    @classmethod
    def shape_refusal(cls, spec: LinearSpec) -> str | None:
        """Sizes the kernel cannot load, sums it cannot hold, a package that is not there."""
        multiple = 16 * cls.activation_packing
        if spec.in_features % multiple or spec.out_features % 8:
            return (
                f"needs input features that are a multiple of {multiple} and output features that are a multiple "
                f"of 8, not {spec.in_features} and {spec.out_features}"
            )
        scheme = spec.scheme
        if accumulator_bound(spec.in_features, scheme.activations.bits, scheme.weights.code_bits) > INT32_MAX:
            return f"sums over {spec.in_features} input features could exceed 32 bits"
        return unavailable()

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Packs the codes into Humming's layout."""
        super().__init__(weights, dtype)
        bits = 4 if weights.scheme.weights.code_bits == 4 else 8
        n, k = weights.codes.shape
        config, tensors = humming.prepare_and_transform_humming_tensors(
            {
                "weight": pack_codes(weights.codes, bits),
                "weight_scale": torch.ones(1, device=weights.codes.device),
            },
            shape_n=n,
            shape_k=k,
            weight_schema=humming.HummingWeightSchema(b_dtype=f"uint{bits}", weight_scale_type="tensor"),
            input_schema=humming.HummingInputSchema(a_dtype=self.activation_type, input_quant_mode="static_tensor"),
            pad_n_to_multiple=TILE_N,
            pad_k_to_multiple=TILE_K,
            has_bias=False,
            torch_dtype=torch.float16,
            device=weights.codes.device,
        )
        self.out_features = n
        self.config: str = config.to_str()  # shapes and types: no value of the checkpoint
        exponent = shift_exponent(k, weights.scheme.activations.bits, weights.scheme.weights.code_bits)
        self.register_buffer("weight", tensors["weight"], persistent=False)
        self.register_buffer("unit", tensors["weight_scale"], persistent=False)
        self.register_buffer("shift", tensors["weight_scale"] * 2.0**-exponent, persistent=False)
        self.register_buffer("channel_scale", weights.weight_scale * 2.0**exponent, persistent=False)

    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Takes Humming's integer sums of codes (M, K) in float16, and scales them in float32 to (M, N)."""
        assert row_scale is not None  # its activations are quantized
        sums = torch.ops.fptquant.humming(
            self.packed(codes), self.weight, self.unit, self.shift, self.config, self.out_features
        )
        output: Tensor = (sums.float() * self.channel_scale * row_scale.unsqueeze(-1)).to(self.dtype)
        return output

    @staticmethod
    def packed(codes: Tensor) -> Tensor:
        """The input as the kernel reads it, from int8 (M, K)."""
        return codes


class HummingInt4Kernel(Humming):
    """INT4 x INT4 on the int4 tensor cores of Ampere and Ada: 4-bit weights, symmetric 4-bit activations."""

    name = "humming-int4"
    activation_type = "int4"
    activation_packing = 2

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """Symmetric 4-bit activations and 4-bit weights, where there are int4 tensor cores."""
        weights, activations = spec.scheme.weights, spec.scheme.activations
        if activations.bits != 4 or weights.code_bits != 4:
            return f"multiplies 4-bit activations by 4-bit weights, not {activations.bits} by {weights.code_bits} bits"
        if not activations.symmetric:
            return "needs symmetric activations: q - z does not fit 4 bits"
        if not 80 <= capability < 90:
            return "needs the int4 tensor cores of compute capability 8.0 to 8.9"
        return cls.shape_refusal(spec)

    @staticmethod
    def packed(codes: Tensor) -> Tensor:
        """Two codes in a byte, the first in the low half: uint8 (M, K / 2)."""
        low, high = codes.view(torch.uint8).view(codes.shape[0], -1, 2).unbind(-1)
        return low & 15 | high << 4


class HummingInt8Kernel(Humming):
    """Int8 activations times 4-bit weights (or wider ones, 1 byte each) on int8 tensor cores.

    4-bit weights are widened while they are loaded. Compilers before CUDA 13.4 have no name for that instruction, and
    Humming patches the machine code; `HUMMING_DISABLE_PATCH_CUBIN=1` makes it widen them in software.
    """

    name = "humming-int8"
    activation_type = "int8"
    activation_packing = 1

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """Activations whose `q - z` fits a byte."""
        too_old = "needs compute capability 7.5" if capability < 75 else None
        return codes_refusal(spec.scheme.activations) or too_old or cls.shape_refusal(spec)


@lru_cache(maxsize=1)
def unavailable() -> str | None:
    """Why Humming cannot be called here, None when it can."""
    if not has_humming():
        return "the package humming-kernels is not installed (vLLM's CUDA build brings it along)"
    if "prepare_and_transform_humming_tensors" not in dir(humming):
        return "needs vLLM 0.32 or newer"
    return None


def shift_exponent(in_features: int, activation_bits: int, weight_bits: int) -> int:
    """Smallest p >= 0 for which every possible sum times 2^-p is a finite float16."""
    bound = accumulator_bound(in_features, activation_bits, weight_bits)
    return max(0, (-(-bound // HALF_MAX) - 1).bit_length())


@lru_cache(maxsize=256)
def layer_config(text: str) -> Any:
    """Humming's `LayerConfig` from its JSON form, in which graphs hold it."""
    return humming.LayerConfig(**json.loads(text))


def _multiply(codes: Tensor, weight: Tensor, unit: Tensor, shift: Tensor, config: str, out_features: int) -> Tensor:
    output: Tensor = humming.humming_forward(
        layer_config(config),
        inputs=codes,
        weight=weight,
        weight_scale=unit,
        input_scale=shift,
        compute_config=COMPUTE,
    )
    return output


def _multiply_fake(
    codes: Tensor, weight: Tensor, unit: Tensor, shift: Tensor, config: str, out_features: int
) -> Tensor:
    return codes.new_empty((codes.shape[0], out_features), dtype=torch.float16)


# One operator of our own, so that a trace does not enter Humming's choice among compiled kernels.
register(
    "humming(Tensor codes, Tensor weight, Tensor unit, Tensor shift, str config, int out_features) -> Tensor",
    _multiply,
    _multiply_fake,
)
