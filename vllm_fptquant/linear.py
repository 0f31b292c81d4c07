"""The quantized linear layer: checkpoint tensors in, a prepared kernel out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.logger import init_logger
from vllm.model_executor.layers.linear import (
    LinearBase,
    LinearMethodBase,
    register_weight_loader_v2_supported_method,
)
from vllm.model_executor.parameter import (
    BasevLLMParameter,
    ChannelQuantScaleParameter,
    PackedvLLMParameter,
    PerTensorScaleParameter,
)
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError
from fptquant.format import LinearScheme, hadamard_factors, packed_words, unpack_codes
from fptquant.format.checks import require_positive, require_shared, require_zero_point
from vllm_fptquant.dummy import fill_linear, has_dummy_weights
from vllm_fptquant.kernels.base import CpuKernel, GpuKernel, LinearSpec, LinearWeights
from vllm_fptquant.kernels.gpu import GpuLinear, ScaledInput, make_rotation, require_hadacore
from vllm_fptquant.kernels.operator import PreparedLinear, linear, register_prepared, replace_prepared
from vllm_fptquant.kernels.select import select_kernel
from vllm_fptquant.loading import Loaded, ShapeParameter, consume, is_consumed, recording

logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of its own loggers only

WORD = 32  # bits of a packed word


@register_weight_loader_v2_supported_method
class FPTQuantLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Static quantized linear layer, one instance per layer."""

    def __init__(
        self,
        scheme: LinearScheme,
        shards: tuple[str, ...],
        *,
        hadamard_block: int | None = None,
        kernel: str | None = None,
        exact: bool = False,
        fast_hadamard: bool = False,
    ) -> None:
        """Describes the layer.

        Args:
            scheme: bits and symmetry that all shards share.
            shards: checkpoint names of the fused layers, in order; a single name when nothing is fused.
            hadamard_block: size of T_d's blocks at the input, None where there is no T_d.
            kernel: name of the kernel the user asked for, None to choose.
            exact: compute T_d in float64, see `vllm_fptquant.exact`.
            fast_hadamard: compute T_d in 16 bits, on GPUs.
        """
        self.scheme = scheme
        self.shards = shards
        self.hadamard_block = hadamard_block
        self.kernel = kernel
        self.hadamard_dtype = torch.float64 if exact else torch.float32
        self.fast_hadamard = fast_hadamard
        self.loaded = Loaded()
        self.handle: Tensor | None = None  # of what was prepared, on CPUs
        self.on_gpu: dict[str, Tensor] | None = None  # buffers of what was prepared

    def create_weights(
        self,
        layer: LinearBase,
        input_size_per_partition: int,
        output_partition_sizes: list[int],
        input_size: int,
        output_size: int,
        params_dtype: torch.dtype,
        **extra_weight_attrs: Any,
    ) -> None:
        """Creates the parameters that the checkpoint's tensors are loaded into.

        Raises:
            FPTQuantError: a tensor-parallel size that splits a packed word or a Hadamard block, or a kernel
                override that cannot compute this layer.
        """
        weights, activations = self.scheme.weights, self.scheme.activations
        in_features, out_features = input_size_per_partition, sum(output_partition_sizes)
        shards = len(output_partition_sizes)
        if shards != len(self.shards):
            raise FPTQuantError(f"{self.shards[0]}: vLLM fuses {shards} layers, we know {len(self.shards)}")
        self._check_partition(in_features, input_size)
        self.output_partition_sizes = output_partition_sizes
        self.in_features = input_size
        capability = device_capability()
        spec = LinearSpec(
            self.scheme, in_features, out_features, params_dtype, current_platform.device_type, capability
        )
        self.kernel_class, reason = select_kernel(spec, self.kernel, ", ".join(self.shards))
        kind = "+".join(name.rpartition(".")[2] for name in self.shards)
        bits = f"w{weights.bits}a{activations.bits}"
        logger.info_once("fptquant: %s (%s) uses kernel %s: %s", kind, bits, self.kernel_class.name, reason)
        if self.fast_hadamard and self.hadamard_block is not None:
            require_hadacore(self.shards[0], self.hadamard_block, capability)

        layer.params_dtype = params_dtype
        layer.fptquant_out_features = out_features
        layer.fptquant_takes_scale = issubclass(self.kernel_class, GpuKernel)
        self.dummy = has_dummy_weights()

        def add(name: str, parameter: type[BasevLLMParameter], data: Tensor, **attributes: Any) -> None:
            recorded = recording(extra_weight_attrs["weight_loader"], layer, name, self.shards, self.loaded)
            layer.register_parameter(name, parameter(data=data, weight_loader=recorded, **attributes))

        words = packed_words(in_features, weights.bits)
        add(
            "weight_packed",
            PackedvLLMParameter,
            torch.zeros(out_features, words, dtype=torch.int32),
            input_dim=1,
            output_dim=0,
            packed_dim=1,
            packed_factor=WORD // weights.bits,
        )
        # Not in the default type, which vLLM sets to the model's.
        missing = torch.full((out_features, 1), float("nan"), dtype=torch.float32)
        add("weight_scale", ChannelQuantScaleParameter, missing, output_dim=0)
        add("weight_shape", ShapeParameter, torch.zeros(shards, 2, dtype=torch.int64))
        if activations.bits < 16:
            add("input_scale", PerTensorScaleParameter, missing.new_full((shards,), float("nan")))
            if not activations.symmetric:
                add("input_zero_point", PerTensorScaleParameter, torch.zeros(shards, dtype=torch.int32))
        for parameter in layer.parameters(recurse=False):
            parameter.requires_grad = False

    def process_weights_after_loading(self, layer: LinearBase) -> None:
        """Checks what was loaded, hands it to the kernel and frees it.

        Raises:
            FPTQuantError: a tensor is missing or contradicts the model, a scale is not a positive number, or
                fused shards have different input quantizers.
        """
        if is_consumed(layer, "weight_packed"):
            return  # done already
        try:
            weights = self._checked(layer)
            for name in self.loaded:
                consume(layer, name, " / ".join(self.shards))
            self._prepare(layer, weights)
        except FPTQuantError as error:
            self.loaded.failed = error
            raise
        for seen in self.loaded.values():
            seen.clear()

    def _checked(self, layer: LinearBase) -> LinearWeights:
        """What was loaded, checked and unpacked."""
        if self.dummy and not any(self.loaded.values()):
            ranks = getattr(layer, "tp_size", 1)
            fill_linear(layer, self.scheme, [(rows * ranks, self.in_features) for rows in self.output_partition_sizes])
        else:
            self._require_loaded()
            self._require_shapes(layer)
        scales = layer.weight_scale.data.split(self.output_partition_sizes)
        for name, scale in zip(self.shards, scales, strict=True):
            require_positive(f"{name}.weight_scale", scale)
        input_scale = zero_point = None
        if self.scheme.activations.bits < 16:
            for name, scale in zip(self.shards, layer.input_scale.data, strict=True):
                require_positive(f"{name}.input_scale", scale)
            input_scale = self._shared("input_scale", layer.input_scale.data)
            if not self.scheme.activations.symmetric:
                zero_point = self._shared("input_zero_point", layer.input_zero_point.data)
                require_zero_point(f"{self.shards[0]}.input_zero_point", zero_point, self.scheme.activations.bits)
        shape = torch.Size((layer.fptquant_out_features, layer.input_size_per_partition))
        return LinearWeights(
            scheme=self.scheme,
            codes=unpack_codes(layer.weight_packed.data, self.scheme.weights.bits, shape),
            weight_scale=layer.weight_scale.data.flatten(),
            input_scale=input_scale,
            input_zero_point=zero_point,
            name=" / ".join(self.shards),
        )

    def _prepare(self, layer: LinearBase, weights: LinearWeights) -> None:
        """Builds the kernel; where there is one already, graphs go on with the new weights."""
        if issubclass(self.kernel_class, GpuKernel):
            kernel = self.kernel_class(weights, layer.params_dtype)
            rotation_on_gpu = make_rotation(
                self.hadamard_block, self.fast_hadamard, layer.params_dtype, weights.codes.device
            )
            prepared_on_gpu = GpuLinear(kernel, weights, rotation_on_gpu)
            buffers = dict(prepared_on_gpu.named_buffers())
            if self.on_gpu is None:
                self.on_gpu = buffers
                layer.fptquant_gpu = prepared_on_gpu
            else:  # vLLM took them off their modules for the time of a reload, and puts them back
                for name, buffer in self.on_gpu.items():
                    buffer.copy_(buffers[name])
            return
        assert issubclass(self.kernel_class, CpuKernel)
        rotation = None
        if self.hadamard_block is not None:
            rotation = hadamard_factors(self.hadamard_block, self.hadamard_dtype)
        prepared = PreparedLinear(self.kernel_class(weights), weights, rotation)
        layer.fptquant_prepared = prepared
        layer.fptquant_plain = getattr(layer, "tp_size", 1) == 1 and getattr(layer, "bias", None) is None
        if self.handle is None:
            self.handle = register_prepared(layer, prepared)
        else:
            replace_prepared(self.handle, prepared)
        layer.register_buffer("fptquant_handle", self.handle, persistent=False)

    def apply(self, layer: LinearBase, x: Tensor | ScaledInput, bias: Tensor | None = None) -> Tensor:
        """(..., K) to (..., N): T_d where the layer has it, quantize, multiply, scale, add `bias`.

        `ScaledInput` is for layers that are `fptquant_takes_scale`.
        """
        if layer.fptquant_takes_scale:
            on_gpu: Tensor = layer.fptquant_gpu(x, bias)
            return on_gpu
        assert isinstance(x, Tensor)
        if torch.compiler.is_compiling():
            return linear(x, layer.fptquant_handle, bias, layer.fptquant_out_features)
        prepared: PreparedLinear = layer.fptquant_prepared  # eager: without the operator's way through the dispatcher
        return prepared(x, bias)

    @staticmethod
    def apply_scaled(layer: LinearBase, x: Tensor, scale: Tensor, *, undo: bool) -> Tensor:
        """`apply` to `scale * x` in eager mode, for a layer that is `fptquant_plain`: one rank, no bias.

        With `undo`, the product is divided by `scale` again.
        """
        prepared: PreparedLinear = layer.fptquant_prepared
        return prepared(x, None, scale, undo=undo)

    def _check_partition(self, in_features: int, total: int) -> None:
        """Refuses tensor-parallel sizes that cut through a packed word or a Hadamard block."""
        name, parts, bits = self.shards[0], total // in_features, self.scheme.weights.bits
        block = self.hadamard_block
        if block is not None and in_features % block:
            raise FPTQuantError(
                f"{name}: tensor-parallel size {parts} leaves {in_features} input features to a rank, which "
                f"splits the Hadamard blocks of {block}: use a size that divides {total // block}, or "
                f"quantize the model again with T_d: {{max_tensor_parallel: {parts}}} in the recipe"
            )
        if parts > 1 and in_features % (WORD // bits):
            raise FPTQuantError(
                f"{name}: tensor-parallel size {parts} leaves {in_features} input features to a rank, which "
                f"is no multiple of the {WORD // bits} weights in a packed word: use a smaller size"
            )

    def _require_loaded(self) -> None:
        missing = [name for name, seen in self.loaded.items() if len(seen) < len(self.shards)]
        if missing:
            raise FPTQuantError(
                f"{' / '.join(self.shards)}: the checkpoint has no {', '.join(missing)} "
                "(for all of them): it is incomplete, quantize the model again"
            )

    def _require_shapes(self, layer: LinearBase) -> None:
        """Refuses tensors of which vLLM took a part only, or that contradict each other."""
        for index, (name, (rows, columns)) in enumerate(zip(self.shards, layer.weight_shape.tolist(), strict=True)):
            if columns != self.in_features:
                raise FPTQuantError(
                    f"{name}.weight_shape: {columns} input features, but the model has {self.in_features}"
                )
            self._require_rows(layer, index, rows)
            words = packed_words(columns, self.scheme.weights.bits)
            for tensor, shape in (("weight_packed", [rows, words]), ("weight_scale", [rows, 1])):
                found = list(self.loaded[tensor][index])
                if found != shape:
                    raise FPTQuantError(f"{name}.{tensor} has shape {found}, not {shape}: quantize the model again")

    def _require_rows(self, layer: LinearBase, index: int, rows: int) -> None:
        """Refuses a shard of more or fewer output features than the ranks have together."""
        local, ranks = self.output_partition_sizes[index], getattr(layer, "tp_size", 1)
        if not local <= rows <= local * ranks or rows % local:  # ranks may share key and value heads
            raise FPTQuantError(
                f"{self.shards[index]}.weight_shape: {rows} output features, "
                f"but the model has {local} on each of {ranks} ranks"
            )

    def _shared(self, tensor: str, values: Tensor) -> Tensor:
        """The one value that all shards have: their product is computed from one quantized input."""
        require_shared(tensor, self.shards, values)
        return values[0].clone()


def device_capability() -> int | None:
    """Of the GPU that this process serves on, 86 for 8.6; None on CPUs."""
    capability = current_platform.get_device_capability()
    return None if capability is None else capability.to_int()
