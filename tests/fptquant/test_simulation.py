"""The simulation against references written here from the method: threaded S_n, attention in float64."""

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from fptquant.format.steps import Hadamard
from fptquant.simulate import SimulatedLinear, install_simulation, simulated_linears
from fptquant.simulate.families import CLASSES
from fptquant.simulate.install import set_exact
from fptquant.transforms import TRANSFORMS
from fptquant.wiring import FAMILIES
from fptquant.wiring.llama import LLAMA
from tests.conftest import MODELS

Simulate = Callable[..., LlamaForCausalLM]
MakeModel = Callable[..., LlamaForCausalLM]


def relative_error(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected.double()).abs().max() / expected.double().abs().max()).item()


def test_every_family_has_its_classes() -> None:
    assert CLASSES.keys() == FAMILIES.keys()


# -- function preserved by the online transforms --


@pytest.mark.parametrize("kind", MODELS)
@pytest.mark.parametrize("names", [["S_n"], ["T_d"], ["T_h"], list(TRANSFORMS)], ids=["S_n", "T_d", "T_h", "all"])
def test_online_transforms_preserve_the_function(
    kind: str, names: list[str], make_model: MakeModel, simulate: Simulate, tokens: Tensor
) -> None:
    """With embeddings of RMS 0.02 and eps 1e-5, where S_n is large and eps matters."""
    expected = make_model(kind)(tokens).logits
    simulated = simulate(make_model(kind), random=True, transforms=names)
    assert relative_error(simulated(tokens).logits, expected) < 2e-5


# -- T4: the local form of S_n against the threaded one --


def threaded_llama(model: LlamaForCausalLM, tokens: Tensor, quantized: bool) -> Tensor:
    """Llama in float64 with a residual stream that every norm rescales (method.md 7, form A).

    `x` is the scaled stream, `S` the running scale per token; eps is scaled by S^2, biases of o_proj and down_proj
    by S. Norms have no gain. Reads the weights of a simulation with S_n on, quantized or not.
    """
    config = model.config
    heads, kv_heads, d = config.num_attention_heads, config.num_key_value_heads, config.head_dim
    length = tokens.shape[1]
    frequency = 10000.0 ** (-torch.arange(0, d, 2, dtype=torch.float64) / d)
    phase = torch.outer(torch.arange(length, dtype=torch.float64), frequency)
    cos, sin = phase.cos(), phase.sin()  # (T, d / 2)
    causal = torch.full((length, length), -math.inf, dtype=torch.float64).triu(1)

    def linear(layer: SimulatedLinear, x: Tensor, online: Callable[[Tensor], Tensor] = lambda x: x) -> Tensor:
        x = online(x)
        if not quantized:
            return x @ layer.weight.double().T
        scale = layer.input_scale.double()
        z = layer.input_zero_point.double() if not layer.scheme.activations.symmetric else 0.0
        half = 2.0 ** (layer.scheme.activations.bits - 1)
        q = torch.clamp(torch.round(x / scale) + z, -half, half - 1)
        return ((q - z) * scale) @ (layer.codes.double() * layer.weight_scale.double()).T

    def bias(layer: SimulatedLinear) -> Tensor | float:
        return 0.0 if layer.bias is None else layer.bias.double()

    def rope(x: Tensor) -> Tensor:  # (B, H, T, d), pairs (j, j + d/2)
        first, second = x.chunk(2, -1)
        return torch.cat((first * cos - second * sin, second * cos + first * sin), -1)

    def attention(block: Any, x: Tensor) -> Tensor:
        def split(layer: SimulatedLinear, count: int) -> Tensor:
            return (linear(layer, x) + bias(layer)).unflatten(-1, (count, d)).transpose(1, 2)

        q, k = rope(split(block.q_proj, heads)), rope(split(block.k_proj, kv_heads))
        v = split(block.v_proj, kv_heads)
        group = torch.arange(heads) // (heads // kv_heads)
        weights = torch.softmax(q @ k[:, group].mT / math.sqrt(d) + causal, -1)
        return (weights @ v[:, group]).transpose(1, 2).flatten(2)

    def mlp(block: Any, x: Tensor) -> Tensor:
        gate = linear(block.gate_proj, x) + bias(block.gate_proj)
        return gate * torch.sigmoid(gate) * (linear(block.up_proj, x) + bias(block.up_proj))

    def hadamard(layer: SimulatedLinear) -> Callable[[Tensor], Tensor]:
        size = next((step.block for step in layer.steps if isinstance(step, Hadamard)), 1)
        matrix = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(size)] for i in range(size)])
        return lambda x: (x.unflatten(-1, (-1, size)) @ (matrix.double() / size**0.5)).flatten(-2)

    x = model.model.embed_tokens.weight.double()[tokens]
    scale = torch.ones_like(x[..., :1])
    eps = config.rms_norm_eps
    for block in model.model.layers:
        for core, module, last in (
            (attention, block.self_attn, block.self_attn.o_proj),
            (mlp, block.mlp, block.mlp.down_proj),
        ):
            rho = torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps * scale**2)
            x, scale = x * rho, scale * rho
            h = core(module, x) * scale
            x = x + linear(last, h, hadamard(last)) + bias(last) * scale
    x = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps * scale**2)
    return linear(model.lm_head, x)


@pytest.mark.parametrize("kind", ["gqa", "bias", "mqa"])
def test_local_residual_scale_equals_the_threaded_form(
    kind: str, make_model: MakeModel, simulate: Simulate, tokens: Tensor
) -> None:
    model = simulate(make_model(kind, embedding_rms=0.02), random=True)
    assert relative_error(model(tokens).logits, threaded_llama(model, tokens, quantized=False)) < 1e-5


@pytest.mark.parametrize("kind", ["gqa", "bias"])
@pytest.mark.parametrize(
    "precision", ["w4a8", {"activations": {"bits": 4, "symmetric": False}, "kv_cache": {"bits": 16}}]
)
def test_quantized_local_form_equals_the_quantized_threaded_form(
    kind: str, precision: Any, make_model: MakeModel, simulate: Simulate, tokens: Tensor, windows: Tensor
) -> None:
    """A few codes near a tie may differ between float32 and float64; the quantization itself is far larger."""
    model = simulate(make_model(kind), windows, precision=precision)
    simulated, reference = model(tokens).logits.double(), threaded_llama(model, tokens, quantized=True)
    quantization_error = (reference - make_model(kind)(tokens).logits).pow(2).mean().sqrt()
    difference = (simulated - reference).pow(2).mean().sqrt()
    assert difference < 0.05 * quantization_error


def test_residual_scale_makes_static_ranges_independent_of_the_size_of_a_token(
    make_model: MakeModel, simulate: Simulate, windows: Tensor
) -> None:
    """The point of S_n: tokens with a much larger residual need no larger range at down_proj."""

    def spread(transforms: list[str]) -> float:
        model = make_model("gqa")
        model.model.embed_tokens.weight[::2] *= 3000.0
        model = simulate(model, transforms=transforms)
        down = dict(simulated_linears(model))["model.layers.1.mlp.down_proj"]
        norm = model.model.layers[1].post_attention_layernorm
        seen: dict[str, Tensor] = {}
        norm.register_forward_pre_hook(lambda module, args: seen.__setitem__("residual", args[0]))
        down.observer = lambda x: seen.__setitem__("input", x)
        model(windows)
        size = seen["residual"].pow(2).mean(-1).sqrt()
        ratio = seen["input"].pow(2).mean(-1).sqrt() * (1.0 if transforms else 1 / size)
        assert size.max() / size.min() > 10
        # what reaches the quantizer is h / RMS(residual) with S_n: equal to the ratio computed by hand without it
        return ratio.mean().item()

    assert spread(["S_n"]) == pytest.approx(spread([]), rel=1e-4)


# -- linear layer --


def test_simulated_linear_by_hand() -> None:
    config = CheckpointConfig(activations={"bits": 4, "symmetric": False})
    layer = SimulatedLinear(3, 2, True, config.steps_for("x"))
    layer.bias.copy_(torch.tensor([10.0, 20.0]))
    layer.set_input_quantizer(torch.tensor(0.5), torch.tensor(-3))  # codes q - z in [-5, 10]
    layer.set_weight_codes(torch.tensor([[1.0, 2.0, -8.0], [7.0, 0.0, 1.0]]), torch.tensor([[2.0], [0.25]]))
    x = torch.tensor([[0.25, 0.75, -100.0]])  # -> 0 (tie to even), 2 (tie to even), clamped to -5
    expected = torch.tensor([[(0 + 4 + 40) * 0.5 * 2.0 + 10, (0 + 0 - 5) * 0.5 * 0.25 + 20]])
    assert torch.equal(layer(x), expected)
    assert torch.equal(layer.quantized_input(x), torch.tensor([[0.0, 1.0, -2.5]]))


def test_simulated_linear_with_groups_by_hand() -> None:
    config = CheckpointConfig(weights={"strategy": "group", "group_size": 32})
    layer = SimulatedLinear(64, 1, False, config.steps_for("x"))
    layer.set_input_quantizer(torch.tensor(1.0), torch.tensor(0))
    codes = torch.zeros(1, 64)
    codes[0, [0, 31, 32, 63]] = torch.tensor([-8.0, 7.0, 8 * 7.0, 8 * -8.0])
    layer.set_weight_codes(codes, torch.tensor([[0.5]]), torch.tensor([[1, 8]], dtype=torch.int8))
    assert layer.weight_packed.shape == (1, 8)
    x = torch.zeros(1, 64)
    x[0, [0, 31, 32, 63]] = torch.tensor([1.0, 10.0, 100.0, -100.0])
    assert layer(x).item() == 0.5 * (-8 + 70 + 5600 + 6400)
    before = layer(x)
    layer.finish_loading("x")
    assert torch.equal(layer(x), before)
    layer.weight_multiplier[0, 0] = 9
    with pytest.raises(FPTQuantError, match=r"^x.weight_multiplier is missing or outside of \[1, 8\]: "):
        layer.finish_loading("x")
    with pytest.raises(AssertionError, match="fit into their bits"):  # 7 is no multiple of 8
        layer.set_weight_codes(codes, torch.tensor([[0.5]]), torch.tensor([[8, 8]], dtype=torch.int8))
    with pytest.raises(FPTQuantError, match="groups of 32 weights don't divide 48 input features"):
        SimulatedLinear(48, 1, False, config.steps_for("x"))


def test_weight_only_layer_does_not_touch_its_input() -> None:
    layer = SimulatedLinear(2, 1, False, CheckpointConfig(activations={"bits": 16}).steps_for("x"))
    layer.set_weight_codes(torch.tensor([[3.0, -1.0]]), torch.tensor([[0.5]]))
    assert layer(torch.tensor([[0.123, 4.0]])).item() == pytest.approx((3 * 0.123 - 4.0) * 0.5)
    assert "input_scale" not in layer.state_dict()


def test_output_keeps_the_dtype_of_the_input_and_scales_stay_float32(
    make_model: MakeModel, simulate: Simulate, windows: Tensor
) -> None:
    model = simulate(make_model("bias"), windows)
    layer = model.model.layers[0].mlp.down_proj
    assert layer(torch.randn(1, 72, dtype=torch.bfloat16), torch.ones(1, 1)).dtype == torch.bfloat16
    assert layer.input_scale.dtype == layer.weight_scale.dtype == torch.float32


# -- attention --


@pytest.mark.parametrize("kind", ["gqa", "mha", "mqa"])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("strategy", ["tensor", "head"])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("shifted", [False, True], ids=["", "shifted"])
def test_attention_over_codes_equals_attention_over_dequantized_values(
    kind: str, bits: int, strategy: str, symmetric: bool, shifted: bool, make_model: MakeModel
) -> None:
    model = make_model(kind)
    scheme = {"bits": bits, "strategy": strategy, "symmetric": symmetric, "shift": shifted}
    install_simulation(model, LLAMA, CheckpointConfig(kv_cache=scheme))
    attention = model.model.layers[0].self_attn
    heads, kv_heads, d = (
        model.config.num_attention_heads,
        model.config.num_key_value_heads,
        model.config.head_dim,
    )
    generator = torch.Generator().manual_seed(0)
    size = kv_heads if strategy == "head" else 1
    ranges = {}
    for key in ("k", "v"):
        scale = torch.rand(size, generator=generator) * 0.3 + 0.1
        zero_point = torch.randint(-3, 4, (size,), generator=generator)
        attention.kv_quantizer.set_range(attention, key, scale, zero_point)
        ranges[key] = (
            scale.double().view(-1, 1, 1),
            (0 if symmetric else 1) * zero_point.double().view(-1, 1, 1),
        )
    attention.kv_quantizer.ready = True
    shift = torch.randn(kv_heads, d, generator=generator)
    if shifted:
        attention.k_shift.copy_(shift)

    def dequantize(key: str, x: Tensor) -> Tensor:
        """With the shift in its place again, which no score may depend on."""
        if shifted and key == "k":
            back = shift.double().repeat_interleave(heads // kv_heads, 0)[:, None]
            return dequantized(key, x - shift[:, None]) + back
        return dequantized(key, x)

    def dequantized(key: str, x: Tensor) -> Tensor:
        scale, zero_point = ranges[key]
        q = torch.clamp(torch.round(x.double() / scale) + zero_point, -(2 ** (bits - 1)), 2 ** (bits - 1) - 1)
        return ((q - zero_point) * scale)[:, torch.arange(heads) // (heads // kv_heads)]

    q = torch.randn(2, heads, 6, d, generator=generator)
    k, v = (torch.randn(2, kv_heads, 6, d, generator=generator) for _ in range(2))
    actual = attention.attend(q, k, v, scaling=d**-0.5)
    scores = q.double() @ dequantize("k", k).mT * d**-0.5 + torch.full((6, 6), -math.inf).triu(1)
    expected = (torch.softmax(scores, -1) @ dequantize("v", v)).transpose(1, 2)
    torch.testing.assert_close(actual, expected.float(), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("precision", ["w4a8kv8", "w4a4kv4"])
@pytest.mark.parametrize("strategy", ["tensor", "head"])
@pytest.mark.parametrize("transforms", [list(TRANSFORMS), []], ids=["all", "none"])
def test_cached_decode_equals_prefill(
    precision: str,
    strategy: str,
    transforms: list[str],
    make_model: MakeModel,
    simulate: Simulate,
    windows: Tensor,
) -> None:
    """T5: logits of one token at a time through the cache, and greedy tokens."""
    from fptquant.recipe import Recipe

    fields = Recipe.parse({"precision": precision}).precision.model_dump()
    fields["kv_cache"]["strategy"] = strategy
    model = simulate(make_model("bias"), windows, precision=fields, transforms=transforms)
    prompt = windows[:1, :12]
    prefill = model(prompt, use_cache=False).logits[0]
    cache, decoded = None, []
    for position in range(prompt.shape[1]):
        output = model(prompt[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        decoded.append(output.logits[0, 0])
    assert relative_error(torch.stack(decoded), prefill) < 1e-4

    generated = model.generate(prompt, max_new_tokens=8, do_sample=False, eos_token_id=None, pad_token_id=0)
    again = prompt
    for _ in range(8):
        again = torch.cat((again, model(again, use_cache=False).logits[:, -1:].argmax(-1)), 1)
    assert torch.equal(generated, again)
    with_cache_off = model(again, use_cache=False).logits
    original = make_model("bias")(again).logits
    assert relative_error(with_cache_off, original) > 1e-3, "nothing was quantized"


def test_padded_batches_equal_single_sequences(make_model: MakeModel, simulate: Simulate, windows: Tensor) -> None:
    model = simulate(make_model("bias"), windows)
    short, long = windows[0, :5], windows[1, :9]
    padded = torch.stack((torch.cat((torch.zeros(4, dtype=torch.int64), short)), long))
    mask = torch.tensor([[0] * 4 + [1] * 5, [1] * 9])
    positions = (mask.cumsum(1) - 1).clamp_min(0)
    logits = model(padded, attention_mask=mask, position_ids=positions).logits
    assert relative_error(logits[0, 4:], model(short[None]).logits[0]) < 1e-4
    assert relative_error(logits[1], model(long[None]).logits[0]) < 1e-4


def test_exact_mode_does_not_depend_on_how_tokens_are_batched(
    make_model: MakeModel, simulate: Simulate, windows: Tensor
) -> None:
    """Not one code differs between decode and prefill at 4 bits, where a float32 kernel may flip some."""
    model = simulate(make_model("bias"), windows, precision="w4a4kv4")
    usual = model(windows[:1]).logits
    set_exact(model)
    prompt, codes = windows[:1], []
    down = model.model.layers[1].mlp.down_proj
    down.observer = lambda x: codes.append(down.quantize_input(x)[0])
    prefill = model(prompt, use_cache=False).logits[0]
    cache, decoded = None, []
    for position in range(prompt.shape[1]):
        output = model(prompt[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        decoded.append(output.logits[0, 0])
    assert torch.equal(codes[0], torch.cat(codes[1:], 1))
    assert relative_error(torch.stack(decoded), prefill) < 1e-6
    assert (usual[0] - prefill).pow(2).mean() < 0.01 * prefill.pow(2).mean()
