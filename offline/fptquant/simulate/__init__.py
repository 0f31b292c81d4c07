"""The quantized model in plain torch, on top of the Hugging Face classes: what the served model must equal."""

from fptquant.simulate.attention import ATTENTION_NAME, KVQuantizer
from fptquant.simulate.install import install_simulation, simulated_linears
from fptquant.simulate.linear import SimulatedLinear

__all__ = ["ATTENTION_NAME", "KVQuantizer", "SimulatedLinear", "install_simulation", "simulated_linears"]
