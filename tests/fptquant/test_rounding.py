"""Rounding weights: nearest, and GPTQ against its plainest form."""

import itertools

import pytest
import torch
from torch import Tensor

from fptquant.quantize import WeightRangeOptions, weight_scales
from fptquant.quantize.rounding import ROUNDERS, RoundingOptions
from fptquant.quantize.rounding.gptq import round_gptq
from fptquant.quantize.weights import round_to_nearest

OPTIONS = RoundingOptions()


def problem(rows: int, columns: int, seed: int, correlation: float = 0.9) -> tuple[Tensor, Tensor, Tensor]:
    """Weights, their scales and the Hessian of correlated inputs with channels of different size."""
    generator = torch.Generator().manual_seed(seed)
    weight = torch.randn(rows, columns, generator=generator)
    shared = torch.randn(4 * columns, max(2, columns // 4), generator=generator)
    mixing = torch.randn(max(2, columns // 4), columns, generator=generator)
    x = correlation * shared @ mixing + (1 - correlation) * torch.randn(4 * columns, columns, generator=generator)
    x = x * torch.logspace(-1, 0.5, columns)
    return weight, weight_scales(weight, 4, WeightRangeOptions(method="minmax")), x.T @ x / len(x)


def loss(weight: Tensor, codes: Tensor, scale: Tensor, hessian: Tensor) -> float:
    difference = (codes * scale - weight).double()
    return torch.einsum("nk,kl,nl->", difference, hessian.double(), difference).item()


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("rows, columns", [(8, 32), (5, 77), (3, 300)])
def test_gptq_beats_nearest_in_the_norm_of_the_hessian(rows: int, columns: int, seed: int) -> None:
    weight, scale, hessian = problem(rows, columns, seed)
    nearest = loss(weight, round_to_nearest(weight, scale, 4), scale, hessian)
    assert loss(weight, round_gptq(weight, scale, 4, hessian, OPTIONS), scale, hessian) < 0.6 * nearest


@pytest.mark.parametrize("name", ROUNDERS)
@pytest.mark.parametrize("bits", [4, 8])
def test_every_method_returns_codes_in_range_and_keeps_its_inputs(name: str, bits: int) -> None:
    weight, scale, hessian = problem(6, 40, 0)
    scale = scale * 0.2  # forces clipping
    before = (weight.clone(), scale.clone(), hessian.clone())
    codes = ROUNDERS[name](weight, scale, bits, hessian, RoundingOptions(method=name))
    assert codes.shape == weight.shape and codes.dtype == torch.float32
    assert torch.equal(codes, codes.round())
    assert codes.min() >= -(2 ** (bits - 1)) and codes.max() <= 2 ** (bits - 1) - 1
    assert all(torch.equal(a, b) for a, b in zip((weight, scale, hessian), before, strict=True))


def test_gptq_with_uncorrelated_inputs_is_nearest() -> None:
    weight, scale, _ = problem(6, 40, 0)
    for hessian in (torch.eye(40), torch.diag(torch.linspace(0.1, 5.0, 40))):
        assert torch.equal(round_gptq(weight, scale, 4, hessian, OPTIONS), round_to_nearest(weight, scale, 4))


def obq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, damping: float) -> Tensor:
    """Optimal brain quantization in float64 in GPTQ's order: after each column, all free ones move to the optimum.

    delta = -(w_q - quant(w_q)) / [H^-1]_qq * [H^-1]_q,: with H restricted to the columns that are still free
    (Frantar et al., arXiv 2210.17323, equation 2): written with explicit inverses, no Cholesky factor.
    """
    h = hessian.double() + torch.eye(len(hessian), dtype=torch.float64) * hessian.double().diagonal().mean() * damping
    free = torch.argsort(hessian.diagonal(), descending=True).tolist()
    work, codes = weight.double().clone(), torch.empty_like(weight)
    while free:
        inverse = torch.linalg.inv(h[free][:, free])
        column = free[0]
        codes[:, column] = round_to_nearest(work[:, column : column + 1].float(), scale, bits)[:, 0]
        error = (work[:, column] - codes[:, column].double() * scale[:, 0].double()) / inverse[0, 0]
        work[:, free] -= error[:, None] * inverse[0]
        free = free[1:]
    return codes


@pytest.mark.parametrize("block", [1, 7, 128])
@pytest.mark.parametrize("seed", range(3))
def test_gptq_equals_plain_obq(block: int, seed: int) -> None:
    weight, scale, hessian = problem(6, 30, seed, correlation=0.7)
    options = RoundingOptions(block=block)
    codes = round_gptq(weight, scale, 4, hessian, options)
    expected = obq(weight, scale, 4, hessian, options.damping)
    assert not torch.equal(expected, round_to_nearest(weight, scale, 4))
    assert (codes != expected).float().mean() < 0.01  # float32 may decide a tie the other way


def test_gptq_is_close_to_the_optimum_of_a_small_case() -> None:
    """All 3^5 roundings of one row, by force."""
    ratios = []
    for seed in range(20):
        generator = torch.Generator().manual_seed(seed)
        weight, x = torch.randn(1, 5, generator=generator), torch.randn(50, 5, generator=generator)
        x = x + 2 * x[:, :1]
        hessian, scale = x.T @ x / 50, torch.tensor([[0.7]])
        base = torch.floor(weight / scale)
        every = torch.stack([base[0] + torch.tensor(step) for step in itertools.product((-1.0, 0.0, 1.0), repeat=5)])
        best = min(loss(weight, codes[None], scale, hessian) for codes in every)
        ratios.append(loss(weight, round_gptq(weight, scale, 4, hessian, OPTIONS), scale, hessian) / best)
    assert min(ratios) > 0.999 and sum(ratios) / len(ratios) < 2.0


@pytest.mark.parametrize("case", ["dead channels", "rank one", "all zero", "tiny", "huge"])
def test_gptq_with_a_singular_hessian(case: str) -> None:
    weight, scale, hessian = problem(6, 24, 0)
    if case == "dead channels":
        hessian[[3, 7]] = 0
        hessian[:, [3, 7]] = 0
    elif case == "rank one":
        x = torch.linspace(0.1, 1.0, 24)
        hessian = torch.outer(x, x)
    elif case == "all zero":
        hessian = torch.zeros(24, 24)
    else:
        hessian = hessian * (1e-20 if case == "tiny" else 1e20)
    codes = round_gptq(weight, scale, 4, hessian, OPTIONS)
    nearest = round_to_nearest(weight, scale, 4)
    assert bool(torch.isfinite(codes).all())
    assert loss(weight, codes, scale, hessian) <= loss(weight, nearest, scale, hessian)
    if case == "dead channels":  # nothing to make up for there
        assert torch.equal(codes[:, [3, 7]], nearest[:, [3, 7]])


def test_options_are_checked() -> None:
    with pytest.raises(ValueError, match="damping"):
        RoundingOptions(damping=0)
    with pytest.raises(ValueError, match="method"):
        RoundingOptions(method="stochastic")  # type: ignore[arg-type]
