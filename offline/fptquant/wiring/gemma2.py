"""Gemma 2: norms before and behind blocks, with gains 1 + w; scores and logits are bounded by tanh."""

from dataclasses import replace

from fptquant.wiring.llama import LLAMA

GEMMA2 = replace(
    LLAMA,
    model_type="gemma2",
    name="Gemma2",
    models="Gemma 2",
    groups=tuple(
        replace(group, norm="pre_feedforward_layernorm") if group.name == "gate_up" else group for group in LLAMA.groups
    ),
    post_norms=("post_attention_layernorm", "post_feedforward_layernorm"),
    gain_offset=1.0,
    scales_embedding=True,
    activation_name="hidden_activation",
    score_scalar="query_pre_attn_scalar",
    score_cap="attn_logit_softcapping",
    logit_cap="final_logit_softcapping",
    float16=False,
    windows="by type",
    mlp_bias=False,
    impossible={"use_bidirectional_attention": "tokens attend to later ones"},
)
