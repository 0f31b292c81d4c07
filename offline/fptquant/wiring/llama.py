"""Llama, whose structure most families have; theirs are this one with what differs."""

from fptquant.wiring.base import Architecture
from fptquant.wiring.roles import InputGroup, Projection, Role

LLAMA = Architecture(
    model_type="llama",
    name="Llama",
    models="Llama 2 and 3, SmolLM2, TinyLlama",
    embedding="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    mlp="mlp",
    groups=(
        InputGroup(
            "qkv",
            (
                Projection(Role.QUERY, "self_attn.q_proj"),
                Projection(Role.KEY, "self_attn.k_proj"),
                Projection(Role.VALUE, "self_attn.v_proj"),
            ),
            norm="input_layernorm",
        ),
        InputGroup("o", (Projection(Role.OUTPUT, "self_attn.o_proj"),)),
        InputGroup(
            "gate_up",
            (Projection(Role.GATE, "mlp.gate_proj"), Projection(Role.UP, "mlp.up_proj")),
            norm="post_attention_layernorm",
        ),
        InputGroup("down", (Projection(Role.DOWN, "mlp.down_proj"),)),
    ),
)
