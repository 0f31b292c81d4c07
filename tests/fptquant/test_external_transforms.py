"""T_v and T_k, carried out by compressed-tensors from the same matrices: another implementation of the same change."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

from fptquant.recipe import Recipe
from fptquant.transforms import TransformSet
from fptquant.transforms.query_key import QueryKeyTransform
from fptquant.transforms.value import ValueTransform
from fptquant.wiring import Place, Role
from fptquant.wiring.llama import LLAMA
from tests.conftest import VOCABULARY, build_model
from tests.merging import merge_transforms

pytest.importorskip("compressed_tensors")
TOKENS = torch.randint(0, VOCABULARY, (2, 24), generator=torch.Generator().manual_seed(5))
MODEL: dict[str, Any] = {"head_dim": 16, "attention_bias": True}


@torch.no_grad()
def logits(model: LlamaForCausalLM) -> Tensor:
    found: Tensor = model(TOKENS, use_cache=True).logits
    return found


def trained(name: str, model: LlamaForCausalLM) -> TransformSet:
    """A transform at random values, the same for all heads: compressed-tensors has one matrix for a layer."""
    transforms = TransformSet(Recipe.parse({"transforms": [name]}).transforms, LLAMA.shape(model.config), 0)
    transforms.randomize_(torch.Generator().manual_seed(1), 0.3)
    with torch.no_grad():
        for parameter in transforms.parameters():
            parameter.copy_(parameter[:, :1].expand_as(parameter))
    return transforms


def carried_out(model: LlamaForCausalLM, matrices: Mapping[str, tuple[Tensor, list[dict[str, Any]]]]) -> None:
    """Has compressed-tensors apply matrices (head_dim, head_dim) at places, `TransformArgs`, of a model."""
    from compressed_tensors.transform import TransformConfig, TransformFactory

    size = int(model.config.head_dim)
    for name, (matrix, places) in matrices.items():
        described = {"type": "random-matrix", "head_dim": size, "precision": "torch.float32", "apply": places}
        scheme = TransformConfig.model_validate({"config_groups": {name: described}}).config_groups[name]
        factory = TransformFactory.from_scheme(scheme, name=name)

        def made(size: int, device: torch.device, precision: torch.dtype, matrix: Tensor = matrix) -> nn.Parameter:
            return nn.Parameter(matrix.to(precision), requires_grad=False)

        factory.weights.default_factory = made  # in place of random values
        factory.apply_to_model(model, use_tqdm=False)


def at(layer: int, module: str, location: str, *, inverse: bool = False) -> dict[str, Any]:
    return {"targets": [f"model.layers.{layer}.self_attn{module}"], "location": location, "inverse": inverse}


def key_matrices(transforms: TransformSet, layer: int, size: int) -> tuple[Tensor, Tensor]:
    """A and A^-T of a layer's first head, so that keys are k A and queries q A^-T."""
    one = torch.eye(size, dtype=torch.float64)
    (transform,) = transforms
    assert isinstance(transform, QueryKeyTransform)
    shape = transform.shape
    key, query = (
        transform.outputs(Place(role, layer), one.repeat(1, heads))[:, :size]
        for role, heads in ((Role.KEY, shape.kv_heads), (Role.QUERY, shape.heads))
    )
    return key, query


def weights(model: LlamaForCausalLM) -> dict[str, Tensor]:
    return {name: tensor for name, tensor in model.state_dict().items() if ".self_attn." in name}


def test_values() -> None:
    model, ours = build_model("gqa", **MODEL), build_model("gqa", **MODEL)
    before, transforms = logits(model), trained("T_v", model)
    (transform,) = transforms
    assert isinstance(transform, ValueTransform)
    for _ in merge_transforms(ours, LLAMA, transforms):
        pass
    for layer in range(2):
        matrix = transform.matrices(layer, torch.float64)[0][0].detach()
        places = [at(layer, ".v_proj", "weight_output"), at(layer, ".o_proj", "weight_input", inverse=True)]
        carried_out(model, {f"T_v{layer}": (matrix, places)})
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-4)
    compare(ours, model, ("v_proj", "o_proj"))


def test_keys_and_queries() -> None:
    model, ours = build_model("gqa", **MODEL), build_model("gqa", **MODEL)
    before, transforms = logits(model), trained("T_k", model)
    for _ in merge_transforms(ours, LLAMA, transforms):
        pass
    for layer in range(2):
        key, query = key_matrices(transforms, layer, 16)
        places = {f"key{layer}": (key, [at(layer, ".k_proj", "weight_output")])}
        carried_out(model, places | {f"query{layer}": (query, [at(layer, ".q_proj", "weight_output")])})
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-4)
    compare(ours, model, ("q_proj", "k_proj"))


def test_keys_and_queries_behind_rope() -> None:
    """Scaled rotations of pairs change places with RoPE: online transforms of the cache are the same."""
    model = build_model("gqa", **MODEL)
    before, transforms = logits(model), trained("T_k", model)
    for layer in range(2):
        key, query = key_matrices(transforms, layer, 16)
        places = {f"key{layer}": (key, [at(layer, "", "k_cache")])}
        carried_out(model, places | {f"query{layer}": (query, [at(layer, "", "q_attn")])})
    torch.testing.assert_close(logits(model), before, rtol=0, atol=2e-4)


@pytest.mark.parametrize("wrong", ["inverse", "shuffled"])
def test_another_pair_is_seen(wrong: str) -> None:
    """Queries need the inverse of the transpose, and a matrix in front of RoPE has to be one that RoPE lets pass."""
    model = build_model("gqa", **MODEL)
    before, transforms = logits(model), trained("T_k", model)
    key, query = key_matrices(transforms, 0, 16)
    if wrong == "inverse":
        query = key.inverse()
    else:
        order = torch.randperm(16, generator=torch.Generator().manual_seed(1))
        key, query = key[:, order], query[:, order]
    matrices = {
        "key": (key, [at(0, ".k_proj", "weight_output")]),
        "query": (query, [at(0, ".q_proj", "weight_output")]),
    }
    carried_out(model, matrices)
    assert (logits(model) - before).abs().max() > 0.05


def compare(ours: LlamaForCausalLM, theirs: LlamaForCausalLM, names: tuple[str, ...]) -> None:
    """Weights and biases of both."""
    mine, other = weights(ours), weights(theirs)
    for layer in range(2):
        for name in names:
            key = f"model.layers.{layer}.self_attn.{name}"
            torch.testing.assert_close(mine[f"{key}.weight"], other[f"{key}.weight"], rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(mine[f"{key}.bias"], other[f"{key}.bias"], rtol=1e-4, atol=1e-5)
