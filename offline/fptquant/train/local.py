"""Stage 1: transforms that make the merged weights small where it matters, without data.

    min over transforms of sum over layers ( mean |W~|^p )^(1/p),  p = 4

(FPTQuant, arXiv 2506.04985; method.md 4.1). Layer by layer, so that one layer's graph is in memory at a time.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from pydantic import BaseModel, ConfigDict, Field, NonNegativeInt
from torch import Tensor
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.errors import FPTQuantError
from fptquant.layers.residency import entered
from fptquant.train.optimization import Optimization
from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING, HEAD, Architecture


class LocalOptions(BaseModel):
    """Settings of stage 1."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    steps: NonNegativeInt = Field(0, description="0 leaves the transforms at their starting values")
    p: float = Field(4.0, gt=1, description="exponent of the norm")
    rate: float = Field(1e-2, gt=0)
    rotation_rate: float = Field(1e-2, ge=0, description="of T_r; 0 keeps it at its start")


def weight_norm(weight: Tensor, p: float) -> Tensor:
    """(mean |w|^p)^(1/p), with a gradient of 0 where all weights are 0."""
    # even powers without abs(): its gradient costs another pass
    powers = weight.square().square() if p == 4 else weight.abs().pow(p)
    return powers.mean().clamp_min(torch.finfo(powers.dtype).tiny).pow(1 / p)


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
    while optimization.step < optimization.steps:
        total = 0.0
        with transforms.reused(torch.float32):
            for index, layer in layers:
                terms = []
                with entered(layer):
                    for projection in architecture.projections_of(index):
                        weight = layer.get_submodule(projection.path).get_parameter("weight")
                        merged, _ = transforms.merge(projection.at(index), weight, None)
                        terms.append(weight_norm(merged, options.p))
                    total += _backward(
                        sum(terms[1:], start=terms[0]), optimization.step, architecture.layer_name(index)
                    )
            if options.rotation_rate > 0 and any(transform.shared for transform in transforms):
                for place, path in parallel.share(ends):
                    with entered(model.get_submodule(path)) as module:
                        weight = module.get_parameter("weight")
                        loss = weight_norm(transforms.merge(place, weight, None)[0], options.p)
                        total += _backward(loss, optimization.step, path)
        total = parallel.sum_gradients(optimization.parameters.values(), total)
        norms = optimization.update()
        yield {"loss": total, **{f"gradient/{name}": norm for name, norm in norms.items()}}


def _backward(loss: Tensor, step: int, where: str) -> float:
    if not bool(torch.isfinite(loss)):
        raise FPTQuantError(f"step {step}: the loss of {where} is not finite; lower local.rate and local.rotation_rate")
    loss.backward()  # type: ignore[no-untyped-call]
    return float(loss.detach())
