"""How parameters are filled, and filled again: vLLM may load other weights into a model that runs.

A kernel keeps weights in its own layout, so a layer's parameters are freed once they were prepared; each leaves a
`ConsumedParameter` under its name. vLLM's reload puts parameters as they were created in their place, fills them and
has them prepared again. What was prepared before is overwritten where it is: compiled and CUDA graphs hold it.
"""

from __future__ import annotations

from collections.abc import Callable
from types import MethodType
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.nn import Module, Parameter
from vllm.config import VllmConfig
from vllm.model_executor.parameter import PerTensorScaleParameter
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError

SHARDS = {"q": 0, "k": 1, "v": 2}  # vLLM's names for parts of qkv_proj; those of others are numbers

# They hold tensors as another vLLM prepared them, or don't have them prepared. Others bring a checkpoint's tensors.
PREPARED_FORMATS = ("sharded_state", "runai_streamer_sharded", "tensorizer", "ipc_cache", "modelexpress")


def require_supported_loading(config: VllmConfig | None) -> None:
    """Refuses load formats without the checkpoint's tensors, and offloading of weights that a kernel holds.

    Args:
        config: of the engine that is being built; None outside of an engine.

    Raises:
        FPTQuantError: names the option.
    """
    if config is None:
        return
    if config.load_config.load_format in PREPARED_FORMATS:
        raise FPTQuantError(
            f"--load-format {config.load_config.load_format} exchanges weights in a kernel's layout, which fptquant's "
            "kernels don't: serve the checkpoint with --load-format auto"
        )
    offload = config.offload_config
    if current_platform.is_cuda() and (offload.uva.cpu_offload_gb > 0 or offload.prefetch.offload_group_size > 0):
        raise FPTQuantError(
            "weights of fptquant's kernels stay on the GPU: leave --cpu-offload-gb and --offload-group-size out"
        )


class ConsumedParameter(Parameter):
    """Takes the place of a parameter whose content a kernel has: empty, and honest about it.

    Without it, vLLM would miss the name when weights are loaded into a running model, and save or compare a model
    without its weights.

    Attributes:
        origin: name of the parameter, for messages.
    """

    origin: str

    def weight_loader(self, *_: Any) -> NoReturn:
        """Refuses weights outside of vLLM's reload.

        Raises:
            FPTQuantError: always.
        """
        raise FPTQuantError(
            f"{self.origin} is in the kernel's layout since vLLM started: load other weights with vLLM's "
            "reload_weights or its weight transfer, in the checkpoint's format"
        )

    def copy_(self, *_: Any, **__: Any) -> NoReturn:
        """Refuses weights in the kernel's format (`is_checkpoint_format=False`).

        Raises:
            FPTQuantError: always.
        """
        self.weight_loader()

    def detach(self) -> NoReturn:
        """Refuses `state_dict`, of which this would be missing: sharded state, tensorizer, checksums.

        Raises:
            FPTQuantError: always.
        """
        raise FPTQuantError(
            f"{self.origin} is in the kernel's layout, which can't be saved or compared: use the checkpoint's own files"
        )


class ShardParameter(PerTensorScaleParameter):  # type: ignore[misc]
    """What has no output features, once for every fused shard: (shards, ...)."""

    def __init__(self, *, inputs: int | None, **arguments: Any) -> None:
        """Takes vLLM's arguments, and the dimension of a shard's tensor that runs over input features, if any."""
        super().__init__(**arguments)
        self.inputs = inputs

    def _load_into_shard_id(self, loaded_weight: Tensor, shard_id: str | int, **_: Any) -> None:
        data = self.data[self._shard_id_as_int(shard_id)]
        if loaded_weight.numel() == 1:  # vLLM gives scalars a dimension
            loaded_weight = loaded_weight.reshape(data.shape)
        assert data.shape == loaded_weight.shape
        data.copy_(loaded_weight)

    def load_column_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The layer is not fused; every rank has all of its inputs."""
        self._load_into_shard_id(loaded_weight, 0)

    def load_row_parallel_weight(self, loaded_weight: Tensor) -> None:
        """The layer is not fused; a rank has a part of its inputs."""
        if self.inputs is not None:
            size = self.data.shape[1 + self.inputs]
            loaded_weight = loaded_weight.narrow(self.inputs, self.tp_rank * size, size)
        self._load_into_shard_id(loaded_weight, 0)


def consume(layer: Module, parameter: str, name: str) -> None:
    """Frees a parameter of `layer`; `name` is the layer's, for messages."""
    data = layer.get_parameter(parameter).data
    consumed = ConsumedParameter(data.new_empty(0), requires_grad=False)
    consumed.origin = f"{parameter} of {name}"
    layer.register_parameter(parameter, consumed)


def is_consumed(layer: Module, parameter: str) -> bool:
    """Whether `consume` freed it, and nothing was loaded since."""
    return isinstance(getattr(layer, parameter), ConsumedParameter)


def set_buffer(layer: Module, name: str, value: Tensor) -> None:
    """Makes `value` a buffer of `layer`, in place where there is one already."""
    before = layer._buffers.get(name)
    if before is None:
        layer.register_buffer(name, value, persistent=False)
    else:
        before.copy_(value)


class Loaded(dict[str, dict[int, torch.Size]]):
    """Shapes of a layer's tensors in the checkpoint, by name and shard.

    Attributes:
        failed: why weights could not be loaded or prepared. vLLM keeps tensors of a reload that failed, and would mix
            them with the next one's.
    """

    failed: FPTQuantError | None = None

    def fail(self, message: str) -> NoReturn:
        """Raises, now and at every later tensor.

        Raises:
            FPTQuantError: `message`.
        """
        self.failed = FPTQuantError(message)
        raise self.failed from None


def require_not_failed(before: FPTQuantError | None) -> None:
    """Refuses another tensor for a layer whose weights could not be loaded or prepared.

    Raises:
        FPTQuantError: says why that was.
    """
    if before is not None:
        raise FPTQuantError(f"loading weights failed before ({before}): start vLLM again")


def recording(
    loader: Callable[..., None], layer: Module, tensor: str, shards: tuple[str, ...], loaded: Loaded
) -> Callable[..., None]:
    """Wraps the weight loader of a parameter.

    Args:
        loader: vLLM's, a method of `layer`.
        layer: its owner; the result is its method too, which vLLM knows not to keep alive.
        tensor: name of the parameter.
        shards: checkpoint names of the layers in it.
        loaded: gets the shape of each tensor.

    Returns:
        A loader that raises `FPTQuantError` where a tensor is of another type, or vLLM can't place it.
    """
    place = loader.__func__  # type: ignore[attr-defined]
    seen = loaded.setdefault(tensor, {})

    # vLLM's reload replaces the argument of this name.
    def load(layer: Module, param: Any, loaded_weight: Tensor, *shard: Any) -> None:
        require_not_failed(loaded.failed)
        index = SHARDS.get(shard[0], shard[0]) if shard else 0
        found = f"{shards[index]}.{tensor} is {loaded_weight.dtype} of shape {list(loaded_weight.shape)}"
        if loaded_weight.dtype != param.dtype:
            loaded.fail(f"{found}, expected {param.dtype}: quantize the model again")
        try:
            place(layer, param, loaded_weight, *shard)
        except (AssertionError, RuntimeError):
            loaded.fail(f"{found}, which doesn't fit the model: quantize the model again")
        seen[index] = loaded_weight.shape

    return MethodType(load, layer)
