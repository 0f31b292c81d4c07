"""Checks on tensors that some kernels need; those that every reader makes are in `fptquant.format.checks`."""

from __future__ import annotations

import torch
from torch import Tensor

from fptquant.errors import FPTQuantError


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
