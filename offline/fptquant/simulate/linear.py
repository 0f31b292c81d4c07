"""A linear layer that is float first, and has a static input range and integer weights once quantized."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from fptquant.errors import FPTQuantError
from fptquant.format import (
    LinearScheme,
    block_hadamard,
    code_bounds,
    hadamard_factors,
    pack_codes,
    packed_words,
    quantize,
    quantized_linear,
    unpack_codes,
)
from fptquant.format.checks import require_positive, require_zero_point
from fptquant.simulate.buffers import FixedBuffers


class SimulatedLinear(FixedBuffers):
    """y = Q(H(S x)) W^T / S + b, with every part optional, computed exactly as the serving kernels do.

    Tensors with the names of the checkpoint format are buffers; `weight` exists until the layer is rounded, `codes`
    (the integer weights, held in float32 for the matrix product) after that.
    """

    def __init__(
        self,
        in_features: int,
        out_features: int,
        bias: bool,
        scheme: LinearScheme | None,
        hadamard_block: int | None = None,
        residual_scaled: bool = False,
    ) -> None:
        """Makes a layer without weights; `from_linear` and `finish_loading` fill it.

        Args:
            in_features: K.
            out_features: N.
            bias: whether there is one.
            scheme: what is quantized; None leaves the layer in floating point.
            hadamard_block: block size of T_d at the input, None without.
            residual_scaled: whether `forward` is given S.
        """
        super().__init__()
        self.in_features, self.out_features = in_features, out_features
        self.scheme = scheme
        self.hadamard_block = hadamard_block
        self.hadamard_dtype = torch.float32
        self.residual_scaled = residual_scaled
        self.observer: Callable[[Tensor], None] | None = None  # sees the input as the quantizer does
        self.weight: nn.Parameter | None = None
        self.bias = nn.Parameter(torch.empty(out_features), requires_grad=False) if bias else None
        # Derived, buffers once they are there: integer weights in float32, bounds of the input codes.
        self.codes: Tensor | None = None
        self.low: Tensor | None = None
        self.high: Tensor | None = None
        if scheme is not None:
            words = packed_words(in_features, scheme.weights.bits)
            self.register_buffer("weight_packed", torch.empty(out_features, words, dtype=torch.int32))
            self.register_buffer("weight_scale", torch.empty(out_features, 1, dtype=torch.float32))
            self.register_buffer("weight_shape", torch.empty(2, dtype=torch.int64))
            if scheme.activations.bits < 16:
                self.register_buffer("input_scale", torch.empty((), dtype=torch.float32))
                if not scheme.activations.symmetric:
                    self.register_buffer("input_zero_point", torch.empty((), dtype=torch.int32))
        self.weight_packed: Tensor
        self.weight_scale: Tensor
        self.weight_shape: Tensor
        self.input_scale: Tensor
        self.input_zero_point: Tensor

    @classmethod
    def from_linear(cls, linear: nn.Linear, scheme: LinearScheme | None, **online: Any) -> SimulatedLinear:
        """Takes over weight and bias of a float layer, without copying."""
        layer = cls(linear.in_features, linear.out_features, linear.bias is not None, scheme, **online)
        layer.weight = nn.Parameter(linear.weight, linear.weight.requires_grad)
        layer.bias = linear.bias
        return layer

    def set_input_quantizer(self, scale: Tensor, zero_point: Tensor) -> None:
        """Fixes the static input range; from now on the input is quantized."""
        assert self.scheme is not None
        self.input_scale = scale.float().reshape(()).clone()
        if not self.scheme.activations.symmetric:
            self.input_zero_point = zero_point.to(torch.int32).reshape(()).clone()
        self._set_bounds()

    def set_weight_codes(self, codes: Tensor, scale: Tensor) -> None:
        """Replaces the float weight by integer codes (N, K) and channel scales (N, 1)."""
        assert self.scheme is not None
        limit = 2 ** (self.scheme.weights.bits - 1)
        assert not bool(((codes < -limit) | (codes >= limit)).any()), "codes that don't fit into their bits"
        self.weight_packed = pack_codes(codes, self.scheme.weights.bits)
        self.weight_scale = scale.float().clone()
        self.weight_shape = torch.tensor(codes.shape, dtype=torch.int64)
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
        self._derive("codes", unpack_codes(self.weight_packed, self.scheme.weights.bits, shape).float())

    def online(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """The input after residual scale S (..., 1) and Hadamard: what is quantized."""
        assert (scale is not None) is self.residual_scaled, "a layer gets S if, and only if, it is residual-scaled"
        if scale is not None:
            x = x.float() * scale
        if self.hadamard_block is not None:
            factors = hadamard_factors(self.hadamard_block, self.hadamard_dtype)
            x = block_hadamard(x, *(factor.to(x.device) for factor in factors))
        return x

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
        if self.codes is not None:
            output_scale = self.weight_scale.flatten()
            if self.low is not None:
                x, input_scale = self.quantize_input(x)
                output_scale = input_scale * output_scale
            y = quantized_linear(x.float(), self.codes, output_scale)
        else:
            assert self.weight is not None, "the layer has neither weights nor codes"
            if self.low is not None:
                x = self.quantized_input(x)
            y = nn.functional.linear(x.to(self.weight.dtype), self.weight)
        if scale is not None:
            y = y / scale
        if self.bias is not None:
            y = y + self.bias
        return y.to(dtype)

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
