"""`fptquant export`: what is written, that it computes what it says, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaForCausalLM

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.export.plan import Plan, StockLayer, make_plan
from fptquant.export.simulation import StockLinear, stock_simulation
from fptquant.export.tensors import stock_tensors, without_hadamard
from fptquant.export.write import prepare
from fptquant.format import ActivationScheme, CheckpointConfig, LinearScheme, WeightScheme, pack_codes
from fptquant.format.arithmetic import block_hadamard, hadamard_factors
from fptquant.layers.inputs import window_logits
from fptquant.loading import attention_for, load_model, open_source
from fptquant.progress import Stages
from fptquant.simulate import SimulatedLinear
from fptquant.wiring import Role
from tests.conftest import EXCERPT, VOCABULARY
from tests.families import make_job
from tests.fptquant.conftest import Run, one_error

GOLDEN = Path(__file__).resolve().parent.parent / "golden"
TOKENS = torch.randint(0, VOCABULARY, (1, 24), generator=torch.Generator().manual_seed(5))
MEASURE = ("--text", EXCERPT, "--quality", 1, "--length", 32)


def planned(checkpoint: Path, online: Any = "undo") -> Plan:
    source = open_source(checkpoint)
    config = CheckpointConfig.parse(source.config.quantization_config)
    return make_plan(config, source.architecture, source.architecture.shape(source.config).layers, online=online)


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    found: Tensor = model(TOKENS).logits[0]
    return found.float().log_softmax(-1)


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("exports")


@pytest.fixture
def exported(exports: Path, run: Run) -> Any:
    """`exported("groups")`: what the command makes of a golden checkpoint, once."""

    def export(name: str) -> Path:
        target = exports / name
        if not target.exists():
            result = run("export", GOLDEN / name, "-o", target, *MEASURE)
            assert result.code == 0, result.err
            assert "what could not be kept" in result.out and "perplexity" in result.out
        return target

    return export


@pytest.mark.parametrize("name", ["groups", "w4a16", "hadamards"])
def test_transformers_and_the_simulation_compute_the_same(
    name: str, exported: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`groups` has a constant token, S_n, T_d and groups; `w4a16` a float layer; `hadamards` one at each input."""
    pytest.importorskip("compressed_tensors")
    directory = exported(name)
    monkeypatch.setattr("fptquant.export.simulation.LARGEST", 127.5)  # transformers' scales for tokens, not vLLM's
    simulated = logits(stock_simulation(open_source(directory), planned(GOLDEN / name)))
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    assert type(model) is LlamaForCausalLM
    difference = (logits(model) - simulated).abs()
    # each token's largest value is a tie, -127.5 or 127.5 steps: a last bit turns it, and codes behind it
    assert difference.max() < 1e-4 if name == "w4a16" else difference.mean() < 0.02
    source = open_source(directory)  # as `fptquant evaluate` does
    (found,) = window_logits(load_model(source), source.architecture, TOKENS)
    torch.testing.assert_close(found[0].log_softmax(-1), logits(model), rtol=0, atol=1e-4)
    streamed = stock_simulation(open_source(directory), planned(GOLDEN / name), residency="streamed")
    assert torch.equal(logits(streamed), simulated)
    ours = (logits(load_model(open_source(GOLDEN / name))) - simulated).abs()
    assert ours.max() < 1e-4 if name == "w4a16" else ours.mean() > 0.03  # what isn't kept shows


def test_a_float_export_is_a_model_like_any_other(run: Run, tmp_path: Path) -> None:
    """Of 4-bit activations, too, biases, T_d, and everything else."""
    result = run("export", GOLDEN / "w4a4kv4", "-o", tmp_path / "out", "--format", "float", *MEASURE)
    assert result.code == 0 and "integers: weights are what codes and scales stand for" in result.out
    config = CheckpointConfig.parse(open_source(GOLDEN / "w4a4kv4").config.quantization_config)
    source = open_source(tmp_path / "out")
    assert not source.quantized and source.dtype == torch.bfloat16
    model = load_model(source)
    plan = make_plan(config, source.architecture, 2, format="float")
    assert torch.equal(logits(model), logits(stock_simulation(source, plan)))
    down = load_model(open_source(GOLDEN / "w4a4kv4")).get_submodule("model.layers.0.mlp.down_proj")
    assert isinstance(down, SimulatedLinear) and down.codes is not None
    block = config.transforms.down_hadamard
    assert block is not None
    expected = without_hadamard(down.codes * down.weight_scale, block.block)
    found = model.get_parameter("model.layers.0.mlp.down_proj.weight")
    torch.testing.assert_close(found, expected, rtol=2**-8, atol=0)


@pytest.mark.parametrize("variant", ["qwen3", "gemma2 with windows", "granite", "phi3"])
def test_families_keep_their_values(variant: str, tmp_path: Path) -> None:
    """Norms of heads and behind blocks, windows, bounded scores, multipliers; a fused one is written as another."""
    pytest.importorskip("compressed_tensors")
    pipeline.quantize(make_job(variant, tmp_path, precision="w4a8", transforms=[], sink="none"), tmp_path / "out")
    source = open_source(tmp_path / "out")
    exporter = prepare(source, tmp_path / "stock")
    exporter.run(None, Stages())
    ours, stock = load_model(source), stock_simulation(open_source(tmp_path / "stock"), exporter.plan)
    (expected,) = window_logits(ours, source.architecture, TOKENS)
    (found,) = window_logits(stock, source.architecture, TOKENS)
    assert torch.equal(found, expected)
    attention = attention_for(stock.config)
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "stock", dtype=torch.float32, **attention)
    with torch.no_grad():
        difference = (model(TOKENS).logits - expected).abs()
    assert difference.mean() < 0.01 * expected.std()  # codes that a last bit turns


def test_it_is_described_as_compressed_tensors_reads_it(exported: Any) -> None:
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.quantization import QuantizationConfig

    described = json.loads((exported("groups") / "config.json").read_text())
    assert described["architectures"] == ["LlamaForCausalLM"] and described["model_type"] == "llama"
    QuantizationConfig.model_validate(described["quantization_config"])
    assert "fptquant" not in json.dumps(described).lower()
    tensors = load_file(exported("groups") / "model.safetensors")
    assert {name.rpartition(".")[2] for name in tensors} == {"weight", "weight_scale"}
    assert tensors["model.layers.0.mlp.up_proj.weight"].dtype == torch.int8


def test_the_record_says_what_was_lost(exported: Any) -> None:
    record = json.loads((exported("groups") / "fptquant-export.json").read_text())
    lost = " ".join(record["losses"])
    for part in ("KV cache", "constant first token", "S_n", "front of down_proj", "8-bit integers"):
        assert part in lost
        assert part in (exported("groups") / "README.md").read_text()
    assert record["quality"]["windows"] == 1 and record["quality"]["kl"] > 0
    assert "KV cache" not in json.loads((exported("w4a16") / "fptquant-export.json").read_text())["losses"]


def layer(inputs: Any = "static", **facts: Any) -> StockLayer:
    activations = ActivationScheme(bits=16 if inputs == "float" else 8)
    return StockLayer(LinearScheme(weights=WeightScheme(), activations=activations), 8, inputs, **facts)


def test_weights_take_a_hadamard_in() -> None:
    x, weight = torch.randn(5, 64), torch.randn(7, 64)
    turned = block_hadamard(x, *hadamard_factors(16))
    torch.testing.assert_close(x @ without_hadamard(weight, 16).T, turned @ weight.T)


def test_a_scale_for_each_token_takes_any_factor_in() -> None:
    """So nothing of S_n is missing behind it."""
    linear = StockLinear(nn.Linear(32, 8, bias=False), layer("dynamic"))
    codes = torch.randint(-8, 8, (8, 32))
    linear.load({"weight": codes.to(torch.int8), "weight_scale": torch.rand(8, 1)})
    x, scale = torch.randn(6, 32), 2.0 ** torch.randint(-9, 9, (6, 1))
    assert torch.equal(linear(x * scale) / scale, linear(x))
    static = StockLinear(nn.Linear(32, 8, bias=False), layer())
    static.load(
        {
            "weight": codes.to(torch.int8), "weight_scale": linear.weight_scale,
            "input_scale": torch.full((1,), 0.01), "input_zero_point": torch.zeros(1),
        }
    )  # fmt: skip
    assert not torch.allclose(static(x * scale) / scale, static(x))


def test_zero_points_are_kept() -> None:
    scheme = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=8, symmetric=False))
    stored = {
        "weight_packed": pack_codes(torch.randint(-8, 8, (4, 16)), 4), "weight_scale": torch.ones(4, 1),
        "weight_shape": torch.tensor([4, 16]), "input_scale": torch.tensor(0.1), "input_zero_point": torch.tensor(-7),
    }  # fmt: skip
    found = stock_tensors(StockLayer(scheme, 8, "static"), stored, torch.float32)
    assert found["input_zero_point"].tolist() == [-7] and found["input_zero_point"].dtype == torch.int8


def test_hadamards_may_stay(run: Run, tmp_path: Path) -> None:
    assert run("export", GOLDEN / "hadamards", "-o", tmp_path / "out", "--online", "keep", "--quality", 0).code == 0
    described = json.loads((tmp_path / "out" / "config.json").read_text())["quantization_config"]
    config = CheckpointConfig.parse(
        json.loads((GOLDEN / "hadamards" / "config.json").read_text())["quantization_config"]
    )
    down = config.transforms.down_hadamard
    assert down is not None
    groups = described["transform_config"]["config_groups"]
    assert any(r"re:^model\.layers\.\d+\.mlp\.down_proj$" in g["apply"][0]["targets"] for g in groups.values())
    assert groups[f"hadamard_{down.block}"]["head_dim"] == down.block
    tensors = load_file(tmp_path / "out" / "model.safetensors")
    assert int(tensors["model.layers.0.mlp.down_proj.weight"].abs().max()) <= 8  # codes as they were
    pytest.importorskip("compressed_tensors")
    from compressed_tensors.transform import TransformConfig

    TransformConfig.model_validate(described["transform_config"])


@pytest.mark.parametrize(
    ("checkpoint", "options", "expected"),
    [
        ("groups", ("--format", "onnx"), "unknown format 'onnx'"),
        ("groups", ("--format", "gguf"), "convert_hf_to_gguf.py"),
        ("groups", ("--format", "humming"), "static INT4 activations"),
        ("w4a4kv4", (), "has 4-bit activations"),
        ("experts", (), "mixtures of experts aren't exported"),
        ("nothing", (), "is not a directory"),
        ("groups", ("--format", "float", "--online", "keep"), "--online keep"),
        ("groups", ("--text", "nothing.txt"), "nothing.txt"),
    ],
)
def test_refused_before_any_work(
    checkpoint: str, options: tuple[str, ...], expected: str, run: Run, tmp_path: Path
) -> None:
    result = run("export", GOLDEN / checkpoint, "-o", tmp_path / "out", *options)
    assert expected in one_error(result)
    assert not list(tmp_path.iterdir())


def test_one_layer_of_4_bits_is_named(run: Run, tmp_path: Path) -> None:
    line = one_error(run("export", GOLDEN / "w4a8kv8", "-o", tmp_path / "out"))
    assert "model.layers.1.mlp.down_proj has 4-bit activations" in line


def test_what_stock_classes_or_kernels_have_not(tmp_path: Path) -> None:
    source = open_source(GOLDEN / "hadamards")
    fused = replace(source, architecture=replace(source.architecture, fused={"mlp.gate_up_proj": (Role.GATE, Role.UP)}))
    with pytest.raises(FPTQuantError, match="one weight elsewhere"):
        prepare(fused, tmp_path / "out")
    name = "model.layers.0.mlp.down_proj"
    tensors = {**source.weights.tensors, f"{name}.bias": source.weights.tensors["model.norm.weight"]}
    biased = replace(source, weights=replace(source.weights, tensors=tensors))
    with pytest.raises(FPTQuantError, match=f"{name} has a bias"):
        prepare(biased, tmp_path / "out", online="keep")
    prepare(biased, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_only_ours_is_replaced(run: Run, tmp_path: Path) -> None:
    checkpoint, target = tmp_path / "checkpoint", tmp_path / "out"
    shutil.copytree(GOLDEN / "groups", checkpoint)
    target.mkdir()
    assert run("export", checkpoint, "-o", target, "--quality", 0).code == 0  # an empty directory
    assert "exists" in one_error(run("export", checkpoint, "-o", target, "--quality", 0))
    assert run("export", checkpoint, "-o", target, "--quality", 0, "--overwrite").code == 0
    assert "is inside" in one_error(run("export", checkpoint, "-o", checkpoint / "out", "--quality", 0))
    assert "holds the checkpoint" in one_error(run("export", checkpoint, "-o", checkpoint, "--overwrite"))
    other = tmp_path / "other"
    other.mkdir()
    (other / "file").touch()
    assert "is no checkpoint" in one_error(run("export", checkpoint, "-o", other, "--overwrite"))


def test_a_damaged_checkpoint_leaves_nothing_behind(run: Run, tmp_path: Path) -> None:
    checkpoint = tmp_path / "in" / "checkpoint"
    shutil.copytree(GOLDEN / "groups", checkpoint)
    tensors = load_file(checkpoint / "model.safetensors")
    tensors["model.layers.1.self_attn.v_scale"] *= 2  # which the export hasn't
    save_file(tensors, checkpoint / "model.safetensors", metadata={"format": "pt"})
    result = run("export", checkpoint, "-o", tmp_path / "out" / "stock", "--quality", 0)
    line = result.err.strip().splitlines()[-1]  # behind the bar
    assert result.code == 2 and line.startswith("error: ") and "is not what was written into this checkpoint" in line
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_text_that_is_known_by_name_only(run: Run, tmp_path: Path) -> None:
    result = run("export", GOLDEN / "groups", "-o", tmp_path / "out")
    assert result.code == 0 and "give --text FILE" in result.err and "perplexity" not in result.out
