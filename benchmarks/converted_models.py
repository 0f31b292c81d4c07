"""SmolLM2-135M in other architectures, distilled from itself: real models of families of which none is at hand.

    python benchmarks/converted_models.py qwen3      # prints the checkpoint's path

| name | what it is |
|---|---|
| qwen3 | RMS norms of queries and keys, with the gain that keeps their mean size |
| mixtral | each MLP four times, with noise, and a router that takes two of them |

Both then learn SmolLM2's next-token distribution on the shipped calibration text. What they are is in
`conversion.json` of the checkpoint. They stay in the cache. A figure measured on them must say what they are.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import sys
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer, MixtralConfig, PreTrainedModel, Qwen3Config

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "scripts"))
from fetch_smollm2 import cache_dir, exclusive, fetch
from fptquant.calibration.text import calibration_windows
from fptquant.evaluation.perplexity import evaluation_windows, measure, transformers_scorer
from fptquant.options.calibration import CalibrationOptions

TEXT = Path(__file__).resolve().parent.parent / "tests" / "data" / "wiki.test.txt"
SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_parameters",
    "tie_word_embeddings", "bos_token_id", "eos_token_id", "pad_token_id",
)  # fmt: skip
EXPERTS, CHOSEN = 4, 2
NOISE = 0.1  # of an expert's weights, relative to their standard deviation
WINDOWS, LENGTH = 12, 512


def to_qwen3(original: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
    """Queries and keys are normed; the gain of a layer's norm is the mean size of what it norms."""
    settings = {name: getattr(original.config, name) for name in SHARED}
    model = AutoModelForCausalLM.from_config(Qwen3Config(**settings, use_sliding_window=False))
    gains: dict[str, Tensor] = {}

    def watch(name: str) -> object:
        def hook(module: nn.Module, inputs: object, output: Tensor) -> None:
            heads = output.view(*output.shape[:-1], -1, settings["head_dim"])
            gains[name] = heads.square().mean().sqrt().expand(settings["head_dim"]).clone()

        return hook

    for index, layer in enumerate(original.model.layers):
        for kind in ("q", "k"):
            name = f"model.layers.{index}.self_attn.{kind}_norm.weight"
            getattr(layer.self_attn, f"{kind}_proj").register_forward_hook(watch(name))
    with torch.no_grad():
        original(windows[:2])
    model.load_state_dict(original.state_dict() | gains)
    return model


def to_mixtral(original: PreTrainedModel, windows: Tensor) -> PreTrainedModel:
    """Each expert is the MLP with noise of its own: whatever the router says, their mean is near it."""
    settings = {name: getattr(original.config, name) for name in SHARED}
    config = MixtralConfig(**settings, num_local_experts=EXPERTS, num_experts_per_tok=CHOSEN, sliding_window=None)
    model = AutoModelForCausalLM.from_config(config)
    generator, state = torch.Generator().manual_seed(0), dict(original.state_dict())
    for index in range(settings["num_hidden_layers"]):
        mlp = f"model.layers.{index}.mlp."
        parts = {part: state.pop(f"{mlp}{part}_proj.weight") for part in ("gate", "up", "down")}
        noisy = {
            part: torch.stack([w + NOISE * w.std() * torch.randn(w.shape, generator=generator) for _ in range(EXPERTS)])
            for part, w in parts.items()
        }
        state[f"{mlp}experts.gate_up_proj"] = torch.cat((noisy["gate"], noisy["up"]), 1)
        state[f"{mlp}experts.down_proj"] = noisy["down"]
        state[f"{mlp}gate.weight"] = torch.randn(EXPERTS, settings["hidden_size"], generator=generator) * 0.05
    model.load_state_dict(state)
    return model


CONVERSIONS = {"qwen3": to_qwen3, "mixtral": to_mixtral}
SCHEDULES = {"qwen3": (200, 3e-4), "mixtral": (80, 1e-4)}  # steps and rate
CHANGED = {"qwen3": ".self_attn.", "mixtral": ".mlp."}  # what is distilled, by a part of its name


def distil(student: PreTrainedModel, teacher: PreTrainedModel, changed: str, windows: Tensor, rate: float) -> None:
    """Adam on the KL divergence from the teacher's next-token distribution and on what leaves each layer.

    The second is the mean over layers and tokens of the squared relative error. A window a step, cosine to 0. Gains of
    norms, which are larger than weights, get 30 times the rate.
    """
    student.train()
    student.requires_grad_(False)
    trained = [parameter.requires_grad_() for name, parameter in student.named_parameters() if changed in name]
    gains = [parameter for parameter in trained if parameter.dim() == 1]
    weights = [parameter for parameter in trained if parameter.dim() > 1]
    groups = [{"params": gains, "lr": 30 * rate}, {"params": weights, "lr": rate}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.0)
    steps = len(windows)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1, (step + 1) / 10) * 0.5 * (1 + math.cos(math.pi * step / steps))
    )
    for step, window in enumerate(windows):
        with torch.no_grad():
            wanted = teacher(window[None], output_hidden_states=True)
        found = student(window[None], output_hidden_states=True)
        given, aimed = (outputs.logits[0].log_softmax(-1) for outputs in (found, wanted))
        kl = F.kl_div(given, aimed, log_target=True, reduction="batchmean")
        layers = zip(found.hidden_states[1:], wanted.hidden_states[1:], strict=True)
        errors = [((mine - its).square().sum(-1) / its.square().sum(-1)).mean() for mine, its in layers]
        loss = kl + torch.stack(errors).mean()
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        if step % 10 == 0:
            losses = f"KL {float(kl.detach()):.4f}, layers {float((loss - kl).detach()):.4f}"
            print(f"step {step} of {steps}: {losses}", file=sys.stderr, flush=True)
    student.eval()


def convert(name: str) -> Path:
    """The checkpoint, made where it isn't in the cache."""
    steps, rate = SCHEDULES[name]
    checkpoint = cache_dir() / f"SmolLM2-135M-as-{name}"
    with exclusive(checkpoint.with_suffix(".lock")):
        if checkpoint.is_dir():
            return checkpoint
        source = fetch()
        tokenizer = AutoTokenizer.from_pretrained(source)
        original = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32).eval()
        options = CalibrationOptions(sequences=steps, length=LENGTH)
        windows = calibration_windows(tokenizer, options, original.config.vocab_size, seed=1)
        start = time.perf_counter()
        model = CONVERSIONS[name](original, windows)
        test = evaluation_windows(tokenizer, TEXT, WINDOWS, LENGTH)
        facts: dict[str, object] = {"steps": steps, "rate": rate, "windows": WINDOWS, "length": LENGTH}
        for what, measured in (("original", original), ("converted", model.eval())):
            facts[what] = measure(map(transformers_scorer(measured), test), LENGTH).perplexity
        print(facts, file=sys.stderr, flush=True)
        distil(model, original, CHANGED[name], windows, rate)
        facts["distilled"] = measure(map(transformers_scorer(model), test), LENGTH).perplexity
        facts["seconds"] = round(time.perf_counter() - start)
        print(facts, file=sys.stderr, flush=True)
        partial = checkpoint.with_suffix(".partial")
        shutil.rmtree(partial, ignore_errors=True)
        model.save_pretrained(partial)
        tokenizer.save_pretrained(partial)
        (partial / "conversion.json").write_text(json.dumps(facts, indent=1) + "\n")
        partial.rename(checkpoint)
    return checkpoint


def main() -> None:
    """Converts what isn't there."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", choices=CONVERSIONS)
    print(convert(parser.parse_args().name))


if __name__ == "__main__":
    main()
