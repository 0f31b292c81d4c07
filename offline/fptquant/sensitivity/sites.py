"""Sites: what can be quantized by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fptquant.format import LinearScheme
from fptquant.options.sensitivity import CACHES, INPUTS, KINDS, WEIGHTS, require_kinds
from fptquant.run.checks import require_alike_experts
from fptquant.run.job import Job
from fptquant.wiring import SHARED, InputGroup, Projection


@dataclass(frozen=True, order=True)
class Site:
    """An input, the weights that share it, or keys or values of one layer.

    What enters the down projections of a layer's experts is one site, of as many inputs, since GPUs serve experts that
    are quantized alike; that of a shared expert is another.
    """

    kind: str  # one of KINDS
    layer: int

    def groups(self, job: Job) -> list[InputGroup]:
        """Of its linear layers: several where each expert of a mixture has an input of its own."""
        name = self.kind.removesuffix("_input").removesuffix("_weights")
        return [group for group in job.source.architecture.groups_of(self.layer) if group.name == name]

    def projections(self, job: Job) -> tuple[Projection, ...]:
        """Linear layers that an input or weights site belongs to; none for keys and values."""
        return tuple(projection for group in self.groups(job) for projection in group.members)

    @property
    def is_input(self) -> bool:
        """Whether this is what linear layers read."""
        return self.kind in INPUTS

    @property
    def is_weights(self) -> bool:
        """Whether these are the weights of linear layers."""
        return self.kind in WEIGHTS

    def modules(self, job: Job) -> list[str]:
        """Full names of the linear layers."""
        architecture = job.source.architecture
        return [architecture.projection_name(self.layer, projection) for projection in self.projections(job)]

    def watched(self, job: Job) -> str | None:
        """Module whose input is an input site's at all tokens; None where each expert of a mixture has its own."""
        architecture, group = job.source.architecture, self.groups(job)[0]
        if group.first.expert in (None, SHARED):
            return architecture.projection_name(self.layer, group.first)
        return None if group.norm is None else f"{architecture.layer_name(self.layer)}.{architecture.mlp}"

    def scheme(self, job: Job) -> LinearScheme | None:
        """How the job quantizes the linear layers; None for layers in floating point, and for keys and values."""
        modules = self.modules(job)
        return job.config.scheme_for(modules[0]) if modules else None


def require_measurable(job: Job) -> None:
    """Refuses jobs in which what would be one site is quantized in several ways.

    Raises:
        FPTQuantError: experts of a layer are quantized differently.
    """
    require_alike_experts(job.source, job.config, "sensitivity")


def sites_of(job: Job, kinds: Iterable[str] = KINDS) -> list[Site]:
    """Every site of the given kinds that the job quantizes, kind by kind.

    Raises:
        FPTQuantError: a kind that is not in `KINDS`.
    """
    kinds = tuple(kinds)
    require_kinds(kinds)
    found = []
    for kind in kinds:
        for layer in range(job.layers):
            site = Site(kind, layer)
            scheme = site.scheme(job)
            if kind in CACHES:
                quantized = job.config.kv_cache.bits < 16
            else:
                quantized = scheme is not None and (site.is_weights or scheme.activations.bits < 16)
            if quantized:
                found.append(site)
    return found
