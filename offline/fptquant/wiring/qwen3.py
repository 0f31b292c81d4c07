"""Qwen3, dense: queries and keys are normed before RoPE, head by head."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

QWEN3 = replace(
    LLAMA,
    model_type="qwen3",
    name="Qwen3",
    models="Qwen3, dense",
    query_norm="q_norm",
    key_norm="k_norm",
    windows="by type",
    mlp_bias=False,
)
