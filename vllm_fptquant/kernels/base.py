"""The one interface behind which every kernel for a quantized linear layer sits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fptquant.checkpoint import LinearScheme, code_bounds


@dataclass(frozen=True)
class LinearSpec:
    """What is known of a layer before its weights are: enough to choose a kernel.

    Attributes:
        scheme: bits and symmetry of weights and activations.
        in_features: K of this tensor-parallel rank.
        out_features: N of this rank, all fused shards together.
        dtype: activation type the model runs in.
        device: torch's device type.
    """

    scheme: LinearScheme
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: str


@dataclass(frozen=True)
class LinearWeights:
    """The tensors of one layer, as the checkpoint holds them, unpacked.

    Attributes:
        scheme: bits and symmetry.
        codes: int8 (N, K).
        weight_scale: float32 (N,).
        input_scale: float32 (), None when activations are not quantized.
        input_zero_point: int32 (), None when activations are symmetric or not quantized.
    """

    scheme: LinearScheme
    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None

    @property
    def output_scale(self) -> Tensor:
        """float32 (N,), what the integer sum is multiplied by."""
        return self.weight_scale if self.input_scale is None else self.input_scale * self.weight_scale

    @property
    def zero_point(self) -> Tensor:
        """int32 (), zero when activations are symmetric."""
        return torch.zeros((), dtype=torch.int32) if self.input_zero_point is None else self.input_zero_point

    @property
    def bounds(self) -> tuple[float, float]:
        """Smallest and largest `q - z` of the activations."""
        low, high = code_bounds(self.zero_point, self.scheme.activations.bits)
        return low.item(), high.item()


class LinearKernel(ABC):
    """The integer product of one layer: its weights in the kernel's own layout, packed on construction."""

    name: ClassVar[str]

    @classmethod
    @abstractmethod
    def can_implement(cls, spec: LinearSpec) -> str | None:
        """None when the kernel computes such a layer exactly, otherwise why it cannot."""

    @abstractmethod
    def __init__(self, weights: LinearWeights) -> None:
        """Packs the weights; keeps no reference to `weights.codes`."""

    @abstractmethod
    def matmul(self, codes: Tensor) -> Tensor:
        """Multiplies and scales.

        Args:
            codes: (M, K), float32 integers `q - z`; the input itself where activations are not quantized.

        Returns:
            float32 (M, N), without bias.
        """
