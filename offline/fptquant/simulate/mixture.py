"""A mixture of experts with a linear layer for each projection of each expert, in the place of a family's own.

transformers keeps all experts in two tensors. Here each projection is a module, as in a checkpoint, that may become a
`SimulatedLinear`. With float weights it computes what the family's own does.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.activations import ACT2FN

from fptquant.format.routing import float_linear, mixture, route
from fptquant.simulate.mlp import GatedMLP, linear_of
from fptquant.wiring import SHARED, Architecture, Role


class SparseMLP(nn.Module):
    """Router and experts; `format.routing` has what is computed."""

    def __init__(self, gate: nn.Linear, experts: nn.ModuleList, count: int, renormalize: bool) -> None:
        """Takes the parts.

        Args:
            gate: the router.
            experts: each a `GatedMLP`.
            count: how many a token goes through.
            renormalize: whether their weights are made to add up to one.
        """
        super().__init__()
        self.gate, self.experts, self.count, self.renormalize = gate, experts, count, renormalize
        self.shared_expert: nn.Module | None = None
        self.shared_expert_gate: nn.Module | None = None
        self.exact = False  # see `fptquant.simulate.install.set_exact`
        self.routed: Tensor | None = None  # tokens of the calibration text that each expert got, (experts,)

    def expert(self, number: int) -> nn.Module:
        """One of the experts, or the shared one (`SHARED`)."""
        found = self.shared_expert if number == SHARED else self.experts[number]
        assert found is not None
        return found

    def route(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Weights and numbers (tokens, count) of the experts that each row of `x` (tokens, hidden) goes through."""
        return route(self._read(self.gate, x), self.count, self.renormalize)

    def shared_weight(self, x: Tensor) -> Tensor:
        """What the shared expert's output is multiplied by, (..., 1), of `x` (..., hidden)."""
        assert self.shared_expert_gate is not None
        return torch.sigmoid(self._read(self.shared_expert_gate, x))

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Args: x (..., hidden), and S (..., 1) where down projections scale by it. Returns: (..., hidden)."""
        rows = x.reshape(-1, x.shape[-1])
        scales = None if scale is None else scale.reshape(-1, 1)

        def through(number: int, tokens: Tensor) -> Tensor:
            y: Tensor = self.experts[number](rows[tokens], None if scales is None else scales[tokens])
            return y

        y = mixture(*self.route(rows), x.shape[-1], through)
        if self.shared_expert is not None:
            y = y + self.shared_weight(rows) * self.shared_expert(rows, scales)
        return y.view(x.shape).to(x.dtype)

    def _read(self, reader: nn.Module, x: Tensor) -> Tensor:
        if self.exact:
            return float_linear(x, reader.get_parameter("weight"), exact=True)
        y: Tensor = reader(x).float()
        return y


@torch.no_grad()
def separate_projections(model: PreTrainedModel, architecture: Architecture) -> PreTrainedModel:
    """Gives each projection a linear layer of its own where a family's classes hold several in one tensor; in place.

    In the place of each of a model's mixtures is a `SparseMLP` then, of an MLP whose gate and up projections are fused,
    a `GatedMLP`; they share its tensors.

    Args:
        model: of transformers' own classes, on any device.
        architecture: its family, `of` its configuration; most have nothing to separate.

    Returns:
        The model.
    """
    if architecture.mixture is not None or architecture.fused:
        for index, layer in enumerate(architecture.layer_modules(model)):
            before = layer.get_submodule(architecture.mlp)
            if isinstance(before, SparseMLP | GatedMLP):
                continue
            if index in (architecture.mixtures or ()):
                layer.set_submodule(architecture.mlp, _separated(before, architecture, model.config))
            elif architecture.fused:
                layer.set_submodule(architecture.mlp, _split(before, architecture, model.config))
    return model


def _split(before: nn.Module, architecture: Architecture, config: PretrainedConfig) -> GatedMLP:
    (path,) = architecture.fused  # gate and up, in this order
    both = before.get_parameter(f"{path.removeprefix(f'{architecture.mlp}.')}.weight")
    gate, up = (linear_of(rows) for rows in both.chunk(2))
    down = before.get_submodule(architecture.path_within(architecture.mlp, Role.DOWN))
    assert isinstance(down, nn.Linear)
    return GatedMLP(gate, up, down, ACT2FN[config.hidden_act]).train(before.training)


def _separated(before: nn.Module, architecture: Architecture, config: PretrainedConfig) -> SparseMLP:
    facts = architecture.mixture
    assert facts is not None
    activation = ACT2FN[config.hidden_act]
    width = getattr(config, facts.width)
    experts = before.get_submodule("experts")
    found = []
    for both, down in zip(experts.get_parameter("gate_up_proj"), experts.get_parameter("down_proj"), strict=True):
        found.append(GatedMLP(linear_of(both[:width]), linear_of(both[width:]), linear_of(down), activation))
    gate = linear_of(before.get_submodule("gate").get_parameter("weight"))
    result = SparseMLP(gate, nn.ModuleList(found), getattr(config, facts.chosen), facts.renormalizes(config))
    if facts.shared(config):
        shared = before.get_submodule("shared_expert")
        gate, up, down = (linear_of(shared.get_parameter(f"{name}_proj.weight")) for name in ("gate", "up", "down"))
        result.shared_expert = GatedMLP(gate, up, down, activation)
        result.shared_expert_gate = linear_of(before.get_submodule("shared_expert_gate").get_parameter("weight"))
    return result.train(before.training)
