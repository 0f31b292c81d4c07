"""Checkpoints of Llama-3-8B's sizes with random weights, for measuring speed where no such model is at hand.

Speed depends on sizes and types, hardly on values; random codes rather than zeros, on which GPUs clock higher.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from fptquant.format import (
    MODEL_TYPE_PREFIX,
    ActivationScheme,
    CheckpointConfig,
    DownHadamard,
    KVCacheScheme,
    Override,
    Sink,
    TransformRecord,
    WeightScheme,
    pack_codes,
    quantized_architecture,
    round_scale,
)
from fptquant.format.binding import BINDING, bind, checksums

VOCAB, HIDDEN, MLP, HEADS, KV_HEADS, HEAD_DIM = 128256, 4096, 14336, 32, 8, 128
LLAMA_3_8B: dict[str, Any] = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": MLP,
    "num_hidden_layers": 32,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "head_dim": HEAD_DIM,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": False,
    "bos_token_id": 128000,
    "eos_token_id": 128001,
    "torch_dtype": "bfloat16",
}
PROJECTIONS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM),
    "mlp.gate_proj": (MLP, HIDDEN),
    "mlp.up_proj": (MLP, HIDDEN),
    "mlp.down_proj": (HIDDEN, MLP),
}
GROUP = 128  # of compressed-tensors W4A16


def fptquant_config(activation_bits: int, kv_bits: int) -> CheckpointConfig:
    """As `fptquant quantize` writes it with the shipped recipes, tensor-parallel sizes up to 8 allowed."""
    return CheckpointConfig(
        activations=ActivationScheme(bits=activation_bits, symmetric=activation_bits == 8),
        kv_cache=KVCacheScheme(bits=kv_bits),
        transforms=TransformRecord(down_hadamard=DownHadamard(block=256), residual_scale=True),
        sink=Sink(token=LLAMA_3_8B["bos_token_id"]),
        overrides=(Override(modules="lm_head", weights=WeightScheme(bits=7), activations=ActivationScheme(bits=8)),),
        ignore=(),
    )


def compressed_tensors_config(weights: dict[str, Any], activations: dict[str, Any] | None, layout: str) -> Any:
    """`quantization_config` of compressed-tensors, for all linear layers but the head."""
    group = {"targets": ["Linear"], "weights": {"type": "int", "symmetric": True, "dynamic": False, **weights}}
    if activations is not None:
        group["input_activations"] = {"type": "int", "symmetric": True, **activations}
    return {
        "quant_method": "compressed-tensors",
        "format": layout,
        "quantization_status": "compressed",
        "ignore": ["lm_head"],
        "config_groups": {"group_0": group},
    }


W4A16 = compressed_tensors_config({"num_bits": 4, "strategy": "group", "group_size": GROUP}, None, "pack-quantized")
W8A8 = compressed_tensors_config(
    {"num_bits": 8, "strategy": "channel"}, {"num_bits": 8, "strategy": "token", "dynamic": True}, "int-quantized"
)


def write(directory: Path, quantization: CheckpointConfig | dict[str, Any] | None, device: str) -> None:
    """One checkpoint; with `quantization` None its configuration only, for `load_format="dummy"`.

    Args:
        directory: made if it isn't there.
        quantization: ours, or a `quantization_config` of compressed-tensors (`W4A16`, `W8A8`).
        device: where the random numbers are drawn.
    """
    directory.mkdir(parents=True, exist_ok=True)
    config = dict(LLAMA_3_8B)
    if isinstance(quantization, CheckpointConfig):
        config["quantization_config"] = quantization.to_dict()
        config["architectures"] = [quantized_architecture("LlamaForCausalLM")]
        config["model_type"] = MODEL_TYPE_PREFIX + "llama"
    elif quantization is not None:
        config["quantization_config"] = quantization
    (directory / "config.json").write_text(json.dumps(config, indent=2))
    if quantization is None:
        return
    generator = torch.Generator(device).manual_seed(0)
    index: dict[str, str] = {}
    crc32: dict[str, int] = {}

    def save(tensors: dict[str, Tensor]) -> None:
        file = f"model-{len(set(index.values())):05}.safetensors"
        tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(tensors, directory / file, metadata={"format": "pt"})
        index.update(dict.fromkeys(tensors, file))
        crc32.update(checksums(tensors))

    for tensors in _parts(quantization, generator):
        save(tensors)
    if isinstance(quantization, CheckpointConfig):
        save({BINDING: bind(config, crc32)})
    content = {"metadata": {}, "weight_map": index}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


def _parts(quantization: CheckpointConfig | dict[str, Any], generator: torch.Generator) -> Iterator[dict[str, Tensor]]:
    """The tensors of a checkpoint, those of one layer together."""

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, device=generator.device, dtype=torch.bfloat16)

    ours = isinstance(quantization, CheckpointConfig)
    yield {"model.embed_tokens.weight": normal(VOCAB, HIDDEN), "model.norm.weight": torch.ones(HIDDEN)}
    if ours:
        yield _projection("lm_head", (VOCAB, HIDDEN), quantization, generator)
        yield {"model.norm.sink_output": normal(HIDDEN).float()}
    else:
        yield {"lm_head.weight": normal(VOCAB, HIDDEN)}
    for layer in range(LLAMA_3_8B["num_hidden_layers"]):
        name = f"model.layers.{layer}"
        norms = ("input_layernorm", "post_attention_layernorm")
        tensors = {f"{name}.{norm}.weight": torch.ones(HIDDEN) for norm in norms}
        for projection, shape in PROJECTIONS.items():
            tensors |= _projection(f"{name}.{projection}", shape, quantization, generator)
        if isinstance(quantization, CheckpointConfig):
            top = 2.0 ** (quantization.kv_cache.bits - 1)
            for side in "kv":
                tensors[f"{name}.self_attn.{side}_scale"] = torch.tensor([4 / top])
                tensors[f"{name}.self_attn.{side}_zero_point"] = torch.zeros(1, dtype=torch.int32)
                tensors[f"{name}.self_attn.{side}_sink"] = normal(KV_HEADS, HEAD_DIM).float()
            tensors[f"{name}.self_attn.sink_steady"] = torch.tensor(1, dtype=torch.int32)
        yield tensors


def _projection(
    name: str, shape: tuple[int, int], quantization: CheckpointConfig | dict[str, Any], generator: torch.Generator
) -> dict[str, Tensor]:
    """Random codes of one linear layer (N, K), scaled so that its output is about as large as its input."""
    rows, columns = shape

    def random(low: int, high: int, dtype: torch.dtype, *size: int) -> Tensor:
        return torch.randint(low, high, size, generator=generator, device=generator.device, dtype=dtype)

    def words(per_word: int) -> Tensor:
        return random(-(2**31), 2**31, torch.int64, rows, columns // per_word).int()

    scale = math.sqrt(12 / columns)  # of uniform codes whose range is 1
    if isinstance(quantization, CheckpointConfig):
        scheme = quantization.scheme_for(name)
        assert scheme is not None
        bits, activations = scheme.weights.bits, scheme.activations
        packed = words(8) if bits == 4 else pack_codes(random(-64, 64, torch.int8, rows, columns), bits)
        tensors = {
            f"{name}.weight_packed": packed,
            f"{name}.weight_scale": round_scale(torch.full((rows, 1), scale / 2**bits)),
            f"{name}.weight_shape": torch.tensor(shape),
            f"{name}.input_scale": torch.tensor(4 / 2.0 ** (activations.bits - 1)),
        }
        if not activations.symmetric:
            tensors[f"{name}.input_zero_point"] = torch.tensor(1, dtype=torch.int32)
        return tensors
    if quantization["format"] == "pack-quantized":
        groups = torch.full((rows, columns // GROUP), scale / 16, dtype=torch.bfloat16)
        return {
            f"{name}.weight_packed": words(8),
            f"{name}.weight_scale": groups,
            f"{name}.weight_shape": torch.tensor(shape),
        }
    return {
        f"{name}.weight": random(-128, 128, torch.int8, rows, columns),
        f"{name}.weight_scale": torch.full((rows, 1), scale / 256),
    }
