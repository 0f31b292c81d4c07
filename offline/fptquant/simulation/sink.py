"""The first token as a constant of the model: keys, values and final hidden state in full precision.

A model sends much of its attention to the first position, whose activations are hundreds of times larger than all
others. Where the first token is always the same (BOS, or the first token of a chat template), nothing about it
depends on the prompt: its keys and values in every layer, and the hidden state that predicts the second token, are
computed once, in floating point, and static ranges need not hold its activations.

Behind the layer that makes those massive activations, keys and values of the first position hardly depend on the
token either: the layers are *steady*. There the constants stand for whatever token comes first, so that a prompt
that starts otherwise needs no wide ranges and keeps the position that its tokens attend to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.architectures import Architecture, Role
from fptquant.checkpoint.checks import DAMAGED, require_finite
from fptquant.errors import FPTQuantError

KEY, VALUE, STEADY, OUTPUT = "k_sink", "v_sink", "sink_steady", "sink_output"  # names of the tensors in a checkpoint
_STEADY_DEVIATION = 0.15  # median over first tokens of |x - x_sink| / |x_sink|, of keys and of values


class SinkState:
    """Where the constants belong in the batch at hand; a forward pre-hook of the model."""

    def __init__(self, token: int) -> None:
        """Args: token is the id that gets constants in every layer where it comes first."""
        self.token = token
        self.ready = False
        self.at_token: Tensor | None = None  # (batch, tokens) bool: the token at position 0
        self.at_start: Tensor | None = None  # any token at position 0

    def __call__(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Finds position 0 of each sequence."""
        tokens = kwargs["input_ids"] if kwargs.get("input_ids") is not None else (args[0] if args else None)
        if tokens is None:  # embeddings were given: nothing is known of the tokens
            self.at_token = self.at_start = None
            return
        positions = kwargs.get("position_ids")
        if positions is None:
            past = kwargs.get("past_key_values")
            start = 0 if past is None else past.get_seq_length()
            positions = torch.arange(start, start + tokens.shape[1], device=tokens.device)
        self.locate(tokens, positions)

    def locate(self, tokens: Tensor, positions: Tensor) -> None:
        """Finds position 0 in `tokens` (batch, length), given `positions` of a shape that broadcasts to it."""
        self.at_start = (positions == 0).expand(tokens.shape)
        self.at_token = self.at_start & (tokens == self.token)

    def constant(self, owner: nn.Module, name: str) -> Callable[..., Tensor | None]:
        """Forward hook that puts the buffer `name` of `owner` in place of the output where it belongs."""

        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> Tensor | None:
            if not self.ready or self.at_start is None or self.at_token is None:
                return None
            where = self.at_start if name != OUTPUT and bool(owner.get_buffer(STEADY)) else self.at_token
            return torch.where(where[..., None], owner.get_buffer(name).flatten().to(output.dtype), output)

        return hook


def install_sink(model: PreTrainedModel, architecture: Architecture, token: int) -> None:
    """Adds empty constants, and the hooks that put them in place once `record_sink` or a checkpoint filled them."""
    shape = architecture.shape(model.config)
    state = SinkState(token)
    model.base_model.register_forward_pre_hook(state, with_kwargs=True)
    for layer in architecture.layer_modules(model):
        attention = layer.get_submodule(architecture.attention)
        attention.register_buffer(STEADY, torch.zeros((), dtype=torch.int32))
        for name, role in ((KEY, Role.KEY), (VALUE, Role.VALUE)):
            attention.register_buffer(name, torch.zeros(shape.kv_heads, shape.head_dim, dtype=torch.float32))
            # RoPE leaves position 0 as it is, so the key may be replaced before it
            layer.get_submodule(architecture.projections[role]).register_forward_hook(state.constant(attention, name))
    norm = model.get_submodule(architecture.final_norm)
    norm.register_buffer(OUTPUT, torch.zeros(shape.hidden, dtype=torch.float32))
    norm.register_forward_hook(state.constant(norm, OUTPUT))
    model.fptquant_sink = state  # a plain attribute, not a module


def sink_state(model: nn.Module) -> SinkState | None:
    """The state that `install_sink` made, None without."""
    state = getattr(model, "fptquant_sink", None)
    return state if isinstance(state, SinkState) else None


@torch.no_grad()
def record_sink(model: PreTrainedModel, architecture: Architecture, others: Tensor) -> None:
    """Computes the constants with the model as it is, transformed but not quantized.

    Args:
        model: with `install_sink` done; left alone without.
        architecture: its family.
        others: (n,) other tokens that a text may start with, by which steady layers are found.
    """
    state = sink_state(model)
    if state is None:
        return
    seen: dict[tuple[nn.Module, str], Tensor] = {}
    handles = []

    def keep(owner: nn.Module, name: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            seen[owner, name] = output[:, 0]

        return hook

    attentions = [layer.get_submodule(architecture.attention) for layer in architecture.layer_modules(model)]
    norm = model.get_submodule(architecture.final_norm)
    for layer, attention in zip(architecture.layer_modules(model), attentions, strict=True):
        for name, role in ((KEY, Role.KEY), (VALUE, Role.VALUE)):
            projection = layer.get_submodule(architecture.projections[role])
            handles.append(projection.register_forward_hook(keep(attention, name)))
    handles.append(norm.register_forward_hook(keep(norm, OUTPUT)))
    model(torch.cat((torch.tensor([state.token]), others.flatten()))[:, None], use_cache=False)
    for handle in handles:
        handle.remove()
    for (owner, name), states in seen.items():
        buffer = owner.get_buffer(name)
        buffer.copy_(states[0].view(buffer.shape))
    for attention in reversed(attentions):  # steady from some layer on
        if not others.numel() or max(_deviation(seen[attention, name]) for name in (KEY, VALUE)) > _STEADY_DEVIATION:
            break
        attention.get_buffer(STEADY).fill_(1)
    state.ready = True


def finish_loading_sink(model: nn.Module) -> None:
    """Checks the constants read from a checkpoint and puts them to use.

    Raises:
        FPTQuantError: a constant is not finite.
    """
    state = sink_state(model)
    if state is not None:
        for name, buffer in model.named_buffers():
            if name.endswith((KEY, VALUE, OUTPUT)):
                require_finite(name, buffer)
            elif name.endswith(STEADY) and int(buffer) not in (0, 1):
                raise FPTQuantError(f"{name} is {int(buffer)}, neither 0 nor 1: {DAMAGED}")
        state.ready = True


def _deviation(states: Tensor) -> float:
    """Median distance of rows 1.. of (n, channels) from row 0, relative to it."""
    return float((states[1:] - states[0]).norm(dim=-1).median() / states[0].norm())
