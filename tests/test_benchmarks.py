"""The scripts of benchmarks/ that measure memory: random models, watched processes, tables."""

import json
import sys
from pathlib import Path

import pytest
import results
import results_page
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import memory
import memory_page
import peers
import random_model
import watch
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.run.needs import expected_needs
from random_model import Shape, shape_of
from tests.conftest import EXCERPT

TINY = Shape(layers=2, hidden=64, intermediate=176, heads=4, kv_heads=2, vocabulary=600)


def contents(folder: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in folder.iterdir()}


@pytest.mark.parametrize(
    ("name", "billions"), [("1b", 1.170), ("1b-deep", 2.139), ("8b", 8.030), ("70b", 70.554), ("2x256", 0.006)]
)
def test_shapes_have_the_sizes_of_their_models(name: str, billions: float) -> None:
    assert shape_of(name).parameters / 1e9 == pytest.approx(billions, abs=5e-4)


@pytest.mark.parametrize("name", ["9b", "0x64", "2x100"])
def test_an_unknown_shape_is_refused(name: str) -> None:
    with pytest.raises(SystemExit, match=f"shape '{name}': give one of 1b"):
        shape_of(name)


def test_a_random_model_is_a_model(tmp_path: Path) -> None:
    random_model.write(tmp_path, TINY)
    source = open_source(tmp_path)
    assert source.stored_dtype is torch.bfloat16 and not source.notes
    model = load_model(source)
    assert sum(parameter.numel() for parameter in model.parameters()) == TINY.parameters
    tokens = torch.tensor([source.tokenizer("The old man and the sea")["input_ids"]])
    assert tokens[0, 0] == 0  # the BOS
    assert 0.1 < model(tokens).logits.std() < 10


def test_a_seed_decides_every_byte_and_a_stopped_run_continues(tmp_path: Path) -> None:
    whole, stopped, other = (tmp_path / name for name in ("whole", "stopped", "other"))
    random_model.write(whole, TINY, seed=3)
    random_model.write(stopped, TINY, seed=3)
    random_model.write(other, TINY, seed=4)
    assert contents(whole) == contents(stopped)
    assert all(contents(whole)[file] != contents(other)[file] for file in contents(whole) if "-of-" in file)
    (stopped / "model.safetensors.index.json").unlink()
    (stopped / "model-00003-of-00004.safetensors").rename(stopped / "model-00003-of-00004.partial")
    kept = stopped / "model-00002-of-00004.safetensors"
    before = kept.stat().st_mtime_ns
    random_model.write(stopped, TINY, seed=3)
    assert contents(whole) == contents(stopped)
    assert kept.stat().st_mtime_ns == before


def test_a_directory_of_something_else_is_refused(tmp_path: Path) -> None:
    random_model.write(tmp_path / "model", TINY)
    (tmp_path / "notes.txt").write_text("mine")
    for folder, seed in ((tmp_path / "model", 1), (tmp_path, 0)):
        with pytest.raises(SystemExit, match="holds another model"):
            random_model.write(folder, TINY, seed)


def test_a_hollow_model_has_sizes_and_hardly_a_value(tmp_path: Path) -> None:
    shape = Shape(layers=1, hidden=1024, intermediate=4096, heads=16, kv_heads=4, vocabulary=4096)
    random_model.write(tmp_path, shape, hollow=True)
    source = open_source(tmp_path)
    assert source.weights.size == 2 * shape.parameters and not source.notes
    assert sum(file.stat().st_blocks * 512 for file in source.weights.files) < 500_000
    with safe_open(tmp_path / "model-00002-of-00003.safetensors", framework="pt") as file:
        weight = file.get_tensor("model.layers.0.mlp.up_proj.weight").flatten()
    assert weight[: random_model.HOLLOW].all() and not weight[random_model.HOLLOW :].any()


ALLOCATE = """
import pathlib, sys, time
held = b"x" * 200_000_000
pathlib.Path(sys.argv[1]).write_bytes(held[:30_000_000])
time.sleep(0.2)
print("done")
"""


def test_a_watched_process_is_measured(tmp_path: Path) -> None:
    log = tmp_path / "log"
    usage = watch.watch([sys.executable, "-c", ALLOCATE, tmp_path / "file"], log)
    assert (usage.status, usage.stopped, log.read_text()) == (0, False, "done\n")
    assert 200e6 < usage.anonymous < 300e6
    assert usage.anonymous < usage.peak < usage.anonymous + usage.mapped + 10e6
    assert usage.written >= 30e6
    assert usage.seconds > 0.2 and 0 < usage.cpu < usage.seconds + 0.1


def test_a_watched_process_that_takes_too_much_is_stopped(tmp_path: Path) -> None:
    usage = watch.watch([sys.executable, "-c", ALLOCATE, tmp_path / "file"], tmp_path / "log", limit=100_000_000)
    assert usage.stopped and usage.status == -9


def test_a_watched_process_that_fails_says_so(tmp_path: Path) -> None:
    usage = watch.watch([sys.executable, "-c", "raise SystemExit('no')"], tmp_path / "log", {"A": "1"})
    assert usage.status == 1 and not usage.stopped
    assert memory.last_words(tmp_path / "log") == "no"


def row(layers: int, hidden: int, **changes: object) -> dict[str, object]:
    sizes = {"layers": layers, "hidden": hidden, "parameters": 1_000_000_000, "source": 2_000_000_000}
    used = {"seconds": 90.0, "cpu": 60.0, "peak": 5e9, "anonymous": 3e9, "mapped": 2e9, "read": 2e9, "written": 1e9}
    ended = {"status": 0, "stopped": False, "threads": 1, "commit": "abc", "stages": {"load": 20.0}}
    return {**sizes, **used, **ended, **changes}


def test_tables_and_plot(tmp_path: Path, drawn: None) -> None:
    rows = {
        "4x64 | rtn | 4 x 256 | default": row(4, 64),
        "8x64 | rtn | 4 x 256 | default": row(8, 64, stages={"load": 30.0, "write": 50.0}),
        "8x128 | rtn | 4 x 256 | default": row(8, 128, status=-9, stopped=True, anonymous=16e9),
        "8x128 | rtn | 4 x 256 | new": row(8, 128, status=2, last_line="error: no"),
        "8x128 | rtn | 4 x 256 | newer": row(8, 128, status=-9),
    }
    lines = memory_page.table(rows).splitlines()
    assert len({line.count(" | ") for line in lines if "---" not in line}) == 1
    assert lines[2].startswith("| 4x64 | 1.000 | rtn | 4 x 256 | default | 1.5 | 1.0 | 5.00 | 2.50x | 3.00 |")
    assert "| stopped at 16.0 GB |" in lines[4] and "| failed: error: no |" in lines[5]
    assert "| killed by signal 9 at 3.0 GB or more |" in lines[6]
    assert memory_page.stage_table(rows).splitlines() == [
        "| seconds | load | write | rest |",
        "|---|---|---|---|",
        "| 4x64, rtn, 4 x 256, default | 20.0 | - | 70.0 |",
        "| 8x64, rtn, 4 x 256, default | 30.0 | 50.0 | 10.0 |",
    ]
    along = memory_page.lines_along(rows, "layers")
    assert {name: [r["layers"] for r in line] for name, line in along.items()} == {"rtn, hidden 64, 4 x 256": [4, 8]}
    assert not memory_page.lines_along(rows, "hidden")
    memory_page.plot(rows, tmp_path / "plot.svg")
    assert "rtn, hidden 64" in (tmp_path / "plot.svg").read_text()


@pytest.mark.slow
def test_memory_measures_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["memory.py", "--work", str(tmp_path), "--shapes", "1x64", "--recipes", "fptquant", "--length", "32"]
    monkeypatch.setattr(sys, "argv", [*command, "--", "--precision", "w4a4kv4"])
    memory.main()
    (found,) = json.loads((tmp_path / "memory.json").read_text()).items()
    assert found[0] == "1x64 | fptquant | 4 x 32 | --precision w4a4kv4"
    assert found[1]["status"] == 0 and {"teacher", "train scales and ranges", "write"} <= found[1]["stages"].keys()
    assert 2e8 < found[1]["anonymous"] < found[1]["peak"]
    assert not list(tmp_path.glob("*checkpoint*"))
    first = capsys.readouterr()
    memory.main()
    second = capsys.readouterr()
    assert first.out == second.out and not second.err


def test_a_peer_that_quantized_something_else_is_refused(tmp_path: Path) -> None:
    weight = torch.randn(8, 64, generator=torch.Generator().manual_seed(0))
    original = {"up_proj.weight": weight, "norm.weight": torch.ones(64)}
    rounded = {**original, "up_proj.weight": (weight * 2).round().clamp(-8, 7) / 2}

    def saved(name: str, tensors: dict[str, torch.Tensor]) -> Path:
        (tmp_path / name).mkdir()
        save_file(tensors, tmp_path / name / "model.safetensors")
        return tmp_path / name

    source = saved("source", original)
    peers.require_4_bits(source, saved("good", rounded))
    others = {
        "fewer": {"up_proj.weight": rounded["up_proj.weight"]},
        "float": original,
        "norms": {**rounded, "norm.weight": torch.zeros(64)},
    }
    for name, tensors in others.items():
        with pytest.raises(SystemExit, match=f"{name}'"):
            peers.require_4_bits(source, saved(name, tensors))


# GB of `benchmarks/memory.py --shapes 1b 1b-deep 8b --recipes rtn gptq -- --residency streamed`, at 0055060
MEASURED = {
    ("1b", "rtn"): {"rehearse": 1.27, "calibrate and round": 1.90, "write": 1.98, "read back": 1.85},
    ("1b", "gptq"): {"rehearse": 1.29, "calibrate and round": 1.94, "write": 2.08, "read back": 1.78},
    ("1b-deep", "rtn"): {"rehearse": 1.24, "calibrate and round": 1.78, "write": 1.94, "read back": 1.95},
    ("1b-deep", "gptq"): {"rehearse": 1.27, "calibrate and round": 1.99, "write": 2.01, "read back": 2.09},
    ("8b", "rtn"): {"rehearse": 3.05, "calibrate and round": 5.58, "write": 4.84, "read back": 5.37},
    ("8b", "gptq"): {"rehearse": 3.01, "calibrate and round": 5.64, "write": 4.83, "read back": 5.37},
}


@pytest.mark.parametrize("name", ["1b", "1b-deep", "8b"])
def test_expected_memory_is_what_was_measured(name: str, tmp_path: Path) -> None:
    """Within 20 %, of each stage and so of the run."""
    random_model.write(tmp_path, shape_of(name), hollow=True)
    for recipe in ("rtn", "gptq"):
        text = {"source": str(EXCERPT), "sequences": 4, "length": 256}
        chosen = Recipe.load(recipe).changed("test", calibration=text)
        needs = expected_needs(open_job(tmp_path, chosen), "streamed", 20 * 10**9)
        found = {stage: need.memory / 1e9 for stage, need in needs.items()}
        assert found == pytest.approx(MEASURED[name, recipe], rel=0.2)


def test_the_published_page_says_what_was_measured(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(results_page, "plot_table", lambda *arguments: None)
    docs = Path(__file__).parent.parent / "docs"
    rows = json.loads((docs / "results.json").read_text())
    assert results_page.write_page(rows, 40, results.ORDER, tmp_path) == (docs / "results.md").read_text()
