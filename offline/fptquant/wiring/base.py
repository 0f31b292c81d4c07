"""What a model family has to tell: where its projections, norms and heads are."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum

from torch import nn
from transformers import PretrainedConfig, PreTrainedModel


class Role(Enum):
    """Part a weight plays; transforms address weights by role, never by name."""

    EMBEDDING = "embedding"
    QUERY = "q"
    KEY = "k"
    VALUE = "v"
    OUTPUT = "o"
    GATE = "gate"
    UP = "up"
    DOWN = "down"
    HEAD = "head"


# Linear layers that read the same tensor, in the order the forward pass reaches them.
INPUT_GROUPS: tuple[tuple[Role, ...], ...] = (
    (Role.QUERY, Role.KEY, Role.VALUE),
    (Role.OUTPUT,),
    (Role.GATE, Role.UP),
    (Role.DOWN,),
)


@dataclass(frozen=True)
class Shape:
    """Sizes the transforms need."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int


@dataclass(frozen=True)
class Architecture:
    """Module paths of one decoder family (pre-norm, RMSNorm, RoPE with rotated halves, gated MLP)."""

    model_type: str
    class_name: str
    embedding: str
    layers: str
    final_norm: str
    head: str
    attention: str  # the rest are relative to a layer
    attention_norm: str
    mlp_norm: str
    projections: dict[Role, str]

    def shape(self, config: PretrainedConfig) -> Shape:
        """Sizes from a configuration."""
        heads = config.num_attention_heads
        return Shape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=getattr(config, "head_dim", None) or config.hidden_size // heads,
            layers=config.num_hidden_layers,
        )

    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder layers in order."""
        return list(model.get_submodule(self.layers).children())

    def projection_name(self, layer: int, role: Role) -> str:
        """Full name of a linear layer, as in the checkpoint."""
        return f"{self.layers}.{layer}.{self.projections[role]}"

    def attention_name(self, layer: int) -> str:
        """Full name of a layer's attention module."""
        return f"{self.layers}.{layer}.{self.attention}"

    def norm_before(self, role: Role) -> str:
        """Path within a layer of the norm whose output the role's sub-block reads."""
        attention = (Role.QUERY, Role.KEY, Role.VALUE, Role.OUTPUT)
        return self.attention_norm if role in attention else self.mlp_norm
