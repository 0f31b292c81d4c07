"""FBGEMM's int8 GEMM, as it ships inside torch's x86 builds: 1 byte per weight."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from vllm_fptquant.kernels.base import CpuKernel, LinearSpec, LinearWeights

ENGINE = "fbgemm"
OFFSET = 128  # FBGEMM's activations are unsigned bytes
INT16_MAX = 32767
# `_op`: without torch's search of the arguments for fake script objects, 3 us a call.
MULTIPLY = torch.ops.quantized.linear_with_input_q_dq_qweight_dq_output_fp32.default._op


class FbgemmKernel(CpuKernel):
    """Feeds integer codes to torch's quantize-multiply-dequantize operator with an input scale of one.

    The operator then only converts code `c` to the byte `c + zero_point`, multiplies in int32, converts the
    sum to float32 and applies one scale per output channel: bit for bit `checkpoint.quantized_linear`. It is
    not left to round itself, because it adds the zero point before it rounds, and multiplies by 1 / scale.
    """

    name = "fbgemm"

    @classmethod
    def can_implement(cls, spec: LinearSpec) -> str | None:
        """Static 4 or 8-bit activations with codes of up to 7 bits, on x86 CPUs."""
        if spec.device != "cpu":
            return f"runs on CPUs, not on '{spec.device}'"
        if ENGINE not in torch.backends.quantized.supported_engines:
            return "torch was built without FBGEMM (it needs an x86 CPU with AVX2)"
        activation_bits, weight_bits = spec.scheme.activations.bits, spec.scheme.weights.code_bits
        if activation_bits == 16:
            return "needs quantized activations, these have 16 bits"
        # Before AVX512-VNNI, vpmaddubsw adds two byte products in saturating int16.
        if 2 * 255 * 2 ** (weight_bits - 1) > INT16_MAX:
            return f"{weight_bits}-bit weights can saturate its 16-bit intermediate sums"
        return None

    def __init__(self, weights: LinearWeights) -> None:
        """Packs the codes with the output scale as a per-channel quantized tensor."""
        # c = q - z, and q is in [-128, 127]: the byte of c is c + 128 + z.
        self.zero_point = OFFSET + int(weights.zero_point)
        output_scale = weights.output_scale
        with fbgemm_engine(), warnings.catch_warnings():
            # torch plans to remove quantized tensors; this operator has no other way in, and torch is pinned.
            warnings.simplefilter("ignore")
            weight = torch._make_per_channel_quantized_tensor(
                weights.codes, output_scale.double(), torch.zeros_like(output_scale, dtype=torch.int64), 0
            )
            self.packed = torch.ops.quantized.linear_prepack(weight, None)

    def matmul(self, codes: Tensor) -> Tensor:
        """Multiplies codes (M, K) in FBGEMM: exact integer sums, scaled to float32 (M, N)."""
        output: Tensor = MULTIPLY(codes, 1.0, self.zero_point, self.packed)
        return output


@contextmanager
def fbgemm_engine() -> Iterator[None]:
    """Packs for FBGEMM, whatever engine the process has chosen."""
    before = torch.backends.quantized.engine
    torch.backends.quantized.engine = ENGINE
    try:
        yield
    finally:
        torch.backends.quantized.engine = before
