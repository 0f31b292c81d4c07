"""One optimizer for every stage: groups with rates of their own, warm-up, cosine, clipping, state that resumes."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from fptquant.errors import FPTQuantError
from fptquant.transforms import TransformSet


class Optimization:
    """AdamW without weight decay over named parameters."""

    def __init__(
        self,
        groups: Mapping[str, tuple[float, Mapping[str, nn.Parameter]]],
        steps: int,
        *,
        warmup: float = 0.05,
        clip: float | None = 1.0,
        betas: tuple[float, float] = (0.9, 0.95),
    ) -> None:
        """Sets up the optimizer.

        Args:
            groups: learning rate and named parameters by group name; a group with rate 0 stays frozen.
            steps: in total.
            warmup: share of the steps in which the rate rises linearly; it falls by a cosine to a tenth after that.
            clip: largest norm of each group's gradient; None for no limit.
            betas: of Adam.

        Raises:
            FPTQuantError: no parameter is left to train.
        """
        self.groups = {name: (rate, dict(parameters)) for name, (rate, parameters) in groups.items() if rate > 0}
        self.steps, self.warmup, self.clip = steps, max(1, round(warmup * steps)), clip
        self.step = 0
        if not self.parameters:
            raise FPTQuantError(
                "there is nothing to train: every learning rate of the stage is 0, or what it belongs to is switched "
                "off; set the stage's steps to 0"
            )
        for _, parameters in self.groups.values():
            for parameter in parameters.values():
                parameter.requires_grad_(True)
        self._adam = torch.optim.AdamW(
            [{"params": list(parameters.values()), "lr": rate} for rate, parameters in self.groups.values()],
            betas=betas,
            weight_decay=0.0,
        )

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Returns all parameters that are trained, by group and name."""
        return {f"{group}/{name}": p for group, (_, named) in self.groups.items() for name, p in named.items()}

    def rate(self) -> float:
        """Share of the full learning rates at the current step."""
        if self.step < self.warmup:
            return (self.step + 1) / self.warmup
        progress = (self.step - self.warmup) / max(1, self.steps - self.warmup)
        return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))

    def update(self) -> dict[str, float]:
        """One step with the gradients at hand, which are cleared.

        Returns:
            The norm of each group's gradient.

        Raises:
            FPTQuantError: a gradient is not finite; nothing was changed.
        """
        for name, parameter in self.parameters.items():
            if parameter.grad is not None and not bool(torch.isfinite(parameter.grad).all()):
                first = torch.argwhere(~torch.isfinite(parameter.grad))[0]
                where = f"{name}[{int(first[0])}]" if len(first) > 1 else name  # transforms are stacked by layer
                raise FPTQuantError(f"step {self.step}: the gradient of {where} is not finite; lower the learning rate")
        norms = {}
        for (name, (rate, named)), group in zip(self.groups.items(), self._adam.param_groups, strict=True):
            limit = math.inf if self.clip is None else self.clip
            norms[name] = float(nn.utils.clip_grad_norm_(named.values(), limit))
            group["lr"] = rate * self.rate()
        self._adam.step()
        self._adam.zero_grad(set_to_none=True)
        self.step += 1
        return norms

    def state(self) -> dict[str, Tensor]:
        """Parameters and moments by name."""
        tensors: dict[str, Tensor] = {"step": torch.tensor(self.step, device="cpu")}
        for name, parameter in self.parameters.items():
            tensors[f"parameter/{name}"] = parameter.detach()
            for key, value in self._adam.state.get(parameter, {}).items():
                tensors[f"{key}/{name}"] = value
        return tensors

    @torch.no_grad()
    def restore(self, tensors: Mapping[str, Tensor]) -> None:
        """Puts parameters, moments and step back to what `state` returned."""
        self.step = int(tensors["step"])
        for name, parameter in self.parameters.items():
            parameter.copy_(tensors[f"parameter/{name}"])
            found: dict[str, Any] = {
                key: tensors[f"{key}/{name}"].to("cpu" if key == "step" else parameter.device, copy=True)
                for key in ("step", "exp_avg", "exp_avg_sq")
                if f"{key}/{name}" in tensors
            }
            if found:
                self._adam.state[parameter] = found


def transform_groups(
    transforms: TransformSet, rate: float, rotation_rate: float, *, in_weights: bool = False
) -> dict[str, tuple[float, dict[str, nn.Parameter]]]:
    """Parameter groups; with `in_weights` only what an objective on weights alone is to train."""
    found: dict[str, dict[str, nn.Parameter]] = {"transform": {}, "rotation": {}}
    for transform in transforms:
        parameters = transform.seen_in_weights() if in_weights else dict(transform.named_parameters())
        group = found["rotation" if transform.shared else "transform"]
        group.update({f"transforms.{transform.name}.{key}": p for key, p in parameters.items()})
    return {"transform": (rate, found["transform"]), "rotation": (rotation_rate, found["rotation"])}
