"""The order of the stages: from a Hugging Face checkpoint to a quantized one."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.calibration import calibrate_and_round
from fptquant.checkpoint.publication import Publication
from fptquant.checkpoint.writer import EXTRAS, write_checkpoint
from fptquant.errors import FPTQuantError
from fptquant.loading import load_model, open_source, weight_bytes
from fptquant.merging import merge_transforms, round_floats
from fptquant.planning import Plan
from fptquant.progress import Stages, peak_memory
from fptquant.sensitivity import spend
from fptquant.simulation import install_simulation


@dataclass(frozen=True)
class Summary:
    """What a run did."""

    output: str
    seconds: dict[str, float]
    peak_memory_bytes: int
    source_bytes: int
    output_bytes: int


def quantize(job: Plan, output: Path, *, overwrite: bool = False, stages: Stages | None = None) -> Summary:
    """Runs a job and publishes the checkpoint, complete or not at all.

    Raises:
        FPTQuantError: the output exists or can't be written, the disk is full, or the source holds damaged values.
    """
    stages = stages or Stages()
    publication = Publication(output, overwrite=overwrite)
    source = job.source.path.resolve()
    if publication.target == source or publication.target in source.parents:
        raise FPTQuantError(f"'{output}' holds the source model, which would be lost: choose another output")
    publication.require_space(job.output_bytes)
    with publication as staging:
        spending = None
        if job.recipe.budget is not None:
            with stages.stage("load for the budget"):
                model = load_model(job.source)
                transform(job, model)
            job, spending = spend(job, model, stages)
            publication.require_space(job.output_bytes)
            del model
        with stages.stage("load"):
            model = load_model(job.source)
        with stages.stage("merge transforms"):
            transform(job, model, stages)
            round_floats(model, job.source.architecture, job.config, job.dtype)
        with stages.stage("calibrate and round"):
            rounding = calibrate_and_round(model, job.source.architecture, job.recipe, job.windows)
            for _ in stages.track(rounding, job.layers):
                pass
        with stages.stage("write"):
            write_checkpoint(job, model, staging)
            probe = job.windows[:1, :64]
            expected = logits(model, probe)
            del model
        with stages.stage("read back"):
            check_read_back(expected, staging, probe)
        summary = Summary(
            output=str(output),
            seconds=stages.seconds,
            peak_memory_bytes=peak_memory(),
            source_bytes=weight_bytes(job.source.path),
            output_bytes=weight_bytes(staging),
        )
        _write_json(staging / EXTRAS / "summary.json", asdict(summary))
        if spending is not None:
            _write_json(staging / EXTRAS / "budget.json", spending.to_dict())
    return summary


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def transform(job: Plan, model: PreTrainedModel, stages: Stages | None = None) -> None:
    """Merges the transforms and installs the online ones; the model computes what it did before."""
    merging = merge_transforms(model, job.source.architecture, job.transforms)
    for _ in (stages or Stages()).track(merging, job.layers):
        pass
    install_simulation(model, job.source.architecture, job.config)


@torch.no_grad()
def logits(model: PreTrainedModel, tokens: Tensor) -> Tensor:
    """Logits (batch, tokens, vocabulary) of a model in transformers."""
    result: Tensor = model(tokens, use_cache=False).logits
    return result


def check_read_back(expected: Tensor, directory: Path, tokens: Tensor) -> None:
    """Loads the written checkpoint and compares its logits with those of the model in memory, bit for bit.

    Raises:
        RuntimeError: they differ; the checkpoint is not published.
    """
    actual = logits(load_model(open_source(directory)), tokens)
    if not torch.equal(expected, actual):
        difference = (expected - actual).abs().max().item()
        raise RuntimeError(f"the written checkpoint does not equal the model in memory (logits differ by {difference})")
