"""Turns a Hugging Face model into its simulation, according to a checkpoint configuration."""

from __future__ import annotations

from collections.abc import Container, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.format import CheckpointConfig
from fptquant.format.checks import require_shared
from fptquant.format.steps import in_floating_point
from fptquant.simulate.attention import ATTENTION_NAME, KVQuantizer
from fptquant.simulate.families import CLASSES
from fptquant.simulate.linear import SimulatedLinear
from fptquant.simulate.mixture import SparseMLP, separate_projections
from fptquant.simulate.sink import finish_loading_sink, install_sink
from fptquant.wiring import Architecture


def install_simulation(model: PreTrainedModel, architecture: Architecture, config: CheckpointConfig) -> None:
    """Replaces projections and attention in place.

    On a model with weights, they are taken over and nothing is quantized yet: the model computes what it did,
    through the online transforms. On a model on the meta device, the layers are empty, ready to be loaded.
    """
    shape = architecture.shape(model.config)
    separate_projections(model, architecture)
    become_simulation(model, architecture, config.transforms.residual_scale)
    for index, layer in enumerate(architecture.layer_modules(model)):
        readers = [projection for group in architecture.groups_of(index) for projection in group.readers]
        for projection in (*architecture.projections_of(index), *readers):
            linear = layer.get_submodule(projection.path)
            assert isinstance(linear, nn.Linear)
            steps = config.steps_for(architecture.projection_name(index, projection))
            steps = in_floating_point(steps) if projection in readers else steps
            layer.set_submodule(projection.path, SimulatedLinear.from_linear(linear, steps))
        if config.kv_cache.bits < 16:
            attention = layer.get_submodule(architecture.attention)
            attention.kv_quantizer = KVQuantizer(attention, config.kv_cache, shape.kv_heads)  # type: ignore[assignment]
    if config.scheme_for(architecture.head) is not None:
        head = model.get_submodule(architecture.head)
        assert isinstance(head, nn.Linear)
        model.set_submodule(architecture.head, SimulatedLinear.from_linear(head, config.steps_for(architecture.head)))
    if config.kv_cache.bits < 16:
        model.config._attn_implementation = ATTENTION_NAME
    if config.sink is not None:
        install_sink(model, architecture, config.sink.token)


def become_simulation(model: PreTrainedModel, architecture: Architecture, residual_scaled: bool) -> None:
    """Makes a model's modules the simulation's, by a change of their classes.

    Args:
        model: of transformers' own classes.
        architecture: its family.
        residual_scaled: whether layers compute S for their projections.
    """
    classes = CLASSES[architecture.model_type]
    names = {kind.__name__: simulated.__name__ for kind, simulated in classes.items()}
    for module in model.modules():
        module.__class__ = classes.get(type(module), type(module))
        if isinstance(module, PreTrainedModel):  # layers that accelerate keeps on one device, by class name
            module._no_split_modules = {names.get(name, name) for name in module._no_split_modules or ()}
    if residual_scaled:
        for layer in architecture.layer_modules(model):
            layer.residual_eps = model.config.rms_norm_eps


def drop_quantized_weights(model: PreTrainedModel) -> None:
    """Removes the float weights of layers whose codes are about to be loaded (a model on the meta device)."""
    for _, linear in simulated_linears(model):
        if linear.scheme is not None:
            linear.weight = None


def finish_loading(model: nn.Module) -> None:
    """Prepares a model, or a part of one, whose buffers were read from a checkpoint.

    Raises:
        FPTQuantError: a scale is missing, zero, negative or not finite; the layer is named. Or a tensor was offloaded.
    """
    stored = model.state_dict().keys()  # what is derived of it may have been let go of
    for name, buffer in model.named_buffers():
        if buffer.is_meta and name in stored:
            raise FPTQuantError(
                f"{name} was offloaded before its integers were unpacked: load the model without a device_map that "
                "offloads, then offload it with accelerate.cpu_offload or accelerate.disk_offload"
            )
    for name, module in model.named_modules():
        if isinstance(module, SimulatedLinear):
            module.finish_loading(name)
        elif isinstance(getattr(module, "kv_quantizer", None), KVQuantizer):
            module.kv_quantizer.finish_loading(module, name)
    finish_loading_sink(model)


def require_shared_inputs(model: PreTrainedModel, architecture: Architecture) -> None:
    """Refuses different input quantizers at projections that read the same input.

    Raises:
        FPTQuantError: names the layers and their values.
    """
    for index, layer in enumerate(architecture.layer_modules(model)):
        for group in architecture.groups_of(index):
            names = architecture.group_names(index, group)
            linears = [layer.get_submodule(projection.path) for projection in group.members]
            first = linears[0]
            assert isinstance(first, SimulatedLinear)
            for tensor in first.arrangement.shared_tensors(first.in_features, first.out_features):
                require_shared(tensor, names, torch.stack([linear.get_buffer(tensor) for linear in linears]))


def set_exact(model: PreTrainedModel) -> None:
    """Makes the simulation independent of the order of float32 sums, as the plugin's option `exact` does.

    Attention and what runs online are computed in float64 and rounded once (`checkpoint.exact_attention`).
    """
    for owner, name, value in _exact_settings(model):
        setattr(owner, name, value)


@contextmanager
def exactly(model: PreTrainedModel) -> Iterator[None]:
    """`set_exact` for as long as the context lasts."""
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in _exact_settings(model)]
    set_exact(model)
    try:
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)


def _exact_settings(model: PreTrainedModel) -> Iterator[tuple[Any, str, Any]]:
    """Owner, attribute and value of what exact mode sets."""
    for module in model.modules():
        if isinstance(module, SimulatedLinear | SparseMLP):
            yield module, "exact", True
        elif isinstance(getattr(module, "kv_quantizer", None), KVQuantizer):
            yield module.kv_quantizer, "exact", True


def simulated_linears(model: PreTrainedModel) -> Iterator[tuple[str, SimulatedLinear]]:
    """Names and layers of a simulation."""
    for name, module in model.named_modules():
        if isinstance(module, SimulatedLinear):
            yield name, module


@torch.no_grad()
def round_floats(module: nn.Module, dtype: torch.dtype) -> None:
    """Rounds what a checkpoint keeps of a simulation in floating point to its dtype there, in place.

    That is all but the weights of linear layers that become integers: embedding, norms, biases, ignored layers.
    """
    for owner in module.modules():
        for name, parameter in owner.named_parameters(recurse=False):
            if not (isinstance(owner, SimulatedLinear) and owner.scheme is not None and name == "weight"):
                parameter.copy_(parameter.to(dtype))


@torch.no_grad()
def checkpoint_tensors(
    model: nn.Module, dtype: torch.dtype, names: Container[str] | None = None
) -> Iterator[tuple[str, torch.Tensor]]:
    """Tensors of a finished simulation, or a part of it, by checkpoint name; what is quantization's keeps its type.

    Args:
        model: or part of one.
        dtype: of all others.
        names: of the tensors that are wanted; None for all.
    """
    ours = {name for name, _ in model.named_buffers()}
    for name, tensor in model.state_dict().items():
        if names is None or name in names:
            yield name, tensor if name in ours else tensor.to(dtype)
