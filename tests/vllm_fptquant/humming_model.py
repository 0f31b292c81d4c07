"""What the Humming kernels compute, on a CPU: their weight layout and their arithmetic, written independently.

Stands in for the package where it cannot run. `test_humming_package.py` holds it against the package itself: the
layout against its own code, the arithmetic against its compiled device code, executed instruction by instruction.
"""

from __future__ import annotations

import json
from types import SimpleNamespace
from typing import Any

import numpy as np
import torch
from torch import Tensor


def flat_layout(words: Tensor, bits: int, n: int, k: int) -> Tensor:
    """Humming's layout of weights from offset binary words int32 (N, K * bits / 32), padded to (n, k).

    16 bytes of consecutive codes of one row, then those of the next row; two's complement, low half byte first. The
    padding is not zero but the smallest code: the kernel reads zeros for the input there, and leaves out the rows.
    """
    offset = 0x88 if bits == 4 else 0x80
    margin = (0, k * bits // 8 - words.shape[1] * 4, 0, n - words.shape[0])
    codes = torch.nn.functional.pad(words.view(torch.uint8), margin) ^ offset
    chunks = codes.view(n, -1, 16).transpose(0, 1)
    return chunks.reshape(n, -1).view(torch.int32)


def unpack(weight: Any, bits: int) -> Any:
    """Codes int64 (n, k) from that layout, in numpy."""
    n = weight.shape[0]
    rows = np.ascontiguousarray(weight).view(np.uint8).reshape(-1, n, 16).transpose(1, 0, 2).reshape(n, -1)
    if bits == 8:
        return rows.view(np.int8).astype(np.int64)
    halves = np.stack([rows & 15, rows >> 4], -1).reshape(n, -1).astype(np.int64)
    return np.where(halves < 8, halves, halves - 16)


def unpack_input(codes: Any, bits: int) -> Any:
    """Codes int64 (M, K) of the input: int8, or uint8 that hold two, the first in the low half."""
    if bits == 8:
        return codes.astype(np.int64)
    halves = np.stack([codes & 15, codes >> 4], -1).reshape(codes.shape[0], -1).astype(np.int64)
    return np.where(halves < 8, halves, halves - 16)


def integer_sums(codes: Tensor, weight: Tensor, config: dict[str, Any]) -> Any:
    """int64 (M, N): the sums, none of which leaves int32 on the way (the instructions saturate there)."""
    activations = unpack_input(codes.numpy(), config["activation_bits"])
    weights = unpack(weight.numpy(), config["weight_bits"])[: config["n"], : config["k"]]
    assert activations.shape[1] == config["k"]
    assert (np.abs(activations) @ np.abs(weights).T <= 2**31 - 1).all()
    return activations @ weights.T


class Config(SimpleNamespace):
    """Humming's layer configuration: shapes and types."""

    def to_str(self) -> str:
        return json.dumps(vars(self))


class HummingModel:
    """The names that the plugin uses of `vllm.utils.humming`."""

    HummingWeightSchema = HummingInputSchema = SimpleNamespace
    LayerConfig = Config

    @staticmethod
    def prepare_and_transform_humming_tensors(
        tensors: dict[str, Tensor],
        shape_n: int,
        shape_k: int,
        weight_schema: Any,
        input_schema: Any,
        pad_n_to_multiple: int,
        pad_k_to_multiple: int,
        has_bias: bool,
        torch_dtype: torch.dtype,
        device: Any,
    ) -> tuple[Config, dict[str, Tensor]]:
        assert weight_schema.weight_scale_type == "tensor" and input_schema.input_quant_mode == "static_tensor"
        assert torch_dtype == torch.float16 and not has_bias and device == tensors["weight"].device
        bits = int(weight_schema.b_dtype.removeprefix("uint"))
        padded_n = -(-shape_n // pad_n_to_multiple) * pad_n_to_multiple
        padded_k = -(-shape_k // pad_k_to_multiple) * pad_k_to_multiple
        config = Config(
            n=shape_n, k=shape_k, weight_bits=bits, activation_bits=int(input_schema.a_dtype.removeprefix("int"))
        )
        weight = flat_layout(tensors["weight"], bits, padded_n, padded_k)
        return config, {"weight": weight, "weight_scale": tensors["weight_scale"]}

    @staticmethod
    def humming_forward(
        config: Config, inputs: Tensor, weight: Tensor, weight_scale: Tensor, input_scale: Tensor, compute_config: str
    ) -> Tensor:
        """The sum to float32, times both scales' product, to float16: each rounds to nearest even."""
        assert json.loads(compute_config)["use_batch_invariant"]
        assert inputs.dtype == (torch.uint8 if config.activation_bits == 4 else torch.int8)
        assert inputs.is_contiguous() and weight_scale.shape == input_scale.shape == (1,)
        sums = integer_sums(inputs, weight, vars(config)).astype(np.float32)
        return torch.from_numpy((sums * (input_scale * weight_scale).numpy()).astype(np.float16))
