"""ERNIE 4.5, dense: RoPE turns neighbours."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

ERNIE4_5 = replace(
    LLAMA,
    model_type="ernie4_5",
    name="Ernie4_5",
    models="ERNIE 4.5, dense",
    interleaved=True,
    qkv_bias="use_bias",
    output_bias="use_bias",
    mlp_bias="use_bias",
)
