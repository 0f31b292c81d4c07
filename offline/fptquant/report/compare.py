"""How far a finished checkpoint is from its original, on calibration text that nothing was fitted to."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.calibration.text import windows_left_over
from fptquant.errors import FPTQuantError
from fptquant.files import portable
from fptquant.format.schema import Sink
from fptquant.layers.inputs import Track, window_logits
from fptquant.loading import Source, load_model, open_source
from fptquant.progress import Stages
from fptquant.recipe import Recipe
from fptquant.report.quality import Quality
from fptquant.run.job import Job
from fptquant.wiring import Architecture

STAGE = "measure quality"
_LARGEST = 700.0  # mean loss whose exponential is still a number


@dataclass(frozen=True)
class Comparison:
    """Means over all predicted tokens."""

    perplexity: float
    kl: float  # KL(original | model), nats per token
    agreement: float  # share of tokens with the same most likely successor


def compare_with_original(
    job: Job, checkpoint: Path, windows: int, stages: Stages
) -> tuple[Quality | None, tuple[str, ...]]:
    """Compares a written checkpoint with its source; both a layer at a time.

    Args:
        job: that wrote it.
        checkpoint: directory.
        windows: how many, at most, each as long as a calibration sequence.
        stages: shows progress.

    Returns:
        The figures; None, and why, where there is no text for them or they can't be had. A run doesn't fail for that.
    """
    try:
        with stages.stage(STAGE):
            tokens = held_back(job.source, job.recipe, job.config.sink, windows)
            if not len(tokens):
                return None, ("quality was not measured: calibration and training took all of the text",)
            return _compare(job, checkpoint, tokens, stages), ()
    except (FPTQuantError, OSError) as error:
        reason = re.sub("'([^']*)'", lambda quoted: f"'{portable(quoted[1])}'", str(error))  # it goes into the summary
        return None, (f"quality was not measured: {reason}",)


def held_back(source: Source, recipe: Recipe, sink: Sink | None, windows: int) -> Tensor:
    """(up to windows, length) tokens of the calibration text that a run of the recipe doesn't draw, on the device.

    Args:
        source: the model, or a checkpoint that was made of it.
        recipe: of the run.
        sink: the run's constant first token.
        windows: how many, at most.

    Raises:
        FPTQuantError: the text isn't there, or can't be read.
    """
    drawn = [recipe.calibration]
    if recipe.trains_on_text:
        training = {"sequences": recipe.training.sequences, "length": recipe.training.length}
        drawn.append(recipe.calibration.model_copy(update=training))
    token = sink.token if sink else None
    tokens = windows_left_over(source.tokenizer, drawn, source.config.vocab_size, recipe.seed, token, windows)
    return tokens.to(source.device)


@torch.no_grad()
def _compare(job: Job, checkpoint: Path, windows: Tensor, stages: Stages) -> Quality:
    track = partial(stages.track, total=2 * job.layers)
    original = load_model(job.source, residency="streamed")
    written = open_source(checkpoint, device=job.device)
    quantized = load_model(written, residency="streamed", recorded=False)
    models = ((original, job.source.architecture), (quantized, written.architecture))
    perplexity, found = compare_logits(logits_side_by_side(models, windows, track))
    return Quality(
        windows=len(windows),
        length=windows.shape[1],
        original=perplexity,
        quantized=found.perplexity,
        kl=found.kl,
        agreement=found.agreement,
    )


def logits_side_by_side(
    models: Iterable[tuple[PreTrainedModel, Architecture]], windows: Tensor, track: Track
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """What `compare_logits` takes, of two models that go through their layers together.

    Args:
        models: the original and the other, with their families.
        windows: (windows, length) tokens.
        track: see `window_logits`.
    """
    logits = [window_logits(model, architecture, windows, track) for model, architecture in models]
    for window, one, other in zip(windows, *logits, strict=True):
        yield window, one[0, :-1], other[0, :-1]


def compare_logits(triples: Iterable[tuple[Tensor, Tensor, Tensor]]) -> tuple[float, Comparison]:
    """Compares logits with those of the original.

    Args:
        triples: of each window its tokens (L,), and the original's and the model's logits (L - 1, vocabulary) of all
            tokens but the last.

    Returns:
        The original's perplexity, and the model's figures.
    """
    before = after = kl = 0.0
    agreeing = tokens = 0
    for window, *logits in triples:
        expected, found = (values.float().log_softmax(-1) for values in logits)
        before -= float(expected.gather(-1, window[1:, None]).double().sum())
        after -= float(found.gather(-1, window[1:, None]).double().sum())
        kl += float((expected.exp() * (expected - found)).double().sum())
        agreeing += int((found.argmax(-1) == expected.argmax(-1)).sum())
        tokens += len(found)
    original, perplexity = (math.exp(min(loss / tokens, _LARGEST)) for loss in (before, after))
    return original, Comparison(perplexity, kl / tokens, agreeing / tokens)
