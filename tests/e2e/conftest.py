"""The real model, quantized once for all end-to-end tests."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from fetch_smollm2 import fetch
from fptquant.evaluation.perplexity import evaluation_windows
from fptquant.loading import Source, open_source
from fptquant.recipe import Recipe

WIKI = Path(__file__).parents[1] / "data" / "wiki.test.txt"
LAYERS = 8  # of 30


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if "e2e" in item.path.parts:
            item.add_marker(pytest.mark.e2e)
            item.add_marker(pytest.mark.slow)


def quantize(model: Path, output: Path, *options: str) -> Path:
    """Runs the command as a user would."""
    command = [str(Path(sys.executable).parent / "fptquant"), "quantize", str(model), "-o", str(output), *options]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return output


@pytest.fixture(scope="session")
def source() -> Source:
    return open_source(fetch())


@pytest.fixture(scope="session")
def default_checkpoint(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w4a8kv8, all transforms, GPTQ, the first token constant; what can be done without training end to end.

    A quarter of the default calibration text, and of the steps on weights, and no compensation, to save time.
    """
    folder = tmp_path_factory.mktemp("models")
    recipe = Recipe.load("fptquant-light").changed(
        local={"steps": 10}, calibration={"sequences": 16}, rounding={"propagation": "none"}
    )
    (folder / "light.yaml").write_text(yaml.safe_dump(recipe.to_dict()))
    return quantize(source.path, folder / "smollm2-w4a8kv8", "--recipe", str(folder / "light.yaml"))


@pytest.fixture(scope="session")
def unscaled_checkpoint(source: Source, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """w4a4kv4 without S_n and sink (the in-tree model class), rounded quickly: its accuracy isn't looked at.

    Of the first layers only: all of them are in `default_checkpoint`.
    """
    folder = tmp_path_factory.mktemp("models")
    AutoModelForCausalLM.from_pretrained(source.path, num_hidden_layers=LAYERS).save_pretrained(folder / "first")
    source.tokenizer.save_pretrained(folder / "first")
    recipe = {"transforms": ["T_k", "T_v", "T_u", "T_r", "T_d"], "sink": "none", "rounding": {"method": "nearest"}}
    (folder / "quick.yaml").write_text(yaml.safe_dump(recipe))
    options = ["--recipe", str(folder / "quick.yaml"), "--kv-strategy", "head", "--sequences", "4", "--quality", "0"]
    return quantize(folder / "first", folder / "smollm2-w4a4kv4", "--precision", "w4a4kv4", *options)


@pytest.fixture(scope="session")
def windows(source: Source) -> torch.Tensor:
    """The first 20 windows of 512 tokens of the test text."""
    return evaluation_windows(source.tokenizer, WIKI, 20, 512)
