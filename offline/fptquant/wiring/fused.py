"""What a family has to tell that is another one once its weights are split by rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from fptquant.wiring.base import Architecture
from fptquant.wiring.roles import Role


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
