"""What a server's user may override at start, and what not; checkpoints of format version 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from tests.conftest import bound
from tests.vllm_fptquant.loaders import in_transformers, in_vllm, one_process

GOLDEN = Path(__file__).resolve().parent.parent / "golden"

pytestmark = [pytest.mark.vllm, pytest.mark.slow]


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process():
        yield


QUANTIZATION = {"quant_method": "fptquant", "format_version": 2, "activations": {"bits": 4, "symmetric": False}}


@pytest.mark.parametrize(
    "overrides, message",
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters.rope_theta is 500000.0"),
        ({"rope_parameters": {"rope_theta": 1e4, "rope_type": "yarn", "factor": 4.0}}, "rope_parameters.factor is 4.0"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, but the weights were made for 1e-05"),
        ({"num_hidden_layers": 1}, "num_hidden_layers is 1, but the weights were made for 2"),
        ({"sliding_window": 4}, "sliding_window is 4, but the weights were made for None"),
        ({"hidden_act": "gelu"}, "hidden_act is 'gelu'"),
        (
            {"quantization_config": QUANTIZATION},
            "quantization_config.ignore is ['lm_head'], but",
        ),
        ({"max_position_embeddings": 4096}, None),
        ({"eos_token_id": 7, "bos_token_id": 3, "attention_dropout": 0.5}, None),
    ],
)
def test_hf_overrides(overrides: dict[str, Any], message: str | None) -> None:
    outcome = in_vllm(GOLDEN / "w4a4kv4", hf_overrides=overrides)
    if message is None:
        assert not isinstance(outcome, str), outcome
        assert torch.equal(outcome, in_vllm(GOLDEN / "w4a4kv4"))
    else:
        assert isinstance(outcome, str) and message in outcome and "\n" not in outcome


@pytest.mark.parametrize("name", ["v1", "sharded", "w4a16", "w4a8kv8", "experts"])
def test_every_format_feature_loads(name: str) -> None:
    assert not isinstance(in_vllm(GOLDEN / name), str), in_vllm(GOLDEN / name)


def test_a_binding_can_not_be_left_out(tmp_path: Path) -> None:
    """Only format version 1 has none; a checkpoint can't pass for one either."""
    copy = Path(shutil.copytree(GOLDEN / "w4a16", tmp_path / "copy"))
    tensors = load_file(copy / "model.safetensors")
    del tensors["fptquant_binding"]
    save_file(tensors, copy / "model.safetensors", metadata={"format": "pt"})
    for outcome in (in_transformers(copy), in_vllm(copy)):
        assert isinstance(outcome, str) and "fptquant_binding is missing from this checkpoint" in outcome


def test_a_shard_of_another_checkpoint(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN / "sharded", tmp_path / "copy"))
    name = "model.layers.1.mlp.down_proj.weight_packed"
    shard = copy / json.loads((copy / "model.safetensors.index.json").read_text())["weight_map"][name]
    tensors = load_file(shard)
    save_file({**tensors, name: tensors[name].roll(1, 0)}, shard, metadata={"format": "pt"})
    for outcome in (in_transformers(copy), in_vllm(copy)):
        assert isinstance(outcome, str) and f"{name} is not what was written into this checkpoint" in outcome


def config_field(path: str, value: Any) -> Callable[[dict[str, Any], dict[str, torch.Tensor]], None]:
    """Sets a field of config.json, or removes it."""

    def change(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        *parents, name = path.split(".")
        for parent in parents:
            config = config[parent]
        config.pop(name)
        if value is not REMOVED:
            config[name] = value

    return change


def tensor_value(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Callable[..., None]:
    def apply(config: dict[str, Any], tensors: dict[str, torch.Tensor]) -> None:
        tensors[name] = change(tensors[name]).contiguous()

    return apply


REMOVED = object()
NAN, Q, EIGHT = float("nan"), "quantization_config", {"bits": 8, "symmetric": True}
LAYER = "model.layers.0"
EDITS = {
    "T_d's block": (config_field(f"{Q}.transforms.down_hadamard.block", 4), f"{Q}.transforms.down_hadamard.block is 4"),
    "no T_d": (config_field(f"{Q}.transforms.down_hadamard", None), f"{Q}.transforms.down_hadamard.block is None"),
    "no S_n": (config_field(f"{Q}.transforms.residual_scale", False), f"{Q}.transforms.residual_scale is False"),
    "wider inputs": (config_field(f"{Q}.activations", EIGHT), f"{Q}.activations.bits is 8"),
    "KV symmetric": (config_field(f"{Q}.kv_cache.symmetric", True), f"{Q}.kv_cache.symmetric is True"),
    "another sink": (config_field(f"{Q}.sink.token", 5), f"{Q}.sink.token is 5"),
    "no sink": (config_field(f"{Q}.sink", None), f"{Q}.sink.token is None"),
    "no overrides": (config_field(f"{Q}.overrides", []), f"{Q}.overrides is"),
    "MLP ignored": (config_field(f"{Q}.ignore", ["re:.*mlp"]), f"{Q}.ignore is"),
    "no quantization": (config_field(Q, REMOVED), Q),
    "another type": (config_field("model_type", "llama"), "model_type is 'llama'"),
}  # fmt: skip
# As a writer at fault would leave them: bound to what they are.
FAULTS = {
    "sink outside": (config_field(f"{Q}.sink.token", 999), "sink.token is 999, but the vocabulary has 320"),
    "block too wide": (config_field(f"{Q}.transforms.down_hadamard.block", 16), "block is 16, which does not divide"),
    "NaN in a norm": (tensor_value("model.norm.weight", lambda t: t * NAN), "model.norm.weight holds NaN"),
    "NaN in a row": (tensor_value("model.embed_tokens.weight", lambda t: t * NAN), "embed_tokens.weight holds NaN"),
    "huge zero point": (tensor_value(f"{LAYER}.mlp.down_proj.input_zero_point", lambda t: t + 99), "outside of [-8"),
    "unequal scales": (tensor_value(f"{LAYER}.self_attn.k_proj.input_scale", lambda t: 2 * t), "must be equal in"),
    "narrow codes": (tensor_value(f"{LAYER}.mlp.up_proj.weight_packed", lambda t: t[:, 1:]), "up_proj.weight_packed"),
    "long codes": (tensor_value(f"{LAYER}.mlp.up_proj.weight_packed", lambda t: t.long()), "up_proj.weight_packed"),
    "scale of 0": (tensor_value(f"{LAYER}.self_attn.v_scale", lambda t: 0 * t), "v_scale is 0 at index 0, must be"),
    "KV scale per tensor": (tensor_value(f"{LAYER}.self_attn.k_scale", lambda t: t[:1]), "self_attn.k_scale"),
}  # fmt: skip


@pytest.mark.parametrize("name", [*EDITS, *FAULTS])
def test_config_and_tensors_that_disagree(name: str, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN / "w4a4kv4", tmp_path / "copy"))
    config, tensors = json.loads((copy / "config.json").read_text()), load_file(copy / "model.safetensors")
    change, message = {**EDITS, **FAULTS}[name]
    change(config, tensors)
    (copy / "config.json").write_text(json.dumps(config))
    save_file(
        bound(tensors, copy) if name in FAULTS else tensors, copy / "model.safetensors", metadata={"format": "pt"}
    )
    for outcome in (in_transformers(copy), in_vllm(copy)):
        assert isinstance(outcome, str) and message in outcome and "\n" not in outcome, outcome
