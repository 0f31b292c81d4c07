"""The weights of tokens in an output-adaptive Hessian, against autograd on the plain model."""

import copy
from collections.abc import Callable
from functools import partial

import pytest
import torch
from torch import Tensor, nn
from transformers import LlamaForCausalLM

import fptquant.calibration.layerwise
import fptquant.quantize.rounding
from fptquant.calibration.halves import FLOOR
from fptquant.calibration.output_gradients import token_weights
from fptquant.format import CheckpointConfig
from fptquant.simulate import install_simulation, simulated_linears
from fptquant.simulate.mixture import SparseMLP, separate_projections
from fptquant.wiring.llama import LLAMA
from tests import families

Simulate = Callable[..., LlamaForCausalLM]
MakeModel = Callable[..., LlamaForCausalLM]

GROUPS = {"q_proj": ("q_proj", "k_proj", "v_proj"), "gate_proj": ("gate_proj", "up_proj")}


def reference(model: LlamaForCausalLM, windows: Tensor) -> dict[str, Tensor]:
    """|dL/dy|^2 per module and token, from `torch.autograd.grad` on a model without any simulation."""
    outputs: dict[str, Tensor] = {}
    handles = [
        module.register_forward_hook(lambda m, args, y, name=name: outputs.__setitem__(name, y))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear)
    ]
    norms: dict[str, list[Tensor]] = {}
    with torch.enable_grad():
        for window in windows:
            embedded = model.get_input_embeddings()(window[None]).requires_grad_()
            logits = model(inputs_embeds=embedded, use_cache=False).logits[0, :-1]
            loss = -torch.log_softmax(logits, -1).gather(-1, window[1:, None]).sum()
            for name, gradient in zip(outputs, torch.autograd.grad(loss, list(outputs.values())), strict=True):
                norms.setdefault(name, []).append(gradient.flatten(0, -2).pow(2).sum(-1))
    for handle in handles:
        handle.remove()
    return {name: torch.cat(values) for name, values in norms.items()}


@pytest.mark.parametrize("kind", ["bias", "gqa"])
def test_weights_equal_autograd(kind: str, make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    expected = reference(make_model(kind), windows)
    found = token_weights(simulate(make_model(kind), transforms=[]), LLAMA, windows)
    assert len(found) == 2 * 4 + 1
    for name, values in found.items():
        parent, _, leaf = name.rpartition(".")
        total = sum(expected[f"{parent}.{each}".removeprefix(".")] for each in GROUPS.get(leaf, (leaf,)))
        assert isinstance(total, Tensor) and values.shape == windows.shape
        torch.testing.assert_close(values.flatten(), total / total.mean(), rtol=1e-3, atol=1e-5, msg=name)
    assert found["lm_head"][:, -1].abs().max() == 0  # the last token predicts nothing


@pytest.mark.parametrize("variant", ["qwen2_moe", "qwen3_moe with windows", "mixtral"])
def test_weights_of_experts_equal_autograd(variant: str, windows: Tensor) -> None:
    """Each expert is a group of its own; a token counts for those that it goes through, others have a floor."""
    family, tokens = families.family_of(variant), windows[:, :12]
    plain = separate_projections(families.build(variant), family)
    simulation = copy.deepcopy(plain)
    install_simulation(simulation, family, CheckpointConfig())
    found = token_weights(simulation, family, tokens)
    chosen: dict[str, list[Tensor]] = {}

    def route(name: str, mixture: nn.Module, args: tuple[Tensor, ...]) -> None:
        gate = args[0].flatten(0, 1) @ mixture.get_parameter("gate.weight").T
        chosen.setdefault(name, []).append(gate.topk(plain.config.num_experts_per_tok).indices)

    for name, module in plain.named_modules():
        if isinstance(module, SparseMLP):
            module.register_forward_pre_hook(partial(route, name))
    expected: dict[str, list[Tensor]] = {}
    for window in tokens:
        for name, norms in reference(plain, window[None]).items():
            expected.setdefault(name, []).append(norms)
    checked = 0
    for name, values in found.items():
        mixture, _, place = name.partition(".experts.")
        if not place:
            continue
        total = torch.zeros(values.shape)
        for index in range(len(tokens)):
            there = (chosen[mixture][index] == int(place.split(".")[0])).any(-1)
            for each in GROUPS.get(name.rpartition(".")[2], ("down_proj",)):
                norms = expected.get(f"{name.rpartition('.')[0]}.{each}")
                if bool(there.any()):
                    assert norms is not None
                    total[index, there] += norms.pop(0)
            assert bool((values[index, ~there] == FLOOR).all())
        torch.testing.assert_close(values, total / total.mean() + FLOOR, rtol=1e-3, atol=1e-5, msg=name)
        checked += 1
    shape = family.shape(plain.config)
    assert checked == 2 * shape.experts * shape.mixtures


def test_residual_scale_is_taken_out(make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    """With S_n the layer's product is S times as large, so its gradient is S times smaller."""
    plain = token_weights(simulate(make_model("gqa"), transforms=[]), LLAMA, windows)
    scaled = token_weights(simulate(model := make_model("gqa"), transforms=["S_n"]), LLAMA, windows)
    scales: list[Tensor] = []
    layer = model.model.layers[1].mlp.down_proj
    layer.register_forward_pre_hook(lambda module, args: scales.append(args[1].flatten().clone()))
    for window in windows:
        model(window[None], use_cache=False)
    name = "model.layers.1.mlp.down_proj"
    expected = plain[name] / torch.stack(scales).square()
    torch.testing.assert_close(scaled[name], expected / expected.mean(), rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(scaled["lm_head"], plain["lm_head"], rtol=1e-3, atol=1e-5)


def test_collecting_leaves_the_model_as_it_was(make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    model = simulate(make_model("bias"))
    before = model(windows).logits
    token_weights(model, LLAMA, windows)
    assert torch.equal(model(windows).logits, before) and not model(windows).logits.requires_grad
    assert not any(layer._forward_hooks for _, layer in simulated_linears(model))
    assert all(parameter.grad is None for parameter in model.parameters())


def test_equal_weights_give_the_hessian_of_the_inputs(
    make_model: MakeModel, simulate: Simulate, windows: Tensor, monkeypatch: pytest.MonkeyPatch
) -> None:
    fields = {"precision": "w4a4kv4"}
    expected = simulate(make_model("bias"), windows, **fields).state_dict()
    output = {"rounding": {"hessian": "output"}, **fields}
    adaptive = simulate(make_model("bias"), windows, **output).state_dict()

    def ones(*args: object) -> dict[str, Tensor]:
        return {name: torch.ones_like(values) for name, values in token_weights(*args).items()}  # type: ignore[arg-type]

    monkeypatch.setattr(fptquant.calibration.layerwise, "token_weights", ones)
    same = simulate(make_model("bias"), windows, **output).state_dict()
    assert all(torch.equal(same[key], value) for key, value in expected.items())
    key = "model.layers.0.self_attn.q_proj.weight_packed"
    assert not torch.equal(adaptive[key], expected[key])


def test_the_weighted_error_is_what_falls(
    make_model: MakeModel, simulate: Simulate, windows: Tensor, hessians: list[Tensor]
) -> None:
    """The Hessian handed to the rounder is sum_t w_t x_t x_t^T / tokens, of the group it belongs to."""
    weights = token_weights(simulate(make_model("gqa")), LLAMA, windows)
    model = simulate(make_model("gqa"), windows, rounding={"hessian": "output"})
    inputs: list[Tensor] = []
    layer = model.model.layers[1].self_attn.q_proj
    layer.observer = lambda x: inputs.append(layer.quantized_input(x.flatten(0, 1)))
    model(windows, use_cache=False)
    x, importance = inputs[0], weights["model.layers.1.self_attn.q_proj"].flatten()
    expected = torch.einsum("t,ti,tj->ij", importance, x, x) / len(x)
    torch.testing.assert_close(hessians[4], expected, rtol=1e-3, atol=1e-4 * expected.abs().max().item())
