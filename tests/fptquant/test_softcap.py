"""Attention whose scores are bounded, with windows, against transformers' eager one, and logits that are bounded."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedModel

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.layers.inputs import to_logits, window_logits
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.run.job import Job, open_job
from fptquant.simulate.install import exactly, install_simulation
from fptquant.wiring import FAMILIES
from fptquant.wiring.lookup import check_model_type
from tests.conftest import TEXT, VOCABULARY
from tests.families import WINDOW, build, make_job
from tests.fptquant.test_transforms import relative_error

TOKENS = torch.randint(0, VOCABULARY, (2, 4 * WINDOW), generator=torch.Generator().manual_seed(1))
VARIANT = "gemma2 with windows"


def job_on(folder: Path, **fields: Any) -> Job:
    """On the model in `folder`, with little text."""
    text = folder.parent / "text.txt"
    text.write_text(TEXT.read_text(encoding="utf-8")[:12000], encoding="utf-8")
    calibration = {"source": str(text), "sequences": 2, "length": 24}
    return open_job(folder, Recipe.parse({"calibration": calibration, "rounding": {"method": "nearest"}, **fields}))


def logits_of(model: PreTrainedModel, padded: bool = False) -> Tensor:
    mask = torch.ones_like(TOKENS)
    mask[0, :5] = 0 if padded else 1
    with torch.no_grad():
        logits: Tensor = model(TOKENS, attention_mask=mask).logits
    return logits[:, 5:]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_job(VARIANT, tmp_path_factory.mktemp("gemma2"), transforms=[]).source.path


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@pytest.mark.parametrize("bits", [8, 16])
def test_simulated_attention_is_eager_attention(folder: Path, bits: int, implementation: str, padded: bool) -> None:
    """And so is the cache, token by token; sdpa as transformers has it leaves the bound out."""
    expected = logits_of(build(VARIANT), padded)
    job = job_on(folder, precision="w4a8kv8" if bits == 8 else "w4a8", transforms=[])
    model = build(VARIANT)
    model.set_attn_implementation(implementation)
    if implementation == "sdpa":
        assert relative_error(logits_of(model, padded), expected) > 1e-2
    install_simulation(model, job.source.architecture, job.config)
    assert relative_error(logits_of(model, padded), expected) < 1e-5
    if padded:
        return
    cache = model(TOKENS[:, :-WINDOW], use_cache=True).past_key_values
    for index in range(TOKENS.shape[1] - WINDOW, TOKENS.shape[1]):
        step = model(TOKENS[:, index : index + 1], past_key_values=cache, use_cache=True).logits[:, 0]
        assert relative_error(step, expected[:, index - 5]) < 1e-5


def test_the_source_is_read_with_its_bounds(folder: Path) -> None:
    """Of scores and of logits, a layer at a time, too."""
    expected = logits_of(build(VARIANT))
    source = open_source(folder)
    for residency in ("resident", "streamed"):
        model = load_model(source, residency=residency)  # type: ignore[arg-type]
        assert relative_error(logits_of(model), expected) < 1e-6
        windows = torch.cat(list(window_logits(model, source.architecture, TOKENS)))
        assert relative_error(windows[:, 5:], expected) < 1e-5
    head = to_logits(model, source.architecture)(torch.randn(3, 128) * 100)
    assert head.abs().amax() <= 20.0


@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a8"])
def test_what_is_written_computes_the_same(folder: Path, precision: str, tmp_path: Path) -> None:
    """Read back by transformers alone, whose own choice is sdpa."""
    pipeline.quantize(job_on(folder, precision=precision, transforms=["T_h", "T_k"]), tmp_path / "out")
    ours = load_model(open_source(tmp_path / "out"))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float32)
    with exactly(ours), exactly(theirs):
        assert torch.equal(logits_of(ours), logits_of(theirs))


# -- what Gemma can't have --


def test_float16_is_refused(folder: Path, tmp_path: Path) -> None:
    """Where it is asked for, and where the model is stored so; a checkpoint isn't loaded in it."""
    message = r"^float16 doesn't hold the activations of a Gemma2ForCausalLM: quantize with --dtype bfloat16$"
    with pytest.raises(FPTQuantError, match=message):
        job_on(folder, dtype="float16", transforms=[])
    stored = build(VARIANT).half()
    stored.config.dtype = torch.float16
    stored.save_pretrained(tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        (tmp_path / "model" / file.name).write_bytes(file.read_bytes())
    with pytest.raises(FPTQuantError, match=message):
        job_on(tmp_path / "model", transforms=[])
    pipeline.quantize(job_on(tmp_path / "model", transforms=[], dtype="bfloat16"), tmp_path / "out")
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").dtype == torch.bfloat16
    with pytest.raises(FPTQuantError, match=r"^float16 doesn't hold .*: load it with dtype=torch.bfloat16$"):
        AutoModelForCausalLM.from_pretrained(tmp_path / "out", dtype=torch.float16)


@pytest.mark.parametrize("model_type", ["gemma2", "gemma3_text"])
def test_bidirectional_attention_is_refused(model_type: str) -> None:
    described = {"model_type": model_type, "architectures": [FAMILIES[model_type].class_name]}
    check_model_type({**described, "use_bidirectional_attention": False})
    with pytest.raises(FPTQuantError, match="has use_bidirectional_attention: tokens attend to later ones, which is"):
        check_model_type({**described, "use_bidirectional_attention": True})


def test_shipped_recipes_have_what_gemma_can_have(folder: Path) -> None:
    """What is left out, and why; the first token is constant, though it leaves the window."""
    calibration = {"source": str(folder.parent / "text.txt"), "sequences": 2, "length": 24}
    job = open_job(folder, Recipe.load("fptquant-light").changed(calibration=calibration), leave_out=True)
    assert set(job.recipe.transforms) == {"T_k", "T_v", "T_u", "T_h", "T_d"} and job.config.sink is not None
    assert set(job.left_out) == {"T_r", "S_n"} and "T_h takes its place" in job.left_out["T_r"]
