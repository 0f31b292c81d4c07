"""The quantizer and the quantized linear layer, bit for bit as every backend computes them.

    q  = clamp(round_half_to_even(x / s) + z, -2^(b-1), 2^(b-1) - 1)
    x^ = s * (q - z)
    y[n] = (sum_k (q[k] - z) * w[n, k]) * (s * s_w[n]) (+ bias[n])

Everything is float32; the integer sum is exact on every backend, so equal codes give equal outputs.
"""

from __future__ import annotations

import math
from functools import lru_cache

import torch
from torch import Tensor

EXACT_FLOAT32 = 2**24  # every integer up to here is a float32


def code_bounds(zero_point: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """Smallest and largest value of `q - z`, as float32 tensors of the shape of `zero_point`."""
    z = zero_point.float()
    return -(2.0 ** (bits - 1)) - z, 2.0 ** (bits - 1) - 1 - z


def quantize(x: Tensor, scale: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """Integer codes `q - z` of `x`, held in float32.

    Args:
        x: any shape and floating-point dtype.
        scale: float32, broadcastable to `x`.
        low: smallest `q - z`, from `code_bounds`.
        high: largest `q - z`.

    Clamping `round(x / s)` to [qmin - z, qmax - z] equals clamping `round(x / s) + z` to [qmin, qmax], then
    taking z off again: all are integers that float32 holds exactly.
    """
    return torch.div(x.float(), scale).round_().clamp_(low, high)


def quantize_per_tensor(x: Tensor, scale: Tensor, low: float, high: float, out: Tensor | None = None) -> Tensor:
    """`quantize` for one scale and one zero point, in fewer passes over memory; the same codes bit for bit.

    Args:
        x: any shape and floating-point dtype.
        scale: float32 ().
        low: smallest `q - z`.
        high: largest `q - z`.
        out: float32 of the shape of `x`, to write into.
    """
    return torch.div(x.float(), scale, out=out).round_().clamp_(low, high)


def quantized_linear(codes: Tensor, weight_codes: Tensor, output_scale: Tensor) -> Tensor:
    """Exact integer product, then one float32 scale per output channel.

    Args:
        codes: integer values (..., K) in float32, as `quantize` returns them; or in float64.
        weight_codes: integer values (N, K) in the type of `codes`.
        output_scale: (N,) float32, input scale times weight scale.

    Returns:
        (..., N) float32. In float32, exact while every partial sum is below 2^24, see `accumulator_bound`; in
        float64 always exact, up to the one rounding to float32.
    """
    return torch.nn.functional.linear(codes, weight_codes).float() * output_scale


def accumulator_bound(in_features: int, activation_bits: int, weight_bits: int) -> int:
    """Largest magnitude the integer sum can take (asymmetric codes reach 2^b - 1)."""
    return in_features * ((1 << activation_bits) - 1) * (1 << (weight_bits - 1))


def residual_scale(residual: Tensor, eps: float | Tensor) -> Tensor:
    """S_n of method.md 1.6 in its local form: 1 / RMS of the norm's input, float32 (..., 1).

    FPTQuant (arXiv 2506.04985) section 3.1.3. Serving calls it twice per layer and token: three operators, and
    nothing of the size of `residual` in memory.

    Args:
        residual: (..., hidden).
        eps: of the norm; a float32 tensor () saves the time to make one.
    """
    if not isinstance(eps, Tensor):
        eps = torch.tensor(eps, device=residual.device)
    norm = torch.linalg.vector_norm(residual.float(), dim=-1, keepdim=True)
    return torch.rsqrt(torch.addcmul(eps, norm, norm, value=1 / residual.shape[-1]))


def position_scale(positions: Tensor, beta: float, original: int) -> Tensor:
    """Factor of queries at `positions`, float32 of their shape: 1 + beta log(1 + floor(position / original length))."""
    return 1 + beta * torch.log(1 + torch.floor(positions / original))


@lru_cache(maxsize=16)
def hadamard_factors(block: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    """Sylvester Hadamard matrix of size `block` as a Kronecker product H_a (x) H_b / sqrt(block).

    Returns:
        (a, a) with entries +-1 and (b, b) with entries +-1 / sqrt(block), a * b = block, a <= b.
    """
    exponent = block.bit_length() - 1
    if block < 1 or 2**exponent != block:
        raise ValueError(f"Hadamard block must be a power of two, got {block}")
    left, right = _sylvester(exponent // 2), _sylvester(exponent - exponent // 2)
    return left.to(dtype), (right / math.sqrt(block)).to(dtype)


def _sylvester(exponent: int) -> Tensor:
    """Hadamard matrix of size 2^exponent, entries +-1 in float64: H_2n = [[H_n, H_n], [H_n, -H_n]]."""
    matrix = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(exponent):
        matrix = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64), matrix)
    return matrix


def block_hadamard(x: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """Multiplies each consecutive block of the last dimension by the orthonormal Hadamard matrix (T_d).

    Args:
        x: (..., m) with m a multiple of the block size.
        left: (a, a) from `hadamard_factors`; the product is computed in its dtype.
        right: (b, b) from `hadamard_factors`.

    Returns:
        (..., m) float32; two small products, O(m (a + b)), where the dense one would be O(m a b).
    """
    a, b = left.shape[0], right.shape[0]
    y = torch.mm(x.to(right.dtype).reshape(-1, b), right).view(-1, a, b)  # (blocks, a, b)
    return torch.bmm(left.expand(y.shape[0], a, a), y).view(x.shape).float()


def softcap(values: Tensor, cap: float) -> Tensor:
    """`values` bounded by `cap`, smoothly: cap tanh(values / cap)."""
    return torch.tanh(values / cap) * cap


def attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Causal attention by its definition, in the type of the arguments, which are those of `exact_attention`."""
    groups, (length, total) = query.shape[0] // key.shape[0], (query.shape[1], key.shape[1])
    keys, values = (states.repeat_interleave(groups, 0) for states in (key, value))
    scores = torch.matmul(query * scaling, keys.mT)  # (heads, T, S)
    if cap is not None:
        scores = softcap(scores, cap)
    if mask is None:
        mask = torch.ones(length, total, dtype=torch.bool, device=scores.device).tril(total - length)
    weights = scores.masked_fill(~mask, -torch.inf).softmax(-1).masked_fill(~mask, 0)
    return torch.matmul(weights, values).transpose(0, 1)


def exact_attention(
    query: Tensor, key: Tensor, value: Tensor, scaling: float, mask: Tensor | None = None, cap: float | None = None
) -> Tensor:
    """Causal attention in float64, rounded once to float32: the same bits in whatever order it is computed.

    Quantizers turn a difference in the last bit into a whole code now and then, so two float32 kernels drift apart
    by as much as quantization itself perturbs. Where served and simulated models are to be compared bit for bit,
    both use this.

    Args:
        query: (heads, T, head_dim), the last T of S positions.
        key: (kv_heads, S, head_dim).
        value: (kv_heads, S, head_dim).
        scaling: of the scores.
        mask: bool (T, S), the positions that each of the T attends to, in place of those up to its own.
        cap: of the scores, see `softcap`.

    Returns:
        (T, heads, head_dim) float32; 0 where nothing is attended to.
    """
    return attention(query.double(), key.double(), value.double(), scaling, mask, cap).float()
