"""Checks on tensors that a checkpoint brings."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import FPTQuantError


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
        raise FPTQuantError(
            f"{name} is {value:g}{where}, must be positive and finite: the checkpoint is damaged, "
            "quantize the model again"
        )


def require_zero_point(name: str, zero_point: Tensor, bits: int) -> None:
    """Refuses zero points that are no codes of this width.

    Raises:
        FPTQuantError: names the tensor and the limits.
    """
    limit = 2 ** (bits - 1)
    if bool(((zero_point < -limit) | (zero_point >= limit)).any()):
        raise FPTQuantError(f"{name} is missing or outside of [{-limit}, {limit - 1}]: quantize the model again")


def require_exact(name: str, scale: Tensor, dtype: torch.dtype) -> Tensor:
    """Converts a float32 scale to a 16-bit type, in which kernels take it.

    Raises:
        FPTQuantError: names the tensor and the first value that would change.
    """
    converted = scale.to(dtype)
    changed = converted.float() != scale
    if bool(changed.any()):
        value = scale[changed][0].item()
        raise FPTQuantError(
            f"{name} {value!r} is not exact in {str(dtype).removeprefix('torch.')}, in which this kernel takes it: "
            "quantize the model again, or serve with a kernel that takes float32 scales (cutlass-int8, triton-int8)"
        )
    return converted
