"""One thing is changed in a checkpoint: both loaders compute what they did, or say in one line what is wrong.

`FPTQUANT_FUZZ=600 pytest tests/vllm_fptquant/test_fuzz.py` runs more cases than the suite does.
"""

from __future__ import annotations

import gc
import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, event, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from tests.vllm_fptquant.loaders import Outcome, in_transformers, in_vllm, one_process

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
CHECKPOINT = GOLDEN / "w4a4kv4"  # has everything but 8-bit weights and shards
CASES = int(os.environ.get("FPTQUANT_FUZZ", "60"))

pytestmark = [pytest.mark.vllm, pytest.mark.slow]

Content = dict[str, Any]
VALUES = st.one_of(
    st.none(), st.booleans(), st.integers(-2, 2048), st.floats(-4, 4), st.sampled_from(["", "silu", "gelu", "float16"]),
    st.just([]), st.just({}), st.just([1]), st.sampled_from([8, 16, 1e-6, 10000, 1e9, 2**40]),
)  # fmt: skip
NEW_FIELDS = (
    "sliding_window", "final_logit_softcapping", "rope_theta", "rope_scaling", "layer_types", "partial_rotary_factor",
    "attention_multiplier", "logit_scale", "qk_layernorm", "num_local_experts", "torch_dtype", "text_config",
    "anything",
)  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def world() -> Iterator[None]:
    with one_process():
        yield


@pytest.fixture(scope="module")
def right() -> tuple[Outcome, Outcome]:
    outcomes = in_transformers(CHECKPOINT), in_vllm(CHECKPOINT)
    assert not any(isinstance(outcome, str) for outcome in outcomes), outcomes
    gc.collect()
    gc.freeze()  # what loading has imported
    return outcomes


def leaves(content: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Paths of all values in nested JSON, of those that hold others too."""
    items = content.items() if isinstance(content, dict) else enumerate(content) if isinstance(content, list) else ()
    for key, value in items:
        yield (*path, key)
        yield from leaves(value, (*path, key))


def change_config(folder: Path, data: st.DataObject) -> str:
    config = json.loads((folder / "config.json").read_text())
    kind = data.draw(st.sampled_from(["set", "set", "set", "delete", "add"]))
    if kind == "add":
        path: tuple[Any, ...] = (data.draw(st.sampled_from(NEW_FIELDS)),)
    else:
        path = data.draw(st.sampled_from(list(leaves(config))))
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    if kind == "delete":
        del holder[path[-1]]
    else:
        holder[path[-1]] = data.draw(VALUES)
    (folder / "config.json").write_text(json.dumps(config))
    return f"{kind} {'.'.join(map(str, path))}: {holder.get(path[-1]) if isinstance(holder, dict) else holder}"


def change_tensor(folder: Path, data: st.DataObject) -> str:
    tensors = load_file(folder / "model.safetensors")
    name = data.draw(st.sampled_from(sorted(tensors)))
    kind = data.draw(st.sampled_from(["value", "value", "value", "name", "shape", "type", "missing", "added"]))
    tensor, note = tensors[name], ""
    if kind == "name":
        names = [f"{name}x", name.removeprefix("model."), f"model.{name}", *sorted(tensors)]
        note = data.draw(st.sampled_from(names))
        tensors[note] = tensors.pop(name).clone()
    elif kind == "shape":
        flat = tensor.flatten()
        shapes = [
            flat,
            tensor[None],
            tensor.mT if tensor.dim() == 2 else flat[None],
            flat[: len(flat) // 2],
            flat.repeat(2),
        ]
        tensors[name] = data.draw(st.sampled_from(shapes)).contiguous().clone()
        note = str(list(tensors[name].shape))
    elif kind == "type":
        types = [
            torch.float32,
            torch.bfloat16,
            torch.float16,
            torch.float64,
            torch.int32,
            torch.int64,
            torch.int8,
            torch.uint8,
        ]
        dtype = data.draw(st.sampled_from(types))
        tensors[name], note = tensor.to(dtype), str(dtype)
    elif kind == "missing":
        del tensors[name]
    elif kind == "added":
        note = data.draw(st.sampled_from([f"{name}_extra", "model.layers.9.mlp.up_proj.weight", "lm_head.weight"]))
        tensors[note] = torch.zeros(3)
    else:
        index = data.draw(st.integers(0, max(tensor.numel() - 1, 0)))
        if tensor.is_floating_point():
            old = float(tensor.flatten()[index])
            new = data.draw(st.sampled_from([float("nan"), float("inf"), 0.0, -old, 2 * old, 1e30, old * 1.01, 1e-30]))
        else:
            old = int(tensor.flatten()[index])
            bits = 8 * tensor.itemsize - 2
            new = data.draw(st.sampled_from([0, -1, old + 1 if old < 100 else old - 1, old ^ 1, old ^ (1 << bits)]))
            new &= 0xFF if tensor.dtype == torch.uint8 else -1
        tensors[name].view(-1)[index] = new
        note = f"[{index}] {old} -> {new}"
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return f"{kind} {name} {note}"


def change_file(folder: Path, data: st.DataObject) -> str:
    """Bytes of a file, as a broken download or disk leaves them."""
    file = folder / data.draw(st.sampled_from(["config.json", "model.safetensors"]))
    content = bytearray(file.read_bytes())
    kind = data.draw(st.sampled_from(["truncated", "flipped", "empty"]))
    at = data.draw(st.integers(0, len(content) - 1))
    if kind == "flipped":
        content[at] ^= 1 << data.draw(st.integers(0, 7))
    file.write_bytes(content[: {"truncated": at, "empty": 0}.get(kind, len(content))])
    return f"{kind} {file.name} at {at}"


@given(data=st.data())
@settings(
    max_examples=CASES, deadline=None, derandomize=True, database=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)  # fmt: skip
def test_identical_or_one_line(data: st.DataObject, right: tuple[Outcome, Outcome]) -> None:
    change = data.draw(st.sampled_from([change_config, change_tensor, change_tensor, change_file]))
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(shutil.copytree(CHECKPOINT, Path(temporary) / "copy"))
        what = change(folder, data)
        for load, expected in ((in_transformers, right[0]), (in_vllm, right[1])):
            outcome = load(folder)
            if isinstance(outcome, str):
                event(f"{load.__name__}: {change.__name__}: refused")
                assert is_one_line(outcome), f"{what}: {load.__name__}: {outcome}"
            else:
                event(f"{load.__name__}: {change.__name__}: identical")
                assert torch.equal(outcome, expected), f"{what}: {load.__name__} computes something else"


def is_one_line(outcome: str) -> bool:
    """A line that names what is wrong. What is no checkpoint of ours any more is refused in the library's words."""
    if "does not recognize this architecture" in outcome or "Unrecognized model in" in outcome:
        return True
    return "\n" not in outcome.strip() and len(outcome.partition(": ")[2]) > 20
