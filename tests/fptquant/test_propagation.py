"""Weights that make up for what earlier layers lost."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from fptquant import parallel
from fptquant.calibration import propagation
from fptquant.calibration.halves import LayerParts
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.moments import observe_inputs, second_moment
from fptquant.calibration.propagation import Deviation, compensated, halves
from fptquant.layers.constants import record_sink
from fptquant.layers.inputs import first_inputs, through_layers
from fptquant.recipe import Recipe
from fptquant.run.models import transformed
from fptquant.simulate import SimulatedLinear
from fptquant.transforms import FPTQUANT
from tests.fptquant.test_families import make_job, possible

HIDDEN, OUT, TOKENS = 24, 10, 400


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


PARTS = ([slice(0, TOKENS // 2)], [slice(TOKENS // 2, TOKENS)])
WEIGHT, SEEN = random(OUT, HIDDEN), random(TOKENS, HIDDEN)


def lost(weight: Tensor, seen: Tensor, deviation: Deviation) -> float:
    """Mean square of what is still missing with other weights."""
    wanted = nn.functional.linear(seen + deviation.read, WEIGHT)
    if deviation.residual is not None:
        wanted = wanted + deviation.residual
    return float((nn.functional.linear(seen, weight) - wanted).square().mean())


def test_a_linear_error_is_made_up_for() -> None:
    error = 0.1 * random(HIDDEN, HIDDEN + 1)[:, :HIDDEN]
    added = 0.1 * random(OUT, HIDDEN)
    deviation = Deviation(SEEN @ error.T, SEEN @ added.T)
    found, _ = compensated(WEIGHT, SEEN, deviation, 1e-6, PARTS)
    torch.testing.assert_close(found, WEIGHT + WEIGHT @ error + added, atol=1e-4, rtol=0)
    without, _ = compensated(WEIGHT, SEEN, Deviation(deviation.read), 1e-6, PARTS)
    torch.testing.assert_close(without, WEIGHT + WEIGHT @ error, atol=1e-4, rtol=0)


def test_noise_is_left_alone() -> None:
    """A least-squares fit takes up noise: of new tokens, more is lost than before."""
    few = slice(0, 80)
    noise = 0.3 * random(TOKENS, HIDDEN + 7)[:, :HIDDEN]
    fitted, new = Deviation(noise[few]), Deviation(noise[80:])
    found, _ = compensated(WEIGHT, SEEN[few], fitted, 1e-6, halves(80, 8))
    hessian, cross = SEEN[few].T @ SEEN[few], (fitted.read @ WEIGHT.T).T @ SEEN[few]
    plain = WEIGHT + torch.linalg.solve(hessian, cross.T).T
    before = lost(WEIGHT, SEEN[80:], new)
    assert lost(found, SEEN[80:], new) < 1.03 * before < 1.1 * before < lost(plain, SEEN[80:], new)


def test_tokens_count_as_often_as_they_weigh() -> None:
    deviation = Deviation(0.2 * random(TOKENS, HIDDEN + 2)[:, :HIDDEN] + 0.3 * SEEN)
    weights = torch.ones(TOKENS)
    weights[::5] = 2.0
    twice = torch.arange(TOKENS).repeat_interleave(weights.long())
    middle = int((twice < TOKENS // 2).sum())
    apart = ([slice(0, middle)], [slice(middle, len(twice))])
    found, _ = compensated(WEIGHT, SEEN, deviation, 0.01, PARTS, weights)
    expected, _ = compensated(WEIGHT, SEEN[twice], Deviation(deviation.read[twice]), 0.01, apart)
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-4)
    assert not torch.allclose(found, compensated(WEIGHT, SEEN, deviation, 0.01, PARTS)[0], atol=1e-3)


@pytest.mark.parametrize("importance", [None, random(TOKENS).abs()], ids=["alike", "weighed"])
def test_many_outputs_find_what_few_do(importance: Tensor | None) -> None:
    """With more outputs than half the inputs, the product with the weights comes last; rows don't see it."""
    weight, deviation = random(2 * HIDDEN, HIDDEN), Deviation(0.3 * SEEN + random(TOKENS, HIDDEN))
    before = deviation.read.clone()
    hessian, found = propagation._moments(weight, SEEN, deviation, importance, PARTS[0])
    some = [propagation._moments(rows, SEEN, deviation, importance, PARTS[0]) for rows in weight.split(HIDDEN // 3)]
    torch.testing.assert_close(found, torch.cat([rows for _, rows in some]), atol=1e-4, rtol=1e-5)
    assert torch.equal(hessian, some[0][0]) and torch.equal(deviation.read, before)


def test_one_sequence_is_nothing_to_try_it_on() -> None:
    deviation = Deviation(0.3 * SEEN)
    assert compensated(WEIGHT, SEEN, deviation, 0.01, halves(TOKENS, 1))[0] is WEIGHT
    assert compensated(WEIGHT, SEEN, deviation, 0.01, halves(TOKENS, 2))[0] is not WEIGHT


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen2_moe"])
def test_one_pass_reads_what_passes_of_their_own_do(variant: str, tmp_path: Path) -> None:
    """Of a layer that doesn't change, bit for bit, and takes its inputs to the same place."""
    transforms = possible(variant, FPTQUANT)
    job = make_job(variant, tmp_path, transforms=transforms, calibration={"sequences": 5, "length": 32})
    model, family = transformed(job), job.source.architecture
    record_sink(model, family, job.windows)
    layer = family.layer_modules(model)[0]
    apart, together = (LayerParts(layer, family, first_inputs(model, family, job.windows)) for _ in range(2))
    for group in family.groups_of(0):
        linear = layer.get_submodule(group.first.path)
        assert isinstance(linear, SimulatedLinear)
        expected = observe_inputs(linear, *apart.on_the_way_to(group.first))
        assert torch.equal(together.read_by(group.first), expected)
    for parts in (apart, together):
        parts.finish()
    for one, other in zip(apart._inputs.hidden, together._inputs.hidden, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("variant", ["llama", "gemma2", "qwen2_moe"])
def test_less_is_lost_behind_all_layers(variant: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On the calibration text, of every kind of layer; what was changed is what is rounded."""
    changes: list[float] = []
    plain = propagation.compensated

    def watched(weight: Tensor, seen: Tensor, *arguments: Any) -> tuple[Tensor, Tensor]:
        found, squares = plain(weight, seen, *arguments)
        changes.append(float((found - weight).norm() / weight.norm()))
        torch.testing.assert_close(squares / len(seen), second_moment(seen, arguments[-1]), atol=1e-5, rtol=1e-5)
        return found, squares

    monkeypatch.setattr(propagation, "compensated", watched)
    errors = []
    for how in ("none", "compensated"):
        rounding = {"method": "gptq", "propagation": how}
        calibration = {"sequences": 12, "length": 64}
        fields = {"transforms": possible(variant, FPTQUANT), "rounding": rounding, "calibration": calibration}
        job = make_job(variant, tmp_path / how, precision="w4a8kv8", **fields)
        model, original = transformed(job), transformed(job)
        family = job.source.architecture
        record_sink(model, family, job.windows)
        list(calibrate_and_round(model, family, job.recipe, job.windows, original=original))
        states = []
        for each in (original, model):
            inputs = first_inputs(each, family, job.windows)
            list(through_layers(each, family, inputs))
            states.append(torch.cat(inputs.hidden)[:, 1:])
        errors.append(float((states[1] - states[0]).norm() / states[0].norm()))
    assert errors[1] < 0.99 * errors[0]
    assert changes
    assert max(changes) > 0.001


def test_rounding_to_nearest_looks_at_no_inputs() -> None:
    """As `--rounding nearest` makes it of a recipe that compensates."""
    recipe = Recipe.load("fptquant-light")
    assert recipe.rounding.compensates
    assert not recipe.changed(rounding={"method": "nearest"}).rounding.compensates


def test_halves_are_the_same_in_several_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    """Five sequences of two tokens, alone and as three and two."""
    whole = halves(10, 5)
    joined: list[list[int]] = [[], []]
    for rank, (sequences, offset) in enumerate(((3, 0), (2, 6))):
        monkeypatch.setattr(parallel, "ranks", lambda rank=rank: (rank, 2))
        monkeypatch.setattr(parallel, "sizes", lambda size: [3, 2])
        for number, part in enumerate(halves(2 * sequences, sequences)):
            joined[number] += [offset + token for rows in part for token in range(10)[rows]]
    assert joined == [[token for rows in part for token in range(10)[rows]] for part in whole]
