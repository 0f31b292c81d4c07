"""Tensor and pipeline parallelism for real: two processes on a CPU, beside this one, serve what one does."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fptquant.format import CheckpointConfig
from tests.vllm_fptquant.serve_tokens import compiled
from tests.vllm_fptquant.serving import check_served, serve
from tests.vllm_fptquant.tiny_llama import TinyLlama

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

EVERYTHING: dict[str, Any] = {
    "activations": {"bits": 4, "symmetric": False},
    "kv_cache": {"bits": 4, "strategy": "head"},
    "transforms": {
        "down_hadamard": {"block": 16},
        "input_hadamard": {"qkv": 64, "o": 64, "gate_up": 64},  # of 64, 128 and 64 channels; those of o are split
        "residual_scale": True,
    },
}


# Groups of 32 and 64 inputs; down_proj has 96, which two ranks split within one.
GROUPED: dict[str, Any] = {
    **EVERYTHING,
    "weights": {"strategy": "group", "group_size": 32},
    "overrides": [
        {"modules": "re:.*[qkvo]_proj", "weights": {"strategy": "group", "group_size": 64}},
        {"modules": "re:.*down_proj", "weights": {"strategy": "channel"}},
    ],
}


@pytest.mark.parametrize(
    ("fields", "kv_heads", "options"),
    [
        pytest.param(EVERYTHING, 2, {"tensor_parallel_size": 2}, id="tensor"),
        pytest.param(GROUPED, 2, {"tensor_parallel_size": 2}, id="tensor-groups"),
        pytest.param(
            EVERYTHING, 1, {"tensor_parallel_size": 2, **compiled("inductor")}, id="tensor-shared-head-compiled"
        ),
        pytest.param(EVERYTHING, 2, {"pipeline_parallel_size": 2, **compiled("aot_eager")}, id="pipeline-compiled"),
    ],
)
def test_served_equals_reference(
    fields: dict[str, Any], kv_heads: int, options: dict[str, Any], tmp_path: Path, forked_workers: None
) -> None:
    """Biases, per-head KV scales, S_n, T_d and T_h; float32 sums of two ranks stay within the tolerance of one.

    Inductor compiles a pipeline in test_served_sink.py; workers are spawned for mixtures.
    """
    model = TinyLlama.random(CheckpointConfig.model_validate(fields), bias=True, kv_heads=kv_heads)
    check_served(model, tmp_path, **options)


def test_split_hadamard_block_stops_the_engine_with_one_clear_line(tmp_path: Path) -> None:
    """96 channels in blocks of 32 are three blocks."""
    fields = {**EVERYTHING, "transforms": {"down_hadamard": {"block": 32}}}
    checkpoint = TinyLlama.random(CheckpointConfig.model_validate(fields)).write(tmp_path / "checkpoint")
    process = serve(checkpoint, [[1, 2, 3]], tensor_parallel_size=2, workers="fork")
    assert process.returncode != 0
    message = "down_proj: tensor-parallel size 2 leaves 48 input features to a rank, which splits the Hadamard blocks"
    assert message in process.stdout + process.stderr
