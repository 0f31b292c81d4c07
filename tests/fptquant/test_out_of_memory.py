"""Memory that runs out: one line that names the stage and the setting, and finished work is kept."""

import ctypes
import errno
import json
import os
import resource
import subprocess
import sys
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from fptquant import console
from fptquant.errors import is_out_of_memory
from tests import forkserver
from tests.conftest import EXCERPT

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")

# Of glibc's mallopt: what is freed goes back at once, or how much of earlier stages' memory a later one gets is chance.
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_ARENA_MAX = -1, -3, -8
ALLOCATOR = {M_ARENA_MAX: 1, M_MMAP_THRESHOLD: 131072, M_TRIM_THRESHOLD: 131072}

RECIPE = {
    "precision": "w4a4kv4",
    "transforms": ["T_u"],
    "rounding": {"method": "nearest"},
    "head_bits": 16,
    "calibration": {"source": str(EXCERPT), "sequences": 4, "length": 1024},
    "local": {"steps": 2},
    "training": {"sequences": 1, "length": 1024},
}


@pytest.fixture
def model(tmp_path: Path, save_model: Callable[..., Path]) -> Path:
    """Narrow but for its MLP, whose activations are what takes memory."""
    return save_model(tmp_path / "model", "gqa", intermediate_size=4096)


def limited(stage: str, megabytes: int, arguments: list[str]) -> None:
    """The command, in this process, that may take some MB more from the start of a stage on."""
    libc = ctypes.CDLL(None)
    assert all(libc.mallopt(*option) for option in ALLOCATOR.items())
    libc.malloc_trim(0)

    class Limited(console.RichStages):
        def begin(self, name: str) -> None:
            super().begin(name)
            if name == stage:
                used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
                limit = used + megabytes * 2**20
                resource.setrlimit(resource.RLIMIT_AS, (limit, limit))

    for name in ("quantize", "evaluate"):
        import_module(f"fptquant.cli.{name}").RichStages = Limited
    forkserver.fptquant(*arguments)


def command(stage: str, megabytes: int, *arguments: object) -> "subprocess.CompletedProcess[str]":
    return forkserver.run(limited, stage, megabytes, [str(argument) for argument in arguments])


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., Path]:
    """`recipe(**changes)`: a file."""

    def write(**changes: object) -> Path:
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **changes}))
        return tmp_path / "recipe.yaml"

    return write


def last_line(result: "subprocess.CompletedProcess[str]") -> str:
    assert result.returncode == 2 and "Traceback" not in result.stderr, result.stderr
    return result.stderr.strip().splitlines()[-1]


@pytest.mark.slow
def test_training_goes_on_with_what_was_finished(model: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    """The advice is taken, and the state of before goes on: the setting changes no result."""
    arguments = ("quantize", model, "-o", tmp_path / "out", "--recipe")
    result = command("train transforms end to end", 150, *arguments, recipe(end_to_end={"steps": 1}))
    assert last_line(result) == (
        "error: out of memory in stage 'train transforms end to end': set end_to_end.gradient_checkpointing: true "
        "or free some memory, and run again to continue; or lower training.length and pass --fresh"
    )
    assert not (tmp_path / "out").exists() and not list(tmp_path.glob(".out.partial*"))
    state = tmp_path / ".out.state" / "local.safetensors"
    finished = state.stat().st_mtime_ns
    changed = recipe(end_to_end={"steps": 1, "gradient_checkpointing": True})
    result = command("calibrate and round", 10, *arguments, changed)
    assert last_line(result) == (
        "error: out of memory in stage 'calibrate and round': free some memory, and run again to continue; "
        "or lower calibration.sequences or calibration.length and pass --fresh"
    )
    assert state.stat().st_mtime_ns == finished and (state.parent / "end_to_end.safetensors").is_file()
    assert command("none", 0, *arguments, changed).returncode == 0
    rows = (tmp_path / "out" / "fptquant" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(row)["stage"] for row in rows] == ["local", "local", "end_to_end"]


@pytest.mark.slow
def test_training_of_scales(model: Path, recipe: Callable[..., Path], tmp_path: Path) -> None:
    scales = {"scales": {"steps": 1, "gradient_checkpointing": True}, "local": {"steps": 0}}
    result = command(
        "train scales and ranges", 60, "quantize", model, "-o", tmp_path / "out", "--recipe", recipe(**scales)
    )
    line = last_line(result)
    assert line == (
        "error: out of memory in stage 'train scales and ranges': free some memory, and run again to continue; "
        "or lower training.length and pass --fresh"
    )
    assert len(list((tmp_path / ".out.state").glob("model.layers.*.safetensors"))) == 2
    shorter = recipe(**scales, training={"sequences": 1, "length": 16})
    result = command("none", 0, "quantize", model, "-o", tmp_path / "out", "--recipe", shorter, "--fresh")
    assert result.returncode == 0, result.stderr


@pytest.mark.slow
def test_evaluate(model: Path) -> None:
    result = command("evaluate", 10, "evaluate", model, "--text", EXCERPT, "--windows", 1, "--length", 1024)
    assert last_line(result).startswith("error: out of memory in stage 'evaluate': free some memory, and run")


def test_what_counts_as_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(error.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(OSError(errno.ENOMEM, os.strerror(errno.ENOMEM)))
    full = OSError(errno.EDQUOT, "I/O error: Disk quota exceeded (os error 122)")
    assert not is_out_of_memory(full) and not is_out_of_memory(RuntimeError("shapes differ"))
