"""From a checkpoint directory to a quantized one, for every precision; what is written, and that it is reproducible."""

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import fptquant
from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from fptquant.loading import load_model, open_source
from fptquant.recipe import PRECISIONS, Recipe
from fptquant.run import shards, writer
from fptquant.run.job import job_of, open_job
from fptquant.run.models import transformed
from fptquant.run.state import RunState
from tests.conftest import TEXT

SaveModel = Callable[..., Path]


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return {"source": str(path), "sequences": 4, "length": 32}


Quantize = Callable[..., Path]


@pytest.fixture
def quantize(calibration: dict[str, Any], tmp_path: Path) -> Quantize:
    """`quantize(model, name="out", **recipe fields)`: the directory written."""

    def run(model: Path, name: str = "out", **fields: Any) -> Path:
        recipe = Recipe.parse({"calibration": calibration, **fields})
        pipeline.quantize(open_job(model, recipe), tmp_path / name)
        return tmp_path / name

    return run


def tensors(checkpoint: Path) -> dict[str, torch.Tensor]:
    return {name: t for file in sorted(checkpoint.glob("*.safetensors")) for name, t in load_file(file).items()}


@pytest.mark.parametrize("precision", [name for name in PRECISIONS if "-g" not in name])
@pytest.mark.parametrize("residual_scale", [True, False], ids=["S_n", "no S_n"])
def test_every_precision(
    precision: str, residual_scale: bool, model_dir: Path, quantize: Quantize, calibration: dict[str, Any]
) -> None:
    names = ["T_k", "T_v", "T_u", "T_r", "T_d"] + ["S_n"] * residual_scale
    out = quantize(model_dir, precision=precision, transforms=names)
    scheme = PRECISIONS[precision]
    config = json.loads((out / "config.json").read_text())
    sink = scheme.kv_cache.bits < 16  # the tokenizer puts a BOS first
    assert config["architectures"] == ["FPTQuantLlamaForCausalLM"] and config["model_type"] == "fptquant_llama"
    assert config["tie_word_embeddings"] is False
    written = CheckpointConfig.parse(config["quantization_config"])
    assert (written.weights, written.activations, written.kv_cache) == (
        scheme.weights,
        scheme.activations,
        scheme.kv_cache,
    )
    assert written.transforms.residual_scale is residual_scale and (written.sink is not None) is sink
    assert written.transforms.down_hadamard is not None and written.transforms.down_hadamard.block == 8
    assert written.transforms.merged == ("T_k", "T_v", "T_u", "T_r", "T_d")

    found = tensors(out)
    layer = "model.layers.1.mlp.down_proj"
    assert found[f"{layer}.weight_packed"].shape == (42, 9) and found[f"{layer}.weight_packed"].dtype == torch.int32
    assert found[f"{layer}.weight_scale"].shape == (42, 1) and found[f"{layer}.weight_shape"].tolist() == [
        42,
        72,
    ]
    assert f"{layer}.weight" not in found and found[f"{layer}.bias"].dtype == torch.float32
    quantized = scheme.activations.bits < 16
    assert (f"{layer}.input_scale" in found) is quantized
    assert (f"{layer}.input_zero_point" in found) is (quantized and not scheme.activations.symmetric)
    assert ("model.layers.0.self_attn.k_scale" in found) is (scheme.kv_cache.bits < 16)
    assert ("lm_head.weight_packed" in found) is quantized and ("lm_head.weight" in found) is not quantized
    assert "model.embed_tokens.weight" in found

    model = load_model(open_source(out))
    original = load_model(open_source(model_dir))
    recipe = Recipe.load(str(out / "fptquant" / "recipe.yaml"))  # it has the text's name
    tokens = open_job(model_dir, recipe.changed(calibration={"source": calibration["source"]})).windows
    difference = (model(tokens).logits - original(tokens).logits).pow(2).mean().sqrt() / original(tokens).logits.std()
    assert 1e-4 < difference < (0.9 if "a4" in precision else 0.35)


@pytest.mark.parametrize("size", [32, 128])
def test_groups(size: int, save_model: SaveModel, quantize: Quantize, tmp_path: Path) -> None:
    """Multipliers are stored, stay while scales are trained, and leave smaller errors than none."""
    sizes = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32}
    model = save_model(tmp_path / "model", "gqa", torch.bfloat16, **sizes)
    transforms = ["T_v", "T_u", "T_r", "S_n"]
    fields = {"precision": f"w4a8kv8-g{size}", "transforms": transforms, "rounding": {"method": "nearest"}}
    out = quantize(model, "groups", **fields)
    found = tensors(out)
    layer = "model.layers.1.mlp.down_proj"
    assert found[f"{layer}.weight_multiplier"].shape == (128, 256 // size)
    assert found[f"{layer}.weight_multiplier"].dtype == torch.int8 and found[f"{layer}.weight_packed"].shape == (
        128,
        32,
    )
    assert "lm_head.weight_multiplier" not in found
    summary = json.loads((out / "fptquant" / "summary.json").read_text())
    assert 4 + 8 / size < summary["bits_per_weight"] < 4.25 + 8 / size

    training = {"scales": {"steps": 2}, "training": {"sequences": 2, "length": 16}}
    trained = tensors(quantize(model, "trained", **fields, **training))
    for name in ("weight_packed", "weight_multiplier"):
        assert torch.equal(trained[f"{layer}.{name}"], found[f"{layer}.{name}"])
    assert not torch.equal(trained[f"{layer}.weight_scale"], found[f"{layer}.weight_scale"])

    weight = transformed(job_of(out, model)).get_submodule(layer).float_weight()

    def error(checkpoint: Path) -> float:
        linear = load_model(open_source(checkpoint)).get_submodule(layer)
        return (linear.codes * linear.weight_scale - weight).square().mean().item()

    assert error(out) < 0.98 * error(quantize(model, "channels", **{**fields, "precision": "w4a8kv8"}))


def test_a_checkpoint_has_what_serving_needs(model_dir: Path, quantize: Quantize, drawn: None) -> None:
    out = quantize(model_dir)
    assert {path.name for path in out.iterdir()} == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json",
        "chat_template.jinja", "README.md", "fptquant",
    }  # fmt: skip
    assert {path.name for path in (out / "fptquant").iterdir()} == {
        "digests.json", "logits.safetensors", "ranges.json", "ranges.png", "recipe.yaml", "summary.json",
        "transforms.safetensors",
    }  # fmt: skip
    summary = json.loads((out / "fptquant" / "summary.json").read_text())
    assert summary["output_bytes"] == sum(tensor.nbytes for tensor in tensors(out).values())
    assert list(summary["seconds"])[:2] == ["rehearse", "calibrate and round"] and summary["peak_memory_bytes"] > 1e8
    assert summary["peak_bytes"].keys() == summary["seconds"].keys()
    assert summary["peak_memory_bytes"] == max(summary["peak_bytes"].values())
    assert summary["output"] == "out"
    for file in out.rglob("*"):  # where it was made is nobody's business
        assert not file.is_file() or b"pytest-" not in file.read_bytes(), file
    producer = json.loads((out / "config.json").read_text())["quantization_config"]["producer"]
    assert producer["package"] == f"vllm-fptquant {fptquant.__version__}"
    recipe = Recipe.load(str(out / "fptquant" / "recipe.yaml"))
    assert producer["recipe_hash"] == recipe.digest() and producer["calibration"]
    same = AutoTokenizer.from_pretrained(out)
    assert same("some text")["input_ids"] == AutoTokenizer.from_pretrained(model_dir)("some text")["input_ids"]


def test_estimated_size(save_model: SaveModel, quantize: Quantize, tmp_path: Path, calibration: dict[str, Any]) -> None:
    """The estimate that the free space is checked against, where the weights outweigh the file's header."""
    model = save_model(
        tmp_path / "model",
        "gqa",
        torch.bfloat16,
        hidden_size=128,
        intermediate_size=512,
        num_attention_heads=8,
    )
    for precision in ("w4a8kv8", "w4a8kv8-g32", {"weights": {"bits": 8}}):
        recipe = Recipe.parse({"precision": precision, "calibration": calibration, "transforms": []})
        job = open_job(model, recipe)
        out = quantize(model, str(precision)[-7:], precision=precision, transforms=[])
        assert job.output_bytes == pytest.approx((out / "model.safetensors").stat().st_size, rel=0.03)


@pytest.mark.parametrize("kind", ["gqa", "mha", "mqa", "tied"])
def test_other_shapes(kind: str, save_model: SaveModel, quantize: Quantize, tmp_path: Path) -> None:
    """Sizes that are no power of two, tied heads, no biases; the read-back check inside compares bit for bit."""
    model = save_model(tmp_path / "model", kind, bos=False)
    tokens = torch.arange(20)[None]
    original = load_model(open_source(model))(tokens).logits
    difference = load_model(open_source(quantize(model)))(tokens).logits - original
    assert difference.pow(2).mean().sqrt() < 0.8 * original.std()  # of unrelated logits: 1.4


def test_kv_scales_per_head(model_dir: Path, quantize: Quantize) -> None:
    precision = PRECISIONS["w4a8kv8"].model_dump()
    precision["kv_cache"]["strategy"] = "head"
    found = tensors(quantize(model_dir, precision=precision))
    for name in ("k_scale", "v_scale", "k_zero_point", "v_zero_point"):
        assert found[f"model.layers.0.self_attn.{name}"].shape == (2,)
    assert found["model.layers.0.self_attn.k_scale"][0] != found["model.layers.0.self_attn.k_scale"][1]


@pytest.mark.parametrize(
    "source, named, target",
    [
        (torch.bfloat16, True, "auto"),
        (torch.bfloat16, False, "auto"),
        (torch.float32, True, "bfloat16"),
        (torch.float32, True, "float16"),
    ],
)
def test_sixteen_bit_floats(
    source: torch.dtype,
    named: bool,
    target: str,
    save_model: SaveModel,
    quantize: Quantize,
    tmp_path: Path,
    change_json: Callable[..., None],
) -> None:
    """Floats are stored in 16 bits, scales stay float32; an ignored layer's weight is one of the floats."""
    model = save_model(tmp_path / "model", "bias", source)
    if not named:
        change_json(model / "config.json", dtype=None)
    kept = "model.layers.0.self_attn.o_proj"
    out = quantize(model, dtype=target, ignore=["lm_head", kept], precision="w4a4kv4")
    expected = torch.float16 if target == "float16" else torch.bfloat16
    found = tensors(out)
    for name, tensor in found.items():
        if tensor.is_floating_point():
            assert tensor.dtype == (torch.float32 if re.search("_scale$|sink", name) else expected), name
    assert f"{kept}.weight" in found and f"{kept}.weight_packed" not in found
    assert json.loads((out / "config.json").read_text())["dtype"] == str(expected).removeprefix("torch.")
    assert bool(torch.isfinite(load_model(open_source(out))(torch.arange(9)[None]).logits).all())


def test_overrides_and_ignore_reach_the_tensors(model_dir: Path, quantize: Quantize) -> None:
    overrides = [
        {"modules": "model.layers.0.mlp.down_proj", "activations": {"bits": 8, "symmetric": True}},
        {"modules": "re:.*layers.1.self_attn.[qkv]_proj", "weights": {"bits": 8}},
    ]
    ignore = ["re:.*layers.1.mlp.(gate|up)_proj"]
    out = quantize(model_dir, precision="w4a4kv8", overrides=overrides, ignore=ignore)
    found, plain = tensors(out), tensors(quantize(model_dir, "plain", precision="w4a4kv8"))
    down = "model.layers.0.mlp.down_proj"
    assert f"{down}.input_zero_point" not in found and f"{down}.input_zero_point" in plain
    assert found[f"{down}.input_scale"] < 0.4 * plain[f"{down}.input_scale"]
    assert found["model.layers.1.self_attn.q_proj.weight_packed"].shape[1] == 11  # ceil(42 * 8 / 32)
    assert plain["model.layers.1.self_attn.q_proj.weight_packed"].shape[1] == 6
    assert "model.layers.1.mlp.gate_proj.weight" in found and "model.layers.1.mlp.down_proj.weight_packed" in found
    written = CheckpointConfig.parse(json.loads((out / "config.json").read_text())["quantization_config"])
    head = written.scheme_for("lm_head")
    assert head is not None and (head.weights.bits, head.activations.bits) == (7, 8)


@pytest.mark.parametrize("fields", [{"head_bits": 16}, {"ignore": ["lm_head"]}])
def test_the_head_can_stay_in_floating_point(fields: dict[str, Any], model_dir: Path, quantize: Quantize) -> None:
    out = quantize(model_dir, **fields)
    assert "lm_head.weight" in tensors(out)
    written = CheckpointConfig.parse(json.loads((out / "config.json").read_text())["quantization_config"])
    assert written.scheme_for("lm_head") is None


@pytest.mark.parametrize(
    "fields, message",
    [
        (
            {"overrides": [{"modules": "re:.*q_proj", "weights": {"bits": 8}}]},
            "q_proj, .*v_proj share one input",
        ),
        ({"ignore": ["model.layers.0.mlp.up_proj"]}, "gate_proj, .*up_proj share one input"),
        (
            {"overrides": [{"modules": "model.layers.7.mlp.down_proj", "activations": {"bits": 8}}]},
            "'model.layers.7.mlp.down_proj' matches no",
        ),
        ({"ignore": ["model.layers.0.mlp.down_proj"]}, "down_proj can't stay in floating point while T_d is on"),
        ({"transforms": {"T_d": {"block": 16}}}, "block 16 does not divide the intermediate size 72"),
        ({"calibration": {"source": "builtin", "sequences": 100_000}}, "calibration text 'builtin' has"),
    ],
)
def test_plan_refuses(fields: dict[str, Any], message: str, model_dir: Path, calibration: dict[str, Any]) -> None:
    with pytest.raises(FPTQuantError, match=message):
        open_job(model_dir, Recipe.parse({"calibration": calibration, **fields}))


def test_a_quantized_model_is_no_source(model_dir: Path, quantize: Quantize, calibration: dict[str, Any]) -> None:
    out = quantize(model_dir)
    with pytest.raises(FPTQuantError, match="is quantized already"):
        open_job(out, Recipe.parse({"calibration": calibration}))


def contents(checkpoint: Path) -> dict[str, bytes]:
    files = (
        path for path in checkpoint.rglob("*") if path.is_file() and path.name not in ("summary.json", "README.md")
    )
    return {str(path.relative_to(checkpoint)): path.read_bytes() for path in files}


def test_same_seed_same_files(model_dir: Path, quantize: Quantize) -> None:
    first, second = contents(quantize(model_dir, "a", seed=3)), contents(quantize(model_dir, "b", seed=3))
    assert first.keys() == second.keys()
    assert [name for name in first if first[name] != second[name]] == []


def test_the_seed_draws_rotation_and_calibration(model_dir: Path, quantize: Quantize) -> None:
    first, second = (quantize(model_dir, str(seed), seed=seed) for seed in (3, 4))
    a, b = (json.loads((x / "config.json").read_text())["quantization_config"]["producer"] for x in (first, second))
    assert a["calibration"] != b["calibration"] and a["recipe_hash"] != b["recipe_hash"]
    key = "model.embed_tokens.weight"
    assert not torch.equal(tensors(first)[key], tensors(second)[key])


def test_transforms_as_written_can_be_read_again(
    model_dir: Path, save_model: SaveModel, quantize: Quantize, tmp_path: Path
) -> None:
    out = quantize(model_dir, seed=5)
    job = job_of(out, model_dir)
    stored = load_file(out / "fptquant" / "transforms.safetensors")
    state = job.transforms.state_dict()
    assert stored.keys() == state.keys() and all(torch.equal(stored[key], state[key]) for key in stored)
    with pytest.raises(FPTQuantError, match="was not made from"):
        job_of(out, save_model(tmp_path / "other", "gqa"))
    (out / "fptquant" / "transforms.safetensors").write_bytes(b"x" * 20)
    with pytest.raises(FPTQuantError, match="corrupt or truncated"):
        job_of(out, model_dir)
    (out / "fptquant" / "transforms.safetensors").unlink()
    with pytest.raises(FPTQuantError, match="no complete fptquant checkpoint"):
        job_of(out, model_dir)


def test_verifying_needs_no_calibration_text(model_dir: Path, tmp_path: Path) -> None:
    text = tmp_path / "moved.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:3000], encoding="utf-8")
    recipe = Recipe.parse({"calibration": {"source": str(text), "sequences": 4, "length": 32}})
    pipeline.quantize(open_job(model_dir, recipe), tmp_path / "out")
    text.unlink()
    assert job_of(tmp_path / "out", model_dir).transforms.names


def test_a_checkpoint_that_reads_back_differently_is_not_published(
    model_dir: Path, quantize: Quantize, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    original = writer._tensors

    def damaged(*arguments: Any) -> Any:
        for name, tensor in original(*arguments):
            yield name, tensor * 1.001 if name == "model.layers.1.mlp.down_proj.input_scale" else tensor

    monkeypatch.setattr(writer, "_tensors", damaged)
    for _ in range(2):  # the state is kept, and what it ends in doesn't change
        with pytest.raises(FPTQuantError, match="does not equal the model in memory .*--fresh to start over") as caught:
            quantize(model_dir)
        assert "\n" not in str(caught.value)
        assert not (tmp_path / "out").exists() and (tmp_path / ".out.state" / "model.layers.1.safetensors").is_file()
    without = lambda *arguments: (item for item in original(*arguments) if "1.self_attn.v_scale" not in item[0])  # noqa: E731
    monkeypatch.setattr(writer, "_tensors", without)
    with pytest.raises(FPTQuantError, match="can't be read back .*v_scale.*--fresh to start over"):
        quantize(model_dir)
    monkeypatch.setattr(writer, "_tensors", original)
    assert quantize(model_dir).is_dir()


def test_a_state_that_does_not_fit(model_dir: Path, calibration: dict[str, Any], tmp_path: Path) -> None:
    """Such as one of another version's packing, which nothing in its signature tells."""
    job = open_job(model_dir, Recipe.parse({"calibration": calibration, "local": {"steps": 1}}))
    for name, tensors in (
        ("local", {"step": torch.tensor(1)}),
        ("model.layers.0", {"mlp.up_proj.weight_scale": torch.ones(3)}),
    ):
        with RunState(tmp_path / ".out.state", job.signature(), fresh=True) as state:
            state.save(name, tensors, {"step": 1})
        with pytest.raises(FPTQuantError, match=f"the state '{name}' of the unfinished run doesn't fit .*--fresh"):
            pipeline.quantize(job, tmp_path / "out")


def test_the_source_is_never_the_target(save_model: SaveModel, tmp_path: Path, calibration: dict[str, Any]) -> None:
    model = save_model(tmp_path / "quantized" / "model")
    config = {"quantization_config": {"quant_method": "fptquant"}}
    (tmp_path / "quantized" / "config.json").write_text(json.dumps(config))
    before = contents(model)
    job = open_job(model, Recipe.parse({"calibration": calibration}))
    for target, message in (
        (model, "is no checkpoint of fptquant"),
        (model / ".." / "model", "is no checkpoint of fptquant"),
        (tmp_path / "quantized", "holds the source model"),
    ):
        with pytest.raises(FPTQuantError, match=message):
            pipeline.quantize(job, target, overwrite=True)
    assert contents(model) == before


def test_big_models_are_written_in_shards(model_dir: Path, quantize: Quantize, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shards, "LARGEST", 30_000)
    out = quantize(model_dir)  # read back and compared inside
    assert len(list(out.glob("*.safetensors"))) > 1 and (out / "model.safetensors.index.json").is_file()


def test_gptq_beats_nearest_on_its_calibration_text(
    model_dir: Path, quantize: Quantize, calibration: dict[str, Any]
) -> None:
    calibration = {**calibration, "sequences": 64}
    tokens = open_job(model_dir, Recipe.parse({"calibration": calibration})).windows
    original = load_model(open_source(model_dir))(tokens).logits
    errors = {}
    for method in ("nearest", "gptq"):
        fields = {
            "precision": "w4a16",
            "transforms": [],
            "rounding": {"method": method},
            "calibration": calibration,
        }
        out = quantize(model_dir, method, **fields)
        errors[method] = (AutoModelForCausalLM.from_pretrained(out)(tokens).logits - original).pow(2).mean()
    assert errors["gptq"] < errors["nearest"]
