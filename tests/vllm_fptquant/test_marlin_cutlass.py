"""Marlin or CUTLASS by the number of tokens: the same integers, one buffer, one operator. Emulated on the CPU."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import widening
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from fptquant.errors import FPTQuantError
from fptquant.format import ActivationScheme, LinearScheme, TransformRecord, WeightScheme
from tests.vllm_fptquant import gpu_emulation
from tests.vllm_fptquant.layers import COLUMNS, HIDDEN, build_linear, load, quant_config
from tests.vllm_fptquant.test_gpu_kernels import exact_tensors, weights_of
from vllm_fptquant import doctor
from vllm_fptquant.doctor import steps_apart
from vllm_fptquant.kernels import marlin_cutlass
from vllm_fptquant.kernels.base import LinearSpec
from vllm_fptquant.kernels.marlin import MarlinKernel
from vllm_fptquant.kernels.marlin_cutlass import WIDEN_FROM, MarlinCutlassKernel, widen, widening_threshold
from vllm_fptquant.kernels.select import select_kernel
from vllm_fptquant.models.projections import project
from vllm_fptquant.options import ServingOptions

W4A8 = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=8))
WRONG = (1, 3, 2, 0, 4)  # words and threads exchanged


@pytest.fixture(autouse=True)
def own_buffers(operators: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """As if no layer had been loaded before."""
    monkeypatch.setattr(marlin_cutlass, "_largest", {})
    monkeypatch.setattr(marlin_cutlass, "_buffers", {})


@pytest.fixture
def widened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Tensor]]:
    """The buffer, each time that weights are widened."""
    seen: list[Tensor] = []

    def watch(packed: Tensor, wide: Tensor) -> None:
        seen.append(wide)
        widen(packed, wide)

    monkeypatch.setattr(marlin_cutlass, "widen", watch)
    yield seen


def kernel_of(n: int, k: int, bits: int = 8, dtype: torch.dtype = torch.bfloat16) -> MarlinCutlassKernel:
    return MarlinCutlassKernel(weights_of(bits, torch.randint(-8, 8, (n, k))), dtype)


def undone(packed: Tensor, n: int, k: int) -> Tensor:
    wide = torch.full((n, k), 77, dtype=torch.int8)
    widen(packed, wide)
    return wide


@pytest.mark.parametrize(("n", "k"), [(64, 128), (192, 64), (960, 576), (80, 48), (16, 16)])
def test_widening_undoes_the_repacking(n: int, k: int) -> None:
    """Of vLLM's own model of it; what was padded is 0."""
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    built = MarlinCutlassKernel(weights_of(8, codes), torch.float16)
    wide = undone(built.weight, built.padded_n, built.padded_k)
    assert torch.equal(wide[:n, :k], codes)
    assert not wide[n:].any() and not wide[:, k:].any()


def test_every_code_is_widened() -> None:
    for code in range(-8, 8):
        built = MarlinCutlassKernel(weights_of(8, torch.full((64, 128), code)), torch.float16)
        assert (undone(built.weight, 64, 128) == code).all()


def test_another_layout_is_not_undone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither with other axes, nor where the weights were repacked for 16-bit inputs."""
    codes = torch.randint(-8, 8, (64, 128), dtype=torch.int8)
    sixteen = MarlinKernel(weights_of(16, codes), torch.float16)
    assert not torch.equal(undone(sixteen.weight, 64, 128), codes)
    built = MarlinCutlassKernel(weights_of(8, codes), torch.float16)
    monkeypatch.setattr(marlin_cutlass, "ROWS_FIRST", WRONG)
    assert not torch.equal(undone(built.weight, 64, 128), codes)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize(("blocks", "warps"), [(1, 1), (4, 2)])
def test_both_ways_are_the_same_integers(
    blocks: int, warps: int, bits: int, dtype: torch.dtype, widened: list[Tensor]
) -> None:
    """Outputs are equal or neighbours; Marlin's parts of a sum that cancel leave less than 1/64 of an integer step."""
    gpu_emulation.split.update(blocks=blocks, warps=warps)
    torch.manual_seed(0)
    built = kernel_of(208, 272, bits, dtype)
    limit = 2 ** (bits - 1)
    codes = torch.randint(-limit, limit, (9, 272), dtype=torch.int8)
    row_scale = torch.rand(9) * 0.1 + 1e-3
    outputs = []
    for widen_from in (10, 9):
        built.widen_from = widen_from
        outputs.append(built(codes, row_scale))
    marlin, cutlass = gpu_emulation.accumulators
    assert len(widened) == 1 and torch.equal(marlin[:, :208], cutlass)
    assert all(output.shape == (9, 208) and output.dtype == dtype for output in outputs)
    step = row_scale[:, None] * built.channel_scale
    near = (outputs[0].float() - outputs[1].float()).abs() <= step / 64
    assert (near | (steps_apart(*outputs) <= 1)).all()
    # With scales that are powers of two nothing is rounded but the sum, once.
    built.channel_scale.fill_(0.25)
    built.weight_scale.fill_(0.25)
    gpu_emulation.split.update(blocks=1, warps=1)
    row_scale = torch.exp2(torch.randint(-9, 3, (9,)).float())
    same = []
    for widen_from in (10, 9):
        built.widen_from = widen_from
        same.append(built(codes, row_scale))
    assert torch.equal(*same)


def test_wrong_widening_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    built = kernel_of(64, 128)
    built.widen_from = 1
    codes = torch.randint(-128, 128, (3, 128), dtype=torch.int8)
    right = built(codes, torch.ones(3))
    monkeypatch.setattr(marlin_cutlass, "ROWS_FIRST", WRONG)
    wrong = built(codes, torch.ones(3))
    assert not torch.equal(*gpu_emulation.accumulators) and (steps_apart(right, wrong) > 1).any()


def test_doctor_finds_wrong_widening(pretend_gpu: Callable[[int], None], monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it serves, as on a Hopper that was measured, and is found there."""
    monkeypatch.setitem(WIDEN_FROM, 90, 4096)
    ((_, platform), *_) = gpu_emulation.pretended_platform(90)
    pretend_gpu(90)
    monkeypatch.setattr(doctor, "current_platform", platform)
    monkeypatch.setattr(doctor, "torch_device", lambda: "cpu")
    monkeypatch.setattr(doctor, "SCHEMES", {"w4a8": W4A8})

    def failed() -> set[str]:
        results = [r for r in doctor.check_kernels() if r.layer.startswith("w4a8")]
        assert {r.kernel for r in results if r.chosen} == {"marlin-cutlass-int8"}
        return {r.kernel for r in results if r.status == "fail"}

    assert not failed()
    monkeypatch.setattr(marlin_cutlass, "ROWS_FIRST", WRONG)
    assert failed() == {"marlin-cutlass-int8"}


def test_layers_share_a_buffer(widened: list[Tensor]) -> None:
    """As large as the largest, made once, and never taken from graphs that have its address."""
    small, large = kernel_of(64, 128), kernel_of(192, 256)
    for built in (small, large, small):
        built.widen_from = 1
        codes = torch.randint(-128, 128, (2, built.weight.shape[0] * 16), dtype=torch.int8)
        with torch.inference_mode(mode=built is small):
            built(codes, torch.ones(2))
    first = widened[0].data_ptr()
    assert {wide.data_ptr() for wide in widened} == {first}
    assert [len(buffer) for buffer in marlin_cutlass._buffers[torch.device("cpu")]] == [192 * 256]
    kernel_of(256, 256)  # a further model
    small(torch.zeros(2, 128, dtype=torch.int8), torch.ones(2))
    assert widened[-1].data_ptr() != first
    assert marlin_cutlass._buffers[torch.device("cpu")][0].data_ptr() == first


def test_weights_stay_in_four_bits() -> None:
    """Nothing is widened before there are enough tokens, nor kept by the layer after."""
    built = kernel_of(256, 512)
    built.widen_from = 3
    for tokens in (2, 3):
        built(torch.zeros(tokens, 512, dtype=torch.int8), torch.ones(tokens))
        assert sum(buffer.nbytes for buffer in built.buffers()) == 256 * 512 // 2 + 256 * (2 + 4)
        assert bool(marlin_cutlass._buffers) == (tokens == 3)


class Results(TorchDispatchMode):
    """Operators that run, and the storages of what they return."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.fresh: list[int] = []
        self.known: set[int] = set()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if not isinstance(result, Tensor):
            return result  # a fake tensor's device
        self.names.append(func.overloadpacket.__name__)
        if result.untyped_storage()._cdata not in self.known:
            self.known.add(result.untyped_storage()._cdata)
            self.fresh.append(result.numel())
        return result


def test_widening_is_four_launches_and_no_copy() -> None:
    """On a CUDA device: no tensor of the host among its operands, and no memory but two shifts."""
    with FakeTensorMode():
        packed = torch.empty(256 // 16, 192 * 2, dtype=torch.int32, device="cuda")
        wide = torch.empty(192, 256, dtype=torch.int8, device="cuda")
        with Results() as ran:
            ran.known |= {tensor.untyped_storage()._cdata for tensor in (packed, wide)}
            widen(packed, wide)
    views = {"view", "permute", "unsqueeze", "detach"}
    assert [name for name in ran.names if name not in views] == [
        "arange",
        "bitwise_right_shift",
        "bitwise_and_",
        "sub_",
    ]
    assert ran.fresh == [2]


@pytest.mark.usefixtures("cuda_guard")
@pytest.mark.parametrize("tokens", [2, 5])
def test_what_runs_on_a_gpu_stays_there(tokens: int) -> None:
    """The operator's own code, of which a trace sees nothing, on fake CUDA tensors."""
    with FakeTensorMode():
        made = torch.empty
        device = made(1, device="cuda").device
        marlin_cutlass.reserve(device, 128 * 128)
        output = marlin_cutlass._multiply(
            made(tokens, 80, dtype=torch.int8, device=device),
            made(tokens, device=device),
            made(8, 256, dtype=torch.int32, device=device),
            made(1, 128, dtype=torch.float16, device=device),
            made(112, device=device),
            5,
        )
        assert output.shape == (tokens, 112) and output.dtype == torch.float16 and output.device == device
        assert output.is_contiguous()


def spec(capability: int, widen_from: int | None, n: int = 4096, scheme: LinearScheme = W4A8) -> LinearSpec:
    return LinearSpec(scheme, 4096, n, torch.float16, "cuda", capability, widen_from=widen_from)


def test_where_it_serves() -> None:
    assert select_kernel(spec(90, 4096), None, "x")[0] is MarlinCutlassKernel
    assert select_kernel(spec(80, 1), None, "x")[0] is MarlinCutlassKernel
    kernel, reason = select_kernel(spec(80, None), None, "x")
    assert kernel.name == "marlin-int8" and "none for compute capability 8.0" in reason
    with pytest.raises(FPTQuantError, match="'marlin-cutlass-int8' cannot compute x.*gives as widen_from"):
        select_kernel(spec(80, None), "marlin-cutlass-int8", "x")
    kernel, reason = select_kernel(spec(120, 1), None, "x")
    assert kernel.name == "marlin-int8" and "7.5 to 9.0, not 12.0" in reason
    assert select_kernel(spec(90, 1, n=4100), None, "x")[0].name == "marlin-int8"
    asymmetric = LinearScheme(weights=WeightScheme(), activations=ActivationScheme(bits=8, symmetric=False))
    assert select_kernel(spec(90, 1, scheme=asymmetric), None, "x")[0].name == "cutlass-int8"
    assert select_kernel(spec(90, 1), "marlin-int8", "x")[0].name == "marlin-int8"


def test_thresholds(monkeypatch: pytest.MonkeyPatch) -> None:
    """What the user asks for, else what was measured; nothing was yet."""
    assert not any(widening_threshold(None, capability) for capability in (None, 75, 80, 86, 89, 90, 100, 120))
    assert widening_threshold(512, 90) == widening_threshold(512, 80) == 512
    monkeypatch.setitem(WIDEN_FROM, 90, 4096)
    assert widening_threshold(None, 90) == 4096 and widening_threshold(None, 80) is None
    assert widening_threshold("never", 90) is None and widening_threshold(512, None) is None


@pytest.mark.parametrize("value", [512, "never", None])
def test_option(value: int | str | None) -> None:
    config = SimpleNamespace(additional_config={"fptquant": {"widen_from": value}})
    assert ServingOptions.of(config).widen_from == value


@pytest.mark.parametrize("value", [0, -1, 2.5, True, "512", "always"])
def test_options_that_are_refused(value: object) -> None:
    with pytest.raises(FPTQuantError, match="additional-config, key 'fptquant': widen_from.*known: kernel") as error:
        ServingOptions.of(SimpleNamespace(additional_config={"fptquant": {"widen_from": value}}))
    assert "\n" not in str(error.value)


def test_cpus_refuse_the_option(parallel_world: Any, serving: Callable[..., None]) -> None:
    serving(additional_config={"fptquant": {"widen_from": 64}})
    with pytest.raises(FPTQuantError, match="widen_from is for GPUs only"):
        build_linear("down", quant_config())


@pytest.mark.usefixtures("parallel_world")
@pytest.mark.parametrize("asked", [None, 4, "never"])
def test_layer(
    asked: int | str | None,
    pretend_gpu: Callable[[int], None],
    serving: Callable[..., None],
    widened: list[Tensor],
) -> None:
    """A checkpoint's layer on Hopper, with bias and S: one step of six tokens, and six of one."""
    pretend_gpu(90)
    serving(additional_config={"fptquant": {"widen_from": asked}})
    config = quant_config(
        activations=ActivationScheme(bits=4, symmetric=False), transforms=TransformRecord(residual_scale=True)
    )
    layer = build_linear("down", config, params_dtype=torch.bfloat16, bias=True)
    layer.bias.data.copy_(torch.randn(HIDDEN))
    load(layer, exact_tensors("down", config))
    name = "marlin-cutlass-int8" if asked == 4 else "marlin-int8"
    assert layer.quant_method.kernel_class.name == name and layer.fptquant_gpu.kernel.name == name
    assert layer.fptquant_gpu.kernel.widen_from == (4 if asked == 4 else None)
    x, S = torch.randn(6, COLUMNS["down"]).bfloat16(), torch.rand(6, 1) + 0.5
    together = project(layer, x, S)[0]
    assert len(widened) == (asked == 4)
    apart = torch.cat([project(layer, x[[row]], S[[row]])[0] for row in range(6)])
    assert len(widened) == (asked == 4)
    assert torch.equal(together, apart) if asked != 4 else (steps_apart(together, apart) <= 1).float().mean() > 0.99
    sums, *single = gpu_emulation.accumulators
    assert torch.equal(sums[:, :HIDDEN], torch.cat(single)[:, :HIDDEN])


def test_sweep() -> None:
    """The benchmark's measurement, on emulated operators: both ways are timed at every number of tokens."""
    rows = widening.sweep([1, 3], [(64, 128), (128, 64)], torch.device("cpu"), torch.bfloat16, seconds=1e-4)
    assert [row.tokens for row in rows] == [1, 3] and all(min(row.marlin, row.widened, row.alone) > 0 for row in rows)


def test_break_even() -> None:
    """The first number of tokens from which on widening is faster at every larger one."""
    times = [(1, 1, 2), (2, 3, 2), (4, 5, 6), (8, 9, 7), (16, 20, 9)]
    rows = [widening.Row(tokens, marlin, widened, 1) for tokens, marlin, widened in times]
    assert widening.break_even(rows) == 8
    assert widening.break_even(rows[:3]) is None
