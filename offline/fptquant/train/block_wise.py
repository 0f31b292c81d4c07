"""Training layer by layer: each quantized layer's output against the original's (OmniQuant, arXiv 2308.13137).

The quantized layer reads what the quantized layers before it put out, the original what the original ones do.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.layers.inputs import LayerInputs, first_inputs
from fptquant.layers.residency import entered
from fptquant.options.train import BlockWiseOptions
from fptquant.train.end_to_end import batch
from fptquant.train.optimization import Optimization, transform_groups
from fptquant.train.student import Student
from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING


def train_block_wise(
    student: Student,
    original: PreTrainedModel,
    transforms: TransformSet,
    options: BlockWiseOptions,
    windows: Tensor,
    seed: int,
    finished: int = 0,
) -> Iterator[dict[str, float]]:
    """Trains the layers in order.

    Args:
        student: trained in place.
        original: the unquantized model.
        transforms: those that the student's weights go through.
        options: settings.
        windows: (sequences, length) tokens to train on.
        seed: order of the sequences.
        finished: layers that are trained already.

    Yields:
        Metrics of each step: the squared error relative to the mean square of the original's output.

    Raises:
        FPTQuantError: the loss or a gradient is not finite; the layer and the step are named.
    """
    architecture = student.architecture
    student.freeze()
    layers, targets = architecture.layer_modules(student.model), architecture.layer_modules(original)
    inputs = first_inputs(student.model, architecture, windows)
    expected = first_inputs(original, architecture, windows)
    for index, (layer, target) in enumerate(zip(layers, targets, strict=True)):
        with entered(target):
            expected.advance(target)
        with entered(layer):
            if index >= finished:
                optimization = _optimization(student, transforms, options, index)
                while optimization.step < options.steps:
                    start = time.perf_counter()
                    chosen = batch(optimization.step, options.batch, len(windows), seed + index)
                    try:
                        loss = _step(layer, inputs, expected, chosen, transforms, optimization.step)
                        if options.mask == "gradual":
                            _keep_to_the_band(optimization)
                        optimization.update()
                    except FPTQuantError as error:
                        raise FPTQuantError(f"{architecture.layer_name(index)}: {error}") from None
                    yield {"layer": index, "loss": loss, "seconds": round(time.perf_counter() - start, 2)}
                for parameter in optimization.parameters.values():
                    parameter.requires_grad_(False)
            inputs.advance(layer)


def _optimization(student: Student, transforms: TransformSet, options: BlockWiseOptions, index: int) -> Optimization:
    """Over one layer's clipping and all transforms; those of other layers get no gradient and have no moments."""
    prefix = f"{student.architecture.layer_name(index)}."
    clipping = {name: value for name, value in student.weight_parameters().items() if name.startswith(prefix)}
    groups = transform_groups(transforms, options.transform_rate, rotation_rate=0.0)
    groups["weight"] = (options.weight_rate, clipping)
    return Optimization(groups, options.steps, warmup=options.warmup, clip=options.clip)


def _keep_to_the_band(optimization: Optimization) -> None:
    """Takes gradients of rotations per head off where they are too far from the diagonal.

    AffineQuant (arXiv 2403.12544) masks its matrices so, with a band that widens by the step, for the sake of their
    inverses. Products of rotations and scales have inverses; what is left of it is the order of training.
    """
    share = (optimization.step + 1) / optimization.steps
    for name, parameter in optimization.parameters.items():
        if name.endswith((".left", ".right")) and parameter.grad is not None:
            index = torch.arange(parameter.shape[-1], device=parameter.device)
            parameter.grad *= (index[:, None] - index).abs() <= share * len(index)


def _step(
    layer: nn.Module,
    inputs: LayerInputs,
    expected: LayerInputs,
    chosen: list[int],
    transforms: TransformSet,
    step: int,
) -> float:
    """Gradients of a step; its loss."""
    total = 0.0
    with transforms.reused(torch.float32):
        for sequence in chosen:
            with torch.no_grad():  # rotated as the student's residual is
                (target,) = expected.sequence(sequence).hidden
                goal = transforms.inputs(EMBEDDING, target)
            (found,) = inputs.sequence(sequence).run(layer)
            error, size = (found - goal)[:, inputs.first :], goal[:, inputs.first :]
            loss = error.square().mean() / size.square().mean() / len(chosen)
            if not bool(torch.isfinite(loss)):
                raise FPTQuantError(f"step {step}: the loss is not finite; lower the learning rates")
            loss.backward()  # type: ignore[no-untyped-call]
            total += float(loss.detach())
    return total
