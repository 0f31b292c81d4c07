"""T_k: scale and rotate every RoPE pair of keys and queries before RoPE."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from fptquant.options.transforms import QueryKeyOptions
from fptquant.transforms.base import Transform
from fptquant.transforms.head_matrices import bounded, condition, matrix_pair
from fptquant.transforms.orthogonal import cayley
from fptquant.wiring import Architecture, Place, Role, Shape

_ROLES = (Role.QUERY, Role.KEY)
_SMALLEST = 1e-4  # a pair of keys, relative to the largest
_MAX_CONDITION = 100.0  # of a matrix in a layer without RoPE


class KeyScale(Transform):
    """What forms of T_k have in common: one scale per RoPE pair of keys.

    A static range is as wide as the largest pair, and the error of a key's pair counts as its query's counterpart is
    large. Of all scales that keep a range, those that make all pairs equally large leave the smallest error; biases of
    keys, as Qwen2's, make them differ by orders of magnitude. Rows of weights have scales of their own, so the weights
    don't care.
    """

    options: QueryKeyOptions
    log_scale: Tensor  # (layers, ..., pairs)

    @property
    def start_is_measured(self) -> bool:
        """Whether scales start from keys on the calibration text, which is so with `start: keys`."""
        return self.options.start == "keys"

    def seen_in_weights(self) -> dict[str, nn.Parameter]:
        """All but a measured scale."""
        found = super().seen_in_weights()
        return {name: p for name, p in found.items() if name != "log_scale" or not self.start_is_measured}

    def pair_norms(self, keys: Tensor) -> Tensor:
        """Lengths (..., pairs) of the RoPE pairs of keys (..., head_dim), before RoPE or behind it."""
        sizes, pair = ((-1, 2), -1) if self.shape.interleaved else ((2, -1), -2)
        rotated = keys[..., : self.shape.head_dim - self.shape.unrotated_dims]
        lengths: Tensor = torch.linalg.vector_norm(rotated.unflatten(-1, sizes), dim=pair)  # type: ignore[no-untyped-call]
        return lengths

    @torch.no_grad()
    def start(self, layer: int, largest: Tensor) -> None:
        """Sets s = 1 / largest, their geometric mean over the layer kept at 1.

        Args:
            layer: index.
            largest: (kv_heads, pairs) length of each pair on some text.
        """
        logs = largest.clamp_min(_SMALLEST * float(largest.amax())).log()
        if self.log_scale.dim() == 2:  # all heads share a norm's gain
            logs = logs.amax(0)
        self.log_scale[layer] = logs.mean() - logs


class QueryKeyTransform(KeyScale):
    """Keys k' = k A, queries q' = q A^-T with A_j = s_j Rot(phi_j) per KV head and RoPE pair j.

    2x2 scaled rotations are what commutes with RoPE (FPTQuant section 3.1; method.md 1.1). The query gets the same
    angle and the inverse scale. The pair is (j, j + head_dim / 2), the rotated-halves layout of Hugging Face, or in
    some families (2j, 2j + 1); dimensions behind those that RoPE turns stay as they are.
    """

    name = "T_k"

    def __init__(self, shape: Shape, options: QueryKeyOptions, generator: torch.Generator) -> None:
        """Starts at the identity."""
        super().__init__(shape, options, generator)
        pairs = (shape.layers, shape.kv_heads, (shape.head_dim - shape.unrotated_dims) // 2)
        self._add("angle", pairs, trained=options.only != "scale")
        self._add("log_scale", pairs)  # s = exp(.) > 0
        self.angle: Tensor
        self.log_scale: Tensor

    @classmethod
    def obstacle(cls, architecture: Architecture) -> str | None:
        """Where only one of the two is normed, the other has no gain to take the inverse."""
        if (architecture.query_norm is None) == (architecture.key_norm is None):
            return None
        return "of queries and keys, one is normed before RoPE and the other isn't"

    @classmethod
    def form(cls, shape: Shape) -> type[Transform]:
        """In the norms' gains where there are norms; any matrix where there is no RoPE."""
        if shape.head_norms:
            return NormedQueryKeyTransform
        return PartlyRotatedQueryKeyTransform if shape.unrotated or shape.unrotated_dims else cls

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Rotates and scales queries and keys."""
        if place.role not in _ROLES:
            return values
        angle, log_scale = self.angle[place.layer].to(values.dtype), self.log_scale[place.layer].to(values.dtype)
        if place.role is Role.QUERY:
            log_scale = -log_scale
            groups = self.shape.heads // self.shape.kv_heads
            angle, log_scale = (t.repeat_interleave(groups, 0) for t in (angle, log_scale))
        scale = log_scale.exp()
        cos, sin = scale * angle.cos(), scale * angle.sin()  # (heads, pairs)
        pair = -1 if self.shape.interleaved else -2  # the dimension in which the two are
        sizes = (cos.shape[1], 2) if self.shape.interleaved else (2, cos.shape[1])
        heads = values.view(*values.shape[:-1], cos.shape[0], -1)
        rotated, rest = heads[..., : 2 * cos.shape[1]], heads[..., 2 * cos.shape[1] :]
        first, second = rotated.reshape(*rotated.shape[:-1], *sizes).unbind(pair)
        rotated = torch.stack((cos * first - sin * second, cos * second + sin * first), pair).flatten(-2)
        return (torch.cat((rotated, self._outside(place, rest)), -1) if rest.shape[-1] else rotated).flatten(-2)

    def _outside(self, place: Place, values: Tensor) -> Tensor:
        """What becomes of dimensions of heads (..., heads, dims) that RoPE leaves as they are."""
        return values


class PartlyRotatedQueryKeyTransform(QueryKeyTransform):
    """T_k with any invertible matrix per KV head where there is no RoPE: k' = k A, q' = q A^-T.

    That is in whole layers, or in the last dimensions of each head. Nothing stands between the weights and the scores
    there that A would have to commute with. A = U diag(lambda) V^T with U, V orthogonal; its condition number stays
    below `_MAX_CONDITION`.
    """

    name = "T_k"
    restriction = "scaled rotations of RoPE pairs; any matrix per KV head where there is no RoPE"

    def __init__(self, shape: Shape, options: QueryKeyOptions, generator: torch.Generator) -> None:
        """Starts at the identity."""
        super().__init__(shape, options, generator)
        assert not (shape.unrotated and shape.unrotated_dims), "matrices of two sizes"
        self.layers = shape.unrotated or tuple(range(shape.layers))
        size = shape.unrotated_dims or shape.head_dim
        square = (len(self.layers), shape.kv_heads, size, size)
        self._add("left", square, trained=options.only != "scale")
        self._add("right", square, trained=options.only != "scale")
        self._add("log_lambda", square[:-1])
        self.left: Tensor
        self.right: Tensor
        self.log_lambda: Tensor

    def outputs(self, place: Place, values: Tensor) -> Tensor:
        """Multiplies queries and keys by the matrices where there is no RoPE."""
        if place.role not in _ROLES or place.layer not in self.shape.unrotated:
            return super().outputs(place, values)
        heads = values.view(*values.shape[:-1], -1, self.shape.head_dim)
        return self._outside(place, heads).flatten(-2)

    def _outside(self, place: Place, values: Tensor) -> Tensor:
        index, dtype = self.layers.index(place.layer), values.dtype
        left, right = cayley(self.left[index].to(dtype)), cayley(self.right[index].to(dtype))
        log_lambda = bounded(self.log_lambda[index].to(dtype), _MAX_CONDITION)
        matrix, inverse_transpose = matrix_pair(left, log_lambda, right)
        if place.role is Role.QUERY:
            matrix = inverse_transpose.repeat_interleave(self.shape.heads // self.shape.kv_heads, 0)
        return torch.einsum("...hd,hde->...he", values, matrix)

    def metrics(self) -> dict[str, float]:
        """The largest condition number of all matrices."""
        return {"condition": condition(bounded(self.log_lambda.detach(), _MAX_CONDITION))}


class NormedQueryKeyTransform(KeyScale):
    """T_k where queries and keys are normed before RoPE: g_k' = g_k s and g_q' = g_q / s with one s > 0 per RoPE pair.

    A norm divides scales of what it reads out again, and its gains differ within a pair, so that rotations don't pass:
    what is left of T_k is in the gains, which all heads share.
    """

    name = "T_k"
    restriction = "one scale per RoPE pair, in the gains of the query and key norms"

    def __init__(self, shape: Shape, options: QueryKeyOptions, generator: torch.Generator) -> None:
        """Starts at the identity."""
        super().__init__(shape, options, generator)
        self._add("log_scale", (shape.layers, shape.head_dim // 2))  # s = exp(.)
        self.log_scale: Tensor

    def seen_in_weights(self) -> dict[str, nn.Parameter]:
        """None: the scales are in gains."""
        return {}

    def head_gain(self, place: Place, dtype: torch.dtype) -> Tensor | None:
        """The scale for keys, its inverse for queries."""
        if place.role not in _ROLES:
            return None
        log_scale = self.log_scale[place.layer].to(dtype)
        scale = (log_scale if place.role is Role.KEY else -log_scale).exp()
        return scale.repeat_interleave(2) if self.shape.interleaved else scale.repeat(2)
