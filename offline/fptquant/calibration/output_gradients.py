"""How much each token's output matters to the loss: weights of the tokens in an output-adaptive Hessian."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle
from transformers import PreTrainedModel

from fptquant.calibration.halves import FLOOR, relative
from fptquant.layers.inputs import LayerInputs, first_inputs, last_states, to_logits
from fptquant.layers.residency import entered
from fptquant.simulate import SimulatedLinear
from fptquant.simulate.mixture import SparseMLP
from fptquant.wiring import SHARED, Architecture


def token_weights(model: PreTrainedModel, architecture: Architecture, windows: Tensor) -> dict[str, Tensor]:
    """Squared gradients of the loss at the output of every group of linear layers that share an input.

    With d_t the gradient of the next-token cross entropy with respect to the output W x_t of a group, sum_t |d_t|^2
    x_t x_t^T is the token-diagonal form of the output-adaptive Hessian (OAC, Edalati et al., arXiv 2405.15025).
    An expert of a mixture is a group of its own: d_t holds what the router multiplies its output by, and is zero for
    tokens that don't go through it; such tokens have a floor (`halves.FLOOR`).
    All sequences go forward through a layer before the next is read, and backward likewise; what entered each layer is
    kept between.

    Args:
        model: with merged weights and the simulation installed, nothing quantized yet.
        architecture: its family.
        windows: (sequences, length) tokens; of several processes, the part of each.

    Returns:
        By name of the group's first layer, or of an expert's first in it, float32 of the shape of `windows`, with mean
        1 over all sequences.
    """
    layers = architecture.layer_modules(model)
    inputs = first_inputs(model, architecture, windows, batch=1, kept=len(layers) + 1)
    entering: list[list[Tensor]] = []  # of each layer, by sequence
    for layer in layers:
        entering.append(list(inputs.hidden))
        with entered(layer):
            inputs.advance(layer)
    recorder = _Recorder(architecture, windows)
    gradients = []  # of the loss, with respect to what leaves a layer
    head = model.get_submodule(architecture.head)
    with torch.enable_grad(), entered(head), recorder.of_head(head):
        for index, window in enumerate(windows):
            recorder.sequence = index
            one, states = _leaf(inputs, index)
            logits = to_logits(model, architecture)(next(last_states(model, architecture, one)))[0, :-1].float()
            nn.functional.cross_entropy(logits, window[1:], reduction="sum").backward()  # type: ignore[no-untyped-call]
            assert states.grad is not None
            gradients.append(states.grad)
    for number in reversed(range(len(layers))):
        layer, inputs.hidden = layers[number], entering.pop()
        with torch.enable_grad(), entered(layer), recorder.of_layer(layer, number):
            for index in range(len(windows)):
                recorder.sequence = index
                one, states = _leaf(inputs, index)
                next(one.run(layer)).backward(gradients[index])  # type: ignore[no-untyped-call]
                assert states.grad is not None
                gradients[index] = states.grad
    return {name: relative(norms) + FLOOR * (name in recorder.routed) for name, norms in recorder.norms.items()}


def _leaf(inputs: LayerInputs, index: int) -> tuple[LayerInputs, Tensor]:
    """One sequence of what enters a layer, and its hidden states, which a backward pass gives their gradient."""
    one = inputs.sequence(index)
    (states,) = one.hidden = [one.hidden[0].detach().requires_grad_()]
    return one, states


class _Recorder:
    """Adds |d_t|^2 at the outputs of groups of linear layers up, in the backward pass of one sequence at a time.

    Attributes:
        norms: by name of the group's first layer, or of an expert's first in it, float32 of the shape of the windows.
        routed: names of groups of experts, to which a part of the tokens goes.
        sequence: whose pass it is.
    """

    def __init__(self, architecture: Architecture, windows: Tensor) -> None:
        self.norms: dict[str, Tensor] = {}
        self.routed: set[str] = set()
        self.sequence = 0
        self._architecture, self._windows = architecture, windows
        self._chosen: Tensor | None = None  # (tokens, count) experts of the layer's mixture
        self._hooks: list[RemovableHandle] = []

    @contextmanager
    def of_head(self, head: nn.Module) -> Iterator[None]:
        """Records the squared gradients at the head's output for as long as the context lasts."""
        with self._watching():
            self._watch(self._architecture.head, [head], None)
            yield

    @contextmanager
    def of_layer(self, layer: nn.Module, index: int) -> Iterator[None]:
        """Watches the linear layers of a decoder layer."""
        mlp = layer.get_submodule(self._architecture.mlp)
        with self._watching():
            if isinstance(mlp, SparseMLP):
                self._hooks.append(mlp.register_forward_pre_hook(self._route))
            for group in self._architecture.groups_of(index):
                for members in group.by_expert:
                    name = self._architecture.projection_name(index, members[0])
                    linears = [layer.get_submodule(projection.path) for projection in members]
                    self._watch(name, linears, members[0].expert)
            yield

    @contextmanager
    def _watching(self) -> Iterator[None]:
        try:
            yield
        finally:
            for hook in self._hooks:
                hook.remove()
            self._hooks.clear()

    def _watch(self, name: str, linears: list[nn.Module], expert: int | None) -> None:
        for linear in linears:
            if isinstance(linear, SimulatedLinear):
                self.norms.setdefault(name, torch.zeros(self._windows.shape, device=self._windows.device))
                self._hooks.append(linear.register_forward_hook(partial(self._track, name, expert)))
        if name in self.norms and expert is not None and expert != SHARED:
            self.routed.add(name)

    @torch.no_grad()
    def _route(self, mixture: nn.Module, args: tuple[Tensor, ...]) -> None:
        assert isinstance(mixture, SparseMLP)
        _, self._chosen = mixture.route(args[0].flatten(0, -2))

    def _track(
        self, name: str, expert: int | None, linear: nn.Module, args: tuple[Tensor | None, ...], output: Tensor
    ) -> None:
        total = self.norms[name][self.sequence]
        tokens: slice | Tensor = slice(None)
        if name in self.routed:
            assert self._chosen is not None and expert is not None
            tokens = (self._chosen == expert).any(-1)  # in their order, as they go through it
        # The layer divides by S after its product (S_n), so the gradient there is the one here over S.
        scale = args[1] if len(args) > 1 else None
        scale = torch.ones(1, device=output.device) if scale is None else scale
        divisor = scale.detach().reshape(-1)  # (tokens,) or (1,)

        def add(gradient: Tensor) -> None:
            total[tokens] += gradient.float().flatten(0, -2).pow(2).sum(-1) / divisor.square()

        output.register_hook(add)  # type: ignore[no-untyped-call]
