"""A checkpoint of one layer and a small head, written and read back before any long work: the format, end to end."""

from __future__ import annotations

import copy
import shutil
from dataclasses import replace
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, PreTrainedModel

from fptquant.errors import FPTQuantError
from fptquant.format import Sink, round_scale
from fptquant.format.packing import LARGEST_MULTIPLIER
from fptquant.quantize.weights import round_to_nearest
from fptquant.run.job import Job
from fptquant.run.writer import write_model
from fptquant.simulate.attention import KVQuantizer
from fptquant.simulate.install import install_simulation, round_floats, simulated_linears
from fptquant.simulate.sink import sink_token, use_sink

_VOCABULARY = 256  # rows of the embedding and the head, whose number the format doesn't depend on


@torch.no_grad()
def rehearse(job: Job, folder: Path) -> None:
    """Writes a layer of the job's sizes and schemes, with random weights, and reads it back as a user would.

    Where some layers have experts, it is the first of those, with the layers in front of it.

    Args:
        job: about to be done.
        folder: to write into, and to remove again.

    Raises:
        FPTQuantError: what is read back does not compute what was written, so that the run would fail at its end.
    """
    config = copy.deepcopy(job.source.config)
    mixtures = job.source.architecture.mixtures
    config.num_hidden_layers = 1 + min(mixtures or (0,))  # a layer of the kind that most are of
    config.vocab_size, config.pad_token_id = min(config.vocab_size, _VOCABULARY), None
    config.tie_word_embeddings = job.tied
    scheme = job.config if job.config.sink is None else job.config.model_copy(update={"sink": Sink(token=0)})
    architecture = job.source.architecture.of(config)
    small = replace(job, source=replace(job.source, config=config, architecture=architecture), config=scheme)
    with torch.random.fork_rng(devices=[]):  # the run's own random numbers stay what they are
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval().requires_grad_(False)
    install_simulation(model, architecture, scheme)
    round_floats(model, job.dtype)
    _quantize(model)
    tokens = torch.arange(8)[None] % config.vocab_size
    expected = model(tokens, use_cache=False).logits
    folder.mkdir()
    try:
        write_model(small, model, folder)
        read_back = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
        actual = read_back(tokens, use_cache=False).logits
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    if not torch.equal(expected, actual):
        raise FPTQuantError(
            "a rehearsal with one layer was read back wrongly "
            f"(logits differ by {(expected - actual).abs().max():.2g}): "
            "no checkpoint written here could be trusted; install vllm-fptquant and its dependencies again"
        )


def _quantize(model: PreTrainedModel) -> None:
    """Rounds weights to nearest and sets arbitrary ranges."""
    for _, linear in simulated_linears(model):
        if linear.scheme is None:
            continue
        bits, size = linear.scheme.weights.bits, linear.scheme.weights.group_size
        weight, multiplier = linear.float_weight(), None
        scale = round_scale(weight.abs().amax(1, keepdim=True) / 2 ** (bits - 1))
        if size is not None:
            shape = (linear.out_features, linear.in_features // size)
            multiplier = torch.randint(1, LARGEST_MULTIPLIER + 1, shape, dtype=torch.int8)
        if linear.scheme.activations.bits < 16:
            linear.set_input_quantizer(torch.tensor(0.05), torch.tensor(1))
        linear.set_weight_codes(round_to_nearest(weight, scale, bits, multiplier), scale, multiplier)
    for module in model.modules():
        quantizer = getattr(module, "kv_quantizer", None)
        if isinstance(quantizer, KVQuantizer):
            for side in ("k", "v"):
                size = module.get_buffer(f"{side}_scale").numel()
                quantizer.set_range(module, side, torch.full((size,), 0.1), torch.ones(size))
            quantizer.ready = True
    if sink_token(model) is not None:
        use_sink(model)  # constants of zero
