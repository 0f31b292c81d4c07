"""The first token as a constant of the model: keys, values and final hidden state in full precision.

A model sends much of its attention to the first position, whose activations are hundreds of times larger than all
others. Where the first token is always the same (BOS, or the first token of a chat template), nothing about it
depends on the prompt: its keys and values in every layer, and the hidden state that predicts the second token, are
computed once, in floating point, and static ranges need not hold its activations.

Behind the layer that makes those massive activations, keys and values of the first position hardly depend on the
token either: layers are *steady*, up to one of the last. There the constants stand for whatever token comes first, so
that a prompt that starts otherwise needs no wide ranges and keeps the position that its tokens attend to.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.format.checks import DAMAGED, require_finite
from fptquant.wiring import Architecture

KEY, VALUE, STEADY, OUTPUT = "k_sink", "v_sink", "sink_steady", "sink_output"  # names of the tensors in a checkpoint


class SinkMasks(NamedTuple):
    """Tokens that are first in their sequence, each bool (batch, tokens)."""

    at_start: Tensor  # whatever they are
    at_token: Tensor  # those that the constants were made for


class SinkModel(nn.Module):
    """What base models of every family share in a simulation: they find the first tokens for their layers."""

    sink_token: int | None = None  # the id that gets constants in every layer where it comes first; None without
    sink_ready = False  # whether the constants are there

    def first_tokens(self, tokens: Tensor, positions: Tensor, embed: Callable[[Tensor], Tensor]) -> SinkMasks:
        """Finds position 0 of each sequence.

        Args:
            tokens: ids (batch, length), or embeddings (batch, length, hidden) in their place: what is embedded as the
                sink's token is that token to the model.
            positions: of a shape that broadcasts to (batch, length).
            embed: the model's embedding.
        """
        assert self.sink_token is not None
        at_start = (positions == 0).expand(tokens.shape[:2])
        if tokens.dim() == 2:
            return SinkMasks(at_start, at_start & (tokens == self.sink_token))
        embedded = embed(torch.full((1, 1), self.sink_token, device=tokens.device)).to(tokens)
        return SinkMasks(at_start, at_start & (tokens == embedded).all(-1))


def find_positions(tokens: Tensor, attention_mask: Any, past_key_values: Any) -> Tensor:
    """Positions (1 or batch, length) of `tokens` (batch, length, ...) where a caller gives none.

    As `generate` counts them: padding on the left comes before the first position.
    """
    past = 0 if past_key_values is None else past_key_values.get_seq_length()
    indices = torch.arange(tokens.shape[1], device=tokens.device)[None] + past
    if not isinstance(attention_mask, Tensor) or attention_mask.dim() != 2:
        return indices
    padding = (attention_mask != 0).int().argmax(-1, keepdim=True).to(tokens.device)
    return (indices - padding).clamp_min(0)


def replaced(states: Tensor, constant: Tensor, where: Tensor) -> Tensor:
    """`states` with `constant` in its place `where`."""
    return torch.where(where, constant.to(states.dtype), states)


def put_output(norm: nn.Module, states: Tensor, masks: SinkMasks | None) -> Tensor:
    """Puts the constant in place.

    Args:
        norm: final norm of the model, which holds the constant.
        states: its output (batch, tokens, hidden).
        masks: where the first tokens are.

    Raises:
        FPTQuantError: the constant was offloaded.
    """
    if masks is None:
        return states
    constant = norm.get_buffer(OUTPUT)
    if constant.is_meta and not states.is_meta:
        raise FPTQuantError(f"{OUTPUT} of the final norm was offloaded: offload without offload_buffers=True")
    return replaced(states, constant.to(states.device), masks.at_token.to(states.device)[..., None])


def install_sink(model: PreTrainedModel, architecture: Architecture, token: int) -> None:
    """Adds empty constants to a simulation, to be filled by a `SinkRecorder` or a checkpoint."""
    shape = architecture.shape(model.config)
    for layer in architecture.layer_modules(model):
        attention = layer.get_submodule(architecture.attention)
        attention.register_buffer(STEADY, torch.zeros((), dtype=torch.int32))
        for name in (KEY, VALUE):
            attention.register_buffer(name, torch.zeros(shape.kv_heads, shape.head_dim, dtype=torch.float32))
    norm = model.get_submodule(architecture.final_norm)
    norm.register_buffer(OUTPUT, torch.zeros(shape.hidden, dtype=torch.float32))
    _sink_model(model).sink_token = token


def sink_token(model: PreTrainedModel) -> int | None:
    """The token that `install_sink` was told of, None without."""
    base = model.base_model
    return base.sink_token if isinstance(base, SinkModel) else None


def use_sink(model: PreTrainedModel) -> None:
    """Turns the constants on, once they are there."""
    _sink_model(model).sink_ready = True


def _sink_model(model: PreTrainedModel) -> SinkModel:
    base = model.base_model
    assert isinstance(base, SinkModel), f"{type(base).__name__} is no simulation's"
    return base


def finish_loading_sink(model: nn.Module) -> None:
    """Checks the constants read from a checkpoint and puts them to use.

    Raises:
        FPTQuantError: a constant is not finite.
    """
    for name, buffer in model.named_buffers():
        if name.endswith((KEY, VALUE, OUTPUT)):
            require_finite(name, buffer)
        elif name.endswith(STEADY) and int(buffer) not in (0, 1):
            raise FPTQuantError(f"{name} is {int(buffer)}, neither 0 nor 1: {DAMAGED}")
    for base in model.modules():
        if isinstance(base, SinkModel) and base.sink_token is not None:
            base.sink_ready = True
