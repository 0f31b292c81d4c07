"""Committed checkpoints, one for each feature of the format, compute what they did on the day they were written.

This file runs on whatever versions of torch and transformers are installed, and needs nothing but pytest beside them.
"""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from fptquant.loading import load_model, open_source
from fptquant.simulate.install import exactly

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
NAMES = sorted(path.parent.name for path in GOLDEN.glob("*/config.json"))


def test_every_feature_is_there() -> None:
    assert NAMES == ["experts", "groups", "hadamards", "sharded", "v1", "w4a16", "w4a4kv4", "w4a8kv8"]


@pytest.mark.parametrize("name", NAMES)
def test_recorded_logits(name: str) -> None:
    """Exact mode leaves the rounding of norms and activations, which moves logits by 1e-6; a code that is read wrongly
    moves them by more than 1e-2."""
    recorded = load_file(GOLDEN / f"{name}.logits.safetensors")
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / name, dtype=torch.float32)
    with torch.no_grad(), exactly(model):
        logits = model(recorded["tokens"], use_cache=False).logits
    torch.testing.assert_close(logits, recorded["logits"], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", NAMES)
def test_loads_as_the_command_loads_it(name: str) -> None:
    """With the comparison of the logits that the checkpoint itself has recorded."""
    load_model(open_source(GOLDEN / name))
