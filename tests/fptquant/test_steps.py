"""The list of steps: where they come from, and what has no place in it."""

from __future__ import annotations

import pytest
import torch

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from fptquant.format.arithmetic import block_hadamard, hadamard_factors
from fptquant.format.steps import (
    Bias,
    Hadamard,
    Offset,
    Product,
    Quantize,
    RowScale,
    Shift,
    Step,
    Undo,
    arrange,
    in_floating_point,
    linear_steps,
)
from fptquant.simulate import SimulatedLinear
from tests.steps import Branch, Mystery

BOTH = {"transforms": {"down_hadamard": {"block": 16}, "residual_scale": True}}
SCHEME = CheckpointConfig().scheme_for("x")
QUANTIZE, PRODUCT = linear_steps(SCHEME)[:2]


@pytest.mark.parametrize("prefix", ["", "model.layers.3.mlp.", "language_model.model.layers.0.mlp.experts.7."])
def test_what_is_around_which_layer(prefix: str) -> None:
    config = CheckpointConfig.model_validate(BOTH)
    product = (Quantize(config.activations), Product(SCHEME))
    assert config.steps_for(f"{prefix}down_proj") == (RowScale(), Hadamard(16), *product, Undo(), Bias())
    assert config.steps_for(f"{prefix}o_proj") == (RowScale(), *product, Undo(), Bias())
    for name in ("q_proj", "gate_proj", "updown_proj", "down_proj.inner"):
        assert config.steps_for(prefix + name) == (*product, Bias())
    assert config.steps_for("lm_head") == (Product(None), Bias())
    assert CheckpointConfig().steps_for(f"{prefix}down_proj") == (*product, Bias())


def test_nothing_is_quantized_at_16_bits_or_in_floating_point() -> None:
    config = CheckpointConfig.model_validate({**BOTH, "activations": {"bits": 16}, "ignore": ["o_proj"]})
    steps = config.steps_for("down_proj")
    assert not any(isinstance(step, Quantize) for step in steps)
    assert config.steps_for("o_proj") == (RowScale(), Product(None), Undo(), Bias())
    assert in_floating_point(steps) == (RowScale(), Hadamard(16), Product(None), Undo(), Bias())


def test_steps_nest_from_the_outside_in() -> None:
    steps = linear_steps(SCHEME, (RowScale(), Undo(), Hadamard(8), Branch()))
    assert steps == (RowScale(), Hadamard(8), QUANTIZE, PRODUCT, Branch(), Undo(), Bias())
    arrangement = arrange(steps)
    assert arrangement.scaled and arrangement.undone and arrangement.online == (Hadamard(8), Branch())
    assert not arrangement.shifted


def test_a_shift_is_next_to_what_is_quantized() -> None:
    config = CheckpointConfig.model_validate({"activations": {"shift": True}, "ignore": ["a"]})
    scheme = config.scheme_for("x")
    steps = linear_steps(scheme, (RowScale(), Undo(), Hadamard(8), Branch()))
    product = (Shift(), Quantize(config.activations), Product(scheme), Offset())
    assert steps == (RowScale(), Hadamard(8), *product, Branch(), Undo(), Bias())
    assert arrange(steps).shifted and in_floating_point(config.steps_for("x")) == (Product(None), Bias())
    assert config.steps_for("a") == (Product(None), Bias())
    found = arrange(config.steps_for("x")).tensors(64, 6)
    assert found["input_shift"].shape == (64,) and found["output_offset"].shape == (6,)
    assert CheckpointConfig.parse(config.to_dict()) == config
    assert "shift" not in CheckpointConfig().to_dict()["activations"]  # of which earlier versions know nothing
    with pytest.raises(FPTQuantError, match="shift is of what is quantized"):
        CheckpointConfig.parse({"activations": {"bits": 16, "shift": True}})


@pytest.mark.parametrize("bits", [4, 7, 8])
def test_tensors_of_a_layer(bits: int) -> None:
    config = CheckpointConfig.model_validate({"weights": {"bits": bits}, "activations": {"symmetric": False}})
    found = arrange((*linear_steps(config.scheme_for("x"), (Branch(),)),)).tensors(42, 6)
    assert {name: (tensor.shape, tensor.dtype) for name, tensor in found.items()} == {
        "weight_packed": ((6, 6 if bits == 4 else 11), torch.int32),
        "weight_scale": ((6, 1), torch.float32),
        "weight_shape": ((2,), torch.int64),
        "input_scale": ((), torch.float32),
        "input_zero_point": ((), torch.int32),
        "branch_in": ((3, 42), torch.float32),
        "branch_out": ((6, 3), torch.float32),
    }
    assert list(found)[0] == "weight_packed"


BAD: list[tuple[Step, ...]] = [
    (QUANTIZE, PRODUCT, Mystery(), Bias()),
    (Mystery(), QUANTIZE, PRODUCT, Bias()),
    (QUANTIZE, QUANTIZE, PRODUCT, Bias()),
    (QUANTIZE, Hadamard(8), PRODUCT, Bias()),
    (Hadamard(8), RowScale(), QUANTIZE, PRODUCT, Undo(), Bias()),
    (RowScale(), QUANTIZE, PRODUCT, Undo(), Branch(), Bias()),
    (QUANTIZE, PRODUCT, Undo(), Bias()),
    (QUANTIZE, PRODUCT, Bias(), Bias()),
    (QUANTIZE, PRODUCT),
    (QUANTIZE, Bias()),
]


@pytest.mark.parametrize("steps", BAD, ids=lambda steps: " ".join(type(step).__name__ for step in steps))
def test_what_has_no_place_is_refused(steps: tuple[Step, ...]) -> None:
    with pytest.raises(FPTQuantError, match="^a.down_proj: .*(can't compute the step|lack).*: upgrade vllm-fptquant$"):
        arrange(steps, "a.down_proj")
    with pytest.raises(FPTQuantError, match=": upgrade vllm-fptquant"):
        SimulatedLinear(8, 8, False, steps)


def test_splitting_over_input_features() -> None:
    assert Hadamard(16).split_refusal(48, 2) is None
    assert "use a size that divides 3, or" in str(Hadamard(16).split_refusal(24, 2))
    assert PRODUCT.split_refusal(12, 1) is None and PRODUCT.split_refusal(16, 2) is None
    assert "8 weights in a packed word" in str(PRODUCT.split_refusal(12, 2))
    assert Product(None).split_refusal(3, 2) is None


@pytest.mark.parametrize("exact", [False, True])
def test_hadamard_is_the_formats(exact: bool) -> None:
    x = torch.randn(3, 64, requires_grad=True)
    found = Hadamard(16).bind({}, x.device, exact)(x)
    factors = hadamard_factors(16, torch.float64 if exact else torch.float32)
    assert torch.equal(found, block_hadamard(x, *factors)) and found.dtype == torch.float32
    (gradient,) = torch.autograd.grad(found.square().sum(), x)
    torch.testing.assert_close(gradient, 2 * x.detach())  # an orthonormal matrix keeps lengths


@pytest.mark.parametrize("step", [Hadamard(16), Branch()], ids=str)
def test_homogeneous_steps_change_places_with_s(step: Hadamard | Branch) -> None:
    assert step.homogeneous
    x, y, S = torch.randn(5, 32), torch.randn(5, 6), torch.rand(5, 1) + 0.5
    tensors = {tensor.name: torch.randn(tensor.shape) for tensor in step.tensors(32, 6)}
    run = step.bind(tensors, x.device, True)
    if isinstance(step, Hadamard):
        torch.testing.assert_close(run(x * S), run(x) * S)
    else:
        torch.testing.assert_close(run(y * S, x * S), run(y, x) * S)
