"""The checkpoint in plain transformers."""

import json
import pickle
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoTokenizer

from fptquant import hf_config, hf_models, pipeline
from fptquant.errors import FPTQuantError
from fptquant.format import quantized_architecture
from fptquant.format.binding import BINDING
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.simulate import SimulatedLinear
from fptquant.wiring import FAMILIES, Architecture
from tests.conftest import EXCERPT


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory, save_model: Callable[..., Path]) -> Path:
    folder = tmp_path_factory.mktemp("quantized")
    model = save_model(folder / "model", "bias", torch.bfloat16)
    calibration = {"source": str(EXCERPT), "sequences": 4, "length": 32}
    job = open_job(model, Recipe.parse({"calibration": calibration, "precision": "w4a4kv4"}))
    pipeline.quantize(job, folder / "out")
    return folder / "out"


@pytest.fixture
def editable(checkpoint: Path, tmp_path: Path) -> Path:
    import shutil

    shutil.copytree(checkpoint, tmp_path / "copy")
    return tmp_path / "copy"


def test_loads_and_generates(checkpoint: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    assert sum(isinstance(module, SimulatedLinear) for module in model.modules()) == 14 + 1
    assert not any(
        parameter.requires_grad and parameter.dim() == 2 and "proj" in name
        for name, parameter in model.named_parameters()
    )
    output = model.generate(**tokenizer("The old man", return_tensors="pt"), max_new_tokens=5, min_new_tokens=5)
    assert output.shape[1] == len(tokenizer("The old man")["input_ids"]) + 5


def test_scales_are_never_rounded_to_the_model_dtype(checkpoint: Path) -> None:
    """Loaded in bfloat16, as the checkpoint says, all that fixes the integers is still exact."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint)
    assert model.dtype == torch.bfloat16
    state, stored = model.state_dict(), load_file(checkpoint / "model.safetensors")
    del stored[BINDING]
    assert state.keys() == stored.keys()
    for name, tensor in stored.items():
        assert state[name].dtype == tensor.dtype and torch.equal(state[name], tensor), name
    assert any((t.to(torch.bfloat16).float() != t).any() for n, t in stored.items() if n.endswith("input_scale"))


def test_bfloat16_run_is_close_to_float32(checkpoint: Path) -> None:
    tokens = torch.arange(20)[None]
    half = AutoModelForCausalLM.from_pretrained(checkpoint)(tokens).logits.float()
    full = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(tokens).logits
    assert (half - full).pow(2).mean().sqrt() < 0.6 * full.std()  # 4-bit codes near a tie differ


def test_attention_implementation_can_not_be_lost(checkpoint: Path) -> None:
    """Asking for another one must not switch the KV quantization off silently."""
    tokens = torch.arange(20)[None]
    expected = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)(tokens).logits
    eager = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32, attn_implementation="eager")
    assert torch.equal(eager(tokens).logits, expected)


def test_saving_again_writes_the_same_tensors(checkpoint: Path, tmp_path: Path) -> None:
    AutoModelForCausalLM.from_pretrained(checkpoint).save_pretrained(tmp_path / "again")
    before, after = (load_file(path / "model.safetensors") for path in (checkpoint, tmp_path / "again"))
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    tokens = torch.arange(20)[None]
    first, second = (AutoModelForCausalLM.from_pretrained(p)(tokens).logits for p in (checkpoint, tmp_path / "again"))
    assert torch.equal(first, second)


def rewrite(folder: Path, change: Callable[[dict[str, torch.Tensor]], None]) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize(
    "name",
    [
        "model.layers.1.mlp.up_proj.input_scale", "model.layers.0.self_attn.v_scale",
        "model.layers.0.self_attn.q_proj.weight_packed", "model.layers.1.mlp.down_proj.input_zero_point",
        "model.layers.1.mlp.down_proj.weight_scale",
    ],
)  # fmt: skip
def test_missing_tensor(name: str, editable: Path) -> None:
    rewrite(editable, lambda tensors: tensors.__delitem__(name))
    with pytest.raises(FPTQuantError, match=name):
        AutoModelForCausalLM.from_pretrained(editable)


@pytest.mark.parametrize("value", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["model.layers.1.mlp.up_proj.input_scale", "model.layers.0.self_attn.v_scale",
                                  "model.layers.0.mlp.down_proj.weight_scale"])  # fmt: skip
def test_bad_scale(name: str, value: float, editable: Path) -> None:
    rewrite(editable, lambda tensors: tensors[name].view(-1)[-1:].fill_(value))
    with pytest.raises(FPTQuantError, match=f"{name} is .*must be positive and finite"):
        AutoModelForCausalLM.from_pretrained(editable)


def test_wrong_shape(editable: Path) -> None:
    rewrite(editable, lambda tensors: tensors["model.layers.0.mlp.up_proj.weight_shape"].fill_(3))
    with pytest.raises(FPTQuantError, match=r"up_proj.weight_shape: \[3, 3\], expected \[72, 42\]"):
        AutoModelForCausalLM.from_pretrained(editable)


def test_newer_format_and_unknown_field(editable: Path, change_json: Callable[..., None]) -> None:
    config = json.loads((editable / "config.json").read_text())["quantization_config"]
    for change, message in (
        ({"format_version": 3}, "upgrade vllm-fptquant"),
        ({"rotation": "x"}, "rotation"),
    ):
        change_json(editable / "config.json", quantization_config={**config, **change})
        with pytest.raises(FPTQuantError, match=message):
            AutoModelForCausalLM.from_pretrained(editable)


def test_a_checkpoint_has_a_model_type_of_its_own(checkpoint: Path) -> None:
    config = AutoConfig.from_pretrained(checkpoint)
    assert config.model_type == "fptquant_llama" and config.architectures == ["FPTQuantLlamaForCausalLM"]


@pytest.mark.parametrize("architecture", FAMILIES.values(), ids=list(FAMILIES))
def test_every_family_has_its_classes(architecture: Architecture) -> None:
    """Importable by name, so that what holds them can be pickled; each knows the class of its configuration."""
    config = getattr(hf_config, quantized_architecture(architecture.class_of("Config")))
    assert config.model_type == f"fptquant_{architecture.model_type}"
    assert type(AutoConfig.for_model(config.model_type)) is config
    for part, auto in (("ForCausalLM", AutoModelForCausalLM), ("Model", AutoModel)):
        kind = getattr(hf_models, quantized_architecture(architecture.class_of(part)))
        assert auto._model_mapping[config] is kind and kind.config_class is config
        assert pickle.loads(pickle.dumps(kind)) is kind
    copied = pickle.loads(pickle.dumps(config(hidden_size=48)))
    assert type(copied) is config and copied.hidden_size == 48
