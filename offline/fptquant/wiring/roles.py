"""What a weight is and where it stands: roles, places, and the groups of linear layers that read one tensor."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum


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
    ROUTER = "router"
    SHARED_GATE = "shared_gate"
    HEAD = "head"


SHARED = -1  # number of the expert that every token goes through


@dataclass(frozen=True)
class Place:
    """Where a weight stands in a model."""

    role: Role
    layer: int = -1  # -1 outside the layers
    expert: int | None = None  # its number in a mixture


EMBEDDING, HEAD = Place(Role.EMBEDDING), Place(Role.HEAD)


@dataclass(frozen=True)
class Projection:
    """A linear layer of a decoder layer."""

    role: Role
    path: str  # of the module, relative to the decoder layer
    expert: int | None = None  # which expert of a mixture it belongs to

    def at(self, layer: int) -> Place:
        """Its place in the decoder layer of this index."""
        return Place(self.role, layer, self.expert)


@dataclass(frozen=True)
class InputGroup:
    """Linear layers that read the same tensor; they share its quantizer, and are fused when served."""

    name: str  # in reports and overrides: "qkv"
    members: tuple[Projection, ...]
    norm: str | None = None  # path of the norm whose output they read; None where that isn't a norm's
    readers: tuple[Projection, ...] = ()  # linear layers that read the tensor, too, and stay in floating point

    @property
    def first(self) -> Projection:
        """The member that stands for all."""
        return self.members[0]

    @property
    def by_expert(self) -> list[tuple[Projection, ...]]:
        """The members of each expert, in order; all of them where there are no experts."""
        found: dict[int | None, list[Projection]] = {}
        for projection in self.members:
            found.setdefault(projection.expert, []).append(projection)
        return [tuple(members) for members in found.values()]
