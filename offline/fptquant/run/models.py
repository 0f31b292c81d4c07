"""The models of a run: skeletons whose parts know how to fill themselves (`fptquant.layers.residency`)."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn
from transformers import PreTrainedModel

from fptquant.layers.residency import Fill, Residency, extend, make_part, put_buffers, ride_along, set_tensors
from fptquant.layers.store import LayerStore, restored
from fptquant.loading import load_model, open_source, outside, parts, skeleton
from fptquant.run.job import Job
from fptquant.simulate.install import install_simulation, round_floats
from fptquant.transforms import TransformSet
from fptquant.transforms.merging import merge_embedding, merge_head, merge_layer, norm_gain, set_norm_gain


def folded(job: Job) -> PreTrainedModel:
    """The source in transformers' classes, with norms' gains in the weights behind them if a transform needs that.

    A head that stays tied has none in front of it: the final norm keeps its gain.
    """
    return _merged(job, job.residency, [nothing(job)], simulated=False)


def transformed(job: Job, residency: Residency | None = None) -> PreTrainedModel:
    """The source as a simulation, with its transforms merged and the online ones installed; nothing is quantized.

    Args:
        job: at its transforms' present values.
        residency: another than the job's.
    """
    return _merged(job, residency or job.residency, [job.transforms], simulated=True)


def folded_and_transformed(job: Job) -> PreTrainedModel:
    """Builds `transformed` in two steps, folding and then merging, as a student's weights are made; streamed."""
    return _merged(job, "streamed", [nothing(job), job.transforms], simulated=True)


def nothing(job: Job) -> TransformSet:
    """Returns a set of no transforms, with which merging folds the norms at most."""
    return TransformSet({}, job.source.architecture.shape(job.source.config), 0)


def _merged(job: Job, residency: Residency, sets: list[TransformSet], *, simulated: bool) -> PreTrainedModel:
    """A model whose parts are read and folded when they are entered, and merged with one set after another."""
    model, architecture = skeleton(job.source.config), job.source.architecture
    model.config.tie_word_embeddings = job.tied
    if simulated:
        install_simulation(model, architecture, job.config)
    put_buffers(model, job.device)
    set_tensors(model, job.source.read(outside(parts(model, architecture), job.source.names)))
    final_norm = model.get_submodule(architecture.final_norm)
    gain = norm_gain(final_norm, architecture)
    folds = job.transforms.folds_gains
    if not folds:
        gain = torch.ones_like(gain)
    elif not job.tied:
        set_norm_gain(final_norm, architecture, None)

    read_layer = job.source.layer_reader()

    def fill_layer(index: int) -> Fill:
        def fill(layer: nn.Module) -> None:
            set_tensors(layer, read_layer(index))
            for transforms in sets:
                merge_layer(layer, index, architecture, transforms, folds=folds)

        return fill

    def fill_embedding(embedding: nn.Module) -> None:
        set_tensors(embedding, job.source.read_part(architecture.embedding))
        for transforms in sets:
            merge_embedding(embedding, transforms)

    def fill_head(head: nn.Module) -> None:
        if job.tied and residency == "resident":
            set_tensors(head, {"weight": model.get_submodule(architecture.embedding).get_parameter("weight")})
            return
        set_tensors(head, job.source.read_part(architecture.head))
        if job.tied:  # nothing acts on the embedding either
            return
        merge_head(head, gain, sets[0])
        for transforms in sets[1:]:
            merge_head(head, torch.ones_like(gain), transforms)

    make_part(model.get_submodule(architecture.embedding), fill_embedding, residency)
    for index, layer in enumerate(architecture.layer_modules(model)):
        make_part(layer, fill_layer(index), residency)
    make_part(model.get_submodule(architecture.head), fill_head, residency)
    return model


def read_back(job: Job, checkpoint: Path) -> PreTrainedModel:
    """What a job has written, loaded as the job's own models are.

    Raises:
        FPTQuantError: it can't be.
    """
    return load_model(open_source(checkpoint, device=job.device), residency=job.residency, recorded=False)


def to_be_rounded(
    job: Job, model: PreTrainedModel, store: LayerStore, ride: Callable[[int, nn.Module], None] | None = None
) -> None:
    """Makes a model of `transformed` one that `calibrate_and_round` takes.

    What stays in floating point is rounded, and what is in the store, finished, is taken from there.

    Args:
        job: what is done.
        model: changed in place.
        store: of finished layers.
        ride: called with each layer once, in order, while it is in floating point; finished ones included.
    """
    architecture, floats_first = job.source.architecture, set[str]()
    if ride is not None:
        ride_along(architecture.layer_modules(model), ride)
        floats_first.update(map(architecture.layer_name, range(job.layers)))
    for name, module in parts(model, architecture).items():

        def fill(module: nn.Module, before: Fill, name: str = name) -> None:
            first = name in floats_first
            floats_first.discard(name)
            if first:
                before(module)
            if restored(module, name, store, job.device):
                return
            if not first:
                before(module)
            round_floats(module, job.dtype)

        extend(module, fill)
    round_floats(model.get_submodule(architecture.final_norm), job.dtype)
