"""Parts of a model come and go, and nothing that is computed depends on it."""

from __future__ import annotations

import errno
import gc
import json
import os
import shutil
import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.evaluation.perplexity import layer_by_layer, transformers_scorer
from fptquant.format import pack_codes
from fptquant.layers import residency
from fptquant.layers.residency import entered, extend, make_part, recomputed, refill
from fptquant.loading import load_model, open_source
from fptquant.wiring.llama import LLAMA
from tests.conftest import build_model, build_tokenizer
from tests.fptquant.test_shipped_recipes import short
from tests.fptquant.train.test_training import TOKENS, Killed, make_job

RECIPES: dict[str, dict[str, Any]] = {
    "rtn": short("rtn"),
    "gptq": {**short("gptq"), "precision": "w4a4kv4"},
    "light": {**short("fptquant-light"), "precision": "w4a4kv4"},
    "fptquant": short("fptquant"),
    "no online transform, no sink": {**short("fptquant"), "transforms": ["T_r", "T_v"], "sink": "none"},
    "merged student": {**short("fptquant"), "end_to_end": {"steps": 2, "weights": "quantized"}},
    "layer-wise": short("omniquant"),
    "codes": {**short("fptquant-light"), "precision": "w4a4kv4", "codes": {"steps": 2, "batch": 2, "code_rate": 0.2}},
    "budget": {**short("fptquant-light"), "precision": "w4a4kv4", "budget": {"sites": 2}},
    "output hessian": {**short("gptq"), "rounding": {"method": "gptq", "hessian": "output"}},
    "compensated": {**short("fptquant-light"), "rounding": {"method": "gptq", "propagation": "compensated"}},
    "float head": {**short("gptq"), "head_bits": 16, "ignore": ["re:.*1.mlp.down_proj"]},
}


class Weighed(nn.Module):
    """A linear layer that is a part, filled with ones."""

    def __init__(self, kind: residency.Residency) -> None:
        super().__init__()
        self.linear = nn.Linear(3, 2, bias=True, device="meta")
        self.filled = 0
        make_part(self, Weighed.fill, kind)

    @staticmethod
    def fill(module: nn.Module) -> None:
        assert isinstance(module, Weighed)
        module.filled += 1
        tensors = {"linear.weight": torch.ones(2, 3), "linear.bias": torch.zeros(2)}
        residency.set_tensors(module, tensors)

    def forward(self, x: Tensor) -> Tensor:
        y: Tensor = self.linear(x)
        return y


X = torch.ones(1, 3)


def test_a_streamed_part_is_there_while_it_is_entered() -> None:
    part = Weighed("streamed")
    assert part.linear.weight.is_meta and part.filled == 0
    with entered(part):
        with entered(part):
            assert torch.equal(part(X), torch.full((1, 2), 3.0))
        assert not part.linear.weight.is_meta
    assert part.linear.weight.is_meta and part.filled == 1
    assert torch.equal(part(X), torch.full((1, 2), 3.0)) and part.filled == 2 and part.linear.weight.is_meta
    assert torch.equal(part.linear.bias, torch.zeros(2)), "vectors stay"


def test_a_resident_part_is_filled_once_and_stays() -> None:
    part = Weighed("resident")
    part(X)
    with entered(part):
        pass
    assert part.filled == 1 and not part.linear.weight.is_meta


def test_an_error_inside_leaves_nothing_behind() -> None:
    part = Weighed("streamed")
    with pytest.raises(RuntimeError):
        part(torch.ones(1, 4))
    assert part.linear.weight.is_meta
    with pytest.raises(KeyError), entered(part):
        raise KeyError
    assert part.linear.weight.is_meta


def test_a_part_that_cant_be_filled_is_not_entered() -> None:
    part = Weighed("streamed")

    def fail(module: nn.Module) -> None:
        raise FPTQuantError("gone")

    refill(part, fail)
    for _ in range(2):
        with pytest.raises(FPTQuantError, match="gone"), entered(part):
            pass
        with pytest.raises(FPTQuantError, match="gone"):
            part(X)
    refill(part, Weighed.fill)
    assert torch.equal(part(X), torch.full((1, 2), 3.0)) and part.linear.weight.is_meta


@pytest.mark.parametrize("kind", ["resident", "streamed"])
def test_a_fill_can_be_extended(kind: residency.Residency) -> None:
    part = Weighed(kind)

    def double(module: nn.Module, before: residency.Fill) -> None:
        before(module)
        module.linear.weight.mul_(2)  # type: ignore[union-attr, operator]

    extend(part, double)
    assert torch.equal(part(X), torch.full((1, 2), 6.0)) and part.filled == 1
    assert torch.equal(part(X), torch.full((1, 2), 6.0))


def test_gradients_through_layers_that_come_and_go() -> None:
    """The weights are gone when the backward pass begins, and read again."""
    parts = [Weighed("streamed"), Weighed("streamed")]
    x = torch.ones(1, 3, requires_grad=True)
    y = torch.utils.checkpoint.checkpoint(parts[0], x, use_reentrant=False)
    assert all(part.linear.weight.is_meta for part in parts)
    y.sum().backward()
    assert torch.equal(x.grad, torch.full((1, 3), 2.0)) and parts[0].filled == 2 and parts[0].linear.weight.is_meta


def test_what_isnt_a_part_is_left_alone() -> None:
    linear = nn.Linear(2, 2)
    with entered(linear) as same:
        assert same is linear
    assert not linear.weight.is_meta


def test_no_circle_keeps_a_released_model_alive(tmp_path: Path) -> None:
    """Reference counting alone lets go of a model: nothing in it waits for the garbage collector."""
    job = make_job("gqa", tmp_path)
    gc.disable()
    try:
        model = load_model(job.source, residency="streamed")
        model(TOKENS)
        watched = weakref.ref(LLAMA.layer_modules(model)[0])
        del model
        assert watched() is None
    finally:
        gc.enable()


def test_a_finished_model_is_let_go_of_before_it_is_read_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither what rode along with it nor its vectors, read from the run's state, keep it or those files in memory."""
    job = replace(make_job("gqa", tmp_path, **RECIPES["light"]), residency="streamed")
    layers, alive, made, check = [], [], pipeline.transformed, pipeline.require_read_back

    def remembered(*arguments: Any) -> Any:
        model = made(*arguments)
        layers.append(weakref.ref(LLAMA.layer_modules(model)[0]))
        return model

    def checked(*arguments: Any) -> None:
        alive.extend(layer() is not None for layer in layers)
        alive.append(".state/model.layers" in Path("/proc/self/maps").read_text())
        check(*arguments)

    monkeypatch.setattr(pipeline, "transformed", remembered)
    monkeypatch.setattr(pipeline, "require_read_back", checked)
    gc.disable()
    try:
        pipeline.quantize(job, tmp_path / "out")
    finally:
        gc.enable()
    assert alive == [False, False, False]  # the model, the original beside it, and the files


@pytest.mark.parametrize("kind", ["bias", "tied"])
def test_logits_of_a_streamed_source(kind: str, tmp_path: Path) -> None:
    source = make_job(kind, tmp_path).source
    expected = load_model(source)(TOKENS).logits
    model = load_model(source, residency="streamed")
    assert torch.equal(model(TOKENS).logits, expected)
    assert all(p.is_meta for p in model.parameters() if p.dim() > 1)


class Counter:
    """How many parts are filled at once."""

    def __init__(self, patch: pytest.MonkeyPatch) -> None:
        self.now: set[int] = set()
        self.most = 0
        fill, let_go = residency._fill, residency.release

        def filled(part: Any, module: nn.Module) -> None:
            fill(part, module)
            self.now.add(id(module))
            self.most = max(self.most, len(self.now))

        def released(module: nn.Module) -> None:
            let_go(module)
            self.now.discard(id(module))

        patch.setattr(residency, "_fill", filled)
        patch.setattr(residency, "release", released)


def quantized(job: Any, out: Path, kind: residency.Residency, **changes: Any) -> dict[str, Tensor]:
    pipeline.quantize(replace(job, residency=kind, **changes), out)
    return {
        f"{file.name}: {name}": tensor
        for file in sorted(out.rglob("*.safetensors"))
        for name, tensor in load_file(file).items()
    }


def require_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    assert not [name for name in expected if not torch.equal(found[name], expected[name])]


@pytest.mark.parametrize("name", RECIPES)
def test_streamed_equals_resident_to_the_last_bit(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {"num_hidden_layers": 3}
    make = lambda: make_job("bias", tmp_path, sizes, **RECIPES[name])  # noqa: E731 (transforms are trained in place)
    expected = quantized(make(), tmp_path / "resident", "resident")
    counter = Counter(monkeypatch)
    files: list[Tensor] = []
    monkeypatch.setattr(
        torch, "from_file", lambda *args, new=torch.from_file, **kw: files.append(t := new(*args, **kw)) or t
    )
    require_same(quantized(make(), tmp_path / "streamed", "streamed", room=8), expected)
    assert files, "hidden states are on the disk where there is no room"
    # a layer and, where the layer before is stored, that; in training the student's head and the teacher's
    assert counter.most <= 2 and not counter.now


def test_a_disk_that_is_full_of_hidden_states_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A mapped file that finds no room kills the process; so the room is asked for first."""
    job = make_job("gqa", tmp_path, **RECIPES["rtn"])
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    with pytest.raises(FPTQuantError, match="the disk of .* is full: free some space and run again"):
        quantized(job, tmp_path / "out", "streamed", room=8)
    assert not list(tmp_path.rglob("scratch*"))


def test_a_killed_streamed_run_goes_on(tmp_path: Path) -> None:
    """However often: killed behind each layer."""

    def run(name: str, kind: residency.Residency) -> dict[str, Tensor]:
        job = make_job("gqa", tmp_path, {"num_hidden_layers": 3}, **RECIPES["fptquant"])
        return quantized(job, tmp_path / name, kind)

    save = pipeline.RunState.save
    for last in range(3):

        def killed(self: Any, name: str, *arguments: Any, last: int = last) -> None:
            save(self, name, *arguments)
            if name == f"model.layers.{last}":
                raise Killed

        with pytest.MonkeyPatch.context() as patch, pytest.raises(Killed):
            patch.setattr(pipeline.RunState, "save", killed)
            run("out", "streamed")
    require_same(run("out", "streamed"), run("whole", "resident"))


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("streamed")
    quantized(make_job("bias", path, precision="w4a4kv4"), path / "out", "streamed")
    return path / "out"


def test_a_checkpoint_is_read_layer_by_layer(checkpoint: Path) -> None:
    source = open_source(checkpoint)
    windows = torch.randint(1, 300, (3, 20), generator=torch.Generator().manual_seed(0))
    whole = transformers_scorer(load_model(source))
    streamed = list(layer_by_layer(load_model(source, residency="streamed"), LLAMA, windows))
    assert all(torch.equal(found, whole(window)) for found, window in zip(streamed, windows, strict=True))


@pytest.mark.parametrize(
    "name", ["model.layers.1.mlp.up_proj.weight_packed", "model.norm.weight", "lm_head.weight_scale"]
)
def test_altered_tensors_are_refused_when_they_are_read(name: str, checkpoint: Path, tmp_path: Path) -> None:
    out = tmp_path / "altered"
    shutil.copytree(checkpoint, out)
    tensors = load_file(out / "model.safetensors")
    tensors[name] = tensors[name].clone()
    tensors[name].view(-1)[0] += 1
    save_file(tensors, out / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(FPTQuantError, match=f"{name} is not what was written"):
        load_model(open_source(out), residency="streamed")(TOKENS)


def test_a_file_that_vanishes_while_a_model_is_streamed(tmp_path: Path) -> None:
    source = make_job("gqa", tmp_path).source
    model = load_model(source, residency="streamed")
    for file in source.weights.files:
        file.unlink()
    with pytest.raises(FPTQuantError, match="can't be read any more .* run again to continue"):
        model(TOKENS)


def test_recomputed_layers_leave_a_model_as_it_was(tmp_path: Path) -> None:
    model = load_model(make_job("gqa", tmp_path).source, residency="streamed")
    layers = LLAMA.layer_modules(model)
    with recomputed(model, layers, always=False):
        assert all(layer.training for layer in layers) and not model.training
    assert not any(layer.training or layer.gradient_checkpointing for layer in layers)


def test_what_another_tool_quantized_is_in_memory(tmp_path: Path) -> None:
    """`evaluate` asks for a streamed model, whatever it is given."""
    model = build_model("gqa")
    tensors: dict[str, Tensor] = {}
    for name, tensor in model.state_dict().items():
        if name.endswith("proj.weight"):
            scale = tensor.abs().amax(1, keepdim=True) / 127
            tensors[f"{name}_packed"] = pack_codes((tensor / scale).round(), 8)
            tensors |= {f"{name}_scale": scale, f"{name}_shape": torch.tensor(tensor.shape)}
        else:
            tensors[name] = tensor.contiguous()
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
    config = {
        **model.config.to_dict(),
        "quantization_config": {
            "quant_method": "compressed-tensors",
            "format": "pack-quantized",
            "quantization_status": "compressed",
            "ignore": ["lm_head"],
            "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}},
        },
    }
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    build_tokenizer(bos=True).save_pretrained(tmp_path)
    source = open_source(tmp_path)
    expected = load_model(source)(TOKENS).logits
    assert torch.equal(load_model(source, residency="streamed")(TOKENS).logits, expected)
    assert (expected - model(TOKENS).logits).abs().max() < 0.1 * expected.abs().max()
