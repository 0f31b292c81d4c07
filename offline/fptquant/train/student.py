"""The quantized model in a form that can be trained: quantizers with gradients in place of the simulation's."""

from __future__ import annotations

import copy
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.format import round_scale
from fptquant.layers.residency import (
    Fill,
    entered,
    extend,
    fill_of,
    is_streamed,
    make_part,
    put_buffers,
    refill,
    release,
    set_tensors,
    small_tensors,
)
from fptquant.options.train import Estimator
from fptquant.simulate import KVQuantizer, SimulatedLinear
from fptquant.simulate.attention import SHIFT
from fptquant.simulate.install import become_simulation, finish_loading
from fptquant.simulate.sink import KEY, OUTPUT, STEADY, VALUE, install_sink, sink_token, use_sink
from fptquant.train.fake_quant import StaticQuantizer
from fptquant.train.student_weights import (
    FloatWeight,
    FreeWeight,
    IntegerWeight,
    MergedWeight,
    StudentWeight,
    TransformedWeight,
)
from fptquant.transforms import TransformSet
from fptquant.wiring import EMBEDDING, HEAD, Architecture, InputGroup, Place, Role

Shifting = Callable[[], Tensor]  # gives what is taken off an input, (K,), at the transforms as they are


@dataclass
class SinkInput:
    """What the projections of keys and values read at the constant token, so that the constants follow transforms."""

    attention: nn.Module
    name: str
    normed: Tensor  # (hidden,), without transforms
    norm: nn.Module | None = None  # of keys, over each head

    def update(self, linear: SimulatedLinear, source: FloatWeight) -> None:
        """Computes the constant with the online steps of `linear` and the weight of `source`, not quantized."""
        transforms = source.transforms[0]
        states = transforms.inputs(EMBEDDING, self.normed[None])
        gain = transforms.gain(source.place, states.dtype)
        states = source.exact(linear.online(states if gain is None else states * gain))
        states = states.view(self.attention.get_buffer(self.name).shape)
        setattr(self.attention, self.name, states if self.norm is None else self.norm(states))


class GroupInput:
    """What the layers of a group read: their one input, quantized once for all of them."""

    def __init__(self, readers: int, quantizer: StaticQuantizer | None, shift: Shifting | None = None) -> None:
        """Takes what the group's layers share.

        Args:
            readers: how many layers the group has.
            quantizer: of the input.
            shift: taken off the input before it is quantized; None for nothing.
        """
        self.readers, self.quantizer, self.shift = readers, quantizer, shift
        self._seen: tuple[Tensor, Tensor] | None = None
        self._left = 0

    def __call__(self, x: Tensor, weight: StudentWeight) -> Tensor:
        """Args: x (..., K) is the same tensor for all readers, weight any of theirs. Returns: (..., K)."""
        if self._seen is None or self._seen[0] is not x:
            result = weight.restored(self._quantized(x))
            self._seen, self._left = (x, result), self.readers
        result = self._seen[1]
        self._left -= 1
        if self._left == 0:  # nothing is held on to
            self._seen = None
        return result

    def _quantized(self, x: Tensor) -> Tensor:
        if self.quantizer is None:
            return x
        quantized: Tensor = self.quantizer(x if self.shift is None else x - self.shift())
        return quantized


def group_inputs(
    group: InputGroup, quantizer: StaticQuantizer | None, shift: Shifting | None = None
) -> dict[int | None, GroupInput]:
    """What the layers of a group read: by expert, for each sees other tokens, with one quantizer for all."""
    readers = Counter(projection.expert for projection in group.members)
    return {expert: GroupInput(count, quantizer, shift) for expert, count in readers.items()}


class TrainedLinear(nn.Module):
    """Stands in for a `SimulatedLinear` while it is trained: its steps, with another quantizer and product."""

    def __init__(
        self,
        linear: SimulatedLinear,
        weight: StudentWeight,
        group: GroupInput,
        sink: SinkInput | None = None,
    ) -> None:
        """Args: linear is kept for its steps; the group is shared with the layers that read the same input."""
        super().__init__()
        self.linear = [linear]
        self.group, self.quantizer = group, group.quantizer
        self.weight, self.sink = weight, sink
        self.offset: nn.Parameter | None = None  # what the layer's changes by, in `_unit`
        self.register_buffer("_unit", None, persistent=False)
        shifted = linear.arrangement.shifted and linear.arrangement.quantize is not None
        if shifted and isinstance(weight, IntegerWeight | FreeWeight):
            self.offset, self._unit = nn.Parameter(torch.zeros_like(linear.output_offset)), _size_of_outputs(linear)

    def forward(self, x: Tensor, scale: Tensor | None = None) -> Tensor:
        """Args: x (..., K), and S (..., 1) where the layer is scaled. Returns: (..., N)."""
        linear = self.linear[0]
        x = linear.online(x, scale)
        y, bias = self.weight.product(self.group(x, self.weight))
        if self.group.shift is not None:  # what was taken off, through the weight as it is without rounding
            assert isinstance(self.weight, FloatWeight)
            y = y + self.weight.exact_product(self.group.shift()[None])[0]
        if self.offset is not None:
            y = y + self.offset * self._unit
        if self.sink is not None:
            assert isinstance(self.weight, FloatWeight)
            self.sink.update(linear, self.weight)
        return linear.finished(y, x, scale, bias)


def _size_of_outputs(linear: SimulatedLinear) -> Tensor:
    """About the standard deviation of each output of a rounded layer (N,), if codes spread over their grids."""
    assert linear.scheme is not None
    spread: float = (2**linear.scheme.weights.code_bits / 6) * (2**linear.scheme.activations.bits / 6)
    return linear.weight_scale.flatten() * linear.input_scale * (spread * math.sqrt(linear.in_features))


class TrainedKV(KVQuantizer):
    """Stands in for a `KVQuantizer`: values in place of codes, so that its scales are one."""

    def __init__(
        self, attention: nn.Module, quantizer: KVQuantizer, estimator: Estimator, shift: Shifting | None = None
    ) -> None:
        """Takes the ranges of a calibrated quantizer.

        Args:
            attention: with the ranges.
            quantizer: calibrated.
            estimator: see `fake_quantize`.
            shift: gives what is taken off keys, (kv_heads, head_dim), where it isn't the attention's.
        """
        self.scheme, self.ready, self.exact, self.observer = quantizer.scheme, True, False, None
        self.quantizers = nn.ModuleDict()
        for key in ("k", "v"):
            zero_point = None if self.scheme.symmetric else attention.get_buffer(f"{key}_zero_point").view(-1, 1, 1)
            scale = attention.get_buffer(f"{key}_scale").view(-1, 1, 1)
            self.quantizers[key] = StaticQuantizer(scale, zero_point, self.scheme.bits, estimator)
        self.sides = quantizer.sides
        self._shift = shift

    def shifted(self, attention: nn.Module, key: str, states: Tensor) -> Tensor:
        """As `KVQuantizer.shifted`, with the shift at the transforms as they are."""
        if self._shift is None or key != "k":
            return super().shifted(attention, key, states)
        return states - self._shift()[:, None]

    def scale(self, attention: nn.Module, key: str) -> Tensor:
        """Returns ones, as `codes` are multiplied by their scales already."""
        return torch.ones(1, 1, 1, device=self.quantizers[key].get_parameter("log_scale").device)

    def codes(self, attention: nn.Module, key: str, states: Tensor) -> Tensor:
        """Quantizes and dequantizes `states` with gradients for scale and zero point."""
        values: Tensor = self.quantizers[key](self.shifted(attention, key, states))
        return values


@dataclass
class Student:
    """A model whose layers are being trained, and how to turn it back into a simulation."""

    model: PreTrainedModel
    architecture: Architecture
    caches: list[tuple[nn.Module, KVQuantizer, TrainedKV]] = field(default_factory=list)
    fills: list[tuple[nn.Module, Fill]] = field(default_factory=list)  # of streamed parts, as they are once finished

    def linears(self) -> Iterator[tuple[str, TrainedLinear]]:
        """Names and layers in training."""
        for name, module in self.model.named_modules():
            if isinstance(module, TrainedLinear):
                yield name, module

    def freeze(self) -> None:
        """Nothing gets a gradient until an optimization asks for it."""
        self.model.requires_grad_(False)
        for _, _, cache in self.caches:
            cache.quantizers.requires_grad_(False)

    def compute_in(self, dtype: torch.dtype) -> None:
        """Sets the type of products with the layers' weights; the head's, of which the loss is made, stay float32."""
        for name, linear in self.linears():
            if name != self.architecture.head:
                linear.weight.compute_dtype = dtype

    def weight_parameters(self) -> dict[str, nn.Parameter]:
        """Channel scales (or clipping) of the weights by name."""
        return {
            f"{name}.{key}": parameter
            for name, linear in self.linears()
            for key, parameter in linear.weight.named_parameters()
            if key != "bias" and name != self.architecture.head  # a scale for each token would be learned by heart
        }

    def offset_parameters(self) -> dict[str, nn.Parameter]:
        """By name, what is added to the products of shifted inputs."""
        return {f"{name}.offset": linear.offset for name, linear in self.linears() if linear.offset is not None}

    def range_parameters(self, kind: str) -> dict[str, nn.Parameter]:
        """`log_scale` or `zero_point` (the kind) of every activation and KV quantizer by name."""
        found: dict[str, nn.Parameter] = {}
        for index, (_, _, cache) in enumerate(self.caches):
            found.update({f"kv.{index}.{key}": p for key, p in cache.quantizers.named_parameters() if kind in key})
        for name, linear in self.linears():
            if linear.quantizer is not None:
                for key, parameter in linear.quantizer.named_parameters():
                    if kind in key and not any(parameter is other for other in found.values()):
                        found[f"{name}.{key}"] = parameter
        return found

    @torch.no_grad()
    def finish(self) -> None:
        """Puts the simulation's layers back, with the trained ranges, and the trained scales of integer weights."""
        for name, trained in list(self.linears()):
            linear = trained.linear[0]
            if trained.quantizer is not None:
                linear.set_input_quantizer(*trained.quantizer.values())
            if isinstance(trained.weight, FreeWeight):
                scale = round_scale(trained.weight.log_scale.exp())
                linear.set_weight_codes(trained.weight.codes(), scale, trained.weight.multiplier)
            elif isinstance(trained.weight, IntegerWeight):
                linear.set_weight_scale(round_scale(trained.weight.log_scale.exp()))
            if trained.offset is not None:
                linear.set_offset(linear.output_offset + trained.offset * trained._unit)
            self.model.set_submodule(name, linear)
        for attention, original, trained_cache in self.caches:
            for key, quantizer in trained_cache.quantizers.items():
                assert isinstance(quantizer, StaticQuantizer)
                original.set_range(attention, key, *quantizer.values())
            attention.kv_quantizer = original  # type: ignore[assignment]
        for part, fill in self.fills:
            refill(part, partial(_fill_finished, before=fill, small=small_tensors(part)))


def _fill_finished(part: nn.Module, before: Fill, small: Mapping[str, Tensor]) -> None:
    """Gives a part that was stored before its scales were trained the trained ones."""
    before(part)
    set_tensors(part, small)
    finish_loading(part)


def _fill_integers(part: nn.Module, before: Fill, twin: nn.Module) -> None:
    """Gives the layers in training of a part the integers of the finished simulation."""
    before(twin)
    for name, trained in part.named_modules():
        if isinstance(trained, TrainedLinear) and isinstance(trained.weight, IntegerWeight):
            linear = twin.get_submodule(name)
            assert isinstance(linear, SimulatedLinear) and linear.codes is not None
            trained.weight.codes = linear.codes
        elif isinstance(trained, SimulatedLinear):  # that stayed in floating point
            set_tensors(trained, dict(twin.get_submodule(name).named_parameters()))
    release(twin)


def _fill_floats(part: nn.Module, before: Fill, twin: nn.Module) -> None:
    """Gives the layers in training of a part their float weights."""
    before(twin)
    for name, trained in part.named_modules():
        if isinstance(trained, TrainedLinear) and isinstance(trained.weight, FloatWeight):
            trained.weight.weight = twin.get_submodule(name).get_parameter("weight").detach()
    release(twin)


def integer_student(model: PreTrainedModel, architecture: Architecture, estimator: Estimator) -> Student:
    """Student for the scales-and-ranges stage: a finished simulation, with its integers frozen."""
    student = Student(model, architecture)
    for index, layer in enumerate(architecture.layer_modules(model)):
        twin = copy.deepcopy(layer) if is_streamed(layer) else None
        _replace_layer(student, index, estimator)
        if twin is not None:
            student.fills.append((layer, extend(layer, partial(_fill_integers, twin=twin))))
    head = model.get_submodule(architecture.head)
    if isinstance(head, SimulatedLinear) and head.codes is not None:
        group = GroupInput(1, _input_quantizer(head, estimator))
        model.set_submodule(architecture.head, TrainedLinear(head, IntegerWeight(head), group))
        if is_streamed(head):
            student.fills.append((head, fill_of(head)))
            trained = model.get_submodule(architecture.head)
            make_part(trained, partial(_fill_integers, before=fill_of(head), twin=head), "streamed")
    return student


def layer_student(
    model: PreTrainedModel,
    architecture: Architecture,
    index: int,
    estimator: Estimator,
    weights: Mapping[str, Tensor],
) -> Student:
    """Student of one rounded layer of a simulation, whose codes may change; all else of it is frozen.

    Args:
        model: the simulation.
        architecture: its family.
        index: of the layer.
        estimator: see `fake_quantize`.
        weights: what was rounded, (N, K) by full name.
    """
    student = Student(model, architecture)
    _replace_layer(student, index, estimator, weights)
    architecture.layer_modules(model)[index].requires_grad_(False)
    for _, _, cache in student.caches:
        cache.quantizers.requires_grad_(False)
    return student


@torch.no_grad()
def transform_student(
    model: PreTrainedModel,
    architecture: Architecture,
    transforms: TransformSet,
    calibrated: PreTrainedModel,
    *,
    estimator: Estimator,
    float_weights: bool,
) -> Student:
    """Student for stage 2: a folded float model whose weights go through `transforms` in every step.

    Args:
        model: norms folded, head untied, transforms not merged; becomes the student.
        architecture: its family.
        transforms: to be trained.
        calibrated: the same model with these transforms merged, quantized; ranges start from it.
        estimator: see `fake_quantize`.
        float_weights: leave the weights in floating point, for rounding that comes later.
    """
    token = sink_token(calibrated)
    sink_inputs = {} if token is None else _sink_inputs(model, architecture, token)
    become_simulation(model, architecture, transforms.record().residual_scale)
    rotate_ends(model, architecture, transforms)
    scale_norms(model, architecture, transforms)
    if token is not None:
        install_sink(model, architecture, token)
        put_buffers(model, sink_inputs[-1].device)
        use_sink(model)
        model.get_submodule(architecture.final_norm).get_buffer(OUTPUT).copy_(sink_inputs[-1])
    student = Student(model, architecture)
    layers = zip(architecture.layer_modules(model), architecture.layer_modules(calibrated), strict=True)
    for index, (layer, quantized) in enumerate(layers):
        attention = layer.get_submodule(architecture.attention)
        if token is not None:
            attention.get_buffer(STEADY).copy_(quantized.get_submodule(architecture.attention).get_buffer(STEADY))
        twin = copy.deepcopy(layer) if is_streamed(layer) else None
        with entered(layer):
            for members in architecture.groups_of(index):
                first = quantized.get_submodule(members.first.path)
                assert isinstance(first, SimulatedLinear)
                inputs = group_inputs(
                    members, _input_quantizer(first, estimator), _shifting(first, members, transforms)
                )
                for projection in (*members.members, *members.readers):
                    path, role = projection.path, projection.role
                    linear, example = layer.get_submodule(path), quantized.get_submodule(path)
                    assert isinstance(linear, nn.Linear) and isinstance(example, SimulatedLinear)
                    group = GroupInput(1, None) if projection in members.readers else inputs[projection.expert]
                    weight: FloatWeight
                    if float_weights or example.scheme is None:
                        weight = TransformedWeight(linear, transforms, projection.at(index))
                    else:
                        scale, bits = example.weight_scale, example.scheme.weights.bits
                        if example.scheme.weights.group_size is not None:
                            scale = scale * example.weight_multiplier
                        weight = MergedWeight(
                            linear, transforms, projection.at(index), scale=scale, bits=bits, estimator=estimator
                        )
                    sink = None
                    if sink_inputs and role is Role.KEY:
                        norm = None if architecture.key_norm is None else attention.get_submodule(architecture.key_norm)
                        sink = SinkInput(attention, KEY, sink_inputs[index], norm)
                    elif sink_inputs and role is Role.VALUE:
                        sink = SinkInput(attention, VALUE, sink_inputs[index])
                    online = example.around(linear)
                    online.weight = None  # it's the student's to hold and to let go of
                    layer.set_submodule(path, TrainedLinear(online, weight, group, sink))
        calibrated_attention = quantized.get_submodule(architecture.attention)
        shifting = _key_shifting(calibrated_attention, transforms, Place(Role.KEY, index))
        _replace_cache(student, attention, calibrated_attention, estimator, shifting)
        if twin is not None:
            extend(layer, partial(_fill_floats, twin=twin))
    model.config._attn_implementation = calibrated.config._attn_implementation
    return student


def _shifting(first: SimulatedLinear, group: InputGroup, transforms: TransformSet) -> Shifting | None:
    """What is taken off a group's input: turned with T_r where it reads the normed residual, and else as calibrated."""
    if not first.arrangement.shifted:
        return None
    shift = first.input_shift
    if group.first.role in (Role.OUTPUT, Role.DOWN) or len(first.arrangement.inputs) > 1:
        return lambda: shift
    before = transforms.inputs(EMBEDDING, shift, transposed=True)
    return lambda: transforms.inputs(EMBEDDING, before)


def _key_shifting(attention: nn.Module, transforms: TransformSet, place: Place) -> Shifting | None:
    """What is taken off a layer's keys behind RoPE, with which T_k changes places; None without a shift."""
    quantizer = getattr(attention, "kv_quantizer", None)
    if not isinstance(quantizer, KVQuantizer) or not quantizer.scheme.shift:
        return None
    shift = attention.get_buffer(SHIFT)
    heads, size = shape = shift.shape
    one = torch.eye(heads * size, dtype=torch.float64, device=shift.device)
    before = torch.linalg.solve(transforms.outputs(place, one).mT, shift.flatten().double()).float()
    return lambda: transforms.outputs(place, before).view(shape)


def _sink_inputs(model: PreTrainedModel, architecture: Architecture, token: int) -> dict[int, Tensor]:
    """Output of each layer's attention norm at the constant token, and at -1 that of the final norm."""
    found: dict[int, Tensor] = {}
    before = architecture.norm_before(Role.KEY)
    assert before is not None
    norms = {index: layer.get_submodule(before) for index, layer in enumerate(architecture.layer_modules(model))}
    norms[-1] = model.get_submodule(architecture.final_norm)
    handles = []
    for index, norm in norms.items():

        def keep(module: nn.Module, args: Any, output: Tensor, index: int = index) -> None:
            found[index] = output[0, 0].clone()

        handles.append(norm.register_forward_hook(keep))
    device = norms[-1].get_parameter("weight").device
    model(torch.tensor([[token]], device=device), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def rotate_ends(model: PreTrainedModel, architecture: Architecture, transforms: TransformSet) -> None:
    """Applies T_r to the embedding's output and takes it back before the head, in place of merging it there."""

    def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return transforms.inputs(EMBEDDING, output)

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return transforms.inputs(HEAD, output, transposed=True)

    model.get_submodule(architecture.embedding).register_forward_hook(enter)
    model.get_submodule(architecture.final_norm).register_forward_hook(leave)


def scale_norms(model: PreTrainedModel, architecture: Architecture, transforms: TransformSet) -> None:
    """Multiplies the output of each layer's norms by the gain that the transforms give them, in place of merging it."""

    def scale(place: Place, gain_at: Callable[[Place, torch.dtype], Tensor | None]) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            gain = gain_at(place, output.dtype)
            return output if gain is None else output * gain

        return hook

    for index, layer in enumerate(architecture.layer_modules(model)):
        for group, norm in architecture.normed_groups(index):
            layer.get_submodule(norm).register_forward_hook(scale(group.first.at(index), transforms.gain))
        for place, norm in architecture.head_norm_places(index):
            layer.get_submodule(norm).register_forward_hook(scale(place, transforms.head_gain))


def _input_quantizer(linear: SimulatedLinear, estimator: Estimator) -> StaticQuantizer | None:
    if linear.scheme is None or linear.scheme.activations.bits == 16:
        return None
    scheme = linear.scheme.activations
    zero_point = None if scheme.symmetric else linear.input_zero_point
    return StaticQuantizer(linear.input_scale, zero_point, scheme.bits, estimator)


def _replace_layer(
    student: Student, index: int, estimator: Estimator, weights: Mapping[str, Tensor] | None = None
) -> None:
    """Puts what is trained in the place of a rounded layer's; with what was rounded, codes are trained, too."""
    architecture = student.architecture
    layer = architecture.layer_modules(student.model)[index]
    for members in architecture.groups_of(index):  # a group has one scheme, so one layer of it stands for all
        linears = [layer.get_submodule(projection.path) for projection in members.members]
        first = linears[0]
        if not isinstance(first, SimulatedLinear) or first.codes is None:
            continue
        inputs = group_inputs(members, _input_quantizer(first, estimator))
        for projection, linear in zip(members.members, linears, strict=True):
            assert isinstance(linear, SimulatedLinear)
            name = architecture.projection_name(index, projection)
            weight = IntegerWeight(linear) if weights is None else FreeWeight(linear, weights[name])
            student.model.set_submodule(name, TrainedLinear(linear, weight, inputs[projection.expert]))
    attention = layer.get_submodule(architecture.attention)
    _replace_cache(student, attention, attention, estimator)


def _replace_cache(
    student: Student,
    attention: nn.Module,
    calibrated: nn.Module,
    estimator: Estimator,
    shift: Shifting | None = None,
) -> None:
    quantizer = getattr(calibrated, "kv_quantizer", None)
    if isinstance(quantizer, KVQuantizer):
        trained = TrainedKV(calibrated, quantizer, estimator, shift)
        student.caches.append((attention, quantizer, trained))
        attention.kv_quantizer = trained  # type: ignore[assignment]
