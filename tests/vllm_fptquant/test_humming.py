"""The Humming kernels: what they refuse, what they feed to the package, and how far the result may be off."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.format import ActivationScheme, LinearScheme, WeightScheme, code_bounds, quantize, round_scale
from fptquant.format.arithmetic import accumulator_bound
from tests.vllm_fptquant.humming_model import integer_sums
from tests.vllm_fptquant.layers import steps_of
from vllm_fptquant.kernels import humming as module
from vllm_fptquant.kernels.base import LinearSpec, LinearWeights
from vllm_fptquant.kernels.gpu import GpuLinear
from vllm_fptquant.kernels.humming import (
    HALF_MAX,
    Humming,
    HummingInt4Kernel,
    HummingInt8Kernel,
    layer_config,
    shift_exponent,
)
from vllm_fptquant.kernels.select import select_kernel

pytestmark = pytest.mark.usefixtures("operators")

TYPES = [torch.float16, torch.bfloat16]


def scheme(bits: int, weight_bits: int = 4, symmetric: bool = True) -> LinearScheme:
    return LinearScheme(
        weights=WeightScheme(bits=weight_bits), activations=ActivationScheme(bits=bits, symmetric=symmetric)
    )


def spec(bits: int, weight_bits: int = 4, symmetric: bool = True, **fields: Any) -> LinearSpec:
    known = {"in_features": 576, "out_features": 192, "dtype": torch.bfloat16, "device": "cuda", "capability": 86}
    return LinearSpec(scheme(bits, weight_bits, symmetric), **{**known, **fields})


def random_weights(bits: int, n: int, k: int, weight_bits: int = 4, zero_point: int | None = None) -> LinearWeights:
    limit = 2 ** (weight_bits - 1)
    return LinearWeights(
        scheme=scheme(bits, weight_bits, zero_point is None),
        codes=torch.randint(-limit, limit, (n, k), dtype=torch.int8),
        weight_scale=round_scale(torch.rand(n) * 0.01 + 1e-4),
        input_scale=torch.tensor(0.037),
        input_zero_point=None if zero_point is None else torch.tensor(zero_point, dtype=torch.int32),
    )


def steps(first: Tensor, second: Tensor) -> int:
    """Largest distance of two 16-bit tensors, counted in representable numbers."""

    def position(x: Tensor) -> Tensor:
        bits = x.view(torch.int16).int()
        return torch.where(bits < 0, -(bits & 0x7FFF), bits)

    return int((position(first) - position(second)).abs().max())


def contract(codes: Tensor, weights: LinearWeights, row_scale: Tensor, dtype: torch.dtype) -> Tensor:
    """The format's result: the exact sum, one scale in float32, to 16 bits."""
    sums = codes.double() @ weights.codes.double().t()
    return (sums.float() * (row_scale[:, None] * weights.weight_scale)).to(dtype)


@st.composite
def cases(draw: st.DrawFn) -> tuple[type[Humming], LinearWeights, Tensor, Tensor]:
    """A kernel, a layer that it takes, codes and row scales; sizes with and without padding, extreme codes often."""
    kernel = draw(st.sampled_from([HummingInt4Kernel, HummingInt8Kernel]))
    int4 = kernel is HummingInt4Kernel
    bits = 4 if int4 else draw(st.sampled_from([4, 8]))
    zero_point = draw(st.integers(-8, 7)) if bits == 4 and not int4 and draw(st.booleans()) else None
    weight_bits = 4 if int4 else draw(st.sampled_from([4, 7, 8]))
    m, n = draw(st.integers(1, 20)), 8 * draw(st.integers(1, 40))
    k = 32 * draw(st.integers(1, 20))
    torch.manual_seed(draw(st.integers(0, 2**32 - 1)))
    weights = random_weights(bits, n, k, weight_bits, zero_point)
    low, high = (int(bound) for bound in weights.bounds)
    codes = torch.randint(low, high + 1, (m, k), dtype=torch.int8)
    if draw(st.booleans()):  # sums as large as they get
        codes[0] = high
        weights.codes[0] = weights.codes.min()
    row_scale = torch.rand(m) * draw(st.sampled_from([1.0, 1e-3, 30.0])) + 1e-4
    return kernel, weights, codes, row_scale


@given(case=cases(), dtype=st.sampled_from(TYPES))
@settings(max_examples=150, deadline=None)
def test_same_sums_and_at_most_one_step_off(
    case: tuple[type[Humming], LinearWeights, Tensor, Tensor], dtype: torch.dtype
) -> None:
    build, weights, codes, row_scale = case
    kernel = build(weights, dtype)
    sums = integer_sums(kernel.packed(codes), kernel.weight, vars(layer_config(kernel.config)))
    assert np.array_equal(sums, (codes.long() @ weights.codes.long().t()).numpy())
    output = kernel(codes, row_scale)
    expected = contract(codes, weights, row_scale, dtype)
    assert output.dtype == dtype and output.shape == expected.shape
    finite = expected.isfinite()
    assert torch.equal(output.isfinite(), finite)
    assert steps(output[finite], expected[finite]) <= 1


@pytest.mark.parametrize("dtype", TYPES)
@pytest.mark.parametrize("exponent", [0, 4, 9])
def test_rounding_the_sum_first_moves_no_result_further_than_one_step(dtype: torch.dtype, exponent: int) -> None:
    torch.manual_seed(exponent)
    largest = min(HALF_MAX * 2**exponent, 2**24)
    sums = torch.cat([torch.arange(2**16), torch.randint(0, largest, (2**18,))]).double()
    for _ in range(40):
        scale = round_scale(torch.rand(1) * 2.0 ** torch.randint(-10, 3, (1,)))
        row = torch.rand(1) + 0.01
        rounded = (sums.float() * 2.0**-exponent).half()
        ours = (rounded.float() * (scale * 2.0**exponent) * row).to(dtype)
        expected = (sums.float() * (row * scale)).to(dtype)
        finite = ours.isfinite() & expected.isfinite()
        assert steps(ours[finite], expected[finite]) <= 1


@pytest.mark.parametrize("sums", [2048, -2047, 0])
def test_small_sums_are_exact(sums: int) -> None:
    weights = random_weights(8, 8, 4096)
    weights.codes.zero_()
    weights.codes[:, : abs(sums)] = 1
    codes = torch.full((1, 4096), 1 if sums > 0 else -1, dtype=torch.int8)
    kernel = HummingInt8Kernel(weights, torch.float16)
    result = torch.ops.fptquant.humming(
        kernel.packed(codes), kernel.weight, kernel.unit, kernel.shift, kernel.config, 8
    )
    assert torch.equal(result.double() / kernel.shift.double(), torch.full((1, 8), float(sums)).double())


@pytest.mark.parametrize(("bits", "weight_bits"), [(4, 4), (8, 4), (8, 7), (8, 8)])
@pytest.mark.parametrize("in_features", [32, 576, 4096, 14336, 28672])
def test_no_sum_overflows_float16_and_the_shift_is_no_larger_than_needed(
    bits: int, weight_bits: int, in_features: int
) -> None:
    bound, exponent = accumulator_bound(in_features, bits, weight_bits), shift_exponent(in_features, bits, weight_bits)
    assert torch.tensor(bound * 2.0**-exponent).half().isfinite()
    assert exponent == 0 or bound * 2.0 ** (1 - exponent) > HALF_MAX
    assert 2.0**-exponent >= torch.finfo(torch.float16).smallest_normal


@pytest.mark.parametrize("kernel", [HummingInt4Kernel, HummingInt8Kernel])
@pytest.mark.parametrize("bits", [4, 8])
def test_refuses_sums_that_could_saturate(kernel: type[Humming], bits: int) -> None:
    """The instructions clamp to int32: no layer that is accepted can get there."""
    weight_bits = 4 if kernel is HummingInt4Kernel else 8
    if kernel is HummingInt4Kernel and bits == 8:
        pytest.skip("4-bit activations only")
    fits = (2**31 - 1) // accumulator_bound(1, bits, weight_bits) // 32 * 32
    assert kernel.can_implement(spec(bits, weight_bits, in_features=fits)) is None
    assert accumulator_bound(fits, bits, weight_bits) <= 2**31 - 1
    assert "exceed 32 bits" in (kernel.can_implement(spec(bits, weight_bits, in_features=fits + 32)) or "")


@pytest.mark.parametrize(
    ("kernel", "given", "reason"),
    [
        (HummingInt4Kernel, spec(4), None),
        (HummingInt4Kernel, spec(4, capability=80, dtype=torch.float16), None),
        (HummingInt4Kernel, spec(4, capability=89), None),
        (HummingInt4Kernel, spec(4, capability=75), "8.0 to 8.9"),
        (HummingInt4Kernel, spec(4, capability=90), "8.0 to 8.9"),
        (HummingInt4Kernel, spec(4, capability=120), "8.0 to 8.9"),
        (HummingInt4Kernel, spec(4, symmetric=False), "symmetric"),
        (HummingInt4Kernel, spec(8), "not 8 by 4 bits"),
        (HummingInt4Kernel, spec(16), "not 16 by 4 bits"),
        (HummingInt4Kernel, spec(4, 8), "not 4 by 8 bits"),
        (HummingInt4Kernel, spec(4, in_features=592), "multiple of 32"),
        (HummingInt4Kernel, spec(4, out_features=196), "multiple of 8"),
        (HummingInt4Kernel, spec(4, dtype=torch.float32), "16 bits"),
        (HummingInt4Kernel, spec(4, device="cpu", capability=None), "not on 'cpu'"),
        (HummingInt8Kernel, spec(8), None),
        (HummingInt8Kernel, spec(4), None),
        (HummingInt8Kernel, spec(4, symmetric=False), None),
        (HummingInt8Kernel, spec(8, 8, in_features=592), None),
        (HummingInt8Kernel, spec(8, symmetric=False), "zero point"),
        (HummingInt8Kernel, spec(16), "16 bits"),
        (HummingInt8Kernel, spec(8, in_features=584), "multiple of 16"),
        (HummingInt8Kernel, spec(8, capability=70), "7.5"),
        *[(HummingInt8Kernel, spec(8, capability=c), None) for c in (80, 86, 89, 90, 100, 103, 120, 121)],
        (HummingInt8Kernel, spec(8, capability=75, dtype=torch.float16), None),
    ],
)
def test_refusals(kernel: type[Humming], given: LinearSpec, reason: str | None) -> None:
    refusal = kernel.can_implement(given)
    assert (refusal is None) == (reason is None), refusal
    assert reason is None or reason in str(refusal)


@pytest.mark.parametrize(("bits", "name"), [(4, "humming-int4"), (4, "humming-int8"), (8, "humming-int8")])
def test_selected_where_asked_for(bits: int, name: str) -> None:
    """Marlin is the default: it rounds once, and compiles nothing when the server starts."""
    assert select_kernel(spec(bits), None, "layer")[0].name == "marlin-int8"
    assert select_kernel(spec(bits), name, "layer")[0].name == name
    with pytest.raises(FPTQuantError, match="8.0 to 8.9.*marlin-int8"):
        select_kernel(spec(4, capability=90), "humming-int4", "layer")


def test_refuses_without_the_package(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.utils import humming as facade

    monkeypatch.undo()  # the real check
    module.unavailable.cache_clear()
    monkeypatch.setattr(module, "has_humming", lambda: False)
    assert "not installed" in str(module.unavailable())
    module.unavailable.cache_clear()
    monkeypatch.setattr(module, "has_humming", lambda: True)
    assert module.unavailable() is None
    module.unavailable.cache_clear()
    monkeypatch.delitem(facade._EXPORTS, "prepare_and_transform_humming_tensors")
    assert "0.32" in str(module.unavailable())
    module.unavailable.cache_clear()


@pytest.mark.parametrize(("kernel", "bits"), [(HummingInt4Kernel, 4), (HummingInt8Kernel, 8), (HummingInt8Kernel, 4)])
@pytest.mark.parametrize("rows", [1, 7, 130])
def test_whole_layer_on_the_cpu(kernel: type[Humming], bits: int, rows: int) -> None:
    """Quantizer, packing, product and scaling together equal the format's arithmetic to within one step."""
    torch.manual_seed(0)
    weights = random_weights(bits, 200, 576)
    layer = GpuLinear(kernel(weights, torch.bfloat16), weights, steps_of(weights))
    x = torch.randn(rows, 576).bfloat16()
    assert weights.input_scale is not None
    low, high = code_bounds(weights.zero_point, bits)
    codes = quantize(x, weights.input_scale, low, high)
    expected = contract(codes, weights, weights.input_scale.repeat(rows), torch.bfloat16)
    assert steps(layer(x, None), expected) <= 1


@pytest.mark.parametrize(("kernel", "bits"), [(HummingInt4Kernel, 4), (HummingInt8Kernel, 8)])
def test_operator_schema(kernel: type[Humming], bits: int) -> None:
    built = kernel(random_weights(bits, 24, 64), torch.float16)
    codes = built.packed(torch.randint(-8, 8, (3, 64), dtype=torch.int8))
    arguments = (codes, built.weight, built.unit, built.shift, built.config, 24)
    torch.library.opcheck(torch.ops.fptquant.humming.default, arguments)
