"""Llama: Llama 2 and 3, SmolLM2, TinyLlama and others of `model_type` llama."""

from fptquant.wiring.base import Architecture, Role

LLAMA = Architecture(
    model_type="llama",
    class_name="LlamaForCausalLM",
    embedding="model.embed_tokens",
    layers="model.layers",
    final_norm="model.norm",
    head="lm_head",
    attention="self_attn",
    attention_norm="input_layernorm",
    mlp_norm="post_attention_layernorm",
    projections={
        Role.QUERY: "self_attn.q_proj",
        Role.KEY: "self_attn.k_proj",
        Role.VALUE: "self_attn.v_proj",
        Role.OUTPUT: "self_attn.o_proj",
        Role.GATE: "mlp.gate_proj",
        Role.UP: "mlp.up_proj",
        Role.DOWN: "mlp.down_proj",
    },
)
