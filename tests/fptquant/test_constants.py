"""Which layers are steady: those whose keys and values of the first token hardly depend on the token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fptquant.format import CheckpointConfig, Sink
from fptquant.layers import constants
from fptquant.layers.constants import record_sink
from fptquant.simulate import install_simulation
from tests.conftest import VOCABULARY
from tests.families import WINDOW, build, family_of

LENGTH = 30  # of texts behind it
_FIRST = 8  # tokens that texts start with, the constant one among them


@pytest.mark.parametrize(("variant", "changes"), [("llama", {}), ("qwen2 with windows", {"max_window_layers": 0})])
@pytest.mark.parametrize("apart", [0.02, 1.0])
def test_constants_near_zero_are_steady_where_first_tokens_are_alike(
    apart: float, variant: str, changes: dict[str, Any]
) -> None:
    """A bias takes the constant's values away (Qwen2.5 has such layers), so that nothing is near by their own size.

    Windows that the first token leaves make no difference.
    """
    model, family = build(variant, **changes), family_of(variant)
    assert {family.window(model.config, layer) for layer in (0, 1)} == {WINDOW if changes else None} and WINDOW < LENGTH
    generator = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    embedding[1:_FIRST] = embedding[0] + apart * embedding[1:_FIRST]
    layer = model.model.layers[0]
    value = layer.self_attn.v_proj
    value.bias.copy_(-value.weight @ layer.input_layernorm(embedding[0]))
    firsts = torch.randint(1, _FIRST, (16, 1), generator=generator)
    text = torch.randint(_FIRST, VOCABULARY, (16, LENGTH), generator=generator)
    kv = {"bits": 4, "strategy": "tensor", "symmetric": False}
    install_simulation(model, family, CheckpointConfig(kv_cache=kv, sink=Sink(token=0)))
    record_sink(model, family, torch.cat((torch.zeros_like(firsts), firsts, text), 1))
    attentions = [layer.self_attn for layer in model.model.layers]
    assert float(attentions[0].v_sink.norm()) < 1e-5
    assert [int(attention.sink_steady) for attention in attentions] == [int(apart < 1)] * 2


@pytest.mark.parametrize(
    ("alike", "steady"),
    [
        ([0, 0, 1, 1, 1, 0], [0, 0, 1, 1, 1, 0]),  # the last layer takes them back (Qwen2.5)
        ([0, 1, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]),  # as early ones are before there are any (SmolLM2)
        ([0, 1, 0, 0, 1, 1], [0, 0, 0, 0, 1, 1]),
        ([1, 1, 0, 1, 0, 0], [1, 1, 0, 0, 0, 0]),
        ([0, 0, 0, 0, 0, 0], [0, 0, 0, 0, 0, 0]),
    ],
)
def test_the_longest_run_is_steady(alike: list[int], steady: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    model, family = build("llama", num_hidden_layers=len(alike)), family_of("llama")
    found = iter(value for flag in alike for value in ([0.1, 0.2] if flag else [0.1, 0.4]))
    monkeypatch.setattr(constants, "_deviation", lambda firsts, ordinary: next(found))
    kv = {"bits": 4, "strategy": "tensor", "symmetric": False}
    install_simulation(model, family, CheckpointConfig(kv_cache=kv, sink=Sink(token=0)))
    record_sink(model, family, torch.randint(VOCABULARY, (16, LENGTH)).index_fill(1, torch.tensor([0]), 0))
    assert [int(layer.self_attn.sink_steady) for layer in model.model.layers] == steady
