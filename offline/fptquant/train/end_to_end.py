"""Training against the original model: of transforms and ranges (stage 2), or of ranges and scales alone."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from fptquant import parallel
from fptquant.errors import FPTQuantError
from fptquant.layers.inputs import to_logits
from fptquant.layers.residency import entered, recomputed
from fptquant.options.train import EndToEndOptions
from fptquant.process_memory import trim_memory
from fptquant.train.objective import sequence_loss
from fptquant.train.optimization import Optimization
from fptquant.train.student import Student
from fptquant.train.teacher import Teacher
from fptquant.transforms import TransformSet

_NO_LABEL = -100  # behind the last token; what `cross_entropy` ignores


def range_groups(student: Student, options: EndToEndOptions) -> dict[str, tuple[float, dict[str, nn.Parameter]]]:
    """Parameter groups of a student's quantizers."""
    return {
        "scale": (options.scale_rate, student.range_parameters("log_scale")),
        "zero_point": (options.zero_point_rate, student.range_parameters("zero_point")),
        "weight": (options.weight_rate, student.weight_parameters()),
        "offset": (options.offset_rate, student.offset_parameters()),
    }


def train_end_to_end(
    student: Student,
    teacher: Teacher,
    options: EndToEndOptions,
    optimization: Optimization,
    seed: int,
    transforms: TransformSet | None = None,
) -> Iterator[dict[str, float]]:
    """Runs the steps that are left.

    With `torch.distributed` initialized, each process takes its share of a batch and gradients are summed, so that
    the steps are those of one process.

    Args:
        student: trained in place.
        teacher: of the sequences to train on.
        options: settings.
        optimization: over the student's parameters.
        seed: order of the sequences.
        transforms: those that the student's weights go through, if any.

    Yields:
        Metrics of each step.

    Raises:
        FPTQuantError: the loss or a gradient is not finite; the step is named, and the layer.
    """
    model = student.model
    student.freeze()
    for parameter in optimization.parameters.values():
        parameter.requires_grad_(True)
    head, layers = model.get_submodule(student.architecture.head), student.architecture.layer_modules(model)
    logits, share = to_logits(model, student.architecture), 1 / options.batch
    with recomputed(model, layers, always=options.gradient_checkpointing):
        while optimization.step < optimization.steps:
            start, total = time.perf_counter(), 0.0
            with nullcontext() if transforms is None else transforms.reused(torch.float32):
                for sequence in parallel.share(batch(optimization.step, options.batch, len(teacher.windows), seed)):
                    tokens = teacher.windows[sequence]
                    target = None if options.objective == "cross_entropy" else teacher.hidden(sequence)
                    hidden = model.base_model(tokens[None], use_cache=False).last_hidden_state[0]
                    labels = nn.functional.pad(tokens[1:], (0, 1), value=_NO_LABEL)
                    with entered(head), teacher.with_head():
                        loss, gradient = sequence_loss(
                            hidden, logits, target, teacher.head, labels, options.objective, options.top, share
                        )
                    if not math.isfinite(loss):
                        raise FPTQuantError(
                            f"step {optimization.step}: the loss is not finite; {_first_not_finite(student, tokens)}; "
                            "lower the learning rates"
                        )
                    trim_memory()  # what logits took: the gradients come next
                    if hidden.requires_grad:  # not where only the head is quantized
                        hidden.backward(gradient)
                    total += loss
            total = parallel.sum_gradients(optimization.parameters.values(), total)
            norms = optimization.update()
            trim_memory()
            yield {
                "loss": total,
                **{f"gradient/{name}": norm for name, norm in norms.items()},
                "seconds": round(time.perf_counter() - start, 2),
            }


def asked_for(options: EndToEndOptions, sequences: int, seed: int) -> set[int]:
    """Which of the teacher's sequences a stage needs."""
    if options.objective == "cross_entropy":
        return set()
    return {sequence for step in range(options.steps) for sequence in batch(step, options.batch, sequences, seed)}


def batch(step: int, size: int, sequences: int, seed: int) -> list[int]:
    """Sequences of a step: every one once in each pass over the data, in an order drawn from `seed`."""
    chosen = []
    for position in range(step * size, (step + 1) * size):
        epoch, index = divmod(position, sequences)
        generator = torch.Generator().manual_seed(seed + 7919 * epoch)
        chosen.append(int(torch.randperm(sequences, generator=generator)[index]))
    return chosen


@torch.no_grad()
def _first_not_finite(student: Student, tokens: Tensor) -> str:
    """Runs the model once more and names the layer whose output goes wrong first."""
    found: list[str] = []
    handles = []
    for index, layer in enumerate(student.architecture.layer_modules(student.model)):

        def check(module: nn.Module, args: Any, output: Any, index: int = index) -> None:
            states = output[0] if isinstance(output, tuple) else output
            if not bool(torch.isfinite(states).all()):
                found.append(student.architecture.layer_name(index))

        handles.append(layer.register_forward_hook(check))
    student.model.base_model(tokens[None], use_cache=False)
    for handle in handles:
        handle.remove()
    return f"layer {found[0]} is the first" if found else "every layer's output is, so the loss itself is to blame"
