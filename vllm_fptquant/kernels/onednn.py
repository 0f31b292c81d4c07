"""oneDNN's int8 product, as it ships inside vLLM for CPUs: 1 byte per weight, AMX where there is."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm import _custom_ops as ops

from fptquant.format.arithmetic import EXACT_FLOAT32
from vllm_fptquant.kernels.base import CpuKernel, LinearSpec, LinearWeights, holds_zero_point, is_there

ONE = torch.ones((), dtype=torch.float32)  # scale of integer codes


class OnednnKernel(CpuKernel):
    """Feeds integer codes to vLLM's static W8A8 product with an input scale of one.

    The operator multiplies in int32, converts the sum to float32 and applies one scale per output channel: bit for bit
    `fptquant.format.quantized_linear`. Where `q - z` needs more than a byte, codes are `q`, the operator's scales are
    one, and z is taken off the integer sum, which float32 holds.
    """

    name = "onednn"
    code_type = torch.int8
    traced = True

    @classmethod
    def can_implement(cls, spec: LinearSpec) -> str | None:
        """Static 4 or 8-bit activations, on x86 CPUs with AVX512-VNNI."""
        if spec.device != "cpu":
            return f"runs on CPUs, not on '{spec.device}'"
        if not is_there("create_onednn_scaled_mm_handler"):
            return "vLLM was built without oneDNN's products"
        if not torch.cpu._is_vnni_supported():  # oneDNN would halve the weights there, or add products in 16 bits
            return "is exact on CPUs with AVX512-VNNI"
        if spec.scheme.activations.bits == 16:
            return "needs quantized activations, these have 16 bits"
        largest = spec.in_features << 7 + spec.scheme.weights.code_bits - 1  # of the sum over q, and of what z gives
        if holds_zero_point(spec.scheme.activations) and largest > EXACT_FLOAT32:
            return f"sums of {spec.in_features} features with a zero point of 8 bits can exceed the integers of float32"
        return None

    def __init__(self, weights: LinearWeights) -> None:
        """Packs the codes with the output scale, or with ones where the zero point comes off behind the product."""
        self.rest: tuple[Tensor, Tensor] | None = None  # what z gives (N,), and the output scale
        scale = weights.output_scale
        if weights.codes_hold_zero_point:
            self.code_offset = weights.zero_point.float()
            self.rest = self.code_offset * weights.codes.sum(-1, dtype=torch.float32), scale
            scale = torch.ones_like(scale)
        self.scale = scale  # the handler points to it
        self.out_features = len(scale)
        self.handler = ops.create_onednn_scaled_mm(weights.codes.t(), scale, torch.float32, False, False)

    def matmul(self, codes: Tensor) -> Tensor:
        """Multiplies codes int8 (M, K): exact integer sums, scaled to float32 (M, N)."""
        output = torch.empty(codes.shape[0], self.out_features, dtype=torch.float32)
        torch.ops._C.onednn_scaled_mm.default(output, codes, ONE, None, None, None, self.handler.handler_tensor)
        if self.rest is not None:
            shift, scale = self.rest
            output.sub_(shift).mul_(scale)
        return output
