"""Chats among the calibration sequences, written by the model before anything else; continues where a run stopped."""

from __future__ import annotations

import torch
from transformers import GenerationConfig

from fptquant import parallel
from fptquant.calibration.chats import BATCH, chat_sequences, write_chats
from fptquant.calibration.text import sequence_prefix
from fptquant.errors import FPTQuantError
from fptquant.layers.store import restoring
from fptquant.loading import Source, load_model
from fptquant.progress import Stages
from fptquant.run.job import Job, with_windows
from fptquant.run.state import RunState

CHATS = "chats"  # name of the state
STAGE = "write chats"


def chats_of(job: Job) -> list[int]:
    """Indices of the calibration sequences that are chats."""
    return chat_sequences(len(job.windows), job.recipe.calibration.chats)


def require_memory_for_chats(job: Job) -> None:
    """Raises FPTQuantError where the model that has to write answers isn't in memory as a whole."""
    if job.residency == "streamed" and chats_of(job):
        raise FPTQuantError(
            "calibration.chats: answers are written by the model as a whole, which is in memory a layer at a time here "
            "(streamed): leave --chats out, or take --residency resident"
        )


def end_tokens(source: Source) -> list[int]:
    """Tokens at which a server ends an answer: those of generation_config.json or config.json, and the tokenizer's."""
    there = (source.path / "generation_config.json").is_file()
    options = (
        GenerationConfig.from_pretrained(source.path) if there else GenerationConfig.from_model_config(source.config)
    )
    named = options.eos_token_id
    found = [named] if isinstance(named, int) else list(named or ())
    own = source.tokenizer.eos_token_id
    return found if own is None or own in found else [*found, int(own)]


def with_chats(job: Job, state: RunState, stages: Stages) -> Job:
    """The job with chats in the place of a part of its calibration text; of several processes, each writes its part."""
    rows = chats_of(job)
    if not rows:
        return job
    texts, stored = job.windows[rows], state.load(CHATS)
    with restoring(CHATS):
        done = texts[:0] if stored is None else stored[0]["tokens"].to(job.device)
    if len(done) < len(rows):
        with stages.stage(STAGE, "lower calibration.chats or calibration.length and pass --fresh"):
            token = None if job.config.sink is None else job.config.sink.token
            prefix = sequence_prefix(job.source.tokenizer, job.recipe.calibration, token)
            ends, model = end_tokens(job.source), load_model(job.source)
            stages.resume(len(done), len(rows))
            while len(done) < len(rows):
                first = len(done) + parallel.ranks()[0] * BATCH
                mine = texts[first : first + BATCH]
                if len(mine):
                    mine = write_chats(model, job.source.tokenizer, mine, prefix, ends, first)
                found = parallel.joined(mine)
                done = torch.cat((done, found))
                state.save(CHATS, {"tokens": done})
                for _ in stages.track(found, len(rows)):
                    pass
    windows = job.windows.clone()
    windows[rows] = done
    return with_windows(job, windows)
