"""Quantizers with gradients: values as the simulation's, gradients as the papers'."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from fptquant.format import code_bounds, quantize
from fptquant.quantize import channel_scale, log_clip_of
from fptquant.train.fake_quant import (
    StaticQuantizer,
    fake_quantize,
)


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 2**16), bits=st.sampled_from([4, 8]), zero=st.integers(-8, 7))
def test_values_are_those_of_the_simulation(seed: int, bits: int, zero: int) -> None:
    x = torch.randn(7, 9, generator=torch.Generator().manual_seed(seed)) * 3
    scale = torch.tensor(0.11)
    low, high = code_bounds(torch.tensor(zero), bits)
    expected = quantize(x, scale, low, high) * scale
    assert torch.equal(fake_quantize(x, scale, low, high), expected)
    assert torch.equal(fake_quantize(x, scale, low, high, "trust"), expected)


def test_gradients_are_straight_through_and_lsq() -> None:
    """One value below the range, two inside, two above: of these one by less than half a step."""
    x = torch.tensor([-1.3, 0.12, 0.57, 0.74, 2.0], requires_grad=True)
    scale = torch.tensor(0.1, requires_grad=True)
    low, high = torch.tensor(-8.0, requires_grad=True), torch.tensor(7.0, requires_grad=True)
    weight = torch.tensor([1.0, 2.0, 3.0, 4.0, 5.0])
    (fake_quantize(x, scale, low, high) * weight).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 2.0, 3.0, 0.0, 0.0]))
    assert torch.isclose(scale.grad, torch.tensor(-8.0 + 2 * (1 - 1.2) + 3 * (6 - 5.7) + (4 + 5) * 7.0), atol=1e-4)
    assert torch.isclose(low.grad, torch.tensor(0.1)) and torch.isclose(high.grad, torch.tensor(0.9))
    x.grad = None
    (fake_quantize(x, scale, low, high, "trust") * weight).sum().backward()
    assert torch.equal(x.grad, torch.tensor([0.0, 2.0, 3.0, 4.0, 0.0]))


def test_learning_a_range_lowers_the_error() -> None:
    x = torch.randn(4000, generator=torch.Generator().manual_seed(0)) + 1
    quantizer = StaticQuantizer(torch.tensor(2.0), torch.tensor(0.0), 4)
    optimizer = torch.optim.Adam(
        [{"params": [quantizer.log_scale], "lr": 0.05}, {"params": [quantizer.zero_point], "lr": 0.2}]
    )
    before = (quantizer(x) - x).square().mean()
    for _ in range(100):
        optimizer.zero_grad()
        (quantizer(x) - x).square().mean().backward()
        optimizer.step()
    assert (quantizer(x) - x).square().mean() < 0.1 * before
    scale, zero_point = quantizer.values()
    codes = quantize(x, scale, *code_bounds(zero_point, 4))
    assert torch.allclose(codes * scale, quantizer(x))


@pytest.mark.parametrize("bits", [4, 8])
@pytest.mark.parametrize("groups", [1, 3])
def test_clipping_follows_the_weight(bits: int, groups: int) -> None:
    weight = torch.randn(6, 12, generator=torch.Generator().manual_seed(2))
    scale = torch.rand(6, groups) * 0.1 + 0.01
    clip = log_clip_of(scale, weight, bits)
    assert torch.allclose(channel_scale(weight, clip, bits), scale)
    assert torch.allclose(channel_scale(3 * weight, clip, bits), 3 * scale)
