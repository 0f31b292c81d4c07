"""T_v: one invertible matrix per KV head, merged into value and output weights."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.options.transforms import ValueOptions
from fptquant.transforms.base import Transform
from fptquant.transforms.head_matrices import bounded, by_head, condition, matrix_pair
from fptquant.transforms.orthogonal import cayley, starting_rotation
from fptquant.wiring import Place, Role, Shape


class ValueTransform(Transform):
    """v' = v T, and the head's columns of o_proj times T^-T (method.md 1.2).

    T = start U diag(lambda) V^T with U, V orthogonal and lambda bounded, so that T can't become singular: its
    condition number stays below `max_condition` whatever the parameters are.
    """

    name = "T_v"

    def __init__(self, shape: Shape, options: ValueOptions, generator: torch.Generator) -> None:
        """Starts every head at the identity or at the same Hadamard matrix with random signs."""
        super().__init__(shape, options, generator)
        square = (shape.layers, shape.kv_heads, shape.head_dim, shape.head_dim)
        self._add("left", square, trained=options.only != "scale")
        self._add("right", square, trained=options.only != "scale")
        self._add("log_scale", square[:-1], trained=options.only != "rotation")
        self.left: Tensor
        self.right: Tensor
        self.log_scale: Tensor
        start = torch.eye(shape.head_dim, dtype=torch.float64)
        if options.start == "hadamard":
            start = starting_rotation(shape.head_dim, generator)
        self.register_buffer("start", start)
        self.start: Tensor

    def matrices(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """T and T^-T of a layer, each (kv_heads, head_dim, head_dim)."""
        log_scale = bounded(self.log_scale[layer].to(dtype), self.options.max_condition)
        left = self.start.to(dtype) @ cayley(self.left[layer].to(dtype))
        return matrix_pair(left, log_scale, cayley(self.right[layer].to(dtype)))

    def metrics(self) -> dict[str, float]:
        """The largest condition number of all heads."""
        return {"condition": condition(bounded(self.log_scale.detach(), self.options.max_condition))}

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Values times T, head by head: W_v' = T^T W_v, b_v' = b_v T."""
        if place.role is not Role.VALUE:
            return values
        return by_head(values, self.matrices(place.layer, values.dtype)[0])

    def inputs(self, place: Place, values: Tensor, *, transposed: bool = False) -> Tensor:
        """W_o' = W_o T^-T per query head."""
        if place.role is not Role.OUTPUT:
            return values
        inverse_transpose = self.matrices(place.layer, values.dtype)[1]
        matrix = inverse_transpose.mT if transposed else inverse_transpose
        return by_head(values, matrix.repeat_interleave(self.shape.heads // self.shape.kv_heads, 0))
