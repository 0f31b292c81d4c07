"""Logits of a fixed prompt, stored beside a checkpoint when it is written: what it computes, whoever reads it later."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.simulation.install import exactly

FILE = "logits.safetensors"  # in the checkpoint's folder of records
_TOKENS, _COLUMNS = 16, 256
# Root mean square of the difference over the standard deviation of the logits. A CPU that sums in another order moves
# single integer codes, by which logits move as quantization moves them; unrelated logits differ by 1 or more.
DEVIATION = 0.3


def record_logits(model: PreTrainedModel, tokens: Tensor, file: Path) -> None:
    """Stores what `model` computes in exact mode.

    Args:
        model: a finished simulation.
        tokens: (length,), of which the first 16 are the prompt.
        file: to be written: the prompt, up to 256 columns of its logits, and the log-sum-exp over all columns.
    """
    prompt = tokens[:_TOKENS].clone()
    logits, norm = _logits(model, prompt)
    save_file({"tokens": prompt, "logits": logits, "logsumexp": norm}, file)


def deviation(model: PreTrainedModel, file: Path) -> float:
    """How far the logits of `model` are from the recorded ones, relative to their standard deviation.

    Raises:
        FPTQuantError: the file is missing or damaged.
    """
    try:
        stored = load_file(file)
        tokens, logits, norm = stored["tokens"], stored["logits"], stored["logsumexp"]
    except (SafetensorError, OSError, KeyError):
        raise FPTQuantError(f"'{file}' is missing or damaged: fetch the checkpoint again or quantize again") from None
    found, found_norm = _logits(model, tokens)
    error = torch.cat((found - logits, (found_norm - norm)[:, None]), 1).pow(2).mean().sqrt()
    return float(error / logits.std())


def require_recorded(model: PreTrainedModel, file: Path) -> None:
    """Refuses a model that computes something else than when it was written.

    Raises:
        FPTQuantError: with what was found; or the file is damaged.
    """
    found = deviation(model, file)
    if not found < DEVIATION:
        raise FPTQuantError(
            f"'{file.parent.parent}' does not compute what it did when it was written (logits differ by {found:.2g} of "
            f"their spread, more than {DEVIATION}): it is damaged, or this installation reads it wrongly; "
            "fetch it again, and install vllm-fptquant and its dependencies again"
        )


@torch.no_grad()
def _logits(model: PreTrainedModel, tokens: Tensor) -> tuple[Tensor, Tensor]:
    """Logits (length, columns) of columns spread over the vocabulary, and log-sum-exp (length,) over all."""
    with exactly(model):
        logits = model(tokens[None], use_cache=False).logits[0].float()
    step = -(-logits.shape[1] // _COLUMNS)
    return logits[:, ::step].contiguous(), logits.logsumexp(-1)
