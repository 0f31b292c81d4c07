"""A tiny checkpoint, served by vLLM, gives the log-probabilities and tokens of an independent reference."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from tests.conftest import bound
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.serve_tokens import compiled, serve_tokens
from tests.vllm_fptquant.serving import NEW_TOKENS, TOLERANCE, check_served, served_apart
from tests.vllm_fptquant.tiny_llama import VOCAB, TinyLlama
from vllm_fptquant.kernels import marlin_cutlass

HADAMARDS = {"qkv": 64, "o": 32, "gate_up": 16}
EVERYTHING: dict[str, Any] = {
    "activations": {"bits": 4, "symmetric": False},
    "kv_cache": {"bits": 4, "strategy": "head"},
    "transforms": {"down_hadamard": {"block": 32}, "input_hadamard": HADAMARDS, "residual_scale": True},
}
NO_ONLINE_TRANSFORM: dict[str, Any] = {"kv_cache": {"bits": 8, "symmetric": True}}
GROUPS = {"strategy": "group", "group_size": 32}
GROUPED: dict[str, Any] = {
    **EVERYTHING,
    "weights": GROUPS,
    "overrides": [{"modules": "re:.*[qkv]_proj", "weights": {**GROUPS, "group_size": 64}}],
}
MIXED: dict[str, Any] = {
    "activations": {"bits": 16},
    "kv_cache": {"bits": 16},
    "transforms": {"down_hadamard": {"block": 16}, "residual_scale": True},
    "overrides": [
        {"modules": "re:.*(gate|up)_proj", "activations": {"bits": 8, "symmetric": False}},
        {"modules": "model.layers.1.mlp.down_proj", "weights": {"bits": 8}, "activations": {"bits": 8}},
    ],
    "ignore": ["lm_head", "model.layers.0.self_attn.o_proj", "re:.*layers.1.self_attn.[qkv]_proj"],
}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize(
    ("fields", "bias", "kernel"),
    [
        pytest.param(EVERYTHING, True, None, id="everything"),
        pytest.param(NO_ONLINE_TRANSFORM, False, None, id="no-online-transform"),
        pytest.param(NO_ONLINE_TRANSFORM, False, "reference", id="reference-kernel"),
        pytest.param(GROUPED, True, None, id="groups"),
        pytest.param(MIXED, True, None, id="mixed"),
    ],
)
def test_served_equals_reference(
    fields: dict[str, Any], bias: bool, kernel: str | None, tmp_path: Path, one_process: None
) -> None:
    model = TinyLlama.random(CheckpointConfig.model_validate(fields), bias=bias)
    check_served(model, tmp_path, additional_config={"fptquant": {"kernel": kernel}} if kernel else {})


@pytest.mark.vllm
@pytest.mark.slow
def test_served_compiled(tmp_path: Path) -> None:
    model = TinyLlama.random(CheckpointConfig.model_validate(EVERYTHING), bias=True)
    check_served(model, tmp_path, apart=True, **compiled("inductor"))


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("backend", [None, "aot_eager"], ids=["eager", "compiled"])
def test_gpu_path(
    backend: str | None, tmp_path: Path, one_process: None, operators: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The GPU's linear layers inside vLLM's engine, their kernels emulated on the CPU, in 16 bits.

    The prompt's step widens weights for CUTLASS, those of single tokens leave them to Marlin.
    Compiled without Inductor's code, which would be a CPU's.

    A tiny random model turns 16-bit rounding into whole codes: 0.1 to 0.15 in a log-probability on average, on CPU
    kernels as well. Without S_n or T_d it would be 0.7 or more.
    """
    fields = {**EVERYTHING, "activations": {"bits": 8}, "kv_cache": {"bits": 8, "strategy": "head"}}
    model = TinyLlama.random(CheckpointConfig.model_validate(fields), bias=True)
    checkpoint = model.write(tmp_path / "checkpoint")
    prompt = torch.randint(0, VOCAB, (40,), generator=torch.Generator().manual_seed(3)).tolist()
    ours = {"kernel": "marlin-cutlass-int8", "widen_from": 8}
    options = {"dtype": "float16", "additional_config": {"fptquant": ours}}
    if backend:
        (answer,) = served_apart(checkpoint, [prompt], gpu=80, **options, **compiled(backend))
    else:
        for target, platform in gpu_emulation.pretended_platform(80):
            monkeypatch.setattr(target, platform)
        monkeypatch.setattr(marlin_cutlass, "_buffers", {})
        (answer,) = serve_tokens(checkpoint, [prompt], NEW_TOKENS, **options)
        assert gpu_emulation.accumulators and marlin_cutlass._buffers
    expected = model.logits(torch.tensor(prompt + answer["tokens"])).log_softmax(-1)[:-1]
    served = torch.tensor(answer["logprobs"], dtype=torch.float64)
    assert (served - expected).abs().mean() < 0.3


@pytest.mark.parametrize(
    "change",
    [
        {"transforms": {**EVERYTHING["transforms"], "residual_scale": False}},
        {"transforms": {**EVERYTHING["transforms"], "down_hadamard": {"block": 16}}},
        *(
            {"transforms": {**EVERYTHING["transforms"], "input_hadamard": {**HADAMARDS, group: None}}}
            for group in HADAMARDS
        ),
        {"kv_cache": {"bits": 16}},
    ],
)
def test_reference_would_notice(change: dict[str, Any]) -> None:
    """Leaving out one part moves the log-probabilities by far more than the tolerance above."""
    model = TinyLlama.random(CheckpointConfig.model_validate(EVERYTHING), bias=True)
    tokens = torch.arange(20)
    before = model.logits(tokens).log_softmax(-1)
    model.config = CheckpointConfig.model_validate({**EVERYTHING, **change})
    if "kv_cache" in change:
        model.quantizers = {key: q for key, q in model.quantizers.items() if not key.endswith((".k", ".v"))}
    after = model.logits(tokens).log_softmax(-1)
    assert (after - before).abs().max() > 100 * TOLERANCE


@pytest.mark.vllm
@pytest.mark.slow
def test_damaged_checkpoint_stops_the_engine_with_one_clear_line(tmp_path: Path, one_process: None) -> None:
    model = TinyLlama.random(CheckpointConfig.model_validate(NO_ONLINE_TRANSFORM))
    model.quantizers["model.layers.1.down"].scale.fill_(float("nan"))
    with pytest.raises(FPTQuantError, match="model.layers.1.mlp.down_proj.input_scale is nan, must be positive"):
        serve_tokens(model.write(tmp_path / "checkpoint"), [[1, 2, 3]], 1)


@pytest.mark.vllm
@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"format_version": 3}, "format_version 3, but this package reads up to 2"),
        ({"kv_cash": {}}, "kv_cash"),
    ],
)
def test_refused_before_loading(change: dict[str, Any], match: str, tmp_path: Path) -> None:
    from vllm.engine.arg_utils import EngineArgs

    checkpoint = TinyLlama.random(CheckpointConfig.model_validate(NO_ONLINE_TRANSFORM)).write(tmp_path)
    config = json.loads((checkpoint / "config.json").read_text())
    config["quantization_config"].update(change)
    (checkpoint / "config.json").write_text(json.dumps(config))
    tensors = bound(load_file(checkpoint / "model.safetensors"), checkpoint)
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    arguments = EngineArgs(str(checkpoint), dtype="float32", enforce_eager=True, skip_tokenizer_init=True)
    with pytest.raises((FPTQuantError, ValueError), match=match):
        arguments.create_engine_config()
