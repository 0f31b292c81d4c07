"""Which layers of a model are in memory.

A model may be a skeleton on the meta device. Each of its *parts*, a decoder layer, the embedding or the head, then has
a function that fills it, and is filled when it is entered. What happens when it is left is the policy:

- resident: it stays, and is filled once.
- streamed: its matrices are let go of, and read again the next time. Vectors and scales, which are small, stay.

Calling a part's forward enters it. Who works on its weights says so, and need not know what kind of model it is:

    with entered(layer):
        ...

Nothing here knows where a part's tensors come from; see `fptquant.run.models`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.process_memory import trim_memory

Residency = Literal["resident", "streamed"]
Fill = Callable[[nn.Module], None]

_ATTRIBUTE = "fptquant_part"
_MATRICES = ("weight", "weight_packed", "codes")  # of linear layers and embeddings: nearly all of a model's bytes


@dataclass
class _Part:
    """What a module needs to be filled; it doesn't refer to the module, so that no circle keeps a model alive."""

    fill: Fill
    residency: Residency
    entered: int = 0
    filled: bool = False


def make_part(module: nn.Module, fill: Fill, residency: Residency) -> None:
    """Makes a module a part.

    Args:
        module: with its tensors on the meta device.
        fill: gives it all tensors that a forward pass needs; called when it is entered and they aren't there.
        residency: resident: `fill` is called now, and its tensors stay; streamed: they go when it is left.
    """
    part = _Part(fill, residency)
    setattr(module, _ATTRIBUTE, part)
    if residency == "resident":
        _fill(part, module)
    module.register_forward_pre_hook(_on_call)
    module.register_forward_hook(_on_return, always_call=True)  # an exception ends a call, too


def extend(module: nn.Module, extra: Callable[[nn.Module, Fill], None]) -> Fill:
    """Fills a part by `extra` from now on; which is given what filled it so far, to be called or not.

    A part that stays in memory is not filled again: `extra` is called at once then, with a function that does nothing.

    Returns:
        What filled it so far, for `refill`.
    """
    part = _part(module)
    assert part is not None and part.entered == 0, "no part, or one in use"
    before = part.fill
    part.fill = lambda module: extra(module, before)
    if part.filled:
        with torch.no_grad():
            extra(module, lambda module: None)
    return before


def ride_along(layers: Sequence[nn.Module], ride: Callable[[int, nn.Module], None]) -> None:
    """Has `ride(index, layer)` called once with each layer, in order, when it is first filled.

    Where a layer stays in memory, it is there already and `ride` is called at once.
    """
    waiting = dict.fromkeys(range(len(layers)), ride)  # nothing holds on to `ride` once all are through
    for index, layer in enumerate(layers):

        def fill(layer: nn.Module, before: Fill, index: int = index) -> None:
            before(layer)
            if index in waiting:
                waiting[index](index, layer)
                del waiting[index]

        extend(layer, fill)


def refill(module: nn.Module, fill: Fill) -> None:
    """Fills a streamed part by `fill` alone from now on."""
    part = _part(module)
    assert part is not None and not part.filled, "no part, or one that is there"
    part.fill = fill


def fill_of(module: nn.Module) -> Fill:
    """Returns the function that fills a part when it is entered."""
    part = _part(module)
    assert part is not None, "no part"
    return part.fill


@contextmanager
def entered(module: nn.Module) -> Iterator[nn.Module]:
    """Keeps a part filled for as long as the context lasts; does nothing where `module` is none, and always there."""
    _enter(module)
    try:
        yield module
    finally:
        _leave(module)


def set_tensors(module: nn.Module, tensors: Mapping[str, Tensor]) -> None:
    """Gives a module its parameters and buffers by name, without copying."""
    for name, tensor in tensors.items():
        parent, _, leaf = name.rpartition(".")
        owner = module.get_submodule(parent)
        if leaf in owner._parameters:
            owner._parameters[leaf] = nn.Parameter(tensor, requires_grad=False)
        else:
            setattr(owner, leaf, tensor)


def put_buffers(model: nn.Module, device: torch.device) -> None:
    """Puts what a skeleton has beside its parts' tensors, such as RoPE's frequencies and empty scales, on a device."""
    for module in model.modules():
        for name, buffer in module._buffers.items():
            if buffer is not None and not buffer.is_meta:
                module._buffers[name] = buffer.to(device)


def is_streamed(module: nn.Module) -> bool:
    """Whether a module's matrices go when it is left."""
    part = _part(module)
    return part is not None and part.residency == "streamed"


@contextmanager
def recomputed(model: PreTrainedModel, layers: Sequence[nn.Module], *, always: bool) -> Iterator[None]:
    """Lets backward passes compute each layer again, from its inputs, instead of keeping what is inside it.

    Layers that are streamed are then in memory one at a time backward, too.

    Args:
        model: of the layers.
        layers: its decoder layers.
        always: also where no layer is streamed.
    """
    if not (always or any(map(is_streamed, layers))):
        yield
        return
    model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    for layer in layers:
        layer.training = True  # transformers looks at it; only layers are put into it, so that nothing drops out
    try:
        yield
    finally:
        model.gradient_checkpointing_disable()
        for layer in layers:
            layer.training = False


def release(module: nn.Module) -> None:
    """Lets go of a module's matrices: they are on the meta device from now on."""
    for owner in module.modules():
        for name in _MATRICES:
            parameter, buffer = owner._parameters.get(name), owner._buffers.get(name)
            if parameter is not None and parameter.dim() > 1:
                owner._parameters[name] = nn.Parameter(_empty(parameter), requires_grad=False)
            elif buffer is not None and buffer.dim() > 1:
                owner._buffers[name] = _empty(buffer)


def small_tensors(module: nn.Module) -> dict[str, Tensor]:
    """By name, what of a streamed module's state is there while it isn't entered."""
    return {name: tensor for name, tensor in module.state_dict().items() if not tensor.is_meta}


def _empty(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, device="meta")


def _part(module: nn.Module) -> _Part | None:
    found: _Part | None = getattr(module, _ATTRIBUTE, None)
    return found


def _enter(module: nn.Module) -> None:
    part = _part(module)
    if part is None:
        return
    part.entered += 1
    if not part.filled:
        try:
            _fill(part, module)
        except BaseException:
            part.entered -= 1
            raise


def _fill(part: _Part, module: nn.Module) -> None:
    part.filled = True  # what fills it may run it
    try:
        with torch.no_grad():
            part.fill(module)
    except BaseException:
        part.filled = False
        raise


def _leave(module: nn.Module) -> None:
    part = _part(module)
    if part is None or part.entered == 0:  # the call that ends here failed to enter it
        return
    part.entered -= 1
    if part.entered == 0 and part.residency == "streamed":
        release(module)
        part.filled = False
        trim_memory()


def _on_call(module: nn.Module, args: Any) -> None:
    _enter(module)


def _on_return(module: nn.Module, args: Any, output: Any) -> None:
    _leave(module)
