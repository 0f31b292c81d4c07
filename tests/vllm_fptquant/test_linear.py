"""The linear method on vLLM's real parallel layers: loading, checks, tensor parallelism, arithmetic."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from vllm.utils.torch_utils import set_default_torch_dtype

from fptquant.errors import FPTQuantError
from fptquant.format import (
    ActivationScheme,
    DownHadamard,
    InputHadamard,
    TransformRecord,
    WeightScheme,
    block_hadamard,
    hadamard_factors,
)
from tests.vllm_fptquant.layers import (
    COLUMNS,
    HIDDEN,
    SHARDS,
    build_linear,
    expected,
    load,
    quant_config,
    random_tensors,
)
from vllm_fptquant.models.projections import project

KINDS = list(SHARDS)
HADAMARD = TransformRecord(down_hadamard=DownHadamard(block=32))
GROUPS = WeightScheme(strategy="group", group_size=32)

pytestmark = pytest.mark.usefixtures("parallel_world")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("bits", "symmetric"), [(8, True), (8, False), (4, True), (4, False)])
@pytest.mark.parametrize("weights", [WeightScheme(), WeightScheme(bits=8), GROUPS], ids=lambda scheme: scheme.label)
def test_loaded_layer_equals_contract(kind: str, bits: int, symmetric: bool, weights: WeightScheme) -> None:
    config = quant_config(weights=weights, activations=ActivationScheme(bits=bits, symmetric=symmetric))
    tensors = random_tensors(kind, config)
    layer = load(build_linear(kind, config), tensors)
    x = torch.randn(7, COLUMNS[kind])
    output, bias = layer(x)
    assert bias is None
    assert torch.equal(output, expected(tensors, x, bits))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bit_input_gives_sixteen_bit_output(dtype: torch.dtype) -> None:
    config = quant_config()
    tensors = random_tensors("down", config)
    layer = load(build_linear("down", config, params_dtype=dtype), tensors)
    x = torch.randn(3, COLUMNS["down"]).to(dtype)
    output, _ = layer(x)
    assert torch.equal(output, expected(tensors, x, 8).to(dtype))
    # A float32 input, as residual scaling makes it, keeps the output in float32.
    assert torch.equal(layer(x.float())[0], expected(tensors, x, 8))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("plain", [True, False], ids=["in the kernel's layer", "around it"])
def test_division_by_s_comes_before_rounding(dtype: torch.dtype, plain: bool) -> None:
    """The product alone can be too large for 16 bits."""
    config = quant_config(transforms=TransformRecord(residual_scale=True))
    tensors = random_tensors("down", config)
    layer = load(build_linear("down", config, params_dtype=dtype), tensors)
    layer.fptquant_plain = plain
    x, S = torch.randn(6, COLUMNS["down"]).to(dtype), torch.full((6, 1), 2.0**20)
    x = x / 2**14
    found, _ = project(layer, x, S)
    assert torch.equal(found, (expected(tensors, x * S, 8) / S).to(dtype))


def test_scales_keep_their_precision_in_a_16_bit_model() -> None:
    """VLLM builds and finishes layers with the model's type as torch's default."""
    config = quant_config()
    tensors = random_tensors("down", config)
    with set_default_torch_dtype(torch.bfloat16):
        layer = load(build_linear("down", config, params_dtype=torch.bfloat16), tensors)
    x = torch.randn(3, COLUMNS["down"])
    assert torch.equal(layer(x)[0], expected(tensors, x, 8))


def test_weight_only_layer_has_no_input_scale() -> None:
    config = quant_config(activations=ActivationScheme(bits=16))
    layer = build_linear("gate_up", config)
    assert not hasattr(layer, "input_scale")
    tensors = random_tensors("gate_up", config)
    x = torch.randn(5, HIDDEN)
    output, _ = load(layer, tensors)(x)
    weight = torch.cat([shard["codes"] * shard["weight_scale"] for shard in tensors.values()])
    torch.testing.assert_close(output, x @ weight.T, rtol=1e-5, atol=1e-5)


def test_hadamard_comes_before_the_quantizer() -> None:
    config = quant_config(transforms=HADAMARD)
    tensors = random_tensors("down", config)
    layer = load(build_linear("down", config), tensors)
    x = torch.randn(4, COLUMNS["down"])
    rotated = block_hadamard(x, *hadamard_factors(32))
    assert torch.equal(layer(x)[0], expected(tensors, rotated, 8))
    assert not torch.equal(layer(x)[0], expected(tensors, x, 8))


def test_bias() -> None:
    config = quant_config()
    tensors = random_tensors("o", config)
    layer = build_linear("o", config, bias=True)
    layer.bias.data.copy_(torch.randn(HIDDEN))
    load(layer, tensors)
    x = torch.randn(4, COLUMNS["o"])
    assert torch.equal(layer(x)[0], expected(tensors, x, 8) + layer.bias)
    layer.skip_bias_add = True
    output, bias = layer(x)
    assert bias is layer.bias
    assert torch.equal(output, expected(tensors, x, 8))


def test_checkpoint_tensors_are_freed() -> None:
    config = quant_config(activations=ActivationScheme(bits=4, symmetric=False))
    layer = load(build_linear("qkv", config), random_tensors("qkv", config))
    assert not any(parameter.numel() for parameter in layer.parameters())
    layer.quant_method.process_weights_after_loading(layer)  # vLLM may ask again
    assert layer(torch.randn(1, HIDDEN))[0].shape == (1, 256)


class TestBadCheckpoints:
    """One line that names the tensor, before anything is served."""

    def fails(self, kind: str, tensors: dict[Any, dict[str, Tensor]], match: str, **fields: Any) -> None:
        with pytest.raises(FPTQuantError, match=match):
            load(build_linear(kind, quant_config(**fields)), tensors)

    @pytest.mark.parametrize("kind", ["qkv", "gate_up"])
    def test_unequal_input_scales(self, kind: str) -> None:
        tensors = random_tensors(kind, quant_config())
        last = list(tensors)[-1]
        tensors[last]["input_scale"] = tensors[last]["input_scale"] * (1 + 2**-20)
        self.fails(kind, tensors, f"input_scale must be equal .*{SHARDS[kind][-1][1]} 0.013")

    def test_unequal_zero_points(self) -> None:
        fields = {"activations": ActivationScheme(bits=4, symmetric=False)}
        tensors = random_tensors("qkv", quant_config(**fields))
        tensors["k"]["input_zero_point"] += 1
        self.fails("qkv", tensors, "input_zero_point must be equal .*k_proj -2", **fields)

    @pytest.mark.parametrize("bad", [float("nan"), float("inf"), 0.0, -0.1])
    @pytest.mark.parametrize("name", ["input_scale", "weight_scale"])
    def test_scale_that_is_no_positive_number(self, name: str, bad: float) -> None:
        tensors = random_tensors("qkv", quant_config())
        tensors["k"][name].view(-1)[-1] = bad
        self.fails("qkv", tensors, rf"model.layers.0.self_attn.k_proj.{name} is {bad:g}.*positive and finite")

    @pytest.mark.parametrize("kind", KINDS)
    @pytest.mark.parametrize(
        "name", ["weight_packed", "weight_scale", "weight_shape", "input_scale", "input_zero_point"]
    )
    def test_missing_tensor(self, kind: str, name: str) -> None:
        fields = {"activations": ActivationScheme(bits=8, symmetric=False)}
        tensors = random_tensors(kind, quant_config(**fields))
        del tensors[list(tensors)[-1]][name]
        self.fails(kind, tensors, f"{SHARDS[kind][-1][1]}: the checkpoint has no {name}", **fields)

    def test_shape_of_another_model(self) -> None:
        tensors = random_tensors("down", quant_config())
        tensors[None]["weight_shape"] = torch.tensor([HIDDEN, 100])
        self.fails("down", tensors, "down_proj.weight_shape: 100 input features, but the model has 96")

    @pytest.mark.parametrize("factor", [2, 0.5])
    @pytest.mark.parametrize("kind", ["qkv", "gate_up"])
    def test_more_or_fewer_rows(self, kind: str, factor: float) -> None:
        """vLLM takes the first rows of a larger tensor, and stops without a word at a smaller one."""
        tensors = random_tensors(kind, quant_config())
        shard, name, rows = SHARDS[kind][0]
        given = round(rows * factor)
        for tensor in ("weight_packed", "weight_scale"):
            tensors[shard][tensor] = torch.cat([tensors[shard][tensor]] * 2)[:given]
        tensors[shard]["weight_shape"] = torch.tensor([given, HIDDEN])
        message = f"{name}.weight_shape: {given} output features, but the model has {rows}"
        fits = rf"{name}.weight_packed is torch.int32 of shape \[{given}, 8\], which doesn't fit the model"
        self.fails(kind, tensors, message if factor > 1 else fits)

    def test_columns_that_contradict_the_shape(self) -> None:
        tensors = random_tensors("down", quant_config())
        tensors[None]["weight_packed"] = tensors[None]["weight_packed"].repeat(1, 2)
        self.fails("down", tensors, r"down_proj.weight_packed has shape \[64, 24\], not \[64, 12\]")

    def test_wrong_type(self) -> None:
        """Words of 32 bits lose some in float32."""
        tensors = random_tensors("qkv", quant_config())
        tensors["v"]["weight_packed"] = tensors["v"]["weight_packed"].float()
        self.fails("qkv", tensors, "v_proj.weight_packed is torch.float32 of shape .* expected torch.int32")

    def test_several_input_scales(self) -> None:
        tensors = random_tensors("qkv", quant_config())
        tensors["k"]["input_scale"] = torch.ones(2)
        self.fails("qkv", tensors, r"k_proj.input_scale is torch.float32 of shape \[2\], which doesn't fit")

    @pytest.mark.parametrize("multiplier", [0, 9, -1])
    def test_multiplier_that_widens_codes(self, multiplier: int) -> None:
        tensors = random_tensors("gate_up", quant_config(weights=GROUPS))
        tensors[1]["weight_multiplier"][-1, 0] = multiplier
        message = r"up_proj.weight_multiplier is missing or outside of \[1, 8\]"
        self.fails("gate_up", tensors, message, weights=GROUPS)

    def test_multipliers_are_missing(self) -> None:
        tensors = random_tensors("qkv", quant_config(weights=GROUPS))
        del tensors["v"]["weight_multiplier"]
        self.fails("qkv", tensors, "v_proj: the checkpoint has no weight_multiplier", weights=GROUPS)

    def test_groups_of_another_size(self) -> None:
        tensors = random_tensors("qkv", quant_config(weights=GROUPS))
        other = WeightScheme(strategy="group", group_size=64)
        self.fails("qkv", tensors, r"q_proj.weight_multiplier is torch.int8 of shape \[128, 2\]", weights=other)
        with pytest.raises(FPTQuantError, match="groups of 64 weights don't divide 96 input features"):
            build_linear("down", quant_config(weights=other))

    @pytest.mark.parametrize("zero_point", [-9, 8])
    def test_zero_point_that_is_no_code(self, zero_point: int) -> None:
        fields = {"activations": ActivationScheme(bits=4, symmetric=False)}
        tensors = random_tensors("down", quant_config(**fields))
        tensors[None]["input_zero_point"].fill_(zero_point)
        self.fails("down", tensors, r"down_proj.input_zero_point is missing or outside of \[-8, 7\]", **fields)


class TestTensorParallel:
    """Ranks of a faked world compute their slice; summed or concatenated they give the whole layer."""

    @pytest.mark.parametrize("kind", ["qkv", "gate_up"])
    @pytest.mark.parametrize("size", [2, 4])
    @pytest.mark.parametrize("weights", [WeightScheme(), GROUPS], ids=lambda scheme: scheme.label)
    def test_columns(
        self, kind: str, size: int, weights: WeightScheme, parallel_world: Callable[[int, int], None]
    ) -> None:
        config = quant_config(weights=weights)
        tensors = random_tensors(kind, config)
        x = torch.randn(5, HIDDEN)
        whole = expected(tensors, x, 8).split([rows for _, _, rows in SHARDS[kind]], -1)
        for rank in range(size):
            parallel_world(rank, size)
            layer = load(build_linear(kind, config), tensors)
            parts = layer(x)[0].split(layer.output_partition_sizes, -1)
            for (shard, _, _), part, full in zip(SHARDS[kind], parts, whole, strict=True):
                # KV heads are shared by ranks once there are more ranks than heads.
                copies = max(1, size // 2) if kind == "qkv" and shard != "q" else 1
                slices = full.chunk(size // copies, -1)
                assert torch.equal(part, slices[rank // copies])

    @pytest.mark.parametrize(("kind", "size"), [("o", 2), ("o", 4), ("down", 2), ("down", 3)])
    @pytest.mark.parametrize("activations", [ActivationScheme(), ActivationScheme(bits=4, symmetric=False)], ids=str)
    @pytest.mark.parametrize("weights", [WeightScheme(), GROUPS], ids=lambda scheme: scheme.label)
    def test_rows_sum_to_the_whole(
        self,
        weights: WeightScheme,
        activations: ActivationScheme,
        kind: str,
        size: int,
        parallel_world: Callable[[int, int], None],
    ) -> None:
        """A zero point costs no correction between ranks, and the bias is added by one of them."""
        transforms = TransformRecord(down_hadamard=DownHadamard(block=16))
        config = quant_config(weights=weights, activations=activations, transforms=transforms)
        if weights == GROUPS and (kind, size) == ("down", 2):
            parallel_world(0, size)
            with pytest.raises(
                FPTQuantError, match="down_proj: tensor-parallel size 2 .*48 .*groups of 32.*divides 3$"
            ):
                build_linear(kind, config)
            return
        tensors = random_tensors(kind, config)
        x, bias = torch.randn(5, COLUMNS[kind]), torch.randn(HIDDEN)
        whole = load(build_linear(kind, config), tensors)(x)[0] + bias
        total = torch.zeros_like(whole)
        for rank in range(size):
            parallel_world(rank, size)
            layer = build_linear(kind, config, bias=True)
            layer.reduce_results = False  # the sum below stands for it
            layer.bias.data.copy_(bias)
            total += load(layer, tensors)(x.chunk(size, -1)[rank])[0]
        torch.testing.assert_close(total, whole, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["qkv", "gate_up"])
    def test_columns_with_bias(self, kind: str, parallel_world: Callable[[int, int], None]) -> None:
        config = quant_config()
        tensors = random_tensors(kind, config)
        biases = {shard: torch.randn(rows) for shard, _, rows in SHARDS[kind]}
        x = torch.randn(5, HIDDEN)
        whole = expected(tensors, x, 8).split([rows for _, _, rows in SHARDS[kind]], -1)
        for rank in range(2):
            parallel_world(rank, 2)
            layer = build_linear(kind, config, bias=True)
            for shard, bias in biases.items():
                layer.bias.weight_loader(layer.bias, bias, shard)
            parts = load(layer, tensors)(x)[0].split(layer.output_partition_sizes, -1)
            for bias, part, full in zip(biases.values(), parts, whole, strict=True):
                assert torch.equal(part, (full + bias).chunk(2, -1)[rank])

    @pytest.mark.parametrize("kind", ["qkv", "gate_up"])
    def test_columns_behind_a_hadamard(self, kind: str, parallel_world: Callable[[int, int], None]) -> None:
        """Every rank has the whole input, so that any block will do."""
        config = quant_config(transforms=TransformRecord(input_hadamard=InputHadamard(qkv=HIDDEN, gate_up=HIDDEN)))
        tensors, x = random_tensors(kind, config), torch.randn(5, HIDDEN)
        rotated = block_hadamard(x, *hadamard_factors(HIDDEN))
        whole = expected(tensors, rotated, 8).split([rows for _, _, rows in SHARDS[kind]], -1)
        for rank in range(2):
            parallel_world(rank, 2)
            layer = load(build_linear(kind, config), tensors)
            parts = layer(x)[0].split(layer.output_partition_sizes, -1)
            assert all(torch.equal(part, full.chunk(2, -1)[rank]) for part, full in zip(parts, whole, strict=True))

    def test_split_hadamard_block_is_refused(self, parallel_world: Callable[[int, int], None]) -> None:
        parallel_world(0, 2)
        config = quant_config(transforms=HADAMARD)
        build_linear("o", config)
        with pytest.raises(
            FPTQuantError, match="down_proj: tensor-parallel size 2 .*48 .*blocks of 32.*divides 3.*: 2}"
        ):
            build_linear("down", config)
        config = quant_config(transforms=TransformRecord(input_hadamard=InputHadamard(o=128)))
        with pytest.raises(FPTQuantError, match="o_proj: tensor-parallel size 2 .*64 .*blocks of 128.*divides 1"):
            build_linear("o", config)
        config = quant_config(transforms=HADAMARD)
        parallel_world(0, 3)
        assert build_linear("down", config).input_size_per_partition == 32

    def test_split_word_is_refused(self, parallel_world: Callable[[int, int], None]) -> None:
        parallel_world(0, 8)  # 12 input features: one and a half words of 4-bit weights
        with pytest.raises(FPTQuantError, match="tensor-parallel size 8 leaves 12 .*8 weights in a packed word"):
            build_linear("down", quant_config())
        build_linear("down", quant_config(weights=WeightScheme(bits=8)))  # three words of four
        parallel_world(0, 32)
        with pytest.raises(FPTQuantError, match="o_proj: tensor-parallel size 32 leaves 4 .*8 weights in a packed"):
            build_linear("o", quant_config())
