"""The hidden states that enter a layer, for work that goes layer by layer."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.simulate.sink import SinkMasks, sink_token

_BATCH = 4  # sequences per forward pass


class Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


@dataclass
class LayerInputs:
    """Hidden states that enter a layer, and the other arguments of its forward."""

    hidden: list[Tensor]  # each (batch, length, hidden)
    arguments: dict[str, Any]
    masks: list[SinkMasks] | None  # where constants belong, of each batch
    first: int  # tokens before this one are constants and do not count

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of `layer`, batch by batch."""
        for index, hidden in enumerate(self.hidden):
            arguments = self.arguments if self.masks is None else {**self.arguments, "sink": self.masks[index]}
            output = layer(hidden, **arguments)
            yield output[0] if isinstance(output, tuple) else output

    def sequence(self, index: int) -> LayerInputs:
        """What enters of one sequence: hidden states (1, length, hidden)."""
        batch, row = divmod(index, _BATCH)
        masks = None if self.masks is None else [SinkMasks(*(mask[row][None] for mask in self.masks[batch]))]
        return replace(self, hidden=[self.hidden[batch][row][None]], masks=masks)

    def run_until_stopped(self, layer: nn.Module) -> None:
        """Runs `layer` on every batch, up to where an observer in it raises `Stop`."""
        for index in range(len(self.hidden)):
            masks = None if self.masks is None else [self.masks[index]]
            with suppress(Stop):
                next(replace(self, hidden=[self.hidden[index]], masks=masks).run(layer))


@torch.no_grad()
def first_inputs(model: PreTrainedModel, first: nn.Module, windows: Tensor) -> LayerInputs:
    """Runs the model up to its first layer."""
    hidden: list[Tensor] = []
    masks: list[SinkMasks] = []
    arguments: dict[str, Any] = {}

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        hidden.append(args[0])
        arguments.update(kwargs)
        if "sink" in arguments:
            masks.append(arguments.pop("sink"))
        raise Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with suppress(Stop):
            model(window[None], use_cache=False)
    handle.remove()
    batches = [slice(start, start + _BATCH) for start in range(0, len(hidden), _BATCH)]
    return LayerInputs(
        [torch.cat(hidden[batch]) for batch in batches],
        arguments,
        [SinkMasks(*map(torch.cat, zip(*masks[batch], strict=True))) for batch in batches] if masks else None,
        first=0 if sink_token(model) is None else 1,
    )
