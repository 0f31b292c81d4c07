"""What vLLM's engine answers as an embedding model, and after other weights were loaded, is the reference's."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from fptquant.format import CheckpointConfig
from tests.conftest import ROOT, build_tokenizer
from tests.vllm_fptquant.serving import NEW_TOKENS, TOLERANCE
from tests.vllm_fptquant.tiny_llama import HIDDEN, VOCAB, TinyLlama

FIELDS: dict[str, Any] = {
    "activations": {"bits": 4, "symmetric": False},
    "kv_cache": {"bits": 4, "strategy": "head"},
    "transforms": {"down_hadamard": {"block": 32}, "residual_scale": True},
}


@pytest.mark.vllm
@pytest.mark.slow
def test_embeddings_and_other_weights(tmp_path: Path) -> None:
    models = [TinyLlama.random(CheckpointConfig.model_validate(FIELDS), seed=seed) for seed in range(2)]
    first, second = (str(model.write(tmp_path / str(index))) for index, model in enumerate(models))
    build_tokenizer(bos=False).save_pretrained(first)  # vLLM embeds nothing without one
    prompts = [[1, 2, 3], [4, 5, 6, 7, 8, 9, 10, 11]]
    output = tmp_path / "answer.json"
    command = [sys.executable, "-m", "tests.vllm_fptquant.serve_again", first, second, json.dumps(prompts), str(output)]
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=600, env={**os.environ, "PYTHONPATH": paths}
    )
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    answer = json.loads(output.read_text())
    for name, model in zip(("first", "second"), models, strict=True):
        assert answer[name] == [model.greedy(prompt, NEW_TOKENS) for prompt in prompts]
    models[0].weights["lm_head.weight"] = torch.eye(VOCAB, HIDDEN)  # logits are the hidden states then
    for prompt, embedding in zip(prompts, answer["embeddings"], strict=True):
        hidden = models[0].logits(torch.tensor(prompt))[-1, :HIDDEN]
        served = torch.tensor(embedding, dtype=torch.float64)
        torch.testing.assert_close(served, hidden / hidden.norm(), rtol=0, atol=TOLERANCE)
