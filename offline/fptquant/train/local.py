"""Stage 1: transforms that make the merged weights small where it matters, without data.

    min over transforms of sum over layers ( mean |W~|^p )^(1/p),  p = 4

(FPTQuant, arXiv 2506.04985; method.md 4.1). Weight by weight, and a large one in pieces, so that the graph of one is
in memory at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.errors import FPTQuantError
from fptquant.layers.residency import entered
from fptquant.train.optimization import Optimization
from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING, HEAD, Architecture, Place

ROWS = 1 << 13  # of the embedding or the head that are merged at once


class LocalOptions(BaseModel):
    """Settings of stage 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: NonNegativeInt = Field(0, description="0 leaves the transforms at their starting values")
    p: float = Field(4.0, gt=1, description="exponent of the norm")
    rate: float = Field(1e-2, gt=0)
    rotation_rate: float = Field(1e-2, ge=0, description="of T_r; 0 keeps it at its start")


def weight_norm(pieces: Sequence[Tensor], p: float, merge: Callable[[Tensor], Tensor] = lambda rows: rows) -> Tensor:
    """(mean |w|^p)^(1/p) of what `merge` makes of a weight, with a gradient of 0 where all weights are 0.

    Args:
        pieces: the weight (N, K), cut into rows; several are merged again one by one for the gradient.
        p: exponent.
        merge: of the rows of a piece, by themselves.
    """

    def mean(rows: Tensor) -> Tensor:
        merged = merge(rows)
        # even powers without abs(): its gradient costs another pass
        return (merged.square().square() if p == 4 else merged.abs().pow(p)).mean()

    if len(pieces) == 1:
        found = mean(pieces[0])
    else:
        count = sum(map(len, pieces))
        means = [checkpoint(mean, rows, use_reentrant=False, preserve_rng_state=False) for rows in pieces]
        found = torch.stack([mean * (len(rows) / count) for mean, rows in zip(means, pieces, strict=True)]).sum()
    return found.clamp_min(torch.finfo(found.dtype).tiny).pow(1 / p)


def train_local(
    model: PreTrainedModel,
    architecture: Architecture,
    transforms: TransformSet,
    options: LocalOptions,
    optimization: Optimization,
) -> Iterator[dict[str, float]]:
    """Runs the steps that are left.

    Of several processes, each takes its share of the layers, and gradients are summed.

    Args:
        model: with norms folded and the head untied, transforms not merged.
        architecture: its family.
        transforms: trained in place.
        options: settings.
        optimization: over the transforms' parameters.

    Yields:
        Metrics of each step.

    Raises:
        FPTQuantError: the loss or a gradient is not finite; the layer and the step are named.
    """
    layers = parallel.share(list(enumerate(architecture.layer_modules(model))))
    ends = [(EMBEDDING, architecture.embedding), (HEAD, architecture.head)]

    def backward(place: Place, module: nn.Module, name: str) -> float:
        """Adds the gradients of one weight's loss; returns the loss."""
        weight = module.get_parameter("weight")
        pieces = torch.split(weight, ROWS) if place in (EMBEDDING, HEAD) else (weight,)
        loss = weight_norm(pieces, options.p, lambda rows: transforms.merge(place, rows, None)[0])
        if not bool(torch.isfinite(loss)):
            raise FPTQuantError(
                f"step {optimization.step}: the loss of {name} is not finite; lower local.rate and local.rotation_rate"
            )
        if loss.requires_grad:  # not where no transform reaches it
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    while optimization.step < optimization.steps:
        total = 0.0
        with transforms.reused(torch.float32):
            for index, layer in layers:
                with entered(layer):
                    for projection in reversed(architecture.projections_of(index)):
                        module = layer.get_submodule(projection.path)
                        total += backward(projection.at(index), module, architecture.projection_name(index, projection))
            if options.rotation_rate > 0 and any(transform.shared for transform in transforms):
                for place, path in parallel.share(ends):
                    with entered(model.get_submodule(path)) as module:
                        total += backward(place, module, path)
        total = parallel.sum_gradients(optimization.parameters.values(), total)
        norms = optimization.update()
        yield {"loss": total, **{f"gradient/{name}": norm for name, norm in norms.items()}}
