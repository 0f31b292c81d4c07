"""Is the checkpoint what it claims to be? Transformed = original, read back = simulated = served."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from fptquant.evaluation.perplexity import Scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.files import read_json
from fptquant.format.schema import EXTRAS
from fptquant.layers.inputs import window_logits
from fptquant.layers.residency import Fill, extend, set_tensors
from fptquant.loading import load_model, open_source, parts
from fptquant.run.job import Job
from fptquant.run.models import transformed
from fptquant.run.writer import digest
from fptquant.simulate.install import finish_loading, round_floats
from fptquant.simulate.recorded import FILE, deviation
from fptquant.simulate.sink import use_sink
from fptquant.weight_files import WeightFiles

LOGIT_TOLERANCE = 1e-4  # relative to the largest logit, float32
PERPLEXITY_TOLERANCE = 1e-3  # relative, served against simulated
NOISE = 4  # standard errors of the mean log probability that chance may explain
EXACT_TOLERANCE = 1e-3  # of log probabilities; one integer code that differs shows as far more


@dataclass(frozen=True)
class Check:
    """What a comparison measured, the limit it is held to, and whether it is within."""

    name: str
    measured: str
    limit: str
    passed: bool


def check_function_preserved(job: Job, windows: Tensor) -> tuple[Check, PreTrainedModel]:
    """Logits of the original against those of the transformed, unquantized model, both in float32.

    Args:
        job: with the transforms as written.
        windows: (windows, length) tokens of real text.

    Returns:
        The check and the transformed model.
    """
    architecture = job.source.architecture
    before = list(window_logits(load_model(job.source, residency="streamed"), architecture, windows))
    model = transformed(job, "streamed")
    after = list(window_logits(model, architecture, windows))
    difference = _largest_difference(after, before)
    relative = difference / max(b.abs().max().item() for b in before)
    check = Check(
        "transformed = original (float32, not quantized)",
        f"largest logit difference {difference:.2e}, relative {relative:.2e}",
        f"relative < {LOGIT_TOLERANCE:.0e}",
        relative < LOGIT_TOLERANCE,
    )
    return check, model


def check_read_back(
    job: Job, unquantized: PreTrainedModel, checkpoint: Path, windows: Tensor
) -> tuple[Check, PreTrainedModel]:
    """Logits of the simulated quantized model against the checkpoint read back: must be identical.

    The simulation takes everything in floating point from the transformed original and only the integers and scales
    from the checkpoint; the other side is loaded by transformers.

    Returns:
        The check, and the checkpoint read back.
    """
    _take_quantized_tensors(job, unquantized, checkpoint)
    simulated = list(window_logits(unquantized, job.source.architecture, windows))
    loaded = load_model(open_source(checkpoint, device=job.device), recorded=False)
    read_back = [loaded(window[None], use_cache=False).logits for window in windows]
    difference = _largest_difference(simulated, read_back)
    check = Check(
        "checkpoint read back = simulated",
        f"largest logit difference {difference:.2e}",
        "identical",
        difference == 0.0,
    )
    return check, loaded


def check_recorded(loaded: PreTrainedModel, checkpoint: Path) -> Check:
    """Logits of a fixed prompt against those that were stored when the checkpoint was written (`recorded`)."""
    name = "logits of a fixed prompt = those recorded"
    if read_json(checkpoint / "config.json")["quantization_config"]["format_version"] == 1:
        return Check(name, "format version 1 recorded none", "none", passed=True)
    result = deviation(loaded, checkpoint / EXTRAS / FILE)
    return Check(
        name,
        f"differ by {result.found:.1e} of their spread",
        f"< {result.limit:.2g}" if result.limit < 1 else "none: one turned code moves this model as far",
        result.passed,
    )


def check_unaltered(checkpoint: Path) -> Check:
    """Tensors of the checkpoint against the digests taken of the simulated model when it was written.

    Raises:
        FPTQuantError: the digests are missing.
    """
    recorded = read_json(checkpoint / EXTRAS / "digests.json")
    found = {name: digest(tensor) for name, tensor in WeightFiles.of(checkpoint).items()}
    altered = sorted(name for name in found.keys() | recorded.keys() if found.get(name) != recorded.get(name))
    return Check(
        "tensors = those that were written",
        f"{len(altered)} of {len(recorded)} differ" + (f", the first is {altered[0]}" if altered else ""),
        "none",
        not altered,
    )


def check_served(simulated: Scorer, served: Scorer, windows: Tensor) -> Check:
    """Perplexity through vLLM as users run it, against the simulation.

    Attention kernels that sum in another order change the last bits, and quantizers amplify that until single log
    probabilities differ by as much as two runs of the simulation with different attention functions do. So the
    difference may be below the tolerance, or have no systematic part: less than `NOISE` standard errors.
    """
    expected, actual = _scores(simulated, windows), _scores(served, windows)
    difference = expected - actual
    ratio = _perplexity_ratio(expected, actual)
    errors = float(difference.mean().abs() / (difference.std() / difference.numel() ** 0.5).clamp_min(1e-12))
    return Check(
        "served by vLLM = simulated",
        f"perplexity differs by {100 * ratio:.4f} % ({errors:.1f} standard errors), "
        f"log probabilities by {difference.abs().mean():.1e} on average",
        f"< {100 * PERPLEXITY_TOLERANCE:.1f} %, or {NOISE} standard errors",
        ratio < PERPLEXITY_TOLERANCE or errors < NOISE,
    )


def check_served_exactly(simulated: Scorer, served: Scorer, windows: Tensor) -> Check:
    """Log probabilities and perplexity through vLLM against the simulation, both independent of the order of sums.

    Every integer code is equal then; what is left is the rounding of the last float32 operations.
    """
    expected, actual = _scores(simulated, windows), _scores(served, windows)
    difference, ratio = (expected - actual).abs().max().item(), _perplexity_ratio(expected, actual)
    return Check(
        "served by vLLM = simulated, both in exact mode",
        f"log probabilities differ by {difference:.1e} at most, perplexity by {100 * ratio:.4f} %",
        f"< {EXACT_TOLERANCE:.0e}, < {100 * PERPLEXITY_TOLERANCE:.1f} %",
        difference < EXACT_TOLERANCE and ratio < PERPLEXITY_TOLERANCE,
    )


@torch.no_grad()
def check_greedy(simulated: torch.nn.Module, engine: VLLMEngine, prompts: Tensor, new_tokens: int) -> Check:
    """Greedy tokens that vLLM decodes, all prompts in one batch, against one prefill of the simulation over them.

    Both in exact mode; so this also says that decoding with the KV cache equals prefill, and a batch changes nothing.

    Args:
        simulated: the checkpoint loaded in transformers.
        engine: the checkpoint in vLLM.
        prompts: (prompts, tokens).
        new_tokens: how many to decode after each.
    """
    differing = 0
    for prompt, decoded in zip(prompts, engine.greedy(prompts.tolist(), new_tokens), strict=True):
        sequence = torch.cat((prompt, torch.tensor(decoded, device=prompt.device)))
        expected = simulated(sequence[None], use_cache=False).logits[0].argmax(-1)
        differing += int(not torch.equal(expected[len(prompt) - 1 : -1], sequence[len(prompt) :]))
    measured = f"{len(prompts) - differing} of {len(prompts)} continuations of {new_tokens} tokens equal"
    return Check("greedy tokens served = simulated", measured, "all equal", differing == 0)


def _perplexity_ratio(expected: Tensor, actual: Tensor) -> float:
    return abs(math.exp(expected.mean() - actual.mean()) - 1)


def _scores(score: Scorer, windows: Tensor) -> Tensor:
    return torch.cat([score(window) for window in windows]).double().cpu()


def _largest_difference(first: list[Tensor], second: list[Tensor]) -> float:
    """Largest |a - b|; NaN when any is, which Python's `max` would lose."""
    return torch.stack([(a - b).abs().max() for a, b in zip(first, second, strict=True)]).max().item()


def _take_quantized_tensors(job: Job, model: PreTrainedModel, checkpoint: Path) -> None:
    """Rounds a streamed float simulation, and gives it the integers and scales of a checkpoint but nothing else."""
    stored = WeightFiles.of(checkpoint)

    def take(module: nn.Module, prefix: str) -> None:
        round_floats(module, job.dtype)
        found = stored.read(f"{prefix}{name}" for name, _ in module.named_buffers() if f"{prefix}{name}" in stored)
        set_tensors(module, {name.removeprefix(prefix): tensor.to(job.device) for name, tensor in found})
        finish_loading(module)

    found = parts(model, job.source.architecture)
    for name, module in found.items():

        def fill(module: nn.Module, before: Fill, prefix: str = f"{name}.") -> None:
            before(module)
            take(module, prefix)

        extend(module, fill)
    norm = job.source.architecture.final_norm
    take(model.get_submodule(norm), f"{norm}.")
    if job.config.sink is not None:
        use_sink(model)
