"""Weights of a student: rounded ones with trainable scales, or frozen float ones with trainable transforms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from fptquant.format import code_bounds, per_column
from fptquant.options.train import Estimator
from fptquant.quantize import channel_scale, log_clip_of
from fptquant.simulate import SimulatedLinear
from fptquant.train.fake_quant import fake_quantize, straight_through_round
from fptquant.transforms import TransformSet
from fptquant.wiring import Place

_INSIDE = 0.98  # of the way to an edge: what is on it would turn by chance


class StudentWeight(nn.Module):
    """A linear layer's weight (N, K) while something about it is trained.

    Attributes:
        compute_dtype: of products with it; what goes in and comes out is float32.
    """

    compute_dtype = torch.float32

    def _times(self, x: Tensor, weight: Tensor) -> Tensor:
        """X W^T (..., N) of `x` (..., K) and `weight` (N, K)."""
        return nn.functional.linear(x.to(self.compute_dtype), weight.to(self.compute_dtype)).to(x.dtype)

    def restored(self, x: Tensor) -> Tensor:
        """What `product` takes for the layer's input `x` (..., K); the same for all layers that read it."""
        return x

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """X W^T (..., N) and the bias."""
        raise NotImplementedError


class _IntegerProduct(torch.autograd.Function):
    """X W^T of integers W, which are widened again for the gradient of X instead of being kept wide."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, codes: Tensor) -> Tensor:
        ctx.save_for_backward(codes)
        return nn.functional.linear(x, codes.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (codes,) = ctx.saved_tensors
        return gradients[0] @ codes.to(gradients[0].dtype), None


class IntegerWeight(StudentWeight):
    """Frozen integers with trainable channel scales."""

    def __init__(self, linear: SimulatedLinear) -> None:
        """Takes codes and scales of a rounded layer."""
        super().__init__()
        assert linear.codes is not None
        self.bias = linear.bias
        self.register_buffer("codes", linear.codes, persistent=False)
        self.codes: Tensor
        self.log_scale = nn.Parameter(linear.weight_scale.log())

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiplies by the integers first and by the scales of channels afterwards, so that W is never formed."""
        product: Tensor = _IntegerProduct.apply(x.to(self.compute_dtype), self.codes)  # type: ignore[no-untyped-call]
        return product.to(x.dtype) * self.log_scale.exp().flatten(), self.bias


class FreeWeight(StudentWeight):
    """Integers that may change, with trainable channel scales: positions on the grid, rounded straight through."""

    def __init__(self, linear: SimulatedLinear, weight: Tensor) -> None:
        """Starts at a rounded layer's codes.

        Weights that were rounded to the nearest code start where they are on the grid, so that few cross an edge at
        once. Those that GPTQ moved further, to make up for others, start in the middle: at the edge, all that
        it did would be undone by the first step.

        Args:
            linear: rounded.
            weight: (N, K) that was rounded.
        """
        super().__init__()
        assert linear.codes is not None and linear.scheme is not None
        self.bias = linear.bias
        half = 2.0 ** (linear.scheme.weights.bits - 1)
        self.low, self.high = -half, half - 1
        self.multiplier: Tensor | None = None  # (N, groups)
        self._columns: Tensor | float = 1.0  # what a step of each counts, in scales of its channel
        if linear.scheme.weights.group_size is not None:
            self.multiplier = linear.weight_multiplier
            self._columns = per_column(self.multiplier, linear.in_features).float()
        codes, unit = linear.codes / self._columns, linear.weight_scale * self._columns
        offset = weight / unit - codes
        offset = torch.where(offset.abs() <= 0.5, _INSIDE * offset, 0.0)
        self.position = nn.Parameter(codes + offset)
        self.log_scale = nn.Parameter(linear.weight_scale.log())

    def codes(self) -> Tensor:
        """Integers (N, K) that the positions round to, times the multipliers of groups."""
        return torch.round(self.position.detach()).clamp(self.low, self.high) * self._columns

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiplies by rounded positions, through which gradients pass straight, and by the scales of channels."""
        codes = straight_through_round(self.position.clamp(self.low, self.high)) * self._columns
        return self._times(x, codes) * self.log_scale.exp().flatten(), self.bias


class FloatWeight(StudentWeight):
    """A frozen float weight with trainable transforms."""

    def __init__(self, linear: nn.Linear, transforms: TransformSet, place: Place) -> None:
        """Takes the weight (norm gain folded in, transforms not merged).

        Args:
            linear: float layer.
            transforms: trained elsewhere.
            place: of the layer.
        """
        super().__init__()
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        self.weight: Tensor
        self.bias = linear.bias
        self.transforms = [transforms]  # in a list: its parameters are not this module's
        self.place = place

    def exact_product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """X W^T (..., N) of the merged layer, nothing quantized, for inputs (..., K); and the bias."""
        raise NotImplementedError

    def exact(self, x: Tensor) -> Tensor:
        """Output (..., N) with bias of the merged layer, nothing quantized, for inputs (..., K)."""
        y, bias = self.exact_product(x)
        return y if bias is None else y + bias


class TransformedWeight(FloatWeight):
    """Transforms are applied to what goes in and comes out; the weight stays in floating point.

    Merging them would take a product with T_r for each weight in each step, and hold a second copy of the model.
    """

    def restored(self, x: Tensor) -> Tensor:
        """Takes the transforms of the input back, which the weight knows nothing of."""
        return self.transforms[0].inputs(self.place, x, transposed=True)

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Applies the transforms to the product with the frozen weight, and to the bias."""
        transforms = self.transforms[0]
        y = transforms.outputs(self.place, self._times(x, self.weight))
        return y, None if self.bias is None else transforms.outputs(self.place, self.bias)

    def exact_product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Computes the merged layer's by transforms around the frozen weight."""
        return self.product(self.restored(x))


class MergedWeight(FloatWeight):
    """Transforms are merged in every step, and the weight fake-quantized to nearest with trainable clipping."""

    def __init__(self, *layer: Any, scale: Tensor, bits: int, estimator: Estimator) -> None:
        """Starts at the scales of a calibrated layer.

        Args:
            layer: see `FloatWeight`.
            scale: (N, 1), or (N, groups) of groups of inputs.
            bits: width of the codes.
            estimator: see `fake_quantize`.
        """
        super().__init__(*layer)
        self.bits, self.estimator = bits, estimator
        with torch.no_grad():
            self.log_clip = nn.Parameter(log_clip_of(scale, self.merged()[0], bits))

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after the transforms, not quantized; merged again when differentiating, to save memory."""
        merge, arguments = self.transforms[0].merge, (self.place, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return merge(*arguments)
        merged: tuple[Tensor, Tensor | None] = checkpoint(
            merge, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return merged

    def product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiplies by the merged weight, rounded to nearest at its trained clipping."""
        weight, bias = self.merged()
        scale = channel_scale(weight, self.log_clip, self.bits)[..., None]
        bounds = code_bounds(torch.zeros((), device=weight.device), self.bits)
        groups = weight.reshape(*scale.shape[:2], -1)
        return self._times(x, fake_quantize(groups, scale, *bounds, self.estimator).flatten(1)), bias

    def exact_product(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Multiplies by the merged weight, not quantized."""
        weight, bias = self.merged()
        return nn.functional.linear(x, weight), bias
