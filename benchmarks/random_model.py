"""Llama checkpoints of any shape with random bfloat16 weights, written to disk tensor by tensor.

    python benchmarks/random_model.py 8b out/models/8b

For measuring memory and time of the quantizer where no such model is at hand. Weights are drawn so that activations
look trained: each matrix keeps its input's size, the residual stream grows slowly, and some channels of the norms'
gains are outliers. Shape and seed decide every byte. A run that was stopped continues with the shard it was in.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

Sizes = tuple[int, ...]
CHUNK = 1 << 24  # values drawn at once
HOLLOW = 4096  # values at the start of each tensor that a hollow model has
OUTLIERS, OUTLIER = 4, 8.0  # channels of each norm, and how much larger their gains are
TOKENS = 4096  # of the tokenizer, or the model's vocabulary where that is smaller
PROJECTIONS = {
    "self_attn.q_proj": ("queries", "hidden"),
    "self_attn.k_proj": ("keys", "hidden"),
    "self_attn.v_proj": ("keys", "hidden"),
    "self_attn.o_proj": ("hidden", "queries"),
    "mlp.gate_proj": ("intermediate", "hidden"),
    "mlp.up_proj": ("intermediate", "hidden"),
    "mlp.down_proj": ("hidden", "intermediate"),
}


@dataclass(frozen=True)
class Shape:
    """Sizes of a Llama; embedding and head are not tied."""

    layers: int
    hidden: int
    intermediate: int
    heads: int
    kv_heads: int
    vocabulary: int
    rope_theta: float = 10000.0

    @property
    def head_dim(self) -> int:
        """Width of one head."""
        return self.hidden // self.heads

    def layer(self) -> dict[str, Sizes]:
        """Shapes of one layer's tensors, by name within the layer."""
        widths = {
            "hidden": self.hidden,
            "intermediate": self.intermediate,
            "queries": self.heads * self.head_dim,
            "keys": self.kv_heads * self.head_dim,
        }
        norms: dict[str, Sizes] = dict.fromkeys(("input_layernorm", "post_attention_layernorm"), (self.hidden,))
        return norms | {name: (widths[rows], widths[columns]) for name, (rows, columns) in PROJECTIONS.items()}

    def shards(self) -> Iterator[dict[str, Sizes]]:
        """Shapes by full name, file by file: the embedding, each layer, norm and head."""
        yield {"model.embed_tokens.weight": (self.vocabulary, self.hidden)}
        for index in range(self.layers):
            yield {f"model.layers.{index}.{name}.weight": sizes for name, sizes in self.layer().items()}
        yield {"model.norm.weight": (self.hidden,), "lm_head.weight": (self.vocabulary, self.hidden)}

    @property
    def parameters(self) -> int:
        """How many values all tensors hold."""
        return sum(math.prod(sizes) for shard in self.shards() for sizes in shard.values())

    def config(self) -> dict[str, Any]:
        """config.json."""
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": self.vocabulary,
            "hidden_size": self.hidden,
            "intermediate_size": self.intermediate,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "rms_norm_eps": 1e-5,
            "rope_theta": self.rope_theta,
            "max_position_embeddings": 8192,
            "tie_word_embeddings": False,
            "bos_token_id": 0,
            "eos_token_id": 1,
            "torch_dtype": "bfloat16",
        }


_1B = Shape(22, 2048, 5632, 32, 4, 49152)
SHAPES = {
    "1b": _1B,
    "1b-deep": replace(_1B, layers=44),
    "8b": Shape(32, 4096, 14336, 32, 8, 128256, 500000.0),
    "70b": Shape(80, 8192, 28672, 64, 8, 128256, 500000.0),
}


def shape_of(name: str) -> Shape:
    """A named shape, or LAYERSxHIDDEN: heads of 64, a quarter as many of keys and values, 8192 tokens.

    Raises:
        SystemExit: neither.
    """
    if name in SHAPES:
        return SHAPES[name]
    sizes = re.fullmatch(r"(\d+)x(\d+)", name)
    layers, hidden = (int(size) for size in sizes.groups()) if sizes else (0, 0)
    if layers < 1 or hidden < 64 or hidden % 64:
        known = ", ".join(SHAPES)
        raise SystemExit(f"shape '{name}': give one of {known}, or LAYERSxHIDDEN with HIDDEN a multiple of 64")
    heads = hidden // 64
    return Shape(layers, hidden, hidden * 11 // 4, heads, heads // 4 if heads % 4 == 0 else heads, 8192)


def write(directory: Path, shape: Shape, seed: int = 0, *, hollow: bool = False) -> None:
    """Writes a checkpoint, a shard for each layer; keeps the shards that are there.

    Args:
        directory: made if it isn't there.
        shape: sizes.
        seed: of all values.
        hollow: only the first values of each tensor, and zeros that take no room on the disk: for `--dry-run`.

    Raises:
        SystemExit: the directory holds something else.
    """
    directory.mkdir(parents=True, exist_ok=True)
    made_from = json.dumps({**asdict(shape), "seed": seed, "hollow": hollow}, indent=2)
    stamp = directory / "random_model.json"
    mine = stamp.read_text() == made_from if stamp.is_file() else not any(directory.iterdir())
    if not mine:
        raise SystemExit(f"'{directory}' holds another model: remove it, or name another directory")
    stamp.write_text(made_from)
    (directory / "config.json").write_text(json.dumps(shape.config(), indent=2))
    if not (directory / "tokenizer_config.json").is_file():
        write_tokenizer(directory, min(TOKENS, shape.vocabulary))
    shards, placed = list(shape.shards()), {}
    for number, tensors in enumerate(shards):
        file = directory / f"model-{number + 1:05}-of-{len(shards):05}.safetensors"
        placed.update(dict.fromkeys(tensors, file.name))
        if not file.is_file():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            write_shard(file, tensors, shape, generator, hollow)
    index = {"metadata": {"total_size": 2 * shape.parameters}, "weight_map": placed}
    (directory / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))


def write_shard(file: Path, tensors: dict[str, Sizes], shape: Shape, generator: torch.Generator, hollow: bool) -> None:
    """One safetensors file, which appears when it is complete: a header with all offsets, then the values in order."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    size = 0
    for name, sizes in tensors.items():
        start, size = size, size + 2 * math.prod(sizes)
        header[name] = {"dtype": "BF16", "shape": sizes, "data_offsets": [start, size]}
    head = json.dumps(header).encode()
    head += b" " * (-len(head) % 8)
    partial = file.with_suffix(".partial")
    with partial.open("wb") as stream:
        stream.write(len(head).to_bytes(8, "little") + head)
        for name, sizes in tensors.items():
            end = stream.tell() + 2 * math.prod(sizes)
            for values in _values(name, sizes, shape, generator, HOLLOW if hollow else None):
                stream.write(values.view(torch.uint8).numpy().data)
            stream.seek(end)
        stream.truncate()
        stream.flush()
        os.fsync(stream.fileno())
    partial.replace(file)


def _values(name: str, sizes: Sizes, shape: Shape, generator: torch.Generator, at_most: int | None) -> Iterator[Tensor]:
    """The first `at_most` values of one matrix in bfloat16, in order, `CHUNK` at a time; all of a norm's."""
    count = math.prod(sizes)
    if len(sizes) == 1:  # a norm's gains
        gains = 0.5 + 0.1 * torch.randn(count, generator=generator)
        gains[torch.randint(count, (OUTLIERS,), generator=generator)] *= OUTLIER
        yield gains.bfloat16()
        return
    scale = 1.0 if "embed" in name else sizes[1] ** -0.5
    if name.endswith(("o_proj.weight", "down_proj.weight")):
        scale *= (2 * shape.layers) ** -0.5  # what all layers add to the residual is then as large as the embedding
    count = min(count, at_most or count)
    for start in range(0, count, CHUNK):
        size = min(CHUNK, count - start)
        yield torch.randn(size, generator=generator, dtype=torch.bfloat16).mul_(scale)


def write_tokenizer(directory: Path, tokens: int) -> None:
    """A byte-level BPE tokenizer trained on the shipped calibration text, with a BOS that it puts first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    text = (resources.files("fptquant") / "data" / "wiki.calib.txt").read_text(encoding="utf-8")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=tokens,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.save_pretrained(directory)


def main() -> None:
    """Writes one model."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("shape", help=f"{', '.join(SHAPES)}, or LAYERSxHIDDEN")
    parser.add_argument("directory", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--hollow", action="store_true", help="almost no values, for `fptquant quantize --dry-run`")
    arguments = parser.parse_args()
    shape = shape_of(arguments.shape)
    write(arguments.directory, shape, arguments.seed, hollow=arguments.hollow)
    print(f"{arguments.directory}: {shape.parameters / 1e9:.3f} billion parameters")


if __name__ == "__main__":
    main()
