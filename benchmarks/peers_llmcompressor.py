"""What llm-compressor does for peers.py, in its own environment: quantizes, or exports what it wrote as floats.

Knows nothing of fptquant. Both models are compared by one scorer then, so that only the weights differ.
"""

from __future__ import annotations

import argparse
import shutil
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, CompressedTensorsConfig

WEIGHTS = {"num_bits": 4, "type": "int", "symmetric": True, "strategy": "channel"}


def main() -> None:
    """Runs one of the two."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("step", choices=["quantize", "export"])
    parser.add_argument("model", type=Path, help="quantize: the original; export: what quantize wrote")
    parser.add_argument("output", type=Path)
    parser.add_argument("--tokens", type=Path, help="quantize: safetensors file with `tokens` (sequences, length)")
    parser.add_argument("--observer", help="quantize: how the ranges of weights are found")
    parser.add_argument("--original", type=Path, help="export: the original, for its configuration and tokenizer")
    arguments = parser.parse_args()
    if arguments.step == "quantize":
        quantize(arguments.model, arguments.output, arguments.tokens, arguments.observer)
    else:
        export(arguments.model, arguments.output, arguments.original)


def quantize(model: Path, output: Path, tokens: Path, observer: str | None) -> None:
    """GPTQ with llm-compressor's defaults: W4A16, a symmetric scale for each output channel, the head left alone."""
    from datasets import Dataset
    from llmcompressor import oneshot
    from llmcompressor.modifiers.gptq import GPTQModifier

    windows = load_file(tokens)["tokens"].tolist()
    weights = WEIGHTS if observer is None else {**WEIGHTS, "observer": observer}
    recipe = GPTQModifier(
        config_groups={"group_0": {"targets": ["Linear"], "weights": weights, "input_activations": None}},
        ignore=["lm_head"],
    )
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
    ones = [1] * len(windows[0])
    dataset = Dataset.from_list([{"input_ids": window, "attention_mask": ones} for window in windows])
    oneshot(
        model=loaded,
        tokenizer=str(model),
        dataset=dataset,
        recipe=recipe,
        max_seq_length=len(windows[0]),
        num_calibration_samples=len(windows),
        shuffle_calibration_samples=False,
    )
    loaded.save_pretrained(output, save_compressed=True)


def export(model: Path, output: Path, original: Path) -> None:
    """Writes the dequantized weights as a float checkpoint with the original's configuration and tokenizer."""
    settings = CompressedTensorsConfig(dequantize=True)
    loaded = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32, quantization_config=settings)
    tied = set(loaded.all_tied_weights_keys)
    shutil.copytree(original, output, ignore=shutil.ignore_patterns("*.safetensors"))
    tensors = {name: tensor.contiguous() for name, tensor in loaded.state_dict().items() if name not in tied}
    floats = {name: tensor for name, tensor in tensors.items() if name.endswith((".weight", ".bias"))}
    save_file(floats, output / "model.safetensors", metadata={"format": "pt"})


if __name__ == "__main__":
    main()
