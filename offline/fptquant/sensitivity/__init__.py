"""Which parts of a model quantization hurts most, one at a time, and where a few more bits are worth their cost."""

from fptquant.options.sensitivity import KINDS
from fptquant.sensitivity.budget import Spending, spend
from fptquant.sensitivity.measure import Effect, Probe
from fptquant.sensitivity.sites import Site, require_measurable, sites_of

__all__ = ["KINDS", "Effect", "Probe", "Site", "Spending", "require_measurable", "sites_of", "spend"]
