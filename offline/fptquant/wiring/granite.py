"""Granite 3: multipliers of embedding, residual, scores and logits, which the weights take in."""

from dataclasses import replace

from fptquant.wiring.base import Multiplier
from fptquant.wiring.llama import LLAMA
from fptquant.wiring.roles import Role

GRANITE = replace(
    LLAMA,
    model_type="granite",
    name="Granite",
    models="Granite 3, dense",
    multipliers={
        "embedding_multiplier": Multiplier((Role.EMBEDDING,)),
        "residual_multiplier": Multiplier((Role.OUTPUT, Role.DOWN)),
        "attention_multiplier": Multiplier((Role.QUERY,), of_scores=True),
        "logits_scaling": Multiplier((Role.HEAD,), exponent=-1),
    },
)
