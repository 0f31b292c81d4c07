"""Computing the constants of the first token (`fptquant.simulate.sink`), layer by layer."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby
from operator import itemgetter
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.layers.inputs import first_inputs, last_states
from fptquant.layers.residency import entered
from fptquant.simulate.sink import KEY, OUTPUT, STEADY, VALUE, sink_token, use_sink
from fptquant.wiring import Architecture, Role

# How far the keys and values of other first tokens may be from the constants, in distances of ordinary tokens from
# their mean. Of SmolLM2-135M 1.1 in layer 10, 0.01 in layer 12, 0.06 in the last; of Qwen2.5-Coder-0.5B 0.9 in layer 2,
# 0.02 to 0.08 from layer 3 on, 0.26 in the last, with other transforms 0.38. Massive activations are made in one layer
# and taken back in one of the last, so the longest run of layers within the limit is taken: SmolLM2's layers 3 to 9 are
# within it, too, at 0.2, but before there are any.
_STEADY_DEVIATION = 0.3
_ORDINARY_TOKENS = 128


class SinkRecorder:
    """Fills the constants of a model with it as it is, transformed but not quantized; does nothing where it has none.

    From its making on the model uses them, so a layer's must be there, by `layer`, before anything else runs it.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, windows: Tensor) -> None:
        """Runs the model up to its first layer.

        Args:
            model: with `install_sink` done, if it is to have constants.
            architecture: its family.
            windows: (sequences, length) text behind the constant token, by which steady layers are found: each second
                token is one that a text may start with, those of the first sequence are ordinary tokens.
        """
        self._model, self._architecture = model, architecture
        self._token = sink_token(model)
        self._steady: list[tuple[nn.Module, bool]] = []  # of each layer, whether keys and values are those of any first
        if self.records:
            firsts = torch.cat((torch.tensor([self._token], device=windows.device), windows[:, 1:2].flatten()))[:, None]
            self._firsts = first_inputs(model, architecture, firsts, batch=len(firsts))
            self._ordinary = first_inputs(model, architecture, windows[:1, 1 : 1 + _ORDINARY_TOKENS])
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
        seen: dict[str, list[Tensor]] = {KEY: [], VALUE: []}

        def keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
            def hook(module: nn.Module, args: Any, output: Tensor) -> None:
                seen[name].append(output.flatten(2))

            return hook

        paths = {KEY: self._architecture.keys_before_rope, VALUE: self._architecture.projection_of(Role.VALUE).path}
        handles = [layer.get_submodule(path).register_forward_hook(keep(name)) for name, path in paths.items()]
        for inputs in (self._firsts, self._ordinary):
            inputs.advance(layer)
        for handle in handles:
            handle.remove()
        for name, (firsts, _) in seen.items():
            buffer = attention.get_buffer(name)
            buffer.copy_(firsts[0, 0].view(buffer.shape))
        deviations = (_deviation(firsts[:, 0], ordinary[0, 1:]) for firsts, ordinary in seen.values())
        self._steady.append((attention, all(deviation <= _STEADY_DEVIATION for deviation in deviations)))

    @torch.no_grad()
    def finish(self) -> None:
        """Behind the last layer: the final hidden state, and which layers are steady."""
        if not self.records:
            return
        norm = self._model.get_submodule(self._architecture.final_norm)
        norm.get_buffer(OUTPUT).copy_(next(last_states(self._model, self._architecture, self._firsts))[0, 0])
        runs = [[attention for attention, _ in run] for alike, run in groupby(self._steady, itemgetter(1)) if alike]
        for attention in max(reversed(runs), key=len, default=[]):
            attention.get_buffer(STEADY).fill_(1)


def record_sink(model: PreTrainedModel, architecture: Architecture, windows: Tensor) -> None:
    """Fills the constants of a model that nothing else is to be done with.

    Args:
        model: transformed but not quantized.
        architecture: its family.
        windows: as `SinkRecorder` takes them.
    """
    recorder = SinkRecorder(model, architecture, windows)
    for index, layer in enumerate(architecture.layer_modules(model) if recorder.records else ()):
        with entered(layer):
            recorder.layer(index, layer)
    recorder.finish()


def _deviation(firsts: Tensor, ordinary: Tensor) -> float:
    """Median distance of rows 1.. of `firsts` (n, channels) from row 0, in that of ordinary tokens from their mean.

    NaN where there is nothing to compare.
    """
    spread = (ordinary - ordinary.mean(0)).norm(dim=-1)
    return float((firsts[1:] - firsts[0]).norm(dim=-1).median() / spread.median())
