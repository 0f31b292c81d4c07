"""T_h: block Hadamard transforms at the inputs of linear layers other than down_proj, run online."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from fptquant.options.transforms import InputHadamardOptions
from fptquant.transforms.base import Transform
from fptquant.transforms.down_hadamard import block_rotated, block_size, tensor_parallel_sizes
from fptquant.wiring import Place, Role, Shape

_GROUPS = {
    Role.QUERY: "qkv",
    Role.KEY: "qkv",
    Role.VALUE: "qkv",
    Role.OUTPUT: "o",
    Role.GATE: "gate_up",
    Role.UP: "gate_up",
}


class InputHadamard(Transform):
    """x' = x B online with B = blockdiag(H_b / sqrt(b)), W' = W B, where x is what the layers read.

    It spreads outliers over a block as T_r does over all channels, and touches neither the residual nor what writes it:
    it is exact where blocks end in norms, and leaves a tied head what it was. Experts read B x, their router x.
    """

    name = "T_h"

    def __init__(self, shape: Shape, options: InputHadamardOptions, generator: torch.Generator) -> None:
        """Settles the block sizes; FPTQuantError when one does not divide its channels."""
        super().__init__(shape, options, generator)
        self.blocks: dict[str, int] = {}
        for group in options.at:
            channels, what, ranks = shape.hidden, "hidden size", [1]
            if group == "o":
                channels, what = shape.heads * shape.head_dim, "size of all heads"
                ranks = tensor_parallel_sizes(shape, options.max_tensor_parallel)
            self.blocks[group] = block_size(options, channels, ranks, self.name, what)

    def online(self) -> dict[str, Any]:
        """The block size at each group."""
        return {"input_hadamard": self.blocks}

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """Multiplies each block of columns by the (symmetric, orthonormal) Hadamard matrix."""
        block = self.blocks.get(_GROUPS.get(place.role, ""))
        return values if block is None else block_rotated(values, block)
