"""The battery that every family in the registry passes, in each of its variants (`tests/families.py`).

What is served is in tests/vllm_fptquant/test_served_families.py.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from io import StringIO
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, DynamicCache, PretrainedConfig, PreTrainedModel

from fptquant import pipeline
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.starts import start_from_activations
from fptquant.console import plan_table
from fptquant.errors import FPTQuantError
from fptquant.layers.constants import record_sink
from fptquant.layers.inputs import first_inputs
from fptquant.loading import Source, attention_for, load_model, open_source
from fptquant.options.transforms import QueryKeyOptions
from fptquant.pipeline import with_constants
from fptquant.progress import Stages
from fptquant.report.families import page, rows
from fptquant.run.models import folded, transformed
from fptquant.run.state import RunState
from fptquant.run.times import expected_seconds
from fptquant.run.training import MetricsFile, train_transforms
from fptquant.simulate.mixture import separate_projections
from fptquant.train.student import transform_student
from fptquant.transforms import FPTQUANT, TRANSFORMS, Transform
from fptquant.transforms.query_key import KeyScale, NormedQueryKeyTransform, QueryKeyTransform
from fptquant.wiring import FAMILIES, FUSED, MULTIMODAL, Architecture, Place, Role, Shape
from tests.conftest import ROOT, VOCABULARY, build_tokenizer, edit_json
from tests.families import (
    BY_FAMILY,
    MULTIMODAL_VARIANTS,
    SHIFTED,
    VARIANTS,
    WINDOW,
    build,
    family_of,
    make_job,
    possible,
    read,
    save_multimodal,
    split,
)
from tests.fptquant.test_transforms import SET_IDS, SETS, merge, relative_error, transform_set

TOKENS = torch.randint(0, VOCABULARY, (2, 3 * WINDOW), generator=torch.Generator().manual_seed(1))
LAST = [names[-1] for names in BY_FAMILY.values()]  # one variant of each family
TIED = [variant for variant in VARIANTS if build(variant).config.tie_word_embeddings]
NORMED = [variant for variant in VARIANTS if family_of(variant).head_norms]


def test_every_family_is_here() -> None:
    assert {model_type for model_type, _ in VARIANTS.values()} == FAMILIES.keys() | FUSED.keys()
    windowed = {model_type for model_type, fields in VARIANTS.values() if fields.get("sliding_window")}
    assert {variant[0] for variant in MULTIMODAL_VARIANTS.values()} == MULTIMODAL.keys()
    texts = {(fields[0], family_of(variant).model_type) for variant, fields in MULTIMODAL_VARIANTS.items()}
    assert texts == {(name, text) for name, facts in MULTIMODAL.items() for text in facts.texts.values()}
    assert windowed == FUSED.keys() | {name for name, family in FAMILIES.items() if family.windows != "none"}


def test_the_page_is_what_the_code_says() -> None:
    """Where this fails: python -m fptquant.report.families > docs/families.md."""
    assert (ROOT / "docs" / "families.md").read_text(encoding="utf-8") == page()
    for facts, row in zip((*FUSED.values(), *MULTIMODAL.values()), rows()[len(FAMILIES) :], strict=True):
        assert row[:2] == (facts.model_type, facts.models)
    for family, row in zip(FAMILIES.values(), rows()[: len(FAMILIES)], strict=True):
        assert ("one scale per RoPE pair" in row[2]) == family.head_norms
        assert ("window" in row[3]) == (family.windows != "none")
        assert ("gains stay in the norms" in row[2]) == (family.post_norms is not None)


# -- exactness --


@pytest.fixture
def float64(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Norms and RoPE compute in torch.float32, whatever they get; which is float64 here."""
    for variant in (variant for model_type in FUSED for variant in BY_FAMILY[model_type]):
        split(variant)  # no file can be read then
    for name in ("float32", "float"):
        monkeypatch.setattr(torch, name, torch.float64)
    monkeypatch.setattr(Tensor, "float", Tensor.double)
    yield


def error_of(variant: str, names: list[str]) -> float:
    """Of the merged model's logits, relative to the largest, with the transforms at random values."""
    model, family = read(variant).double(), family_of(variant)
    transforms = transform_set(names, family.shape(model.config))
    transforms.randomize_(torch.Generator().manual_seed(0))
    return relative_error(merge(model, transforms, family)(TOKENS).logits, build(variant).double()(TOKENS).logits)


@pytest.mark.parametrize("names", SETS, ids=SET_IDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_function_is_preserved(variant: str, names: list[str], float64: None) -> None:
    assert error_of(variant, possible(variant, names)) < 1e-11


def whole(shape: Any) -> type[Transform]:
    """T_k in the weights in front of the norms."""
    return QueryKeyTransform


def unpaired(self: Transform, place: Place, dtype: torch.dtype) -> Tensor | None:
    """Another scale for each dimension of a pair."""
    gain = right(self, place, dtype)
    return None if gain is None else torch.cat((gain[: len(gain) // 2], torch.ones(len(gain) // 2, dtype=dtype)))


def neighbours(self: Transform, place: Place, dtype: torch.dtype) -> Tensor | None:
    """Pairs (2j, 2j + 1)."""
    gain = right(self, place, dtype)
    return None if gain is None else gain[: len(gain) // 2].repeat_interleave(2)


right = NormedQueryKeyTransform.head_gain


@pytest.mark.parametrize(
    ("target", "name", "mistake"),
    [
        (QueryKeyTransform, "form", whole),
        (NormedQueryKeyTransform, "head_gain", unpaired),
        (NormedQueryKeyTransform, "head_gain", neighbours),
    ],
)
@pytest.mark.parametrize("variant", NORMED)
def test_a_mistake_under_head_norms_is_noticed(
    variant: str, target: type, name: str, mistake: Any, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(target, name, mistake)
    assert error_of(variant, ["T_k"]) > 1e-3


@pytest.mark.parametrize("name", ["T_r", "T_s"])
@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if family_of(variant).post_norms])
def test_a_mistake_around_norms_behind_blocks_is_noticed(
    variant: str, name: str, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A rotation that their gains don't let pass; a scale in the norm behind the attention, where Llama's MLP reads."""
    if name == "T_s":
        behind, _ = family_of(variant).post_norms or ("", "")
        groups = tuple(
            replace(group, norm=behind) if group.name == "gate_up" else group for group in family_of(variant).groups
        )
        monkeypatch.setitem(FAMILIES, VARIANTS[variant][0], replace(family_of(variant), groups=groups))
    assert error_of(variant, [name]) > 1e-3


@pytest.mark.parametrize("variant", [variant for variant in VARIANTS if family_of(variant).gain_offset])
def test_gains_that_are_not_what_is_stored(variant: str, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(FAMILIES, VARIANTS[variant][0], replace(family_of(variant), gain_offset=0.0))
    assert error_of(variant, ["T_s"]) > 1e-3


@pytest.mark.parametrize("names", [[], ["T_h"], ["T_r"], ["S_n"]], ids=str)
@pytest.mark.parametrize("variant", VARIANTS)
def test_gains_stay_where_nothing_needs_them_in_weights(variant: str, names: list[str]) -> None:
    """Inputs without them have channels that 8 bits don't hold, as in Gemma."""
    original, family = read(variant), family_of(variant)
    on = [name for name in names if not TRANSFORMS[name].obstacle(family)]
    folds = bool({"T_r", "S_n"} & set(on))
    merged = merge(original, transform_set(on, family.shape(original.config)), family)
    gained = [family.final_norm]
    for index in range(original.config.num_hidden_layers):
        gained += [f"{family.layer_name(index)}.{norm}" for _, norm in family.normed_groups(index)]
    for norm in gained:
        before, after = (model.get_submodule(norm).get_parameter("weight") for model in (original, merged))
        assert torch.equal(after, torch.ones_like(before) - family.gain_offset if folds else before), norm
    head, weight = (model.get_submodule(family.head).get_parameter("weight") for model in (original, merged))
    assert torch.equal(head, weight) != folds


@pytest.mark.parametrize("variant", [variant for variant in LAST if family_of(variant).post_norms])
def test_a_channel_that_a_gain_makes_small(variant: str, tmp_path: Path) -> None:
    """It holds nearly all of the residual, as in Gemma: 8 bits hold what the final norm puts out, with its gain."""
    model, family = build(variant, tie_word_embeddings=False), family_of(variant)
    gain = model.get_submodule(family.final_norm).get_parameter("weight")
    with torch.no_grad():
        model.get_submodule(family.embedding).get_parameter("weight")[:, 5] = 100.0
        gain[5] = 0.01 - family.gain_offset
    model.save_pretrained(tmp_path / "model")
    build_tokenizer(bos=True).save_pretrained(tmp_path / "model")
    only_head = {"precision": "w4a8", "ignore": ["re:model"], "transforms": [], "head_bits": 8}
    job = make_job(variant, tmp_path, **only_head, rounding={"method": "nearest"})
    pipeline.quantize(job, tmp_path / "out")
    expected = load_model(job.source)(TOKENS).logits
    assert relative_error(load_model(open_source(tmp_path / "out"))(TOKENS).logits, expected) < 0.04


@pytest.mark.parametrize("variant", BY_FAMILY["smollm3"])
def test_a_matrix_where_there_is_rope_is_noticed(variant: str, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Architecture.shape
    assert original(family_of(variant), build(variant).config).unrotated == (1,)
    monkeypatch.setattr(Architecture, "shape", lambda self, config: replace(original(self, config), unrotated=(0, 1)))
    assert error_of(variant, ["T_k"]) > 1e-3


@pytest.mark.parametrize("variant", ["glm", "glm4 with biases"])
@pytest.mark.parametrize("change", [8, -8])
def test_another_part_of_heads_that_rope_turns_is_noticed(
    variant: str, change: int, float64: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Matrices that reach into pairs; pairs among dimensions that have none are exact."""
    original = Architecture.shape

    def shape(self: Architecture, config: PretrainedConfig) -> Shape:
        found = original(self, config)
        return replace(found, unrotated_dims=found.unrotated_dims + change)

    monkeypatch.setattr(Architecture, "shape", shape)
    assert (error_of(variant, ["T_k"]) > 1e-3) == (change > 0)


@pytest.mark.parametrize("variant", ["smollm3", "glm4"])
def test_only_scales_where_there_is_no_rope(variant: str, float64: None) -> None:
    """As a recipe may ask for; and matrices stay far from singular, whatever their parameters are."""
    model, family = read(variant).double(), family_of(variant)
    for options in ({"only": "scale"}, {}):
        transforms = transform_set(["T_k"], family.shape(model.config), T_k=options)
        transforms.randomize_(torch.Generator().manual_seed(0), 30.0 if options else 3.0)
        assert {name for name, _ in transforms.named_parameters() if "left" in name or "angle" in name} == (
            set() if options else {"transforms.T_k.left", "transforms.T_k.angle"}
        )
        assert transforms.metrics()["T_k/condition"] < 100.0001
        if not options:
            assert relative_error(merge(model, transforms, family)(TOKENS).logits, model(TOKENS).logits) < 1e-9


@pytest.mark.parametrize("variant", ["llama", "ernie4_5", "ernie4_5 with biases", "glm", "glm4 with biases"])
def test_the_other_layout_of_pairs_is_noticed(variant: str, float64: None, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Architecture.shape
    monkeypatch.setattr(
        Architecture,
        "shape",
        lambda self, config: replace(shape := original(self, config), interleaved=not shape.interleaved),
    )
    assert error_of(variant, ["T_k"]) > 1e-3


# -- the run's own merge, and what it covers --


def roles(family: Architecture, model: PreTrainedModel) -> set[str]:
    """Names of the tensors that the family's facts name."""
    named = {f"{path}.weight" for path in (family.embedding, family.final_norm, family.head)}
    for index, layer in enumerate(family.layer_modules(model)):
        paths = [path for _, path in (*family.normed_groups(index), *family.head_norm_places(index))]
        paths += family.post_norms or ()
        readers = [projection for group in family.groups_of(index) for projection in group.readers]
        paths += [projection.path for projection in (*family.projections_of(index), *readers)]
        tensors = [f"{path}.{kind}" for path in paths for kind in dict(layer.get_submodule(path).named_parameters())]
        named |= {f"{family.layer_name(index)}.{tensor}" for tensor in tensors}
    return named


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_tensor_has_a_role(variant: str) -> None:
    model = separate_projections(read(variant), family_of(variant))
    assert roles(family_of(variant), model) == set(model.state_dict())


@pytest.mark.parametrize("variant", VARIANTS)
def test_transformed_is_the_original(variant: str, tmp_path: Path) -> None:
    """Through the run's own merge, in float32, S_n and the constant first token included."""
    job = make_job(variant, tmp_path, precision="w4a8kv8", transforms=possible(variant, FPTQUANT))
    attention = attention_for(job.source.config)
    original = AutoModelForCausalLM.from_pretrained(job.source.path, dtype=torch.float32, **attention)
    model = transformed(job)
    record_sink(model, job.source.architecture, job.windows)
    assert job.config.sink is not None
    for first in (0, 7):  # the constant token, and another, for which steady layers' constants don't stand here
        tokens = torch.cat((torch.full((2, 1), first), TOKENS), 1)
        for layer in job.source.architecture.layer_modules(model) if job.config.sink else ():
            layer.get_submodule(job.source.architecture.attention).get_buffer("sink_steady").zero_()
        expected = original(tokens).logits
        for found in (model, load_model(job.source)):
            assert relative_error(found(tokens).logits, expected) < 1e-4


@pytest.mark.parametrize("variant", [variant for variant in LAST if VARIANTS[variant][1].get("sliding_window")])
def test_windows_leave_the_constants(variant: str, tmp_path: Path) -> None:
    """In one go as in pieces, of which transformers' cache keeps a window; and no row sees them behind all windows."""
    job = make_job(variant, tmp_path, precision="w4a8kv8", transforms=[])
    family, model = job.source.architecture, transformed(job)
    record_sink(model, family, job.windows)
    tokens = torch.cat((torch.zeros(2, 1, dtype=torch.int64), TOKENS), 1)
    whole, found, cache = model(tokens, use_cache=False).logits, [], None
    for piece in torch.split(tokens, (WINDOW + 3, 1, 10, 1, 2 * WINDOW - 14), 1):
        output = model(piece, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        found.append(output.logits)
    assert relative_error(torch.cat(found, 1), whole) < 1e-5
    for layer in family.layer_modules(model):
        layer.get_submodule(family.attention).get_buffer("v_sink").add_(1)
    changed = (model(tokens, use_cache=False).logits - whole).abs().amax(-1) > 1e-5 * whole.abs().max()
    windows = [family.window(job.source.config, layer) for layer in range(job.layers)]
    last = sum(window - 1 for window in windows if window) if None not in windows else tokens.shape[1]
    assert bool(changed[:, 1 : last + 1].all()) and not bool(changed[:, last + 1 :].any())


# -- tied heads --


@pytest.mark.parametrize("variant", [v for v in LAST if v in TIED and not family_of(v).multipliers])
def test_a_head_stays_tied_without_a_rotation(variant: str, tmp_path: Path) -> None:
    """On the disk, in either kind of memory, in transformers and saved again; the final norm keeps its gain."""
    kept = [name for name in possible(variant, TRANSFORMS) if name not in ("T_r", "T_s")]
    recipe = {"precision": "w4a8kv8", "transforms": kept, "head_bits": 16, "rounding": {"method": "nearest"}}
    trained = {"local": {"steps": 1}, "end_to_end": {"steps": 1}, "scales": {"steps": 1}}
    job, family = make_job(variant, tmp_path, **recipe), family_of(variant)
    model, original = transformed(job), load_model(job.source)
    record_sink(model, family, job.windows)
    tokens = torch.cat((torch.zeros(2, 1, dtype=torch.int64), TOKENS), 1)
    assert job.tied and relative_error(model(tokens).logits, original(tokens).logits) < 1e-4
    written = []
    for residency in ("resident", "streamed"):
        job = replace(make_job(variant, tmp_path, **recipe, **trained), residency=residency)
        pipeline.quantize(job, tmp_path / residency)
        written.append(load_file(tmp_path / residency / "model.safetensors"))
    assert all(torch.equal(written[0][name], written[1][name]) for name in written[0].keys() | written[1].keys())
    assert f"{family.head}.weight" not in written[0]
    assert not torch.equal(written[0][f"{family.final_norm}.weight"], torch.ones(model.config.hidden_size))
    size = (tmp_path / "streamed" / "model.safetensors").stat().st_size
    assert size < job.output_bytes + VOCABULARY * model.config.hidden_size * 2
    assert json.loads((tmp_path / "streamed" / "config.json").read_text())["tie_word_embeddings"] is True
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "streamed", dtype=torch.float32)
    assert loaded.get_output_embeddings().weight is loaded.get_input_embeddings().weight
    loaded.save_pretrained(tmp_path / "again")
    for again in (open_source(tmp_path / "streamed"), tmp_path / "again"):
        found = (
            AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32)
            if isinstance(again, Path)
            else load_model(again, residency="streamed")
        )
        assert torch.equal(found(tokens).logits, loaded(tokens).logits)


def test_a_head_that_stays_tied_by_mistake_is_noticed(tmp_path: Path) -> None:
    job = make_job("qwen2", tmp_path, transforms=["T_r"], head_bits=16, sink="none")
    assert not job.tied
    expected = load_model(job.source)(TOKENS).logits
    assert relative_error(transformed(replace(job, tied=True))(TOKENS).logits, expected) > 1e-3


@pytest.mark.parametrize(
    ("variant", "fields", "why"),
    [
        ("granite", {"transforms": [], "head_bits": 16}, "multipliers make it another one than the embedding's"),
        ("qwen2", {"transforms": []}, "it is quantized, and the embedding isn't"),
        ("qwen2", {"transforms": ["T_r"], "head_bits": 16}, "because T_r rotates what the norm reads"),
        ("qwen2", {"transforms": ["T_u"], "precision": "w4a16"}, "head not quantized; has the embedding's weight"),
    ],
)
def test_the_plan_says_what_becomes_of_a_tied_head(
    variant: str, fields: dict[str, Any], why: str, tmp_path: Path
) -> None:
    job = make_job(variant, tmp_path, **fields)
    console = Console(width=300, record=True, file=StringIO())
    console.print(plan_table(job, expected_seconds(job)))
    shown = " ".join(console.export_text().replace("│", " ").split())
    assert why in shown
    assert job.tied == ("has the embedding's weight" in shown)


def test_impossible_multipliers(tmp_path: Path) -> None:
    folder = make_job("granite", tmp_path, transforms=[]).source.path
    edit_json(folder / "config.json", logits_scaling=0.0)
    with pytest.raises(FPTQuantError, match=r"^config.json: logits_scaling is 0.0, must be positive and finite"):
        open_source(folder)


# -- fused weights --


@pytest.mark.parametrize(
    "weights",
    [
        {"self_attn.qkv_proj": (Role.QUERY, Role.VALUE, Role.KEY), "mlp.gate_up_proj": (Role.GATE, Role.UP)},
        {"self_attn.qkv_proj": (Role.QUERY, Role.KEY, Role.VALUE), "mlp.gate_up_proj": (Role.UP, Role.GATE)},
    ],
)
def test_another_order_of_fused_rows_is_noticed(
    weights: dict[str, tuple[Role, ...]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = make_job("phi3", tmp_path, transforms=[]).source.path
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    assert relative_error(load_model(open_source(folder))(TOKENS).logits, expected) < 1e-5
    monkeypatch.setitem(FUSED, "phi3", replace(FUSED["phi3"], weights=weights))
    assert relative_error(load_model(open_source(folder))(TOKENS).logits, expected) > 1e-3


def test_another_order_of_gate_and_up_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = make_job("glm4", tmp_path, transforms=[]).source.path
    expected = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)(TOKENS).logits
    assert relative_error(load_model(open_source(folder))(TOKENS).logits, expected) < 1e-5
    swapped = replace(FAMILIES["glm4"], fused={"mlp.gate_up_proj": (Role.UP, Role.GATE)})
    monkeypatch.setitem(FAMILIES, "glm4", swapped)
    assert relative_error(load_model(open_source(folder))(TOKENS).logits, expected) > 1e-3


@pytest.mark.parametrize("variant", ["phi3", "glm4"])
def test_a_fused_base_model_is_read(variant: str, tmp_path: Path) -> None:
    """Names without a prefix."""
    folder = make_job(variant, tmp_path, transforms=[]).source.path
    expected = load_model(open_source(folder))(TOKENS).logits
    stored = load_file(folder / "model.safetensors")
    save_file({name.removeprefix("model."): tensor for name, tensor in stored.items()}, folder / "model.safetensors")
    assert torch.equal(load_model(open_source(folder), residency="streamed")(TOKENS).logits, expected)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (
            {"rope_parameters": {"rope_type": "longrope", "rope_theta": 1e4, "partial_rotary_factor": 1.0,
                                 "short_factor": [1.0] * 16, "long_factor": [2.0] * 16}},
            r"^config.json: a Phi3ForCausalLM with RoPE of type longrope \(rope_parameters, .* is not supported",
        ),
        ({"partial_rotary_factor": 0.75, "rope_parameters": None}, "RoPE of type default of 0.75 of each head"),
        ({"intermediate_size": 128}, "mlp.gate_up_proj.weight has 192 rows, but config.json asks for 256: weights"),
        ({"num_hidden_layers": 3}, "lacks the tensor model.layers.2.self_attn.qkv_proj.weight: fetch the model again"),
        ({"architectures": ["PhiForCausalLM"]}, "of this model_type, only Phi3ForCausalLM is"),
    ],
)  # fmt: skip
def test_what_is_no_fused_model(fields: dict[str, Any], message: str, tmp_path: Path) -> None:
    folder = make_job("phi3", tmp_path, transforms=[]).source.path
    edit_json(folder / "config.json", **fields)
    with pytest.raises(FPTQuantError, match=message):
        open_source(folder)


def test_the_plan_names_both_families(tmp_path: Path) -> None:
    for variant, name in (("phi3", "LlamaForCausalLM"), ("phi3 with windows", "MistralForCausalLM")):
        (tmp_path / name).mkdir()
        assert make_job(variant, tmp_path / name).source.kind == f"Phi3ForCausalLM, as {name}"


# -- text parts of multimodal models --


@pytest.fixture
def multimodal(variant: str, tmp_path: Path) -> tuple[PreTrainedModel, Source]:
    """A multimodal model, and the directory that it was saved in."""
    folder = tmp_path / "model"
    return save_multimodal(variant, folder), open_source(folder)


def logits_of(original: PreTrainedModel, found: PreTrainedModel) -> tuple[Tensor, Tensor]:
    """In float64."""
    return original.double()(TOKENS).logits, found.double()(TOKENS).logits


def stored_as(folder: Path, **prefixes: str) -> None:
    """Gives tensors whose names begin with a key, in which `__` stands for a dot, other beginnings."""
    stored = load_file(folder / "model.safetensors")
    for before, after in prefixes.items():
        before = before.replace("__", ".")
        stored = {
            after + name.removeprefix(before) if name.startswith(before) else name: t for name, t in stored.items()
        }
    save_file(stored, folder / "model.safetensors")


@pytest.mark.parametrize("variant", MULTIMODAL_VARIANTS)
def test_a_text_part_computes_what_the_multimodal_model_does(
    variant: str, multimodal: tuple[PreTrainedModel, Source], request: pytest.FixtureRequest
) -> None:
    """On text, in float64; with the names of today's hub, and those of transformers' classes."""
    original, source = multimodal
    tied = source.config.tie_word_embeddings
    assert tied == original.config.tie_word_embeddings == ("lm_head.weight" not in source.weights)
    assert source.config.eos_token_id == MULTIMODAL_VARIANTS[variant][3].get("eos_token_id", 1)
    assert "mrope" not in str(source.config)
    text = sum(parameter.numel() for parameter in load_model(source).parameters())
    assert source.weights.size == 4 * text < (source.path / "model.safetensors").stat().st_size
    models = [load_model(source)]
    stored_as(source.path, language_model__lm_head="lm_head", language_model__model="model.language_model")
    stored_as(source.path, model__layers="model.language_model.layers", visual="model.visual")
    models.append(load_model(open_source(source.path)))
    request.getfixturevalue("float64")
    for model in models:
        expected, found = logits_of(original, model)
        assert relative_error(found, expected) < 1e-11


@pytest.mark.parametrize(
    ("variant", "facts"),
    [
        ("mistral3, ministral3", {"texts": {"ministral3": "mistral"}}),
        ("gemma3", {"only_text": ()}),  # a bound of logits that the multimodal class doesn't look at
    ],
)
def test_a_text_part_of_another_function_is_noticed(
    variant: str, facts: dict[str, Any], multimodal: tuple[PreTrainedModel, Source], monkeypatch: pytest.MonkeyPatch
) -> None:
    original, source = multimodal
    content = json.loads((source.path / "config.json").read_text())
    edit_json(source.path / "config.json", text_config={**content["text_config"], "final_logit_softcapping": 1.0})
    model_type = MULTIMODAL_VARIANTS[variant][0]
    monkeypatch.setitem(MULTIMODAL, model_type, replace(MULTIMODAL[model_type], **facts))
    expected, found = logits_of(original, load_model(open_source(source.path)))
    assert relative_error(found, expected) > 1e-3


@pytest.mark.parametrize("variant", ["mistral3", "mistral3, ministral3"])
def test_a_head_that_no_config_ties(variant: str, multimodal: tuple[PreTrainedModel, Source]) -> None:
    """Mistral Small 3.1's config.json says nothing, the class would tie, and a head is stored."""
    original, source = multimodal
    content = json.loads((source.path / "config.json").read_text())
    content["text_config"].pop("tie_word_embeddings", None)
    del content["tie_word_embeddings"]
    (source.path / "config.json").write_text(json.dumps(content))
    stored = "language_model.lm_head.weight" in load_file(source.path / "model.safetensors")
    found = open_source(source.path)
    assert stored == (variant == "mistral3") and found.config.tie_word_embeddings != stored
    assert relative_error(load_model(found)(TOKENS).logits, original(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("variant", ["qwen2_vl"])
def test_a_config_without_a_text_config(variant: str, multimodal: tuple[PreTrainedModel, Source]) -> None:
    """As the first Qwen2-VL have it."""
    original, source = multimodal
    content = json.loads((source.path / "config.json").read_text())
    text = {name: value for name, value in content.pop("text_config").items() if name != "model_type"}
    rope = text.pop("rope_parameters")
    text |= {"rope_theta": rope["rope_theta"], "rope_scaling": {"type": "mrope", "mrope_section": [6, 5, 5]}}
    (source.path / "config.json").write_text(json.dumps({**text, **content}))
    assert relative_error(load_model(open_source(source.path))(TOKENS).logits, original(TOKENS).logits) < 1e-5


@pytest.mark.parametrize("variant", ["gemma3"])
def test_a_text_part_is_quantized(variant: str, multimodal: tuple[PreTrainedModel, Source], tmp_path: Path) -> None:
    original, source = multimodal
    for name in ("preprocessor_config.json", "processor_config.json", "chat_template.jinja"):
        (source.path / name).write_text("{}")
    job = make_job(variant, tmp_path, precision="w4a8kv8", head_bits=16, transforms=["T_k", "T_v", "T_u", "T_h", "T_d"])
    assert job.source.kind == "the text part of a Gemma3ForConditionalGeneration, as Gemma3ForCausalLM"
    (note,) = job.source.notes
    assert note == (
        "only the text part is read, quantized and served; left out: 34 tensors of multi_modal_projector, vision_tower"
    )
    assert relative_error(transformed(job)(TOKENS).logits, original(TOKENS).logits) < 1e-4
    pipeline.quantize(replace(job, residency="streamed"), tmp_path / "out")
    written = {file.name for file in (tmp_path / "out").iterdir()}
    assert {"tokenizer.json", "chat_template.jinja"} <= written and not any("processor" in name for name in written)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["model_type"] == "fptquant_gemma3_text" and config["eos_token_id"] == [1, 5]
    assert not {"text_config", "vision_config", "image_token_index"} & config.keys()
    found = load_model(open_source(tmp_path / "out"))(TOKENS).logits
    assert torch.corrcoef(torch.stack((original(TOKENS).logits.flatten(), found.flatten())))[0, 1] > 0.5


@pytest.mark.parametrize(
    ("variant", "fields", "message"),
    [
        (
            "mistral3",
            {"text_config": {"model_type": "mistral4"}},
            "has a text_config with model_type 'mistral4', wh",
        ),
        ("mistral3", {"architectures": ["Mistral3Model"]}, "of this model_type, only Mistral3ForConditionalGeneration"),
        ("mistral3", {"quantization_config": {"quant_method": "fp8"}}, "is quantized already: give the original model"),
        (
            "mistral3",
            {"model_type": "aria"},
            "multimodal model whose text part is not known: .* known: Mistral3",
        ),
        (
            "gemma3",
            {"text_config": {"final_logit_softcapping": 30.0}},
            "has final_logit_softcapping in its text_config, of which this class makes nothing",
        ),
        (
            "gemma3",
            {"text_config": {"use_bidirectional_attention": True}},
            "architecture Gemma3ForCausalLM .* has use_bidirectional_attention: tokens attend to later ones",
        ),
    ],
)
def test_what_is_no_text_part(
    variant: str, fields: dict[str, Any], message: str, multimodal: tuple[PreTrainedModel, Source]
) -> None:
    folder = multimodal[1].path
    if "text_config" in fields:
        text = json.loads((folder / "config.json").read_text())["text_config"]
        fields = {"text_config": {**text, **fields["text_config"]}}
    edit_json(folder / "config.json", **fields)
    with pytest.raises(FPTQuantError, match=message):
        open_source(folder)


@pytest.mark.parametrize("variant", ["llava"])
def test_a_tensor_under_two_names(variant: str, multimodal: tuple[PreTrainedModel, Source]) -> None:
    file = multimodal[1].path / "model.safetensors"
    stored = load_file(file)
    save_file({**stored, "model.language_model.norm.weight": torch.ones(128)}, file)
    with pytest.raises(FPTQuantError, match="holds both language_model.model.norm.weight and model.language_model.nor"):
        open_source(file.parent)


# -- training --


@pytest.mark.parametrize("variant", LAST)
def test_what_is_trained_is_the_quantized_model(variant: str, tmp_path: Path) -> None:
    """And each transform's parameters get a gradient, in every layer."""
    fields = {"precision": "w4a8kv8", "head_bits": 16, "rounding": {"method": "nearest"}, **SHIFTED}
    names = [*FPTQUANT, "T_h"] if family_of(variant).mixture else FPTQUANT
    job = make_job(variant, tmp_path, transforms=possible(variant, names), **fields)
    family, simulation = job.source.architecture, with_constants(job)
    for _ in calibrate_and_round(simulation, family, job.recipe, job.windows):
        pass
    student = transform_student(
        folded(job), family, job.transforms, simulation, estimator="ste", float_weights=False
    ).model
    expected, found = simulation(TOKENS).logits, student(TOKENS).logits
    apart = (found - expected).norm(dim=-1) / expected.norm(dim=-1)
    # float32 merging turns a few codes; where they turn the router, a token goes through another expert
    # and the offset makes up for the mean of what rounding an input leaves, the student doesn't
    assert apart.quantile(0.75 if family.mixture else 1.0) < 0.15
    found.square().sum().backward()
    for name, parameter in job.transforms.named_parameters():
        gradient = parameter.grad
        assert gradient is not None and bool(gradient.isfinite().all()), name
        assert bool((gradient if "T_r" in name else gradient.flatten(1).abs().amax(1)).any()), name


def test_nothing_to_train_on_weights(tmp_path: Path) -> None:
    """T_k in the norms' gains is in no weight."""
    job = make_job("qwen3", tmp_path, transforms=["T_k"], local={"steps": 2})
    with RunState(tmp_path / "state", job.signature(), fresh=False) as state:
        assert train_transforms(job, None, state, Stages(), MetricsFile(tmp_path / "metrics")) == {}


# -- layer by layer --


def require_replayed(model: PreTrainedModel, family: Architecture) -> None:
    """What enters each layer, and leaves the last, is what the model itself computes."""
    expected = model(TOKENS, use_cache=False, output_hidden_states=True).hidden_states
    inputs = first_inputs(model, family, TOKENS)
    for index, layer in enumerate(family.layer_modules(model)):
        assert relative_error(inputs.hidden[0], expected[index]) < 1e-6, index
        inputs.advance(layer)
    assert relative_error(model.get_submodule(family.final_norm)(inputs.hidden[0]), expected[-1]) < 1e-6


@pytest.mark.parametrize("variant", VARIANTS)
def test_layers_are_replayed(variant: str) -> None:
    require_replayed(read(variant), family_of(variant))


# -- whole runs --


@pytest.mark.parametrize("variant", LAST)
def test_streamed_is_resident(variant: str, tmp_path: Path) -> None:
    """And what is read back is nearer to the original than chance."""
    fields = {"precision": "w4a8kv8", "transforms": possible(variant, FPTQUANT), "head_bits": 16, **SHIFTED}
    for residency in ("resident", "streamed"):
        job = replace(make_job(variant, tmp_path, **fields), residency=residency)
        pipeline.quantize(job, tmp_path / residency)
    resident, streamed = (load_file(tmp_path / name / "model.safetensors") for name in ("resident", "streamed"))
    assert resident.keys() == streamed.keys()
    assert all(torch.equal(resident[name], streamed[name]) for name in resident)
    original, found = load_model(job.source)(TOKENS), load_model(open_source(tmp_path / "streamed"))(TOKENS)
    assert torch.corrcoef(torch.stack((original.logits.flatten(), found.logits.flatten())))[0, 1] > 0.5


# -- starts --


@pytest.mark.parametrize("variant", LAST)
def test_pairs_of_keys_start_equally_large(variant: str, tmp_path: Path) -> None:
    """On the calibration text, whatever their sizes were; queries take the inverse."""
    job = make_job(variant, tmp_path, transforms={"T_k": {"start": "keys"}})
    family = job.source.architecture
    shape = family.shape(job.source.config)
    untouched, model = folded(job), folded(job)
    start_from_activations(model, family, job.transforms, job.windows, 0)
    scale = KeyScale(shape, QueryKeyOptions(), torch.Generator())

    def largest(model: PreTrainedModel, layer: int) -> Tensor:
        """Of each pair's lengths in a sequence, averaged: (kv_heads, head_dim / 2), or of all heads together."""
        cache = model(job.windows, use_cache=True, past_key_values=DynamicCache()).past_key_values
        found = scale.pair_norms(cache.layers[layer].keys).amax(2).mean(0)
        return found.amax(0) if shape.head_norms else found

    merged = transformed(job)
    for layer in set(range(job.layers)) - set(shape.unrotated):
        before, after = largest(untouched, layer), largest(merged, layer)
        assert before.max() > 1.2 * before.min()
        torch.testing.assert_close(after, before.log().mean().exp().expand_as(after), rtol=1e-4, atol=0)
    trained = {name for transform in job.transforms for name in transform.seen_in_weights()}
    assert "log_scale" not in trained
