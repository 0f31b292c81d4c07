"""A tiny random Llama, quantized by nearest rounding, as a checkpoint; and what it should compute.

The reference shares no code with the plugin and none of the contract's arithmetic: quantizers, Hadamard and
residual scaling are written out again from the format's definition, in float64, so that mistakes show.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor

from fptquant.format import CheckpointConfig, pack_codes, round_scale
from fptquant.format.binding import BINDING, bind, checksums

HIDDEN, LAYERS, HEADS, KV_HEADS, HEAD_DIM, MLP, VOCAB = 64, 2, 4, 2, 32, 96, 128
EPS = 1e-5
THETA = 10000.0
# Checkpoint name of a projection, its size, and the name of the input it shares.
PROJECTIONS = {
    "self_attn.q_proj": (HEADS * HEAD_DIM, HIDDEN, "attention"),
    "self_attn.k_proj": (KV_HEADS * HEAD_DIM, HIDDEN, "attention"),
    "self_attn.v_proj": (KV_HEADS * HEAD_DIM, HIDDEN, "attention"),
    "self_attn.o_proj": (HIDDEN, HEADS * HEAD_DIM, "o"),
    "mlp.gate_proj": (MLP, HIDDEN, "mlp"),
    "mlp.up_proj": (MLP, HIDDEN, "mlp"),
    "mlp.down_proj": (HIDDEN, MLP, "down"),
}


@dataclass
class Quantizer:
    """Static range of one tensor: scale and zero point, float64 tensors that broadcast to it."""

    scale: Tensor
    zero_point: Tensor
    bits: int

    @classmethod
    def fit(cls, x: Tensor, bits: int, symmetric: bool, dim: Sequence[int] | None = None) -> Quantizer:
        """Range a little inside of min and max, so that clipping happens; per `dim` kept."""
        dims = [i for i in range(x.ndim) if i not in (dim or ())]
        low, high = 0.8 * x.amin(dims, keepdim=True), 0.8 * x.amax(dims, keepdim=True)
        if symmetric:
            scale = torch.maximum(low.abs(), high.abs()) / (2 ** (bits - 1) - 1)
            zero_point = torch.zeros_like(scale)
        else:
            low, high = low.clamp(max=0), high.clamp(min=0)
            scale = (high - low) / (2**bits - 1)
            zero_point = torch.round(-(2 ** (bits - 1)) - low / scale)
        return cls(scale.float().double(), zero_point, bits)

    def __call__(self, x: Tensor) -> Tensor:
        """Dequantized `x`."""
        q = torch.round(x / self.scale) + self.zero_point
        q = q.clamp(-(2 ** (self.bits - 1)), 2 ** (self.bits - 1) - 1)
        return (q - self.zero_point) * self.scale


@dataclass
class TinyLlama:
    """Float weights, then quantizers once `quantize` was called."""

    config: CheckpointConfig
    bias: bool
    kv_heads: int = KV_HEADS
    weights: dict[str, Tensor] = field(default_factory=dict)
    codes: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    multipliers: dict[str, Tensor] = field(default_factory=dict)  # (rows, groups), where there are groups
    quantizers: dict[str, Quantizer] = field(default_factory=dict)
    seen: dict[str, Tensor] | None = None

    @classmethod
    def random(
        cls, config: CheckpointConfig, *, bias: bool = False, kv_heads: int = KV_HEADS, seed: int = 0
    ) -> TinyLlama:
        """Random weights with outlier channels, then ranges from random tokens."""
        generator = torch.Generator().manual_seed(seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(*shape, generator=generator)

        model = cls(config, bias, kv_heads)
        weights = model.weights
        weights["model.embed_tokens.weight"] = normal(VOCAB, HIDDEN) * torch.exp(0.5 * normal(VOCAB, 1))
        weights["lm_head.weight"] = 0.5 * normal(VOCAB, HIDDEN)
        weights["model.norm.weight"] = 1 + 0.1 * normal(HIDDEN)
        for i in range(LAYERS):
            for norm in ("input_layernorm", "post_attention_layernorm"):
                # Residual scaling goes with gains that were folded into the weights.
                spread = 0.0 if config.transforms.residual_scale else 0.1
                weights[f"model.layers.{i}.{norm}.weight"] = 1 + spread * normal(HIDDEN)
            for name, (rows, columns, _) in PROJECTIONS.items():
                key = f"model.layers.{i}.{name}"
                if name.endswith(("k_proj", "v_proj")):
                    rows = kv_heads * HEAD_DIM
                weights[f"{key}.weight"] = 1.5 * normal(rows, columns) / math.sqrt(columns)
                if bias:
                    weights[f"{key}.bias"] = 0.3 * normal(rows)
        model.quantize(torch.randint(0, VOCAB, (64,), generator=generator))
        return model

    def quantize(self, tokens: Tensor) -> None:
        """Rounds weights to nearest per output channel, and sets ranges from what the float model sees."""
        for i in range(LAYERS):
            for name in PROJECTIONS:
                key = f"model.layers.{i}.{name}"
                scheme = self.config.scheme_for(key)
                if scheme is not None:
                    weight = self.weights.pop(f"{key}.weight")
                    limit, size = 2 ** (scheme.weights.bits - 1), scheme.weights.group_size or weight.shape[1]
                    groups = weight.view(len(weight), -1, size)
                    largest = groups.abs().amax(2)
                    if scheme.weights.group_size is not None:
                        share = largest / largest.amax(1, keepdim=True)
                        self.multipliers[key] = torch.round(8 * share).clamp(min=1)
                    multiplier = self.multipliers.get(key, torch.ones(1, 1))
                    scale = round_scale((largest / multiplier).amax(1, keepdim=True) / (limit - 0.5))
                    steps = (scale * multiplier)[..., None]
                    codes = torch.round(groups / steps).clamp(-limit, limit - 1)
                    self.codes[key] = (codes.flatten(1), scale)
        self.seen = {}
        self.logits(tokens)
        seen, self.seen = self.seen, None
        for key, x in seen.items():
            if key.endswith((".k", ".v")):
                kv = self.config.kv_cache
                dim = (1,) if kv.strategy == "head" else None
                self.quantizers[key] = Quantizer.fit(x, kv.bits, kv.symmetric, dim)
            else:
                layer, site = key.rsplit(".", 1)
                module = next(name for name, (_, _, shared) in PROJECTIONS.items() if shared == site)
                scheme = self.config.scheme_for(f"{layer}.{module}")
                if scheme is not None and scheme.activations.bits < 16:
                    activations = scheme.activations
                    self.quantizers[key] = Quantizer.fit(x, activations.bits, activations.symmetric)

    def write(self, path: Path) -> Path:
        """Writes the checkpoint in Hugging Face layout."""
        path.mkdir(parents=True, exist_ok=True)
        config = {
            "architectures": ["FPTQuantLlamaForCausalLM"],
            "model_type": "fptquant_llama",
            "hidden_size": HIDDEN,
            "intermediate_size": MLP,
            "num_hidden_layers": LAYERS,
            "num_attention_heads": HEADS,
            "num_key_value_heads": self.kv_heads,
            "head_dim": HEAD_DIM,
            "hidden_act": "silu",
            "vocab_size": VOCAB,
            "rms_norm_eps": EPS,
            "rope_theta": THETA,
            "max_position_embeddings": 256,
            "tie_word_embeddings": False,
            "attention_bias": self.bias,
            "mlp_bias": self.bias,
            "bos_token_id": 1,
            "eos_token_id": None,
            "torch_dtype": "float32",
            "quantization_config": self.config.to_dict(),
        }
        (path / "config.json").write_text(json.dumps(config))
        tensors = self.tensors()
        tensors[BINDING] = bind(config, checksums(tensors))
        save_file(tensors, path / "model.safetensors", metadata={"format": "pt"})
        return path

    def tensors(self) -> dict[str, Tensor]:
        """The checkpoint's tensors by name."""
        tensors = dict(self.weights)
        for key, (codes, scale) in self.codes.items():
            scheme = self.config.scheme_for(key)
            assert scheme is not None
            tensors[f"{key}.weight_packed"] = pack_codes(codes, scheme.weights.bits)
            tensors[f"{key}.weight_scale"] = scale
            if key in self.multipliers:
                tensors[f"{key}.weight_multiplier"] = self.multipliers[key].to(torch.int8)
            tensors[f"{key}.weight_shape"] = torch.tensor(codes.shape, dtype=torch.int64)
            layer, _, name = key.partition(".self_attn" if "self_attn" in key else ".mlp")
            site = PROJECTIONS[key.removeprefix(f"{layer}.")][2]
            if scheme.activations.bits < 16:
                quantizer = self.quantizers[f"{layer}.{site}"]
                tensors[f"{key}.input_scale"] = quantizer.scale.float().reshape(()).clone()
                if not scheme.activations.symmetric:
                    tensors[f"{key}.input_zero_point"] = quantizer.zero_point.int().reshape(()).clone()
        if self.config.kv_cache.bits < 16:
            for i in range(LAYERS):
                for side in "kv":
                    quantizer = self.quantizers[f"model.layers.{i}.{side}"]
                    name = f"model.layers.{i}.self_attn.{side}"
                    tensors[f"{name}_scale"] = quantizer.scale.float().flatten().clone()
                    if not self.config.kv_cache.symmetric:
                        tensors[f"{name}_zero_point"] = quantizer.zero_point.int().flatten().clone()
        return tensors

    # The reference, float64 throughout.

    def logits(self, tokens: Tensor) -> Tensor:
        """Logits (T, VOCAB) of all positions of `tokens` (T,)."""
        x = self.weights["model.embed_tokens.weight"][tokens].double()  # (T, HIDDEN)
        for i in range(LAYERS):
            layer = f"model.layers.{i}"
            normed, s = self.norm(f"{layer}.input_layernorm", x)
            q, k, v = (self.linear(layer, f"self_attn.{p}_proj", normed) for p in "qkv")
            attention = self.attention(layer, q, k, v)
            x = x + self.linear(layer, "self_attn.o_proj", attention, s)
            normed, s = self.norm(f"{layer}.post_attention_layernorm", x)
            gate, up = (self.linear(layer, f"mlp.{p}_proj", normed) for p in ("gate", "up"))
            x = x + self.linear(layer, "mlp.down_proj", torch.nn.functional.silu(gate) * up, s)
        x, _ = self.norm("model.norm", x)
        return x @ self.weights["lm_head.weight"].double().T

    def greedy(self, prompt: Sequence[int], count: int) -> list[int]:
        """Greedy continuation, every step computed from scratch."""
        tokens = list(prompt)
        for _ in range(count):
            tokens.append(int(self.logits(torch.tensor(tokens))[-1].argmax()))
        return tokens[len(prompt) :]

    def norm(self, name: str, x: Tensor) -> tuple[Tensor, Tensor]:
        """RMSNorm of `x`, and 1 / RMS of it."""
        s = 1 / torch.sqrt((x * x).mean(-1, keepdim=True) + EPS)
        return x * s * self.weights[f"{name}.weight"].double(), s

    def linear(self, layer: str, name: str, x: Tensor, s: Tensor | None = None) -> Tensor:
        """Quantized linear layer; `s` is the residual scale, used when the config has it on."""
        if s is None or not self.config.transforms.residual_scale:
            s = torch.ones(1, dtype=torch.float64)
        key, site = f"{layer}.{name}", PROJECTIONS[name][2]
        x = x * s
        block = self.block_before(name)
        if block is not None:
            x = (x.reshape(len(x), -1, block) @ sylvester(block)).reshape(x.shape)
        x = self.quantized(f"{layer}.{site}", x)
        if key in self.codes:
            codes, scale = self.codes[key]
            multiplier = self.multipliers.get(key, torch.ones(1, 1)).double()
            groups = codes.double().view(len(codes), multiplier.shape[1], -1)
            weight = (groups * multiplier[..., None]).flatten(1) * scale.double()
        else:
            weight = self.weights[f"{key}.weight"].double()
        y = x @ weight.T / s
        return y + self.weights[f"{key}.bias"].double() if self.bias else y

    def block_before(self, name: str) -> int | None:
        """Size of the Hadamard's blocks at the input of a projection."""
        down, others = self.config.transforms.down_hadamard, self.config.transforms.input_hadamard
        if name == "mlp.down_proj":
            return None if down is None else down.block
        if others is None:
            return None
        return {"self_attn.o_proj": others.o, "mlp.gate_proj": others.gate_up, "mlp.up_proj": others.gate_up}.get(
            name, others.qkv
        )

    def attention(self, layer: str, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Causal attention with RoPE and a quantized cache: (T, HEADS * HEAD_DIM)."""
        count = len(q)
        q, k = rope(q.view(count, HEADS, HEAD_DIM)), rope(k.view(count, self.kv_heads, HEAD_DIM))
        v = v.view(count, self.kv_heads, HEAD_DIM)
        if self.config.kv_cache.bits < 16:
            k, v = self.quantized(f"{layer}.k", k), self.quantized(f"{layer}.v", v)
        k, v = (x.repeat_interleave(HEADS // self.kv_heads, 1) for x in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) / math.sqrt(HEAD_DIM)
        mask = torch.ones(count, count).triu(1).bool()
        weights = scores.masked_fill(mask, -math.inf).softmax(-1)
        return torch.einsum("hqk,khd->qhd", weights, v).reshape(count, -1)

    def quantized(self, key: str, x: Tensor) -> Tensor:
        """Quantizes `x`, or notes it while ranges are being set."""
        if self.seen is not None:
            self.seen[key] = x
        quantizer = self.quantizers.get(key)
        return x if quantizer is None else quantizer(x)


def rope(x: Tensor) -> Tensor:
    """Rotary position embedding of `x` (T, heads, HEAD_DIM), halves paired."""
    half = HEAD_DIM // 2
    frequencies = THETA ** (-torch.arange(half, dtype=torch.float64) / half)
    angles = torch.arange(len(x), dtype=torch.float64)[:, None, None] * frequencies
    first, second = x[..., :half], x[..., half:]
    return torch.cat([first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()], -1)


def sylvester(size: int) -> Tensor:
    """Orthonormal Hadamard matrix: entry (i, j) is the parity of the common bits of i and j."""
    rows = [[(-1.0) ** (i & j).bit_count() for j in range(size)] for i in range(size)]
    return torch.tensor(rows, dtype=torch.float64) / math.sqrt(size)
