"""A linear layer that is float first, and has a static input range and integer weights once quantized.

It is built from the layer's steps (`fptquant.format.steps`) and runs them in their order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn

from fptquant.errors import FPTQuantError
from fptquant.format import (
    LinearScheme,
    code_bounds,
    pack_codes,
    per_column,
    quantize,
    quantized_linear,
    unpack_codes,
)
from fptquant.format.checks import require_multiplier, require_positive, require_zero_point
from fptquant.format.steps import InputStep, OutputStep, RowScale, Step, Undo, arrange, in_floating_point
from fptquant.simulate.buffers import FixedBuffers


class SimulatedLinear(FixedBuffers):
    """y = Q(S x) W^T / S + b and other steps around them, computed exactly as the serving kernels do.

    Tensors with the names of the checkpoint format are buffers; `weight` exists until the layer is rounded, `codes`
    (the integer weights, held in float32 for the matrix product, times the multipliers of groups) after that.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool, steps: Iterable[Step]) -> None:
        """Makes a layer without weights; `from_linear` and `finish_loading` fill it.

        Args:
            in_features: K.
            out_features: N.
            bias: whether there is one.
            steps: from `CheckpointConfig.steps_for`.

        Raises:
            FPTQuantError: a step that the simulation doesn't know.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.steps = tuple(steps)
        self.arrangement = arrange(self.steps)
        self.exact = False  # sums of online steps in float64
        self.observer: Callable[[Tensor], None] | None = None  # sees the input as the quantizer does
        self.weight: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        # Derived, buffers once they are there: integer weights in float32, bounds of the input codes.
        self.codes: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        for step in self.arrangement.steps:
            make = torch.zeros if isinstance(step, InputStep | OutputStep) else torch.empty  # the others are set later
            for tensor in step.tensors(in_features, out_features):
                self.register_buffer(tensor.name, make(tensor.shape, dtype=tensor.dtype))
        self.weight_packed: Tensor
        self.weight_multiplier: Tensor  # where there are groups
        self.weight_scale: Tensor
        self.weight_shape: Tensor
        self.input_scale: Tensor
        self.input_zero_point: Tensor
        self.input_shift: Tensor  # where there is one
        self.output_offset: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear, steps: Iterable[Step]) -> SimulatedLinear:
        """Takes over weight and bias of a float layer, without copying."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, steps)
        layer.weight = nn.Parameter(linear.weight, linear.weight.requires_grad)
        layer.bias = linear.bias
        return layer

    def around(self, linear: nn.Linear) -> SimulatedLinear:
        """A layer that runs these online steps, with their tensors, around a float layer's product."""
        layer = self.from_linear(linear, in_floating_point(self.steps))
        for name in layer.arrangement.tensors(self.in_features, self.out_features):
            setattr(layer, name, self.get_buffer(name))
        return layer

    @property
    def scheme(self) -> LinearScheme | None:
        """What is quantized; None for a layer in floating point."""
        return self.arrangement.product.scheme

    def set_input_quantizer(self, scale: Tensor, zero_point: Tensor) -> None:
        """Fixes the static input range; from now on the input is quantized."""
        assert self.scheme is not None
        self.input_scale = scale.float().reshape(()).clone()
        if not self.scheme.activations.symmetric:
            self.input_zero_point = zero_point.to(torch.int32).reshape(()).clone()
        self._set_bounds()

    def set_shift(self, shift: Tensor) -> None:
        """Fixes what is taken off the input, (K,), before it is quantized."""
        self.input_shift = shift.float().clone()

    def set_offset(self, offset: Tensor) -> None:
        """Fixes what is added to the product, (N,)."""
        self.output_offset = offset.float().clone()

    def set_weight_codes(self, codes: Tensor, scale: Tensor, multiplier: Tensor | None = None) -> None:
        """Replaces the float weight by integers.

        Args:
            codes: (N, K), multiples of their groups' multipliers.
            scale: of the channels, (N, 1).
            multiplier: int8 (N, groups), where the scheme has groups.
        """
        assert self.scheme is not None and (multiplier is None) is (self.scheme.weights.group_size is None)
        stored = codes
        if multiplier is not None:
            stored = codes / per_column(multiplier, codes.shape[1])
            self.weight_multiplier = multiplier.to(torch.int8).clone()
        limit = 2 ** (self.scheme.weights.bits - 1)
        outside = bool(((stored < -limit) | (stored >= limit) | ((stored - stored.round()).abs() > 0)).any())
        assert not outside, "codes that don't fit into their bits"
        self.weight_packed = pack_codes(stored, self.scheme.weights.bits)
        self.weight_scale = scale.float().clone()
        self.weight_shape = torch.tensor(codes.shape, dtype=torch.int64, device=codes.device)
        self._derive("codes", codes.float())
        self.weight = None

    def set_weight_scale(self, scale: Tensor) -> None:
        """Replaces the channel scales (N, 1) of a rounded layer."""
        assert self.codes is not None, "the layer isn't rounded yet"
        self.weight_scale = scale.float().clone()

    def finish_loading(self, name: str) -> None:
        """Prepares the layer after its buffers were read from a checkpoint; `name` is for error messages."""
        if self.scheme is None:
            return
        require_positive(f"{name}.weight_scale", self.weight_scale)
        if self.scheme.activations.bits < 16:
            require_positive(f"{name}.input_scale", self.input_scale)
            if not self.scheme.activations.symmetric:
                require_zero_point(f"{name}.input_zero_point", self.input_zero_point, self.scheme.activations.bits)
            self._set_bounds()
        shape = torch.Size((self.out_features, self.in_features))
        if self.weight_shape.tolist() != list(shape):
            raise FPTQuantError(f"{name}.weight_shape: {self.weight_shape.tolist()}, expected {list(shape)}")
        codes = unpack_codes(self.weight_packed, self.scheme.weights.bits, shape).float()
        if self.scheme.weights.group_size is not None:
            require_multiplier(f"{name}.weight_multiplier", self.weight_multiplier)
            codes *= per_column(self.weight_multiplier, self.in_features)
        self._derive("codes", codes)

    def online(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The input after residual scale S (..., 1) and all other input steps: what is quantized."""
        assert (scale is not None) is self.arrangement.scaled, "a layer gets S if, and only if, it scales by it"
        if scale is not None:
            x = RowScale.apply(x, scale)
        for step in self.arrangement.inputs:
            x = step.bind(self._tensors(step), x.device, self.exact)(x)
        return x

    def finished(self, y: Tensor, x: Tensor, scale: Tensor | None, bias: Tensor | None) -> Tensor:
        """The product `y` (..., N) after all steps behind it.

        Args:
            y: (..., N).
            x: (..., K), as `online` made it.
            scale: S (..., 1) where the layer scales by it.
            bias: (N,) or None.
        """
        for step in self.arrangement.outputs:
            y = step.bind(self._tensors(step), x.device, self.exact)(y, x)
        if self.arrangement.undone:
            assert scale is not None
            y = Undo.apply(y, scale)
        return y if bias is None else y + bias

    def quantized_input(self, x: Tensor) -> Tensor:
        """What the layer makes of its (online-transformed) input: x^ = s (q - z)."""
        codes, scale = self.quantize_input(x)
        return codes * scale

    def quantize_input(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Integers q - z of an (online-transformed) input (..., K), held in float32, and their scale ()."""
        assert self.low is not None and self.high is not None, "the input range is not set"
        return quantize(x, self.input_scale, self.low, self.high), self.input_scale

    def float_weight(self) -> Tensor:
        """The weight (N, K) before rounding."""
        assert self.weight is not None, "the layer was rounded already"
        return self.weight

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Args: x (..., K), and S (..., 1) where the layer is scaled. Returns: (..., N) of the dtype of `x`."""
        dtype, x = x.dtype, self.online(x, scale)
        if self.observer is not None:
            self.observer(x)
        return self.finished(self._product(x), x, scale, self.bias).to(dtype)

    def _product(self, x: Tensor) -> Tensor:
        """Quantize and Product, as far as they are known by now."""
        if self.codes is not None:
            output_scale = self.weight_scale.flatten()
            if self.low is not None:
                x, input_scale = self.quantize_input(x)
                output_scale = input_scale * output_scale
            return quantized_linear(x.float(), self.codes, output_scale)
        assert self.weight is not None, "the layer has neither weights nor codes"
        if self.low is not None:
            x = self.quantized_input(x)
        return nn.functional.linear(x.to(self.weight.dtype), self.weight)

    def _tensors(self, step: Step) -> dict[str, Tensor]:
        """What `step` finds in the checkpoint, by name."""
        names = (tensor.name for tensor in step.tensors(self.in_features, self.out_features))
        return {name: self.get_buffer(name) for name in names}

    def _set_bounds(self) -> None:
        assert self.scheme is not None
        zero_point = torch.zeros((), dtype=torch.int32, device=self.input_scale.device)
        if not self.scheme.activations.symmetric:
            zero_point = self.input_zero_point
        for name, bound in zip(("low", "high"), code_bounds(zero_point, self.scheme.activations.bits), strict=True):
            self._derive(name, bound)

    def _derive(self, name: str, value: Tensor) -> None:
        """Sets one of the derived buffers. An empty one would be in the way of offloading."""
        if name not in self._buffers:
            delattr(self, name)
            self.register_buffer(name, None, persistent=False)
        setattr(self, name, value)
