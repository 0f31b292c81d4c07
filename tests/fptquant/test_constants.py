"""Which layers are steady: those whose keys and values of the first token hardly depend on the token."""

from __future__ import annotations

import pytest
import torch

from fptquant.format import CheckpointConfig, Sink
from fptquant.layers.constants import record_sink
from fptquant.simulate import install_simulation
from fptquant.wiring.llama import LLAMA
from tests.conftest import VOCABULARY, build_model

_FIRST = 8  # tokens that texts start with, the constant one among them


@pytest.mark.parametrize("apart", [0.02, 1.0])
def test_constants_near_zero_are_steady_where_first_tokens_are_alike(apart: float) -> None:
    """A bias takes the constant's values away (Qwen2.5 has such layers), so that nothing is near by their own size."""
    model = build_model("bias", embedding_rms=1.0)
    generator = torch.Generator().manual_seed(1)
    embedding = model.get_input_embeddings().weight
    embedding[1:_FIRST] = embedding[0] + apart * embedding[1:_FIRST]
    layer = model.model.layers[0]
    value = layer.self_attn.v_proj
    value.bias.copy_(-value.weight @ layer.input_layernorm(embedding[0]))
    firsts = torch.randint(1, _FIRST, (16, 1), generator=generator)
    text = torch.randint(_FIRST, VOCABULARY, (16, 30), generator=generator)
    kv = {"bits": 4, "strategy": "tensor", "symmetric": False}
    install_simulation(model, LLAMA, CheckpointConfig(kv_cache=kv, sink=Sink(token=0)))
    record_sink(model, LLAMA, torch.cat((torch.zeros_like(firsts), firsts, text), 1))
    attentions = [layer.self_attn for layer in model.model.layers]
    assert float(attentions[0].v_sink.norm()) < 1e-5
    assert [int(attention.sink_steady) for attention in attentions] == [int(apart < 1)] * 2
