"""How much each token's output matters to the loss: weights of the tokens in an output-adaptive Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant import parallel
from fptquant.layers.inputs import LayerInputs, first_inputs, last_states, to_logits
from fptquant.layers.residency import entered
from fptquant.simulate import SimulatedLinear
from fptquant.wiring import Architecture

Norms = dict[str, list[Tensor]]


def token_weights(model: PreTrainedModel, architecture: Architecture, windows: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the loss at the output of every group of linear layers that share an input.

    With d_t the gradient of the next-token cross entropy with respect to the output W x_t of a group, sum_t |d_t|^2
    x_t x_t^T is the token-diagonal form of the output-adaptive Hessian (OAC, Edalati et al., arXiv 2405.15025).
    All sequences go forward through a layer before the next is read, and backward likewise; what entered each layer is
    kept between.

    Args:
        model: with merged weights and the simulation installed, nothing quantized yet.
        architecture: its family.
        windows: (sequences, length) tokens; of several processes, the part of each.

    Returns:
        By name of the group's first layer, float32 of the shape of `windows`, with mean 1 over all sequences.
    """
    layers = architecture.layer_modules(model)
    inputs = first_inputs(model, architecture, windows, batch=1, kept=len(layers) + 1)
    entering: list[list[Tensor]] = []  # of each layer, by sequence
    for layer in layers:
        entering.append(list(inputs.hidden))
        with entered(layer):
            inputs.advance(layer)
    found: Norms = {}
    gradients = []  # of the loss, with respect to what leaves a layer
    head = model.get_submodule(architecture.head)
    with torch.enable_grad(), entered(head), _recorded({architecture.head: [head]}, found, windows):
        for index, window in enumerate(windows):
            one, states = _leaf(inputs, index)
            logits = to_logits(model, architecture)(next(last_states(model, architecture, one)))[0, :-1].float()
            nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert states.grad is not None
            gradients.append(states.grad)
    for number in reversed(range(len(layers))):
        layer, inputs.hidden = layers[number], entering.pop()
        with torch.enable_grad(), entered(layer), _recorded(_groups(layer, number, architecture), found, windows):
            for index in range(len(windows)):
                one, states = _leaf(inputs, index)
                next(one.run(layer)).backward(gradients[index])  # type: ignore[no-untyped-call]
                assert states.grad is not None
                gradients[index] = states.grad
    weights = {name: torch.stack(norms) for name, norms in found.items()}
    means = {name: parallel.joined(values).mean() for name, values in weights.items()}
    return {name: values / means[name].clamp_min(torch.finfo().tiny) for name, values in weights.items()}


def _leaf(inputs: LayerInputs, index: int) -> tuple[LayerInputs, Tensor]:
    """One sequence of what enters a layer, and its hidden states, which a backward pass gives their gradient."""
    one = inputs.sequence(index)
    (states,) = one.hidden = [one.hidden[0].detach().requires_grad_()]
    return one, states


def _groups(layer: nn.Module, index: int, architecture: Architecture) -> dict[str, list[nn.Module]]:
    """Linear layers of a decoder layer that share an input, by the full name of the first."""
    return {
        architecture.group_names(index, group)[0]: [
            layer.get_submodule(projection.path) for projection in group.members
        ]
        for group in architecture.groups_of(index)
    }


@contextmanager
def _recorded(groups: dict[str, list[nn.Module]], found: Norms, windows: Tensor) -> Iterator[None]:
    """Adds |d_t|^2 at the outputs of each group up, in the backward pass of each sequence, as an item of `found`."""

    def track(name: str, first: bool) -> object:
        def hook(linear: nn.Module, args: tuple[Tensor | None, ...], output: Tensor) -> None:
            if first:
                found.setdefault(name, []).append(torch.zeros(windows.shape[1], device=output.device))
            total = found[name][-1]
            # The layer divides by S after its product (S_n), so the gradient there is the one here over S.
            scale = args[1] if len(args) > 1 else None
            scale = torch.ones(1, device=output.device) if scale is None else scale
            divisor = scale.detach().reshape(-1)  # (tokens,) or (1,)

            def add(gradient: Tensor) -> None:
                total.add_(gradient.float()[0].pow(2).sum(-1) / divisor.square())

            output.register_hook(add)  # type: ignore[no-untyped-call]

        return hook

    handles = []
    for name, linears in groups.items():
        linears = [linear for linear in linears if isinstance(linear, SimulatedLinear)]
        for position, linear in enumerate(linears):
            handles.append(linear.register_forward_hook(track(name, position == 0)))  # type: ignore[arg-type]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
