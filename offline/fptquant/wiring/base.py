"""What a model family has to tell: where its projections, norms and heads are, and what holds for them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:  # the facts are read where nothing heavy may be imported (`fptquant.hf_entries`)
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


@dataclass(frozen=True)
class Place:
    """Where a weight stands in a model."""

    role: Role
    layer: int = -1  # -1 outside the layers


EMBEDDING, HEAD = Place(Role.EMBEDDING), Place(Role.HEAD)


@dataclass(frozen=True)
class Projection:
    """A linear layer of a decoder layer."""

    role: Role
    path: str  # of the module, relative to the decoder layer

    def at(self, layer: int) -> Place:
        """Its place in the decoder layer of this index."""
        return Place(self.role, layer)


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that read the same tensor; they share its quantizer, and are fused when served."""

    name: str  # in reports and overrides: "qkv"
    members: tuple[Projection, ...]
    norm: str | None = None  # path of the norm whose output they read; None where that isn't a norm's

    @property
    def first(self) -> Projection:
        """The member that stands for all."""
        return self.members[0]


@dataclass(frozen=True)
class Multiplier:
    """A number by which a model multiplies what comes out of some weights: their factor is its power of the exponent.

    Attributes:
        roles: of the weights, with their biases.
        exponent: -1 where the model divides.
        of_scores: whether it stands in the place of 1 / sqrt(head_dim), by which attention scores are multiplied.
    """

    roles: tuple[Role, ...]
    exponent: int = 1
    of_scores: bool = False


@dataclass(frozen=True)
class Shape:
    """Sizes the transforms need, and what holds for queries and keys."""

    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    layers: int
    head_norms: bool = False  # queries and keys are normed before RoPE, head by head
    interleaved: bool = False  # RoPE turns (2j, 2j + 1), not (j, j + head_dim / 2)
    unrotated: tuple[int, ...] = ()  # layers without RoPE


@dataclass(frozen=True)
class Architecture:
    """One decoder family: module paths, and facts that transforms and executors depend on.

    Attributes:
        model_type: in config.json.
        name: what its classes in transformers begin with, "Llama".
        models: known ones, for users to read.
        embedding: module path, as those of `layers`, `final_norm` and `head`.
        groups: of a decoder layer, in the order its forward pass reaches them; keys and values come out of the first.
        attention: module path relative to a decoder layer, as that of `mlp`.
        gain_offset: what a norm adds to its weight before it multiplies by it.
        query_norm: path, relative to the attention, of a norm over each head of the queries, before RoPE; None without.
        key_norm: the same of the keys, which are final behind it.
        post_norms: whether blocks end in norms, before their outputs are added to the residual.
        activation: attribute of the MLP.
        rotary_function: what applies RoPE, in the module of the family's classes.
        interleaved: whether RoPE turns pairs (2j, 2j + 1), not (j, j + head_dim / 2).
        rope_layers: field of the configuration that says for each layer whether it has RoPE; None where all have.
        scales_queries: whether queries grow with their position behind RoPE, by two of the `rope_parameters`.
        windows: which layers attend to the last `sliding_window` tokens only, where the configuration names a number:
            none of them; all; or those whose `layer_types` say so.
        multipliers: fields of the configuration by which something is multiplied, and what that is; the weights take
            them in before anything else is done.
        qkv_bias: whether queries, keys and values have biases; or the field of the configuration that says so.
        output_bias: the same of the attention's output, as `mlp_bias` of all of the MLP's.
        class_names: of classes in transformers that aren't called `name` and the part they play ("Model", "Config"),
            by that part.
    """

    model_type: str
    name: str
    models: str
    embedding: str
    layers: str
    final_norm: str
    head: str
    attention: str
    mlp: str
    groups: tuple[InputGroup, ...]
    gain_offset: float = 0.0
    query_norm: str | None = None
    key_norm: str | None = None
    post_norms: bool = False
    activation: str = "act_fn"
    rotary_function: str = "apply_rotary_pos_emb"
    interleaved: bool = False
    rope_layers: str | None = None
    scales_queries: bool = False
    windows: Literal["none", "all", "by type"] = "none"
    multipliers: Mapping[str, Multiplier] = field(default_factory=dict)
    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    class_names: Mapping[str, str] = field(default_factory=dict)

    def class_of(self, part: str) -> str:
        """Name of a class in transformers, by the part it plays in the family: "Model", "Attention"."""
        return self.class_names.get(part, f"{self.name}{part}")

    @property
    def class_name(self) -> str:
        """Name of the language model's class in transformers."""
        return self.class_of("ForCausalLM")

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All linear layers of a decoder layer, in order."""
        return tuple(projection for group in self.groups for projection in group.members)

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
            head_norms=self.head_norms,
            interleaved=self.interleaved,
            unrotated=tuple(i for i in range(config.num_hidden_layers) if not self.has_rope(config, i)),
        )

    @property
    def head_norms(self) -> bool:
        """Whether queries and keys are normed before RoPE, head by head."""
        return self.query_norm is not None or self.key_norm is not None

    def window(self, config: PretrainedConfig, layer: int) -> int | None:
        """How many tokens a layer attends to, its own among them; None for all."""
        sliding = self.windows == "all" or (
            self.windows == "by type" and config.layer_types[layer] == "sliding_attention"
        )
        return config.sliding_window if sliding else None

    def has_rope(self, config: PretrainedConfig, layer: int) -> bool:
        """Whether a layer turns queries and keys by their positions."""
        return self.rope_layers is None or bool(getattr(config, self.rope_layers)[layer])

    def query_scaling(self, config: PretrainedConfig) -> tuple[float, int] | None:
        """Arguments of `fptquant.format.position_scale`, which multiplies queries behind RoPE; None without."""
        if not self.scales_queries:
            return None
        found = config.rope_parameters
        return found["llama_4_scaling_beta"], found["original_max_position_embeddings"]

    def neutral(self, config: PretrainedConfig, name: str) -> float:
        """The value of a multiplier by which nothing is changed, beside the weights that it was taken into."""
        return float(self.shape(config).head_dim ** -0.5) if self.multipliers[name].of_scores else 1.0

    def factors(self, config: PretrainedConfig) -> dict[str, float]:
        """By the full name of a weight or bias, the factor by which it takes the configuration's multipliers in."""
        found: dict[str, float] = {}
        for name, multiplier in self.multipliers.items():
            factor = (getattr(config, name) / self.neutral(config, name)) ** multiplier.exponent
            for module in self._modules_of(multiplier.roles, self.shape(config).layers):
                for tensor in (f"{module}.weight", f"{module}.bias"):
                    found[tensor] = found.get(tensor, 1.0) * factor
        return found

    def _modules_of(self, roles: tuple[Role, ...], layers: int) -> Iterator[str]:
        for role, name in ((Role.EMBEDDING, self.embedding), (Role.HEAD, self.head)):
            if role in roles:
                yield name
        for layer in range(layers):
            yield from (self.projection_name(layer, item) for item in self.projections if item.role in roles)

    def layer_modules(self, model: PreTrainedModel) -> list[nn.Module]:
        """The decoder layers in order."""
        return list(model.get_submodule(self.layers).children())

    def layer_name(self, layer: int) -> str:
        """Full name of a decoder layer."""
        return f"{self.layers}.{layer}"

    def projection_name(self, layer: int, projection: Projection) -> str:
        """Full name of a linear layer, as in the checkpoint."""
        return f"{self.layer_name(layer)}.{projection.path}"

    def group_names(self, layer: int, group: InputGroup) -> list[str]:
        """Full names of a group's linear layers."""
        return [self.projection_name(layer, projection) for projection in group.members]

    def attention_name(self, layer: int) -> str:
        """Full name of a layer's attention module."""
        return f"{self.layer_name(layer)}.{self.attention}"

    def projection_of(self, role: Role) -> Projection:
        """The first linear layer of this role."""
        return next(member for group in self.groups for member in group.members if member.role is role)

    def path_within(self, module: str, role: Role) -> str:
        """Path of `projection_of(role)` relative to `module` (`attention` or `mlp`), which computes with it."""
        return self.projection_of(role).path.removeprefix(f"{module}.")

    @property
    def keys_before_rope(self) -> str:
        """Path, relative to a decoder layer, of the module whose output RoPE turns into keys."""
        return self.projection_of(Role.KEY).path if self.key_norm is None else f"{self.attention}.{self.key_norm}"

    def norm_before(self, role: Role) -> str | None:
        """Path of the norm whose output `projection_of(role)` reads; None where that isn't a norm's."""
        return next(group.norm for group in self.groups for member in group.members if member.role is role)

    def head_norm_places(self, layer: int) -> Iterator[tuple[Place, str]]:
        """Places whose outputs are normed, head by head, and the norm's path relative to the decoder layer."""
        for role, norm in ((Role.QUERY, self.query_norm), (Role.KEY, self.key_norm)):
            if norm is not None:
                yield Place(role, layer), f"{self.attention}.{norm}"

    def normed_groups(self) -> Iterator[tuple[InputGroup, str]]:
        """Groups that read a norm's output, and the norm's path."""
        for group in self.groups:
            if group.norm is not None:
                yield group, group.norm


@dataclass(frozen=True)
class Fused:
    """A family that is another one once its weights are split by rows; as which it is read, quantized and served.

    Attributes:
        model_type: in config.json.
        name: what its classes in transformers begin with, "Phi3".
        models: known ones, for users to read.
        family: what it is without windows.
        windowed: what it is where `sliding_window` is set, which all of its layers look at.
        weights: by path relative to a decoder layer, the roles whose projections' rows a weight holds, in order.
    """

    model_type: str
    name: str
    models: str
    family: Architecture
    windowed: Architecture
    weights: Mapping[str, tuple[Role, ...]]

    @property
    def class_name(self) -> str:
        """Name of the language model's class in transformers."""
        return f"{self.name}ForCausalLM"

    def becomes(self, config: Mapping[str, Any]) -> Architecture:
        """The family that a model is, by the content of its config.json."""
        return self.windowed if config.get("sliding_window") else self.family
