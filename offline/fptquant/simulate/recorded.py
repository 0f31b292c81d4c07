"""Logits of a fixed prompt, stored beside a checkpoint when it is written: what it computes, whoever reads it later."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.simulate.install import exactly

FILE = "logits.safetensors"  # in the checkpoint's folder of records
_TOKENS, _COLUMNS = 16, 256
# Root mean square of the difference over the standard deviation of the logits; unrelated logits differ by 1 or more.
DEVIATION = 0.3
# A CPU that sums in another order turns single integer codes, by which the logits of a model that quantization has hurt
# move far. How far is measured when they are recorded, by turning codes on purpose: embeddings off by this, relatively.
_PERTURBATION = 1e-3


def record_logits(model: PreTrainedModel, tokens: Tensor, file: Path) -> None:
    """Stores what `model` computes in exact mode.

    Args:
        model: a finished simulation.
        tokens: (length,), of which the first 16 are the prompt.
        file: to be written: the prompt, up to 256 columns of its logits, the log-sum-exp over all columns, and how far
            both move when single codes turn.
    """
    prompt = tokens[:_TOKENS].to("cpu", copy=True)
    recorded = _logits(model, prompt)
    generator = torch.Generator().manual_seed(0)

    def perturb(embedding: nn.Module, args: tuple[Any, ...], states: Tensor) -> Tensor:
        return states * (1 + _PERTURBATION * torch.randn(states.shape, generator=generator).to(states.device))

    handle = model.get_input_embeddings().register_forward_hook(perturb)
    noise = torch.tensor(_distance(_logits(model, prompt), recorded))
    handle.remove()
    save_file({"tokens": prompt, "logits": recorded[0], "logsumexp": recorded[1], "noise": noise}, file)


@dataclass(frozen=True)
class Deviation:
    """How far logits are from the recorded ones, relative to their standard deviation.

    Attributes:
        found: 0 where they are equal.
        limit: what another order of float sums can explain; from 1 on, nothing can be told.
    """

    found: float
    limit: float

    @property
    def passed(self) -> bool:
        """Whether the model may be the one that was written."""
        return self.found < self.limit or (self.limit >= 1 and math.isfinite(self.found))


def deviation(model: PreTrainedModel, file: Path) -> Deviation:
    """Compares the logits of `model` with the recorded ones.

    Raises:
        FPTQuantError: the file is missing or damaged.
    """
    try:
        stored = load_file(file)
        tokens, recorded, noise = stored["tokens"], (stored["logits"], stored["logsumexp"]), stored["noise"]
    except (SafetensorError, OSError, KeyError):
        raise FPTQuantError(f"'{file}' is missing or damaged: fetch the checkpoint again or quantize again") from None
    return Deviation(_distance(_logits(model, tokens), recorded), max(DEVIATION, 2 * float(noise)))


def require_recorded(model: PreTrainedModel, file: Path) -> None:
    """Refuses a model that computes something else than when it was written.

    Raises:
        FPTQuantError: with what was found; or the file is damaged.
    """
    result = deviation(model, file)
    if not result.passed:
        raise FPTQuantError(
            f"'{file.parent.parent}' does not compute what it did when it was written (logits differ by "
            f"{result.found:.2g} of their spread, more than {result.limit:.2g}): it is damaged, or this installation "
            "reads it wrongly; fetch it again, and install vllm-fptquant and its dependencies again"
        )


def _distance(found: tuple[Tensor, Tensor], recorded: tuple[Tensor, Tensor]) -> float:
    """Of logits (length, columns) and log-sum-exp (length,), relative to the standard deviation of the logits."""
    error = torch.cat((found[0] - recorded[0], (found[1] - recorded[1])[:, None]), 1).pow(2).mean().sqrt()
    return float(error / recorded[0].std())


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """On the CPU: logits (length, columns) of columns over the whole vocabulary, and log-sum-exp (length,) over all."""
    device = next(buffer.device for buffer in model.buffers() if not buffer.is_meta)  # of a streamed model, too
    with exactly(model):
        logits = model(tokens[None].to(device), use_cache=False).logits[0].float().cpu()
    step = -(-logits.shape[1] // _COLUMNS)
    return logits[:, ::step].contiguous(), logits.logsumexp(-1)
