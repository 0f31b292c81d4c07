"""Sites: what can be quantized by itself."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

from fptquant.errors import unknown
from fptquant.format import LinearScheme
from fptquant.run.job import Job
from fptquant.wiring import Projection

GROUPS = ("qkv", "o", "gate_up", "down")  # names of input groups (`fptquant.wiring`)
INPUTS = tuple(f"{name}_input" for name in GROUPS)
WEIGHTS = tuple(f"{name}_weights" for name in GROUPS)
CACHES = {"keys": "k", "values": "v"}
KINDS = (*INPUTS, *WEIGHTS, *CACHES)


@dataclass(frozen=True, order=True)
class Site:
    """An input, the weights that share it, or keys or values of one layer."""

    kind: str  # one of KINDS
    layer: int

    def projections(self, job: Job) -> tuple[Projection, ...]:
        """Linear layers that an input or weights site belongs to; none for keys and values."""
        name = self.kind.removesuffix("_input").removesuffix("_weights")
        groups = [group for group in job.source.architecture.groups if group.name == name]
        return groups[0].members if groups else ()

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

    def scheme(self, job: Job) -> LinearScheme | None:
        """How the job quantizes the linear layers; None for layers in floating point, and for keys and values."""
        modules = self.modules(job)
        return job.config.scheme_for(modules[0]) if modules else None


def sites_of(job: Job, kinds: Iterable[str] = KINDS) -> list[Site]:
    """Every site of the given kinds that the job quantizes, kind by kind.

    Raises:
        FPTQuantError: a kind that is not in `KINDS`.
    """
    found = []
    for kind in kinds:
        if kind not in KINDS:
            raise unknown("site kind", kind, KINDS)
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
