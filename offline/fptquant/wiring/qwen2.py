"""Qwen2: biases of queries, keys and values, and windows from some layer on where the configuration has them on."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

QWEN2 = replace(
    LLAMA,
    model_type="qwen2",
    name="Qwen2",
    models="Qwen2, Qwen2.5, Qwen2.5-Coder, QwQ",
    windows="by type",
    qkv_bias=True,
    output_bias=False,
    mlp_bias=False,
)
