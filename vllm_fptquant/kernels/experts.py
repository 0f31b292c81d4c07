"""Experts on GPUs: the products of all experts of a layer in one launch of Marlin's kernel for experts.

The kernel takes int8 activations that its caller quantized, and a scale for each of their rows: static quantizers and S
fit into that. What it multiplies are blocks of rows that go through the same expert; `moe_align_block_size` sorts them.

Of the routing weights the kernel could see to as well, but in 16 bits: they are multiplied outside, in float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import pad
from vllm import _custom_ops as ops
from vllm.model_executor.layers.linear import LinearBase
from vllm.model_executor.layers.quantization.utils import marlin_utils
from vllm.scalar_type import ScalarType

from fptquant.errors import FPTQuantError
from fptquant.format import quantize
from fptquant.format.steps import Shift
from vllm_fptquant.kernels.base import LinearSpec, LinearWeights, holds_zero_point
from vllm_fptquant.kernels.gpu import GpuLinear
from vllm_fptquant.kernels.library import register
from vllm_fptquant.kernels.marlin import Marlin, MarlinInt8Kernel, MarlinKernel, turing_refusal

BLOCKS = (16, 32, 48, 64)  # rows of one expert that a thread block multiplies; int8 needs 16
FULL = 0.9  # part of a block's rows: where experts have more than that on average, blocks are larger


class Routed(NamedTuple):
    """Where the rows of each block come from, and its expert.

    Attributes:
        rows: int32, numbers of rows of the output (token times experts of a token, plus place), block by block; the
            number of all of them where a block has no further row.
        experts: int32, of each block.
        used: int32 (1,), how many of `rows` there are, the free ones of blocks among them. The GPU alone knows.
    """

    rows: Tensor
    experts: Tensor
    used: Tensor


def block_size(routes: int, experts: int) -> int:
    """Rows of a block, by the number of rows of all experts together; vLLM's own choice but for blocks of 8."""
    return next((size for size in BLOCKS if routes < FULL * size * experts), BLOCKS[-1])


def sort_rows(chosen: Tensor, experts: int) -> Routed:
    """Sorts tokens by their experts.

    Args:
        chosen: int32 (tokens, count), numbers of experts.
        experts: how many there are.
    """
    return Routed(*torch.ops.fptquant.sort_rows(chosen, experts))


def _sort(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    rows, blocks, used = _sort_fake(chosen, experts)
    ops.moe_align_block_size(
        topk_ids=chosen,
        num_experts=experts,
        block_size=block_size(chosen.numel(), experts),
        sorted_token_ids=rows,
        experts_ids=blocks,
        num_tokens_post_pad=used,
    )
    return rows, blocks, used


def _sort_fake(chosen: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """As large as any size of blocks needs it: a traced graph doesn't know which one it will be."""
    most = chosen.shape[0] * chosen.shape[1] + experts * (BLOCKS[-1] - 1)
    sizes = (most, (most + BLOCKS[0] - 1) // BLOCKS[0], 1)
    rows, blocks, used = (chosen.new_empty(size, dtype=torch.int32) for size in sizes)
    return rows, blocks, used


def _multiply(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_scale: Tensor | None,
    rows: Tensor,
    experts: Tensor,
    used: Tensor,
    top_k: int,
    weight_type: int,
) -> Tensor:
    output: Tensor = ops.moe_wna16_marlin_gemm(
        input=x,
        output=None,
        b_qweight=weight,
        b_bias=None,
        b_scales=weight_scale,
        a_scales=row_scale,
        global_scale=None,
        b_qzeros=None,
        workspace=marlin_utils.get_marlin_workspace(device=x.device),
        sorted_token_ids=rows,
        expert_ids=experts,
        num_tokens_past_padded=used,
        topk_weights=x.new_empty(0, dtype=torch.float32),  # not read
        moe_block_size=block_size(len(x) * top_k, len(weight)),
        top_k=top_k,
        mul_topk_weights=False,
        b_q_type=ScalarType.from_id(weight_type),
        size_m=len(x),
        size_n=weight_scale.shape[2],
        size_k=x.shape[1],
        use_atomic_add=False,
        use_fp32_reduce=True,
        is_zp_float=False,
    )
    return output


def _multiply_fake(
    x: Tensor,
    weight: Tensor,
    weight_scale: Tensor,
    row_scale: Tensor | None,
    rows: Tensor,
    experts: Tensor,
    used: Tensor,
    top_k: int,
    weight_type: int,
) -> Tensor:
    return weight_scale.new_empty((x.shape[0] * top_k, weight_scale.shape[2]))


# Operators of our own: the size of blocks depends on the number of rows, which graphs leave open.
register("sort_rows(Tensor chosen, int experts) -> (Tensor, Tensor, Tensor)", _sort, _sort_fake)
register(
    "multiply_experts(Tensor x, Tensor weight, Tensor weight_scale, Tensor? row_scale, Tensor rows, Tensor experts, "
    "Tensor used, int top_k, int weight_type) -> Tensor",
    _multiply,
    _multiply_fake,
)


def zero_point_columns(weights: LinearWeights) -> tuple[Tensor, Tensor]:
    """Constant inputs and weights whose products add up to -z times the sum of a row's other weights.

    Such a sum is d + 16 e - 128 (f_1 + ... + f_n), with each of d, e and f a 4-bit integer. A sixteenth more columns,
    at least 64, hold it at any z as long as a row's integers have a mean of 0.4 or less.

    Args:
        weights: 4-bit ones, for activations that hold their zero point z.

    Returns:
        int8 (columns,) of inputs, and (N, columns) of weights.

    Raises:
        FPTQuantError: a row's sum is too large.
    """
    columns = 64 * -(-weights.codes.shape[1] // 1024)
    inputs = torch.full((columns,), -128, dtype=torch.int8, device=weights.codes.device)
    inputs[0], inputs[1] = 1, 16
    missing = -weights.zero_point * weights.codes.sum(1)
    ones = (missing + 8) % 16 - 8
    sixteens = ((missing - ones) // 16 + 4) % 8 - 4
    rest = (ones + 16 * sixteens - missing) // 128
    spread = (rest[:, None] + torch.arange(columns - 2, device=rest.device)) // (columns - 2)
    if bool(((spread < -8) | (spread > 7)).any()):
        raise FPTQuantError(
            f"{weights.name}: its zero point times the sum of a row of weights is too large for experts on GPUs: "
            "quantize with symmetric activations, or serve on CPUs"
        )
    return inputs, torch.cat((ones[:, None], sixteens[:, None], spread), 1).to(torch.int8)


class ExpertKernel(Marlin):
    """What kernels for experts share. One of them packs one expert, and computes it alone or all of a stack.

    Attributes:
        constant: int8, what every row has behind its codes, where those hold their zero point.
    """

    constant: Tensor | None

    experts = True
    operators = ("gptq_marlin_repack", "_moe_C::moe_align_block_size", "_moe_C::moe_wna16_marlin_gemm")

    def __init__(self, weights: LinearWeights, dtype: torch.dtype) -> None:
        """Packs one expert's weights; a zero point of 8 bits becomes further columns of them.

        Raises:
            FPTQuantError: see `zero_point_columns`, `Marlin`.
        """
        constant = None
        if weights.codes_hold_zero_point:
            constant, columns = zero_point_columns(weights)
            weights = replace(weights, codes=torch.cat((weights.codes, columns), 1))
        super().__init__(weights, dtype)
        self.register_buffer("constant", constant, persistent=False)

    def forward(self, codes: Tensor, row_scale: Tensor | None) -> Tensor:
        """Multiplies all rows of `codes` (M, K) by this expert's weight alone."""
        routed = sort_rows(torch.zeros((len(codes), 1), dtype=torch.int32, device=codes.device), 1)
        return self.multiply(codes, row_scale, self.weight[None], self.weight_scale[None], routed, 1)

    def multiply(
        self, x: Tensor, row_scale: Tensor | None, weight: Tensor, weight_scale: Tensor, routed: Routed, top_k: int
    ) -> Tensor:
        """Multiplies each row with the weights of its experts, and scales.

        Args:
            x: (M, K), see `GpuKernel.forward`.
            row_scale: float32 (M,), see `GpuKernel.forward`.
            weight: of all experts, one behind the other.
            weight_scale: of all experts.
            routed: which rows of the output go through which expert.
            top_k: rows of the output that each row of `x` gives.

        Returns:
            (M * top_k, N) of type `dtype`.
        """
        if self.constant is not None:
            x = torch.cat((x, self.constant.expand(len(x), -1)), 1)
        if self.padded_k != x.shape[-1]:
            x = pad(x, (0, self.padded_k - x.shape[-1]))
        output: Tensor = torch.ops.fptquant.multiply_experts(
            x, weight, weight_scale, row_scale, *routed, top_k, self.weight_type.id
        )
        return output if self.padded_n == self.out_features else output[:, : self.out_features].contiguous()


class MarlinInt8Experts(ExpertKernel, MarlinInt8Kernel):
    """`MarlinInt8Kernel` for experts, with the same arithmetic; takes zero points."""

    name = "marlin-int8-experts"

    @classmethod
    def refusal(cls, spec: LinearSpec, capability: int) -> str | None:
        """4-bit weights; all activations that are quantized."""
        if spec.scheme.weights.code_bits == 4 and holds_zero_point(spec.scheme.activations):
            return turing_refusal(spec, capability)
        return super().refusal(spec, capability)


class MarlinExperts(ExpertKernel, MarlinKernel):
    """`MarlinKernel` for experts, with the same arithmetic."""

    name = "marlin-experts"


class ExpertStack(torch.nn.Module):
    """One projection of all experts of a layer: their packed weights and quantizers in one buffer each.

    The methods of the experts' own layers load, check and pack; what they have prepared is put here.
    """

    kernel: ExpertKernel
    input_scale: Tensor
    low: Tensor
    high: Tensor

    def __init__(self, layers: Sequence[LinearBase], name: str, *, one_input: bool) -> None:
        """Takes the place of these layers' own products.

        Args:
            layers: of the experts, by number; with `FPTQuantLinearMethod`.
            name: of the projections, for messages.
            one_input: whether all experts of a token read the same, which is quantized once.

        Raises:
            FPTQuantError: they are not quantized, or not alike, or with steps that can't be computed here.
        """
        super().__init__()
        arrangements = [getattr(layer.quant_method, "arrangement", None) for layer in layers]
        first = arrangements[0]
        if first is None or any(arrangement != first for arrangement in arrangements):
            raise FPTQuantError(
                f"{name}: on GPUs all experts of a layer have to be quantized, and alike: take them out of `ignore` "
                "and `overrides`, or serve on CPUs"
            )
        for step in (*first.outputs, *(step for step in first.inputs if isinstance(step, Shift))):
            raise FPTQuantError(f"{name}: can't compute the step {step} of experts on GPUs: serve on CPUs")
        self.name, self.count, self.one_input = name, len(layers), one_input
        self.quantized, self.scaled, self.undone = first.quantize is not None, first.scaled, first.undone
        self.adds_zero_point = holds_zero_point(first.product.scheme.activations)
        self.stacked: dict[str, Tensor] = {}  # buffers, which vLLM takes off their module for the time of a reload
        for number, layer in enumerate(layers):
            layer.quant_method.place = partial(self.place, number)

    def place(self, number: int, prepared: GpuLinear) -> None:
        """Puts what was prepared of one expert in its place, where compiled and CUDA graphs find it.

        Args:
            number: of the expert.
            prepared: its layer, which is of no use any more.
        """
        kernel = prepared.kernel
        assert isinstance(kernel, ExpertKernel)
        tensors = {name: kernel.get_buffer(name) for name in ("weight", "weight_scale")}
        quantizer = ("input_scale", "low", "high", *(("zero_point",) if self.adds_zero_point else ()))
        tensors |= {name: prepared.get_buffer(name) for name in quantizer if self.quantized}
        for name, tensor in tensors.items():
            if name not in self.stacked:
                self.stacked[name] = tensor.new_empty((self.count, *tensor.shape))
                self.register_buffer(name, self.stacked[name], persistent=False)
            self.stacked[name][number].copy_(tensor)
        if not hasattr(self, "kernel"):
            del kernel.weight, kernel.weight_scale
            self.kernel, self.inputs = kernel, prepared.inputs

    def require_one_quantizer(self) -> None:
        """Called once all experts are in their places.

        Raises:
            FPTQuantError: they read the same input, and quantize it differently.
        """
        for name in ("input_scale", "low") if self.one_input and self.quantized else ():
            if bool((self.stacked[name] != self.stacked[name][0]).any()):
                raise FPTQuantError(
                    f"{self.name}: experts quantize the same input differently, which is computed on CPUs only"
                )

    def forward(self, x: Tensor, scale: Tensor | None, chosen: Tensor, routed: Routed) -> Tensor:
        """All that the experts' layers do to their inputs, as `GpuLinear.forward`.

        Args:
            x: of a 16-bit type, (tokens, K) with `one_input`; otherwise (tokens * count, K), what each expert reads.
            scale: S of each token, float32 (tokens, 1), or None.
            chosen: int32 (tokens, count), numbers of experts.
            routed: from `sort_rows`.

        Returns:
            (tokens * count, N) of the kernel's type.
        """
        top_k, numbers = (chosen.shape[1], torch.zeros_like(chosen[:, 0])) if self.one_input else (1, chosen.flatten())
        if scale is not None and not self.one_input:
            scale = scale.expand(chosen.shape).reshape(-1, 1)
        if self.undone and not self.quantized:
            scale = None  # RowScale and Undo cancel
        for rotation in self.inputs:
            x = rotation(x)
        scaled = x if scale is None else x * scale  # float32
        if not self.quantized:
            return self._multiply(scaled.to(self.kernel.dtype), None, routed, top_k)
        input_scale = self.input_scale[numbers]
        codes = quantize(scaled, input_scale[:, None], self.low[numbers, None], self.high[numbers, None])
        if self.adds_zero_point:
            codes = codes + self.get_buffer("zero_point")[numbers, None]
        if self.undone and scale is not None:
            input_scale = input_scale / scale.flatten()
        return self._multiply(codes.to(torch.int8), input_scale, routed, top_k)

    def _multiply(self, x: Tensor, row_scale: Tensor | None, routed: Routed, top_k: int) -> Tensor:
        weight, weight_scale = self.get_buffer("weight"), self.get_buffer("weight_scale")
        return self.kernel.multiply(x, row_scale, weight, weight_scale, routed, top_k)
