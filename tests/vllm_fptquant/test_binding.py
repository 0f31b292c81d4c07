"""What a server's user may override at start, and what not; checkpoints of format version 1."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

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


@pytest.mark.parametrize("name", ["v1", "sharded", "w4a16", "w4a8kv8"])
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
