"""Spends a budget of extra bits where it helps most."""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

from transformers import PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.format import Override, WeightScheme, row_bytes
from fptquant.options.sensitivity import INPUTS, WEIGHTS
from fptquant.progress import Stages
from fptquant.recipe import BudgetOptions
from fptquant.run.checks import in_every_expert
from fptquant.run.job import Job, with_recipe
from fptquant.run.sizes import linear_sizes
from fptquant.sensitivity.measure import WIDE_INPUT, Effect, Probe, widened
from fptquant.sensitivity.sites import Site, sites_of
from fptquant.wiring import SHARED


@dataclass(frozen=True)
class Choice:
    """A site that gets more bits."""

    site: Site
    narrow: Effect  # quantized alone at the recipe's precision
    wide: Effect  # quantized alone at the wide precision
    extra_bytes: int

    @property
    def gain(self) -> float:
        """KL divergence saved, measured with everything else in floating point."""
        return self.narrow.kl - self.wide.kl


@dataclass(frozen=True)
class Spending:
    """What a budget bought."""

    budget: BudgetOptions
    choices: tuple[Choice, ...]
    before: Effect  # the whole model quantized by the recipe, fitted to the unquantized model
    after: Effect  # the same with the choices

    def to_dict(self) -> dict[str, Any]:
        """JSON types, as written to `fptquant/budget.json`."""
        return {
            "budget": self.budget.model_dump(mode="json"),
            "before": asdict(self.before),
            "after": asdict(self.after),
            "choices": [
                {
                    "kind": choice.site.kind,
                    "layer": choice.site.layer,
                    "gain": choice.gain,
                    "extra_bytes": choice.extra_bytes,
                }
                for choice in self.choices
            ],
        }


def spend(job: Job, model: PreTrainedModel, stages: Stages | None = None) -> tuple[Job, Spending]:
    """Measures the sensitivity of a model and turns the recipe's budget into overrides.

    Greedy by gain per cost: gains are measured one site at a time, and add up well enough to order the sites. The
    cost of a site is 1 under `sites`, its bytes under `extra_bytes`, and under `target_kl` the number of weights that
    are multiplied at more bits.

    Args:
        job: with a budget in its recipe.
        model: with merged weights and the simulation installed, nothing quantized.
        stages: progress.

    Returns:
        The job with overrides in place of the budget (transforms as they are), and what was chosen.

    Raises:
        FPTQuantError: nothing can be widened, or the target is out of reach.
    """
    stages, budget = stages or Stages(), job.recipe.budget
    assert budget is not None
    candidates = _candidates(job, budget)
    if not candidates:
        raise FPTQuantError(f"budget: nothing that '{job.recipe.name}' quantizes can be widened any further")
    windows = job.windows[: budget.windows, : budget.length]
    probe = Probe(job, model, windows, WeightScheme(bits=budget.weight_bits))
    everything, smaller = sites_of(job), "lower budget.windows or budget.length"
    with stages.stage("fit every site", "lower calibration.sequences or calibration.length"):
        for _ in stages.track(probe.calibrate(everything), job.layers):
            pass
    with stages.stage("measure sites", smaller):
        measured = stages.track(((site, probe.measure({site: False})) for site in candidates), len(candidates))
        ranked = _by_gain_per_cost(list(measured), probe, _cost(job, budget), lambda site: _extra_bytes(job, site))
    with stages.stage("spend the budget", smaller):
        before = probe.measure(dict.fromkeys(everything, False))

        def effect(choices: Iterable[Choice]) -> Effect:
            return probe.measure({**dict.fromkeys(everything, False), **{choice.site: True for choice in choices}})

        choices = _choose(ranked, budget, before, effect)
        after = effect(choices)
    overrides = (*job.recipe.overrides, *_overrides(job, budget, choices))
    recipe = job.recipe.changed("budget", budget=None, overrides=[o.model_dump(mode="json") for o in overrides])
    return with_recipe(job, recipe), Spending(budget, choices, before, after)


def _candidates(job: Job, budget: BudgetOptions) -> list[Site]:
    """Sites that may be widened and are not that wide already.

    Experts with quantized inputs keep the bits of their weights: no kernel on GPUs would compute others.
    """
    inputs = budget.inputs and budget.extra_bytes is None  # they cost none
    found = []
    for site in sites_of(job, (*(INPUTS if inputs else ()), *(WEIGHTS if budget.weights else ()))):
        scheme = site.scheme(job)
        assert scheme is not None
        experts = any(projection.expert not in (None, SHARED) for projection in site.projections(job))
        if site.is_weights and experts and scheme.activations.bits < 16:
            continue
        bits = scheme.activations.bits if site.is_input else scheme.weights.bits
        if bits < (WIDE_INPUT.bits if site.is_input else budget.weight_bits):
            found.append(site)
    return found


def _cost(job: Job, budget: BudgetOptions) -> Callable[[Site], float]:
    if budget.sites is not None:
        return lambda site: 1.0
    if budget.extra_bytes is not None:
        return lambda site: max(1.0, _extra_bytes(job, site))
    sizes = linear_sizes(job.source)
    return lambda site: float(sum(sizes[name][0] * sizes[name][1] for name in site.modules(job)))


def _extra_bytes(job: Job, site: Site) -> int:
    """By how much the checkpoint grows; 7-bit weights are stored like 8-bit ones, activations aren't stored."""
    if not site.is_weights:
        return 0
    scheme, wide, sizes = site.scheme(job), WeightScheme(bits=8), linear_sizes(job.source)
    assert scheme is not None
    shapes = [sizes[name] for name in site.modules(job)]
    return sum(rows * (row_bytes(wide, k) - row_bytes(scheme.weights, k)) for rows, k in shapes)


def _by_gain_per_cost(
    measured: list[tuple[Site, Effect]],
    probe: Probe,
    cost: Callable[[Site], float],
    extra_bytes: Callable[[Site], int],
) -> Iterator[Choice]:
    """Sites by falling gain per cost; what they are worth at the wide precision is measured only when it matters.

    A site's own divergence bounds its gain from above, so a site whose gain is known and tops all bounds comes next.
    """
    heap: list[tuple[float, int, Site, Effect, Choice | None]] = [
        (-narrow.kl / cost(site), index, site, narrow, None) for index, (site, narrow) in enumerate(measured)
    ]
    heapq.heapify(heap)
    while heap:
        _, index, site, narrow, known = heapq.heappop(heap)
        if known is not None:
            yield known
            continue
        choice = Choice(site, narrow, probe.measure({site: True}), extra_bytes(site))
        heapq.heappush(heap, (-choice.gain / cost(site), index, site, narrow, choice))


def _choose(
    ranked: Iterator[Choice], budget: BudgetOptions, before: Effect, effect: Callable[[Iterable[Choice]], Effect]
) -> tuple[Choice, ...]:
    worthwhile = (choice for choice in ranked if choice.gain > 0)
    if budget.target_kl is not None:
        return _reach(worthwhile, budget.target_kl, before, effect)
    chosen: list[Choice] = []
    spent = 0
    for choice in worthwhile:
        if budget.sites is not None and len(chosen) == budget.sites:
            break
        if budget.extra_bytes is None or spent + choice.extra_bytes <= budget.extra_bytes:
            chosen.append(choice)
            spent += choice.extra_bytes
    return tuple(chosen)


def _reach(
    ranked: Iterator[Choice], target: float, before: Effect, effect: Callable[[Iterable[Choice]], Effect]
) -> tuple[Choice, ...]:
    """The shortest run of `ranked` from its start with which the whole model is within `target`.

    The run is doubled until it is long enough, then bisected.
    """
    if before.kl <= target:
        return ()
    chosen: list[Choice] = []
    short, kl = 0, before.kl
    while kl > target:
        short = len(chosen)
        chosen += [choice for _, choice in zip(range(max(1, short)), ranked, strict=False)]
        if len(chosen) == short:
            raise FPTQuantError(
                f"budget: target_kl {target:g} is out of reach: from {before.kl:.4g}, all {short} sites that help "
                f"lead to {kl:.4g}"
            )
        kl = effect(chosen).kl
    long = len(chosen)
    while long - short > 1:
        middle = (short + long) // 2
        short, long = (short, middle) if effect(chosen[:middle]).kl <= target else (middle, long)
    return tuple(chosen[:long])


def _overrides(job: Job, budget: BudgetOptions, choices: Iterable[Choice]) -> Iterator[Override]:
    """One per linear layer, or for all experts of a layer: those that share an input get the same."""
    for choice in choices:
        for name in dict.fromkeys(_patterns(job, choice.site)):
            if choice.site.is_input:
                scheme = choice.site.scheme(job)
                assert scheme is not None
                yield Override(modules=name, activations=widened(scheme.activations))
            else:
                yield Override(modules=name, weights=WeightScheme(bits=budget.weight_bits))


def _patterns(job: Job, site: Site) -> Iterator[str]:
    """Of a site's linear layers: names, or one pattern for all experts."""
    for name, projection in zip(site.modules(job), site.projections(job), strict=True):
        if projection.expert in (None, SHARED):
            yield name
        else:
            yield f"re:{in_every_expert(projection, name)}$"
