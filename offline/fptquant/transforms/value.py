"""T_v: one invertible matrix per KV head, merged into value and output weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptquant.options.transforms import ValueOptions
from fptquant.transforms.base import Transform
from fptquant.transforms.head_matrices import bounded, by_head, condition, matrix_pair, symmetric_power
from fptquant.transforms.orthogonal import cayley, starting_rotation
from fptquant.wiring import Place, Role, Shape


class ValueTransform(Transform):
    """v' = v T, and the head's columns of o_proj times T^-T (method.md 1.2).

    T = A start U diag(lambda) V^T with U, V orthogonal and lambda bounded, so that T can't become singular: the
    condition numbers of diag(lambda) and of A stay below `max_condition` whatever the parameters are.

    A is the identity unless it is measured (`start: values`).
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
        if options.start != "identity":
            start = starting_rotation(shape.head_dim, generator)
        self.register_buffer("start", start)
        self.start: Tensor
        if self.start_is_measured:
            self.register_buffer("balance", torch.eye(shape.head_dim).expand(square).clone())
        self.balance: Tensor

    @property
    def start_is_measured(self) -> bool:
        """Whether A is taken from activations, which is so with `start: values`."""
        return bool(self.options.start == "values")

    def seen_in_weights(self) -> dict[str, nn.Parameter]:
        """All, but lambda behind a measured A: weights alone don't know what inputs lose."""
        found = super().seen_in_weights()
        return {name: p for name, p in found.items() if name != "log_scale" or not self.start_is_measured}

    @torch.no_grad()
    def start_from(self, layer: int, inputs: Tensor, weight: Tensor) -> None:
        """Sets A of a layer.

        Errors of inputs x and weights W grow as what their ranges have to hold, and count as the other is large: all
        in all as E|T^T x|^2 |W T^-T|^2. With a Hadamard matrix behind it the smallest is at A^2 = C^-1 # W^T W, the
        geometric mean (CAT, arXiv 2603.04359).

        Args:
            layer: index.
            inputs: C, (kv_heads, head_dim, head_dim), the covariance of what o_proj reads of each KV head.
            weight: of o_proj, (N, heads * head_dim).
        """
        heads = weight.double().view(len(weight), self.shape.kv_heads, -1, self.shape.head_dim)
        gram = torch.einsum("nkgd,nkge->kde", heads, heads)
        root = symmetric_power(inputs.double(), 0.5)
        inverse = symmetric_power(inputs.double(), -0.5)
        mean = inverse @ symmetric_power(root @ gram @ root, 0.5) @ inverse
        values, vectors = torch.linalg.eigh(mean)
        logs = values.clamp_min(torch.finfo(values.dtype).tiny).log() / 2
        found = bounded(logs - logs.mean(), self.options.max_condition).exp()
        self.balance[layer] = (vectors * found[:, None]) @ vectors.mT

    def matrices(self, layer: int, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """T and T^-T of a layer, each (kv_heads, head_dim, head_dim)."""
        log_scale = bounded(self.log_scale[layer].to(dtype), self.options.max_condition)
        left = self.start.to(dtype) @ cayley(self.left[layer].to(dtype))
        matrix, inverse_transpose = matrix_pair(left, log_scale, cayley(self.right[layer].to(dtype)))
        if not self.start_is_measured:
            return matrix, inverse_transpose
        balance = self.balance[layer].to(dtype)  # symmetric
        return balance @ matrix, torch.linalg.solve(balance, inverse_transpose)

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
