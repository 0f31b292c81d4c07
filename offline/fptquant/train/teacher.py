"""The original model's final hidden states on the training text, from which its distributions follow."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.layers.inputs import first_inputs, last_states, through_layers, to_logits
from fptquant.layers.residency import entered
from fptquant.wiring import Architecture


class Teacher:
    """Final hidden states, computed when first asked for and kept on disk; far smaller than logits.

    Its layers are only needed until every sequence to be asked for has been seen, and are let go of with `release`.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, windows: Tensor, cache: Path | None) -> None:
        """Takes the original model.

        Args:
            model: the original, in float32; not changed.
            architecture: its family.
            windows: (sequences, length) training tokens, on the model's device.
            cache: directory for the hidden states; None computes them again each time.
        """
        self.windows, self.cache = windows, cache
        self._model: PreTrainedModel | None = model
        self._architecture = architecture
        self._head, self._to_logits = model.get_submodule(architecture.head), to_logits(model, architecture)

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of final hidden states (tokens, hidden)."""
        return self._to_logits(hidden)

    def with_head(self) -> AbstractContextManager[nn.Module]:
        """Keeps the head in memory for as long as the context lasts."""
        return entered(self._head)

    @torch.no_grad()
    def hidden(self, sequence: int) -> Tensor:
        """Final hidden states (length, hidden) of one training sequence."""
        stored = self._stored(sequence)
        if stored is not None:
            return stored
        assert self._model is not None, "the teacher was released before all sequences were seen"
        states: Tensor = self._model.base_model(self.windows[sequence][None], use_cache=False).last_hidden_state[0]
        self._store(sequence, states)
        return states

    @torch.no_grad()
    def see(self, sequences: Sequence[int]) -> Iterator[int]:
        """Puts the hidden states of sequences into the cache; all go through a layer before the next is read.

        Yields:
            The index of each layer that they have been through.
        """
        missing = [sequence for sequence in sequences if self._stored(sequence) is None]
        if not missing:
            return
        assert self._model is not None
        inputs = first_inputs(self._model, self._architecture, self.windows[missing], batch=1)
        yield from through_layers(self._model, self._architecture, inputs)
        for sequence, states in zip(missing, last_states(self._model, self._architecture, inputs), strict=True):
            self._store(sequence, states[0])

    def release(self) -> None:
        """Lets go of the layers; all sequences to be asked for must be in the cache."""
        self._model = None

    def _file(self, sequence: int) -> Path | None:
        return None if self.cache is None else self.cache / f"{sequence}.safetensors"

    def _stored(self, sequence: int) -> Tensor | None:
        file = self._file(sequence)
        stored = None if file is None else _read(file)
        return None if stored is None else stored.to(self.windows.device)

    def _store(self, sequence: int, states: Tensor) -> None:
        file = self._file(sequence)
        if file is None:
            return
        file.parent.mkdir(parents=True, exist_ok=True)
        partial = file.with_suffix(f".partial-{os.getpid()}")  # several processes may compute the same
        states = states.cpu().contiguous()
        save_file({"hidden": states}, partial, metadata={"sha256": _sha256(states)})
        partial.rename(file)


def _read(file: Path) -> Tensor | None:
    """What a file holds, if it is there and undamaged."""
    try:
        with safe_open(file, framework="pt") as stored:
            states: Tensor = stored.get_tensor("hidden")
            digest = (stored.metadata() or {}).get("sha256")
    except (OSError, SafetensorError):
        return None
    return states if digest == _sha256(states) else None


def _sha256(states: Tensor) -> str:
    return hashlib.sha256(states.numpy().tobytes()).hexdigest()
