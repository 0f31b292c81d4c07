"""A quantized layer's tensors, from our format to that of compressed-tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from fptquant.export.plan import StockLayer
from fptquant.format import pack_codes, per_column, unpack_codes
from fptquant.format.arithmetic import block_hadamard, hadamard_factors
from fptquant.format.packing import WORD

LARGEST = 127.0  # magnitude of an 8-bit code with the same on both sides


def stock_tensors(layer: StockLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """What compressed-tensors has of a layer.

    Args:
        layer: what it becomes.
        tensors: of the layer in our format, by their names behind its own.
        dtype: of weights in floating point.

    Returns:
        By name behind the layer's, weights (N, K) and their scales (N, 1) or (N, groups) in float32; scale and zero
        point (1,) of a static input range; the bias as it was.
    """
    found = {"bias": tensors["bias"]} if "bias" in tensors else {}
    codes, scale = _codes(layer, tensors), tensors["weight_scale"]
    weight = codes.float() * scale if layer.bits == 16 or layer.undone else torch.empty(0)
    if layer.undone is not None:
        weight = without_hadamard(weight, layer.undone)
        codes, scale = to_8_bits(weight)
    if layer.bits == 16:
        return {"weight": weight.to(dtype), **found}
    if layer.inputs == "float":
        found |= _packed(layer, codes, scale, tensors.get("weight_multiplier"))
    else:
        found |= {"weight": codes, "weight_scale": scale}
    if layer.inputs == "static":
        found["input_scale"] = tensors["input_scale"].reshape(1)
        zero_point = tensors.get("input_zero_point", torch.zeros(1))
        found["input_zero_point"] = zero_point.reshape(1).to(torch.int8)
    return found


def without_hadamard(weight: Tensor, block: int) -> Tensor:
    """Weights W H of a layer (N, K) that are multiplied by x where W was by x H; in float64 and rounded once."""
    left, right = hadamard_factors(block, torch.float64)
    return block_hadamard(weight, left.to(weight.device), right.to(weight.device))


def to_8_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Nearest 8-bit codes of `weight` (N, K), and a scale (N, 1) for each row, by its largest magnitude."""
    scale = (weight.abs().amax(1, keepdim=True) / LARGEST).clamp_min(torch.finfo(torch.float32).tiny)
    return torch.round(weight / scale).clamp(-LARGEST, LARGEST).to(torch.int8), scale


def group_scales(scale: Tensor, multiplier: Tensor) -> Tensor:
    """Scales (N, groups) of 4-bit codes: a channel's (N, 1) times its groups' multipliers; exact in float32."""
    return scale * multiplier.float()


def _codes(layer: StockLayer, tensors: Mapping[str, Tensor]) -> Tensor:
    """Integers (N, K) whose products with the channel scales are the weights; of packed groups without multipliers."""
    shape = torch.Size(tensors["weight_shape"].tolist())
    codes = unpack_codes(tensors["weight_packed"], layer.scheme.weights.bits, shape)
    if "weight_multiplier" in tensors and layer.group_size is None:
        codes = codes * per_column(tensors["weight_multiplier"], shape[1])
    return codes


def _packed(layer: StockLayer, codes: Tensor, scale: Tensor, multiplier: Tensor | None) -> Iterable[tuple[str, Tensor]]:
    """Codes in int32 words, `WORD // bits` in each: 4 and 8 bits are packed by compressed-tensors as by us."""
    assert WORD % layer.bits == 0, "compressed-tensors splits other codes between words"
    if layer.group_size is not None:
        assert multiplier is not None
        scale = group_scales(scale, multiplier)
    yield "weight_packed", pack_codes(codes, layer.bits)
    yield "weight_scale", scale
    yield "weight_shape", torch.tensor(codes.shape, dtype=torch.int64)
