"""Makes the committed checkpoints, one for each feature of the format; existing ones are never made again.

    python -m tests.golden.make            # from the repository's root

They are what `test_golden.py` reads for ever: one is added when the format gets a feature, and none is changed.
`v1` was written by the last version with format_version 1.
"""

from __future__ import annotations

import shutil
import tempfile
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import save_torch_state_dict
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from fptquant import pipeline
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.simulate.install import set_exact
from tests.conftest import TEXT, build_model, build_tokenizer
from tests.families import VARIANTS, build

HERE = Path(__file__).resolve().parent
EXPERTS = {
    "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 24,
    "num_experts": 4, "mlp_only_layers": [0],
}  # fmt: skip
ALL = ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"]
DOWN = r"re:model\.layers\.1\.mlp\.down_proj"

# name: model, dtype of what stays in floating point, recipe
CHECKPOINTS: dict[str, tuple[str, torch.dtype, dict[str, Any]]] = {
    # asymmetric INT4 everywhere, KV per head, constant first token, both online transforms, biases, rows of 42 codes
    "v1": ("bias", torch.bfloat16, {"precision": "w4a4kv4", "kv": "head", "transforms": ALL}),
    "w4a4kv4": ("bias", torch.bfloat16, {"precision": "w4a4kv4", "kv": "head", "transforms": ALL}),
    # symmetric, no online transform, no sink; 8-bit weights and 4-bit inputs at one layer; the head in floating point
    "w4a8kv8": (
        "gqa",
        torch.float32,
        {
            "precision": "w4a8kv8", "transforms": ["T_r"], "sink": "none", "head_bits": 16,
            "overrides": [{"modules": DOWN, "weights": {"bits": 8}, "activations": {"bits": 4, "symmetric": False}}],
        },
    ),
    # weights alone, one projection ignored
    "w4a16": ("mqa", torch.float16, {"precision": "w4a16", "transforms": ["T_u"], "ignore": [DOWN]}),
    # symmetric INT4, two shards, an 8-bit head, S_n and a sink without T_d
    "sharded": (
        "mha",
        torch.bfloat16,
        {"precision": "w4a4kv4-symmetric", "transforms": ["T_r", "T_v", "T_k", "S_n"], "head_bits": 8},
    ),
    # Hadamards at the inputs of all groups, with S_n
    "hadamards": (
        "gqa",
        torch.float32,
        {"precision": "w4a8kv8", "transforms": {"T_h": {"at": ["qkv", "o", "gate_up"]}, "T_d": {}, "S_n": {}}},
    ),
    # a layer without experts, and one with a router, four experts and a shared one behind its own gate
    "experts": ("qwen2_moe", torch.bfloat16, {"precision": "w4a4kv4", "kv": "head", "transforms": ALL}),
    # multipliers for groups of 32 inputs, of 64 at q, k and v, none at one layer
    "groups": (
        "gqa",
        torch.bfloat16,
        {
            "precision": "w4a8kv8-g32", "transforms": ALL, "head_bits": 16,
            "sizes": {"hidden_size": 64, "intermediate_size": 96, "vocab_size": 320},
            "overrides": [
                {"modules": r"re:.*\.[qkv]_proj$", "weights": {"strategy": "group", "group_size": 64}},
                {"modules": DOWN, "weights": {"strategy": "channel"}},
            ],
        },
    ),
}  # fmt: skip


def tokens_of(name: str) -> torch.Tensor:
    """(2, 12) tokens; the first sequence begins with the tokenizer's BOS."""
    tokens = torch.randint(1, 320, (2, 12), generator=torch.Generator().manual_seed(len(name)))
    tokens[0, 0] = 0
    return tokens


def make(name: str, folder: Path) -> None:
    """Quantizes, and records the logits (2, 12, vocabulary) of the exact simulation beside the checkpoint."""
    kind, dtype, fields = CHECKPOINTS[name]
    fields = dict(fields)
    sizes = fields.pop("sizes", {})
    model = (build(kind, **EXPERTS) if kind in VARIANTS else build_model(kind, **sizes)).to(dtype)
    model.config.dtype = dtype
    model.save_pretrained(folder / "model")
    build_tokenizer(bos=True).save_pretrained(folder / "model")
    text = folder / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:20_000], encoding="utf-8")
    per_head = fields.pop("kv", None) == "head"
    calibration = {"source": str(text), "sequences": 4, "length": 64}
    recipe = Recipe.parse({"calibration": calibration, **fields})
    if per_head:
        precision = recipe.precision.model_dump(mode="json")
        precision["kv_cache"]["strategy"] = "head"
        recipe = recipe.changed("golden", precision=precision)
    pipeline.quantize(open_job(folder / "model", recipe), folder / "out")
    if name == "sharded":
        tensors = load_file(folder / "out" / "model.safetensors")
        (folder / "out" / "model.safetensors").unlink()
        save_torch_state_dict(tensors, folder / "out", max_shard_size="40KB", metadata={"format": "pt"})
    simulated = AutoModelForCausalLM.from_pretrained(folder / "out", dtype=torch.float32)
    set_exact(simulated)
    tokens = tokens_of(name)
    with torch.no_grad():
        logits = simulated(tokens, use_cache=False).logits
    for record in (folder / "out" / "fptquant").iterdir():
        if record.name != "logits.safetensors":
            record.unlink()  # nothing that a loader reads
    shutil.copytree(folder / "out", HERE / name)
    save_file({"tokens": tokens, "logits": logits}, HERE / f"{name}.logits.safetensors")


if __name__ == "__main__":
    for checkpoint in CHECKPOINTS:
        if not (HERE / checkpoint).exists():
            with tempfile.TemporaryDirectory() as temporary:
                make(checkpoint, Path(temporary))
