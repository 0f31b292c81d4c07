"""The order of the stages: from a Hugging Face checkpoint to a quantized one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.calibration.halves import unreached
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.calibration.starts import KEY_SEQUENCES, start_is_measured
from fptquant.errors import FPTQuantError
from fptquant.files import folder_size
from fptquant.format.schema import EXTRAS
from fptquant.layers.constants import record_sink
from fptquant.layers.scratch import scratch_in
from fptquant.layers.store import restoring
from fptquant.progress import Stages
from fptquant.report.card import provenance, write_card
from fptquant.report.compare import compare_with_original
from fptquant.report.ranges import FloatPasses, write_ranges
from fptquant.report.summary import Summary
from fptquant.report.training import write_metrics
from fptquant.run.chats import require_memory_for_chats, with_chats
from fptquant.run.job import Job, with_recipe
from fptquant.run.models import read_back, to_be_rounded, transformed
from fptquant.run.needs import expected_disk, scratch_limit
from fptquant.run.publication import Publication
from fptquant.run.rehearsal import rehearse
from fptquant.run.remedies import remedies
from fptquant.run.sizes import bits_per_weight
from fptquant.run.state import RunState
from fptquant.run.training import (
    FIRST_SEQUENCES,
    SHORTER,
    MetricsFile,
    checkpointing,
    code_training,
    make_teacher,
    start_transforms,
    train_scales,
    train_transforms,
)
from fptquant.run.writer import write_checkpoint
from fptquant.sensitivity import spend
from fptquant.simulate.recorded import FILE as RECORDED_LOGITS
from fptquant.simulate.recorded import deviation
from fptquant.weight_files import WeightFiles

# The same command again would only repeat the end.
_START_OVER = "nothing was published; run again with --fresh to start over, and report it if that ends here, too"


def quantize(
    job: Job,
    output: Path,
    *,
    overwrite: bool = False,
    fresh: bool = False,
    stages: Stages | None = None,
    quality: int = 0,
    command: Sequence[str] = (),
) -> Summary:
    """Runs a job and publishes the checkpoint, complete or not at all; continues where a killed run stopped.

    Several processes (`fptquant.parallel`) run the same stages together, up to the files, which are the first one's.

    Args:
        job: what to do.
        output: directory of the checkpoint. The state of an unfinished run is in `.NAME.state` beside it.
        overwrite: replace an existing checkpoint.
        fresh: throw the state of an unfinished run away.
        stages: shows progress.
        quality: windows to compare the result with the original on, of text that nothing was fitted to.
        command: arguments of `fptquant`, for the model card.

    Raises:
        FPTQuantError: the output exists or can't be written, the disk is full, or the source holds damaged values.
    """
    stages = stages or Stages()
    publication, state = prepare(job, output, overwrite=overwrite, fresh=fresh)
    metrics = MetricsFile(state.directory / "metrics.jsonl")
    recipe, teacher = job.recipe, None
    scratch = scratch_in(state.directory, scratch_limit(job.room))
    with publication as staging, state, scratch:
        if parallel.is_main():
            with stages.stage("rehearse"):
                rehearse(job, staging / "rehearsal")
        job = with_chats(job, state, stages)
        if recipe.end_to_end.steps or recipe.scales.steps:
            with stages.stage("teacher", SHORTER):
                teacher = make_teacher(job, state, stages)
        clipping = train_transforms(job, teacher, state, stages, metrics)
        spending = None
        if recipe.budget is not None:
            narrow = {name: job.config.scheme_for(name) for name in clipping}
            job, spending = spend_budget(job, state, stages)
            for name, scheme in narrow.items():
                widened = job.config.scheme_for(name)
                if scheme and widened and scheme.weights != widened.weights:
                    del clipping[name]  # it was learned for fewer bits
            require_space(job, publication, state)
        fewer = "lower calibration.sequences or calibration.length and pass --fresh"
        with stages.stage("calibrate and round", fewer):
            model = transformed(job)
            floats = FloatPasses(job, model)
            to_be_rounded(job, model, state, floats.ride if floats.needed else None)
            training = code_training(job, model, stages, metrics)
            original = transformed(job, "streamed") if job.follows_original else None
            rounding = calibrate_and_round(
                model, job.source.architecture, recipe, job.windows, state, clipping, original, training
            )
            for _ in stages.track(rounding, job.layers):
                pass
            before, after = floats.finish()
            notes = tuple(unreached(model))
            del floats, original, training, rounding
        if recipe.scales.steps:
            assert teacher is not None
            with stages.stage("train scales and ranges", SHORTER, neutral=checkpointing("scales", recipe.scales)):
                train_scales(job, model, teacher, state, stages, metrics)
        if not parallel.is_main():
            return Summary(publication.target.name, stages.seconds, max(stages.peaks.values()), 0, 0)
        with stages.stage("write"):
            write_checkpoint(job, model, staging)
            write_ranges(job, model, before, after, staging / EXTRAS)
            del model
        with stages.stage("read back"):
            require_read_back(job, staging)
        write_metrics(metrics.rows(), staging / EXTRAS)
        measured, warning = None, ""
        if quality:
            measured, odd = compare_with_original(job, staging, quality, stages)
            notes += odd
            warning = measured.warning if measured else ""
        if warning and (found := remedies(job)):
            warning += f"; what may help: {', '.join(found)}"
        summary = Summary(
            output=publication.target.name,
            seconds=stages.seconds,
            peak_memory_bytes=max(stages.peaks.values()),
            peak_bytes=stages.peaks,
            source_bytes=job.source.weights.size,
            output_bytes=WeightFiles.of(staging).size,
            bits_per_weight=bits_per_weight(job.source, job.config, job.dtype),
            source_fingerprint=state.signature["model"],
            budget="" if spending is None else _bought(spending),
            notes=notes,
            quality=measured,
            warning=warning,
            provenance=provenance(job, command),
        )
        write_card(job, staging, summary.output, measured, summary.provenance, warning)
        _write_json(staging / EXTRAS / "summary.json", asdict(summary))
        if spending is not None:
            _write_json(staging / EXTRAS / "budget.json", spending)
    state.remove()
    return summary


def prepare(
    job: Job, output: Path, *, overwrite: bool, fresh: bool, dry_run: bool = False
) -> tuple[Publication, RunState]:
    """Checks everything about the output, and writes nothing: arguments and errors are those of `quantize`.

    A dry run reads all of the source only where there is a state that it has to belong to.
    """
    publication = Publication(output, overwrite=overwrite)
    if parallel.is_main():
        publication.require_alone()
    publication.require_apart(job.source.path)
    directory = publication.target.with_name(f".{publication.target.name}.state")
    state = RunState(directory, {} if dry_run and not directory.exists() else job.signature(), fresh=fresh)
    parallel.require_same(state.signature)
    require_sequences(job)
    require_memory_for_chats(job)
    require_space(job, publication, state)
    return publication, state


def require_sequences(job: Job) -> None:
    """Raises FPTQuantError when a process would have no calibration sequence."""
    processes, sequences = parallel.ranks()[1], len(job.windows)
    if job.recipe.block_wise.steps or job.recipe.end_to_end.steps:
        sequences = min(sequences, FIRST_SEQUENCES)
    if start_is_measured(job.transforms):
        sequences = min(sequences, KEY_SEQUENCES)
    if processes > sequences:
        raise FPTQuantError(
            f"{processes} processes can't share the {sequences} calibration sequences of a stage: start at most "
            f"{sequences} processes"
        )


def require_space(job: Job, publication: Publication, state: RunState) -> None:
    """Raises FPTQuantError when checkpoint and state, which is kept until the end, don't fit on the disk."""
    there = folder_size(state.directory)  # continued from, or removed
    disk = expected_disk(job)
    publication.require_space(disk["checkpoint"] + max(0, disk["state"] - there) + disk["scratch"])


def spend_budget(job: Job, state: RunState, stages: Stages) -> tuple[Job, dict[str, Any]]:
    """The job with overrides in place of its budget, and the record of how they were chosen."""
    stored = state.load("budget")
    if stored is None:
        with stages.stage("load for the budget"):
            model = with_constants(job)
        changed, spending = spend(job, model, stages)
        state.save("budget", {}, {"overrides": changed.recipe.to_dict()["overrides"], "record": spending.to_dict()})
        stored = state.load("budget")  # of several processes, what the first one chose
        assert stored is not None, "what was just written"
    facts = stored[1]
    with restoring("budget"):
        recipe = job.recipe.changed("budget", budget=None, overrides=facts["overrides"])
        return with_recipe(job, recipe), facts["record"]


def _bought(spending: dict[str, Any]) -> str:
    """One line for what a budget bought."""
    chosen = [f"{choice['kind']} {choice['layer']}" for choice in spending["choices"]]
    if not chosen:
        return "budget: nothing helps within it, so nothing got more bits"
    before, after = spending["before"]["kl"], spending["after"]["kl"]
    return f"budget: more bits for {', '.join(chosen)}; KL divergence {before:.4f} -> {after:.4f} on calibration text"


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def started(job: Job, stages: Stages) -> PreTrainedModel:
    """The source with its transforms at their start and merged; in stages of its own."""
    if start_is_measured(job.transforms):
        start_transforms(job, stages)
    with stages.stage("load and transform"):
        return with_constants(job)


def with_constants(job: Job) -> PreTrainedModel:
    """The source with its transforms merged and a constant first token computed, nothing quantized."""
    model = transformed(job)
    record_sink(model, job.source.architecture, job.windows)
    return model


def require_read_back(job: Job, directory: Path) -> None:
    """Loads the written checkpoint and compares its logits with those of the model in memory, bit for bit.

    Raises:
        FPTQuantError: they differ; the checkpoint is not published.
    """
    try:
        difference = deviation(read_back(job, directory), directory / EXTRAS / RECORDED_LOGITS).found
    except FPTQuantError as error:
        raise FPTQuantError(f"the written checkpoint can't be read back ({error}): {_START_OVER}") from None
    if difference != 0:  # or NaN
        raise FPTQuantError(
            f"the written checkpoint does not equal the model in memory (logits differ by {difference:.2g} of their "
            f"spread): {_START_OVER}"
        )
