"""Mistral: no biases; the first models attend to a window in all layers."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

MISTRAL = replace(
    LLAMA,
    model_type="mistral",
    name="Mistral",
    models="Mistral 7B, Nemo, Small 2 and 3 (text)",
    windows="all",
    qkv_bias=False,
    output_bias=False,
    mlp_bias=False,
)
