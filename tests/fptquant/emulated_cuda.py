"""A CUDA device that computes on the CPU: whole runs on it show what would mix devices on a real one.

A tensor is on the device if its storage was put there: by `.to("cuda")`, by a factory with that device, or as the
result of an operator on such tensors. Values are computed by the CPU's kernels, so that a run on the device has to give
what a run on the CPU gives, bit for bit. Refused is what CUDA refuses: operators on tensors of both devices (but for
numbers, indices and copies), `numpy()`, and generators of the CPU.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

CUDA, MEMORY = torch.device("cuda", 0), 80 * 10**9
_COPIES = {"aten::copy_", "aten::_to_copy"}
_INDICES = {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_"}  # may be on the CPU
# Of two arguments, one may be a number (a tensor without dimensions) on the CPU.
_NUMBERS = re.compile(r"aten::(where|(add|sub|mul|div|pow|eq|ne|lt|le|gt|ge|maximum|minimum|fill|masked_fill)_?)")
_plain_device = torch._C.TensorBase.device.__get__
_plain_to, _plain_numpy, _plain_deepcopy = Tensor.to, Tensor.numpy, Tensor.__deepcopy__


class EmulatedCuda(TorchDispatchMode):
    """Remembers what is on the device, and sees every operator on its way to the kernels."""

    def __init__(self) -> None:
        super().__init__()
        self._storages: dict[int, StorageWeakRef] = {}  # by address, which isn't used again while there is a reference
        self.operators = 0  # that ran there

    def holds(self, tensor: Tensor) -> bool:
        return not tensor.is_meta and tensor.untyped_storage()._cdata in self._storages

    def take(self, tensor: Tensor) -> Tensor:
        if not tensor.is_meta:
            reference = StorageWeakRef(tensor.untyped_storage())
            self._storages[reference.cdata] = reference
            if len(self._storages) % 4096 == 0:
                self._storages = {key: ref for key, ref in self._storages.items() if not ref.expired()}
        return tensor

    def to(self, tensor: Tensor, *arguments: Any, **options: Any) -> Tensor:
        """`Tensor.to`; of what is given by position, device and type count."""
        wanted = options.pop("device", None)
        for argument in arguments:
            if isinstance(argument, Tensor):  # as that one
                wanted, options["dtype"] = argument.device, argument.dtype
            elif isinstance(argument, torch.dtype):
                options["dtype"] = argument
            elif isinstance(argument, str | torch.device):
                wanted = argument
        target = tensor.device if wanted is None else torch.device(wanted)
        if target.type == "meta" or tensor.is_meta:
            return _plain_to(tensor, target, **options)
        result = _plain_to(tensor, **options) if options else tensor
        if target.type == tensor.device.type:
            return result
        assert target.type in ("cpu", "cuda"), target
        assert not tensor.requires_grad or tensor.is_leaf, "gradients between devices"
        size, strides = result.size(), result.stride()
        dense = 0 not in strides  # not expanded
        copied = (
            torch.empty_strided(size, strides, dtype=result.dtype) if dense else torch.empty(size, dtype=result.dtype)
        )
        return (self.take(copied) if target.type == "cuda" else copied).copy_(result)

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        tensors = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor) and not leaf.is_meta]
        device = kwargs.get("device")
        if device is not None and device.type == "cuda":
            if isinstance(generator := kwargs.get("generator"), torch.Generator):
                raise RuntimeError(f"Expected a 'cuda' device type for generator but found '{generator.device}'")
            kwargs["device"], there = torch.device("cpu"), True
        elif device is not None and func is not torch.ops.aten.new_empty_strided.default:  # autograd's, for gradients
            there = False
        else:
            there = self._require_one_device(func, args, tensors)
        result = func(*args, **kwargs)
        if there:
            self.operators += 1
            for leaf in tree_leaves(result):
                if isinstance(leaf, Tensor):
                    self.take(leaf)
        return result

    def _require_one_device(self, func: Any, args: tuple[Any, ...], tensors: list[Tensor]) -> bool:
        """Whether an operator runs on the device."""
        name = func._schema.name
        here = [tensor for tensor in tensors if not self.holds(tensor)]
        if not here or len(here) == len(tensors):
            return bool(tensors) and not here
        if name in _COPIES:
            return self.holds(args[0])
        numbers = _NUMBERS.fullmatch(name) is not None and all(tensor.dim() == 0 for tensor in here)
        if name in _INDICES:
            indices = [index for index in args[1] if index is not None]
            numbers = all(any(t is i for i in indices) or (t.dim() == 0 and t is not args[0]) for t in here)
        if not numbers:
            shapes = [(list(t.shape), "cpu" if any(t is h for h in here) else "cuda") for t in tensors]
            raise RuntimeError(f"Expected all tensors to be on the same device, but {name} got {shapes}")
        return True


@contextmanager
def emulated_cuda() -> Iterator[EmulatedCuda]:
    """There is one CUDA device for as long as the context lasts."""
    cuda = EmulatedCuda()

    def device_of(tensor: Tensor) -> torch.device:
        return CUDA if cuda.holds(tensor) else _plain_device(tensor)

    def numpy(tensor: Tensor, *arguments: Any, **options: Any) -> Any:
        if cuda.holds(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu() first.")
        return _plain_numpy(tensor, *arguments, **options)

    def deepcopy(tensor: Tensor, memo: Any) -> Tensor:
        copied: Tensor = _plain_deepcopy(tensor, memo)
        return cuda.take(copied) if cuda.holds(tensor) else copied

    make = torch.tensor

    def tensor(data: Any, *, device: Any = None, **options: Any) -> Tensor:
        made = make(data, **options)
        return made if device is None else made.to(device)

    clipping = import_module("torch.nn.utils.clip_grad")
    group = clipping._group_tensors_by_device_and_dtype  # it asks C++ for the device

    def grouped(lists: Any, *arguments: Any) -> Any:
        found = group(lists, *arguments)
        return {(device_of(tensors[0][0]), dtype): (tensors, rows) for (_, dtype), (tensors, rows) in found.items()}

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "tensor", tensor)
        patch.setattr(Tensor, "device", property(device_of), raising=False)
        patch.setattr(Tensor, "is_cuda", property(cuda.holds), raising=False)
        patch.setattr(Tensor, "is_cpu", property(lambda tensor: device_of(tensor).type == "cpu"), raising=False)
        patch.setattr(Tensor, "to", lambda tensor, *args, **kwargs: cuda.to(tensor, *args, **kwargs), raising=False)
        patch.setattr(Tensor, "cpu", lambda tensor: cuda.to(tensor, "cpu"), raising=False)
        patch.setattr(Tensor, "cuda", lambda tensor: cuda.to(tensor, "cuda"), raising=False)
        patch.setattr(Tensor, "pin_memory", lambda tensor: tensor, raising=False)
        patch.setattr(Tensor, "numpy", numpy, raising=False)
        patch.setattr(Tensor, "__deepcopy__", deepcopy)
        patch.setattr(torch.cuda, "_lazy_init", lambda: None)
        patch.setattr(torch.cuda, "mem_get_info", lambda device=None: (MEMORY, MEMORY))
        patch.setattr(torch.accelerator, "is_available", lambda: True)
        patch.setattr(torch.accelerator, "current_accelerator", lambda check_available=True: torch.device("cuda"))
        patch.setattr(torch.accelerator, "device_count", lambda: 1)
        patch.setattr(clipping, "_group_tensors_by_device_and_dtype", grouped)
        patch.setattr(torch.optim.Optimizer, "_accelerator_graph_capture_health_check", lambda optimizer: None)
        # the same kernels as on the CPU, one tensor after the other
        adam = import_module("torch.optim.adam")
        patch.setattr(adam, "_default_to_fused_or_foreach", lambda *arguments, **options: (False, False))
        with cuda:
            yield cuda
