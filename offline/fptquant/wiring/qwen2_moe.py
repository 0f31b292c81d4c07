"""Qwen2-MoE: Qwen2 with experts in the place of MLPs, one of which every token goes through."""

from dataclasses import replace

from fptquant.wiring.mixture import Mixture
from fptquant.wiring.qwen2 import QWEN2

QWEN2_MOE = replace(
    QWEN2,
    model_type="qwen2_moe",
    name="Qwen2Moe",
    models="Qwen1.5 and Qwen2, mixtures of experts",
    qkv_bias="qkv_bias",
    mixture=Mixture(shared_width="shared_expert_intermediate_size"),
)
