"""Which layers are steady: those whose keys and values of the first token hardly depend on the token."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from fptquant.format import CheckpointConfig, Sink
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


def test_a_layer_that_is_not_steady_leaves_others_as_they_are() -> None:
    """The last layer's values are of one channel, in which only tokens differ that texts start with."""
    model, family = build("llama"), family_of("llama")
    embedding = model.get_input_embeddings().weight
    embedding[1:_FIRST] = embedding[0] + 0.02 * embedding[1:_FIRST]
    embedding[_FIRST:, 0] = 0.0
    for writing in (model.model.layers[0].self_attn.o_proj, model.model.layers[0].mlp.down_proj):
        writing.weight[0] = 0.0
        if writing.bias is not None:
            writing.bias[0] = 0.0
    model.model.layers[-1].self_attn.v_proj.weight[:, 1:] = 0.0
    generator = torch.Generator().manual_seed(1)
    firsts = torch.randint(1, _FIRST, (16, 1), generator=generator)
    text = torch.randint(_FIRST, VOCABULARY, (16, LENGTH), generator=generator)
    kv = {"bits": 4, "strategy": "tensor", "symmetric": False}
    install_simulation(model, family, CheckpointConfig(kv_cache=kv, sink=Sink(token=0)))
    record_sink(model, family, torch.cat((torch.zeros_like(firsts), firsts, text), 1))
    assert [int(layer.self_attn.sink_steady) for layer in model.model.layers] == [1, 0]
