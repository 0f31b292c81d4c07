"""T_d: a block Hadamard transform at the input of down_proj, run online."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.format import hadamard_factors
from fptquant.options.transforms import HadamardOptions
from fptquant.transforms.base import Transform
from fptquant.wiring import Place, Role, Shape

PACKED = 8  # 4-bit weights in a packed word, which is never split


class DownHadamard(Transform):
    """h' = h blockdiag(H_b / sqrt(b)) online, W_down' = W_down blockdiag(H_b / sqrt(b)) (method.md 1.4)."""

    name = "T_d"

    def __init__(self, shape: Shape, options: HadamardOptions, generator: torch.Generator) -> None:
        """Settles the block size; FPTQuantError when it does not divide the intermediate size."""
        super().__init__(shape, options, generator)
        sizes = tensor_parallel_sizes(shape, options.max_tensor_parallel)
        self.block = min(block_size(options, width, sizes, "T_d", "intermediate size") for width in shape.widths)

    def online(self) -> dict[str, Any]:
        """The block size at down_proj."""
        return {"down_hadamard": {"block": self.block}}

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Multiplies each block of columns of down_proj by the (symmetric, orthonormal) Hadamard matrix."""
        return block_rotated(values, self.block) if place.role is Role.DOWN else values


def block_rotated(values: Tensor, block: int) -> Tensor:
    """`values` (..., K) times blockdiag(H_block / sqrt(block)), in their type."""
    left, right = (factor.to(values.device) for factor in hadamard_factors(block, values.dtype))
    blocks = values.reshape(-1, len(left), len(right))
    return (left @ (blocks @ right)).view(values.shape)


def block_size(options: HadamardOptions, channels: int, ranks: Iterable[int], name: str, what: str) -> int:
    """The block that the options ask for.

    Args:
        options: of the transform.
        channels: number of them, `what` by name.
        ranks: the numbers of parts that the channels may be split into.
        name: of the transform.
        what: see `channels`.

    Raises:
        FPTQuantError: a chosen block does not divide the channels.
    """
    if options.block == "auto":
        return min(power_of_two_in(channels // size) for size in ranks)
    if channels % options.block:
        raise FPTQuantError(
            f"{name}: block {options.block} does not divide the {what} {channels}; "
            f"use a power of two up to {power_of_two_in(channels)}, or 'auto'"
        )
    return options.block


def tensor_parallel_sizes(shape: Shape, largest: int) -> list[int]:
    """Sizes up to `largest` that vLLM can serve a model at, whatever the block of T_d; 1 is always among them.

    Each rank gets whole attention heads, whole KV heads or one that it shares with other ranks, and, at the inputs of
    o_proj and down_proj, whole packed words.
    """

    def fits(size: int) -> bool:
        kv_heads = shape.kv_heads % size == 0 or size % shape.kv_heads == 0
        columns = (shape.heads * shape.head_dim, *shape.widths)
        return shape.heads % size == 0 and kv_heads and all(count % (size * PACKED) == 0 for count in columns)

    return [1, *filter(fits, range(2, largest + 1))]


def power_of_two_in(size: int) -> int:
    """The largest power of two that divides `size`."""
    return size & -size
