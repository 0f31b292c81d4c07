"""Digests of the checkpoints that every shipped recipe gives on tiny models: what a change of form must leave as it is.

    python -m tests.digests record FILE      # before, from the repository's root
    python -m tests.digests compare FILE     # after: lists what differs, exit status 1

It runs the command line, so that it means the same whatever modules are called. The digests hold on one machine and for
one version of torch.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from contextlib import redirect_stderr, redirect_stdout
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors import safe_open

import fptquant
from fptquant.cli import main
from tests.conftest import TEXT, build_model, build_tokenizer

STEPS = 3  # of each training stage, at most
BINDING = "fptquant_binding"  # has the producer's version in it, and checksums of the rest

# name: model, recipe, what is changed in it
VARIANTS: dict[str, tuple[str, str, dict[str, Any]]] = {
    "tied": ("tied", "fptquant", {"precision": "w4a4kv4"}),
    "mha": ("mha", "fptquant", {"precision": "w4a4kv4-symmetric", "sink": "none"}),
    "mqa": ("mqa", "fptquant", {"precision": "w4a8", "transforms": ["T_k", "T_v", "T_u", "T_r"]}),
    "w4a16": ("mqa", "gptq", {"precision": "w4a16"}),
    "budget": ("gqa", "fptquant", {"precision": "w4a4kv4", "budget": {"sites": 3}}),
    "output hessian": ("bias", "fptquant-light", {"rounding": {"method": "gptq", "hessian": "output"}}),
    "quantease": ("bias", "fptquant-light", {"rounding": {"method": "quantease"}, "head_bits": 16}),
    "quantized student": (
        "bias",
        "fptquant",
        {"precision": "w4a4kv4", "end_to_end": {"steps": 3, "weights": "quantized", "gradient_checkpointing": True}},
    ),
    "online teacher": (
        "gqa",
        "fptquant",
        {"end_to_end": {"steps": 2, "teacher": "online"}, "scales": {"steps": 2, "teacher": "online"}},
    ),
    "mixed": (
        "bias",
        "fptquant-light",
        {"precision": "w4a4kv8", "ignore": [r"re:.*\.0\.self_attn\.o_proj"], "head_bits": 8, "dtype": "float16"},
    ),
}


def cases() -> dict[str, tuple[str, dict[str, Any]]]:
    """Model and recipe of each case by name."""
    folder = Path(fptquant.__file__).parent / "recipes"
    shipped = {file.stem: yaml.safe_load(file.read_text(encoding="utf-8")) for file in sorted(folder.glob("*.yaml"))}
    found = {
        f"{name} {precision}": ("bias", {**recipe, "precision": precision})
        for name, recipe in shipped.items()
        for precision in ("w4a8kv8", "w4a4kv4")
    }
    for name, (model, recipe, changes) in VARIANTS.items():
        found[name] = (model, {**shipped[recipe], **changes})
    for _, recipe in found.values():
        for stage in ("local", "block_wise", "end_to_end", "codes", "scales"):
            if stage in recipe:
                recipe[stage] = {**recipe[stage], "steps": min(STEPS, recipe[stage].get("steps", STEPS))}
        recipe["calibration"] = {"source": str(TEXT), "sequences": 6, "length": 48}
        recipe["training"] = {"sequences": 4, "length": 40}
    return found


def digests(kind: str, recipe: dict[str, Any], folder: Path, arguments: list[str]) -> dict[str, str]:
    """Quantizes, and returns a digest of each tensor of the checkpoint, by file and name."""
    model = build_model(kind).to(torch.bfloat16)
    model.config.dtype = torch.bfloat16
    model.save_pretrained(folder / "model")
    build_tokenizer(bos=True).save_pretrained(folder / "model")
    (folder / "recipe.yaml").write_text(yaml.safe_dump(recipe), encoding="utf-8")
    command = [
        "quantize",
        folder / "model",
        "--output",
        folder / "out",
        "--recipe",
        folder / "recipe.yaml",
        "--quality",
        "0",
    ]
    sys.argv = ["fptquant", *map(str, command), "--quality", "0", *arguments]
    with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere), redirect_stderr(nowhere):
        try:
            main()
        except SystemExit as end:
            if end.code:
                raise
    found = {}
    for file in sorted((folder / "out").rglob("*.safetensors")):
        with safe_open(file, framework="pt") as tensors:
            for name in tensors.keys():  # noqa: SIM118 (no dict)
                if name != BINDING:
                    content = tensors.get_tensor(name)
                    key = name if file.parent.name == "out" else f"{file.name}: {name}"
                    found[key] = _digest(content)
    return found


def _digest(tensor: torch.Tensor) -> str:
    content = tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()
    return sha256(f"{tensor.dtype} {list(tensor.shape)} ".encode() + content).hexdigest()[:16]


def run(arguments: list[str], only: str = "") -> dict[str, dict[str, str]]:
    """Digests of all cases whose name contains `only`."""
    torch.set_num_threads(1)
    found = {}
    for name, (kind, recipe) in cases().items():
        if only in name:
            with tempfile.TemporaryDirectory() as folder:
                found[name] = digests(kind, recipe, Path(folder), arguments)
            print(f"{name}: {len(found[name])} tensors", file=sys.stderr, flush=True)
    return found


def differences(before: dict[str, dict[str, str]], after: dict[str, dict[str, str]]) -> list[str]:
    """One line for each case that differs."""
    lines = []
    for name, expected in before.items():
        if name in after and after[name] != expected:
            keys = expected.keys() | after[name].keys()
            differing = sorted(key for key in keys if expected.get(key) != after[name].get(key))
            lines.append(f"{name}: {len(differing)} of {len(expected)} tensors differ, the first is {differing[0]}")
    return lines


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    action, file, *options = sys.argv[1:]
    selected = os.environ.get("ONLY", "")
    measured = run(options, selected)
    if action == "record":
        Path(file).write_text(json.dumps(measured, indent=1) + "\n", encoding="utf-8")
    else:
        different = differences(json.loads(Path(file).read_text(encoding="utf-8")), measured)
        print("\n".join(different) or f"{len(measured)} checkpoints are the same")
        sys.exit(bool(different))
