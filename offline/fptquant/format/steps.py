"""The steps of a linear layer: one list, from which simulator, student and serving plugin are built.

    [RowScale] input steps [Quantize] Product output steps [Undo] Bias

`CheckpointConfig.steps_for` gives a layer's list, `arrange` checks it for an executor: one that meets a step which has
no place refuses. An input step changes x (..., K) before it is quantized, an output step changes the product y (..., N)
and may read x as it was before it was quantized.

An executor may reorder by one rule, exact but for the rounding of floating point. **Rule of rows**: S scales every row
by a number of its own, so it changes places with whatever is homogeneous, f(S x) = S f(x); of output steps, f(S y, S x)
= S f(y, x). Product is, Quantize and Bias are not, other steps say so. Hence S may come behind input steps, output
steps and the sum over tensor-parallel ranks may come behind Undo or before it, and where nothing is quantized, RowScale
and Undo cancel.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor

from fptquant.errors import FPTQuantError
from fptquant.format.arithmetic import block_hadamard, hadamard_factors
from fptquant.format.packing import WORD, packed_words

if TYPE_CHECKING:
    from fptquant.format.schema import TransformRecord
    from fptquant.schemes import ActivationScheme, LinearScheme


@dataclass(frozen=True)
class StepTensor:
    """A tensor that a step needs from the checkpoint.

    Attributes:
        name: of the tensor, behind that of its layer.
        shape: at the layer's sizes; empty for a scalar.
        dtype: in the checkpoint.
        outputs: dimension that runs over output features, None if there is none.
        inputs: dimension that runs over input features, None if there is none.
        packed: input features in one element of that dimension.
        once: of ranks that have parts of the input, and add up what they compute, one has it and the others zeros.
    """

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    outputs: int | None = None
    inputs: int | None = None
    packed: int = 1
    once: bool = False


class Step:
    """One step of a linear layer; subclasses are frozen dataclasses that hold what belongs to the step alone."""

    def tensors(self, in_features: int, out_features: int) -> tuple[StepTensor, ...]:
        """What the checkpoint holds of it, for a layer (out_features, in_features) or a rank's part of one."""
        return ()

    def split_refusal(self, in_features: int, parts: int) -> str | None:
        """Why it can't work on each of `parts` ranks that get `in_features` input features; None when it can."""
        return None


@dataclass(frozen=True)
class RowScale(Step):
    """S x: every row times its S, which the decoder layer computes (`residual_scale`)."""

    @staticmethod
    def apply(x: Tensor, scale: Tensor) -> Tensor:
        """`x` (..., K) times S (..., 1), in float32."""
        return x.float() * scale


@dataclass(frozen=True)
class InputStep(Step, ABC):
    """A step on the input."""

    homogeneous: ClassVar[bool] = False  # f(S x) = S f(x): the rule of rows

    @abstractmethod
    def bind(self, tensors: Mapping[str, Tensor], device: torch.device, exact: bool) -> Callable[[Tensor], Tensor]:
        """Its reference computation, differentiable.

        Args:
            tensors: of this step, by their names in the checkpoint.
            device: of the inputs.
            exact: whether sums are computed in float64 and rounded once.

        Returns:
            Function of x (..., K) that gives float32 (..., K).
        """


@dataclass(frozen=True)
class Hadamard(InputStep):
    """x blockdiag(H_block / sqrt(block)), as the Kronecker product of two small matrices (`block_hadamard`).

    Attributes:
        block: a power of two that divides K.
    """

    block: int
    homogeneous = True

    def bind(self, tensors: Mapping[str, Tensor], device: torch.device, exact: bool) -> Callable[[Tensor], Tensor]:
        """Makes the product with the two Kronecker factors, in float64 if `exact`, of what `InputStep.bind` takes."""
        left, right = hadamard_factors(self.block, torch.float64 if exact else torch.float32)
        return partial(block_hadamard, left=left.to(device), right=right.to(device))

    def split_refusal(self, in_features: int, parts: int) -> str | None:
        """Ranks that would share a block."""
        if in_features % self.block == 0:
            return None
        return (
            f"splits the Hadamard blocks of {self.block}: use a size that divides {in_features * parts // self.block}, "
            f"or quantize the model again with T_d (at o_proj T_h): {{max_tensor_parallel: {parts}}} in the recipe"
        )


@dataclass(frozen=True)
class Shift(InputStep):
    """x - c: the mean of each input channel is not quantized, `Offset` brings back what it gives."""

    def tensors(self, in_features: int, out_features: int) -> tuple[StepTensor, ...]:
        """Its only tensor is c."""
        return (StepTensor("input_shift", (in_features,), torch.float32, inputs=0),)

    def bind(self, tensors: Mapping[str, Tensor], device: torch.device, exact: bool) -> Callable[[Tensor], Tensor]:
        """Makes the difference, of what `InputStep.bind` takes."""
        shift = tensors["input_shift"].to(device)
        return lambda x: x.float() - shift


@dataclass(frozen=True)
class Quantize(Step):
    """Static quantization of the input to integers `q - z` (`quantize`).

    Attributes:
        activations: width and symmetry of the codes.
    """

    activations: ActivationScheme

    def tensors(self, in_features: int, out_features: int) -> tuple[StepTensor, ...]:
        """One scale, and a zero point where codes are asymmetric."""
        scale = StepTensor("input_scale", (), torch.float32)
        return (scale,) if self.activations.symmetric else (scale, StepTensor("input_zero_point", (), torch.int32))


@dataclass(frozen=True)
class Product(Step):
    """The product with the weight, times one scale for each output feature (`quantized_linear`).

    Attributes:
        scheme: what of it is quantized; None for a weight in floating point, which is the model's own.
    """

    scheme: LinearScheme | None

    def tensors(self, in_features: int, out_features: int) -> tuple[StepTensor, ...]:
        """Packed codes, multipliers of their groups, scales and their shape.

        Raises:
            FPTQuantError: groups that don't divide the input.
        """
        if self.scheme is None:
            return ()
        bits, size = self.scheme.weights.bits, self.scheme.weights.group_size
        shape = (out_features, packed_words(in_features, bits))
        multipliers: tuple[StepTensor, ...] = ()
        if size is not None:
            if in_features % size:
                raise FPTQuantError(f"groups of {size} weights don't divide {in_features} input features")
            shape_of_groups = (out_features, in_features // size)
            multipliers = (
                StepTensor("weight_multiplier", shape_of_groups, torch.int8, outputs=0, inputs=1, packed=size),
            )
        return (
            StepTensor("weight_packed", shape, torch.int32, outputs=0, inputs=1, packed=WORD // bits),
            *multipliers,
            StepTensor("weight_scale", (out_features, 1), torch.float32, outputs=0),
            StepTensor("weight_shape", (2,), torch.int64),
        )

    def split_refusal(self, in_features: int, parts: int) -> str | None:
        """Ranks that would share a group or a packed word."""
        if parts == 1 or self.scheme is None:
            return None
        size = self.scheme.weights.group_size
        if size is not None and in_features % size:
            return f"splits groups of {size} weights: use a size that divides {in_features * parts // size}"
        if in_features % (codes := WORD // self.scheme.weights.bits) == 0:
            return None
        return f"is no multiple of the {codes} weights in a packed word: use a smaller size"


@dataclass(frozen=True)
class OutputStep(Step, ABC):
    """A step on the product; tensor-parallel ranks that have parts of the input add up what it gives."""

    homogeneous: ClassVar[bool] = False  # f(S y, S x) = S f(y, x): the rule of rows

    @abstractmethod
    def bind(
        self, tensors: Mapping[str, Tensor], device: torch.device, exact: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Makes its reference computation, differentiable, of what `InputStep.bind` takes.

        Returns:
            Function of y (..., N) and x (..., K), the input behind all input steps, that gives (..., N).
        """


@dataclass(frozen=True)
class Offset(OutputStep):
    """y + o: what the input's shift gives, and the mean of what rounding and the layers before are off by."""

    def tensors(self, in_features: int, out_features: int) -> tuple[StepTensor, ...]:
        """Its only tensor is o."""
        return (StepTensor("output_offset", (out_features,), torch.float32, outputs=0, once=True),)

    def bind(
        self, tensors: Mapping[str, Tensor], device: torch.device, exact: bool
    ) -> Callable[[Tensor, Tensor], Tensor]:
        """Makes the sum, of what `OutputStep.bind` takes."""
        offset = tensors["output_offset"].to(device)
        return lambda y, x: y + offset


@dataclass(frozen=True)
class Undo(Step):
    """Divides every row of the product by its S, which undoes RowScale."""

    @staticmethod
    def apply(y: Tensor, scale: Tensor) -> Tensor:
        """`y` (..., N) divided by S (..., 1)."""
        return y / scale


@dataclass(frozen=True)
class Bias(Step):
    """y + b, where the model's layer has a bias."""


@dataclass(frozen=True)
class Arrangement:
    """A list of steps, sorted by what they do.

    Attributes:
        scaled: whether there is a RowScale.
        inputs: steps on the input.
        quantize: None where the input stays as it is.
        product: with the weight.
        outputs: steps on the product.
        undone: whether there is an Undo.
    """

    scaled: bool
    inputs: tuple[InputStep, ...]
    quantize: Quantize | None
    product: Product
    outputs: tuple[OutputStep, ...]
    undone: bool

    @property
    def steps(self) -> tuple[Step, ...]:
        """Those that may have tensors, integer weights first: as a layer's tensors are ordered in checkpoints."""
        return self.product, *(() if self.quantize is None else (self.quantize,)), *self.inputs, *self.outputs

    def tensors(self, in_features: int, out_features: int) -> dict[str, StepTensor]:
        """Collects what the checkpoint holds of all steps (`Step.tensors`), by the tensor's name."""
        return {tensor.name: tensor for step in self.steps for tensor in step.tensors(in_features, out_features)}

    def shared_tensors(self, in_features: int, out_features: int) -> tuple[str, ...]:
        """Names of the tensors in which layers that read the same input agree."""
        steps = (*(() if self.quantize is None else (self.quantize,)), *self.inputs)
        return tuple(tensor.name for step in steps for tensor in step.tensors(in_features, out_features))

    @property
    def shifted(self) -> bool:
        """Whether a constant is taken off the input, and what it gives is added to the product."""
        return any(isinstance(step, Shift) for step in self.inputs)

    @property
    def online(self) -> tuple[InputStep | OutputStep, ...]:
        """Steps that do more than scale rows, quantize and multiply."""
        return self.inputs + self.outputs


_KINDS = (RowScale, InputStep, Quantize, Product, OutputStep, Undo, Bias)  # in the order of a list
_REPEATED = (InputStep, OutputStep)


def arrange(steps: Iterable[Step], name: str = "linear layer") -> Arrangement:
    """Sorts the list of the layer `name`.

    Raises:
        FPTQuantError: a step that is of no known kind, or stands where nothing computes it.
    """
    found: dict[type[Step], list[Step]] = {kind: [] for kind in _KINDS}
    last = 0
    for step in steps:
        place = next((index for index, kind in enumerate(_KINDS) if isinstance(step, kind)), None)
        if place is None or place < last or (place == last and found[_KINDS[place]] and _KINDS[place] not in _REPEATED):
            raise FPTQuantError(f"{name}: can't compute the step {step} where it stands: upgrade vllm-fptquant")
        found[_KINDS[place]].append(step)
        last = place
    if not found[Product] or not found[Bias] or (found[Undo] and not found[RowScale]):
        raise FPTQuantError(f"{name}: its steps lack a Product, a Bias or a RowScale to undo: upgrade vllm-fptquant")
    return Arrangement(
        scaled=bool(found[RowScale]),
        inputs=tuple(found[InputStep]),  # type: ignore[arg-type]
        quantize=next(iter(found[Quantize]), None),  # type: ignore[arg-type]
        product=found[Product][0],  # type: ignore[arg-type]
        outputs=tuple(found[OutputStep]),  # type: ignore[arg-type]
        undone=bool(found[Undo]),
    )


def linear_steps(scheme: LinearScheme | None, online: Iterable[Step] = ()) -> tuple[Step, ...]:
    """The list of a layer.

    Args:
        scheme: what is quantized; None for nothing.
        online: what is around quantizer and product, from the outside in.
    """
    around = tuple(online)
    before = [step for step in around if isinstance(step, RowScale | InputStep)]
    behind = [step for step in reversed(around) if not isinstance(step, RowScale | InputStep)]
    if scheme is None or scheme.activations.bits == 16:
        return (*before, Product(scheme), *behind, Bias())
    quantize, product = Quantize(scheme.activations), Product(scheme)
    if scheme.activations.shift:
        return (*before, Shift(), quantize, product, Offset(), *behind, Bias())
    return (*before, quantize, product, *behind, Bias())


def in_floating_point(steps: Iterable[Step]) -> tuple[Step, ...]:
    """The list with nothing quantized."""
    kept = (step for step in steps if not isinstance(step, Shift | Quantize | Offset))
    return tuple(Product(None) if isinstance(step, Product) else step for step in kept)


def _hadamard_of(group: str) -> Callable[[TransformRecord], tuple[Step, ...]]:
    """What T_h puts in front of the layers of a group."""

    def steps(record: TransformRecord) -> tuple[Step, ...]:
        block: int | None = getattr(record.input_hadamard, group, None)
        return () if block is None else (Hadamard(block),)

    return steps


# Which field of `transforms` puts which steps around which layers (full names), from the outside in.
_ONLINE: tuple[tuple[str, Callable[[TransformRecord], tuple[Step, ...]]], ...] = (
    (r"(.*\.)?(o_proj|down_proj)", lambda record: (RowScale(), Undo()) if record.residual_scale else ()),
    (r"(.*\.)?down_proj", lambda record: (Hadamard(record.down_hadamard.block),) if record.down_hadamard else ()),
    (r"(.*\.)?(q_proj|k_proj|v_proj)", _hadamard_of("qkv")),
    (r"(.*\.)?o_proj", _hadamard_of("o")),
    (r"(.*\.)?(gate_proj|up_proj)", _hadamard_of("gate_up")),
)


def online_steps(record: TransformRecord, module: str) -> tuple[Step, ...]:
    """What runs around quantizer and product of the linear layer `module`, from the outside in."""
    return tuple(step for pattern, steps in _ONLINE if re.fullmatch(pattern, module) for step in steps(record))
