"""Simulator, student and plugin run one list of steps, and compute the same."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig, LinearScheme, block_hadamard, hadamard_factors, steps
from fptquant.format.steps import Bias, Hadamard, Offset, RowScale, Shift, Step, Undo, linear_steps
from fptquant.simulate import SimulatedLinear
from fptquant.train.fake_quant import StaticQuantizer
from fptquant.train.student import GroupInput, TrainedLinear
from fptquant.train.student_weights import IntegerWeight
from tests.steps import Branch, Mystery
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
from vllm_fptquant.kernels.base import CpuKernel, LinearWeights
from vllm_fptquant.kernels.cutlass_int8 import CutlassInt8Kernel
from vllm_fptquant.kernels.fbgemm import FbgemmKernel
from vllm_fptquant.kernels.gpu import GpuLinear, ScaledInput
from vllm_fptquant.kernels.operator import CHUNK, PreparedLinear
from vllm_fptquant.kernels.reference import ReferenceKernel
from vllm_fptquant.linear import FPTQuantLinearMethod
from vllm_fptquant.models.projections import scaled_projection

K, N = 64, 48
SCALE: tuple[Step, ...] = (RowScale(), Undo())
SHIFT: tuple[Step, ...] = (Shift(), Offset())
ACTIVATIONS: list[dict[str, Any]] = [{"bits": 16}, {"bits": 8}, {"bits": 4, "symmetric": False}]
# Whatever a list may be made of, from the outside in.
ONLINE = [
    tuple(itertools.chain(*chosen))
    for chosen in itertools.product([(), SCALE], [(), (Hadamard(16),)], [(), (Branch(),)], [(), SHIFT])
]


def scheme_of(**activations: Any) -> LinearScheme:
    scheme = CheckpointConfig.model_validate({"activations": activations}).scheme_for("x")
    assert scheme is not None
    return scheme


def simulated(scheme: LinearScheme, online: tuple[Step, ...], bias: bool = False) -> SimulatedLinear:
    """A quantized layer with random tensors."""
    torch.manual_seed(0)
    linear = SimulatedLinear.from_linear(nn.Linear(K, N, bias), linear_steps(scheme, online))
    if scheme.activations.bits < 16:
        linear.set_input_quantizer(torch.tensor(0.05), torch.tensor(-3))
    linear.set_weight_codes(torch.randint(-8, 8, (N, K)), torch.rand(N, 1) * 0.01 + 1e-3)
    for step in linear.arrangement.online:
        for tensor in step.tensors(K, N):
            linear.get_buffer(tensor.name).copy_(torch.randn(tensor.shape) * 0.1)
    return linear.requires_grad_(False)


def weights_of(linear: SimulatedLinear) -> LinearWeights:
    """What a kernel would get of it."""
    assert linear.scheme is not None and linear.codes is not None
    quantized = linear.scheme.activations.bits < 16
    return LinearWeights(
        scheme=linear.scheme,
        codes=linear.codes.to(torch.int8),
        weight_scale=linear.weight_scale.flatten(),
        input_scale=linear.input_scale if quantized else None,
        input_zero_point=linear.input_zero_point if quantized and not linear.scheme.activations.symmetric else None,
        online=({t.name: linear.get_buffer(t.name) for s in linear.arrangement.online for t in s.tensors(K, N)},),
    )


@pytest.mark.parametrize("rows", [7, CHUNK + 3])
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("activations", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("online", ONLINE, ids=lambda online: " ".join(type(step).__name__ for step in online))
def test_every_list_is_computed_alike(
    online: tuple[Step, ...], activations: dict[str, Any], bias: bool, rows: int
) -> None:
    scheme = scheme_of(**activations)
    linear = simulated(scheme, online, bias)
    x, S = torch.randn(rows, K), torch.rand(rows, 1) + 0.5 if RowScale() in online else None
    simulation = linear(x, S)

    kernel: type[CpuKernel] = ReferenceKernel if scheme.activations.bits == 16 else FbgemmKernel
    weights = weights_of(linear)
    prepared = PreparedLinear(kernel(weights), weights, linear.arrangement)
    if scheme.activations.bits < 16 or rows <= CHUNK:
        assert torch.equal(prepared(x, linear.bias, S), simulation)
    else:  # sums in floating point, whose order is that of more or fewer rows
        torch.testing.assert_close(prepared(x, linear.bias, S), simulation, rtol=1e-5, atol=1e-6)

    quantizer = None
    if scheme.activations.bits < 16:
        zero_point = None if scheme.activations.symmetric else linear.input_zero_point
        quantizer = StaticQuantizer(linear.input_scale, zero_point, scheme.activations.bits)
    student = TrainedLinear(linear, IntegerWeight(linear), GroupInput(1, quantizer))
    x.requires_grad_()
    trained = student(x, S)
    torch.testing.assert_close(trained, simulation, rtol=1e-4, atol=1e-5)
    (gradient,) = torch.autograd.grad(trained.square().sum(), x)
    assert bool(gradient.isfinite().all()) and bool(gradient.any())


@pytest.mark.parametrize("online", ONLINE, ids=lambda online: " ".join(type(step).__name__ for step in online))
def test_the_list_around_a_float_layer(online: tuple[Step, ...]) -> None:
    """What the student of transforms is built on: the same steps and tensors, nothing quantized, nothing shifted."""
    linear, other = simulated(scheme_of(bits=8), online), nn.Linear(K, N)
    around = linear.around(other)
    assert around.scheme is None
    x, S = torch.randn(7, K), torch.rand(7, 1) + 0.5 if RowScale() in online else None
    states = x if S is None else x * S
    if Hadamard(16) in online:
        states = block_hadamard(states, *hadamard_factors(16))
    y = states @ other.weight.T
    if Branch() in online:
        y = y + states @ linear.get_buffer("branch_in").T @ linear.get_buffer("branch_out").T
    torch.testing.assert_close(around(x, S), (y if S is None else y / S) + other.bias, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("operators")
@pytest.mark.parametrize("activations", [{"bits": 8}, {"bits": 8, "symmetric": False}], ids=str)
@pytest.mark.parametrize("online", ONLINE, ids=lambda online: " ".join(map(str, online)))
def test_gpus_by_the_rule_of_rows(online: tuple[Step, ...], activations: dict[str, Any]) -> None:
    """S behind the input steps and before output steps, within rounding to 16 bits."""
    linear = simulated(scheme_of(**activations), online)
    weights = weights_of(linear)
    layer = GpuLinear(CutlassInt8Kernel(weights, torch.bfloat16), weights, linear.arrangement)
    x, S = torch.randn(7, K).bfloat16(), torch.rand(7, 1) + 0.5
    given = ScaledInput(x, S) if RowScale() in online else x
    expected = linear(x.float(), S if RowScale() in online else None)
    torch.testing.assert_close(layer(given, None).float(), expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))
    if RowScale() not in online:  # S of a norm before the layer stays in
        expected = linear(x.float() * S)
        found = layer(ScaledInput(x, S), None).float()
        torch.testing.assert_close(found, expected, rtol=1e-2, atol=1e-2 * float(expected.abs().max()))


def test_each_executor_refuses_what_it_does_not_know() -> None:
    scheme = scheme_of(bits=8)
    listed = (*linear_steps(scheme)[:-1], Mystery(), Bias())
    with pytest.raises(FPTQuantError, match=r"can't compute the step Mystery\(\) where it stands: upgrade"):
        SimulatedLinear(K, N, False, listed)  # of simulator and student
    with pytest.raises(FPTQuantError, match=r"^a / b: can't compute the step Mystery\(\)"):
        FPTQuantLinearMethod(listed, ("a", "b"))


@pytest.fixture
def with_row(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Adds a row to the table of online steps, as a new field of the format would."""

    def add(*online: Step) -> None:
        monkeypatch.setattr(steps, "_ONLINE", (*steps._ONLINE, (".*_proj", lambda record: online)))

    return add


def tensors_of(kind: str, config: Any) -> dict[Any, dict[str, Tensor]]:
    """As `random_tensors`, with those of a shift (equal in all shards), what is added behind it, and of a branch."""
    tensors = random_tensors(kind, config)
    shift = torch.randn(COLUMNS[kind]) * 0.1
    for shard, _, rows in SHARDS[kind]:
        tensors[shard]["input_shift"] = shift
        tensors[shard]["output_offset"] = torch.randn(rows) * 0.1
        tensors[shard]["branch_in"] = torch.randn(3, COLUMNS[kind]) * 0.1
        tensors[shard]["branch_out"] = torch.randn(rows, 3) * 0.1
    return tensors


def whole(tensors: dict[Any, dict[str, Tensor]], x: Tensor) -> Tensor:
    """What the layer computes, by the definition of its steps."""
    (x,) = {id(shard["input_shift"]): x - shard["input_shift"] for shard in tensors.values()}.values()
    branches = [x @ shard["branch_in"].T @ shard["branch_out"].T for shard in tensors.values()]
    offset = torch.cat([shard["output_offset"] for shard in tensors.values()])
    return expected(tensors, x, 8) + offset + torch.cat(branches, -1)


@pytest.mark.usefixtures("parallel_world")
class TestLoading:
    """vLLM's layers load the tensors of steps that only the table names, and share them out."""

    @pytest.fixture(autouse=True)
    def _rows(self, with_row: Callable[..., None]) -> None:
        with_row(Branch(), *SHIFT)

    @pytest.mark.parametrize("kind", list(SHARDS))
    def test_whole_layer(self, kind: str) -> None:
        config = quant_config()
        tensors = tensors_of(kind, config)
        layer = load(build_linear(kind, config), tensors)
        x = torch.randn(2, 3, COLUMNS[kind])
        torch.testing.assert_close(layer(x)[0], whole(tensors, x), rtol=1e-5, atol=1e-5)
        assert not any(parameter.numel() for parameter in layer.parameters())

    @pytest.mark.parametrize("kind", ["o", "down"])
    def test_ranks_with_parts_of_the_input(self, kind: str, parallel_world: Callable[[int, int], None]) -> None:
        config = quant_config()
        tensors, x = tensors_of(kind, config), torch.randn(5, COLUMNS[kind])
        total = torch.zeros(5, HIDDEN)
        for rank in range(2):
            parallel_world(rank, 2)
            layer = build_linear(kind, config)
            layer.reduce_results = False  # the sum below stands for it
            total += load(layer, tensors)(x.chunk(2, -1)[rank])[0]
        torch.testing.assert_close(total, whole(tensors, x), rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("kind", ["qkv", "gate_up"])
    def test_ranks_with_parts_of_the_output(self, kind: str, parallel_world: Callable[[int, int], None]) -> None:
        config = quant_config()
        tensors, x = tensors_of(kind, config), torch.randn(5, COLUMNS[kind])
        shards = whole(tensors, x).split([rows for _, _, rows in SHARDS[kind]], -1)
        for rank in range(2):
            parallel_world(rank, 2)
            layer = load(build_linear(kind, config), tensors)
            found = layer(x)[0].split(layer.output_partition_sizes, -1)
            for part, shard in zip(found, shards, strict=True):
                torch.testing.assert_close(part, shard.chunk(2, -1)[rank], rtol=1e-5, atol=1e-5)

    def test_an_input_step_is_shared_by_fused_layers(self) -> None:
        tensors = tensors_of("qkv", quant_config())
        tensors["k"]["input_shift"] = tensors["k"]["input_shift"] + 1
        with pytest.raises(FPTQuantError, match="input_shift must be equal in layers that share an input"):
            load(build_linear("qkv", quant_config()), tensors)

    @pytest.mark.parametrize("kind", list(SHARDS))
    @pytest.mark.parametrize("name", ["branch_in", "branch_out", "input_shift"])
    def test_a_missing_or_unfit_tensor(self, kind: str, name: str) -> None:
        tensors = tensors_of(kind, quant_config())
        last = list(tensors)[-1]
        tensor = tensors[last].pop(name)
        with pytest.raises(FPTQuantError, match=f"{SHARDS[kind][-1][1]}: the checkpoint has no {name}"):
            load(build_linear(kind, quant_config()), tensors)
        tensors[last][name] = torch.cat((tensor, tensor))
        with pytest.raises(FPTQuantError, match=f"{SHARDS[kind][-1][1]}.{name} .*: quantize the model again"):
            load(build_linear(kind, quant_config()), tensors)


@pytest.mark.usefixtures("parallel_world")
@pytest.mark.parametrize("plain", [True, False], ids=["in the kernel's layer", "around it"])
def test_scaled_projection_with_shift_and_branch(plain: bool, with_row: Callable[..., None]) -> None:
    with_row(Branch(), *SHIFT)
    config = quant_config(transforms={"residual_scale": True})
    tensors = tensors_of("down", config)
    layer = load(build_linear("down", config), tensors)
    layer.fptquant_plain = plain
    x, S = torch.randn(5, COLUMNS["down"]), torch.rand(5, 1) + 0.5
    torch.testing.assert_close(scaled_projection(layer, x, S), whole(tensors, x * S) / S, rtol=1e-5, atol=1e-5)


@pytest.mark.usefixtures("parallel_world")
def test_fused_layers_share_their_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    row = (r".*\.k_proj", lambda record: (Hadamard(8),))
    monkeypatch.setattr(steps, "_ONLINE", (*steps._ONLINE, row))
    with pytest.raises(FPTQuantError, match=r"q_proj: w4a8, .*k_proj: w4a8 with Hadamard\(block=8\), .*v_proj: w4a8\)"):
        build_linear("qkv", quant_config())
