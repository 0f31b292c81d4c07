"""Ranges, scales, rounding and calibration on fake CUDA tensors: everything they make is where their input is."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Literal

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from transformers import LlamaForCausalLM

from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.moments import second_moment
from fptquant.format import hadamard_factors
from fptquant.quantize import (
    InputRangeOptions,
    RangeOptions,
    WeightRangeOptions,
    affine,
    channel_scale,
    group_scales,
    log_clip_of,
    search_input_range,
    search_range,
    weight_scales,
)
from fptquant.quantize.ranges import _EXTREMES, _SAMPLE
from fptquant.quantize.rounding import ROUNDERS, RoundingOptions
from fptquant.quantize.weights import round_to_nearest
from fptquant.recipe import Recipe
from fptquant.wiring.llama import LLAMA

pytestmark = pytest.mark.usefixtures("cuda_guard")

ROWS, COLUMNS = 6, 40
METHODS: tuple[Literal["minmax", "percentile", "lp"], ...] = ("minmax", "percentile", "lp")


class Answers(TorchDispatchMode):
    """Answers what is asked of values, which fake tensors lack: 0 or False, and a mask that lets all through."""

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        if func is torch.ops.aten._local_scalar_dense.default:
            return False if args[0].dtype == torch.bool else 0
        if func is torch.ops.aten.index.Tensor:
            values, (mask, *others) = args
            if mask is not None and mask.dtype == torch.bool:
                assert mask.device == values.device and not others
                return values.clone()
        return func(*args, **(kwargs or {}))


@pytest.fixture(autouse=True)
def fake() -> Iterator[None]:
    with FakeTensorMode(allow_non_fake_inputs=True), Answers():
        yield
    hadamard_factors.cache_clear()  # else the process's other tests get fake ones


def cuda(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="cuda")


def on_cuda(*tensors: Tensor) -> bool:
    return all(tensor.device.type == "cuda" for tensor in tensors)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("tokens", [50, (_SAMPLE + 2 * _EXTREMES) // COLUMNS + 100], ids=["all values", "a sample"])
def test_ranges(tokens: int, symmetric: bool, method: Literal["minmax", "percentile", "lp"]) -> None:
    values = cuda(tokens, COLUMNS)
    assert on_cuda(*search_range(values, 4, symmetric, RangeOptions(method=method)))
    assert on_cuda(*search_input_range(values, 4, symmetric, InputRangeOptions(method=method, outlier_tokens=0.05)))
    assert on_cuda(*affine(values.amin(1), values.amax(1), 4, symmetric))


@pytest.mark.parametrize("method", ["minmax", "lp"])
def test_scales(method: Literal["minmax", "lp"]) -> None:
    weight = cuda(ROWS, COLUMNS)
    for importance in (None, cuda(COLUMNS)):
        scale = weight_scales(weight, 4, WeightRangeOptions(method=method), importance)
        assert on_cuda(scale, round_to_nearest(weight, scale, 4), log_clip_of(scale, weight, 4))
        scale, multiplier = group_scales(weight, 4, 4, WeightRangeOptions(method=method), importance)
        assert on_cuda(scale, multiplier, round_to_nearest(weight, scale, 4, multiplier))
    assert on_cuda(channel_scale(weight, cuda(ROWS, 1), 4))


@pytest.mark.parametrize("name", ROUNDERS)
def test_rounding(name: str) -> None:
    weight, scale, hessian = cuda(ROWS, COLUMNS), cuda(ROWS, 1), cuda(COLUMNS, COLUMNS)
    options, multiplier = RoundingOptions(method=name, block=16), cuda(ROWS, COLUMNS // 4, dtype=torch.int8)
    assert on_cuda(ROUNDERS[name](weight, scale, 4, hessian, options))
    assert on_cuda(ROUNDERS[name](weight, scale, 4, hessian, options, multiplier))


def test_hessians() -> None:
    seen = cuda(5000, COLUMNS)
    assert on_cuda(second_moment(seen), second_moment(seen, cuda(10, 600)))


def test_a_tensor_on_another_device_is_noticed() -> None:
    hessian = cuda(COLUMNS, COLUMNS)
    with pytest.raises(RuntimeError, match="device"):
        ROUNDERS["gptq"](torch.empty(ROWS, COLUMNS), torch.empty(ROWS, 1), 4, hessian, RoundingOptions())
    with pytest.raises(RuntimeError, match="device"):
        weight_scales(cuda(ROWS, COLUMNS), 4, WeightRangeOptions(), torch.empty(COLUMNS))


def to_fake_cuda(model: LlamaForCausalLM) -> None:
    for module in model.modules():
        for tensors in (module._parameters, module._buffers):
            for name, tensor in tensors.items():
                if tensor is not None:
                    moved = torch.empty(tensor.shape, dtype=tensor.dtype, device="cuda")
                    tensors[name] = nn.Parameter(moved, requires_grad=False) if tensors is module._parameters else moved


def test_calibration(make_model: Callable[..., LlamaForCausalLM], simulate: Callable[..., LlamaForCausalLM]) -> None:
    """A whole model: what enters its layers, ranges, Hessians, ranges of the cache, codes."""
    fields = {"precision": "w4a4kv4", "transforms": ["T_d"]}
    with unset_fake_temporarily(), _disable_current_modes():
        model = simulate(make_model("gqa"), **fields)
    to_fake_cuda(model)
    windows = cuda(4, 32, dtype=torch.int64)
    assert list(calibrate_and_round(model, LLAMA, Recipe.parse(fields), windows)) == [0, 1]
    for name, buffer in model.named_buffers():
        assert on_cuda(buffer), name
