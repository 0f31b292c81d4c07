"""The mean of a layer's keys, which is taken off before they are quantized.

All keys of a sequence may lose the same vector: every score of a query changes by the same amount, which the softmax
takes no notice of. Keys have a mean where RoPE turns slowly, and biases of keys make it large.

RoPE turns the mean with the position, so a mean over short texts would be wrong further on, by as much as the mean is
long. It is taken over all positions that the model is made for instead, in closed form: of a pair that turns by the
angle t from one position to the next, the mean of exp(i t p) over p < P is exp(i t (P - 1) / 2) sin(t P / 2) / (P
sin(t / 2)).
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fptquant.calibration.moments import mean
from fptquant.wiring import Architecture

Rotary = Callable[..., tuple[Tensor, Tensor]]


def mean_key(
    attention: nn.Module, architecture: Architecture, rope: tuple[Tensor, Tensor], keys: Tensor, positions: int
) -> Tensor:
    """Mean of the keys behind RoPE over all positions that the model is made for, float32 (kv_heads, head_dim).

    Args:
        attention: that the keys are of, of a simulation or not.
        architecture: its family.
        rope: cosines and sines, each (1, length, rotated), of positions from 0 on.
        keys: (kv_heads, sequences, tokens, head_dim), behind RoPE, of the last positions and of this process.
        positions: how many there are.
    """
    config: Any = attention.config
    if not architecture.has_rope(config, attention.layer_idx):  # type: ignore[arg-type]
        return _mean(keys)
    modeling = getattr(attention, "modeling", sys.modules[type(attention).__module__])
    rotary: Rotary = getattr(modeling, architecture.rotary_function)
    cosines, sines = (x[0].double() for x in rope)
    squares, counted = cosines.square() + sines.square(), slice(-keys.shape[2], None)  # one, but where RoPE scales
    unturned = _mean(_turned(rotary, keys, (cosines / squares)[counted], (-sines / squares)[counted]))
    turns = mean_turn(cosines, sines, positions)
    return _turned(rotary, unturned[:, None, None], *(factor[None] for factor in turns))[:, 0, 0]


def mean_turn(cosines: Tensor, sines: Tensor, positions: int) -> tuple[Tensor, Tensor]:
    """Means of RoPE's cosines and sines over the first positions, each (rotated,) in the type of the arguments.

    Args:
        cosines: float64 (length, rotated), of positions from 0 on; two at least.
        sines: of the same shape.
        positions: P.
    """
    size = torch.hypot(cosines[0], sines[0])
    angle = torch.atan2(sines[1], cosines[1])  # below pi: no pair turns by more than 1 from one position to the next
    half = angle / 2
    length = torch.where(angle.abs() < 1e-12, 1.0, torch.sin(positions * half) / (positions * torch.sin(half)))
    return size * length * torch.cos((positions - 1) * half), size * length * torch.sin((positions - 1) * half)


def _turned(rotary: Rotary, keys: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """What RoPE makes of keys (kv_heads, sequences, tokens, head_dim).

    Args:
        rotary: the family's function.
        keys: before RoPE.
        cosines: (tokens, rotated).
        sines: (tokens, rotated); negative to turn back.
    """
    sequences = keys.transpose(0, 1)
    turned = rotary(sequences, sequences, *(x.to(keys.dtype)[None] for x in (cosines, sines)))[1]
    return turned.transpose(0, 1)


def _mean(keys: Tensor) -> Tensor:
    """(kv_heads, head_dim), over the tokens of all processes, of (kv_heads, sequences, tokens, head_dim)."""
    return mean(keys.flatten(1, 2).transpose(0, 1).flatten(1)).view(len(keys), -1).float()
