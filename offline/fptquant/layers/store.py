"""Where finished layers are kept."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from fptquant.errors import FPTQuantError, is_out_of_memory
from fptquant.files import first_line
from fptquant.simulate import SimulatedLinear
from fptquant.simulate.install import finish_loading
from fptquant.simulate.sink import STEADY


class LayerStore(Protocol):
    """Keeps tensors under names, such as `fptquant.run.state.RunState`."""

    def load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]] | None:
        """Tensors and facts, None when there are none."""

    def save(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Keeps the tensors of a finished part, by the part's name."""


@contextmanager
def restoring(name: str) -> Iterator[None]:
    """For what is done with a loaded state.

    Raises:
        FPTQuantError: it doesn't fit: an earlier version of the packages wrote it.
    """
    try:
        yield
    except (RuntimeError, KeyError, FPTQuantError) as error:
        if is_out_of_memory(error):
            raise
        raise FPTQuantError(
            f"the state '{name}' of the unfinished run doesn't fit ({first_line(error)}): pass --fresh to start over"
        ) from None


def restored(layer: nn.Module, name: str, store: LayerStore | None, device: torch.device) -> bool:
    """Makes a layer of a simulation what it was when it was stored, if it was; on `device`.

    Whether it is steady is only known behind the last layer, so the model knows it and not the store.
    """
    stored = store.load(name) if store else None
    if stored is None:
        return False
    tensors = stored[0] | {name: buffer for name, buffer in layer.named_buffers() if name.endswith(STEADY)}
    for module in layer.modules():
        if isinstance(module, SimulatedLinear) and module.scheme is not None:
            module.weight = None
    with restoring(name):
        layer.load_state_dict({key: tensor.to(device) for key, tensor in tensors.items()}, assign=True)
        finish_loading(layer)
    return True
