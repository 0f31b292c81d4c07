"""The quantized model in a form that can be trained: quantizers with gradients in place of the simulation's."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fptquant.architectures import Architecture, Role
from fptquant.architectures.base import INPUT_GROUPS
from fptquant.checkpoint import code_bounds, round_scale
from fptquant.quantizers import channel_scale, log_clip_of
from fptquant.simulation import KVQuantizer, SimulatedLinear
from fptquant.simulation.install import simulated_projection
from fptquant.simulation.sink import KEY, OUTPUT, STEADY, VALUE, install_sink, sink_state
from fptquant.training.fake_quant import Estimator, StaticQuantizer, fake_quantize
from fptquant.transforms import TransformSet


class IntegerWeight(nn.Module):
    """Frozen integers with trainable channel scales."""

    def __init__(self, linear: SimulatedLinear) -> None:
        """Takes codes and scales of a rounded layer."""
        super().__init__()
        assert linear.codes is not None
        self.register_buffer("codes", linear.codes, persistent=False)
        self.codes: Tensor
        self.log_scale = nn.Parameter(linear.weight_scale.log())

    def product(self, x: Tensor) -> Tensor:
        """X W^T (..., N), without forming W."""
        return nn.functional.linear(x, self.codes) * self.log_scale.exp().flatten()


class MergedWeight(nn.Module):
    """A frozen float weight behind trainable transforms, fake-quantized to nearest with trainable clipping."""

    def __init__(
        self,
        linear: nn.Linear,
        transforms: TransformSet,
        role: Role,
        layer: int,
        scale: Tensor | None,
        bits: int,
        estimator: Estimator,
    ) -> None:
        """Takes the weight (norm gain folded in, transforms not merged).

        Args:
            linear: float layer.
            transforms: trained elsewhere.
            role: of the layer.
            layer: index.
            scale: (N, 1) to start from; None leaves the weight in floating point.
            bits: width of the codes.
            estimator: see `fake_quantize`.
        """
        super().__init__()
        self.register_buffer("weight", linear.weight.detach(), persistent=False)
        self.weight: Tensor
        self.bias = linear.bias
        self.transforms = [transforms]  # in a list: its parameters are not this module's
        self.role, self.layer, self.bits, self.estimator = role, layer, bits, estimator
        self.log_clip = None
        if scale is not None:
            with torch.no_grad():
                self.log_clip = nn.Parameter(log_clip_of(scale, self.merged()[0], bits))

    def merged(self) -> tuple[Tensor, Tensor | None]:
        """Weight and bias after the transforms, not quantized; merged again when differentiating, to save memory."""
        merge, arguments = self.transforms[0].merge, (self.role, self.layer, self.weight, self.bias)
        if not torch.is_grad_enabled():
            return merge(*arguments)
        merged: tuple[Tensor, Tensor | None] = checkpoint(
            merge, *arguments, use_reentrant=False, preserve_rng_state=False
        )
        return merged

    def quantized(self, weight: Tensor) -> Tensor:
        """The merged weight, fake-quantized."""
        if self.log_clip is None:
            return weight
        scale = channel_scale(weight, self.log_clip, self.bits)
        return fake_quantize(weight, scale, *code_bounds(torch.zeros(()), self.bits), self.estimator)


@dataclass
class SinkInput:
    """What the projections of keys and values read at the constant token, so that the constants follow transforms."""

    attention: nn.Module
    name: str
    normed: Tensor  # (hidden,), without transforms

    def update(self, source: MergedWeight, weight: Tensor, bias: Tensor | None) -> None:
        """Computes the constant from the merged weight of `source` (not quantized)."""
        transforms = source.transforms[0]
        states, _ = transforms.merge(Role.EMBEDDING, -1, self.normed[None], None)
        gain = transforms.gain(source.role, source.layer, states.dtype)
        states = nn.functional.linear(states if gain is None else states * gain, weight, bias)
        setattr(self.attention, self.name, states.view(self.attention.get_buffer(self.name).shape))


class TrainedLinear(nn.Module):
    """Stands in for a `SimulatedLinear` while it is trained, with the same online steps."""

    def __init__(
        self,
        linear: SimulatedLinear,
        weight: IntegerWeight | MergedWeight,
        quantizer: StaticQuantizer | None,
        sink: SinkInput | None = None,
    ) -> None:
        """Args: linear is kept for its online steps; the quantizer may be shared by several layers."""
        super().__init__()
        self.linear = [linear]
        self.sink = sink
        self.weight, self.quantizer = weight, quantizer

    def forward(self, x: Tensor) -> Tensor:
        """Args: x (..., K). Returns: (..., N)."""
        linear = self.linear[0]
        x = linear.online(x)
        if self.quantizer is not None:
            x = self.quantizer(x)
        if isinstance(self.weight, IntegerWeight):
            y = self.weight.product(x)
            bias: Tensor | None = linear.bias
        else:
            weight, bias = self.weight.merged()
            if self.sink is not None:
                self.sink.update(self.weight, weight, bias)
            y = nn.functional.linear(x, self.weight.quantized(weight))
        if linear.tap is not None:
            assert linear.tap.scale is not None
            y = y / linear.tap.scale
        return y if bias is None else y + bias


class TrainedKV(KVQuantizer):
    """Stands in for a `KVQuantizer`: values in place of codes, so that its scales are one."""

    def __init__(self, attention: nn.Module, quantizer: KVQuantizer, estimator: Estimator) -> None:
        """Takes the ranges of a calibrated quantizer."""
        self.scheme, self.ready, self.exact, self.observer = quantizer.scheme, True, False, None
        self.quantizers = nn.ModuleDict()
        for key in ("k", "v"):
            zero_point = None if self.scheme.symmetric else attention.get_buffer(f"{key}_zero_point").view(-1, 1, 1)
            scale = attention.get_buffer(f"{key}_scale").view(-1, 1, 1)
            self.quantizers[key] = StaticQuantizer(scale, zero_point, self.scheme.bits, estimator)

    def codes(self, attention: nn.Module, key: str, states: Tensor) -> tuple[Tensor, Tensor]:
        """Fake-quantized `states`, and a scale of one."""
        values = self.quantizers[key](states)
        return self._keep_sink(attention, key, states, values, torch.ones(1, 1, 1)), torch.ones(1, 1, 1)


@dataclass
class Student:
    """A model whose layers are being trained, and how to turn it back into a simulation."""

    model: PreTrainedModel
    architecture: Architecture
    caches: list[tuple[nn.Module, KVQuantizer, TrainedKV]] = field(default_factory=list)

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

    def weight_parameters(self) -> dict[str, nn.Parameter]:
        """Channel scales (or clipping) of the weights by name."""
        return {
            f"{name}.{key}": parameter
            for name, linear in self.linears()
            for key, parameter in linear.weight.named_parameters()
            if key != "bias" and name != self.architecture.head  # a scale for each token would be learned by heart
        }

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
            if isinstance(trained.weight, IntegerWeight):
                linear.set_weight_codes(trained.weight.codes, round_scale(trained.weight.log_scale.exp()))
            self.model.set_submodule(name, linear)
        for attention, original, trained_cache in self.caches:
            for key, quantizer in trained_cache.quantizers.items():
                assert isinstance(quantizer, StaticQuantizer)
                original.set_range(attention, key, *quantizer.values())
            attention.kv_quantizer = original  # type: ignore[assignment]


def integer_student(model: PreTrainedModel, architecture: Architecture, estimator: Estimator) -> Student:
    """Student for the scales-and-ranges stage: a finished simulation, with its integers frozen."""
    student = Student(model, architecture)
    for index, layer in enumerate(architecture.layer_modules(model)):
        for group in INPUT_GROUPS:
            quantizer = None
            for role in group:
                linear = layer.get_submodule(architecture.projections[role])
                if not isinstance(linear, SimulatedLinear) or linear.codes is None:
                    continue
                quantizer = quantizer or _input_quantizer(linear, estimator)
                _replace(student, architecture.projection_name(index, role), linear, IntegerWeight(linear), quantizer)
        attention = layer.get_submodule(architecture.attention)
        _replace_cache(student, attention, attention, estimator)
    head = model.get_submodule(architecture.head)
    if isinstance(head, SimulatedLinear) and head.codes is not None:
        _replace(student, architecture.head, head, IntegerWeight(head), _input_quantizer(head, estimator))
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
    source = sink_state(calibrated)
    sink_inputs = {} if source is None else _sink_inputs(model, architecture, source.token)
    rotate_ends(model, architecture, transforms)
    scale_norms(model, architecture, transforms)
    if source is not None:
        install_sink(model, architecture, source.token)
        state = sink_state(model)
        assert state is not None
        state.ready = True
        model.get_submodule(architecture.final_norm).get_buffer(OUTPUT).copy_(sink_inputs[-1])
    student = Student(model, architecture)
    layers = zip(architecture.layer_modules(model), architecture.layer_modules(calibrated), strict=True)
    for index, (layer, quantized) in enumerate(layers):
        attention = layer.get_submodule(architecture.attention)
        if source is not None:
            attention.get_buffer(STEADY).copy_(quantized.get_submodule(architecture.attention).get_buffer(STEADY))
        for group in INPUT_GROUPS:
            quantizer = None
            for role in group:
                path = architecture.projections[role]
                linear, example = layer.get_submodule(path), quantized.get_submodule(path)
                assert isinstance(linear, nn.Linear) and isinstance(example, SimulatedLinear)
                eps = None if example.tap is None else example.tap.eps
                online = simulated_projection(layer, architecture, role, None, example.hadamard_block, eps)
                scale = None
                if example.scheme is not None:
                    quantizer = quantizer or _input_quantizer(example, estimator)
                    scale = None if float_weights else example.weight_scale
                bits = 16 if example.scheme is None else example.scheme.weights.bits
                weight = MergedWeight(linear, transforms, role, index, scale, bits, estimator)
                sink = None
                if sink_inputs and role in (Role.KEY, Role.VALUE):
                    name = KEY if role is Role.KEY else VALUE
                    sink = SinkInput(attention, name, sink_inputs[index])
                trained = TrainedLinear(online, weight, quantizer, sink)
                trained._forward_hooks = linear._forward_hooks
                layer.set_submodule(path, trained)
        _replace_cache(student, attention, quantized.get_submodule(architecture.attention), estimator)
    model.config._attn_implementation = calibrated.config._attn_implementation
    return student


def _sink_inputs(model: PreTrainedModel, architecture: Architecture, token: int) -> dict[int, Tensor]:
    """Output of each layer's attention norm at the constant token, and at -1 that of the final norm."""
    found: dict[int, Tensor] = {}
    norms = {
        index: layer.get_submodule(architecture.attention_norm)
        for index, layer in enumerate(architecture.layer_modules(model))
    }
    norms[-1] = model.get_submodule(architecture.final_norm)
    handles = []
    for index, norm in norms.items():

        def keep(module: nn.Module, args: Any, output: Tensor, index: int = index) -> None:
            found[index] = output[0, 0].clone()

        handles.append(norm.register_forward_hook(keep))
    model(torch.tensor([[token]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return found


def rotate_ends(model: PreTrainedModel, architecture: Architecture, transforms: TransformSet) -> None:
    """Applies T_r to the embedding's output and takes it back before the head, in place of merging it there."""

    def enter(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        return transforms.merge(Role.EMBEDDING, -1, output.flatten(0, -2), None)[0].view(output.shape)

    def leave(module: nn.Module, args: Any, output: Tensor) -> Tensor:
        rotation = transforms.rotation(output.dtype)
        return output if rotation is None else output @ rotation.mT

    model.get_submodule(architecture.embedding).register_forward_hook(enter)
    model.get_submodule(architecture.final_norm).register_forward_hook(leave)


def scale_norms(model: PreTrainedModel, architecture: Architecture, transforms: TransformSet) -> None:
    """Multiplies the output of each layer's norms by the gain that the transforms give them, in place of merging it."""

    def scale(role: Role, index: int) -> Callable[..., Tensor]:
        def hook(module: nn.Module, args: Any, output: Tensor) -> Tensor:
            gain = transforms.gain(role, index, output.dtype)
            return output if gain is None else output * gain

        return hook

    for index, layer in enumerate(architecture.layer_modules(model)):
        for role in (Role.QUERY, Role.GATE):
            layer.get_submodule(architecture.norm_before(role)).register_forward_hook(scale(role, index))


def _input_quantizer(linear: SimulatedLinear, estimator: Estimator) -> StaticQuantizer | None:
    assert linear.scheme is not None
    scheme = linear.scheme.activations
    if scheme.bits == 16:
        return None
    zero_point = None if scheme.symmetric else linear.input_zero_point
    return StaticQuantizer(linear.input_scale, zero_point, scheme.bits, estimator)


def _replace(
    student: Student,
    name: str,
    linear: SimulatedLinear,
    weight: IntegerWeight | MergedWeight,
    quantizer: StaticQuantizer | None,
) -> None:
    trained = TrainedLinear(linear, weight, quantizer)
    # hooks (the constants of a sink) belong to the place, not to the layer
    trained._forward_hooks = linear._forward_hooks
    student.model.set_submodule(name, trained)


def _replace_cache(student: Student, attention: nn.Module, calibrated: nn.Module, estimator: Estimator) -> None:
    quantizer = getattr(calibrated, "kv_quantizer", None)
    if isinstance(quantizer, KVQuantizer):
        trained = TrainedKV(calibrated, quantizer, estimator)
        student.caches.append((attention, quantizer, trained))
        attention.kv_quantizer = trained  # type: ignore[assignment]
