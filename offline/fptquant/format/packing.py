"""Weight codes as int32 words, and scales that 16-bit kernels can hold. The layout is the format's own."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.schemes import WeightScheme

WORD = 32  # bits
LARGEST_MULTIPLIER = 8  # of a group: times 4-bit codes, -64 to 56
_AT_ONCE = 1 << 22  # codes that are 32-bit integers at a time


def packed_words(in_features: int, bits: int) -> int:
    """Number of int32 words in a packed row: 8 codes of 4 bits in each, 4 of 7 or 8 bits."""
    return -(-in_features // (WORD // bits))


def row_bytes(scheme: WeightScheme, in_features: int) -> int:
    """Bytes of an output channel of `in_features` weights in a checkpoint: codes, scale and multipliers."""
    groups = 0 if scheme.group_size is None else in_features // scheme.group_size
    return 4 * packed_words(in_features, scheme.bits) + 4 + groups


def pack_codes(codes: Tensor, bits: int) -> Tensor:
    """Packs integer codes (N, K) in [-2^(bits-1), 2^(bits-1)) to int32 (N, `packed_words`).

    Code j of a word is stored in offset binary, code + 2^(bits-1), at bits [j * bits, (j + 1) * bits), lowest first. No
    code is split between words: 7-bit ones leave a word's upper four bits zero. Rows are padded with zero bits.
    """
    offset, per_word = 1 << (bits - 1), WORD // bits
    columns = codes.shape[1]
    words = packed_words(columns, bits)
    packed = torch.zeros(codes.shape[0], words, dtype=torch.int32, device=codes.device)
    rows = max(1, _AT_ONCE // max(1, columns))
    for part, into in zip(torch.split(codes, rows), torch.split(packed, rows), strict=True):
        unsigned = torch.nn.functional.pad(part.to(torch.int32) + offset, (0, words * per_word - columns))
        for j in range(per_word):
            into |= unsigned[:, j::per_word] << (j * bits)
    return packed


def unpack_codes(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Inverse of `pack_codes`: int8 codes of the given `shape` (N, K)."""
    offset, per_word = 1 << (bits - 1), WORD // bits
    codes = torch.empty(*packed.shape, per_word, dtype=torch.int8, device=packed.device)
    for j in range(per_word):
        codes[..., j] = ((packed >> (j * bits)) & (2 * offset - 1)) - offset
    return codes.flatten(1)[:, : shape[1]].contiguous()


def per_column(multiplier: Tensor, in_features: int) -> Tensor:
    """Multipliers of groups (N, groups) as those of their columns (N, `in_features`), in their type."""
    return multiplier.repeat_interleave(in_features // multiplier.shape[1], 1)


def round_scale(scale: Tensor) -> Tensor:
    """Nearest positive float32 values that bfloat16 and float16 both represent exactly.

    GPU kernels take 16-bit channel scales; rounding the scale before the weights makes that lossless.
    """
    tiny = 2.0**-24  # the smallest float16 subnormal
    return scale.to(torch.bfloat16).to(torch.float16).to(torch.bfloat16).float().clamp_min(tiny)
