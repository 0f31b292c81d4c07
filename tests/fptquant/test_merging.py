"""Merged weights against the same transforms carried out on activations, written down again from the method."""

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fptquant.format import CheckpointConfig
from fptquant.recipe import Recipe
from fptquant.simulate.install import install_simulation, round_floats
from fptquant.transforms import TRANSFORMS, TransformSet
from fptquant.wiring import Role
from fptquant.wiring.llama import LLAMA
from tests.merging import merge_transforms

GAINS = {role: "input_layernorm" for role in (Role.QUERY, Role.KEY, Role.VALUE)} | {
    role: "post_attention_layernorm" for role in (Role.GATE, Role.UP)
}


@pytest.fixture(params=["gqa", "bias", "mqa"])
def pair(
    request: pytest.FixtureRequest, make_model: Callable[..., LlamaForCausalLM]
) -> tuple[LlamaForCausalLM, LlamaForCausalLM, TransformSet]:
    """A float64 model, its merged copy and the random transforms between them (T_d and T_h at their fixed values)."""
    model = make_model(request.param).double()
    names = [name for name in TRANSFORMS if name != "S_n"]
    transforms = TransformSet(Recipe.parse({"transforms": names}).transforms, LLAMA.shape(model.config), 0)
    transforms.randomize_(torch.Generator().manual_seed(0))
    merged = copy.deepcopy(model)
    assert list(merge_transforms(merged, LLAMA, transforms)) == [0, 1]
    return model, merged, transforms


def inputs(size: int) -> Tensor:
    return torch.randn(7, size, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def projection(model: LlamaForCausalLM, layer: int, role: Role) -> torch.nn.Linear:
    found = model.get_submodule(LLAMA.projection_name(layer, LLAMA.projection_of(role)))
    assert isinstance(found, torch.nn.Linear)
    return found


def rotate_pairs(states: Tensor, angle: Tensor, scale: Tensor) -> Tensor:
    """Method.md 1.1, element by element: states (tokens, heads, d), angle and scale (heads, d / 2)."""
    half = states.shape[-1] // 2
    out = torch.empty_like(states)
    for head in range(states.shape[1]):
        for j in range(half):
            a, b = states[:, head, j], states[:, head, j + half]
            c, s = torch.cos(angle[head, j]), torch.sin(angle[head, j])
            out[:, head, j] = scale[head, j] * (a * c - b * s)
            out[:, head, j + half] = scale[head, j] * (b * c + a * s)
    return out


def in_blocks(states: Tensor, block: int) -> Tensor:
    """Each block of (tokens, channels) times the orthonormal Hadamard matrix."""
    hadamard = torch.eye(1, dtype=torch.float64)
    while hadamard.shape[0] < block:  # Sylvester's construction
        hadamard = torch.kron(torch.tensor([[1.0, 1.0], [1.0, -1.0]], dtype=torch.float64) / 2**0.5, hadamard)
    return (states.view(len(states), -1, block) @ hadamard).flatten(1)


@torch.no_grad()
@pytest.mark.parametrize("layer", [0, 1])
@pytest.mark.parametrize("role", [projection.role for projection in LLAMA.projections])
def test_merged_equals_unmerged(
    role: Role, layer: int, pair: tuple[LlamaForCausalLM, LlamaForCausalLM, TransformSet]
) -> None:
    """T3: each projection of the merged model = the original one between transforms of input and output."""
    model, merged, transforms = pair
    shape = LLAMA.shape(model.config)
    groups = shape.heads // shape.kv_heads
    t = {name: transform for name, transform in zip(transforms.names, transforms, strict=True)}
    rotation = t["T_r"].rotation(torch.float64)
    matrix, _ = t["T_v"].matrices(layer, torch.float64)
    up_scale = t["T_u"].log_scale[layer].double().exp()
    angle, scale = t["T_k"].angle[layer].double(), t["T_k"].log_scale[layer].double().exp()
    x = inputs(projection(model, layer, role).in_features)
    y = inputs(0)
    if role in GAINS:  # reads the residual through a norm
        gain = model.get_submodule(f"model.layers.{layer}.{GAINS[role]}").weight
        norm = 0 if GAINS[role] == "input_layernorm" else 1
        norm_scale = t["T_s"].log_scale[layer, norm].double().exp()
        y = projection(model, layer, role)(x * gain)
        x = in_blocks(x @ rotation / norm_scale, t["T_h"].blocks["gate_up" if norm else "qkv"])
        merged_gain = merged.get_submodule(f"model.layers.{layer}.{GAINS[role]}").weight
        torch.testing.assert_close(merged_gain, 1 / norm_scale, rtol=1e-12, atol=0)
    elif role is Role.OUTPUT:
        y = projection(model, layer, role)(x) @ rotation
        heads = x.view(-1, shape.heads, shape.head_dim)
        x = torch.stack([heads[:, h] @ matrix[h // groups] for h in range(shape.heads)], 1).flatten(1)
    elif role is Role.DOWN:
        y = projection(model, layer, role)(x) @ rotation
        x = in_blocks(x * up_scale, t["T_d"].block)
    if role is Role.KEY:
        y = rotate_pairs(y.view(-1, shape.kv_heads, shape.head_dim), angle, scale).flatten(1)
    elif role is Role.QUERY:
        per_head = [h // groups for h in range(shape.heads)]
        y = rotate_pairs(y.view(-1, shape.heads, shape.head_dim), angle[per_head], 1 / scale[per_head]).flatten(1)
    elif role is Role.VALUE:
        heads = y.view(-1, shape.kv_heads, shape.head_dim)
        y = torch.stack([heads[:, g] @ matrix[g] for g in range(shape.kv_heads)], 1).flatten(1)
    elif role is Role.UP:
        y = y * up_scale
    torch.testing.assert_close(projection(merged, layer, role)(x), y, rtol=0, atol=1e-10)


@torch.no_grad()
def test_embedding_and_head(pair: tuple[LlamaForCausalLM, LlamaForCausalLM, TransformSet]) -> None:
    model, merged, transforms = pair
    rotation = transforms.transforms["T_r"].rotation(torch.float64)
    tokens = torch.arange(10)
    torch.testing.assert_close(merged.model.embed_tokens(tokens), model.model.embed_tokens(tokens) @ rotation)
    x = inputs(model.config.hidden_size)
    torch.testing.assert_close(merged.lm_head(x @ rotation), model.lm_head(x * model.model.norm.weight))


def test_weights_are_rounded_once(make_model: Callable[..., LlamaForCausalLM]) -> None:
    """Merging in float64 from float32 weights gives the correctly rounded float32 result."""
    model = make_model("bias")
    transforms = TransformSet(Recipe().transforms, LLAMA.shape(model.config), 0)
    transforms.randomize_(torch.Generator().manual_seed(0))
    exact, merged = copy.deepcopy(model).double(), copy.deepcopy(model)
    for target in (exact, merged):
        for _ in merge_transforms(target, LLAMA, transforms):
            pass
    for name, parameter in merged.named_parameters():
        assert torch.equal(parameter, exact.get_parameter(name).float()), name


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_round_floats_leaves_only_the_weights_to_be_quantized(
    dtype: torch.dtype, make_model: Callable[..., LlamaForCausalLM]
) -> None:
    model = make_model("bias")
    before = copy.deepcopy(model.state_dict())
    kept = "model.layers.1.mlp.down_proj"
    install_simulation(model, LLAMA, CheckpointConfig(ignore=("lm_head", kept)))
    round_floats(model, dtype)
    for name, tensor in model.state_dict().items():
        if name not in before:
            continue  # of the quantizers
        quantized = name.endswith("proj.weight") and name != f"{kept}.weight"
        assert torch.equal(tensor, before[name] if quantized else before[name].to(dtype).float()), name
    assert not torch.equal(model.lm_head.weight, before["lm_head.weight"])
