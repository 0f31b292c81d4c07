"""Everything runs on another device than the CPU, and writes what the CPU writes."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from fptquant import pipeline
from fptquant.console import plan_table
from fptquant.devices import CPU, choose_device, free_memory
from fptquant.errors import FPTQuantError, is_device_lost, is_out_of_memory
from fptquant.layers.ahead import ReadAhead
from fptquant.layers.residency import Residency
from fptquant.loading import load_model, open_source
from fptquant.options.device import KINDS, require_device_name
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.report import ranges, training
from fptquant.run.job import Job, open_job
from fptquant.run.memory import choose_residency
from fptquant.run.needs import expected_host_memory, expected_memory
from tests.fptquant.conftest import Run
from tests.fptquant.emulated_cuda import CUDA, MEMORY, EmulatedCuda, emulated_cuda
from tests.fptquant.test_golden import GOLDEN
from tests.fptquant.test_residency import RECIPES
from tests.fptquant.train.test_training import Killed, make_job

COARSE = {  # searches with few candidates, to be quick
    "weight_range": {"grid": 4},
    "activation_range": {"grid": 4},
    "kv_range": {"grid": 4},
    "calibration": {"sequences": 3, "length": 16},
    "training": {"sequences": 2, "length": 12, "save_every": 1},
}
W4A4 = {"precision": "w4a4kv4"}
CASES: dict[str, tuple[Residency, dict[str, Any]]] = {
    "rtn": ("resident", RECIPES["rtn"]),
    "gptq": ("streamed", RECIPES["gptq"]),
    "fptquant": ("streamed", {**RECIPES["fptquant"], **W4A4}),
    "merged student": ("resident", {**RECIPES["merged student"], **W4A4}),
    "layer-wise": ("streamed", RECIPES["layer-wise"]),
    "budget": ("resident", RECIPES["budget"]),
    "output hessian": ("streamed", RECIPES["output hessian"]),
}


@pytest.fixture(scope="module", autouse=True)
def transformers_ready() -> None:
    """What transformers sets up with the first checkpoint that it loads is broken if that happens on the device."""
    load_model(open_source(GOLDEN / "w4a4kv4"))


@pytest.fixture(autouse=True)
def no_plots(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ranges, "plot_ranges", lambda *arguments: None)
    monkeypatch.setattr(training, "plot_losses", lambda *arguments: None)


@pytest.fixture
def cuda() -> Iterator[EmulatedCuda]:
    with emulated_cuda() as device:
        yield device


def job_on(device: str, path: Path, residency: Residency, fields: dict[str, Any]) -> Job:
    """A quick job; its calibration text is that of `make_job`."""
    if not (path / "model").is_dir():
        make_job("bias", path)
    calibration = {**COARSE["calibration"], "source": str(path / "text.txt")}
    recipe = Recipe.parse({**fields, **COARSE, "calibration": calibration})
    return replace(open_job(path / "model", recipe, device=choose_device(device)), residency=residency)


def written(out: Path) -> dict[str, Tensor]:
    files = sorted(out.rglob("*.safetensors"))
    return {f"{file.name}: {name}": tensor for file in files for name, tensor in load_file(file).items()}


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("name", CASES)
def test_a_run_on_a_device_writes_what_the_cpu_writes(name: str, tmp_path: Path) -> None:
    residency, fields = CASES[name]
    pipeline.quantize(job_on("cpu", tmp_path, residency, fields), tmp_path / "cpu")
    with emulated_cuda() as cuda:
        job = job_on("cuda", tmp_path, residency, fields)
        assert job.device == CUDA and job.windows.is_cuda
        pipeline.quantize(job, tmp_path / "cuda")
    assert cuda.operators > 1000
    require_same(written(tmp_path / "cuda"), written(tmp_path / "cpu"))


def test_a_run_goes_on_on_another_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed in every stage, it goes on in turns on the CPU and on the device."""
    fields = {**RECIPES["fptquant"], **W4A4}
    pipeline.quantize(job_on("cpu", tmp_path, "streamed", fields), tmp_path / "cpu")
    save = pipeline.RunState.save
    for killed_at in ("local", "end_to_end", "model.layers.0", "scales"):

        def killed(self: Any, name: str, *arguments: Any, killed_at: str = killed_at) -> None:
            save(self, name, *arguments)
            if name == killed_at:
                raise Killed

        device = "cpu" if killed_at in ("local", "model.layers.0") else "cuda"
        with emulated_cuda(), monkeypatch.context() as patch, pytest.raises(Killed):
            patch.setattr(pipeline.RunState, "save", killed)
            pipeline.quantize(job_on(device, tmp_path, "streamed", fields), tmp_path / "out")
    with emulated_cuda():
        found = pipeline.quantize(job_on("cuda", tmp_path, "streamed", fields), tmp_path / "out", quality=1)
    require_same(written(tmp_path / "out"), written(tmp_path / "cpu"))
    assert found.quality is not None and not found.notes


def test_commands_on_a_device(tmp_path: Path, run: Run) -> None:
    """Each prints what it prints on the CPU."""
    job = job_on("cpu", tmp_path, "resident", {**RECIPES["rtn"], **W4A4})
    pipeline.quantize(job, tmp_path / "out")
    text, recipe = tmp_path / "text.txt", tmp_path / "out" / "fptquant" / "recipe.yaml"
    commands = {
        "verify": (tmp_path / "out", "--against", tmp_path / "model", "--text", text, "--windows", 2, "--length", 16),
        "evaluate": (tmp_path / "out", "--text", text, "--windows", 2, "--length", 16),
        "sensitivity": (tmp_path / "model", "--recipe", recipe, "--sequences", 2, "--windows", 1, "--length", 16),
    }
    kinds = ("--kinds", "qkv_input,o_weights,keys", "--calibration", text)
    options: dict[str, tuple[object, ...]] = {"verify": ("--no-vllm",), "evaluate": (), "sensitivity": kinds}

    def results(device: str) -> list[str]:
        found = []
        for name, arguments in commands.items():
            result = run(name, *arguments, *options[name], "--device", device)
            assert result.code == 0, result.err
            found.append("".join(line for line in result.out.splitlines(True) if "seconds" not in line))
        return found

    expected = results("cpu")
    with emulated_cuda() as cuda:
        assert results("cuda") == expected
    assert cuda.operators > 1000


MIXED = {
    "sum": lambda x, y: x + y,
    "product": lambda x, y: nn.functional.linear(x, y),
    "cat": lambda x, y: torch.cat((x, y)),
    "where": lambda x, y: torch.where(x > 0, x, y),
    "number that can't be": lambda x, y: torch.clamp(x, y.sum(), y.sum()),
    "index of the CPU's": lambda x, y: y[torch.zeros(1, dtype=torch.int64, device=x.device)],
    "in a gradient": lambda x, y: (x.clone().requires_grad_() * x).backward(y),
    "numpy": lambda x, y: x.numpy(),
    "generator": lambda x, y: torch.randn(2, generator=torch.Generator(), device="cuda"),
}


@pytest.mark.parametrize("name", MIXED)
def test_what_mixes_devices_is_noticed(name: str, cuda: EmulatedCuda) -> None:
    x, y = torch.ones(2, 2, device="cuda"), torch.ones(2, 2)
    with pytest.raises((RuntimeError, TypeError), match="device"):
        MIXED[name](x, y)


def test_what_cuda_allows(cuda: EmulatedCuda) -> None:
    x, y = torch.tensor([[1.0, 2.0]], device="cuda"), torch.tensor([[3.0, 4.0]])
    assert (x + torch.tensor(1.0)).is_cuda and x[torch.tensor([0])].is_cuda and x.view(2).is_cuda
    assert torch.equal(x.cpu(), torch.tensor([[1.0, 2.0]])) and x.copy_(y).is_cuda and x.tolist() == y.tolist()
    weight = nn.Parameter(x)
    (weight * y.to(x)).sum().backward()
    assert weight.grad is not None and weight.grad.is_cuda and not y.is_cuda


def test_one_tensor_left_behind_fails_the_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from fptquant.layers import inputs

    monkeypatch.setattr(inputs.LayerInputs, "advance", lambda self, layer: self.hidden.append(layer(torch.ones(1, 8))))
    with emulated_cuda(), pytest.raises(RuntimeError, match="to be on the same device"):
        pipeline.quantize(job_on("cuda", tmp_path, "resident", RECIPES["gptq"]), tmp_path / "out")


@pytest.mark.parametrize(
    "name, message",
    [
        ("cuda", "--device: 'cuda' is not here: torch .* finds none beside the CPU; .* or give --device cpu"),
        ("cuda:3", "--device: 'cuda:3' is not here"),
        ("mps", "--device: 'mps' is not here"),
        ("gpu", "--device: 'gpu' is no device: give auto, cpu, cuda, or one of several, as cuda:1"),
        ("cuda:x", "--device: 'cuda:x' is no device"),
    ],
)
def test_a_device_that_isnt_there(name: str, message: str) -> None:
    with pytest.raises(FPTQuantError, match=message):
        choose_device(name)
    assert choose_device("auto") == choose_device("cpu") == CPU


def test_kinds_are_those_that_torch_names() -> None:
    with pytest.raises(RuntimeError) as error:
        torch.device("nonsense")
    listed = re.search("one of (.*) device type", str(error.value))
    assert listed and set(listed[1].split(", ")) <= KINDS


def test_kinds_that_a_package_brings_are_left_to_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(FPTQuantError, match="'npu' is no device"):
        require_device_name("npu")
    package = tmp_path / "torch_npu-1.0.dist-info"
    package.mkdir()
    (package / "METADATA").write_text("Metadata-Version: 2.1\nName: torch_npu\nVersion: 1.0\n")
    (package / "entry_points.txt").write_text("[torch.backends]\ntorch_npu = torch_npu:_autoload\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert require_device_name("npu") == "npu"


def test_the_device_is_chosen_before_any_work(tmp_path: Path, run: Run) -> None:
    model = tmp_path / "model"
    model.mkdir()
    text = tmp_path / "text.txt"
    text.write_text("A text.")
    (model / "config.json").write_text("{}")  # of a model whose files nobody has looked at yet
    for command in (("quantize", model, "-o", tmp_path / "out"), ("evaluate", model, "--text", text)):
        result = run(*command, "--device", "cuda")
        assert result.code == 2 and "--device: 'cuda' is not here" in " ".join(result.err.split())
    result = run("evaluate", model, "--text", text, "--backend", "vllm", "--device", "cpu")
    assert result.code == 2 and "vLLM chooses the device itself" in " ".join(result.err.split())


def test_devices_that_are_there(cuda: EmulatedCuda, monkeypatch: pytest.MonkeyPatch) -> None:
    assert choose_device("auto") == choose_device("cuda") == choose_device("cuda:0") == CUDA
    assert choose_device("cpu") == CPU and free_memory(CUDA) == MEMORY
    with pytest.raises(FPTQuantError, match="--device cuda:1: there is no cuda:1, the last is cuda:0: give that"):
        choose_device("cuda:1")
    monkeypatch.setenv("LOCAL_RANK", "1")  # of two processes with one GPU
    with pytest.raises(FPTQuantError, match="--device auto: there is no cuda:1"):
        choose_device("auto")


def test_a_device_without_float64(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda: torch.device("mps"))
    with pytest.raises(FPTQuantError, match=r"--device mps: mps:0 can't be used \(.*\): give another one"):
        choose_device("mps")
    assert choose_device("auto") == CPU


def test_memory_is_that_of_the_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = expected_memory(job_on("cpu", tmp_path, "resident", RECIPES["rtn"]), "resident", 10**12)
    with emulated_cuda():
        job = job_on("cuda", tmp_path, "resident", RECIPES["rtn"])
        whole = expected_memory(job, "resident", 10**12)
        assert choose_residency(job, None, None) == choose_residency(job, None, whole) == "resident"
        assert choose_residency(job, None, whole - 1) == "streamed"
        monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (whole - 1, MEMORY))
        assert choose_residency(job, None, None) == "streamed"
        columns = plan_table(job, {}).columns
        rows = dict(zip(*([str(cell) for cell in column.cells] for column in columns), strict=True))
    assert rows["device"] == "cuda:0" and "more than" in rows["memory of the device"]
    assert rows["memory of the machine"].startswith("about 0.6 GB") and expected_host_memory(job) > 600_000_000
    assert whole != on_cpu


class Lost(RuntimeError):
    """Stands for `torch.AcceleratorError`, which newer torch has."""


Lost.__name__ = "AcceleratorError"


@pytest.mark.parametrize(
    "error, message",
    [
        (
            torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB."),
            "out of memory in stage 'a': free some memory on the device, or take --residency streamed or --device cpu, "
            "and run again to continue; or lower it",
        ),
        (
            RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
            "out of memory in stage 'a': free some memory, and run again to continue; or lower it",
        ),
        (
            Lost("CUDA error: unspecified launch failure\nCompile with TORCH_USE_CUDA_DSA"),
            "the device failed in stage 'a' (CUDA error: unspecified launch failure): run again to continue, on "
            "--device cpu if it fails there again",
        ),
    ],
)
def test_a_device_that_fails_in_a_stage(error: Exception, message: str) -> None:
    with pytest.raises(FPTQuantError) as raised, Stages().stage("a", "lower it"):
        raise error
    assert str(raised.value) == message
    assert is_out_of_memory(error) is not is_device_lost(error)


def test_finished_layers_outlive_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fields = RECIPES["gptq"]
    pipeline.quantize(job_on("cpu", tmp_path, "streamed", fields), tmp_path / "cpu")
    save = pipeline.RunState.save

    def fail(self: Any, name: str, *arguments: Any) -> None:
        if name == "model.layers.1":
            raise Lost("CUDA error: device lost")
        save(self, name, *arguments)

    with emulated_cuda(), monkeypatch.context() as patch:
        patch.setattr(pipeline.RunState, "save", fail)
        with pytest.raises(FPTQuantError, match="the device failed in stage 'calibrate and round'"):
            pipeline.quantize(job_on("cuda", tmp_path, "streamed", fields), tmp_path / "out")
    assert (tmp_path / ".out.state" / "model.layers.0.safetensors").is_file()
    pipeline.quantize(job_on("cpu", tmp_path, "streamed", fields), tmp_path / "out")
    require_same(written(tmp_path / "out"), written(tmp_path / "cpu"))


def test_layers_are_read_ahead() -> None:
    """Forward, backward, and forward again: what was guessed right is read once."""
    read: list[int] = []

    def layer(index: int) -> list[tuple[str, Tensor]]:
        read.append(index)
        return [("weight", torch.full((1,), float(index)))]

    ahead = ReadAhead(layer, 4)
    asked = [0, 1, 2, 3, 3, 2, 1, 0, 0, 1, 2, 3, 0, 1, 2, 3]
    for index in asked:
        assert ahead(index)[0][1].item() == index
    assert sorted(read) == sorted(asked)
    assert ahead(1)[0][1].item() == 1 and len(read) <= len(asked) + 2  # a guess may be wrong


def test_what_fails_ahead_is_told_when_it_is_wanted() -> None:
    def layer(index: int) -> list[tuple[str, Tensor]]:
        if index:
            raise FPTQuantError("gone")
        return []

    ahead = ReadAhead(layer, 3)
    assert ahead(0) == []
    with pytest.raises(FPTQuantError, match="gone"):
        ahead(1)


def losses(out: Path) -> dict[tuple[str, int], float]:
    rows = map(json.loads, (out / "fptquant" / "metrics.jsonl").read_text(encoding="utf-8").splitlines())
    return {(row["stage"], row["step"]): row["loss"] for row in rows}


def test_training_in_bfloat16(tmp_path: Path) -> None:
    """What rounding to 16 bits does to the losses is far below what 4-bit weights do."""
    steps = {"end_to_end": {**RECIPES["fptquant"]["end_to_end"], "batch": 4}}
    fields = {**RECIPES["fptquant"], **steps, "scales": {**RECIPES["fptquant"]["scales"], "batch": 4}}
    found = []
    for dtype in ("auto", "bfloat16"):
        job = job_on("cpu", tmp_path, "resident", fields)
        recipe = job.recipe.changed(training={"compute_dtype": dtype, "sequences": 4, "length": 48})
        job = open_job(job.source.path, recipe)
        pipeline.quantize(job, tmp_path / dtype)
        found.append((losses(tmp_path / dtype), job.signature()))
    (exact, signature), (rounded, other) = found
    assert exact.keys() == rounded.keys() and signature["recipe"] != other["recipe"]
    for (stage, step), loss in exact.items():
        assert rounded[stage, step] == pytest.approx(loss, rel=0.1, abs=1e-3)
        assert stage == "local" or rounded[stage, step] != loss


def test_a_compute_dtype_that_nothing_uses(run: Run, model_dir: Path, tmp_path: Path) -> None:
    arguments = ("quantize", model_dir, "-o", tmp_path / "out", "--recipe", "gptq", "--compute-dtype")
    result = run(*arguments, "bfloat16")
    assert result.code == 2 and "nothing is trained end to end: leave it out" in " ".join(result.err.split())
    result = run(*arguments, "float16")
    assert result.code == 2 and "--compute-dtype" in result.err
