"""What a checkpoint computed when it was written, and the rehearsal before any work."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.loading import load_model, open_source
from fptquant.recipe import Recipe
from fptquant.run.job import open_job
from fptquant.run.rehearsal import rehearse
from fptquant.simulate import linear
from fptquant.simulate.recorded import deviation

GOLDEN = Path(__file__).resolve().parent.parent / "golden"


def other_layout(packed: Tensor, bits: int, shape: torch.Size) -> Tensor:
    """Unpacks 7 bits as if they were dense, 32 codes in 7 words: the layout of compressed-tensors since 0.18."""
    if bits != 7:
        return unpacked(packed, bits, shape)
    stream = ((packed[..., None] >> torch.arange(32, dtype=torch.int32)) & 1).flatten(1)
    stream = torch.nn.functional.pad(stream, (0, max(0, 7 * shape[1] - stream.shape[1])))
    values = stream[:, : 7 * shape[1]].unflatten(1, (-1, 7)) * (1 << torch.arange(7))
    return (values.sum(-1) - 64).to(torch.int8)


unpacked = linear.unpack_codes


def test_a_reader_of_another_layout_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Both sides of a comparison would unpack alike; only what was recorded tells."""
    source = open_source(GOLDEN / "w4a4kv4")
    file = source.path / "fptquant" / "logits.safetensors"
    assert deviation(load_model(source), file).found < 1e-4
    monkeypatch.setattr(linear, "unpack_codes", other_layout)
    with pytest.raises(FPTQuantError, match=r"does not compute what it did when it was written \(logits differ by"):
        load_model(source)
    result = deviation(load_model(source, recorded=False), file)
    assert result.limit < 1 < 1.2 * result.found


def test_records_that_are_damaged(tmp_path: Path) -> None:
    copy = Path(shutil.copytree(GOLDEN / "w4a16", tmp_path / "copy"))
    file = copy / "fptquant" / "logits.safetensors"
    file.write_bytes(b"x" * 30)
    with pytest.raises(FPTQuantError, match="logits.safetensors' is missing or damaged"):
        load_model(open_source(copy))


def test_an_installation_that_can_not_write_is_found_before_any_work(
    model_dir: Path, tmp_path: Path, text_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = {"calibration": {"source": str(text_file), "sequences": 4, "length": 32}, "local": {"steps": 5}}
    job = open_job(model_dir, Recipe.parse(recipe))
    monkeypatch.setattr(linear, "unpack_codes", other_layout)
    monkeypatch.setattr(pipeline, "train_transforms", None)  # nothing of the run may have begun
    with pytest.raises(FPTQuantError, match="a rehearsal with one layer was read back wrongly"):
        pipeline.quantize(job, tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_tied_head_in_floating_point_is_rehearsed(
    save_model: Callable[..., Path], tmp_path: Path, text_file: Path
) -> None:
    """Embedding and head are one tensor in the source and two in a checkpoint."""
    calibration = {"source": str(text_file), "sequences": 4, "length": 32}
    job = open_job(
        save_model(tmp_path / "tied", "tied"), Recipe.parse({"precision": "w4a16", "calibration": calibration})
    )
    rehearse(job, tmp_path / "rehearsal")
    assert not (tmp_path / "rehearsal").exists()


def test_a_padding_token_beyond_the_rehearsed_vocabulary(model_dir: Path, tmp_path: Path, text_file: Path) -> None:
    """Qwen's is its vocabulary's 151643rd."""
    calibration = {"source": str(text_file), "sequences": 4, "length": 32}
    job = open_job(model_dir, Recipe.parse({"precision": "w4a16", "calibration": calibration}))
    job.source.config.pad_token_id = job.source.config.vocab_size - 1
    rehearse(job, tmp_path / "rehearsal")


@pytest.mark.parametrize("dtype", [None, torch.float32])
def test_saved_by_transformers_and_read_again(dtype: torch.dtype | None, tmp_path: Path) -> None:
    """`save_pretrained` binds the tensors again, in another type too."""
    arguments = {} if dtype is None else {"dtype": dtype}
    model = AutoModelForCausalLM.from_pretrained(GOLDEN / "w4a4kv4", **arguments)
    model.save_pretrained(tmp_path)
    stored, again = load_file(tmp_path / "model.safetensors"), AutoModelForCausalLM.from_pretrained(tmp_path)
    assert "fptquant_binding" in stored and again.dtype == model.dtype
    tokens = torch.arange(9)[None]
    assert torch.equal(again(tokens).logits, model(tokens).logits)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}, "rope_parameters.rope_theta is 500000.0"),
        ({"rms_norm_eps": 1e-3}, "rms_norm_eps is 0.001, but the weights were made for 1e-05"),
        ({"max_position_embeddings": 4096, "eos_token_id": 7, "attention_dropout": 0.5}, None),
    ],
)
def test_overrides_in_transformers(change: dict[str, object], message: str | None) -> None:
    """Keyword arguments of `from_pretrained` change the configuration; what nothing depends on may."""
    load: Callable[[], object] = lambda: AutoModelForCausalLM.from_pretrained(GOLDEN / "w4a4kv4", **change)  # noqa: E731
    if message is None:
        load()
    else:
        with pytest.raises(FPTQuantError, match=message):
            load()
