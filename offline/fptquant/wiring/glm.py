"""GLM: RoPE turns neighbours in the first half of each head; gate and up projections are fused."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA
from fptquant.wiring.roles import Role

GLM = replace(
    LLAMA,
    model_type="glm",
    name="Glm",
    models="GLM-4-9B (of 2024), GLM-Edge",
    interleaved=True,
    partial_rotary=True,
    output_bias=False,
    mlp_bias=False,
    lacks=("MLP",),
    fused={"mlp.gate_up_proj": (Role.GATE, Role.UP)},
)
