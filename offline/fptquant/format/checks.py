"""What every reader of a checkpoint checks, in transformers and in vLLM: one list, one wording."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.format.packing import LARGEST_MULTIPLIER
from fptquant.format.schema import CheckpointConfig

DAMAGED = "the checkpoint is damaged, fetch it again or quantize again"


def require_consistent(checkpoint: CheckpointConfig, config: Any, widths: Sequence[int]) -> None:
    """Refuses a `quantization_config` that the model of config.json can't have.

    Args:
        checkpoint: the `quantization_config`.
        config: the model's `PretrainedConfig`.
        widths: input features that its `down_proj` have.

    Raises:
        FPTQuantError: a sink's token outside of the vocabulary, or Hadamard blocks that don't fill their layer's input.
    """
    if checkpoint.sink is not None and checkpoint.sink.token >= config.vocab_size:
        raise FPTQuantError(
            f"config.json: quantization_config.sink.token is {checkpoint.sink.token}, "
            f"but the vocabulary has {config.vocab_size} tokens: {DAMAGED}"
        )
    down, inputs = checkpoint.transforms.down_hadamard, checkpoint.transforms.input_hadamard
    hidden, heads = config.hidden_size, config.num_attention_heads
    outputs = heads * (getattr(config, "head_dim", None) or hidden // heads)
    for field, block, name, size in (
        *(("down_hadamard.block", down and down.block, "intermediate_size", width) for width in widths),
        ("input_hadamard.qkv", inputs and inputs.qkv, "hidden_size", hidden),
        ("input_hadamard.gate_up", inputs and inputs.gate_up, "hidden_size", hidden),
        ("input_hadamard.o", inputs and inputs.o, "the size of all heads,", outputs),
    ):
        if block is not None and size % block:
            raise FPTQuantError(
                f"config.json: quantization_config.transforms.{field} is {block}, "
                f"which does not divide {name} {size}: {DAMAGED}"
            )


def require_fitting(
    name: str, found: tuple[torch.dtype | str, Sequence[int]], expected: tuple[torch.dtype, Sequence[int]]
) -> None:
    """Refuses a tensor of another shape, or another type where the type is the format's.

    Args:
        name: of the tensor.
        found: dtype and shape in the checkpoint; a type that no tensor of ours has is named.
        expected: dtype and shape in the model; 16-bit and 32-bit floating point may stand for each other, except in
            scales, shifts and constants, which are float32.

    Raises:
        FPTQuantError: names the tensor and both.
    """
    (dtype, shape), (wanted, size) = found, expected
    exact = not wanted.is_floating_point or name.endswith(("_scale", "_shift", "_offset", "_sink", "sink_output"))
    if list(shape) != list(size) or (
        dtype != wanted if exact else isinstance(dtype, str) or not dtype.is_floating_point
    ):
        kind = str(wanted).removeprefix("torch.") if exact else "floating point"
        raise FPTQuantError(
            f"{name} is {str(dtype).removeprefix('torch.')} of shape {list(shape)}, not {kind} of shape {list(size)}: "
            f"{DAMAGED}"
        )


def require_finite(name: str, tensor: Tensor) -> None:
    """Refuses NaN and infinity.

    Raises:
        FPTQuantError: names the tensor.
    """
    if not bool(torch.isfinite(tensor).all()):
        raise FPTQuantError(f"{name} holds NaN or infinite values: {DAMAGED}")


def require_positive(name: str, scale: Tensor) -> None:
    """Refuses a quantization scale that is not a positive, finite number.

    Raises:
        FPTQuantError: names the tensor, the first bad value and where it is.
    """
    bad = ~(torch.isfinite(scale) & (scale > 0))
    if bool(bad.any()):
        index = int(bad.flatten().nonzero()[0])
        value = scale.flatten()[index].item()
        where = f" at index {index}" if scale.numel() > 1 else ""
        raise FPTQuantError(f"{name} is {value:g}{where}, must be positive and finite: {DAMAGED}")


def require_multiplier(name: str, multiplier: Tensor) -> None:
    """Refuses multipliers of groups whose products with codes are more than the 7 bits that kernels expect.

    Raises:
        FPTQuantError: names the tensor and the limits.
    """
    if bool(((multiplier < 1) | (multiplier > LARGEST_MULTIPLIER)).any()):
        raise FPTQuantError(f"{name} is missing or outside of [1, {LARGEST_MULTIPLIER}]: {DAMAGED}")


def require_zero_point(name: str, zero_point: Tensor, bits: int) -> None:
    """Refuses zero points that are no codes of this width.

    Raises:
        FPTQuantError: names the tensor and the limits.
    """
    limit = 2 ** (bits - 1)
    if bool(((zero_point < -limit) | (zero_point >= limit)).any()):
        raise FPTQuantError(f"{name} is missing or outside of [{-limit}, {limit - 1}]: {DAMAGED}")


def require_shared(tensor: str, layers: Sequence[str], values: Tensor) -> None:
    """Refuses input quantizers that differ between layers that read the same input, one value (or row) for each.

    Raises:
        FPTQuantError: names the layers and their values, of rows the first that differ.
    """
    rows = values.reshape(len(values), -1)
    different = (rows != rows[0]).any(0)
    if bool(different.any()):
        values = rows[:, int(different.nonzero()[0])]
        listed = ", ".join(f"{name} {value:g}" for name, value in zip(layers, values.tolist(), strict=True))
        raise FPTQuantError(f"{tensor} must be equal in layers that share an input, got {listed}: {DAMAGED}")
