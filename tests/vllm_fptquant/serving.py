"""Checkpoints to serve, and vLLM serving them."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

from fptquant import pipeline
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from tests import forkserver
from tests.conftest import TEXT, bound, build_model, build_tokenizer
from tests.vllm_fptquant.serve_tokens import serve_tokens, write_tokens
from tests.vllm_fptquant.tiny_llama import VOCAB, TinyLlama

NEW_TOKENS = 8
TOLERANCE = 1e-4  # float32 against float64; one flipped 4-bit code would show as 1e-2
TRANSFORMS = ["T_k", "T_v", "T_u", "T_r", "T_d"]


def serve(
    checkpoint: Path, prompts: list[list[int]], *, gpu: int | None = None, **options: Any
) -> subprocess.CompletedProcess[str]:
    """Runs `write_tokens` in a process of its own, which leaves its answers in `answer.json`."""
    arguments = (checkpoint / "answer.json", checkpoint, prompts, NEW_TOKENS, gpu, options)
    return forkserver.run(write_tokens, *arguments)


def served_apart(checkpoint: Path, prompts: list[list[int]], **options: Any) -> list[dict[str, Any]]:
    """The answers of `serve`."""
    process = serve(checkpoint, prompts, **options)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    found: list[dict[str, Any]] = json.loads((checkpoint / "answer.json").read_text())
    return found


def check_served(model: TinyLlama, directory: Path, *, apart: bool = False, **options: Any) -> None:
    """Tokens and log-probabilities of `model` as vLLM serves it are those of the reference.

    Args:
        model: to serve.
        directory: to write it to.
        apart: the engine has a process of its own, or is in this one (fixture `one_process`).
        options: of the engine.
    """
    checkpoint = model.write(directory / "checkpoint")
    generator = torch.Generator().manual_seed(3)
    prompts = [torch.randint(0, VOCAB, (length,), generator=generator).tolist() for length in (3, 17, 40)]
    if apart:
        answers = served_apart(checkpoint, prompts, **options)
    else:
        answers = serve_tokens(checkpoint, prompts, NEW_TOKENS, **options)
    for prompt, answer in zip(prompts, answers, strict=True):
        assert answer["tokens"] == model.greedy(prompt, NEW_TOKENS)
        # Prefill gives the prompt's rows, decoding with the KV cache the others: here one forward pass.
        expected = model.logits(torch.tensor(prompt + answer["tokens"])).log_softmax(-1)[:-1]
        served = torch.tensor(answer["logprobs"], dtype=torch.float64)
        torch.testing.assert_close(served, expected, rtol=0, atol=TOLERANCE)


def altered(checkpoint: Path) -> Path:
    """Another checkpoint of the same configuration, beside it: other values, and other experts are chosen."""
    second = Path(shutil.copytree(checkpoint, checkpoint.parent / "second"))
    tensors = load_file(checkpoint / "model.safetensors")
    for name, tensor in tensors.items():
        if name.endswith(("_scale", "_sink", "sink_output", "embed_tokens.weight")):
            tensors[name] = 1.25 * tensor
        elif name.endswith("zero_point"):
            tensors[name] = -1 - tensor
        elif name.endswith("sink_steady"):
            tensors[name] = 1 - tensor
        elif name.endswith(("weight_packed", "weight_multiplier")):
            tensors[name] = tensor.flip(1).contiguous()
        elif name.endswith("gate.weight"):
            tensors[name] = -tensor
    save_file(bound(tensors, second), second / "model.safetensors", metadata={"format": "pt"})
    return second


def quantized(path: Path, *, hidden: int = 64, intermediate: int = 128, **fields: Any) -> Path:
    """A tiny checkpoint whose second layer is steady, if it has a sink."""
    model = build_model("gqa", hidden_size=hidden, intermediate_size=intermediate, head_dim=32)
    model.save_pretrained(path / "model")
    build_tokenizer(bos=True).save_pretrained(path / "model")
    (path / "text.txt").write_text(TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    calibration = {"source": str(path / "text.txt"), "sequences": 4, "length": 64}
    recipe = Recipe.parse({"precision": "w4a4kv4", "calibration": calibration, **fields})
    pipeline.quantize(open_job(path / "model", recipe), path / "out")
    tensors = load_file(path / "out" / "model.safetensors")
    for name in tensors.keys() & {"model.layers.1.self_attn.sink_steady"}:
        tensors[name].fill_(1)
    save_file(bound(tensors, path / "out"), path / "out" / "model.safetensors", metadata={"format": "pt"})
    return path / "out"
