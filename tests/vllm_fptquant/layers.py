"""vLLM's own parallel layers, built small and loaded as its model loader would."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from vllm.config import get_current_vllm_config
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.linear import (
    LinearBase,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)

from fptquant.format import CheckpointConfig, code_bounds, pack_codes, quantize, quantized_linear
from fptquant.format.steps import Arrangement, Step, arrange, linear_steps
from vllm_fptquant.config import FPTQuantConfig
from vllm_fptquant.kernels.base import LinearWeights

FUSED = {"qkv_proj": ["q_proj", "k_proj", "v_proj"], "gate_up_proj": ["gate_proj", "up_proj"]}
HIDDEN, HEADS, KV_HEADS, HEAD_DIM, MLP = 64, 4, 2, 32, 96
# Shard id in vLLM, name in the checkpoint, rows.
SHARDS: dict[str, list[tuple[Any, str, int]]] = {
    "qkv": [
        ("q", "self_attn.q_proj", HEADS * HEAD_DIM),
        ("k", "self_attn.k_proj", KV_HEADS * HEAD_DIM),
        ("v", "self_attn.v_proj", KV_HEADS * HEAD_DIM),
    ],
    "gate_up": [(0, "mlp.gate_proj", MLP), (1, "mlp.up_proj", MLP)],
    "o": [(None, "self_attn.o_proj", HIDDEN)],
    "down": [(None, "mlp.down_proj", HIDDEN)],
}
COLUMNS = {"qkv": HIDDEN, "gate_up": HIDDEN, "o": HEADS * HEAD_DIM, "down": MLP}


def quant_config(**fields: Any) -> FPTQuantConfig:
    """Config of a Llama checkpoint with these fields."""
    config = FPTQuantConfig(CheckpointConfig.model_validate(fields))
    config.packed_modules_mapping = dict(FUSED)
    return config


def steps_of(weights: LinearWeights, *online: Step) -> Arrangement:
    """Steps of a layer with these weights, and what runs online from the outside in."""
    return arrange(linear_steps(weights.scheme, online))


def build_linear(kind: str, config: FPTQuantConfig, **arguments: Any) -> LinearBase:
    """One of Llama's four linear layers, in layer 0."""
    arguments = {"bias": False, "quant_config": config, "params_dtype": torch.float32, **arguments}
    prefix = "model.layers.0"
    if kind == "qkv":
        return QKVParallelLinear(HIDDEN, HEAD_DIM, HEADS, KV_HEADS, prefix=f"{prefix}.self_attn.qkv_proj", **arguments)
    if kind == "gate_up":
        return MergedColumnParallelLinear(HIDDEN, [MLP, MLP], prefix=f"{prefix}.mlp.gate_up_proj", **arguments)
    name = "self_attn.o_proj" if kind == "o" else "mlp.down_proj"
    return RowParallelLinear(COLUMNS[kind], HIDDEN, prefix=f"{prefix}.{name}", **arguments)


def random_tensors(kind: str, config: FPTQuantConfig, seed: int = 0) -> dict[Any, dict[str, Tensor]]:
    """Checkpoint tensors of each shard of a layer; `codes` (N, K), multiplied, comes along for the test's own use."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[Any, dict[str, Tensor]] = {}
    for shard, name, rows in SHARDS[kind]:
        scheme = config.checkpoint.scheme_for(f"model.layers.0.{name}")
        assert scheme is not None
        limit = 2 ** (scheme.weights.bits - 1)
        codes = torch.randint(-limit, limit, (rows, COLUMNS[kind]), generator=generator)
        tensors[shard] = {
            "codes": codes,
            "weight_packed": pack_codes(codes, scheme.weights.bits),
            "weight_scale": torch.rand(rows, 1, generator=generator) * 0.01 + 1e-3,
            "weight_shape": torch.tensor(codes.shape),
        }
        if scheme.weights.group_size is not None:
            groups = (rows, COLUMNS[kind] // scheme.weights.group_size)
            multipliers = torch.randint(1, 9, groups, generator=generator, dtype=torch.int8)
            tensors[shard]["weight_multiplier"] = multipliers
            tensors[shard]["codes"] = (codes.view(*groups, -1) * multipliers[..., None]).flatten(1)
        if scheme.activations.bits < 16:
            tensors[shard]["input_scale"] = torch.tensor(0.013)
            if not scheme.activations.symmetric:
                tensors[shard]["input_zero_point"] = torch.tensor(-3, dtype=torch.int32)
    return tensors


def load(layer: LinearBase, tensors: dict[Any, dict[str, Tensor]]) -> LinearBase:
    """Loads tensors through the parameters' weight loaders, then finishes the layer as vLLM does."""
    for shard, by_name in tensors.items():
        for name, tensor in by_name.items():
            if name != "codes":
                parameter = getattr(layer, name)
                parameter.weight_loader(parameter, tensor, *([] if shard is None else [shard]))
    layer.quant_method.process_weights_after_loading(layer)
    layer.update_param_tp_status()
    return layer


def build_attention(config: FPTQuantConfig | None, heads: int = HEADS, kv_heads: int = KV_HEADS) -> Attention:
    """Attention of layer 0; another one may have been built in the same config before."""
    get_current_vllm_config().compilation_config.static_forward_context.clear()
    return Attention(
        heads,
        HEAD_DIM,
        HEAD_DIM**-0.5,
        num_kv_heads=kv_heads,
        quant_config=config,
        prefix="model.layers.0.self_attn.attn",
    )


def expected(tensors: dict[Any, dict[str, Tensor]], x: Tensor, bits: int) -> Tensor:
    """The contract's result for the shards of a layer, side by side, in float32."""
    outputs = []
    for shard in tensors.values():
        zero_point = shard.get("input_zero_point", torch.tensor(0))
        codes = quantize(x, shard["input_scale"], *code_bounds(zero_point, bits))
        scale = shard["input_scale"] * shard["weight_scale"].flatten()
        outputs.append(quantized_linear(codes, shard["codes"].float(), scale))
    return torch.cat(outputs, -1)
