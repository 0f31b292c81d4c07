"""Quantizing a tiny model in memory, and running the command."""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import fptquant.quantize.rounding
from fptquant import cli
from fptquant.calibration.layerwise import calibrate_and_round
from fptquant.format import CheckpointConfig
from fptquant.recipe import Recipe
from fptquant.run.head import head_scheme
from fptquant.simulate import install_simulation
from fptquant.transforms import TransformSet
from fptquant.wiring.llama import LLAMA
from tests.conftest import VOCABULARY
from tests.merging import merge_transforms


@dataclass
class Result:
    """What a command did."""

    code: int
    out: str
    err: str


Run = Callable[..., Result]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """`run("quantize", ...)`: the command's entry point in this process, with a quick recipe."""

    def call(*arguments: object) -> Result:
        if arguments[:1] == ("quantize",) and "--recipe" not in arguments:
            arguments = (*arguments, "--recipe", "fptquant-light")
        if arguments[:1] == ("quantize",) and "--quality" not in arguments:
            arguments = (*arguments, "--quality", 0)
        monkeypatch.setattr(sys, "argv", ["fptquant", *map(str, arguments)])
        capsys.readouterr()
        try:
            cli.main()
            code = 0
        except SystemExit as exit_:
            code = int(exit_.code or 0)
        captured = capsys.readouterr()
        return Result(code, captured.out, captured.err)

    return call


def one_error(result: Result) -> str:
    """The error line, after checking that it is the only thing on stderr."""
    lines = result.err.strip().splitlines()
    assert result.code == 2, result
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    assert "Traceback" not in result.out + result.err
    return lines[0]


@pytest.fixture(scope="session")
def windows() -> Tensor:
    """Four calibration sequences: one batch."""
    return torch.randint(0, VOCABULARY, (4, 32), generator=torch.Generator().manual_seed(8))


@pytest.fixture
def hessians(monkeypatch: pytest.MonkeyPatch) -> list[Tensor]:
    """Every Hessian that GPTQ is handed during the test, in order."""
    seen: list[Tensor] = []
    original = fptquant.quantize.rounding.ROUNDERS["gptq"]

    def spy(weight: Tensor, scale: Tensor, bits: int, hessian: Tensor, *others: Any) -> Tensor:
        seen.append(hessian.clone())
        return original(weight, scale, bits, hessian, *others)

    monkeypatch.setitem(fptquant.quantize.rounding.ROUNDERS, "gptq", spy)
    return seen


@pytest.fixture(scope="session")
def simulate() -> Callable[..., LlamaForCausalLM]:
    """`simulate(model, windows | None, random=False, **recipe)`: merges, installs and, given windows, quantizes."""

    def run(
        model: LlamaForCausalLM, calibration: Tensor | None = None, random: bool = False, **fields: Any
    ) -> LlamaForCausalLM:
        recipe = Recipe.parse(fields)
        transforms = TransformSet(recipe.transforms, LLAMA.shape(model.config), recipe.seed)
        if random:
            transforms.randomize_(torch.Generator().manual_seed(1), 0.3)
        head_override, head_ignore = head_scheme("lm_head", recipe)
        config = CheckpointConfig(
            weights=recipe.precision.weights,
            activations=recipe.precision.activations,
            kv_cache=recipe.precision.kv_cache,
            transforms=transforms.record(),
            overrides=(*head_override, *recipe.overrides),
            ignore=(*recipe.ignore, *head_ignore),
        )
        for _ in merge_transforms(model, LLAMA, transforms):
            pass
        install_simulation(model, LLAMA, config)
        if calibration is not None:
            assert list(calibrate_and_round(model, LLAMA, recipe, calibration)) == [0, 1]
        return model

    return run


@pytest.fixture
def float64_norms(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """RMSNorm in the dtype of its input; the original computes in float32, which hides errors below 1e-7."""

    def forward(self: LlamaRMSNorm, hidden: Tensor) -> Tensor:
        return self.weight * hidden * torch.rsqrt(hidden.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)

    monkeypatch.setattr(LlamaRMSNorm, "forward", forward)
    yield
