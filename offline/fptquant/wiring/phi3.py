"""Phi-3 and Phi-4: Llama, or Mistral with its windows, whose weights are fused by rows."""

from fptquant.wiring.fused import Fused
from fptquant.wiring.llama import LLAMA
from fptquant.wiring.mistral import MISTRAL
from fptquant.wiring.roles import Role

PHI3 = Fused(
    model_type="phi3",
    name="Phi3",
    models="Phi-3 (mini and medium, 4k), Phi-4 (14B)",
    family=LLAMA,
    windowed=MISTRAL,
    weights={
        "self_attn.qkv_proj": (Role.QUERY, Role.KEY, Role.VALUE),
        "mlp.gate_up_proj": (Role.GATE, Role.UP),
    },
)
