"""Stage 1: transforms that make the merged weights small where it matters, without data.

    min over transforms of sum over layers ( mean |W~|^p )^(1/p),  p = 4

(FPTQuant, arXiv 2506.04985; method.md 4.1). Weight by weight, so that the graph of one is in memory at a time. A step
sees some rows of the embedding and the head, and a part of the layers: their mean over steps is the objective.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.errors import FPTQuantError
from fptquant.layers.residency import entered
from fptquant.options.train import LocalOptions
from fptquant.train.optimization import Optimization
from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING, HEAD, Architecture, Place

ROWS = 1 << 12  # of the embedding and of the head that a step sees


def weight_norm(weight: Tensor, p: float) -> Tensor:
    """(mean |w|^p)^(1/p), with a gradient of 0 where all weights are 0."""
    # even powers without abs(): its gradient costs another pass
    mean = (weight.square().square() if p == 4 else weight.abs().pow(p)).mean()
    return mean.clamp_min(torch.finfo(mean.dtype).tiny).pow(1 / p)


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
        Metrics of each step; the loss is of what it sees, the layers' times the number of turns.

    Raises:
        FPTQuantError: the loss or a gradient is not finite; the layer and the step are named.
    """
    layers = list(enumerate(architecture.layer_modules(model)))
    turns = options.turns_of(len(layers))
    ends = [(EMBEDDING, architecture.embedding), (HEAD, architecture.head)]

    def backward(place: Place, weight: Tensor, name: str, factor: int = 1) -> float:
        """Adds the gradients of one weight's loss; returns the loss."""
        loss = factor * weight_norm(transforms.merge(place, weight, None)[0], options.p)
        if not bool(torch.isfinite(loss)):
            raise FPTQuantError(
                f"step {optimization.step}: the loss of {name} is not finite; lower local.rate and local.rotation_rate"
            )
        if loss.requires_grad:  # not where no transform reaches it
            loss.backward()  # type: ignore[no-untyped-call]
        return float(loss.detach())

    def some_rows(weight: Tensor) -> Tensor:
        """`ROWS` of an embedding's or a head's, at random; the same in each process, others in each step."""
        if len(weight) <= ROWS:
            return weight
        generator = torch.Generator().manual_seed(optimization.step)
        rows = torch.randperm(len(weight), generator=generator)[:ROWS].sort().values
        return weight[rows.to(weight.device)]

    while optimization.step < optimization.steps:
        total = 0.0
        with transforms.reused(torch.float32):
            for index, layer in parallel.share(layers[optimization.step % turns :: turns]):
                with entered(layer):
                    for projection in reversed(architecture.projections_of(index)):
                        name = architecture.projection_name(index, projection)
                        weight = layer.get_submodule(projection.path).get_parameter("weight")
                        total += backward(projection.at(index), weight, name, turns)
            if options.rotation_rate > 0 and any(transform.shared for transform in transforms):
                for place, path in parallel.share(ends):
                    with entered(model.get_submodule(path)) as module:
                        total += backward(place, some_rows(module.get_parameter("weight")), path)
        total = parallel.sum_gradients(optimization.parameters.values(), total)
        norms = optimization.update()
        yield {"loss": total, **{f"gradient/{name}": norm for name, norm in norms.items()}}
