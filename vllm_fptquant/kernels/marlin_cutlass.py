"""Int8 activations times 4-bit weights, by Marlin or by CUTLASS: the number of a step's tokens decides.

Weights are in memory as Marlin reads them, 4 bits each. From `widen_from` tokens on they are first widened to bytes, in
a buffer that all layers of a device share, for CUTLASS, whose product then takes less time by more than widening takes.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor
from vllm import _custom_ops as ops
from vllm.scalar_type import scalar_types

from vllm_fptquant.kernels.base import LinearSpec, LinearWeights
from vllm_fptquant.kernels.cutlass_int8 import CutlassInt8Kernel
from vllm_fptquant.kernels.library import register
from vllm_fptquant.kernels.marlin import MarlinInt8Kernel, multiply, pad_inputs

# Compute capability to tokens of a step, as measured by `python benchmarks/bench_gpu.py --widening`. A GPU that isn't
# here widens only where it is asked to. None was measured; docs/gpu.md has what may be expected of Hopper.
WIDEN_FROM: dict[int, int] = {}

# Axes of Marlin's words (see `widen`) in the order of rows and columns of the weight.
ROWS_FIRST = (1, 4, 2, 0, 3)


def widening_threshold(asked: int | Literal["never"] | None, capability: int | None) -> int | None:
    """Tokens of a step from which on weights are widened, None for never.

    Args:
        asked: by the user; None for the shipped table.
        capability: of the GPU, None on CPUs.
    """
    if asked == "never" or capability is None:
        return None
    return WIDEN_FROM.get(capability) if asked is None else asked


class MarlinCutlassKernel(MarlinInt8Kernel):
    """Marlin's product, or CUTLASS's for many tokens, of the same weights in memory.

    Both add the same products in int32. Then Marlin multiplies by the row's and by the channel's scale, CUTLASS by the
    channel's first; so before they are rounded to 16 bits outputs differ by at most 2^-22 of themselves, and by what
    Marlin's parts of a sum round where they cancel.
    """

    name = "marlin-cutlass-int8"
    operators = (*MarlinInt8Kernel.operators, "cutlass_scaled_mm")
    channel_scale: Tensor

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """What both kernels can compute, on a GPU where widening pays or is asked for."""
        refusal = super().refusal(spec, capability) or CutlassInt8Kernel.refusal(spec, capability)
        if refusal is None and spec.widen_from is None:
            return (
                "widens weights only where that was measured to be faster, or from the number of tokens on that "
                f"additional_config gives as widen_from; there is none for compute capability {capability / 10}"
            )
        return refusal

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Packs for Marlin, keeps the scales in CUTLASS's order as well, and asks for room in the shared buffer."""
        super().__init__(weights, dtype)
        self.register_buffer("channel_scale", weights.weight_scale, persistent=False)
        reserve(self.weight.device, self.padded_n * self.padded_k)

    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Multiplies int8 codes (M, K) by the weight, scaled and rounded to 16 bits, in one operator for every M."""
        if self.widen_from is None:
            return super().forward(codes, row_scale)
        output: Tensor = torch.ops.fptquant.marlin_or_cutlass(
            codes, row_scale, self.weight, self.weight_scale, self.channel_scale, self.widen_from
        )
        return output


def widen(packed: Tensor, wide: Tensor) -> None:
    """Writes weights that Marlin's repacking for int8 activations made of 4-bit codes as bytes.

    A tile of 32 columns and 32 rows has four words for each of 32 threads. Byte b of word w of thread t has two codes
    of row 8 w + t / 4: that of column 4 (t % 4) + b in its low half, and that of 16 columns further on in the other.

    It reads half a byte and writes one for each weight, and then goes over the bytes twice. Nothing is allocated but
    two shifts, and nothing copied from the host: a CUDA graph can hold it.

    Args:
        packed: int32 (K / 16, 2 N), of codes plus 8.
        wide: int8 (N, K), contiguous, which is overwritten.
    """
    n, k = wide.shape
    words = packed.view(k // 32, n // 32, 8, 4, 4)  # tile of columns, tile of rows, t / 4, t % 4, w
    halves = wide.view(torch.int32).view(n // 32, 4, 8, k // 32, 2, 4)
    shifts = torch.arange(0, 8, 4, dtype=torch.int32, device=packed.device).view(2, 1)
    torch.bitwise_right_shift(words.permute(ROWS_FIRST).unsqueeze(-2), shifts, out=halves)
    halves.bitwise_and_(0x0F0F0F0F)
    wide.sub_(8)


_largest: dict[torch.device, int] = {}  # bytes of the largest layer
_buffers: dict[torch.device, list[Tensor]] = {}


def reserve(device: torch.device, size: int) -> None:
    """Notes that a layer needs this many bytes of the shared buffer of a device."""
    _largest[device] = max(size, _largest.get(device, 0))


def shared_buffer(device: torch.device) -> Tensor:
    """Bytes that all layers of a device use in turn, int8 (bytes of the largest,).

    The first product that needs them makes them: in vLLM that is its profiling run, behind loading, before it counts
    what memory is left and before it captures graphs. They then stay where they are. If a larger layer is loaded later,
    there are new ones beside the old ones, whose addresses captured graphs may have.
    """
    buffers = _buffers.setdefault(device, [])
    if not buffers or len(buffers[-1]) < _largest[device]:
        with torch.inference_mode(False):  # a tensor that can be written to in either mode
            buffers.append(torch.empty(_largest[device], dtype=torch.int8, device=device))
    return buffers[-1]


def _multiply(
    codes: Tensor, row_scale: Tensor, packed: Tensor, packed_scale: Tensor, channel_scale: Tensor, widen_from: int
) -> Tensor:
    n, padded_n, padded_k = len(channel_scale), packed.shape[1] // 2, packed.shape[0] * 16
    codes_padded = pad_inputs(codes, padded_k)
    if len(codes) < widen_from:
        output = multiply(codes_padded, row_scale, packed, packed_scale, scalar_types.uint4b8.id)
        return output if padded_n == n else output[:, :n].contiguous()
    wide = shared_buffer(packed.device)[: padded_n * padded_k].view(padded_n, padded_k)
    widen(packed, wide)
    product: Tensor = ops.cutlass_scaled_mm(
        a=codes_padded, b=wide[:n].t(), scale_a=row_scale, scale_b=channel_scale, out_dtype=packed_scale.dtype
    )
    return product


def _multiply_fake(
    codes: Tensor, row_scale: Tensor, packed: Tensor, packed_scale: Tensor, channel_scale: Tensor, widen_from: int
) -> Tensor:
    return packed_scale.new_empty((codes.shape[0], channel_scale.shape[0]))


# An operator of our own: a trace, which is for any number of tokens, doesn't see the choice. A captured CUDA graph is
# for one number of tokens, and has one of the two ways.
register(
    "marlin_or_cutlass(Tensor codes, Tensor row_scale, Tensor packed, Tensor packed_scale, Tensor channel_scale, "
    "int widen_from) -> Tensor",
    _multiply,
    _multiply_fake,
)
