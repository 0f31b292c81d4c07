"""Which parts of a model quantization hurts most, one at a time."""

from fptquant.sensitivity.measure import Effect, Probe
from fptquant.sensitivity.sites import KINDS, Site, sites_of

__all__ = ["KINDS", "Effect", "Probe", "Site", "sites_of"]
