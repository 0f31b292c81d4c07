"""How much each token's output matters to the loss: weights of the tokens in an output-adaptive Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.layers.residency import recomputed
from fptquant.simulate import SimulatedLinear
from fptquant.wiring import Architecture


def token_weights(model: PreTrainedModel, architecture: Architecture, windows: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the loss at the output of every group of linear layers that share an input.

    With d_t the gradient of the next-token cross entropy with respect to the output W x_t of a group, sum_t |d_t|^2
    x_t x_t^T is the token-diagonal form of the output-adaptive Hessian (OAC, Edalati et al., arXiv 2405.15025).
    One backward pass per sequence; only the norms are kept.

    Args:
        model: with merged weights and the simulation installed, nothing quantized yet.
        architecture: its family.
        windows: (sequences, length) tokens; of several processes, the part of each.

    Returns:
        By name of the group's first layer, float32 of the shape of `windows`, with mean 1 over all sequences.
    """
    groups = _groups(model, architecture)
    seen: dict[str, list[Tensor]] = {name: [] for name in groups}
    with torch.enable_grad(), recomputed(model, architecture.layer_modules(model), always=False):
        for window in windows:
            norms = {name: torch.zeros(len(window), device=window.device) for name in groups}
            with _recorded(model, architecture, groups, norms):
                logits = model(window[None], use_cache=False).logits[0, :-1].float()
                loss = nn.functional.cross_entropy(logits, window[1:], reduction="sum")
                loss.backward()  # type: ignore[no-untyped-call]
            for name, values in norms.items():
                seen[name].append(values)
    found = {name: torch.stack(parts) for name, parts in seen.items()}
    means = {name: parallel.joined(values).mean() for name, values in found.items()}
    return {name: values / means[name].clamp_min(torch.finfo().tiny) for name, values in found.items()}


def _groups(model: PreTrainedModel, architecture: Architecture) -> dict[str, list[SimulatedLinear]]:
    """Layers that share an input, by the name of the first; the head is a group of its own."""
    names = [
        architecture.group_names(layer, group)
        for layer in range(len(architecture.layer_modules(model)))
        for group in architecture.groups
    ]
    groups = {}
    for group in [*names, [architecture.head]]:
        linears = [module for module in map(model.get_submodule, group) if isinstance(module, SimulatedLinear)]
        if linears:
            groups[group[0]] = linears
    return groups


@contextmanager
def _recorded(
    model: PreTrainedModel,
    architecture: Architecture,
    groups: dict[str, list[SimulatedLinear]],
    norms: dict[str, Tensor],
) -> Iterator[None]:
    """Adds |d_t|^2 of every layer to its group's `norms` during the backward pass of one sequence."""

    def track(total: Tensor) -> object:
        def hook(linear: nn.Module, args: tuple[Tensor | None, ...], output: Tensor) -> None:
            # The layer divides by S after its product (S_n), so the gradient there is the one here over S.
            scale = args[1] if len(args) > 1 else None
            scale = torch.ones(1, device=output.device) if scale is None else scale
            divisor = scale.detach().reshape(-1)  # (tokens,) or (1,)

            def add(gradient: Tensor) -> None:
                total.add_(gradient.float()[0].pow(2).sum(-1) / divisor.square())

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    # Parameters are frozen, so gradients start at the embedding's output.
    embedding = model.get_submodule(architecture.embedding)
    handles = [embedding.register_forward_hook(lambda module, args, output: output.requires_grad_())]
    for name, linears in groups.items():
        handles += [linear.register_forward_hook(track(norms[name])) for linear in linears]  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
