"""Calibration text, and ranges and roundings fitted layer by layer."""

import copy
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from fptquant.calibration.sources import require_source
from fptquant.calibration.text import calibration_windows, fingerprint, leading_tokens
from fptquant.errors import FPTQuantError
from fptquant.options.calibration import CalibrationOptions
from fptquant.quantize import RangeOptions, search_range
from fptquant.recipe import Recipe
from fptquant.simulate import simulated_linears
from tests.conftest import TEXT, VOCABULARY

Simulate = Callable[..., LlamaForCausalLM]
MakeModel = Callable[..., LlamaForCausalLM]


@pytest.fixture(scope="module")
def short_text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "short.txt"
    path.write_text(TEXT.read_text(encoding="utf-8")[:6000], encoding="utf-8")
    return path


def windows_of(tokenizer: PreTrainedTokenizerFast, source: Path | str, seed: int = 0, **options: object) -> Tensor:
    fields = {"source": str(source), "sequences": 4, "length": 32, **options}
    return calibration_windows(tokenizer, CalibrationOptions(**fields), VOCABULARY, seed)


# -- text --


def test_windows_are_pieces_of_the_text_without_overlap(tokenizer: PreTrainedTokenizerFast, short_text: Path) -> None:
    found = windows_of(tokenizer, short_text)
    assert found.shape == (4, 32) and found.dtype == torch.int64
    text = tokenizer(short_text.read_text(encoding="utf-8"), add_special_tokens=False)["input_ids"]
    pieces = {tuple(text[i : i + 32]) for i in range(0, len(text) - 31, 32)}
    assert {tuple(row) for row in found.tolist()} <= pieces
    assert len({tuple(row) for row in found.tolist()}) == 4


def test_seed_draws_the_windows(tokenizer: PreTrainedTokenizerFast, short_text: Path) -> None:
    first, again, other = (windows_of(tokenizer, short_text, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert fingerprint(first) == fingerprint(again) != fingerprint(other)


def test_bos_starts_every_window(
    tokenizer: PreTrainedTokenizerFast, tokenizer_with_bos: PreTrainedTokenizerFast, short_text: Path
) -> None:
    assert leading_tokens(tokenizer) == [] and leading_tokens(tokenizer_with_bos) == [0]
    assert bool((windows_of(tokenizer_with_bos, short_text)[:, 0] == 0).all())
    found = windows_of(tokenizer_with_bos, short_text, special_tokens=False)
    assert not bool((found == 0).any())
    assert torch.equal(found, windows_of(tokenizer, short_text))


def test_the_shipped_text_is_long_enough_for_the_defaults(
    tokenizer_with_bos: PreTrainedTokenizerFast,
) -> None:
    options = CalibrationOptions()
    found = calibration_windows(tokenizer_with_bos, options, VOCABULARY, 0)
    assert found.shape == (options.sequences, options.length)


def test_text_that_is_just_long_enough(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    text = tmp_path / "t.txt"
    text.write_text("abcdefgh" * 40)
    count = len(tokenizer(text.read_text(), add_special_tokens=False)["input_ids"])
    assert windows_of(tokenizer, text, sequences=1, length=count).shape == (1, count)
    with pytest.raises(FPTQuantError, match=f"has {count} tokens, but 1 sequences of {count + 1} need {count + 1}"):
        windows_of(tokenizer, text, sequences=1, length=count + 1)


@pytest.mark.parametrize("bos", [False, True])
def test_text_with_fewer_sequences_than_asked_for(
    bos: bool, tokenizer: PreTrainedTokenizerFast, tokenizer_with_bos: PreTrainedTokenizerFast, short_text: Path
) -> None:
    options = CalibrationOptions(source=str(short_text), sequences=100_000, length=16)
    chosen = tokenizer_with_bos if bos else tokenizer
    windows = calibration_windows(chosen, options, VOCABULARY, 0, at_most=True)
    assert 1 < len(windows) < 100_000 and windows.shape[1] == 16
    assert bool((windows[:, 0] == 0).all()) is bos


def test_tokenizer_of_another_model(tokenizer: PreTrainedTokenizerFast, short_text: Path) -> None:
    options = CalibrationOptions(source=str(short_text), sequences=4, length=32)
    with pytest.raises(FPTQuantError, match="vocabulary has 100 entries.*do not belong together"):
        calibration_windows(tokenizer, options, 100, 0)


def test_non_utf8_text(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    (tmp_path / "latin.txt").write_bytes("Käse ".encode("latin-1") * 1000)
    with pytest.raises(FPTQuantError, match="latin.txt' is not UTF-8 text"):
        windows_of(tokenizer, tmp_path / "latin.txt")


@pytest.fixture(scope="module")
def jsonl(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import json

    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    lines = [line for line in TEXT.read_text(encoding="utf-8")[:8000].splitlines() if line.strip()]
    path.write_text("".join(json.dumps({"body": line, "n": i}) + "\n" for i, line in enumerate(lines)))
    return path


@pytest.fixture
def datasets_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")


def test_dataset_from_a_jsonl_file(tokenizer: PreTrainedTokenizerFast, jsonl: Path, datasets_cache: None) -> None:
    found = windows_of(tokenizer, jsonl, field="body")
    assert found.shape == (4, 32)
    assert torch.equal(found, windows_of(tokenizer, jsonl, field="body"))
    assert not torch.equal(found, windows_of(tokenizer, jsonl, field="body", seed=1))


def test_dataset_saved_to_disk(
    tokenizer: PreTrainedTokenizerFast, jsonl: Path, tmp_path: Path, datasets_cache: None
) -> None:
    import datasets

    data = datasets.load_dataset("json", data_files=str(jsonl), split="train")
    data.save_to_disk(str(tmp_path / "plain"))
    datasets.DatasetDict({"validation": data}).save_to_disk(str(tmp_path / "split"))
    plain = windows_of(tokenizer, tmp_path / "plain", field="body")
    assert torch.equal(plain, windows_of(tokenizer, tmp_path / "split", field="body", split="validation"))
    with pytest.raises(FPTQuantError, match="'train'"):
        windows_of(tokenizer, tmp_path / "split", field="body")


def test_dataset_rows_without_text_are_skipped(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, datasets_cache: None
) -> None:
    rows = tmp_path / "rows.jsonl"
    rows.write_text('{"text": null}\n' * 50 + '{"text": "abcdefgh abcdefgh"}\n' * 50)
    found = windows_of(tokenizer, rows, sequences=40, length=16)
    assert "None" not in tokenizer.decode(found.flatten().tolist())


def test_dataset_without_the_column(tokenizer: PreTrainedTokenizerFast, jsonl: Path, datasets_cache: None) -> None:
    with pytest.raises(FPTQuantError, match="no column 'text'; it has: body, n .*--calibration-field"):
        windows_of(tokenizer, jsonl)


@pytest.mark.parametrize("content", ["", "no json at all", '{"text": '])
def test_broken_dataset_file(
    content: str, tokenizer: PreTrainedTokenizerFast, tmp_path: Path, datasets_cache: None
) -> None:
    (tmp_path / "rows.jsonl").write_text(content)
    with pytest.raises(FPTQuantError) as caught:
        windows_of(tokenizer, tmp_path / "rows.jsonl")
    assert "rows.jsonl" in str(caught.value) and "\n" not in str(caught.value)


def test_missing_source(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, datasets_cache: None) -> None:
    with pytest.raises(FPTQuantError, match="none.txt' is neither a text file nor a dataset"):
        windows_of(tokenizer, tmp_path / "none.txt")


def test_missing_source_is_found_before_datasets_looks_for_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    for source in ("none.txt", "none.jsonl.gz", "here/none.csv", "./none", "a/b/none", str(tmp_path / "none")):
        with pytest.raises(FPTQuantError, match="is neither a text file nor a dataset: there is no such file"):
            require_source(CalibrationOptions(source=source))
    for source in ("wikitext", "org/data", "org/data.json", "here", str(TEXT), f"text:{TEXT}", "builtin"):
        require_source(CalibrationOptions(source=source))


# -- layer by layer --


def observed(model: LlamaForCausalLM, name: str, windows: Tensor) -> Tensor:
    """Input of a layer as its quantizer sees it, when the whole model runs."""
    seen: list[Tensor] = []
    layer = dict(simulated_linears(model))[name]
    layer.observer = lambda x: seen.append(x.detach().clone())
    with torch.no_grad():
        model(windows, use_cache=False)
    layer.observer = None
    return seen[0].flatten(0, 1).float()


LATE = ["layers.0.self_attn.o_proj", "layers.0.mlp.gate_proj", "layers.0.mlp.down_proj", "layers.1.self_attn.q_proj",
        "layers.1.mlp.down_proj"]  # fmt: skip


def test_ranges_are_taken_from_the_model_as_quantized_so_far(
    make_model: MakeModel, simulate: Simulate, windows: Tensor
) -> None:
    minmax = {"method": "minmax"}
    fields = {"precision": "w4a4kv4", "activation_range": minmax, "kv_range": minmax}
    model = simulate(make_model("bias"), windows, **fields)
    unquantized = simulate(make_model("bias"), **fields)
    options = Recipe.parse(fields).activation_range
    for name in LATE:
        layer = model.get_submodule(f"model.{name}")
        seen, float_input = (observed(m, f"model.{name}", windows) for m in (model, unquantized))
        expected, zero_point = search_range(seen, 4, False, options)
        torch.testing.assert_close(layer.input_scale, expected, rtol=1e-4, atol=0, msg=name)
        assert layer.input_zero_point == zero_point
        wrong, _ = search_range(float_input, 4, False, options)
        assert abs(wrong / expected - 1) > 1e-3, f"{name}: float and quantized inputs have the same range here"


def test_the_largest_tokens_do_not_count_for_ranges(make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    fields = {"precision": "w4a4kv4", "activation_range": {"outlier_tokens": 0.2}}
    model = simulate(make_model("bias"), windows, **fields)
    moved = 0
    for name in LATE:
        layer = model.get_submodule(f"model.{name}")
        seen = observed(model, f"model.{name}", windows)
        usual = seen[seen.abs().amax(1).argsort()[: len(seen) - int(0.2 * len(seen))]]
        expected, zero_point = search_range(usual, 4, False, RangeOptions())
        torch.testing.assert_close(layer.input_scale, expected, rtol=1e-4, atol=0, msg=name)
        assert layer.input_zero_point == zero_point
        wrong, _ = search_range(seen, 4, False, RangeOptions())
        moved += int(wrong > 1.01 * expected)
    assert moved > 1


def test_kv_ranges_are_taken_from_the_model_as_quantized_so_far(
    make_model: MakeModel, simulate: Simulate, windows: Tensor
) -> None:
    precision = {"activations": {"bits": 4, "symmetric": False}, "kv_cache": {"bits": 4, "strategy": "head"}}
    fields = {"precision": precision, "kv_range": {"method": "minmax"}}
    model = simulate(make_model("bias"), windows, **fields)
    unquantized = simulate(make_model("bias"), **fields)
    values = observed(model, "model.layers.1.self_attn.v_proj", windows)  # input; the output is what is cached
    attention = model.model.layers[1].self_attn
    scale, wrong = [], []
    for m, found in ((model, scale), (unquantized, wrong)):
        layer = m.model.layers[1].self_attn.v_proj
        v = layer(observed(m, "model.layers.1.self_attn.v_proj", windows)).unflatten(-1, (2, 12))
        found += [search_range(v[:, head], 4, False, Recipe.parse(fields).kv_range)[0] for head in range(2)]
    assert attention.v_scale.shape == attention.k_scale.shape == attention.v_zero_point.shape == (2,)
    torch.testing.assert_close(attention.v_scale, torch.stack(scale), rtol=1e-4, atol=0)
    assert bool(((attention.v_scale / torch.stack(wrong) - 1).abs() > 1e-3).all())
    assert attention.v_scale[0] != attention.v_scale[1] and values.shape[1] == 42


@pytest.mark.parametrize("activation_bits", [4, 16])
def test_hessians_are_those_of_the_quantized_inputs(
    activation_bits: int,
    make_model: MakeModel,
    simulate: Simulate,
    windows: Tensor,
    hessians: list[Tensor],
) -> None:
    precision = {"activations": {"bits": activation_bits, "symmetric": False}}
    model = simulate(make_model("bias"), windows, precision=precision)
    head = int(activation_bits < 16)  # with weight-only quantization it stays in floating point
    assert len(hessians) == 8 + head  # per layer: qkv, o, gate-up, down
    for index, name in (
        (1, "layers.0.self_attn.o_proj"),
        (3, "layers.0.mlp.down_proj"),
        (4, "layers.1.self_attn.q_proj"),
    ):
        x = observed(model, f"model.{name}", windows)
        if activation_bits < 16:
            x = model.get_submodule(f"model.{name}").quantized_input(x)
        found = hessians[index]
        torch.testing.assert_close(found, x.T @ x / len(x), rtol=1e-3, atol=1e-4 * found.abs().max().item())


def test_layers_that_share_an_input_share_its_quantizer(
    make_model: MakeModel, simulate: Simulate, windows: Tensor
) -> None:
    model = simulate(make_model("bias"), windows, precision="w4a4kv4")
    for layer in model.model.layers:
        for group in (
            [layer.self_attn.q_proj, layer.self_attn.k_proj, layer.self_attn.v_proj],
            [layer.mlp.gate_proj, layer.mlp.up_proj],
        ):
            assert len({(x.input_scale.item(), x.input_zero_point.item()) for x in group}) == 1
            assert len({x.weight_scale.sum().item() for x in group}) == len(group)


def test_calibration_ends_the_same_for_any_batching(
    make_model: MakeModel, simulate: Simulate, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    from fptquant.layers import inputs

    first = simulate(make_model("gqa"), windows)
    monkeypatch.setattr(inputs, "_BATCH", 3)
    second = simulate(make_model("gqa"), windows)
    for key, tensor in first.state_dict().items():
        if key.endswith("_scale"):
            torch.testing.assert_close(second.state_dict()[key], tensor, rtol=1e-2, atol=0, msg=key)


def test_damaged_activations_are_named(make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    model = make_model("gqa")
    model.model.layers[1].self_attn.v_proj.weight[0, 0] = torch.inf
    with pytest.raises(FPTQuantError, match=r"model\.layers\.1\.self_attn\.\w_proj: .*not finite"):
        simulate(model, windows, transforms=[])


def test_calibration_leaves_no_observer_or_hook(make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    model = simulate(make_model("gqa"), windows, transforms=[])
    assert all(layer.observer is None and layer.weight is None for _, layer in simulated_linears(model))
    assert all(layer.self_attn.kv_quantizer.observer is None for layer in model.model.layers)
    assert not model.model.layers[0]._forward_pre_hooks
    before = copy.deepcopy(model.state_dict())
    model(windows)
    assert all(torch.equal(tensor, before[key]) for key, tensor in model.state_dict().items())
