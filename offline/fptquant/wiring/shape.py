"""Sizes of a model."""

from __future__ import annotations

from dataclasses import dataclass

from fptquant.wiring.roles import SHARED


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
    unrotated_dims: int = 0  # the last ones of each head, which RoPE leaves as they are
    experts: int = 0  # of each mixture, apart from a shared one
    expert_width: int = 0  # intermediate size of an expert
    shared_width: int = 0  # of the shared expert
    chosen: int = 0  # experts that a token goes through
    mixtures: int = 0  # layers that have a mixture in the place of an MLP

    def width(self, expert: int | None) -> int:
        """Intermediate size of an MLP (None), a shared expert, or any other one."""
        if expert is None:
            return self.intermediate
        return self.shared_width if expert == SHARED else self.expert_width

    @property
    def active_width(self) -> int:
        """Intermediate numbers that a layer computes for a token, at most."""
        return max(self.widths[0], self.chosen * self.expert_width + self.shared_width)

    @property
    def widths(self) -> tuple[int, ...]:
        """All intermediate sizes in the model."""
        found = [self.intermediate] if self.mixtures < self.layers else []
        if self.mixtures:
            found += [self.expert_width, self.shared_width] if self.shared_width else [self.expert_width]
        return tuple(found)
