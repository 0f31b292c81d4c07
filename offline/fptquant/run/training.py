"""The training stages of a run, each of which continues where a killed run stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.starts import start_from_activations, start_is_measured
from fptquant.layers.constants import SinkRecorder
from fptquant.layers.residency import ride_along
from fptquant.layers.store import restoring
from fptquant.loading import load_model
from fptquant.options.quantize import RoundingOptions
from fptquant.options.train import EndToEndOptions
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.run.job import Job
from fptquant.run.models import folded, folded_and_transformed
from fptquant.run.state import RunState
from fptquant.train.block_wise import train_block_wise
from fptquant.train.codes import CodeTraining
from fptquant.train.end_to_end import asked_for, range_groups, train_end_to_end
from fptquant.train.local import train_local
from fptquant.train.optimization import Optimization, transform_groups
from fptquant.train.student import Student, integer_student, transform_student
from fptquant.train.teacher import Teacher
from fptquant.transforms import TransformSet

# names of states and in the metrics file
LOCAL, BLOCK_WISE, END_TO_END, CODES, SCALES = "local", "block_wise", "end_to_end", "codes", "scales"
SHORTER = "lower training.length and pass --fresh"  # where memory runs out
FIRST_SEQUENCES = 16  # for ranges that are trained next


class Metrics(Protocol):
    """Takes what a step measured."""

    def __call__(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Args: stage is the name, step counts from 1."""


class MetricsFile:
    """JSON lines, one a step; a resumed run drops the steps it does again."""

    def __init__(self, file: Path) -> None:
        """Args: file is made with its first line; of an earlier run's, a last line that was cut off is dropped."""
        self.file = file
        if parallel.is_main() and file.is_file():
            whole, end, torn = file.read_bytes().rpartition(b"\n")
            if torn:
                file.write_bytes(whole + end)

    def __call__(self, stage: str, step: int, values: dict[str, float]) -> None:
        """Appends the values of a step of a stage as a line of JSON; of several processes, only the first does."""
        if not parallel.is_main():
            return
        self.file.parent.mkdir(parents=True, exist_ok=True)
        with self.file.open("a", encoding="utf-8") as stream:
            stream.write(json.dumps({"stage": stage, "step": step, **values}) + "\n")

    def rows(self) -> list[dict[str, Any]]:
        """Reads all steps, each once: one that was repeated after an interruption counts as it was last."""
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


def make_teacher(job: Job, state: RunState, stages: Stages) -> Teacher:
    """The original model's final hidden states on the sequences that will be trained on."""
    trained = (job.recipe.end_to_end, job.recipe.scales)
    options = job.recipe.end_to_end if job.recipe.end_to_end.steps else job.recipe.scales
    cache = state.directory / "teacher" if options.teacher == "cached" else None
    model = load_model(job.source, residency=job.residency)
    teacher = Teacher(model, job.source.architecture, job.training_windows, cache)
    if cache is not None:
        seen = set[int]().union(*(asked_for(stage, len(teacher.windows), job.recipe.seed) for stage in trained))
        for _ in stages.track(teacher.see(parallel.share(sorted(seen))), job.layers):
            pass
        parallel.wait()  # for the others' sequences
        teacher.release()
    return teacher


def train_transforms(
    job: Job, teacher: Teacher | None, state: RunState, stages: Stages, metrics: Metrics
) -> dict[str, Tensor]:
    """Everything that happens to transforms before they are merged: leaves `job.transforms` trained.

    Returns:
        Clipping of weights that was learned with them, by layer (`fptquant.quantize.channel_scale`).
    """
    recipe, architecture, transforms = job.recipe, job.source.architecture, job.transforms
    if not list(transforms.parameters()):
        return {}  # none is on that has any
    trained = {
        LOCAL: recipe.local.steps,
        BLOCK_WISE: recipe.block_wise.steps * job.layers,
        END_TO_END: recipe.end_to_end.steps,
    }
    stages_on = [name for name, steps in trained.items() if steps]
    if not stages_on and not start_is_measured(transforms):
        return {}
    finished = state.load(stages_on[-1]) if stages_on else None
    if finished and finished[1]["step"] == trained[stages_on[-1]]:
        with restoring(stages_on[-1]):
            _restore_transforms(transforms, finished[0])
        learned = layer_clipping(_part(finished[0], _CLIPPING))
        return {name: clipping.to(job.device) for name, clipping in learned.items()}
    model = start_transforms(job, stages)
    local = recipe.local
    groups = transform_groups(transforms, local.rate, local.rotation_rate, in_weights=True)
    if local.steps and any(parameters for _, parameters in groups.values()):
        with stages.stage("train transforms on weights"):
            optimization = Optimization(groups, local.steps, clip=None)
            steps = train_local(model, architecture, transforms, local, optimization)
            _run(LOCAL, steps, optimization, transforms, state, stages, metrics, recipe.training.save_every)
    if not (recipe.block_wise.steps or recipe.end_to_end.steps):
        return {}
    with stages.stage("first ranges", "lower calibration.length and pass --fresh"):
        calibrated = folded_and_transformed(job)
        constants = SinkRecorder(calibrated, architecture, job.windows)
        ride_along(architecture.layer_modules(calibrated), constants.layer)
        nearest = recipe.changed(rounding=RoundingOptions(method="nearest").model_dump())
        windows = job.windows[:FIRST_SEQUENCES]
        for _ in stages.track(calibrate_and_round(calibrated, architecture, nearest, windows), job.layers):
            pass
        constants.finish()
    options = recipe.end_to_end
    student = transform_student(
        model,
        architecture,
        transforms,
        calibrated,
        estimator=options.estimator if options.steps else recipe.block_wise.estimator,
        float_weights=options.steps > 0 and options.weights == "float",
    )
    del calibrated, constants
    transforms.requires_grad_(False)
    if recipe.block_wise.steps:
        fewer = "lower training.sequences or training.length and pass --fresh"
        with stages.stage("train transforms layer by layer", fewer):
            _run_block_wise(job, student, state, stages, metrics)
    if options.steps:
        assert teacher is not None
        with stages.stage("train transforms end to end", SHORTER, neutral=checkpointing("end_to_end", options)):
            groups = range_groups(student, options)
            groups |= transform_groups(transforms, options.transform_rate, options.rotation_rate)
            optimization = Optimization(groups, options.steps, warmup=options.warmup, clip=options.clip)
            student.compute_in(_compute_dtype(recipe))
            steps = train_end_to_end(student, teacher, options, optimization, recipe.seed, transforms)
            extra = _clipping_state(student.weight_parameters())
            _run(END_TO_END, steps, optimization, transforms, state, stages, metrics, recipe.training.save_every, extra)
    return layer_clipping(student.weight_parameters())


def start_transforms(job: Job, stages: Stages) -> PreTrainedModel:
    """Gives transforms whose start depends on activations theirs, and returns the source with its norms folded."""
    model, architecture = folded(job), job.source.architecture
    job.transforms.requires_grad_(False)
    if start_is_measured(job.transforms):
        with stages.stage("measure activations", "lower calibration.length and pass --fresh"):
            first = 0 if job.config.sink is None else 1
            positions = None
            if job.config.kv_cache.shift:
                positions = job.recipe.kv_range.positions_of(job.source.config)
            centered = job.config.activations.shift
            start_from_activations(model, architecture, job.transforms, job.windows, first, positions, centered)
    return model


def layer_clipping(parameters: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Clipping by the name of the layer, out of a student's parameters."""
    return {name.removesuffix(".log_clip"): value.detach() for name, value in parameters.items()}


def _compute_dtype(recipe: Recipe) -> torch.dtype:
    return torch.bfloat16 if recipe.training.compute_dtype == "bfloat16" else torch.float32


def checkpointing(name: str, options: EndToEndOptions) -> str:
    """What makes the stage of the recipe's field `name` need less memory for the same result."""
    return "" if options.gradient_checkpointing else f"set {name}.gradient_checkpointing: true"


def code_training(job: Job, model: PreTrainedModel, stages: Stages, metrics: Metrics) -> CodeTraining | None:
    """What trains the layers of a model while it is rounded; None without such steps."""
    options = job.recipe.codes
    if not options.steps:
        return None

    def record(step: int, values: dict[str, float]) -> None:
        metrics(CODES, step, values)
        stages.note(f"loss {values['loss']:.4f}")

    return CodeTraining(model, job.source.architecture, options, len(job.windows), job.recipe.seed, record)


def train_scales(
    job: Job, model: PreTrainedModel, teacher: Teacher, state: RunState, stages: Stages, metrics: Metrics
) -> None:
    """Learns weight scales and activation ranges of a rounded simulation, in place; its integers stay."""
    options: EndToEndOptions = job.recipe.scales
    student = integer_student(model, job.source.architecture, options.estimator)
    student.compute_in(_compute_dtype(job.recipe))
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
    extra: Mapping[str, Tensor] | None = None,
) -> None:
    """Continues a stage to its end, saving its state now and then, and what is `extra`."""
    saved = state.load(name)
    if saved is not None:
        with restoring(name):
            if transforms is not None:
                _restore_transforms(transforms, saved[0])
            optimization.restore(saved[0])

    def save() -> None:
        tensors = {**(extra or {}), **optimization.state()}
        if transforms is not None:
            tensors |= _transform_state(transforms)
        state.save(name, tensors, {"step": optimization.step})

    stages.resume(optimization.step, optimization.steps)
    for values in stages.track(steps, optimization.steps):
        if transforms is not None:
            values |= transforms.metrics()
        metrics(name, optimization.step, values)
        stages.note(f"loss {values['loss']:.4f}")
        if optimization.step % save_every == 0 or optimization.step == optimization.steps:
            save()


def _run_block_wise(job: Job, student: Student, state: RunState, stages: Stages, metrics: Metrics) -> None:
    """The same for the layer-wise stage, whose state is saved after every layer."""
    options, transforms, clipping = job.recipe.block_wise, job.transforms, student.weight_parameters()
    saved = state.load(BLOCK_WISE)
    finished = 0
    if saved is not None:
        with restoring(BLOCK_WISE):
            finished = saved[1]["step"] // options.steps
            _restore_transforms(transforms, saved[0])
            for name, value in _part(saved[0], _CLIPPING).items():
                clipping[name].data.copy_(value)
    if finished == job.layers:
        return
    steps = train_block_wise(
        student,
        load_model(job.source, residency="streamed"),
        transforms,
        options,
        job.training_windows,
        job.recipe.seed,
        finished,
    )
    stages.resume(finished * options.steps, job.layers * options.steps)
    for step, values in enumerate(stages.track(steps, job.layers * options.steps), finished * options.steps + 1):
        metrics(BLOCK_WISE, step, values)
        stages.note(f"loss {values['loss']:.4f}")
        if step % options.steps == 0:
            state.save(BLOCK_WISE, _transform_state(transforms) | _clipping_state(clipping), {"step": step})


_TRANSFORMS, _CLIPPING = "transforms/", "parameter/weight/"  # prefixes in a saved state


def _transform_state(transforms: TransformSet) -> dict[str, Tensor]:
    return {_TRANSFORMS + key: value for key, value in transforms.state_dict().items()}


def _clipping_state(clipping: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that `Optimization.state` gives to the group of weights."""
    return {_CLIPPING + name: value.detach() for name, value in clipping.items()}


def _restore_transforms(transforms: TransformSet, state: Mapping[str, Tensor]) -> None:
    transforms.load_state_dict(_part(state, _TRANSFORMS))


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
