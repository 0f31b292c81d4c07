"""Computing the constants of the first token (`fptquant.simulate.sink`), layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.layers.inputs import first_inputs, last_states
from fptquant.layers.residency import entered
from fptquant.simulate.sink import KEY, OUTPUT, STEADY, VALUE, sink_token, use_sink
from fptquant.wiring import Architecture, Role

_STEADY_DEVIATION = 0.15  # median over first tokens of |x - x_sink| / |x_sink|, of keys and of values


class SinkRecorder:
    """Fills the constants of a model with it as it is, transformed but not quantized; does nothing where it has none.

    From its making on the model uses them, so a layer's must be there, by `layer`, before anything else runs it.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, others: Tensor) -> None:
        """Runs the model up to its first layer.

        Args:
            model: with `install_sink` done, if it is to have constants.
            architecture: its family.
            others: (n,) other tokens that a text may start with, by which steady layers are found; where the model is.
        """
        self._model, self._architecture = model, architecture
        self._token = sink_token(model)
        self._attentions: list[nn.Module] = []
        self._moving: list[bool] = []  # of each layer, whether its keys or values depend on the first token
        if self.records:
            tokens = torch.cat((torch.tensor([self._token], device=others.device), others.flatten()))[:, None]
            self._inputs = first_inputs(model, architecture, tokens, batch=len(tokens))
            use_sink(model)

    @property
    def records(self) -> bool:
        """Whether there is anything to do."""
        return self._token is not None

    @torch.no_grad()
    def layer(self, index: int, layer: nn.Module) -> None:
        """Fills a layer's keys and values; layers come in order."""
        if not self.records:
            return
        attention = layer.get_submodule(self._architecture.attention)
        seen: dict[str, Tensor] = {}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                seen[name] = output[:, 0].flatten(1)

            return hook

        paths = {KEY: self._architecture.keys_before_rope, VALUE: self._architecture.projection_of(Role.VALUE).path}
        handles = [layer.get_submodule(path).register_forward_hook(keep(name)) for name, path in paths.items()]
        self._inputs.advance(layer)
        for handle in handles:
            handle.remove()
        for name, states in seen.items():
            buffer = attention.get_buffer(name)
            buffer.copy_(states[0].view(buffer.shape))
        self._attentions.append(attention)
        alone = len(self._inputs.hidden[0]) == 1
        self._moving.append(alone or max(map(_deviation, seen.values())) > _STEADY_DEVIATION)

    @torch.no_grad()
    def finish(self) -> None:
        """Behind the last layer: the final hidden state, and which layers are steady."""
        if not self.records:
            return
        norm = self._model.get_submodule(self._architecture.final_norm)
        norm.get_buffer(OUTPUT).copy_(next(last_states(self._model, self._architecture, self._inputs))[0, 0])
        for attention, moving in zip(reversed(self._attentions), reversed(self._moving), strict=True):
            if moving:  # steady from some layer on
                break
            attention.get_buffer(STEADY).fill_(1)


def record_sink(model: PreTrainedModel, architecture: Architecture, others: Tensor) -> None:
    """Fills the constants of a model that nothing else is to be done with.

    Args:
        model: transformed but not quantized.
        architecture: its family.
        others: as `SinkRecorder` takes them.
    """
    recorder = SinkRecorder(model, architecture, others)
    for index, layer in enumerate(architecture.layer_modules(model) if recorder.records else ()):
        with entered(layer):
            recorder.layer(index, layer)
    recorder.finish()


def _deviation(states: Tensor) -> float:
    """Median distance of rows 1.. of (n, channels) from row 0, relative to it."""
    return float((states[1:] - states[0]).norm(dim=-1).median() / states[0].norm())
