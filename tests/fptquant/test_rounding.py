"""Rounding weights: nearest, and GPTQ against its plainest form."""

import itertools
import subprocess
import sys

import pytest
import torch
from torch import Tensor

from fptquant.format import per_column
from fptquant.quantize import WeightRangeOptions, group_scales, weight_scales
from fptquant.quantize.rounding import ROUNDERS, RoundingOptions
from fptquant.quantize.rounding.gptq import _unit_factor, damped, round_gptq
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


@pytest.mark.parametrize("name", ROUNDERS)
def test_codes_are_multiples_of_their_groups_multipliers(name: str) -> None:
    weight, _, hessian = problem(2100, 96, 0)  # more rows than are rounded at once
    scale, multiplier = group_scales(weight, 4, 32, WeightRangeOptions())
    codes = ROUNDERS[name](weight, scale, 4, hessian, RoundingOptions(method=name), multiplier)
    stored = codes / multiplier.repeat_interleave(32, 1)
    assert torch.equal(stored, stored.round()) and (stored.min(), stored.max()) == (-8, 7)
    assert len(multiplier.unique()) > 4
    nearest = loss(weight, round_to_nearest(weight, scale, 4, multiplier), scale, hessian)
    found = loss(weight, codes, scale, hessian)
    assert found == nearest if name == "nearest" else found < 0.6 * nearest
    if name == "quantease":
        assert found < loss(weight, round_gptq(weight, scale, 4, hessian, OPTIONS, multiplier), scale, hessian)
    ones = torch.ones_like(multiplier)
    alone = ROUNDERS[name](weight, 8 * scale, 4, hessian, RoundingOptions(method=name))
    assert torch.equal(ROUNDERS[name](weight, 8 * scale, 4, hessian, RoundingOptions(method=name), ones), alone)


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


def plain_gptq(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, damping: float) -> Tensor:
    """Algorithm 1 of GPTQ as published, in float64 and without blocks: by the Cholesky factor of the inverse.

    Args:
        weight: (N, K).
        scale: (N, 1), or (N, K) of each weight.
        bits: width of the codes.
        hessian: (K, K).
        damping: see `RoundingOptions`.
    """
    scale = scale.expand(weight.shape)
    order = torch.argsort(hessian.diagonal(), descending=True)
    h = hessian[order][:, order].double()
    h += torch.eye(len(h), dtype=torch.float64) * h.diagonal().mean().clamp_min(1e-12) * damping
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    work, codes = weight[:, order].double(), torch.empty_like(weight)
    for column in range(len(h)):
        steps = scale[:, order[column], None]
        rounded = round_to_nearest(work[:, column : column + 1].float(), steps, bits)
        codes[:, order[column]] = rounded[:, 0]
        error = (work[:, column] - (rounded.double() * steps)[:, 0]) / upper[column, column]
        work[:, column:] -= error[:, None] * upper[column, column:]
    return codes


@pytest.mark.parametrize("block", [16, 128])
@pytest.mark.parametrize("case", ["random", "few tokens", "dead channels", "rank one", "all zero"])
def test_gptq_equals_the_published_algorithm(case: str, block: int) -> None:
    weight, scale, hessian = problem(2500, 60, 0, correlation=0.7)  # more rows than are rounded at once
    if case == "few tokens":
        x = torch.randn(15, 60, generator=torch.Generator().manual_seed(1))
        hessian = x.T @ x / 15
    elif case == "dead channels":
        hessian[::7] = 0
        hessian[:, ::7] = 0
    elif case == "rank one":
        hessian = torch.outer(torch.linspace(0.1, 1.0, 60), torch.linspace(0.1, 1.0, 60))
    elif case == "all zero":
        hessian = torch.zeros(60, 60)
    codes = round_gptq(weight, scale, 4, hessian, RoundingOptions(block=block))
    expected = plain_gptq(weight, scale, 4, hessian, OPTIONS.damping)
    assert (codes != expected).float().mean() < 1e-4  # float32 may decide a tie the other way
    found, best = (loss(weight, each, scale, hessian) for each in (codes, expected))
    assert found == pytest.approx(best, rel=1e-3)


def test_gptq_with_multipliers_equals_the_published_algorithm() -> None:
    """With a step for each weight."""
    weight, _, hessian = problem(300, 96, 0, correlation=0.7)
    scale, multiplier = group_scales(weight, 4, 32, WeightRangeOptions())
    codes = round_gptq(weight, scale, 4, hessian, RoundingOptions(block=16), multiplier)
    steps = scale * per_column(multiplier, 96)
    expected = plain_gptq(weight, steps, 4, hessian, OPTIONS.damping) * per_column(multiplier, 96)
    assert (codes != expected).float().mean() < 1e-3  # float32 may decide a tie the other way
    found, best = (loss(weight, each, scale, hessian) for each in (codes, expected))
    assert found == pytest.approx(best, rel=1e-3)


def test_one_factorization_gives_the_factor_of_the_inverse() -> None:
    """H = L D L^T in reversed order: D^(-1/2) L^-1, reversed again, is the Cholesky factor of H^-1."""
    _, _, hessian = problem(1, 200, 0)
    order = torch.argsort(hessian.diagonal(), descending=True)
    h = damped(hessian[order][:, order], OPTIONS.damping)
    upper = torch.linalg.cholesky(torch.linalg.inv(h), upper=True)
    found = torch.linalg.inv(torch.linalg.cholesky(h.flip(0, 1))).flip(0, 1)
    assert (found - upper).norm() < 1e-10 * upper.norm()
    unit = _unit_factor(hessian, order.flip(0), OPTIONS.damping)
    expected = torch.linalg.cholesky(h.flip(0, 1))
    assert torch.equal(unit, (expected / expected.diagonal()).float())


# In a process of its own. Not getrusage's ru_maxrss: it starts at what the parent had.
PEAK = """
import torch
from pathlib import Path
from fptquant.quantize.rounding import ROUNDERS, RoundingOptions

def resident(field):
    return 1024 * int(Path("/proc/self/status").read_text().split(field + ":")[1].split()[0])

torch.set_num_threads(1)
for columns in (64, 2048):  # the first call brings in the libraries
    weight, scale, hessian = torch.randn(64, columns), torch.full((64, 1), 0.3), torch.eye(columns) + 0.1
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS")
    ROUNDERS["{name}"](weight, scale, 4, hessian, RoundingOptions(passes=1))
print((resident("VmHWM") - before) / (8 * columns**2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize("name", ["gptq", "quantease"])
def test_rounding_takes_little_memory(name: str) -> None:
    """Beside the Hessian, in float64 matrices of its size: one, one in float32, and what LAPACK needs."""
    done = subprocess.run([sys.executable, "-c", PEAK.format(name=name)], check=True, capture_output=True, text=True)
    assert float(done.stdout) < 3.5


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
