"""State on disk: what was saved is what is loaded, damaged or not."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from fptquant.errors import FPTQuantError
from fptquant.run.state import RunState
from fptquant.run.training import MetricsFile

SIGNATURE = {"model": "a", "recipe": "b"}


@pytest.fixture
def state(tmp_path: Path) -> Iterator[RunState]:
    with RunState(tmp_path / ".out.state", SIGNATURE) as state:
        yield state


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
    (state.directory / "signature.json").unlink()
    with pytest.raises(FPTQuantError, match="another model, recipe: finish that run"):
        RunState(state.directory, SIGNATURE)
    other = RunState(state.directory, {**SIGNATURE, "recipe": "c"}, fresh=True)
    assert state.load("x") is not None  # nothing is thrown away before the run starts
    with other:
        assert other.load("x") is None


@pytest.mark.parametrize("saved", [False, True])
def test_only_an_error_after_something_was_saved_leaves_a_state(saved: bool, tmp_path: Path) -> None:
    def run(fails: bool) -> None:
        with RunState(tmp_path / ".out.state", SIGNATURE) as state:
            (state.directory / "metrics.jsonl").write_text("{}")
            if saved:
                state.save("x", {"a": torch.zeros(1)})
            if fails:
                raise ValueError

    with pytest.raises(ValueError):
        run(fails=True)
    assert (tmp_path / ".out.state").exists() is saved
    run(fails=False)
    assert (tmp_path / ".out.state").exists()


def test_nothing_of_a_killed_run_that_saved_nothing_comes_back(tmp_path: Path) -> None:
    state = RunState(tmp_path / ".out.state", SIGNATURE)
    state.__enter__()  # and killed
    MetricsFile(state.directory / "metrics.jsonl")("local", 1, {"loss": 1.0})
    with RunState(state.directory, {**SIGNATURE, "recipe": "c"}) as other:
        assert not MetricsFile(other.directory / "metrics.jsonl").rows()


def test_metrics_after_a_line_that_was_cut_off(tmp_path: Path) -> None:
    file = tmp_path / "metrics.jsonl"
    for step in (1, 2):
        MetricsFile(file)("local", step, {"loss": 1.0})
    file.write_bytes(file.read_bytes()[:-5])
    metrics = MetricsFile(file)
    metrics("local", 2, {"loss": 3.0})
    assert [(row["step"], row["loss"]) for row in metrics.rows()] == [(1, 1.0), (2, 3.0)]
