"""What becomes of the head: whether it is quantized, and whether it still has the embedding's weight."""

from __future__ import annotations

from fptquant.format import ActivationScheme, CheckpointConfig, Override, WeightScheme, match_name
from fptquant.loading import Source
from fptquant.recipe import Recipe
from fptquant.transforms import TransformSet


def head_scheme(head: str, recipe: Recipe) -> tuple[tuple[Override, ...], tuple[str, ...]]:
    """What the configuration says of the layer named `head`: an override, or that it is ignored."""
    if any(match_name(head, name) for name in recipe.ignore):
        return (), ()
    if recipe.head_bits == 16 or recipe.precision.activations.bits == 16:
        return (), (head,)  # integer weights alone would make nothing faster
    weights, activations = WeightScheme(bits=recipe.head_bits), ActivationScheme(bits=8)
    return (Override(modules=head, weights=weights, activations=activations),), ()


def was_tied(source: Source) -> bool:
    """Whether the head of an unquantized source has the embedding's weight."""
    family = source.architecture
    shared = source.names[f"{family.head}.weight"] == source.names[f"{family.embedding}.weight"]
    return shared or bool(source.config.tie_word_embeddings)


def untied_by(source: Source, config: CheckpointConfig, transforms: TransformSet) -> str | None:
    """Why a head that has the embedding's weight gets one of its own; None where it keeps it.

    Where it does, the final norm keeps its gain, which otherwise goes into the head.
    """
    if config.scheme_for(source.architecture.head) is not None:
        return "it is quantized, and the embedding isn't"
    if not source.config.tie_word_embeddings:
        return "multipliers make it another one than the embedding's"
    names = ", ".join(transform.name for transform in transforms if transform.shared)
    return f"the final norm's gain goes into it, because {names} rotates what the norm reads" if names else None
