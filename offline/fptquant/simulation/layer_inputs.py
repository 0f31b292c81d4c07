"""The hidden states that enter a layer, for work that goes layer by layer."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.simulation.sink import SinkState, sink_state

_BATCH = 4  # sequences per forward pass


class Stop(Exception):
    """Ends a forward pass once what was wanted has been seen."""


@dataclass
class LayerInputs:
    """Hidden states that enter a layer, and the other arguments of its forward."""

    hidden: list[Tensor]  # each (batch, length, hidden)
    arguments: dict[str, Any]
    tokens: Sequence[Tensor]  # each (batch, length)
    sink: SinkState | None

    @property
    def first(self) -> int:
        """Tokens before this one are constants and do not count."""
        return 0 if self.sink is None else 1

    def locate(self, tokens: Tensor) -> None:
        """Puts constants where they belong in `tokens` (batch, length), which a part of the model is about to see."""
        if self.sink is not None:
            self.sink.locate(tokens, torch.arange(tokens.shape[1]))

    def run(self, layer: nn.Module) -> Iterator[Tensor]:
        """Outputs of `layer`, batch by batch."""
        for hidden, tokens in zip(self.hidden, self.tokens, strict=True):
            self.locate(tokens)
            yield self.output(layer, hidden)

    def output(self, layer: nn.Module, hidden: Tensor) -> Tensor:
        """Hidden states that leave `layer`, of the shape of `hidden`."""
        output = layer(hidden, **self.arguments)
        states: Tensor = output[0] if isinstance(output, tuple) else output
        return states

    def sequence(self, index: int) -> Tensor:
        """Hidden states of one sequence, (1, length, hidden), which a layer is about to see."""
        batch, row = divmod(index, _BATCH)
        self.locate(self.tokens[batch][row][None])
        return self.hidden[batch][row][None]

    def run_until_stopped(self, layer: nn.Module) -> None:
        """Runs `layer` on every batch, up to where an observer in it raises `Stop`."""
        for hidden, tokens in zip(self.hidden, self.tokens, strict=True):
            self.locate(tokens)
            with suppress(Stop):
                layer(hidden, **self.arguments)


@torch.no_grad()
def first_inputs(model: PreTrainedModel, first: nn.Module, windows: Tensor) -> LayerInputs:
    """Runs the model up to its first layer."""
    inputs = LayerInputs([], {}, torch.split(windows, _BATCH), sink_state(model))

    def catch(module: nn.Module, args: tuple[Tensor, ...], kwargs: dict[str, Any]) -> None:
        inputs.hidden.append(args[0])
        inputs.arguments = {**kwargs, "use_cache": False, "past_key_values": None}
        raise Stop

    handle = first.register_forward_pre_hook(catch, with_kwargs=True)
    for window in windows:
        with suppress(Stop):
            model(window[None], use_cache=False)
    handle.remove()
    inputs.hidden = [torch.cat(inputs.hidden[i : i + _BATCH]) for i in range(0, len(inputs.hidden), _BATCH)]
    return inputs
