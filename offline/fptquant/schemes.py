"""What is quantized how: recipes ask for it, checkpoints say it. Nothing here imports torch."""

from __future__ import annotations

import re
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    SerializerFunctionWrapHandler,
    model_serializer,
    model_validator,
)


class Strict(BaseModel):
    """Base of every model of the format: unknown fields are errors, values are immutable.

    Attributes:
        later: fields that later versions brought. They are left out where they have their default, so that older
            readers, which refuse unknown fields by name, read what they can.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    later: ClassVar[tuple[str, ...]] = ()

    @model_serializer(mode="wrap")
    def _without_unused(self, serialize: SerializerFunctionWrapHandler) -> dict[str, Any]:
        content: dict[str, Any] = serialize(self)
        for name in self.later:
            if getattr(self, name) == type(self).model_fields[name].default:
                content.pop(name, None)
        return content


def _check_pattern(pattern: str) -> str:
    if pattern.startswith("re:"):
        try:
            re.compile(pattern.removeprefix("re:"))
        except re.error as error:
            raise ValueError(f"'{pattern}' is no regular expression: {error}") from None
    return pattern


# A module's full name, or "re:" and a regular expression that matches from its start.
ModulePattern = Annotated[str, AfterValidator(_check_pattern)]


def match_name(module: str, pattern: str) -> bool:
    """Whether a module's full name is `pattern`, or matches its regular expression after "re:" from the start."""
    if pattern.startswith("re:"):
        return re.match(pattern.removeprefix("re:"), module) is not None
    return module == pattern


class WeightScheme(Strict):
    """Integer weights: symmetric, one scale per output channel.

    7 bits is the widest that FBGEMM multiplies without saturating on CPUs that have no VNNI; it is stored like 8.

    With strategy "group", 4-bit codes are multiplied by a number from 1 to 8 for each group of inputs (QServe's
    progressive scales, arXiv 2405.04532): the products are 7-bit codes, which are all that kernels know of.
    """

    bits: Literal[4, 7, 8] = 4
    symmetric: Literal[True] = True
    strategy: Literal["channel", "group"] = "channel"
    group_size: Literal[32, 64, 128] | None = None

    later = ("group_size",)

    @model_validator(mode="after")
    def _groups_of_four_bits(self) -> WeightScheme:
        if (self.strategy == "group") != (self.group_size is not None):
            raise ValueError("strategy 'group' and group_size (32, 64 or 128) belong together")
        if self.group_size is not None and self.bits != 4:
            raise ValueError(f"groups are of 4-bit weights, not of {self.bits} bits")
        return self

    @property
    def code_bits(self) -> int:
        """Width of the codes that are multiplied by activations."""
        return self.bits if self.group_size is None else 7

    @property
    def label(self) -> str:
        """Names the scheme for users to read: `w4`, or `w4g64` with groups."""
        return f"w{self.bits}" + ("" if self.group_size is None else f"g{self.group_size}")


class Shifted(Strict):
    """What may lose a constant of each channel before it is quantized."""

    bits: Literal[4, 8, 16] = 8
    shift: bool = False

    later = ("shift",)

    @model_validator(mode="after")
    def _something_to_shift(self) -> Self:
        if self.shift and self.bits == 16:
            raise ValueError("shift is of what is quantized, not of 16 bits")
        return self


class ActivationScheme(Shifted):
    """Static activations, one scale per tensor. 16 bits means "not quantized".

    With `shift`, `fptquant.format.steps.Shift` comes before, and `Offset` brings back behind the product what it gives.
    """

    symmetric: bool = True
    strategy: Literal["tensor"] = "tensor"
    dynamic: Literal[False] = False


class KVCacheScheme(Shifted):
    """Static KV cache; keys are quantized after RoPE. 16 bits means "not quantized".

    With `shift`, all keys lose the same, which no weight of a softmax depends on.
    """

    symmetric: bool = False
    strategy: Literal["tensor", "head"] = "tensor"


class LinearScheme(Strict):
    """What is quantized at one linear layer."""

    weights: WeightScheme
    activations: ActivationScheme


class Override(Strict):
    """An exception for the modules whose name equals `modules` or matches its `re:` pattern."""

    modules: ModulePattern
    weights: WeightScheme | None = None
    activations: ActivationScheme | None = None

    @model_validator(mode="after")
    def _changes_something(self) -> Override:
        if self.weights is None and self.activations is None:
            raise ValueError(f"'{self.modules}': give weights or activations")
        return self


def power_of_two(block: int) -> int:
    """`block`, the size of a Hadamard's blocks; ValueError when it is no power of two."""
    if block & (block - 1):
        raise ValueError(f"block must be a power of two, got {block}")
    return block
