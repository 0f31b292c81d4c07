"""QuantEase: against its plainest form, and never above GPTQ."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from fptquant.quantize.rounding import RoundingOptions
from fptquant.quantize.rounding.gptq import damped, round_gptq
from fptquant.quantize.rounding.quantease import CoordinateDescent, round_quantease
from fptquant.quantize.weights import round_to_nearest
from tests.fptquant.test_rounding import loss, problem

OPTIONS = RoundingOptions(method="quantease")


def naive(weight: Tensor, codes: Tensor, scale: Tensor, bits: int, hessian: Tensor, passes: int) -> Tensor:
    """One weight at a time in float64: every code on the grid is tried, and the error computed in full."""
    weight, scale, hessian = weight.double(), scale.double(), hessian.double()
    grid = torch.arange(-(2 ** (bits - 1)), 2 ** (bits - 1), dtype=torch.float64)
    codes = codes.double().clone()
    for _ in range(passes):
        for row in range(weight.shape[0]):
            for column in range(weight.shape[1]):
                tried = codes[row].repeat(len(grid), 1)
                tried[:, column] = grid
                difference = tried * scale[row] - weight[row]
                errors = ((difference @ hessian) * difference).sum(1)
                codes[row] = tried[errors.argmin()]
    return codes.float()


@pytest.mark.parametrize("passes", [1, 3])
@pytest.mark.parametrize("block", [1, 5, 128])
@pytest.mark.parametrize("seed", range(3))
def test_quantease_equals_plain_coordinate_descent(seed: int, block: int, passes: int) -> None:
    weight, scale, hessian = problem(4, 18, seed, correlation=0.7)
    objective = damped(hessian, OPTIONS.damping)
    start = round_to_nearest(weight, scale, 4)  # farther from a minimum than GPTQ
    descent = CoordinateDescent(weight, start, scale, 4, objective)
    for _ in range(passes):
        descent.sweep(block)
    codes = descent.codes.T
    assert torch.equal(codes, naive(weight, start, scale, 4, objective, passes))
    assert (codes != start).float().mean() > 0.02


def test_it_starts_from_gptq() -> None:
    weight, scale, hessian = problem(4, 60, 0, correlation=0.5)
    start = round_gptq(weight, scale, 4, hessian, OPTIONS)
    codes = round_quantease(weight, scale, 4, hessian, RoundingOptions(passes=2))
    assert torch.equal(codes, naive(weight, start, scale, 4, damped(hessian, OPTIONS.damping), 2))


@settings(max_examples=60, deadline=None)
@given(
    rows=st.integers(1, 9),
    columns=st.integers(1, 40),
    bits=st.sampled_from([4, 7, 8]),
    block=st.sampled_from([1, 3, 16, 128]),
    clip=st.sampled_from([0.2, 1.0]),
    correlation=st.sampled_from([0.0, 0.5, 0.99]),
    size=st.sampled_from([1e-20, 1.0, 1e20]),
    seed=st.integers(0, 1000),
)
def test_the_objective_never_rises(
    rows: int, columns: int, bits: int, block: int, clip: float, correlation: float, size: float, seed: int
) -> None:
    weight, scale, hessian = problem(rows, columns, seed, correlation)
    scale, hessian = scale * clip, hessian * size
    objective = damped(hessian, OPTIONS.damping)
    codes = round_gptq(weight, scale, bits, hessian, OPTIONS)
    descent = CoordinateDescent(weight, codes, scale, bits, objective)
    losses = [loss(weight, codes, scale, objective)]
    while descent.sweep(block) and len(losses) < 8:
        losses.append(loss(weight, descent.codes.T, scale, objective))
        assert losses[-1] <= losses[-2] * (1 + 1e-9)
    assert round_quantease(weight, scale, bits, hessian, OPTIONS).abs().max() <= 2 ** (bits - 1)


def test_quantease_beats_gptq() -> None:
    ratios = []
    for seed in range(4):
        weight, scale, hessian = problem(3, 300, seed)
        objective = damped(hessian, OPTIONS.damping)
        gptq, quantease = (
            loss(weight, rounder(weight, scale, 4, hessian, OPTIONS), scale, objective)
            for rounder in (round_gptq, round_quantease)
        )
        ratios.append(quantease / gptq)
    assert max(ratios) < 1


def test_it_ends_where_no_single_code_can_be_bettered() -> None:
    weight, scale, hessian = problem(6, 30, 0)
    codes = round_quantease(weight, scale, 4, hessian, RoundingOptions(passes=100))
    assert torch.equal(codes, naive(weight, codes, scale, 4, damped(hessian, OPTIONS.damping), 1))


@pytest.mark.parametrize("case", ["dead channels", "all zero"])
def test_inputs_that_are_always_zero(case: str) -> None:
    weight, scale, hessian = problem(6, 24, 0)
    dead = [3, 7] if case == "dead channels" else list(range(24))
    hessian[dead] = 0
    hessian[:, dead] = 0
    codes = round_quantease(weight, scale, 4, hessian, OPTIONS)
    assert torch.equal(codes[:, dead], round_to_nearest(weight, scale, 4)[:, dead])
