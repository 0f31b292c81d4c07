"""Weight codes as compressed-tensors' `pack-quantized` int32 words, and scales that 16-bit kernels can hold."""

from __future__ import annotations

import torch
from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32
from torch import Tensor


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words in a packed row."""
    return -(-in_features // (32 // bits))


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes (N, K) in [-2^(bits-1), 2^(bits-1)) to int32 (N, `packed_words`).

    Offset binary, lowest bits first, rows padded with zeros.
    """
    packed: Tensor = pack_to_int32(codes.to(torch.int8), bits)
    return packed.contiguous()


def unpack_codes(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Inverse of `pack_codes`: int8 codes of the given `shape` (N, K)."""
    codes: Tensor = unpack_from_int32(packed, bits, shape)
    return codes


def round_scale(scale: Tensor) -> Tensor:
    """Nearest positive float32 values that bfloat16 and float16 both represent exactly.

    GPU kernels take 16-bit channel scales; rounding the scale before the weights makes that lossless.
    """
    tiny = 2.0**-24  # the smallest float16 subnormal
    return scale.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).float().clamp_min(tiny)
