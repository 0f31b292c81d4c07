"""Qwen3-MoE: Qwen3 with experts in the place of MLPs."""

from dataclasses import replace

from fptquant.wiring.mixture import Mixture
from fptquant.wiring.qwen3 import QWEN3

QWEN3_MOE = replace(
    QWEN3,
    model_type="qwen3_moe",
    name="Qwen3Moe",
    models="Qwen3, mixtures of experts",
    windows="all",
    mixture=Mixture(),
)
