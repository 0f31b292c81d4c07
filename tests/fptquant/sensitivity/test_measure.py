"""One site quantized at a time, against hooks on the plain model."""

import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from fptquant import pipeline
from fptquant.errors import FPTQuantError
from fptquant.evaluation.perplexity import measure, transformers_scorer
from fptquant.format import code_bounds
from fptquant.format import quantize as quantize_codes
from fptquant.loading import load_model
from fptquant.quantize import RangeOptions, WeightRangeOptions, search_range, weight_scales
from fptquant.quantize.rounding import RoundingOptions
from fptquant.quantize.rounding.gptq import round_gptq
from fptquant.recipe import Recipe
from fptquant.run.job import Job
from fptquant.sensitivity import KINDS, Effect, Probe, Site, sites_of
from fptquant.simulate import KVQuantizer
from fptquant.simulate.attention import ATTENTION_NAME, QuantizedAttention
from tests import families

MakeProbe = Callable[..., Probe]


def reference_effect(expected: Tensor, logits: Tensor, tokens: Tensor) -> Effect:
    p, q = (torch.log_softmax(x.double(), -1) for x in (expected, logits))
    loss = -q[:, :-1].gather(-1, tokens[:, 1:, None]).mean().item()
    return Effect((p.exp() * (p - q)).sum(-1).mean().item(), math.exp(loss))


def close(first: Effect, second: Effect) -> bool:
    return first.kl == pytest.approx(second.kl, rel=1e-3, abs=1e-6) and first.perplexity == pytest.approx(
        second.perplexity, rel=1e-4
    )


def test_sites_are_what_the_recipe_quantizes(make_job: Callable[..., Job]) -> None:
    kinds = [kind for kind in KINDS if not kind.startswith("shared")]  # those are of experts
    assert sites_of(make_job()) == [Site(kind, layer) for kind in kinds for layer in range(2)]
    assert {site.kind for site in sites_of(make_job(precision="w4a8"))} == set(kinds) - {"keys", "values"}
    assert {s.kind for s in sites_of(make_job(precision="w4a16"))} == {k for k in kinds if k.endswith("weights")}
    kept = make_job(ignore=["model.layers.0.self_attn.o_proj"])
    assert sites_of(kept, ["o_input", "o_weights"]) == [Site("o_input", 1), Site("o_weights", 1)]
    assert Site("qkv_weights", 1).modules(kept) == [f"model.layers.1.self_attn.{x}_proj" for x in "qkv"]
    with pytest.raises(FPTQuantError, match="unknown site kind 'down_inputs': did you mean 'down_input'"):
        sites_of(kept, ["down_inputs"])


# -- one site, against the plain model with that one thing quantized by a hook --


def test_unquantized(probe: Probe) -> None:
    assert probe.unquantized.kl < 1e-6
    plain = measure(map(transformers_scorer(load_model(probe.job.source)), probe.tokens), 24)
    assert probe.unquantized.perplexity == pytest.approx(plain.perplexity, rel=1e-4)


@pytest.mark.parametrize("wide", [False, True], ids=["narrow", "wide"])
@pytest.mark.parametrize(
    "kind, modules",
    [
        ("qkv_input", ["self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"]),
        ("o_input", ["self_attn.o_proj"]),
        ("gate_up_input", ["mlp.gate_proj", "mlp.up_proj"]),
        ("down_input", ["mlp.down_proj"]),
    ],
)
def test_an_input(kind: str, modules: list[str], wide: bool, make_probe: MakeProbe) -> None:
    probe = make_probe((kind,), transforms=[], activation_range={"outlier_tokens": 0.1})
    for index in range(2):
        model = load_model(probe.job.source)
        expected = model(probe.tokens).logits
        seen: list[Tensor] = []
        layers = [model.get_submodule(f"model.layers.{index}.{name}") for name in modules]
        handle = layers[0].register_forward_pre_hook(lambda m, args: seen.append(args[0]))  # noqa: B023
        model(probe.job.windows)
        handle.remove()
        bits, symmetric = (8, True) if wide else (4, False)
        inputs = seen[0].flatten(0, 1)
        usual = inputs[inputs.abs().amax(1).argsort()[: len(inputs) - int(0.1 * len(inputs))]]
        scale, zero_point = search_range(usual, bits, symmetric, RangeOptions())
        bounds = code_bounds(zero_point, bits)
        for layer in layers:
            layer.register_forward_pre_hook(
                lambda m, args: (quantize_codes(args[0], scale, *bounds) * scale,)  # noqa: B023
            )
        found = probe.measure({Site(kind, index): wide})
        assert close(found, reference_effect(expected, model(probe.tokens).logits, probe.tokens))
        assert found.kl > 1e-6


@pytest.mark.parametrize("kind", ["down_input", "down_weights", "shared_down_input"])
def test_experts(kind: str, tmp_path: Path) -> None:
    """Each expert is fitted to all tokens; what is measured is what the router makes of them."""
    job = families.make_job("qwen2_moe", tmp_path, precision="w4a4kv4", transforms=[], sink="none")
    probe, site = Probe(job, pipeline.with_constants(job), job.windows[:3, :24]), Site(kind, 1)
    assert list(probe.calibrate([site])) == [0, 1]
    model, seen = load_model(job.source), []
    expected = model(probe.tokens).logits
    mlp = model.model.layers[1].mlp
    handle = mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(job.windows)
    handle.remove()
    for expert in [mlp.shared_expert] if kind.startswith("shared") else mlp.experts:
        x = expert.act_fn(expert.gate_proj(seen[0])) * expert.up_proj(seen[0])
        if kind == "down_weights":
            hessian, weight = x.T @ x / len(x), expert.down_proj.weight
            scale = weight_scales(weight, 4, WeightRangeOptions(), hessian.diagonal())
            weight.copy_(round_gptq(weight, scale, 4, hessian, RoundingOptions()) * scale)
            continue
        scale, zero_point = search_range(x, 4, False, RangeOptions())
        bounds = code_bounds(zero_point, 4)
        expert.down_proj.register_forward_pre_hook(
            lambda m, args, scale=scale, bounds=bounds: (quantize_codes(args[0], scale, *bounds) * scale,)
        )
    found = probe.measure({site: False})
    assert close(found, reference_effect(expected, model(probe.tokens).logits, probe.tokens))
    assert probe.measure({site: True}).kl < 0.2 * found.kl
    assert probe.measure({}).kl < 1e-6


def test_weights(make_probe: MakeProbe) -> None:
    probe = make_probe(("gate_up_weights",), transforms=[])
    model = load_model(probe.job.source)
    expected = model(probe.tokens).logits
    mlp = model.model.layers[1].mlp
    seen: list[Tensor] = []
    mlp.register_forward_pre_hook(lambda m, args: seen.append(args[0].flatten(0, 1)))
    model(probe.job.windows)
    x = seen[0]
    hessian = x.T @ x / len(x)
    for layer in (mlp.gate_proj, mlp.up_proj):
        scale = weight_scales(layer.weight, 4, WeightRangeOptions(), hessian.diagonal())
        layer.weight.copy_(round_gptq(layer.weight, scale, 4, hessian, RoundingOptions()) * scale)
    found = probe.measure({Site("gate_up_weights", 1): False})
    assert close(found, reference_effect(expected, model(probe.tokens).logits, probe.tokens))


def test_values(make_probe: MakeProbe) -> None:
    probe = make_probe(("values",), transforms=[])
    model = load_model(probe.job.source)
    expected = model(probe.tokens).logits
    layer, seen = model.model.layers[0].self_attn.v_proj, []
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(y))
    model(probe.job.windows)
    handle.remove()
    scale, zero_point = search_range(seen[0], 4, False, RangeOptions())
    bounds = code_bounds(zero_point, 4)
    layer.register_forward_hook(lambda m, args, y: quantize_codes(y, scale, *bounds) * scale)
    found = probe.measure({Site("values", 0): False})
    assert close(found, reference_effect(expected, model(probe.tokens).logits, probe.tokens))


def test_keys_alone() -> None:
    """Attention with one of keys and values quantized, against what it makes of dequantized ones."""
    attention = QuantizedAttention()
    attention.num_key_value_groups, attention.config = 2, SimpleNamespace(_attn_implementation=ATTENTION_NAME)
    scheme = PRECISION.kv_cache
    quantizer = attention.kv_quantizer = KVQuantizer(attention, scheme, 2)
    generator = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(2, heads, 9, 8, generator=generator) for heads in (4, 2, 2))
    arguments: dict[str, Any] = {"attention_mask": None, "scaling": 0.3}
    rounded = {}
    for name, states in (("k", key), ("v", value)):
        scale, zero_point = search_range(states, 4, False, RangeOptions())
        quantizer.set_range(attention, name, scale, zero_point)
        rounded[name] = quantize_codes(states, scale, *code_bounds(zero_point, 4)) * scale
    for sides in ({"k"}, {"v"}, {"k", "v"}):
        quantizer.ready = False
        inputs = [rounded[name] if name in sides else states for name, states in (("k", key), ("v", value))]
        expected = attention.attend(query, *inputs, **arguments)
        quantizer.ready, quantizer.sides = True, sides
        found = attention.attend(query, key, value, **arguments)
        torch.testing.assert_close(found, expected)


# -- a constant first token --


@pytest.mark.parametrize("kind", ["qkv_input", "o_input", "down_input", "values", "o_weights"])
def test_with_a_sink_all_tokens_but_the_first_are_quantized(kind: str, make_probe: MakeProbe) -> None:
    """Ranges, Hessians and what is measured leave the constant token alone."""
    probe = make_probe((kind,), transforms=[], sink="auto")
    assert probe.job.config.sink is not None and bool((probe.tokens[:, 0] == probe.job.config.sink.token).all())
    assert probe.unquantized.kl < 1e-6
    model = load_model(probe.job.source)
    expected = model(probe.tokens).logits
    attention, mlp = model.model.layers[0].self_attn, model.model.layers[0].mlp
    watched = {"qkv_input": attention.q_proj, "down_input": mlp.down_proj, "values": attention.v_proj}
    layer = watched.get(kind, attention.o_proj)
    seen: list[Tensor] = []
    handle = layer.register_forward_hook(lambda m, args, y: seen.append(y if kind == "values" else args[0]))
    model(probe.job.windows)
    handle.remove()
    counted = seen[0][:, 1:]
    scale, zero_point = search_range(counted, 4, False, RangeOptions())
    bounds = code_bounds(zero_point, 4)

    def rounded(x: Tensor) -> Tensor:
        return torch.cat((x[:, :1], (quantize_codes(x, scale, *bounds) * scale)[:, 1:]), 1)

    if kind == "values":
        layer.register_forward_hook(lambda m, args, y: rounded(y))
    elif kind == "o_weights":
        x = counted.flatten(0, 1)
        hessian = x.T @ x / len(x)
        weight_scale = weight_scales(layer.weight, 4, WeightRangeOptions(), hessian.diagonal())
        weight = round_gptq(layer.weight, weight_scale, 4, hessian, RoundingOptions()) * weight_scale
        layer.register_forward_hook(
            lambda m, args, y: torch.cat((y[:, :1], torch.nn.functional.linear(args[0][:, 1:], weight, m.bias)), 1)
        )
    else:
        for module in (attention.q_proj, attention.k_proj, attention.v_proj) if kind == "qkv_input" else (layer,):
            module.register_forward_pre_hook(lambda m, args: (rounded(args[0]),))
    found = probe.measure({Site(kind, 0): False})
    assert close(found, reference_effect(expected, model(probe.tokens).logits, probe.tokens))
    assert found.kl > 1e-6


def test_windows_that_start_otherwise_have_no_constant(make_probe: MakeProbe, make_job: Callable[..., Job]) -> None:
    """Each window counts by itself, whatever the others start with."""
    windows = make_job(sink="auto").windows[:2, :24]
    other = torch.cat((windows[1:, 1:], windows[1:, :1]), 1)
    sites = {Site("values", 0): False, Site("down_input", 0): False}

    def measured(tokens: Tensor) -> tuple[float, float]:
        probe = make_probe(("values", "down_input"), tokens, sink="auto")
        return probe.unquantized.kl, probe.measure(sites).kl

    alone = [measured(tokens)[1] for tokens in (windows[:1], other)]
    for mixed in (torch.cat((windows[:1], other)), torch.cat((other, windows[:1]))):
        unquantized, found = measured(mixed)
        assert unquantized < 1e-6 and found == pytest.approx(sum(alone) / 2, rel=1e-3)


PRECISION = Recipe.parse({"precision": "w4a4kv4"}).precision


def test_a_measurement_leaves_the_model_as_it_was(probe: Probe) -> None:
    before = probe.model(probe.tokens).logits
    sites = sites_of(probe.job)
    for site in sites:
        effect = probe.measure({site: False})
        assert effect.kl > 1e-7, site
        assert torch.equal(probe.model(probe.tokens).logits, before), site
        assert probe.measure({site: False}) == effect
    assert probe.measure(dict.fromkeys(sites, False)).kl > max(probe.measure({site: False}).kl for site in sites)
    assert torch.equal(probe.model(probe.tokens).logits, before)


def test_wide_is_closer(probe: Probe) -> None:
    for site in sites_of(probe.job):
        if site.projections(probe.job):
            assert probe.measure({site: True}).kl < 0.2 * probe.measure({site: False}).kl, site


def test_the_recipe_s_rounding_is_used(probe: Probe, make_probe: MakeProbe) -> None:
    sites = {Site("qkv_weights", 0): False}
    others = [{"method": "nearest"}, {"method": "quantease"}, {"method": "gptq", "hessian": "output"}]
    found = {make_probe(("qkv_weights",), rounding=options).measure(sites).kl for options in others}
    assert len(found | {probe.measure(sites).kl}) == 4
