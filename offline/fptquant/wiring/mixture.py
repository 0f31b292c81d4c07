"""What a family with mixtures of experts has to tell: what counts them, and what they are called in files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from fptquant.wiring.roles import SHARED, InputGroup, Projection, Role

if TYPE_CHECKING:
    from transformers import PretrainedConfig


@dataclass(frozen=True)
class Mixture:
    """A router and experts in the place of an MLP, whose modules have the same names in all families of ours.

    Within the MLP, `gate` is the router and `experts.N` are the experts, each with three projections as an MLP has
    them; `shared_expert` is one that every token goes through, times the sigmoid of what `shared_expert_gate` puts out.

    Attributes:
        experts: field of the configuration that says how many there are.
        chosen: how many of them a token goes through.
        width: field that has the intermediate size of an expert.
        shared_width: of the shared expert; None without one.
        renormalized: whether the weights of the chosen ones are made to add up to one; or the field that says so.
        step: field by which layers have a mixture whose number, from one, it divides; None where all have.
        without: field that lists layers that have an MLP in its place, from zero.
        stored: by a regular expression of a tensor's name here, its name in the files, as `re.sub` takes both.
    """

    experts: str = "num_experts"
    chosen: str = "num_experts_per_tok"
    width: str = "moe_intermediate_size"
    shared_width: str | None = None
    renormalized: bool | str = "norm_topk_prob"
    step: str | None = "decoder_sparse_step"
    without: str | None = "mlp_only_layers"
    stored: Mapping[str, str] = field(default_factory=dict)

    def layers(self, config: PretrainedConfig) -> frozenset[int]:
        """Which layers have a mixture."""
        step = 1 if self.step is None else getattr(config, self.step)
        without = () if self.without is None else getattr(config, self.without) or ()
        numbers = range(config.num_hidden_layers) if getattr(config, self.experts) else ()
        return frozenset(layer for layer in numbers if layer not in without and (layer + 1) % step == 0)

    def shared(self, config: PretrainedConfig) -> int:
        """Intermediate size of the shared expert; 0 without one."""
        return 0 if self.shared_width is None else getattr(config, self.shared_width)

    def renormalizes(self, config: PretrainedConfig) -> bool:
        """Whether the weights of a token's experts are made to add up to one."""
        found = self.renormalized
        return bool(getattr(config, found)) if isinstance(found, str) else found

    def groups(self, config: PretrainedConfig, mlp: str, norm: str | None) -> tuple[InputGroup, ...]:
        """Of a mixture: all experts read one input; what enters an expert's down projection is its own.

        Args:
            config: says how many experts there are.
            mlp: path of the mixture, relative to the decoder layer.
            norm: path of the norm whose output it reads.
        """
        paths = {number: f"{mlp}.experts.{number}" for number in range(getattr(config, self.experts))}
        readers = [Projection(Role.ROUTER, f"{mlp}.gate")]
        if self.shared(config):
            paths[SHARED] = f"{mlp}.shared_expert"
            readers.append(Projection(Role.SHARED_GATE, f"{mlp}.shared_expert_gate"))
        members = tuple(
            Projection(role, f"{path}.{name}", number)
            for number, path in paths.items()
            for role, name in ((Role.GATE, "gate_proj"), (Role.UP, "up_proj"))
        )
        down = [Projection(Role.DOWN, f"{path}.down_proj", number) for number, path in paths.items()]
        return (
            InputGroup("gate_up", members, norm, tuple(readers)),
            *(InputGroup("shared_down" if item.expert == SHARED else "down", (item,)) for item in down),
        )
