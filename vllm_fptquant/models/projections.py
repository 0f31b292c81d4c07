"""vLLM's linear layers with S, the scale of a token's residual, around them."""

from __future__ import annotations

import torch
from torch import Tensor
from vllm.model_executor.layers.linear import LinearBase, RowParallelLinear

from vllm_fptquant.kernels.gpu import ScaledInput
from vllm_fptquant.linear import FPTQuantLinearMethod


def project(projection: LinearBase, x: Tensor, scale: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """`projection(scale * x)`, divided by `scale` again where the layer's steps say so; or `projection(x)` without S.

    Args:
        projection: any of vLLM's linear layers.
        x: (T, K).
        scale: float32 (T, 1) or None.

    Returns:
        (T, N) of the type of `x`, and the bias where the projection was built to skip it.
    """
    if scale is None:
        output, bias = projection(x)
    elif not isinstance(projection.quant_method, FPTQuantLinearMethod):
        output, bias = projection((x * scale).to(x.dtype))
    elif projection.fptquant_takes_scale:
        scaled: tuple[Tensor, Tensor | None] = projection(ScaledInput(x, scale))
        return scaled
    elif projection.fptquant_plain and not torch.compiler.is_compiling():
        return FPTQuantLinearMethod.apply_scaled(projection, x, scale), None
    else:  # around the layer, by the rule of rows (`fptquant.format.steps`): ranks sum before S is undone
        output, bias = projection(x * scale)  # float32
        output = output.div_(scale) if projection.fptquant_undone else output
    return output.to(x.dtype), bias


def scaled_projection(projection: RowParallelLinear, x: Tensor, scale: Tensor | None) -> Tensor:
    """A projection with its steps, of which RowScale and Undo take S, and its bias.

    Args:
        projection: built with `skip_bias_add`.
        x: (T, K).
        scale: float32 (T, 1) or None.

    Returns:
        (T, N) of the type of `x`.
    """
    scaled = getattr(projection, "fptquant_scaled", False)  # not in floating point, where S would cancel
    output, bias = project(projection, x, scale if scaled else None)
    if bias is not None:
        output = output + bias
    result: Tensor = output.to(x.dtype)
    return result
