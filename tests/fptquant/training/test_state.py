"""State on disk: what was saved is what is loaded, damaged or not."""

from pathlib import Path

import pytest
import torch

from fptquant.errors import FPTQuantError
from fptquant.training.state import RunState

SIGNATURE = {"model": "a", "recipe": "b"}


@pytest.fixture
def state(tmp_path: Path) -> RunState:
    return RunState(tmp_path / ".out.state", SIGNATURE)


def test_newest_state_comes_back(state: RunState) -> None:
    assert state.load("x") is None
    shared = torch.arange(4.0)
    for step in (1, 2, 3):
        state.save("x", {"a": shared * step, "view": shared[1:]}, {"step": step})
    tensors, facts = state.load("x") or ({}, {})
    assert facts == {"step": 3} and torch.equal(tensors["a"], shared * 3) and torch.equal(tensors["view"], shared[1:])


@pytest.mark.parametrize("damage", ["truncated", "altered", "no note", "empty note", "gone"])
def test_damaged_state_falls_back_to_the_one_before(state: RunState, damage: str) -> None:
    for step in (1, 2):
        state.save("x", {"a": torch.full((100,), float(step))}, {"step": step})
    file, note = state.directory / "x.safetensors", state.directory / "x.json"
    content = file.read_bytes()
    if damage == "truncated":
        file.write_bytes(content[:-50])
    elif damage == "altered":
        file.write_bytes(content[:-1] + b"\x01")
    elif damage == "gone":
        file.unlink()
    elif damage == "no note":
        note.unlink()
    else:
        note.write_text("")
    found = state.load("x")
    assert found is not None and found[1] == {"step": 1} and bool((found[0]["a"] == 1).all())
    state.save("x", {"a": torch.full((100,), 3.0)}, {"step": 3})
    assert (state.load("x") or ({}, {}))[1] == {"step": 3}


def test_state_of_another_run_is_refused(state: RunState) -> None:
    state.save("x", {"a": torch.zeros(1)})
    assert RunState(state.directory, SIGNATURE).load("x") is not None
    with pytest.raises(FPTQuantError, match="another recipe: finish that run .* --fresh"):
        RunState(state.directory, {**SIGNATURE, "recipe": "c"})
    assert RunState(state.directory, {**SIGNATURE, "recipe": "c"}, fresh=True).load("x") is None
    assert not state.directory.exists()
