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
