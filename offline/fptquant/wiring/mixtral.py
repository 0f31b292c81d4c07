"""Mixtral: Mistral with experts in the place of all MLPs, under names of its own in files."""

from dataclasses import replace

from fptquant.wiring.mistral import MISTRAL
from fptquant.wiring.mixture import Mixture

_STORED = {"gate_proj": "w1", "up_proj": "w3", "down_proj": "w2"}

MIXTRAL = replace(
    MISTRAL,
    model_type="mixtral",
    name="Mixtral",
    models="Mixtral 8x7B and 8x22B",
    lacks=("MLP",),
    mixture=Mixture(
        experts="num_local_experts",
        width="intermediate_size",
        renormalized=True,
        step=None,
        without=None,
        stored={
            r"\.mlp\.": ".block_sparse_moe.",
            **{rf"\.(experts\.\d+)\.{name}\.": rf".\1.{stored}." for name, stored in _STORED.items()},
        },
    ),
)
