"""Choosing scales."""

from typing import Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptquant.format import code_bounds, quantize, round_scale
from fptquant.quantize import (
    InputRangeOptions,
    RangeOptions,
    WeightRangeOptions,
    group_scales,
    search_input_range,
    search_range,
    weight_scales,
)
from fptquant.quantize.ranges import _EXTREMES, _SAMPLE
from fptquant.quantize.weights import round_to_nearest

MINMAX, LP = RangeOptions(method="minmax"), RangeOptions(method="lp")
CASES = [(4, True), (4, False), (8, True), (8, False)]


def normal(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def fake_quantize(values: Tensor, bits: int, scale: Tensor, zero_point: Tensor) -> Tensor:
    return quantize(values, scale, *code_bounds(zero_point, bits)) * scale


def error(values: Tensor, bits: int, symmetric: bool, options: RangeOptions, p: float = 2.0) -> float:
    scale, zero_point = search_range(values, bits, symmetric, options)
    return (fake_quantize(values, bits, scale, zero_point) - values).abs().double().pow(p).sum().item()


@pytest.mark.parametrize("bits, symmetric", CASES)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
@settings(max_examples=50)
def test_scale_and_zero_point_are_always_usable(bits: int, symmetric: bool, values: list[float]) -> None:
    for method in ("minmax", "percentile", "lp"):
        scale, zero_point = search_range(torch.tensor(values), bits, symmetric, RangeOptions(method=method))
        assert scale.shape == zero_point.shape == ()
        assert scale.dtype == torch.float32 and zero_point.dtype == torch.int32
        assert torch.isfinite(scale) and scale > 0
        assert -(2 ** (bits - 1)) <= zero_point <= 2 ** (bits - 1) - 1
        if symmetric:
            assert zero_point == 0


@pytest.mark.parametrize("bits, symmetric", CASES)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
@settings(max_examples=50)
def test_minmax_covers_every_value(bits: int, symmetric: bool, values: list[float]) -> None:
    """No value is clipped: the error is at most half a step (one with the rounding of the zero point)."""
    tensor = torch.tensor(values)
    scale, zero_point = search_range(tensor, bits, symmetric, MINMAX)
    worst = (fake_quantize(tensor, bits, scale, zero_point) - tensor).abs().max()
    assert worst <= scale * (0.5 if symmetric else 1.0) * (1 + 1e-4) + 1e-30


def test_minmax_by_hand() -> None:
    scale, zero_point = search_range(torch.tensor([-1.0, 0.0, 14.0]), 4, False, MINMAX)
    assert (scale.item(), zero_point.item()) == (1.0, -7)  # -1 is code -8, 14 is code 7
    scale, _ = search_range(torch.tensor([-1.0, 0.0, 14.0]), 4, True, MINMAX)
    assert scale.item() == 2.0  # 14 = 7 steps up; 8 steps down would allow 16
    scale, _ = search_range(torch.tensor([-16.0, 7.0]), 4, True, MINMAX)
    assert scale.item() == 2.0
    scale, zero_point = search_range(torch.tensor([5.0, 15.0]), 4, False, MINMAX)
    assert (scale.item(), zero_point.item()) == (1.0, -8)  # zero belongs to the range always


@pytest.mark.parametrize("bits, symmetric", CASES)
@pytest.mark.parametrize("value", [0.0, 3.7, -3.7, 1e-20])
@pytest.mark.parametrize("size", [5, 60_000])
def test_constant_input(bits: int, symmetric: bool, value: float, size: int) -> None:
    values = torch.full((size,), value)
    for options in (MINMAX, LP, RangeOptions(method="percentile")):
        scale, zero_point = search_range(values, bits, symmetric, options)
        restored = fake_quantize(values, bits, scale, zero_point)
        # a constant fits a code exactly but for the rounding of the scale and the symmetric grid
        torch.testing.assert_close(restored, values, rtol=2.0**-4, atol=1e-19)


@pytest.mark.parametrize("bits, symmetric", CASES)
@pytest.mark.parametrize("p", [1.0, 2.0, 3.5])
@pytest.mark.parametrize("size", [3000, 100_000])
def test_lp_is_never_worse_than_minmax(bits: int, symmetric: bool, p: float, size: int) -> None:
    for seed in range(3):
        values = normal(size, seed=seed) ** 3 + seed
        found = error(values, bits, symmetric, RangeOptions(p=p), p)
        assert found <= error(values, bits, symmetric, MINMAX, p) * (1 + 1e-6)


@pytest.mark.parametrize("symmetric", [True, False])
def test_lp_ignores_a_lone_outlier(symmetric: bool) -> None:
    """The first token is a thousand times larger than the rest (findings.md): the range follows the rest."""
    values = normal(100_000)
    values[777] = 1000.0
    scale, _ = search_range(values, 8, symmetric, MINMAX)
    assert scale > 3.0
    scale, zero_point = search_range(values, 4, symmetric, RangeOptions(p=1.0))
    assert 0.2 < scale < 2.0
    bulk = values[values < 100]
    assert (fake_quantize(bulk, 4, scale, zero_point) - bulk).pow(2).mean() < 0.1


@pytest.mark.parametrize("symmetric", [True, False])
def test_an_input_range_need_not_hold_the_rarest_tokens(symmetric: bool) -> None:
    """One massive token sets the range by its squared error alone, unless it is as rare as `outlier_tokens` says."""
    usual = normal(10_000, 16)
    values = usual.clone()
    values[4321] = 1000.0 * normal(16, seed=1)
    scale, zero_point = search_input_range(values, 4, symmetric, InputRangeOptions())
    assert (fake_quantize(usual, 4, scale, zero_point) - usual).pow(2).mean() < 0.02
    wide = search_range(values, 4, symmetric, LP)
    assert wide[0] > 20 * scale
    assert search_input_range(values, 4, symmetric, InputRangeOptions(outlier_tokens=0.0)) == wide
    few = values[:4999]  # of which the share is no whole token
    assert search_input_range(few, 4, symmetric, InputRangeOptions()) == search_range(few, 4, symmetric, LP)

    values[::512] = 1000.0  # a token of every sequence, as the first is, counts
    assert search_input_range(values, 4, symmetric, InputRangeOptions())[0] > 20 * scale


@pytest.mark.parametrize("method", ["minmax", "percentile"])
def test_other_methods_see_all_tokens(method: Literal["minmax", "percentile"]) -> None:
    values = normal(10_000, 8)
    found = search_input_range(values, 4, False, InputRangeOptions(method=method))
    assert found == search_range(values, 4, False, RangeOptions(method=method))


def test_lp_approaches_the_best_scale_of_a_dense_search() -> None:
    values = normal(20_000)
    best = min(
        (fake_quantize(values, 4, torch.tensor(s), torch.tensor(0)) - values).pow(2).mean().item()
        for s in torch.linspace(0.1, 1.0, 300).tolist()
    )
    assert error(values, 4, True, LP) / values.numel() < 1.02 * best


@pytest.mark.parametrize("channels", [8, 36, 4 * 43])
def test_large_inputs_are_sampled_across_all_channels(channels: int) -> None:
    """Four channels are tiny: a sample of these alone gives another range.

    With these sizes count // sample divides the number of channels, so that a fixed stride would see four of them.
    """
    values = normal(_SAMPLE // 4, channels)
    values[:, :: channels // 4] *= 0.02
    assert values.numel() > _SAMPLE + 2 * _EXTREMES
    scale, _ = search_range(values, 4, True, LP)
    candidates = scale * torch.linspace(0.5, 2.0, 31)
    errors = [(fake_quantize(values, 4, s, torch.tensor(0)) - values).pow(2).sum().item() for s in candidates]
    chosen = (fake_quantize(values, 4, scale, torch.tensor(0)) - values).pow(2).sum().item()
    assert chosen <= 1.05 * min(errors)


def test_sampling_survives_ties_at_the_extremes() -> None:
    """Half of the values are exactly the smallest one (a ReLU): they count for half of the error weight."""
    values = normal(100_000).clamp_min(-0.5)
    found = error(values, 4, False, LP)
    exact = min(
        (fake_quantize(values, 4, *pair) - values).pow(2).sum().item()
        for shrink in (1.0, 0.8, 0.65, 0.5)
        for pair in [search_range(torch.tensor([-0.5, float(values.max()) * shrink]), 4, False, MINMAX)]
    )
    assert found <= 1.05 * exact


@pytest.mark.parametrize("share", [51.0, 90.0, 99.0, 100.0])
def test_percentile_keeps_that_share(share: float) -> None:
    values = torch.arange(1.0, 1001.0) * torch.tensor([1.0, -1.0]).repeat(500)  # 1, -2, 3, ..., -1000
    scale, _ = search_range(values, 8, False, RangeOptions(method="percentile", percentile=share))
    kept = scale * 255 / (values.max() - values.min())
    assert kept.item() == pytest.approx((2 * share - 100) / 100, abs=0.01)
    if share == 100.0:
        assert scale == search_range(values, 8, False, MINMAX)[0]


def test_percentile_of_one_sided_values() -> None:
    values = torch.arange(1.0, 101.0)
    scale, zero_point = search_range(values, 4, False, RangeOptions(method="percentile", percentile=90.0))
    assert scale.item() == pytest.approx(91 / 15, rel=0.02) and zero_point == -8


def test_search_does_not_change_its_input() -> None:
    values = normal(50_000)
    before = values.clone()
    for method in ("minmax", "percentile", "lp"):
        search_range(values, 4, False, RangeOptions(method=method))
    assert torch.equal(values, before)


@pytest.mark.parametrize("bits, symmetric", CASES)
@given(values=st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=20))
@settings(max_examples=50)
def test_powers_of_two_hold_every_value_and_no_smaller_one_does(
    bits: int, symmetric: bool, values: list[float]
) -> None:
    tensor = torch.tensor(values)
    plain = search_range(tensor, bits, symmetric, MINMAX)[0]
    scale, zero_point = search_range(tensor, bits, symmetric, RangeOptions(method="minmax", power_of_two=True))
    assert torch.frexp(scale).mantissa == 0.5 and plain <= scale < 2 * plain
    assert (fake_quantize(tensor, bits, scale, zero_point) - tensor).abs().max() <= scale * (1 + 1e-5)


@pytest.mark.parametrize("bits, symmetric", CASES)
@pytest.mark.parametrize("size", [0.7, 0.9, 1.1, 1.3])
def test_lp_takes_the_best_power_of_two(bits: int, symmetric: bool, size: float) -> None:
    """Of all, whichever way the plain scale would be rounded; and others are no powers of two."""
    values = size * normal(3000)
    scale, zero_point = search_range(values, bits, symmetric, RangeOptions(power_of_two=True))
    assert torch.frexp(scale).mantissa == 0.5
    assert torch.frexp(search_range(values, bits, symmetric, LP)[0]).mantissa != 0.5
    found = (fake_quantize(values, bits, scale, zero_point) - values).square().sum()
    for exponent in range(-10, 2):
        candidate = torch.tensor(2.0**exponent)
        for zero in (0,) if symmetric else (-1, 0, 1):
            error = (fake_quantize(values, bits, candidate, torch.tensor(zero)) - values).square().sum()
            assert found <= error * 1.01


# -- weights --


@pytest.mark.parametrize("method", ["minmax", "lp"])
def test_weight_scales_that_are_powers_of_two(method: Literal["minmax", "lp"]) -> None:
    weight = normal(16, 96) * torch.logspace(-3, 2, 16)[:, None]
    scales = weight_scales(weight, 4, WeightRangeOptions(method=method, power_of_two=True))
    assert bool((torch.frexp(scales).mantissa == 0.5).all()) and torch.equal(scales, round_scale(scales))
    holding = torch.ceil(torch.log2(weight.abs().amax(1, keepdim=True) / 7)).exp2()
    if method == "minmax":
        assert torch.equal(scales, holding)
        return
    errors = [(round_to_nearest(weight, s, 4) * s - weight).square().sum(1) for s in (scales, holding, holding / 2)]
    assert torch.equal(errors[0], torch.minimum(errors[1], errors[2]))
    assert not torch.equal(scales, holding) and not torch.equal(scales, holding / 2)


def test_weight_scales_of_minmax_by_hand() -> None:
    weight = torch.tensor([[7.0, -3.0], [0.5, -1.75], [0.0, 0.0]])
    scales = weight_scales(weight, 4, WeightRangeOptions(method="minmax"))
    assert scales.shape == (3, 1)
    assert scales[:2, 0].tolist() == [1.0, 0.25] and 0 < scales[2, 0] < 1e-6


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_lp_weight_scales_are_per_channel_exact_and_no_worse(bits: int, p: float) -> None:
    weight = normal(16, 96) * torch.logspace(-3, 2, 16)[:, None]
    weight[3, 5] *= 20
    options = WeightRangeOptions(p=p)
    scales = weight_scales(weight, bits, options)
    assert torch.equal(scales, round_scale(scales)) and scales.dtype == torch.float32

    def errors(scale: Tensor) -> Tensor:
        return (round_to_nearest(weight, scale, bits) * scale - weight).abs().pow(p).sum(1)

    minmax = weight_scales(weight, bits, WeightRangeOptions(method="minmax"))
    assert bool((errors(scales) <= errors(minmax) * (1 + 1e-6)).all())
    alone = torch.cat([weight_scales(row[None], bits, options) for row in weight])
    assert torch.equal(scales, alone), "channels influence each other"
    if bits == 4:
        assert scales[3] < minmax[3], "an outlier should be clipped"


def test_importance_shifts_the_choice() -> None:
    """An outlier in a column that is never active does not deserve a range of its own."""
    weight = normal(4, 64)
    weight[:, 0] = 8.0
    importance = torch.ones(64)
    importance[0] = 0.0
    assert bool(
        (
            weight_scales(weight, 4, WeightRangeOptions(), importance) < weight_scales(weight, 4, WeightRangeOptions())
        ).all()
    )


def spread_out(rows: int = 12, columns: int = 192) -> Tensor:
    """Channels and groups of different sizes, one group of zeros, one outlier."""
    weight = normal(rows, columns) * torch.logspace(-3, 2, rows)[:, None]
    weight *= torch.exp(0.3 * normal(rows, columns // 32, seed=1)).repeat_interleave(32, 1)
    weight[2, :32] = 0
    weight[3, 5] *= 20
    return weight


def error_of_groups(weight: Tensor, scale: Tensor, multiplier: Tensor, p: float = 2.0) -> Tensor:
    codes = round_to_nearest(weight, scale, 4, multiplier)
    return (codes * scale - weight).abs().pow(p).sum(1)


@pytest.mark.parametrize("size", [32, 64])
@pytest.mark.parametrize("p", [2.0, 2.4])
def test_multipliers_beat_one_scale_per_channel(size: int, p: float) -> None:
    weight, options = spread_out(), WeightRangeOptions(p=p)
    scales, multipliers = group_scales(weight, 4, size, options)
    assert torch.equal(scales, round_scale(scales)) and scales.dtype == torch.float32
    assert multipliers.dtype == torch.int8 and multipliers.shape == (12, 192 // size)
    assert multipliers.min() >= 1 and multipliers.max() == 8
    alone = [group_scales(row[None], 4, size, options) for row in weight]
    assert torch.equal(multipliers, torch.cat([each for _, each in alone])), "channels influence each other"
    channel = weight_scales(weight, 4, options)
    one = (round_to_nearest(weight, channel, 4) * channel - weight).abs().pow(p).sum(1)
    found = error_of_groups(weight, scales, multipliers, p)
    assert bool((found < one).all()) and (found / one).mean() < (0.72 if size == 32 else 0.85)


def test_multipliers_are_near_the_best() -> None:
    """All multipliers at every scale of a dense grid."""
    weight = spread_out()
    found = error_of_groups(weight, *group_scales(weight, 4, 32, WeightRangeOptions()))
    best = torch.full_like(found, torch.inf)
    for share in torch.linspace(0.2, 1.4, 200).tolist():
        scale = round_scale(weight.abs().amax(1, keepdim=True) / 56 * share)
        every = [
            (round_to_nearest(weight, scale * m, 4) * scale * m - weight).square().view(12, 6, 32).sum(2)
            for m in range(1, 9)
        ]
        best = torch.minimum(best, torch.stack(every).amin(0).sum(1))
    assert bool((found < 1.05 * best).all()) and (found / best).mean() < 1.02


def test_minmax_multipliers_hold_every_value() -> None:
    weight = spread_out()
    scales, multipliers = group_scales(weight, 4, 32, WeightRangeOptions(method="minmax"))
    codes = round_to_nearest(weight, scales, 4, multipliers)
    steps = scales * multipliers.repeat_interleave(32, 1)
    assert bool(((codes * scales - weight).abs() <= 0.54 * steps).all())  # the scale is rounded, by up to 1/256
    assert multipliers[2, 0] == 1


def test_importance_shifts_multipliers() -> None:
    """What is never active deserves no range; the group around it gets a finer step."""
    weight = normal(4, 64)
    weight[:, 0] = 6.0
    importance = torch.ones(64)
    importance[0] = 0.0
    (scale, without), (other, plain) = (
        group_scales(weight, 4, 32, WeightRangeOptions(), i) for i in (importance, None)
    )
    assert bool((scale * without < other * plain)[:, 0].all())


@given(st.lists(st.floats(-100, 100, width=32), min_size=1, max_size=8), st.sampled_from([4, 8]))
def test_round_to_nearest_reference(values: list[float], bits: int) -> None:
    scale = 0.37
    codes = round_to_nearest(torch.tensor([values]), torch.tensor([[scale]]), bits)[0]
    for value, code in zip(values, codes.tolist(), strict=True):
        nearest = min(range(-(2 ** (bits - 1)), 2 ** (bits - 1)), key=lambda c: abs(c * scale - value))
        assert abs(code - nearest) <= 1 and abs(abs(code * scale - value) - abs(nearest * scale - value)) < 1e-4
