"""SmolLM3: every fourth layer has no RoPE."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

SMOLLM3 = replace(
    LLAMA,
    model_type="smollm3",
    name="SmolLM3",
    models="SmolLM3",
    rope_layers="no_rope_layers",  # 1 where there is RoPE
    windows="by type",
)
