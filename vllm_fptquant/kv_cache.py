"""Static INT4 and INT8 KV cache on attention kernels that know nothing of it, without rounding twice.

The cache holds integer codes `q - z`, which its floating-point type represents exactly, in place of keys and
values:

    softmax((query * s_k) . (q_k - z_k)) applied to (q_v - z_v), times s_v

is attention over the dequantized keys and values. It saves no memory by itself: vLLM has no attention kernel
for static integers.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import Module
from vllm.config import CompilationMode, get_current_vllm_config
from vllm.distributed import get_tensor_model_parallel_rank, get_tensor_model_parallel_world_size
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.quantization.kv_cache import BaseKVCacheMethod
from vllm.platforms import current_platform
from vllm.v1.attention.backend import AttentionType

from fptquant.errors import FPTQuantError
from fptquant.format import KVCacheScheme, code_bounds, quantize
from fptquant.format.checks import require_positive, require_zero_point
from vllm_fptquant.dummy import fill_kv_cache, has_dummy_weights
from vllm_fptquant.loading import consume, is_consumed, require_not_failed, set_buffer

CACHE_DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
    "fp8": torch.float8_e4m3fn,
    "fp8_e4m3": torch.float8_e4m3fn,
}


class StaticKVAttention(Attention):  # type: ignore[misc]
    """vLLM's attention layer with quantized keys and values.

    An `Attention` instance becomes one by a change of its class: vLLM's models construct the layer
    themselves, and the integer cache has to work in all of them.
    """

    fptquant_shifts_keys = False

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        output_shape: torch.Size | None = None,
        output_dtype: torch.dtype | None = None,
        sink: Tensor | None = None,
    ) -> Tensor:
        """Attention over codes.

        Args:
            query: (T, heads * head_dim), after RoPE.
            key: (T, kv_heads * head_dim), after RoPE.
            value: (T, kv_heads * head_dim).
            output_shape: as in `Attention.forward`.
            output_dtype: as in `Attention.forward`.
            sink: bool (T, 1), the tokens whose keys and values are the checkpoint's constants.
        """
        # Flat, and keys and values in one go: every operator costs as much as its arithmetic when decoding.
        states = torch.cat((key.flatten(1), value.flatten(1)), -1)  # (T, kv_heads * (head_size + head_size_v))
        if self.fptquant_shifts_keys:
            states = states - self.fptquant_kv_shift
        codes = quantize(states, self.fptquant_kv_scale, self.fptquant_kv_low, self.fptquant_kv_high)
        if sink is not None:
            codes = torch.where(sink, self.fptquant_sink_codes, codes)
        keys, values = codes.to(key.dtype).tensor_split((self.num_kv_heads * self.head_size,), -1)
        queries = (query.flatten(1) * self.fptquant_query_scale).to(query.dtype)
        output: Tensor = super().forward(queries, keys, values, output_shape, output_dtype)
        return output.mul_(self.fptquant_output_scale)


class FPTQuantKVCacheMethod(BaseKVCacheMethod):  # type: ignore[misc]
    """Loads `k_scale`, `v_scale` and zero points of one attention layer."""

    supports_pre_processed_weights = False

    def __init__(self, quant_config: Any, scheme: KVCacheScheme, *, sink: bool = False, exact: bool = False) -> None:
        """Takes the checkpoint's scheme, of less than 16 bits.

        Args:
            quant_config: of the checkpoint.
            scheme: of the cache.
            sink: whether the checkpoint has constant keys and values (`fptquant.simulate.sink`).
            exact: as in `vllm_fptquant.exact`.
        """
        super().__init__(quant_config)
        self.sink = sink
        self.scheme = scheme
        self.exact = exact
        self.dummy = False
        self.failed: FPTQuantError | None = None  # see `loading.Loaded`

    def create_weights(self, layer: Attention) -> None:
        """Adds the parameters, and makes the layer a `StaticKVAttention`.

        Raises:
            FPTQuantError: a KV cache type that cannot hold the codes exactly.
        """
        name = layer.layer_name.removesuffix(".attn")
        largest = 2 ** (self.scheme.bits - 1) if self.scheme.symmetric else 2**self.scheme.bits - 1
        require_exact_cache(name, layer, largest, sink=self.sink)
        per_head = self.scheme.strategy == "head"
        size = layer.num_kv_heads if per_head else 1
        for side in ("k", "v"):
            scale = torch.full((size,), float("nan"), dtype=torch.float32)
            self._add_parameter(layer, name, f"{side}_scale", scale, per_head)
            if not self.scheme.symmetric:
                missing = torch.full((size,), torch.iinfo(torch.int32).min, dtype=torch.int32)
                self._add_parameter(layer, name, f"{side}_zero_point", missing, per_head)
        if self.scheme.shift:
            missing = torch.full((layer.num_kv_heads, layer.head_size), float("nan"), dtype=torch.float32)
            self._add_parameter(layer, name, "k_shift", missing, per_head=True)
        if self.sink:
            for side in ("k", "v"):
                size = layer.head_size if side == "k" else layer.head_size_v
                constant = torch.full((layer.num_kv_heads, size), float("nan"), dtype=torch.float32)
                self._add_parameter(layer, name, f"{side}_sink", constant, per_head=True)
            self._add_parameter(layer, name, "sink_steady", torch.tensor([-1], dtype=torch.int32), per_head=False)
        if isinstance(layer, StaticKVAttention):
            return  # created again, for other weights
        layer.__class__ = StaticKVAttention
        self.dummy = has_dummy_weights()
        eager = get_current_vllm_config().compilation_config.mode == CompilationMode.NONE
        if eager and current_platform.is_cpu():
            layer.use_direct_call = True  # without the custom operators' way through the dispatcher

    def process_weights_after_loading(self, layer: Attention) -> None:
        """Checks what was loaded and turns it into buffers of `StaticKVAttention`.

        Raises:
            FPTQuantError: a tensor is missing, a scale is not a positive number or a zero point out of range.
        """
        if is_consumed(layer, "k_scale"):
            return  # done already
        try:
            self._prepare(layer)
        except FPTQuantError as error:
            self.failed = error
            raise

    def _prepare(self, layer: Attention) -> None:
        """`process_weights_after_loading`, where there is something to do."""
        if getattr(layer, "query_quant", None) is not None:
            raise FPTQuantError(
                f"{layer.layer_name}: attention backend {layer.attn_backend.get_name()} quantizes the query "
                "to fp8, which is not exact: serve with --kv-cache-dtype auto"
            )
        if self.exact:
            from vllm_fptquant.exact import ExactAttentionImpl

            layer.impl.__class__ = ExactAttentionImpl
        if self.dummy:
            fill_kv_cache(layer, self.scheme)
            self.dummy = False
        name = layer.layer_name.removesuffix(".attn")
        sizes = {"k": layer.head_size, "v": layer.head_size_v}
        scales, bounds = {}, []
        for side in ("k", "v"):
            scale = layer.get_parameter(f"{side}_scale").data
            if bool(scale.isnan().all()):
                raise FPTQuantError(f"{name}.{side}_scale is missing or NaN: quantize the model again")
            require_positive(f"{name}.{side}_scale", scale)
            zero_point = torch.zeros_like(scale, dtype=torch.int32)
            if not self.scheme.symmetric:
                zero_point = layer.get_parameter(f"{side}_zero_point").data
                require_zero_point(f"{name}.{side}_zero_point", zero_point, self.scheme.bits)
                consume(layer, f"{side}_zero_point", name)
            consume(layer, f"{side}_scale", name)
            scales[side] = scale
            bounds.append((scale, *code_bounds(zero_point, self.scheme.bits)))

        def spread(values: Tensor, heads: int, size: int) -> Tensor:
            """One value for each channel of `heads` heads, out of (1,) or (KV heads,)."""
            return values.repeat_interleave(heads // values.numel()).repeat_interleave(size)

        for suffix, pair in zip(("scale", "low", "high"), zip(*bounds, strict=True), strict=True):
            flat = [spread(values, layer.num_kv_heads, sizes[side]) for side, values in zip("kv", pair, strict=True)]
            set_buffer(layer, f"fptquant_kv_{suffix}", torch.cat(flat))
        shift = self._take_shift(layer, name) if self.scheme.shift else None
        if shift is not None:
            values = layer.num_kv_heads * layer.head_size_v
            set_buffer(layer, "fptquant_kv_shift", torch.cat((shift, torch.zeros(values, device=shift.device))))
            layer.fptquant_shifts_keys = True
        if self.sink:
            flat = [
                self._take_constant(layer, name, side, spread(scale, layer.num_kv_heads, sizes[side]), shift)
                for side, scale in scales.items()
            ]
            set_buffer(layer, "fptquant_sink_codes", torch.cat(flat))
            steady = layer.get_parameter("sink_steady").data
            if bool(((steady != 0) & (steady != 1)).any()):
                raise FPTQuantError(f"{name}.sink_steady is missing or neither 0 nor 1: quantize the model again")
            # a tensor: compiled graphs outlive a checkpoint
            set_buffer(layer, "fptquant_sink_steady", steady == 1)
            consume(layer, "sink_steady", name)
        for buffer, side in (("query_scale", "k"), ("output_scale", "v")):
            flat_scale = spread(scales[side], layer.num_heads, sizes[side])
            set_buffer(layer, f"fptquant_{buffer}", flat_scale)

    @staticmethod
    def _take_shift(layer: Attention, name: str) -> Tensor:
        """What is taken off keys (kv_heads * head_dim), off the layer."""
        shift: Tensor = layer.get_parameter("k_shift").data.flatten()
        if bool((~torch.isfinite(shift)).any()):
            raise FPTQuantError(f"{name}.k_shift is missing or not finite: quantize the model again")
        consume(layer, "k_shift", name)
        return shift

    @staticmethod
    def _take_constant(layer: Attention, name: str, side: str, scale: Tensor, shift: Tensor | None) -> Tensor:
        """The constant keys or values (kv_heads * head_dim) as the cache holds them, off the layer."""
        constant = layer.get_parameter(f"{side}_sink").data.flatten()
        codes: Tensor = (constant if shift is None or side == "v" else constant - shift) / scale
        if bool((~torch.isfinite(codes)).any()):
            raise FPTQuantError(
                f"{name}.{side}_sink is missing, not finite, or too large for its scale: quantize the model again"
            )
        consume(layer, f"{side}_sink", name)
        return codes

    def _add_parameter(self, layer: Attention, module: str, tensor: str, data: Tensor, per_head: bool) -> None:
        parameter = torch.nn.Parameter(data, requires_grad=False)

        def load(param: Tensor, loaded: Tensor) -> None:  # vLLM's reload replaces the argument of this name
            require_not_failed(self.failed)
            values = local_heads(f"{module}.{tensor}", loaded, len(param)) if per_head else loaded
            if values.numel() != param.numel():
                raise FPTQuantError(
                    f"{module}.{tensor} has shape {list(loaded.shape)}, but {list(param.shape)} is needed here: "
                    "quantize the model again"
                )
            param.data.copy_(values.reshape(param.shape))

        parameter.weight_loader = load  # type: ignore[attr-defined]
        layer.register_parameter(tensor, parameter)


def local_heads(name: str, values: Tensor, count: int) -> Tensor:
    """The KV heads of this tensor-parallel rank, out of (all heads, ...); ranks beyond that share heads.

    Raises:
        FPTQuantError: the checkpoint has another number of heads than the model.
    """
    ranks, rank = get_tensor_model_parallel_world_size(), get_tensor_model_parallel_rank()
    total = len(values) if values.dim() else 1
    if total != count * ranks and not (count == 1 and ranks % total == 0):
        raise FPTQuantError(f"{name}: {total} heads, but the model has {count} KV heads on each of {ranks} ranks")
    first = rank * total // ranks
    return values.reshape(total, *values.shape[1:])[first : first + count]


def require_exact_cache(name: str, layer: Attention, largest: int, *, sink: bool) -> None:
    """Refuses a cache type in which not every integer up to `largest` is exact; with a `sink`, any of 8 bits.

    Raises:
        FPTQuantError: names the type and the remedy.
    """
    chosen = layer.kv_cache_dtype
    dtype = layer.kv_cache_torch_dtype if chosen == "auto" else CACHE_DTYPES.get(chosen)
    exact = 0 if dtype is None else int(2 / torch.finfo(dtype).eps)
    if sink and dtype is not None and dtype.itemsize < 2:
        raise FPTQuantError(
            f"{name}: a KV cache of type {chosen} would round the first token's constants: "
            "serve with --kv-cache-dtype auto"
        )
    if largest > exact:
        raise FPTQuantError(
            f"{name}: a KV cache of type {chosen} cannot hold integers up to {largest} exactly, which this "
            "checkpoint's codes need: serve with --kv-cache-dtype auto"
        )


def require_decoder_attention(layer: Module, prefix: str) -> None:
    """Refuses attention layers whose keys and values do not go the way `StaticKVAttention` quantizes them.

    Raises:
        FPTQuantError: names the layer.
    """
    if (
        type(layer) not in (Attention, StaticKVAttention)
        or layer.attn_type != AttentionType.DECODER
        or layer.kv_sharing_target_layer_name is not None
    ):
        raise FPTQuantError(
            f"{prefix}: a static KV cache needs plain decoder attention, this is {type(layer).__name__}"
        )
