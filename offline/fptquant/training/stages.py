"""The training stages of a run, each of which continues where a killed run stopped."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from transformers import PreTrainedModel

from fptquant.calibration import calibrate_and_round
from fptquant.loading import load_model
from fptquant.merging import merge_transforms
from fptquant.planning import Plan
from fptquant.progress import Stages
from fptquant.rounding import RoundingOptions
from fptquant.simulation import install_simulation
from fptquant.simulation.sink import record_sink
from fptquant.training import parallel
from fptquant.training.end_to_end import EndToEndOptions, range_groups, train_end_to_end
from fptquant.training.local import train_local
from fptquant.training.optimization import Optimization
from fptquant.training.state import RunState
from fptquant.training.student import integer_student, transform_student
from fptquant.training.teacher import Teacher
from fptquant.transforms import TransformSet

LOCAL, END_TO_END, SCALES = "local", "end_to_end", "scales"  # names of states and in the metrics file


class Metrics(Protocol):
    """Takes what a step measured."""

    def __call__(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Args: stage is the name, step counts from 1."""


class MetricsFile:
    """JSON lines, one a step; a resumed run drops the steps it does again."""

    def __init__(self, file: Path) -> None:
        """Args: file is made with its first line."""
        self.file = file

    def __call__(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Appends one line."""
        if not parallel.is_main():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """All steps, each once."""
        if not self.file.is_file():
            return []
        found: dict[tuple[str, int], dict[str, Any]] = {}
        for line in self.file.read_text(encoding="utf-8").splitlines():
            try:
                row = json.loads(line)
            except ValueError:  # killed within a line
                continue
            found[row["stage"], row["step"]] = row
        return list(found.values())


def make_teacher(job: Plan, state: RunState, stages: Stages) -> Teacher:
    """The original model's final hidden states on the training sequences."""
    options = job.recipe.end_to_end if job.recipe.end_to_end.steps else job.recipe.scales
    cache = state.directory / "teacher" if options.teacher == "cached" else None
    teacher = Teacher(load_model(job.source), job.source.architecture, job.training_windows, cache)
    if cache is not None:
        state.start()
        for sequence in stages.track(range(len(teacher.windows)), len(teacher.windows)):
            teacher.hidden(sequence)
        teacher.release()
    return teacher


def train_transforms(job: Plan, teacher: Teacher | None, state: RunState, stages: Stages, metrics: Metrics) -> None:
    """Stages 1 and 2: leaves `job.transforms` trained."""
    recipe, architecture, transforms = job.recipe, job.source.architecture, job.transforms
    if not list(transforms.parameters()):
        return  # none is on that has any
    last, end = (END_TO_END, recipe.end_to_end.steps) if recipe.end_to_end.steps else (LOCAL, recipe.local.steps)
    finished = state.load(last)
    if finished and finished[1]["step"] == end:
        _restore_transforms(transforms, finished[0])
        return
    model = load_model(job.source)
    for _ in merge_transforms(model, architecture, TransformSet({}, architecture.shape(model.config), 0)):
        pass
    with stages.stage("train transforms on weights"):
        local = recipe.local
        groups = _transform_groups(transforms, local.rate, local.rotation_rate)
        optimization = Optimization(groups, local.steps, clip=None)
        steps = train_local(model, architecture, transforms, local, optimization)
        _run(LOCAL, steps, optimization, transforms, state, stages, metrics, recipe.training.save_every)
    options = recipe.end_to_end
    if options.steps == 0:
        return
    assert teacher is not None
    with stages.stage("first ranges", "lower calibration.sequences or calibration.length"):
        calibrated = copy.deepcopy(model)
        for _ in merge_transforms(calibrated, architecture, transforms):
            pass
        install_simulation(calibrated, architecture, job.config)
        record_sink(calibrated, architecture, job.first_tokens)
        nearest = recipe.changed(rounding=RoundingOptions(method="nearest").model_dump())
        for _ in stages.track(calibrate_and_round(calibrated, architecture, nearest, job.windows), job.layers):
            pass
    with stages.stage("train transforms end to end", spare_memory("end_to_end", options)):
        student = transform_student(
            model,
            architecture,
            transforms,
            calibrated,
            estimator=options.estimator,
            float_weights=options.weights == "float",
        )
        del calibrated
        groups = range_groups(student, options)
        groups |= _transform_groups(transforms, options.transform_rate, options.rotation_rate)
        optimization = Optimization(groups, options.steps, warmup=options.warmup, clip=options.clip)
        steps = train_end_to_end(student, teacher, options, optimization, recipe.seed, transforms)
        _run(END_TO_END, steps, optimization, transforms, state, stages, metrics, recipe.training.save_every)


def spare_memory(name: str, options: EndToEndOptions) -> str:
    """What makes the stage of the recipe's field `name` need less memory."""
    checkpointing = "" if options.gradient_checkpointing else f"set {name}.gradient_checkpointing: true, "
    return f"{checkpointing}lower training.length"


def train_scales(
    job: Plan, model: PreTrainedModel, teacher: Teacher, state: RunState, stages: Stages, metrics: Metrics
) -> None:
    """Learns weight scales and activation ranges of a rounded simulation, in place; its integers stay."""
    options: EndToEndOptions = job.recipe.scales
    student = integer_student(model, job.source.architecture, options.estimator)
    optimization = Optimization(range_groups(student, options), options.steps, warmup=options.warmup, clip=options.clip)
    steps = train_end_to_end(student, teacher, options, optimization, job.recipe.seed)
    _run(SCALES, steps, optimization, None, state, stages, metrics, job.recipe.training.save_every)
    student.finish()


def _run(
    name: str,
    steps: Iterator[dict[str, float]],
    optimization: Optimization,
    transforms: TransformSet | None,
    state: RunState,
    stages: Stages,
    metrics: Metrics,
    save_every: int,
) -> None:
    """Continues a stage to its end, saving its state now and then."""
    saved = state.load(name)
    if saved is not None:
        if transforms is not None:
            _restore_transforms(transforms, saved[0])
        optimization.restore(saved[0])

    def save() -> None:
        tensors = optimization.state()
        if transforms is not None:
            tensors |= {f"transforms/{key}": value for key, value in transforms.state_dict().items()}
        state.save(name, tensors, {"step": optimization.step})

    stages.resume(optimization.step)
    for values in stages.track(steps, optimization.steps):
        if transforms is not None:
            values |= transforms.metrics()
        metrics(name, optimization.step, values)
        stages.note(f"loss {values['loss']:.4f}")
        if optimization.step % save_every == 0 or optimization.step == optimization.steps:
            save()


def _transform_groups(
    transforms: TransformSet, rate: float, rotation_rate: float
) -> dict[str, tuple[float, dict[str, nn.Parameter]]]:
    parameters = dict(transforms.named_parameters())
    rotation = {name: parameters.pop(name) for name in list(parameters) if name.startswith("transforms.T_r.")}
    return {"transform": (rate, parameters), "rotation": (rotation_rate, rotation)}


@torch.no_grad()
def _restore_transforms(transforms: TransformSet, tensors: dict[str, torch.Tensor]) -> None:
    prefix = "transforms/"
    transforms.load_state_dict(
        {key.removeprefix(prefix): value for key, value in tensors.items() if key.startswith(prefix)}
    )
