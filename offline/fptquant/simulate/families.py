"""What transformers' classes become in a simulation, by family: `SimulatedLlamaModel` and the others of this module."""

from __future__ import annotations

import sys
from collections.abc import Mapping

import transformers
from torch import nn
from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY

from fptquant.simulate.modules import (
    SimulatedAttention,
    SimulatedDecoderLayer,
    SimulatedMLP,
    SimulatedModel,
    SimulatedModule,
    SimulatedNorm,
    SimulatedRotaryEmbedding,
)
from fptquant.wiring import FAMILIES, Architecture

# By the part that a class of transformers plays in its family.
PARTS: dict[str, type[SimulatedModule]] = {
    "Model": SimulatedModel,
    "DecoderLayer": SimulatedDecoderLayer,
    "Attention": SimulatedAttention,
    "MLP": SimulatedMLP,
    "RMSNorm": SimulatedNorm,
    "RotaryEmbedding": SimulatedRotaryEmbedding,
}


def _classes_of(architecture: Architecture) -> dict[type[nn.Module], type[nn.Module]]:
    """What each of a family's classes becomes; they are importable from here, so that models can be pickled."""
    modeling = sys.modules[getattr(transformers, architecture.class_name).__module__]
    facts = {"__module__": __name__, "architecture": architecture, "modeling": modeling}
    found = {}
    for part, simulated in PARTS.items():
        if part in architecture.lacks:
            continue
        original = getattr(modeling, architecture.class_of(part))
        made = type(f"Simulated{original.__name__}", (simulated, original), {**facts, "__doc__": simulated.__doc__})
        globals()[made.__name__] = found[original] = made
        # transformers enters here what a class can record (`output_hidden_states`) when it makes an instance of it.
        # Ours are made by a change of class, or unpickled.
        if part == "Model":
            _CAN_RECORD_REGISTRY[str(made)] = original._can_record_outputs
    return found


CLASSES: Mapping[str, Mapping[type[nn.Module], type[nn.Module]]] = {
    model_type: _classes_of(architecture) for model_type, architecture in FAMILIES.items()
}
