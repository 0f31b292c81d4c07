"""The one interface behind which every kernel for a quantized linear layer sits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from fptquant.format import ActivationScheme, LinearScheme, code_bounds


@dataclass(frozen=True)
class LinearSpec:
    """What is known of a layer before its weights are: enough to choose a kernel.

    Attributes:
        scheme: bits and symmetry of weights and activations.
        in_features: K of this tensor-parallel rank.
        out_features: N of this rank, all fused shards together.
        dtype: activation type the model runs in.
        device: torch's device type.
        capability: of the GPU, major and minor version as one number (86), None on CPUs.
        experts: whether it is one of the experts of a mixture, which GPUs compute together.
        widen_from: tokens of a step from which on 4-bit weights are widened to bytes; None where they never are.
    """

    scheme: LinearScheme
    in_features: int
    out_features: int
    dtype: torch.dtype
    device: str
    capability: int | None = None
    experts: bool = False
    widen_from: int | None = None


@dataclass(frozen=True)
class LinearWeights:
    """The tensors of one layer, as the checkpoint holds them, unpacked.

    Attributes:
        scheme: bits and symmetry.
        codes: int8 (N, K), times the multipliers of groups: of `WeightScheme.code_bits`.
        weight_scale: float32 (N,).
        input_scale: float32 (), None when activations are not quantized.
        input_zero_point: int32 (), None when activations are symmetric or not quantized.
        name: of the layer, for messages.
        rows: output features of every fused layer; empty for a layer that isn't fused.
        online: tensors of further steps by name, for every fused layer.
    """

    scheme: LinearScheme
    codes: Tensor
    weight_scale: Tensor
    input_scale: Tensor | None
    input_zero_point: Tensor | None
    name: str = "layer"
    rows: tuple[int, ...] = ()
    online: tuple[Mapping[str, Tensor], ...] = ({},)

    @property
    def output_scale(self) -> Tensor:
        """float32 (N,), what the integer sum is multiplied by."""
        return self.weight_scale if self.input_scale is None else self.input_scale * self.weight_scale

    @property
    def zero_point(self) -> Tensor:
        """int32 (), zero when activations are symmetric."""
        if self.input_zero_point is None:
            return torch.zeros((), dtype=torch.int32, device=self.codes.device)
        return self.input_zero_point

    @property
    def bounds(self) -> tuple[Tensor, Tensor]:
        """Smallest and largest `q - z` of the activations, float32 ()."""
        return code_bounds(self.zero_point, self.scheme.activations.bits)

    @property
    def codes_hold_zero_point(self) -> bool:
        """Whether int8 activation codes are `q`, because `q - z` needs more than a byte: asymmetric 8 bits."""
        return holds_zero_point(self.scheme.activations)


def run_outputs(
    bound: Sequence[Sequence[Callable[[Tensor, Tensor], Tensor]]], rows: tuple[int, ...], y: Tensor, x: Tensor
) -> Tensor:
    """What output steps make of a product.

    Args:
        bound: of every fused layer, its steps (`OutputStep.bind`).
        rows: see `LinearWeights`.
        y: (M, N).
        x: (M, K), behind all input steps.

    Returns:
        (M, N).
    """
    parts = list(torch.split(y, list(rows), -1)) if len(rows) > 1 else [y]
    for index, steps in enumerate(bound):
        for step in steps:
            parts[index] = step(parts[index], x)
    return parts[0] if len(parts) == 1 else torch.cat(parts, -1)


def holds_zero_point(activations: ActivationScheme) -> bool:
    """Whether int8 codes of these activations are `q`, because `q - z` needs more than a byte: asymmetric 8 bits."""
    return activations.bits == 8 and not activations.symmetric


def codes_refusal(activations: ActivationScheme) -> str | None:
    """Why a kernel whose int8 input is `q - z` can't take these activations; None when it can."""
    if activations.bits == 16:
        return "needs quantized activations, these have 16 bits"
    if holds_zero_point(activations):
        return "takes no zero point, which asymmetric 8-bit activations need"
    return None


def is_there(operator: str) -> bool:
    """Whether vLLM's extensions have an operator, such as `marlin_gemm` of `_C` or `_moe_C::moe_align_block_size`."""
    namespace, _, name = operator.rpartition("::")
    return hasattr(getattr(torch.ops, namespace or "_C"), name)


class Kernel(ABC):
    """The product of one layer: its weights in the kernel's own layout, packed on construction."""

    name: ClassVar[str]
    device: ClassVar[str]  # torch's device type
    experts: ClassVar[bool] = False  # whether it is for `LinearSpec.experts`

    @classmethod
    @abstractmethod
    def can_implement(cls, spec: LinearSpec) -> str | None:
        """None when the kernel computes such a layer as the format says, otherwise why it cannot."""


class CpuKernel(Kernel):
    """A kernel whose packed weights are no tensors.

    Attributes:
        code_type: of what it multiplies.
        code_offset: float32 (), added to `q - z` where that needs more than a byte; else None.
        traced: whether a compiler traces `matmul`, down to an operator that takes the weights by a tensor. It sees of
            other kernels the operator `fptquant::linear`.
    """

    device = "cpu"
    code_type: ClassVar[torch.dtype] = torch.float32
    code_offset: Tensor | None = None
    traced: ClassVar[bool] = False

    @abstractmethod
    def __init__(self, weights: LinearWeights) -> None:
        """Packs the weights; keeps no reference to `weights.codes`."""

    @abstractmethod
    def matmul(self, codes: Tensor) -> Tensor:
        """Multiplies and scales.

        Args:
            codes: (M, K) of `code_type`, integers `q - z` plus `code_offset`; the input itself where activations are
                not quantized.

        Returns:
            float32 (M, N), without bias.
        """


class GpuKernel(torch.nn.Module, Kernel):
    """A kernel whose packed weights and scales are buffers, so that compiled graphs and CUDA graphs hold them.

    `forward` is traced: plain torch around one operator, no `.item()`, no branch on data.

    Attributes:
        operators: of vLLM's compiled extensions, that it needs; of `_C` where nothing else is said.
        dtype: of the output, float16 or bfloat16.
        widen_from: see `LinearSpec`, for kernels that have two ways; set by who builds the kernel.
    """

    device = "cuda"
    widen_from: int | None = None
    operators: ClassVar[tuple[str, ...]] = ()

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Packs the weights on the device they are on.

        Args:
            weights: of the layer.
            dtype: float16 or bfloat16, of the output.

        Raises:
            FPTQuantError: a weight scale that this kernel cannot hold exactly.
        """
        super().__init__()
        self.dtype = dtype

    @classmethod
    def can_implement(cls, spec: LinearSpec) -> str | None:
        """Says why it can't compute a layer on this GPU: device, type, missing operators, or its own `refusal`."""
        if spec.device != "cuda" or spec.capability is None:
            return f"runs on NVIDIA GPUs, not on '{spec.device}'"
        if spec.dtype not in (torch.float16, torch.bfloat16):
            return f"computes in 16 bits, not in {str(spec.dtype).removeprefix('torch.')}: serve with --dtype auto"
        if spec.experts != cls.experts:
            return f"computes {'experts only' if cls.experts else 'no experts'}"
        missing = [name for name in cls.operators if not is_there(name)]
        if missing:
            return f"vLLM's extension has no {missing[0]}, it is another build or failed to load: install vLLM again"
        return cls.refusal(spec, spec.capability)

    @classmethod
    @abstractmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """`can_implement` for a layer on a GPU of this capability, in 16 bits."""

    @abstractmethod
    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Multiplies and scales.

        Args:
            codes: int8 (M, K), contiguous: `q - z`, or `q` where `LinearWeights.codes_hold_zero_point`: then the
                kernel takes z off. Where activations are not quantized, the input itself, of type `dtype`.
            row_scale: float32 (M,), contiguous: input scale of each row, divided by its S_n where there is one.
                None where activations are not quantized.

        Returns:
            (M, N) of type `dtype`, without bias.
        """
