"""The original model's final hidden states on the training text, from which its distributions follow."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.wiring import Architecture


class Teacher:
    """Final hidden states, computed when first asked for and kept on disk; far smaller than logits.

    The model is only needed until every sequence to be asked for has been seen, and is let go of with `release`.
    """

    def __init__(self, model: PreTrainedModel, architecture: Architecture, windows: Tensor, cache: Path | None) -> None:
        """Takes the original model.

        Args:
            model: the original, in float32; not changed.
            architecture: its family.
            windows: (sequences, length) training tokens.
            cache: directory for the hidden states; None computes them again each time.
        """
        self.windows, self.cache = windows, cache
        self._model: PreTrainedModel | None = model
        weight = model.get_submodule(architecture.head).get_parameter("weight")
        bias = getattr(model.get_submodule(architecture.head), "bias", None)
        self._weight = weight.detach().clone()
        self._bias = None if bias is None else bias.detach().clone()

    def head(self, hidden: Tensor) -> Tensor:
        """Logits (tokens, vocabulary) of final hidden states (tokens, hidden)."""
        return nn.functional.linear(hidden, self._weight, self._bias)

    @torch.no_grad()
    def hidden(self, sequence: int) -> Tensor:
        """Final hidden states (length, hidden) of one training sequence."""
        file = None if self.cache is None else self.cache / f"{sequence}.safetensors"
        stored = None if file is None else _read(file)
        if stored is not None:
            return stored
        assert self._model is not None, "the teacher was released before all sequences were seen"
        states: Tensor = self._model.base_model(self.windows[sequence][None], use_cache=False).last_hidden_state[0]
        if file is not None:
            file.parent.mkdir(parents=True, exist_ok=True)
            partial = file.with_suffix(f".partial-{os.getpid()}")  # several processes may compute the same
            states = states.contiguous()
            save_file({"hidden": states}, partial, metadata={"sha256": _sha256(states)})
            partial.rename(file)
        return states

    def release(self) -> None:
        """Lets go of the model; all sequences to be asked for must be in the cache."""
        self._model = None


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
