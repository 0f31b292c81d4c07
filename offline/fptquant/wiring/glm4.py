"""GLM-4 of 2025, dense: GLM with norms behind blocks, too."""

from dataclasses import replace

from fptquant.wiring.glm import GLM

GLM4 = replace(
    GLM,
    model_type="glm4",
    name="Glm4",
    models="GLM-4-0414 (9B, 32B), GLM-Z1",
    post_norms=("post_self_attn_layernorm", "post_mlp_layernorm"),
)
