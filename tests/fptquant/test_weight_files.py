"""Which files of a directory are the model: read from where the index says, and refused where readers could differ."""

import json
import multiprocessing
import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from fptquant.errors import FPTQuantError
from fptquant.loading import load_model, open_source
from fptquant.weight_files import WeightFiles

SaveModel = Callable[..., Path]
Damage = Callable[[Path], object]
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
NORM, EMBEDDING = "model.norm.weight", "model.embed_tokens.weight"
TOKENS = torch.arange(12)[None]


def save(tensors: dict[str, torch.Tensor], file: Path) -> None:
    save_file(tensors, file, {"format": "pt"})


def change(file: Path, edit: Callable[[dict[str, torch.Tensor]], object]) -> None:
    tensors = load_file(file)
    edit(tensors)
    save(tensors, file)


def change_map(model: Path, **entries: object) -> None:
    index = json.loads((model / INDEX).read_text())
    index["weight_map"].update({name.replace("__", "."): place for name, place in entries.items()})
    (model / INDEX).write_text(json.dumps(index))


def shard(model: Path) -> Path:
    """Splits `model.safetensors` in two, with an index."""
    tensors = load_file(model / SINGLE)
    place = {name: FIRST if "layers.0" in name else SECOND for name in tensors}
    for file in (FIRST, SECOND):
        save({name: tensor for name, tensor in tensors.items() if place[name] == file}, model / file)
    (model / INDEX).write_text(json.dumps({"metadata": {"total_size": 1}, "weight_map": place}))
    (model / SINGLE).unlink()
    return model


@pytest.fixture
def single(save_model: SaveModel, tmp_path: Path) -> Path:
    return save_model(tmp_path / "model", "gqa")


@pytest.fixture
def sharded(single: Path) -> Path:
    return shard(single)


def logits(model: Path) -> torch.Tensor:
    result: torch.Tensor = load_model(open_source(model))(TOKENS).logits
    return result


def test_files_that_are_no_part_of_the_model_change_nothing(single: Path) -> None:
    whole = load_file(single / SINGLE)
    expected = logits(single)
    for model in (single, shard(single)):
        before = open_source(model)
        assert torch.equal(logits(model), expected)
        others = {name: torch.full_like(tensor, 9.0) for name, tensor in whole.items()}
        save(others, model / "consolidated.safetensors")
        save(others, model / "model.fp16.safetensors")
        (model / "model.gguf").write_bytes(b"GGUF")
        (model / "pytorch_model.bin").write_bytes(b"x")
        after = open_source(model)
        assert torch.equal(logits(model), expected) and after.notes == ()
        assert after.fingerprint() == before.fingerprint() and after.weights.size == before.weights.size


def test_shards_of_an_earlier_upload_are_left_alone(sharded: Path) -> None:
    expected = logits(sharded)
    save({NORM: torch.zeros(32)}, sharded / "model-00001-of-00001.safetensors")
    assert torch.equal(logits(sharded), expected)


def test_an_index_of_one_file(single: Path) -> None:
    expected = logits(single)
    place = dict.fromkeys(load_file(single / SINGLE), SINGLE)
    (single / INDEX).write_text(json.dumps({"weight_map": place}))
    assert torch.equal(logits(single), expected)


def stale(model: Path) -> None:
    tensors = {**load_file(model / FIRST), **load_file(model / SECOND)}
    save({name: torch.zeros_like(tensor) for name, tensor in tensors.items()}, model / SINGLE)


def twice_in_the_index(model: Path) -> None:
    text = (model / INDEX).read_text()
    (model / INDEX).write_text(text.replace('"weight_map": {', f'"weight_map": {{"{NORM}": "{FIRST}", '))


def same_name_in_capitals(model: Path) -> None:
    (model / FIRST.upper().replace("SAFETENSORS", "safetensors")).write_bytes((model / FIRST).read_bytes())
    change_map(model, **{"model__layers__0__mlp__up_proj__weight": FIRST.upper().replace("SAFETENSORS", "safetensors")})


AMBIGUOUS: dict[str, tuple[Damage, str]] = {
    "a stale single file": (stale, f"has both {SINGLE} and an index that names other files"),
    "the index names the single file, too": (
        lambda model: (stale(model), change_map(model, model__norm__weight=SINGLE)),
        f"has both {SINGLE} and an index that names other files",
    ),
    "a tensor that its shard lacks": (
        lambda model: change_map(model, model__norm__weight=FIRST),
        f"{FIRST}' lacks the tensor {NORM} that {INDEX} places there",
    ),
    "a tensor in two shards": (
        lambda model: change(model / FIRST, lambda tensors: tensors.update({NORM: torch.zeros(32)})),
        f"{FIRST}' holds {NORM}, which {INDEX} places in {SECOND}",
    ),
    "a tensor that the index leaves out": (
        lambda model: change(model / FIRST, lambda tensors: tensors.update({"model.extra": torch.zeros(3)})),
        f"{FIRST}' holds model.extra, which {INDEX} does not name",
    ),
    "a tensor twice in the index": (twice_in_the_index, f"{INDEX}' gives '{NORM}' twice"),
    "a path out of the directory": (
        lambda model: change_map(model, model__norm__weight="../model/" + SECOND),
        f"names '../model/{SECOND}', which is no safetensors file beside it",
    ),
    "an absolute path": (
        lambda model: change_map(model, model__norm__weight=str(model / SECOND)),
        "which is no safetensors file beside it",
    ),
    "another format": (
        lambda model: change_map(model, model__norm__weight="pytorch_model.bin"),
        "names 'pytorch_model.bin', which is no safetensors file beside it",
    ),
    "no file name": (lambda model: change_map(model, model__norm__weight=[FIRST]), "has no weight_map from tensors"),
    "an empty index": (lambda model: (model / INDEX).write_text('{"weight_map": {}}'), "has no weight_map"),
    "names that differ in case": (same_name_in_capitals, "one file on some disks"),
    "no index": (lambda model: (model / INDEX).unlink(), f"has {FIRST}, but no {INDEX}"),
    "no index beside a single file": (
        lambda model: (stale(model), (model / INDEX).unlink()),
        f"has both {SINGLE} and {FIRST}, and no {INDEX}",
    ),
    "a file that config.json names": (
        lambda model: (model / "config.json").write_text(
            json.dumps({**json.loads((model / "config.json").read_text()), "transformers_weights": FIRST})
        ),
        "transformers_weights names another weight file",
    ),
    "an adapter's weights": (
        lambda model: (model / "adapter_model.safetensors").write_bytes(b""),
        "adapter_model.safetensors' is of an adapter: merge it into its model first (peft's merge_and_unload)",
    ),
    "an adapter": (
        lambda model: [(model / name).write_text("{}") for name in ("adapter_config.json", "adapter_model.bin")],
        "adapter_config.json' is of an adapter: merge it",
    ),
    "an adapter alone": (
        lambda model: ((model / "config.json").unlink(), (model / "adapter_config.json").write_text("{}")),
        "adapter_config.json' is of an adapter: merge it",
    ),
}


@pytest.mark.parametrize("case", AMBIGUOUS)
def test_ambiguous_files_are_refused(case: str, sharded: Path) -> None:
    damage, message = AMBIGUOUS[case]
    damage(sharded)
    with pytest.raises(FPTQuantError) as caught:
        open_source(sharded)
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_checkpoint_of_ours_lies_alone(single: Path, change_json: Callable[..., None]) -> None:
    """Without an index, vLLM loads every safetensors file; `consolidated*` before all others."""
    change_json(single / "config.json", quantization_config={"quant_method": "fptquant"})
    open_source(single)
    save({NORM: torch.zeros(32)}, single / "consolidated.00.safetensors")
    with pytest.raises(FPTQuantError, match="consolidated.00.safetensors' is no part of the checkpoint beside it"):
        open_source(single)


# -- tensors --


def test_a_file_of_the_base_model(single: Path) -> None:
    """Without the prefix `model.`, as transformers' base classes save it."""
    expected = logits(single)
    tensors = load_file(single / SINGLE)
    save({name.removeprefix("model."): tensor for name, tensor in tensors.items()}, single / SINGLE)
    assert torch.equal(logits(single), expected) and open_source(single).notes == ()
    change(single / SINGLE, lambda found: found.update({NORM: torch.zeros(32)}))
    with pytest.raises(FPTQuantError, match=f"holds both {NORM} and norm.weight, for one weight"):
        open_source(single)


def test_tied_weights_that_differ(save_model: SaveModel, tmp_path: Path) -> None:
    """transformers takes both as they are, vLLM the embedding for both."""
    model = save_model(tmp_path / "model", "tied")
    expected = logits(model)
    change(model / SINGLE, lambda tensors: tensors.update({"lm_head.weight": tensors[EMBEDDING].clone()}))
    assert torch.equal(logits(model), expected) and open_source(model).notes == ()
    change(model / SINGLE, lambda tensors: tensors["lm_head.weight"][3, 3].zero_())
    with pytest.raises(FPTQuantError, match=f"ties lm_head.weight to {EMBEDDING}, but both are stored, with different"):
        open_source(model)


def test_what_another_tool_quantized(single: Path, change_json: Callable[..., None]) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    weight = load_file(single / SINGLE)[name]
    change(single / SINGLE, lambda tensors: tensors.update({name: weight.to(torch.float8_e4m3fn)}))
    with pytest.raises(FPTQuantError, match=f"{name} is stored as F8_E4M3, so it is quantized already: give the orig"):
        open_source(single)
    packed = {f"{name}_packed": torch.zeros(64, 4, dtype=torch.int32), f"{name}_scale": torch.ones(64, 1)}
    change(single / SINGLE, lambda tensors: (tensors.pop(name), tensors.update(packed)))
    with pytest.raises(FPTQuantError, match=f"lacks the tensor {name}: {name}_packed looks quantized, but config.json"):
        open_source(single)
    change_json(single / "config.json", quantization_config={"quant_method": "compressed-tensors"})
    assert open_source(single).quantized


def test_no_quantization(single: Path, change_json: Callable[..., None]) -> None:
    expected = logits(single)
    change_json(single / "config.json", quantization_config=None)
    assert not open_source(single).quantized and torch.equal(logits(single), expected)


@pytest.mark.parametrize(
    "named, stored, expected",
    [
        (None, torch.bfloat16, torch.bfloat16),
        (None, torch.float16, torch.float16),
        (None, torch.float64, torch.float32),
        ("float16", torch.bfloat16, torch.float16),
    ],
)
def test_dtype_of_the_weights_where_the_config_names_none(
    named: str | None,
    stored: torch.dtype,
    expected: torch.dtype,
    single: Path,
    change_json: Callable[..., None],
) -> None:
    change_json(single / "config.json", dtype=named)
    inv_freq = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}  # a buffer, always float32
    tensors = {name: tensor.to(stored) for name, tensor in load_file(single / SINGLE).items()}
    save({**tensors, **inv_freq}, single / SINGLE)
    source = open_source(single)
    assert source.dtype is expected and source.notes == ()
    assert load_model(source).dtype is torch.float32


def test_several_dtypes(single: Path, change_json: Callable[..., None]) -> None:
    change(single / SINGLE, lambda tensors: tensors.update({NORM: tensors[NORM].to(torch.bfloat16)}))
    assert open_source(single).notes == ()
    change_json(single / "config.json", dtype=None)
    source = open_source(single)
    assert source.dtype is torch.float32
    assert source.notes == ("config.json names no dtype and weights are stored as BF16, F32: taken as float32",)


def test_notes(save_model: SaveModel, tmp_path: Path) -> None:
    """Unknown tensors and zero matrices; not what other versions stored, nor zeros in biases and beside others."""
    model = save_model(tmp_path / "model", "bias")

    def ordinary(tensors: dict[str, torch.Tensor]) -> None:
        tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
        tensors["model.layers.0.self_attn.q_proj.bias"].zero_()
        tensors[EMBEDDING][:300].zero_()

    change(model / SINGLE, ordinary)
    assert open_source(model).notes == ()
    odd = {"model.layers.0.self_attn.q_norm.weight": torch.ones(7), "model.layers.5.mlp.up_proj.weight": torch.ones(2)}
    change(model / SINGLE, lambda tensors: (tensors.update(odd), tensors["model.layers.1.mlp.up_proj.weight"].zero_()))
    assert open_source(model).notes == (
        "a LlamaForCausalLM has no place for 2 tensors, the first is model.layers.0.self_attn.q_norm.weight: left out",
        "all values are 0 in the weight matrix model.layers.1.mlp.up_proj.weight",
    )


def test_the_file_stays_as_it_is(single: Path) -> None:
    """Float32 weights are mapped, not copied; what is done to them is private to the process."""
    model = load_model(open_source(single))
    with torch.no_grad():
        model.model.norm.weight.zero_()
    assert load_file(single / SINGLE)[NORM].abs().sum() > 0


def read_as_nobody(folder: str, found: Any) -> None:
    os.setuid(65534)
    try:
        WeightFiles.of(Path(folder))
    except FPTQuantError as error:
        found.put(str(error))
    else:
        found.put("")


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_weights_of_another_user() -> None:
    """Weights that transformers saved are for their owner's eyes only, and a container has another user."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        folder.chmod(0o755)  # pytest's own are closed to others
        save_file({"a": torch.zeros(2)}, folder / "model.safetensors")
        fork = multiprocessing.get_context("fork")
        for mode, message in ((0o600, "can't be read by this user"), (0o644, "")):
            (folder / "model.safetensors").chmod(mode)
            found = fork.Queue()
            process = fork.Process(target=read_as_nobody, args=(name, found))
            process.start()
            said = found.get(timeout=60)
            process.join()
            assert message in said and bool(message) == bool(said)
