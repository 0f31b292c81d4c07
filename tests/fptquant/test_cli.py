"""The command: what it writes and says, and that bad input costs one line, status 2 and nothing written."""

import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
import torch
import transformers
import typer
import yaml
from safetensors.torch import load_file, save_file

import fptquant
from fptquant import cli, pipeline
from fptquant.options.transforms import TRANSFORM_OPTIONS
from fptquant.run import needs, writer
from fptquant.run.job import open_job
from fptquant.run.publication import Publication
from fptquant.run.state import RunState
from fptquant.wiring import FAMILIES
from tests import forkserver
from tests.conftest import TEXT, bound
from tests.fptquant.conftest import Result, Run, one_error

ROOT = Path(fptquant.__file__).parents[1]
SMALL = ("--sequences", "4", "--length", "32")
SHORT = TEXT.with_name("SOURCES.md")  # a few hundred tokens


@pytest.fixture(scope="module")
def calibration(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "calibration.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:8000], encoding="utf-8")
    return path


@pytest.fixture
def model(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of the model that a test may damage."""
    return Path(shutil.copytree(model_dir, tmp_path / "model"))


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory, model_dir: Path, calibration: Path) -> Path:
    out = tmp_path_factory.mktemp("quantized") / "out"
    recipe = fptquant.recipe.Recipe().changed(calibration={"source": str(calibration), "sequences": 4, "length": 32})
    pipeline.quantize(open_job(model_dir, recipe), out)
    return out


def tree(folder: Path) -> dict[str, bytes]:
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else b"" for p in folder.rglob("*")}


# -- it works --


def test_quantize(run: Run, model: Path, calibration: Path, tmp_path: Path, drawn: None) -> None:
    result = run(
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--calibration",
        calibration,
        *SMALL,
        "--precision",
        "w4a4kv8",
        "--quality",
        2,
    )
    assert result.code == 0, result.err
    assert re.search(r"quality: perplexity [\d.]+ -> [\d.]+ \([\d.]+x\), KL divergence [\d.]+ nats", result.out)
    assert (tmp_path / "out" / "config.json").is_file() and sorted(os.listdir(tmp_path)) == ["model", "out"]
    for expected in ("static INT4, asymmetric, per tensor", "T_k, T_v, T_u, T_r, T_d, S_n", "T_d block", "peak memory",
                     "weights after", "calibrate and round", "vllm serve", "fptquant verify", "in all"):  # fmt: skip
        assert expected in result.out
    assert re.search(r"time +│ about [\d.]+ s in all", result.out)
    assert "[1/7] rehearse" in result.err and "[7/7] measure quality" in result.err


def test_options_reach_the_recipe(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--recipe", "rtn", "--precision", "w4a8kv8", "--seed", 5, "--without", "T_k, S_n", "--rounding", "gptq",
               "--kv-strategy", "head", "--dtype", "bfloat16")  # fmt: skip
    result = run("quantize", model, "-o", tmp_path / "out", "--calibration", calibration, *SMALL, *options)
    assert result.code == 0, result.err
    recipe = fptquant.recipe.Recipe.load(str(tmp_path / "out" / "fptquant" / "recipe.yaml"))
    assert (recipe.name, recipe.seed, recipe.dtype, recipe.rounding.method) == ("rtn", 5, "bfloat16", "gptq")
    assert recipe.precision.kv_cache.strategy == "head" and recipe.precision.activations.bits == 8
    assert (recipe.calibration.sequences, recipe.calibration.length) == (4, 32)
    assert recipe.weight_range.method == "minmax"


def test_quantize_on_chats(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    chat = [{"role": "user", "content": "Rome?"}, {"role": "assistant", "content": "Yes."}]
    (tmp_path / "chats.txt").write_text((json.dumps({"messages": chat}) + "\n") * 50)
    (model / "chat_template.jinja").write_text("<s>{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    options = ("-o", tmp_path / "out", "--calibration", tmp_path / "chats.txt", *SMALL, "--dry-run")
    result = run("quantize", model, *options, "--calibration-field", "messages")
    assert result.code == 0 and "first sequence" in result.out, result.err
    assert "Rome?" in result.out and "'role'" not in result.out and result.out.count("<s>") == 2
    assert "no column 'text'; it has: messages " in one_error(run("quantize", model, *options))
    assert "is json, not text" in one_error(run("evaluate", model, "--text", tmp_path / "chats.txt", "--length", 24))


def test_without(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    result = run(
        "quantize",
        model,
        "-o",
        tmp_path / "out",
        "--calibration",
        calibration,
        *SMALL,
        "--without",
        "T_k, S_n",
    )
    assert result.code == 0, result.err
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["quantization_config"]["transforms"]["merged"] == ["T_v", "T_u", "T_r", "T_d"]
    assert config["quantization_config"]["transforms"]["residual_scale"] is False


def test_dry_run_checks_the_output(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--calibration", calibration, *SMALL, "--dry-run")
    with RunState(tmp_path / ".out.state", {"recipe": "other"}) as state:
        state.save("x", {"a": torch.zeros(1)})
        assert "the state of an unfinished run" in one_error(run_quiet(run, model, "-o", tmp_path / "out", *options))
        assert state.load("x") is not None


def test_two_runs_for_one_output(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / f".out.partial-{os.getppid()}").mkdir()
    line = one_error(run_quiet(run, model, "-o", tmp_path / "out", "--calibration", calibration, *SMALL))
    assert f"process {os.getppid()} is writing" in line and f"remove '{tmp_path}/.out.partial-{os.getppid()}'" in line


def test_dry_run_writes_nothing(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    before = tree(tmp_path)
    result = run("quantize", model, "-o", tmp_path / "a" / "out", "--calibration", calibration, *SMALL, "--dry-run")
    assert result.code == 0 and "nothing was written" in result.out and "sequences of 32" in result.out
    assert tree(tmp_path) == before


def test_families(run: Run) -> None:
    shown = run("families").out
    assert all(family.model_type in shown for family in FAMILIES.values()) and "T_k" in shown


def test_recipes_and_version(run: Run) -> None:
    result = run("recipes")
    assert result.code == 0 and all(word in result.out for word in ("fptquant", "gptq", "rtn", "w4a4kv4", "S_n"))
    recipe = yaml.safe_load(run("recipes", "fptquant-best").out)
    assert fptquant.recipe.Recipe.parse(recipe).digest() == fptquant.recipe.Recipe.load("fptquant-best").digest()
    fields = run("recipes", "--fields").out
    assert all(word in fields for word in ("rounding.damping", "0.01", "transforms.T_d.block", "kl_top", "nearest"))
    result = run("--version")
    assert result.code == 0 and result.out.strip() == f"fptquant {fptquant.__version__}"


def test_evaluate(run: Run, quantized: Path, model_dir: Path, calibration: Path, tmp_path: Path) -> None:
    found, text = {}, calibration
    for name, path in (("original", model_dir), ("quantized", quantized)):
        file = tmp_path / f"{name}.json"
        result = run("evaluate", path, "--text", text, "--windows", 3, "--length", 40, "--json", file)
        assert result.code == 0, result.err
        found[name] = json.loads(file.read_text())
        assert f"{found[name]['perplexity']:.4f}" in result.out
    one = found["quantized"]
    assert (one["windows"], one["length"], one["predicted_tokens"]) == (3, 40, 117) and one["seconds"] >= 0
    assert one["settings"] == {
        "model": str(quantized), "text": str(text), "backend": "transformers", "special_tokens": False,
    }  # fmt: skip
    assert one["perplexity"] > 1 and one["perplexity"] != found["original"]["perplexity"]
    run(
        "evaluate",
        quantized,
        "--text",
        text,
        "--windows",
        3,
        "--length",
        40,
        "--special-tokens",
        "--json",
        file,
    )
    assert json.loads(file.read_text())["predicted_tokens"] == 117
    assert json.loads(file.read_text())["perplexity"] != one["perplexity"]


# -- sensitivity --


def test_sensitivity(run: Run, model_dir: Path, calibration: Path, tmp_path: Path, drawn: None) -> None:
    files = ("--json", tmp_path / "s.json", "--plot", tmp_path / "s.png")
    options = ("--calibration", calibration, "--sequences", 4, "--windows", 2, "--length", 24, *files)
    result = run("sensitivity", model_dir, *options, "--precision", "w4a4kv8", "--kinds", "down_input, keys")
    assert result.code == 0, result.err
    assert "down_input" in result.out and "in floating point: perplexity" in result.out
    rows = json.loads((tmp_path / "s.json").read_text())["rows"]
    assert [(row["kind"], row["layer"]) for row in rows] == [("down_input", None), ("keys", None)]
    result = run("sensitivity", model_dir, *options, "--precision", "w4a4kv8", "--by", "layer", "--top", 3)
    assert result.code == 0 and len(json.loads((tmp_path / "s.json").read_text())["rows"]) == 2 + 10 * 2
    lines = [line for line in result.out.splitlines() if "input" in line or "weights" in line or "keys" in line]
    assert len(lines) == 3
    again = run("sensitivity", model_dir, *options, "--precision", "w4a4kv8", "--by", "layer", "--top", 3)
    assert again.out == result.out and "measure" not in again.err  # all of it was there
    other = run("sensitivity", model_dir, *options, "--precision", "w4a4kv4")
    assert "s.json' holds measurements with recipe " in one_error(other)


def test_sensitivity_on_a_full_disk(
    run: Run, model_dir: Path, calibration: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is too large for memory goes to the disk."""
    monkeypatch.setattr(needs, "scratch_limit", lambda room: 0)
    monkeypatch.setattr(os, "posix_fallocate", Mock(side_effect=OSError(errno.ENOSPC, "No space left on device")))
    options = ("--calibration", calibration, "--sequences", 4, "--windows", 2, "--length", 24, "--kinds", "down_input")
    result = run("sensitivity", model_dir, *options)
    assert result.code == 2 and "error: the disk is full: free some space, or set TMPDIR" in result.err


def test_sensitivity_where_a_transform_starts_from_activations(run: Run, model_dir: Path, calibration: Path) -> None:
    options = ("--calibration", calibration, "--sequences", 4, "--windows", 2, "--length", 24, "--kinds", "down_input")
    result = run("sensitivity", model_dir, *options, "--recipe", "smoothquant")
    assert result.code == 0 and "measure activations" in result.err, result.err


@pytest.mark.parametrize(
    "options, message",
    [
        (["--kinds", "down"], "unknown site kind 'down': did you mean 'down_input'?"),
        (["--precision", "w4a8", "--kinds", "keys"], "quantizes none of these sites"),
        (["--windows", "5"], "is cut into 4 sequences of 512 tokens: lower --windows or --length"),
        (["--length", "600"], "is cut into 4 sequences of 512 tokens"),
        (["--text", "missing.txt"], "missing.txt' can't be read"),
        (["--json", "no/such/x.json"], "--json: "),
        (["--plot", "no/such/x.png"], "--plot: "),
        (["--plot", "x.xyz"], "--plot: 'x.xyz' has no known image type"),
        (["--rounding", "up"], "error: --rounding: Input should be"),
        (["--recipe", "none"], "unknown recipe 'none'"),
    ],
)
def test_sensitivity_bad_input(
    options: list[object],
    message: str,
    run: Run,
    model_dir: Path,
    calibration: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_error(run("sensitivity", model_dir, "--calibration", calibration, "--sequences", 4, *options))
    assert os.listdir(tmp_path) == []


def test_quantize_with_a_budget(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--calibration", calibration, *SMALL, "--precision", "w4a4kv4", "--budget", "sites=2")
    result = run("quantize", model, "-o", tmp_path / "out", *options)
    assert result.code == 0, result.err
    assert "sites 2" in result.out and "measure sites" in result.out
    assert re.search(r"budget: more bits for \S+ \d, \S+ \d; KL divergence [\d.]+ -> [\d.]+", result.out)
    assert len(json.loads((tmp_path / "out" / "fptquant" / "budget.json").read_text())["choices"]) == 2
    assert verify(run, tmp_path / "out", model).code == 0


# -- verify --


def verify(run: Run, checkpoint: Path, model: Path) -> Result:
    return run("verify", checkpoint, "--against", model, "--text", SHORT, "--windows", 2, "--length", 24, "--no-vllm")


def test_verify_accepts_what_was_written(run: Run, quantized: Path, model_dir: Path) -> None:
    result = verify(run, quantized, model_dir)
    assert result.code == 0 and "FAILED" not in result.out and "through vLLM: not checked" in result.out
    assert result.out.count(" ok ") == 4


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.weight_packed", "model.layers.0.self_attn.o_proj.weight_scale",
        "model.layers.0.mlp.down_proj.input_scale", "model.layers.1.self_attn.k_scale", "lm_head.weight_packed",
        "model.embed_tokens.weight", "model.layers.1.self_attn.q_proj.bias", "model.layers.0.self_attn.v_zero_point",
    ],
)  # fmt: skip
def test_verify_notices_an_altered_tensor(
    name: str, run: Run, quantized: Path, model_dir: Path, tmp_path: Path
) -> None:
    altered = Path(shutil.copytree(quantized, tmp_path / "altered"))
    tensors = load_file(altered / "model.safetensors")
    first = tensors[name].view(-1)
    first[0] = first[0] ^ 1 if tensors[name].dtype == torch.int32 else first[0] * 1.001
    save_file(tensors, altered / "model.safetensors", metadata={"format": "pt"})
    result = verify(run, altered, model_dir)
    assert result.code == 2 and f"{name} is not what was written into this checkpoint" in result.err
    save_file(bound(tensors, altered), altered / "model.safetensors", metadata={"format": "pt"})
    result = verify(run, altered, model_dir)  # what binds them was forged: the digests tell
    assert result.code == 1 and "FAILED" in result.out and "Traceback" not in result.err


def test_verify_notices_transforms_that_do_not_cancel(
    run: Run, quantized: Path, model_dir: Path, tmp_path: Path
) -> None:
    altered = Path(shutil.copytree(quantized, tmp_path / "altered"))
    file = altered / "fptquant" / "transforms.safetensors"
    tensors = load_file(file)
    tensors["transforms.T_r.start"][0] *= 1.5  # no longer orthogonal
    save_file(tensors, file)
    assert verify(run, altered, model_dir).code == 1


def test_verify_against_another_model(
    run: Run, quantized: Path, save_model: Callable[..., Path], tmp_path: Path
) -> None:
    for other in (save_model(tmp_path / "same_sizes", "bias", seed=9), save_model(tmp_path / "other_sizes", "gqa")):
        assert "was not made from" in one_error(verify(run, quantized, other))


# -- bad input --

Damage = Callable[[Path], None]


def edit_config(**changes: object) -> Damage:
    def damage(model: Path) -> None:
        config = json.loads((model / "config.json").read_text())
        config.update(changes)
        (model / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))

    return damage


def remove(*names: str) -> Damage:
    def damage(model: Path) -> None:
        for name in names:
            (model / name).unlink()

    return damage


def write(name: str, content: bytes) -> Damage:
    return lambda model: (model / name).write_bytes(content) and None  # type: ignore[func-returns-value]


def truncate(model: Path) -> None:
    file = model / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-100])


def corrupt_header(model: Path) -> None:
    content = bytearray((model / "model.safetensors").read_bytes())
    content[8:40] = b"\x00" * 32
    (model / "model.safetensors").write_bytes(content)


def missing_shard(model: Path) -> None:
    tensors = load_file(model / "model.safetensors")
    names = {name: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, name in enumerate(tensors)}
    for file in sorted(set(names.values()))[:1]:
        save_file({name: t for name, t in tensors.items() if names[name] == file}, model / file, {"format": "pt"})
    (model / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": names}))
    (model / "model.safetensors").unlink()


def change_tensors(change: Callable[[dict[str, torch.Tensor]], Any]) -> Damage:
    def damage(model: Path) -> None:
        tensors = load_file(model / "model.safetensors")
        change(tensors)
        save_file(tensors, model / "model.safetensors", {"format": "pt"})

    return damage


def set_value(name: str, value: float) -> Damage:
    return change_tensors(lambda tensors: tensors[name].view(-1)[3:4].fill_(value))


DOWN = "model.layers.1.mlp.down_proj.weight"
BAD_MODELS: dict[str, tuple[Damage, str]] = {
    "no config": (remove("config.json"), "is no model: it has no config.json"),
    "config is no JSON": (write("config.json", b"{"), "config.json' is not valid JSON"),
    "config is a list": (write("config.json", b"[]"), "config.json' is not a JSON object"),
    "config is not UTF-8": (write("config.json", b"\xff\xfe"), "config.json' is not valid JSON"),
    "architecture of transformers": (
        edit_config(model_type="gpt2", architectures=["GPT2LMHeadModel"]),
        "GPT2LMHeadModel with model_type 'gpt2' is not supported; known: LlamaForCausalLM",
    ),
    "architecture nobody knows": (
        edit_config(model_type="mamba9", architectures=["Mamba9"]),
        "Mamba9 with model_type 'mamba9' is not supported; known: LlamaForCausalLM",
    ),
    "no model type": (edit_config(model_type=None), "is not supported; known: LlamaForCausalLM"),
    "another head": (
        edit_config(architectures=["LlamaForSequenceClassification"]),
        "LlamaForSequenceClassification with model_type 'llama' is not supported",
    ),
    "architecture of another family": (
        edit_config(architectures=["Qwen2ForCausalLM"]),
        "Qwen2ForCausalLM with model_type 'llama' is not supported: of this model_type, only LlamaForCausalLM is",
    ),
    "multimodal": (
        edit_config(
            model_type="aria",
            architectures=["AriaForConditionalGeneration"],
            text_config={"model_type": "aria_text"},
        ),
        "is a multimodal model whose text part is not known: save it (model_type 'aria_text') as a model of its own",
    ),
    "windows of a family that has none": (
        edit_config(sliding_window=64),
        "has a sliding_window, which transformers leaves out of account",
    ),
    "windows in some layers of a family that has them in all": (
        edit_config(
            model_type="mistral",
            architectures=["MistralForCausalLM"],
            layer_types=["full_attention", "sliding_attention"],
        ),
        "has layer_types of several kinds, which transformers leaves out of account",
    ),
    "RoPE of a part of each head, in a family that turns all": (
        edit_config(rope_parameters={"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}),
        "has a partial_rotary_factor, which transformers leaves out of account",
    ),
    "impossible sizes": (edit_config(num_attention_heads=5), "config.json: "),
    "no weights": (remove("model.safetensors"), "has no model.safetensors"),
    "truncated weights": (truncate, "model.safetensors' is corrupt or truncated"),
    "corrupt header": (corrupt_header, "model.safetensors' is corrupt or truncated"),
    "empty weights": (write("model.safetensors", b""), "model.safetensors' is corrupt or truncated"),
    "missing shard": (missing_shard, "00002-of-00002.safetensors' is missing"),
    "broken index": (write("model.safetensors.index.json", b"{"), "index.json' is not valid JSON"),
    "index without a map": (write("model.safetensors.index.json", b'{"weight_map": 3}'), "has no weight_map"),
    "missing tensor": (change_tensors(lambda t: t.pop(DOWN)), f"lacks the tensor {DOWN}"),
    "wrong shape": (
        change_tensors(lambda t: t.__setitem__(DOWN, torch.zeros(3, 3))),
        f"{DOWN} has shape [3, 3], but config.json asks for [42, 72]",
    ),
    "NaN": (set_value(DOWN, float("nan")), f"{DOWN} holds NaN or infinite values"),
    "NaN in an unused embedding": (set_value("model.embed_tokens.weight", float("nan")), "embed_tokens.weight holds"),
    "infinite": (set_value("model.norm.weight", float("inf")), "model.norm.weight holds NaN or infinite values"),
    "no tokenizer": (remove("tokenizer.json", "tokenizer_config.json"), "tokenizer"),
    "broken tokenizer": (write("tokenizer.json", b"{"), "has no usable tokenizer"),
    "quantized already": (edit_config(quantization_config={"quant_method": "fptquant"}), "is quantized already"),
    "smaller vocabulary": (edit_config(vocab_size=100), "do not belong together"),
    "no layers": (edit_config(num_hidden_layers=0), "describes a model without layers"),
    "unknown RoPE": (edit_config(rope_parameters={"rope_type": "round", "rope_theta": 1e4}), "config.json"),
    "an adapter": (write("adapter_config.json", b"{}"), "adapter_config.json' is of an adapter: merge it into its mod"),
    "a shard beside it": (write("model-00001-of-00002.safetensors", b""), "has both model.safetensors and model-"),
    "unknown type": (edit_config(dtype="float8_e4m3fn"), "no model is computed in dtype torch.float8_e4m3fn"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_MODELS)
def test_bad_model(case: str, run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    damage, message = BAD_MODELS[case]
    damage(model)
    before = tree(tmp_path)
    # Bad values are only seen when the weights are read, after the plan and the first progress bar.
    quietly = run_quiet if case in ("NaN", "NaN in an unused embedding", "infinite") else run_plain
    line = one_error(quietly(run, model, "-o", tmp_path / "new" / "out", "--calibration", calibration, *SMALL))
    assert message in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("name", ["no/such/directory", "./nothing", "org/model", "nothing"])
def test_no_model_path(name: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    line = one_error(run("quantize", name, "-o", tmp_path / "out"))
    assert f"'{name}' is n" in line and os.listdir(tmp_path) == []


def test_a_file_is_no_model(run: Run, calibration: Path, tmp_path: Path) -> None:
    assert "is no model" in one_error(run("quantize", calibration, "-o", tmp_path / "out"))


BAD_OPTIONS: dict[str, tuple[list[object], str]] = {
    "recipe": (["--recipe", "fptquan"], "unknown recipe 'fptquan': did you mean 'fptquant'?"),
    "recipe file": (["--recipe", "none.yaml"], "recipe file 'none.yaml' does not exist"),
    "precision": (["--precision", "w4a8kv9"], "--precision: unknown precision 'w4a8kv9': did you mean 'w4a8kv8'?"),
    "transform": (["--without", "T_q"], "unknown transform 'T_q': did you mean 'T_"),
    "rounding": (["--rounding", "up"], "error: --rounding: Input should be 'nearest', 'gptq' or 'quantease'"),
    "budget": (["--budget", "4"], "--budget: '4' is no limit: give sites=N, extra_bytes=N or target_kl=X"),
    "budget of something": (["--budget", "layers=4"], "error: --budget: unknown field 'layers'"),
    "endless budget": (["--budget", "target_kl=inf"], "error: --budget: target_kl: Input should be"),
    "budget without a number": (["--budget", "sites="], "error: --budget: sites: Input should be"),
    "two budgets": (["--budget", "sites=2,target_kl=1"], "error: --budget: sites: Input should be"),
    "kv strategy": (["--kv-strategy", "token"], "error: --kv-strategy: Input should be 'tensor' or 'head'"),
    "kv strategy of no cache": (["--kv-strategy", "head", "--precision", "w4a16"], "the KV cache is not quantized at"),
    "field of a text": (["--calibration-field", "body"], "calibration.field: only a dataset has one"),
    "dtype": (["--dtype", "int8"], "error: --dtype: Input should be 'auto', "),
    "seed": (["--seed", "-3"], "error: --seed: Input should be"),
    "sequences": (["--sequences", "0"], "error: --sequences: Input should be"),
    "length": (["--length", "2"], "error: --length: Input should be"),
    "chats": (["--chats", "1"], "error: --chats: Input should be less than 1"),
    "memory": (["--max-memory", "much"], "error: --max-memory: 'much' is no size: give one like 8GB"),
    "two options": (["--seed", "-3", "--length", "2"], "; --seed: Input should be"),
    "short text": (["--sequences", "5000"], "tokens, but 5000 sequences of 32 need"),
    "text missing": (["--calibration", "nothing.txt"], "nothing.txt' is neither a text file nor a dataset"),
}  # fmt: skip


@pytest.mark.parametrize("case", BAD_OPTIONS)
def test_bad_option(
    case: str, run: Run, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    options, message = BAD_OPTIONS[case]
    before = tree(tmp_path)
    line = one_error(run("quantize", model, "-o", "new/out", "--calibration", calibration, *SMALL, *options))
    assert message in line and "Value error" not in line and "value:" not in line and "options:" not in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize(
    "content, message",
    [
        ("roundin: {method: gptq}", "unknown field 'roundin': did you mean 'rounding'?"),
        ("precision: w4a4", "unknown precision 'w4a4': did you mean"),
        ("transforms: [T_z]", "unknown transform 'T_z'"),
        ("transforms: [T_k, T_d: {block: 7}]", "block must be a power of two, got 7"),
        ("transforms: [T_k, [T_d]]", "unknown transform"),
        ("scales: {steps: 2}\nend_to_end: {steps: 2, teacher: online}", "scales.teacher have to be the same"),
        ("transforms: {T_d: {block: 7}}", "block must be a power of two, got 7"),
        ("transforms: {T_d: {block: 64}}", "block 64 does not divide the intermediate size 72"),
        ("overrides: [{modules: 're:.*nothing', activations: {bits: 8}}]", "'re:.*nothing' matches no linear layer"),
        ("rounding: 3", "r.yaml: rounding: give a mapping of fields"),
        ("a: [", "not valid YAML"),
    ],
)
def test_bad_recipe_file(content: str, message: str, run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "r.yaml").write_text(content)
    before = tree(tmp_path)
    options = ("--recipe", tmp_path / "r.yaml", "--calibration", calibration, *SMALL)
    assert message in one_error(run("quantize", model, "-o", tmp_path / "out", *options))
    assert tree(tmp_path) == before


def test_output_within_the_source(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(model)
    (tmp_path / "elsewhere").symlink_to(model / "new")
    before = tree(tmp_path)
    for source, output in ((model, model / "out"), (model, tmp_path / "link" / "a" / "out"),
                           (tmp_path / "link", model / "out"), (model, tmp_path / "elsewhere")):  # fmt: skip
        line = one_error(run("quantize", source, "-o", output, "--calibration", calibration, *SMALL))
        assert f"'{output}' is inside the source model's directory" in line
    assert tree(tmp_path) == before


@pytest.mark.parametrize("output", ["/proc/out", "/proc/self/a/out", "circle/out", "x" * 300, "new/" + "x" * 250])
def test_output_that_can_not_be_written(
    output: str, run: Run, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Found by trying: root may write to /proc, by its rights."""
    monkeypatch.chdir(tmp_path)
    Path("circle").symlink_to("circle")
    line = one_error(run("quantize", model, "-o", output, "--calibration", calibration, *SMALL))
    assert "written to" in line and "MB" not in line
    assert sorted(os.listdir(tmp_path)) == ["circle", "model"]


def test_notes(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    """What is odd is said, and quantized all the same; what says that a model is quantized is left behind."""
    change_tensors(lambda t: (t[DOWN].zero_(), t.update({"model.extra.weight": torch.ones(2)})))(model)
    (model / "hf_quant_config.json").write_text("{}")
    notes = [
        f"note: '{model}': a LlamaForCausalLM has no place for the tensor model.extra.weight: left out",
        f"note: '{model}': all values are 0 in the weight matrix {DOWN}",
    ]
    result = run("quantize", model, "-o", tmp_path / "out", "--calibration", calibration, *SMALL)
    assert result.code == 0 and all(result.err.count(note) == 1 for note in notes), result.err
    assert not (tmp_path / "out" / "hf_quant_config.json").exists()
    result = run("evaluate", model, "--text", calibration, "--windows", 1, "--length", 8)
    assert result.code == 0 and all(note in result.err for note in notes)


def test_files_that_only_vllm_would_load(run: Run, model: Path, calibration: Path) -> None:
    (model / "consolidated.safetensors").write_bytes((model / "model.safetensors").read_bytes())
    options = ("--text", calibration, "--windows", 1, "--length", 8)
    assert run("evaluate", model, *options).code == 0
    line = one_error(run("evaluate", model, *options, "--backend", "vllm"))
    assert "consolidated.safetensors' is no part of the checkpoint beside it, but vLLM may load it: remove it" in line


def test_output_that_exists(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    options = ("--calibration", calibration, *SMALL)
    out, home = tmp_path / "out", tmp_path / "home"
    for folder in (out, home):
        folder.mkdir()
    (home / "thesis.tex").write_text("precious")
    before = tree(tmp_path)
    assert "exists: choose another output or pass --overwrite" in one_error(run("quantize", model, "-o", out, *options))
    line = one_error(run("quantize", model, "-o", home, "--overwrite", *options))
    assert "is no checkpoint of fptquant; --overwrite only replaces one" in line
    (home / "config.json").write_text('{"my": "settings"}')
    assert "is no checkpoint of fptquant" in one_error(run("quantize", model, "-o", home, "--overwrite", *options))
    (home / "config.json").unlink()
    assert "is no checkpoint of fptquant" in one_error(run("quantize", model, "-o", model, "--overwrite", *options))
    assert tree(tmp_path) == before
    assert run("quantize", model, "-o", out, "--overwrite", *options).code == 0  # an empty directory
    first = tree(out)
    result = run("quantize", model, "-o", out, "--overwrite", *options, "--seed", 1)
    assert result.code == 0 and tree(out)["model.safetensors"] != first["model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["home", "model", "out"]


def test_overwrite_keeps_the_old_one_when_the_run_fails(
    run: Run, model: Path, calibration: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = ("-o", tmp_path / "out", "--overwrite", "--calibration", calibration, *SMALL)
    assert run("quantize", model, *options).code == 0
    before = tree(tmp_path)

    def fail(*arguments: object) -> None:
        assert (tmp_path / "out").is_dir() and list(tmp_path.glob(".out.partial-*/model.safetensors"))
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(writer, "save_file", fail)  # the last but one file of a checkpoint
    assert "is full: free some space" in one_error(run_quiet(run, model, *options, "--seed", 1))
    assert {name: content for name, content in tree(tmp_path).items() if ".out.state" not in name} == before


def run_plain(run: Run, *arguments: object) -> Result:
    return run("quantize", *arguments)


def run_quiet(run: Run, *arguments: object) -> Result:
    """Without the progress bars that precede the error of a run that was under way."""
    result = run("quantize", *arguments)
    result.err = "\n".join(line for line in result.err.splitlines() if line.startswith(("error", "Traceback")))
    return result


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, where this machine lets us mount one."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(disk)], capture_output=True
    )
    if not mounted or mounted.returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)


def test_disk_too_small_is_found_before(run: Run, model: Path, calibration: Path, small_disk: Path) -> None:
    (small_disk / "filler").write_bytes(b"x" * 200_000)
    options = ("-o", small_disk / "out", "--calibration", calibration, *SMALL)
    assert "MB free, but the checkpoint and the run's state need about" in one_error(run("quantize", model, *options))
    assert os.listdir(small_disk) == ["filler"]


def test_disk_that_fills_up(
    run: Run, model: Path, calibration: Path, small_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Publication, "require_space", lambda self, size: None)  # someone else fills it meanwhile
    for filled in (200_000, 130_000):  # full while writing the weights, and after them
        (small_disk / "filler").write_bytes(b"x" * filled)
        options = ("-o", small_disk / "out", "--calibration", calibration, *SMALL)
        assert "is full: free some space" in one_error(run_quiet(run, model, *options))
        assert set(os.listdir(small_disk)) - {".out.state"} == {"filler"}


def until_trained(arguments: tuple[object, ...], errors: Path) -> None:
    """The command in this process, whose imports would take longer than the run. It waits where training ends."""
    save = RunState.save

    def saved(self: RunState, name: str, *content: Any) -> None:
        save(self, name, *content)
        if name == "local":
            time.sleep(600)

    RunState.save = saved  # type: ignore[method-assign]
    sys.stderr = errors.open("w", encoding="utf-8")
    sys.argv = ["fptquant", *map(str, arguments)]
    cli.main()


@pytest.mark.parametrize("sign", [signal.SIGKILL, signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_leaves_nothing_that_looks_finished(
    sign: signal.Signals, run: Run, model: Path, calibration: Path, tmp_path: Path
) -> None:
    errors = tmp_path / "errors"
    options = ("--calibration", calibration, *SMALL, "--recipe", "fptquant-light")
    command = ("quantize", model, "-o", tmp_path / "out", *options)
    process = forkserver.context().Process(target=until_trained, args=(command, errors))
    process.start()
    deadline = time.monotonic() + 180
    trained = tmp_path / ".out.state" / "local.safetensors"
    while not trained.exists() and process.is_alive() and time.monotonic() < deadline:
        time.sleep(0.002)
    assert len(list(tmp_path.glob(".out.partial*"))) == 1
    os.kill(process.pid or 0, sign)
    process.join(180)  # it writes its state first
    error = errors.read_text(encoding="utf-8")
    errors.unlink()
    assert process.exitcode and trained.exists() and not (tmp_path / "out").exists()
    left = [name for name in os.listdir(tmp_path) if name.startswith(".out.partial")]
    assert len(left) == (1 if sign is signal.SIGKILL else 0)
    if sign is not signal.SIGKILL:
        assert process.exitcode == 128 + sign and "interrupted" in error and "Traceback" not in error
        assert run(*command, "--fresh").code == 0
        assert sorted(os.listdir(tmp_path)) == ["model", "out"]
        return
    other = (*command[1:], "--length", "24")
    assert "another data, recipe: finish that run" in one_error(run_quiet(run, *other))
    for name in ("out", "whole"):
        assert run("quantize", model, "-o", tmp_path / name, *options).code == 0
    assert tree(tmp_path / "out")["model.safetensors"] == tree(tmp_path / "whole")["model.safetensors"]
    assert sorted(os.listdir(tmp_path)) == ["model", "out", "whole"]


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--text", "missing.txt"], "missing.txt' can't be read"),
        (["--text", SHORT, "--windows", "9999"], "need 5119488: lower --windows or --length"),
        (["--text", SHORT, "--length", "1025"], "--length: 1025 tokens are more than the 1024 that the model has"),
        (["--text", SHORT, "--json", "no/such/folder/x.json"], "--json: "),
        (["--text", SHORT, "--json", "/"], "--json: '/' is a directory: name a file"),
        (["--text", SHORT, "--json", "/proc/x.json"], "--json: '/proc/x.json' can't be written to"),
    ],
)
def test_evaluate_bad_input(
    arguments: list[object],
    message: str,
    run: Run,
    model_dir: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert message in one_error(run("evaluate", model_dir, *arguments))
    assert os.listdir(tmp_path) == []


def test_verify_bad_input(run: Run, quantized: Path, model_dir: Path, tmp_path: Path) -> None:
    assert "is no checkpoint of fptquant" in one_error(verify(run, model_dir, model_dir))
    assert "is no model" in one_error(verify(run, tmp_path, model_dir))
    assert "is quantized already" in one_error(verify(run, quantized, quantized))


def test_the_module_runs_as_a_program() -> None:
    command = [sys.executable, "-m", "fptquant.cli", "quantize", "/no/such/model", "-o", "/no/such/out"]
    result = subprocess.run(command, capture_output=True, text=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
    assert result.returncode == 2 and result.stdout == ""
    assert result.stderr.count("\n") == 1 and result.stderr.startswith("error: '/no/such/model' is no model")


CHECKPOINT = str(Path(__file__).parents[1] / "golden" / "w4a8kv8")
ROWS = Path(CHECKPOINT) / "config.json"
FINE = [["--version"], ["recipes"], ["recipes", "rtn"], ["recipes", "--fields"]]
# A command line and what it prints; none of it needs torch or transformers.
QUICK: list[tuple[list[str], str]] = [
    (["--help"], "Usage"),
    (["--version"], "fptquant "),
    *(([name, "--help"], "--log-file") for name in typer.main.get_command(cli.app).commands),  # type: ignore[attr-defined]
    (["recipes"], "w4a4kv4-symmetric"),
    (["recipes", "rtn"], "method: nearest"),
    (["recipes", "--fields"], "transforms.T_d.block"),
    (["recipes", "fptquan"], "did you mean 'fptquant'?"),
    (["recipes", "none.yaml"], "does not exist"),
    (["quantise"], "No such command"),
    (["quantize"], "Missing"),
    (["quantize", "/no/such", "-o", "x"], "'/no/such' is no model"),
    (["quantize", ".", "-o", "x"], "is no model: it has no config.json"),
    *(
        (["quantize", "org/model", "-o", "new", *map(str, options)], message)
        for case, (options, message) in BAD_OPTIONS.items()
        if case != "short text"  # found by its tokens
    ),
    (["quantize", "org/model", "-o", "."], "'.' exists"),
    (["quantize", CHECKPOINT, "-o", "new"], "is quantized already"),
    (["quantize", "org/model", "-o", "new", "--device", "cuda0"], "--device: 'cuda0' is no device"),
    (["quantize", "org/model", "-o", "new", "--calibration", "no/such/file"], "nor a dataset: there is no such file"),
    (["quantize", "org/model", "-o", "new", "--calibration", "./file"], "nor a dataset: there is no such file"),
    (["quantize", "org/model", "-o", "new", "--calibration", "text:no"], "'no' can't be read"),
    (["quantize", "org/model", "-o", "new", "--residency", "x"], "Invalid value"),
    (["quantize", "org/model", "-o", "new", "--quiet", "--verbose"], "give one of them"),
    (["quantize", "org/model", "-o", "new", "--log-file", "no/such/file"], "--log-file: "),
    (["verify", "/no/such", "--against", "org/model"], "'/no/such' is not a directory"),
    (["verify", CHECKPOINT, "--against", CHECKPOINT], "is quantized already"),
    (["evaluate", "/no/such", "--text", "x"], "'/no/such' is no model"),
    (["evaluate", "org/model", "--text", "no.txt"], "no.txt' can't be read"),
    (["evaluate", "org/model", "--text", str(ROWS)], "is json, not text"),
    (["evaluate", "org/model", "--text", str(TEXT), "--device", "cuda0"], "--device: 'cuda0' is no device"),
    (["evaluate", "org/model", "--tasks", "x", "--include-path", "no"], "--include-path: 'no' is not a directory"),
    (["evaluate", "org/model", "--tasks", "nonsense"], "error: --tasks: lm-eval "),  # knows none, or isn't installed
    (["evaluate", "org/model", "--text", str(TEXT), "--device", "nonsense"], "--device: 'nonsense' is no device"),
    *(
        (["evaluate", "org/model", "--text", str(TEXT), *option], f"{option[0]}: is for --tasks, not for --text: leave")
        for option in (["--limit", "3"], ["--shots", "0"], ["--include-path", "."])
    ),
    *(
        (["evaluate", "org/model", "--tasks", "x", *option], f"{option[0]}: is for --text, not for --tasks: leave")
        for option in (["--windows", "20"], ["--length", "512"], ["--special-tokens"])
    ),
    (["sensitivity", "org/model", "--rounding", "up"], "error: --rounding: "),
    (["sensitivity", "org/model", "--kinds", "down"], "did you mean 'down_input'?"),
    (["sensitivity", "org/model", "--text", "no.txt"], "no.txt' can't be read"),
    (["sensitivity", "org/model", "--calibration", "no.txt"], "nor a dataset: there is no such file"),
    (["sensitivity", "org/model", "--windows", "99999"], "is cut into"),
    (["sensitivity", CHECKPOINT], "is quantized already"),
    (["sensitivity", "org/model", "--json", "no/such/file"], "--json: "),
    (["sensitivity", "org/model", "--plot", "no/such/x.png"], "--plot: "),
    (["verify", CHECKPOINT, "--against", "org/model", "--text", "no.txt"], "no.txt' can't be read"),
    (["verify", CHECKPOINT, "--against", "org/model", "--device", "GPU"], "--device: 'GPU' is no device"),
    (["export", "/no/such", "-o", "new"], "'/no/such' is not a directory"),
    (["export", CHECKPOINT, "-o", "new", "--format", "gguf"], "--format gguf: "),
    (["export", CHECKPOINT, "-o", "new", "--format", "float", "--online", "keep"], "--online keep: "),
    *(
        (["export", CHECKPOINT, "-o", "new", "--quality", "0", *option], f"{option[0]}: is for a comparison, and")
        for option in (["--text", str(TEXT)], ["--length", "512"])
    ),
    (["export", CHECKPOINT, "-o", "new", "--length", "512"], "--length: is for --text, and left-over windows"),
    (["export", CHECKPOINT, "-o", f"{CHECKPOINT}/new"], "is inside the checkpoint's directory"),
    (["report", CHECKPOINT, "-o", str(TEXT)], "is no report of fptquant"),
    (["serve", "/no/such"], "'/no/such' is not a directory"),
    (["serve", "."], "is no model"),
    (["chat", "/no/such"], "'/no/such' is not a directory"),
    (["chat"], "give either a checkpoint or --server"),
    (["inspect", "/no/such"], "'/no/such' is not a directory"),
    (["push", "/no/such", "org/name"], "'/no/such' is not a directory"),
    (["push", CHECKPOINT, "name"], "'name' is no repository: give ORG/NAME"),
]


def test_what_is_quick(tmp_path: Path) -> None:
    """Help, lists and errors in arguments import none of what takes seconds."""
    script = tmp_path / "calls.py"
    script.write_text(
        "import contextlib, io, json, sys\n"
        "from fptquant.cli import main\n"
        "def call(arguments):\n"
        "    sys.argv, text, code = ['fptquant', *arguments], io.StringIO(), 0\n"
        "    with contextlib.redirect_stdout(text), contextlib.redirect_stderr(text):\n"
        "        try:\n"
        "            main()\n"
        "        except SystemExit as stop:\n"
        "            code = stop.code or 0\n"
        "    return code, ' '.join(text.getvalue().split()), [name for name in SLOW if name in sys.modules]\n"
        "SLOW = ['torch', 'transformers', 'compressed_tensors', 'numpy', 'datasets']\n"
        "json.dump([call(arguments) for arguments in json.load(sys.stdin)], sys.stdout)\n"
    )
    control = [["families"]]
    (tmp_path / "here").mkdir()
    result = subprocess.run(
        [sys.executable, str(script)],
        input=json.dumps([arguments for arguments, _ in QUICK] + control),
        capture_output=True, text=True, check=True, cwd=tmp_path / "here",
        env={**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": "200"},
    )  # fmt: skip
    *found, last = json.loads(result.stdout)
    for (arguments, message), (code, text, slow) in zip(QUICK, found, strict=True):
        assert message in text and not slow, (arguments, text, slow)
        assert code == (0 if arguments in FINE or "--help" in arguments else 2), arguments
    assert last[0] == 0 and "torch" in last[2]  # it is seen where it is


def test_every_transform_has_options() -> None:
    assert tuple(TRANSFORM_OPTIONS) == tuple(fptquant.transforms.TRANSFORMS)


def test_defaults_are_in_the_help() -> None:
    for name, command in typer.main.get_command(cli.app).commands.items():  # type: ignore[attr-defined]
        for option in command.params:
            flag = getattr(option, "is_flag", False) and option.default is False
            said = isinstance(option.show_default, str) or (option.show_default and option.default not in (None, ""))
            assert option.required or flag or said or option.name == "help", (name, option.name)


def test_colours() -> None:
    command = [sys.executable, "-m", "fptquant", "recipes", "fptquan"]
    for no_color in ({}, {"NO_COLOR": "1"}):
        environment = {**os.environ, "PYTHONPATH": str(ROOT), "FORCE_COLOR": "1", "TERM": "xterm", **no_color}
        result = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert "unknown recipe" in result.stderr and ("\x1b[31m" in result.stderr) == (not no_color)


def test_completion() -> None:
    settings = {"_FPTQUANT_COMPLETE": "complete_bash", "COMP_WORDS": "fptquant qu", "COMP_CWORD": "1"}
    command = [sys.executable, "-m", "fptquant"]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **settings}
    assert subprocess.run(command, capture_output=True, text=True, env=environment).stdout.split() == ["quantize"]


def test_quiet_and_a_log(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    log = tmp_path / "log"
    options = ("--calibration", calibration, *SMALL, "--recipe", "rtn", "--log-file", log)
    result = run("quantize", model, "-o", tmp_path / "out", *options, "--quiet")
    assert result == Result(0, "", "")
    lines = log.read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d ", line) for line in lines)
    begins = "[2/4] calibrate and round begins; all stages: about"
    for expected in (f"plan: {model} -> {tmp_path}/out", "INT8", begins, "calibrate and round: ", "vllm serve"):
        assert any(expected in line for line in lines), expected
    line = one_error(run("quantize", model, "-o", tmp_path / "out", *options, "--quiet"))
    assert "exists: choose another output" in line and line in log.read_text()
    result = run("evaluate", model, "--text", calibration, "--windows", 1, "--length", 8, "--quiet")
    assert result.code == 0 and "perplexity" in result.out and result.err == ""


def test_verbose_says_where_an_error_comes_from(run: Run, tmp_path: Path) -> None:
    assert "Traceback" in run("quantize", "/no/such", "-o", tmp_path / "out", "--verbose").err
    assert "Traceback" not in run("quantize", "/no/such", "-o", tmp_path / "out").err


def test_long_paths_are_whole(run: Run, model: Path, calibration: Path, tmp_path: Path) -> None:
    long = Path(shutil.move(model, tmp_path / ("x" * 150)))
    for result in (
        run("evaluate", long, "--text", calibration, "--windows", 1, "--length", 8),
        run("quantize", long, "-o", tmp_path / "out", "--calibration", calibration, *SMALL, "--dry-run"),
    ):
        assert str(long) in result.out and "…" not in result.out


def test_serve_prints_what_it_runs(
    run: Run, quantized: Path, model_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("VLLM_USE_AOT_COMPILE", raising=False)
    shown = run("serve", quantized, "--print", "--port", 8001).out.split()
    assert shown[:2] == ["$", "VLLM_USE_AOT_COMPILE=0"] and shown[2].endswith("vllm")
    assert shown[3:5] == ["serve", str(quantized)]
    assert shown[5:] == ["--quantization", "fptquant", "--dtype", "float32", "--port", "8001"]
    monkeypatch.setenv("VLLM_USE_AOT_COMPILE", "1")  # the user's own word
    assert run("serve", quantized, "--print").out.split()[1].endswith("vllm")
    assert run("serve", quantized, "--print", "--dtype=bfloat16").out.split()[-1] == "--dtype=bfloat16"
    assert "is no checkpoint of fptquant" in one_error(run("serve", model_dir, "--print"))
    damaged = Path(shutil.copytree(quantized, tmp_path / "damaged"))
    weights = damaged / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    assert "corrupt or truncated" in one_error(run("serve", damaged, "--print"))


def test_chat(run: Run, quantized: Path) -> None:
    result = run("chat", quantized, "--prompt", "Rome", "--new-tokens", 5)
    model = transformers.AutoModelForCausalLM.from_pretrained(quantized)
    tokenizer = transformers.AutoTokenizer.from_pretrained(quantized)
    prompt = tokenizer("Rome", add_special_tokens=False, return_tensors="pt")["input_ids"]  # the template adds nothing
    expected = model.generate(prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=5, do_sample=False)
    assert result.code == 0 and tokenizer.decode(expected[0, prompt.shape[1] :]).strip() in result.out
    assert "nothing answers at http://localhost:9/v1" in one_error(run("chat", "--server", "http://localhost:9"))


def test_help_names_every_choice(run: Run) -> None:
    text = run("quantize", "--help").out + run("sensitivity", "--help").out
    words = re.findall(r"[\w-]+", text)
    for name in (*fptquant.recipe.PRECISIONS, *fptquant.quantize.rounding.ROUNDERS):
        assert words.count(name) >= 2, name


def test_import_registers_the_format(quantized: Path) -> None:
    """`import fptquant` is enough for transformers, wherever it is not the command itself."""
    code = f"import fptquant, transformers; transformers.AutoModelForCausalLM.from_pretrained({str(quantized)!r})"
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)})
