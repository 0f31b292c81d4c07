"""The hidden states that enter a layer, for work that goes layer by layer."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache, PreTrainedModel

from fptquant.format import softcap
from fptquant.layers.residency import entered
from fptquant.layers.scratch import is_large, spilled
from fptquant.simulate.sink import SinkMasks, put_output, sink_token
from fptquant.wiring import Architecture

_BATCH = 4  # sequences per forward pass

Track = Callable[[Iterator[int]], Iterator[int]]
Catch = Callable[[nn.Module, Tensor, dict[str, Any]], None]


class Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


@dataclass
class LayerInputs:
    """Hidden states that enter a layer, and the other arguments of each layer's forward: masks, RoPE."""

    hidden: list[Tensor]  # each (batch, length, hidden)
    arguments: dict[nn.Module, dict[str, Any]]  # by layer: some may see a window, or have a RoPE of their own
    masks: list[SinkMasks] | None  # where constants belong, of each batch
    first: int  # tokens before this one are constants and do not count
    batch: int  # sequences in each but the last
    device: torch.device  # of the layers
    spill: bool = False  # whether hidden states are in files

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of `layer`, batch by batch."""
        for index, hidden in enumerate(self.hidden):
            sink = {} if self.masks is None else {"sink": self.masks[index]}
            output = layer(hidden.to(self.device), **self.arguments[layer], **sink)
            yield output[0] if isinstance(output, tuple) else output

    @torch.no_grad()
    def advance(self, layer: nn.Module) -> None:
        """Puts the outputs of `layer` in the place of its inputs."""
        for index, output in enumerate(self.outputs(layer)):
            self.hidden[index] = output

    def outputs(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of `layer`, batch by batch, in files where its inputs are."""
        for output in self.run(layer):
            yield spilled(output) if self.spill else output

    def cached(self, cache: Cache) -> LayerInputs:
        """The same hidden states, with a cache that takes each layer's keys and values."""
        arguments = {
            layer: {**found, ("cache" if "cache" in found else "past_key_values"): cache}  # as transformers names it
            for layer, found in self.arguments.items()
        }
        return replace(self, arguments=arguments)

    def sequence(self, index: int) -> LayerInputs:
        """What enters of one sequence: hidden states (1, length, hidden)."""
        batch, row = divmod(index, self.batch)
        masks = None if self.masks is None else [SinkMasks(*(mask[row][None] for mask in self.masks[batch]))]
        return replace(self, hidden=[self.hidden[batch][row][None]], masks=masks)

    def run_until_stopped(self, layer: nn.Module) -> None:
        """Runs `layer` on every batch, up to where an observer in it raises `Stop`."""
        for index in range(len(self.hidden)):
            masks = None if self.masks is None else [self.masks[index]]
            with suppress(Stop):
                next(replace(self, hidden=[self.hidden[index]], masks=masks).run(layer))


@torch.no_grad()
def first_inputs(
    model: PreTrainedModel, architecture: Architecture, windows: Tensor, batch: int | None = None, kept: int = 1
) -> LayerInputs:
    """What enters the first layer, and what else the model calls each of its layers with.

    Args:
        model: of which only the embedding need be in memory.
        architecture: its family.
        windows: (sequences, length) tokens.
        batch: sequences that go through a layer together.
        kept: how many layers' inputs there will be at once; what is too large for memory goes into files (`scratch`).
    """
    hidden: list[Tensor] = []
    masks: list[SinkMasks] = []
    arguments: dict[nn.Module, dict[str, Any]] = {}
    batch = batch or _BATCH
    layers, spill = architecture.layer_modules(model), False

    def catch(layer: nn.Module, states: Tensor, kwargs: dict[str, Any]) -> None:
        sink = kwargs.pop("sink", None)
        arguments[layer] = kwargs
        if layer is layers[0]:
            hidden.append(states)
            if sink is not None:
                masks.append(sink)
        if layer is layers[-1]:
            raise Stop

    with entered(model.get_submodule(architecture.embedding)), _in_place_of_layers(model, architecture, catch):
        for start in range(0, len(windows), batch):
            for window in windows[start : start + batch]:
                with suppress(Stop):
                    model(window[None], use_cache=False)
            spill = spill or is_large(kept * len(windows) * hidden[-1].nbytes)
            states = torch.cat(hidden[start // batch :])
            hidden[start // batch :] = [spilled(states) if spill else states]
    batches = [slice(start, start + batch) for start in range(0, len(windows), batch)]
    return LayerInputs(
        hidden,
        arguments,
        [SinkMasks(*map(torch.cat, zip(*masks[rows], strict=True))) for rows in batches] if masks else None,
        first=0 if sink_token(model) is None else 1,
        batch=batch,
        device=windows.device,
        spill=spill,
    )


class _Catcher(nn.Module):
    """Looks like a layer to the model, hands on what it is called with, and lets hidden states pass."""

    def __init__(self, layer: nn.Module, catch: Catch) -> None:
        super().__init__()
        self._layer, self._catch = [layer], catch  # in a list: no module of this one

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self._layer[0], name)

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        self._catch(self._layer[0], hidden_states, kwargs)
        return hidden_states


@contextmanager
def _in_place_of_layers(model: PreTrainedModel, architecture: Architecture, catch: Catch) -> Iterator[None]:
    layers = model.get_submodule(architecture.layers)._modules
    before = dict(layers)
    layers.update({name: _Catcher(layer, catch) for name, layer in before.items() if layer is not None})
    try:
        yield
    finally:
        layers.update(before)


@torch.no_grad()
def through_layers(model: PreTrainedModel, architecture: Architecture, inputs: LayerInputs) -> Iterator[int]:
    """Takes `inputs` through all layers, each of which is entered once.

    Yields:
        The index of each layer, once all is through.
    """
    for index, layer in enumerate(architecture.layer_modules(model)):
        with entered(layer):
            inputs.advance(layer)
        yield index


@torch.no_grad()
def window_logits(
    model: PreTrainedModel, architecture: Architecture, windows: Tensor, track: Track = iter
) -> Iterator[Tensor]:
    """Logits (1, length, vocabulary) of each window, as the model computes them; each layer is entered once.

    Args:
        model: with a head, streamed or not.
        architecture: its family.
        windows: (windows, length) tokens.
        track: passes on the index of each layer that all windows have been through.
    """
    inputs = first_inputs(model, architecture, windows, batch=1)
    for _ in track(through_layers(model, architecture, inputs)):
        pass
    with entered(model.get_submodule(architecture.head)):
        for states in last_states(model, architecture, inputs):
            yield to_logits(model, architecture)(states)


def to_logits(model: PreTrainedModel, architecture: Architecture) -> Callable[[Tensor], Tensor]:
    """The head, as it is now, with the bound of the logits behind it: (..., hidden) to (..., vocabulary)."""
    head, (_, cap) = model.get_submodule(architecture.head), architecture.caps(model.config)
    return head if cap is None else lambda states: softcap(head(states), cap)


def last_states(model: PreTrainedModel, architecture: Architecture, inputs: LayerInputs) -> Iterator[Tensor]:
    """What the head reads, (batch, length, hidden), of each batch that has been through the layers."""
    norm = model.get_submodule(architecture.final_norm)
    for index, hidden in enumerate(inputs.hidden):
        yield put_output(norm, norm(hidden), None if inputs.masks is None else inputs.masks[index])
