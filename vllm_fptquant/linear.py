"""The quantized linear layer: checkpoint tensors in, a prepared kernel out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Literal

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
)
from vllm.platforms import current_platform

from fptquant.errors import FPTQuantError
from fptquant.format import per_column, unpack_codes
from fptquant.format.checks import require_multiplier, require_positive, require_shared, require_zero_point
from fptquant.format.steps import Hadamard, Step, StepTensor, arrange
from vllm_fptquant.dummy import fill_linear, has_dummy_weights
from vllm_fptquant.kernels.base import CpuKernel, GpuKernel, LinearSpec, LinearWeights
from vllm_fptquant.kernels.gpu import GpuLinear, ScaledInput, require_hadacore
from vllm_fptquant.kernels.marlin_cutlass import widening_threshold
from vllm_fptquant.kernels.operator import PreparedLinear, linear, register_prepared, replace_prepared
from vllm_fptquant.kernels.select import select_kernel
from vllm_fptquant.loading import Loaded, ShardParameter, consume, is_consumed, recording

logger = init_logger(f"vllm.{__name__}")  # vLLM shows messages of its own loggers only


@register_weight_loader_v2_supported_method
class FPTQuantLinearMethod(LinearMethodBase):  # type: ignore[misc]
    """Static quantized linear layer, one instance per layer."""

    def __init__(
        self,
        steps: Iterable[Step],
        shards: tuple[str, ...],
        *,
        kernel: str | None = None,
        exact: bool = False,
        fast_hadamard: bool = False,
        experts: bool = False,
        widen_from: int | Literal["never"] | None = None,
    ) -> None:
        """Describes the layer.

        Args:
            steps: of the layer, which all shards share; integer weights.
            shards: checkpoint names of the fused layers, in order; a single name when nothing is fused.
            kernel: name of the kernel the user asked for, None to choose.
            exact: compute online steps in float64, see `vllm_fptquant.exact`.
            fast_hadamard: compute T_d in 16 bits, on GPUs.
            experts: whether it is one of many experts that a GPU computes together.
            widen_from: tokens of a step from which on 4-bit weights are widened, on GPUs; None for the shipped table.

        Raises:
            FPTQuantError: a step that the plugin doesn't know.
        """
        self.shards = shards
        self.arrangement = arrange(steps, " / ".join(shards))
        assert self.arrangement.product.scheme is not None
        self.scheme = self.arrangement.product.scheme
        self.kernel = kernel
        self.exact = exact
        self.fast_hadamard = fast_hadamard
        self.experts = experts
        self.widen_from = widen_from
        self.place: Callable[[GpuLinear], None] | None = None  # takes what was prepared, of an expert on a GPU
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
            FPTQuantError: a tensor-parallel size that splits what a step needs in one piece, or a kernel override
                that cannot compute this layer.
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
        self.spec = LinearSpec(
            self.scheme,
            in_features,
            out_features,
            params_dtype,
            current_platform.device_type,
            capability,
            self.experts,
            widening_threshold(self.widen_from, capability),
        )
        self.kernel_class, reason = select_kernel(self.spec, self.kernel, ", ".join(self.shards))
        kind = "+".join(name.rpartition(".")[2] for name in self.shards)
        bits = f"{weights.label}a{activations.bits}"
        logger.info_once("fptquant: %s (%s) uses kernel %s: %s", kind, bits, self.kernel_class.name, reason)
        for step in self.arrangement.inputs:
            if self.fast_hadamard and isinstance(step, Hadamard):
                require_hadacore(self.shards[0], step.block, capability)

        layer.params_dtype = params_dtype
        layer.fptquant_out_features = out_features
        layer.fptquant_takes_scale = issubclass(self.kernel_class, GpuKernel)
        layer.fptquant_scaled, layer.fptquant_undone = self.arrangement.scaled, self.arrangement.undone
        self.dummy = has_dummy_weights()

        for name, tensor in self.arrangement.tensors(in_features, out_features).items():
            recorded = recording(extra_weight_attrs["weight_loader"], layer, name, self.shards, self.loaded)
            layer.register_parameter(name, make_parameter(tensor, shards, recorded))

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
        if self.arrangement.quantize is not None:
            for name, scale in zip(self.shards, layer.input_scale.data, strict=True):
                require_positive(f"{name}.input_scale", scale)
        rows, columns = layer.fptquant_out_features, layer.input_size_per_partition
        shared = {
            name: self._shared(name, layer.get_parameter(name).data)
            for name in self.arrangement.shared_tensors(columns, rows)
        }
        zero_point = shared.get("input_zero_point")
        if zero_point is not None:
            require_zero_point(f"{self.shards[0]}.input_zero_point", zero_point, self.scheme.activations.bits)
        return LinearWeights(
            scheme=self.scheme,
            codes=self._codes(layer, rows, columns),
            weight_scale=layer.weight_scale.data.flatten(),
            input_scale=shared.get("input_scale"),
            input_zero_point=zero_point,
            name=" / ".join(self.shards),
            rows=tuple(self.output_partition_sizes),
            online=tuple(self._online(layer, index) for index in range(len(self.shards))),
        )

    def _codes(self, layer: LinearBase, rows: int, columns: int) -> Tensor:
        """What is multiplied, int8 (rows, columns)."""
        codes = unpack_codes(layer.weight_packed.data, self.scheme.weights.bits, torch.Size((rows, columns)))
        if self.scheme.weights.group_size is not None:
            multipliers = layer.weight_multiplier.data
            for name, part in zip(self.shards, multipliers.split(self.output_partition_sizes), strict=True):
                require_multiplier(f"{name}.weight_multiplier", part)
            codes *= per_column(multipliers, columns)
        return codes

    def _online(self, layer: LinearBase, index: int) -> Mapping[str, Tensor]:
        """Tensors of a shard's steps other than quantizer and product, by name."""
        found = {}
        rows = self.output_partition_sizes
        for step in self.arrangement.online:
            for tensor in step.tensors(layer.input_size_per_partition, rows[index]):
                data = layer.get_parameter(tensor.name).data
                found[tensor.name] = (data if tensor.outputs is None else data.split(rows, tensor.outputs))[index]
                if tensor.once and layer.input_size_per_partition < self.in_features and layer.tp_rank > 0:
                    found[tensor.name] = torch.zeros_like(found[tensor.name])
        return found

    def _prepare(self, layer: LinearBase, weights: LinearWeights) -> None:
        """Builds the kernel; where there is one already, graphs go on with the new weights."""
        if issubclass(self.kernel_class, GpuKernel):
            kernel = self.kernel_class(weights, layer.params_dtype)
            kernel.widen_from = self.spec.widen_from
            prepared_on_gpu = GpuLinear(kernel, weights, self.arrangement, fast_hadamard=self.fast_hadamard)
            buffers = dict(prepared_on_gpu.named_buffers())
            if self.place is not None:
                self.place(prepared_on_gpu)
            elif self.on_gpu is None:
                self.on_gpu = buffers
                layer.fptquant_gpu = prepared_on_gpu
            else:  # vLLM took them off their modules for the time of a reload, and puts them back
                for name, buffer in self.on_gpu.items():
                    buffer.copy_(buffers[name])
            return
        assert issubclass(self.kernel_class, CpuKernel)
        prepared = PreparedLinear(self.kernel_class(weights), weights, self.arrangement, exact=self.exact)
        layer.fptquant_prepared = prepared
        layer.fptquant_plain = getattr(layer, "tp_size", 1) == 1 and getattr(layer, "bias", None) is None
        if self.handle is None:
            self.handle = register_prepared(layer, prepared)
        else:
            replace_prepared(self.handle, prepared)
        layer.register_buffer("fptquant_handle", self.handle, persistent=False)

    def apply(self, layer: LinearBase, x: Tensor | ScaledInput, bias: Tensor | None = None) -> Tensor:
        """(..., K) to (..., N): the layer's steps, with `bias` for the last one.

        `ScaledInput` is for layers that are `fptquant_takes_scale`.
        """
        if layer.fptquant_takes_scale:
            on_gpu: Tensor = layer.fptquant_gpu(x, bias)
            return on_gpu
        assert isinstance(x, Tensor)
        prepared: PreparedLinear = layer.fptquant_prepared
        if torch.compiler.is_compiling() and not prepared.kernel.traced:
            return linear(x, layer.fptquant_handle, bias, layer.fptquant_out_features)
        return prepared(x, bias)

    @staticmethod
    def apply_scaled(layer: LinearBase, x: Tensor, scale: Tensor) -> Tensor:
        """`apply` with S (rows, 1) in eager mode, for a layer that is `fptquant_plain`: one rank, no bias."""
        prepared: PreparedLinear = layer.fptquant_prepared
        return prepared(x, None, scale)

    def _check_partition(self, in_features: int, total: int) -> None:
        """Refuses tensor-parallel sizes that cut through what a step needs in one piece."""
        parts = total // in_features
        for step in reversed(self.arrangement.steps):  # weights, which any smaller size may suit, last
            refusal = step.split_refusal(in_features, parts)
            if refusal is not None:
                raise FPTQuantError(
                    f"{self.shards[0]}: tensor-parallel size {parts} leaves {in_features} input features to a rank, "
                    f"which {refusal}"
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
            for tensor in self.arrangement.tensors(columns, rows).values():
                found, shape = list(self.loaded[tensor.name][index]), list(tensor.shape)
                if shape and found != shape:  # scalars may have a dimension
                    raise FPTQuantError(
                        f"{name}.{tensor.name} has shape {found}, not {shape}: quantize the model again"
                    )

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


def make_parameter(tensor: StepTensor, shards: int, loader: Any) -> BasevLLMParameter:
    """An empty parameter for a step's tensor.

    Args:
        tensor: at the sizes of this rank, all shards together.
        shards: how many layers are fused.
        loader: of the parameter.
    """
    missing: Any = float("nan") if tensor.dtype.is_floating_point else 0
    # Not in the default type, which vLLM sets to the model's.
    data = torch.full(tensor.shape, missing, dtype=tensor.dtype)
    if tensor.outputs is None:
        data = data.expand(shards, *tensor.shape).clone()
        return ShardParameter(inputs=tensor.inputs, data=data, weight_loader=loader)
    if tensor.packed == 1:
        return ChannelQuantScaleParameter(data=data, weight_loader=loader, output_dim=tensor.outputs)
    return PackedvLLMParameter(
        data=data,
        weight_loader=loader,
        input_dim=tensor.inputs,
        output_dim=tensor.outputs,
        packed_dim=tensor.inputs,
        packed_factor=tensor.packed,
    )


def device_capability() -> int | None:
    """Of the GPU that this process serves on, 86 for 8.6; None on CPUs."""
    capability = current_platform.get_device_capability()
    return None if capability is None else capability.to_int()
