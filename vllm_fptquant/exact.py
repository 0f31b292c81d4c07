"""`--additional-config '{"fptquant": {"exact": true}}'`: serving that equals the simulation bit for bit; slow.

Stock attention kernels sum in an order of their own, which differs between prefill, decode and batch sizes. A
quantizer turns a difference in the last bit into a whole code now and then, and a few layers later two such
runs differ by as much as quantization itself perturbs. To compare served and simulated models beyond that, this
option computes attention and the online Hadamard in float64 and rounds once, so that the order no longer
matters. vLLM's own operators (norms, RoPE, activation) have to be torch's: `--compilation-config
'{"custom_ops": ["none"]}'`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.v1.attention.backends.cpu_attn import CPUAttentionBackendImpl

from fptquant.format import exact_attention


class ExactAttentionImpl(CPUAttentionBackendImpl):  # type: ignore[misc]
    """vLLM's CPU attention over its paged cache, in torch and float64.

    An instance of vLLM's implementation becomes one by a change of its class. The cache has the shape that vLLM
    allocates, (blocks, kv_heads, block_size, 2 * head_size), with keys in the first half of the last dimension.
    """

    def do_kv_cache_update(
        self, layer: Any, key: Tensor, value: Tensor, kv_cache: Tensor, slot_mapping: Tensor
    ) -> None:
        """Writes codes (T, kv_heads, head_size) at their slots."""
        valid = slot_mapping >= 0
        slots, size = slot_mapping[valid], kv_cache.shape[2]
        kv_cache[slots // size, :, slots % size] = torch.cat((key, value), -1)[: valid.numel()][valid]

    def forward(
        self,
        layer: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        kv_cache: Tensor,
        attn_metadata: Any,
        output: Tensor,
        output_scale: Tensor | None = None,
        output_block_scale: Tensor | None = None,
    ) -> Tensor:
        """Computes attention in float64, sequence by sequence, and rounds once; arguments are the CPU backend's."""
        if attn_metadata is None:  # warming up
            return output
        starts = attn_metadata.query_start_loc.tolist()
        size = kv_cache.shape[2]
        for index, length in enumerate(attn_metadata.seq_lens.tolist()):
            start, end = starts[index], starts[index + 1]
            blocks = attn_metadata.block_table[index, : -(-length // size)].long()
            states = kv_cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length]  # (kv_heads, S, 2 * head_size)
            keys, values = states.chunk(2, -1)
            mask = window_mask(end - start, length, self.sliding_window)
            queries = query[start:end].transpose(0, 1)
            cap = self.logits_soft_cap or None  # 0 is vLLM's word for none
            output[start:end] = exact_attention(queries, keys, values, self.scale, mask, cap)
        return output


def window_mask(count: int, length: int, window: int) -> Tensor | None:
    """Which of `length` positions each of the last `count` attends to: bool (count, length), None for all before it.

    Args:
        count: of queries.
        length: of keys.
        window: how many positions, its own among them; -1 is vLLM's word for all.
    """
    if window == -1:
        return None
    distance = torch.arange(length - count, length)[:, None] - torch.arange(length)
    return (distance >= 0) & (distance < window)
