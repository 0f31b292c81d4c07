"""Training a rounded layer on what leaves it: the codes of its weights, their scales, and its ranges.

Block-wise training of all parameters (EfficientQAT's Block-AP, arXiv 2407.11062), started from the codes that rounding
found. The layer reads what the quantized layers before it put out; what it should put out is what the model without
quantization does, so that it makes up for their errors, too.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.errors import FPTQuantError
from fptquant.layers.inputs import LayerInputs
from fptquant.options.train import CodeOptions
from fptquant.train.end_to_end import batch
from fptquant.train.optimization import Optimization
from fptquant.train.student import Student, layer_student
from fptquant.wiring import Architecture

Record = Callable[[int, dict[str, float]], None]


class CodeTraining:
    """Trains the layers of a simulation in order, each once it is rounded (`calibrate_and_round`)."""

    def __init__(
        self,
        model: PreTrainedModel,
        architecture: Architecture,
        options: CodeOptions,
        sequences: int,
        seed: int,
        record: Record | None = None,
    ) -> None:
        """Takes the model.

        Args:
            model: the simulation that is being rounded.
            architecture: its family.
            options: settings.
            sequences: of the calibration, of all processes.
            seed: order of the sequences.
            record: takes each step's number, over all layers, and its metrics.
        """
        self._model, self._architecture = model, architecture
        self._options, self._seed, self._record = options, seed, record
        self._sequences = sequences
        self._here = parallel.part(torch.arange(sequences)).tolist()

    def train(self, index: int, inputs: LayerInputs, expected: LayerInputs, weights: Mapping[str, Tensor]) -> None:
        """Trains a layer in place.

        Args:
            index: of the layer, entered and rounded.
            inputs: what it reads.
            expected: whose hidden states are what it should put out.
            weights: what was rounded, (N, K) by full name.

        Raises:
            FPTQuantError: the loss or a gradient is not finite; the layer and the step are named.
        """
        with torch.enable_grad():
            student = layer_student(self._model, self._architecture, index, self._options.estimator, weights)
            groups = self._groups(student)
            if any(rate and named for rate, named in groups.values()):
                optimization = Optimization(groups, self._options.steps, warmup=self._options.warmup, clip=None)
                try:
                    self._run(index, inputs, expected, optimization)
                except FPTQuantError as error:
                    raise FPTQuantError(f"{self._architecture.layer_name(index)}: {error}") from None
        student.finish()

    def _groups(self, student: Student) -> dict[str, tuple[float, dict[str, torch.nn.Parameter]]]:
        options, weights = self._options, student.weight_parameters()
        return {
            "scale": (options.scale_rate, student.range_parameters("log_scale")),
            "zero_point": (options.zero_point_rate, student.range_parameters("zero_point")),
            "weight": (options.weight_rate, {k: p for k, p in weights.items() if k.endswith(".log_scale")}),
            "offset": (options.offset_rate, student.offset_parameters()),
            "code": (options.code_rate, {k: p for k, p in weights.items() if k.endswith(".position")}),
        }

    def _run(self, index: int, inputs: LayerInputs, expected: LayerInputs, optimization: Optimization) -> None:
        options = self._options
        layer = self._architecture.layer_modules(self._model)[index]
        while optimization.step < options.steps:
            start, total = time.perf_counter(), 0.0
            for sequence in batch(optimization.step, options.batch, self._sequences, self._seed + index):
                if sequence not in self._here:
                    continue
                number = sequence - self._here[0]
                (goal,), first = expected.sequence(number).hidden, inputs.first
                (found,) = inputs.sequence(number).run(layer)
                loss = relative_error(found[:, first:], goal.to(found.device)[:, first:]) / options.batch
                if not bool(torch.isfinite(loss)):
                    raise FPTQuantError(f"step {optimization.step}: the loss is not finite; lower the learning rates")
                loss.backward()  # type: ignore[no-untyped-call]
                total += float(loss.detach())
            total = parallel.sum_gradients(optimization.parameters.values(), total)
            optimization.update()
            if self._record is not None:
                values = {"layer": index, "loss": total, "seconds": round(time.perf_counter() - start, 2)}
                self._record(index * options.steps + optimization.step, values)


def relative_error(found: Tensor, goal: Tensor) -> Tensor:
    """Mean over tokens of the squared error relative to the token's mean square: what a norm behind it sees.

    Args:
        found: (..., hidden).
        goal: of the same shape.
    """
    return ((found - goal).square().mean(-1) / goal.square().mean(-1)).mean()
