"""What a model family has to tell: where its projections, norms and heads are, and what holds for them."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

from fptquant.wiring.roles import InputGroup, Place, Projection, Role
from fptquant.wiring.shape import Shape

if TYPE_CHECKING:  # the facts are read where nothing heavy may be imported (`fptquant.hf_entries`)
    from torch import nn
    from transformers import PretrainedConfig, PreTrainedModel

    from fptquant.wiring.mixture import Mixture


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
class Architecture:
    """One decoder family: module paths, and facts that transforms and executors depend on.

    Attributes:
        model_type: in config.json.
        name: what its classes in transformers begin with, "Llama".
        models: known ones, for users to read.
        embedding: module path, as those of `layers`, `final_norm` and `head`.
        groups: of a decoder layer that has an MLP, in the order its forward pass reaches them; keys and values come out
            of the first.
        mixture: of experts, in the place of the MLP in some or all layers; then `of` says what holds for a model.
        attention: module path relative to a decoder layer, as that of `mlp`.
        gain_offset: what a norm adds to its weight before it multiplies by it.
        query_norm: path, relative to the attention, of a norm over each head of the queries, before RoPE; None without.
        key_norm: the same of the keys, which are final behind it.
        post_norms: paths of the norms behind attention and MLP, before the residual takes their outputs; None without.
        scales_embedding: whether what is embedded is multiplied by sqrt(hidden).
        activation: attribute of the MLP.
        activation_name: field of the configuration that names it.
        rotary_function: what applies RoPE, in the module of the family's classes.
        interleaved: whether RoPE turns pairs (2j, 2j + 1), not (j, j + head_dim / 2).
        partial_rotary: whether RoPE turns the first `partial_rotary_factor` of each head only, of its parameters.
        rope_layers: field of the configuration that says for each layer whether it has RoPE; None where all have.
        scales_queries: whether queries grow with their position behind RoPE, by two of the `rope_parameters`.
        score_scalar: field of the configuration by whose square root scores are divided; None for sqrt(head_dim).
        score_cap: field of the configuration that bounds scores, by `fptquant.format.softcap`; None without.
        logit_cap: the same of logits.
        float16: whether activations stay within the range of float16.
        impossible: fields of the configuration that have to be off, and what they would mean.
        windows: which layers attend to the last `sliding_window` tokens only, where the configuration names a number:
            none of them; all; or those whose `layer_types` say so.
        multipliers: fields of the configuration by which something is multiplied, and what that is; the weights take
            them in before anything else is done.
        qkv_bias: whether queries, keys and values have biases; or the field of the configuration that says so.
        output_bias: the same of the attention's output, as `mlp_bias` of all of the MLP's.
        lacks: parts for which it has no class in transformers, or none whose modules are these: "MLP", where all layers
            have mixtures, or its projections are fused.
        fused: where files and classes in transformers hold projections fused by rows, which are apart here and in
            checkpoints: by path relative to a decoder layer, the roles whose rows a weight holds, in order.
        class_names: of classes in transformers that aren't called `name` and the part they play ("Model", "Config"),
            by that part.
        mixtures: by layer, the groups of those that have experts; None before `of`, and where a family has none.
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
    mixture: Mixture | None = None
    gain_offset: float = 0.0
    query_norm: str | None = None
    key_norm: str | None = None
    post_norms: tuple[str, str] | None = None
    scales_embedding: bool = False
    activation: str = "act_fn"
    activation_name: str = "hidden_act"
    rotary_function: str = "apply_rotary_pos_emb"
    interleaved: bool = False
    partial_rotary: bool = False
    rope_layers: str | None = None
    scales_queries: bool = False
    score_scalar: str | None = None
    score_cap: str | None = None
    logit_cap: str | None = None
    float16: bool = True
    impossible: Mapping[str, str] = field(default_factory=dict)
    windows: Literal["none", "all", "by type"] = "none"
    multipliers: Mapping[str, Multiplier] = field(default_factory=dict)
    qkv_bias: bool | str = "attention_bias"
    output_bias: bool | str = "attention_bias"
    mlp_bias: bool | str = "mlp_bias"
    lacks: tuple[str, ...] = ()
    fused: Mapping[str, tuple[Role, ...]] = field(default_factory=dict)
    class_names: Mapping[str, str] = field(default_factory=dict)
    mixtures: Mapping[int, tuple[InputGroup, ...]] | None = None

    def of(self, config: PretrainedConfig) -> Architecture:
        """The family as it is in the model of a configuration, which says what layers have experts and how many."""
        if self.mixture is None:
            return self
        before = [group for group in self.groups if not group.first.path.startswith(f"{self.mlp}.")]
        experts = self.mixture.groups(config, self.mlp, self.norm_before(Role.GATE))
        return replace(self, mixtures=dict.fromkeys(self.mixture.layers(config), (*before, *experts)))

    def groups_of(self, layer: int) -> tuple[InputGroup, ...]:
        """Groups of a decoder layer, as `groups`."""
        if self.mixture is None:
            return self.groups
        assert self.mixtures is not None, "experts are counted in a configuration: `of`"
        return self.mixtures.get(layer, self.groups)

    def projections_of(self, layer: int) -> tuple[Projection, ...]:
        """All linear layers of a decoder layer that are quantized, in order."""
        return tuple(projection for group in self.groups_of(layer) for projection in group.members)

    def class_of(self, part: str) -> str:
        """Name of a class in transformers, by the part it plays in the family: "Model", "Attention"."""
        return self.class_names.get(part, f"{self.name}{part}")

    @property
    def class_name(self) -> str:
        """Name of the language model's class in transformers."""
        return self.class_of("ForCausalLM")

    @property
    def projections(self) -> tuple[Projection, ...]:
        """All linear layers of a decoder layer that has an MLP, in order."""
        return tuple(projection for group in self.groups for projection in group.members)

    def shape(self, config: PretrainedConfig) -> Shape:
        """Reads the sizes that transforms need from a configuration."""
        heads, mixture = config.num_attention_heads, self.mixture
        experts = mixture and {
            "experts": getattr(config, mixture.experts),
            "expert_width": getattr(config, mixture.width),
            "shared_width": mixture.shared(config),
            "chosen": getattr(config, mixture.chosen),
            "mixtures": len(mixture.layers(config)),
        }
        head_dim = getattr(config, "head_dim", None) or config.hidden_size // heads
        rotary = config.rope_parameters.get("partial_rotary_factor", 1.0) if self.partial_rotary else 1.0
        return Shape(
            hidden=config.hidden_size,
            intermediate=config.intermediate_size,
            heads=heads,
            kv_heads=getattr(config, "num_key_value_heads", None) or heads,
            head_dim=head_dim,
            layers=config.num_hidden_layers,
            head_norms=self.head_norms,
            interleaved=self.interleaved,
            unrotated_dims=head_dim - int(head_dim * rotary),
            **(experts or {}),
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

    def rope_parameters(self, config: PretrainedConfig, layer: int) -> Mapping[str, Any]:
        """RoPE of a layer, where types of layers may have one each."""
        found: Mapping[str, Any] = config.rope_parameters
        return found if "rope_type" in found else found[config.layer_types[layer]]

    def score_factor(self, config: PretrainedConfig) -> float:
        """What the attention's scores are multiplied by."""
        size = self.shape(config).head_dim if self.score_scalar is None else getattr(config, self.score_scalar)
        return float(size**-0.5)

    def caps(self, config: PretrainedConfig) -> tuple[float | None, float | None]:
        """Bounds of scores and of logits; None without."""
        scores, logits = (None if name is None else getattr(config, name) for name in (self.score_cap, self.logit_cap))
        return scores, logits

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
            yield from (self.projection_name(layer, item) for item in self.projections_of(layer) if item.role in roles)

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

    def stored_name(self, name: str) -> str:
        """Name of a tensor in the files of an original model."""
        for pattern, stored in self.mixture.stored.items() if self.mixture else ():
            name = re.sub(pattern, stored, name)
        return name

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

    def normed_groups(self, layer: int) -> Iterator[tuple[InputGroup, str]]:
        """Groups of a decoder layer that read a norm's output, and the norm's path."""
        for group in self.groups_of(layer):
            if group.norm is not None:
                yield group, group.norm
