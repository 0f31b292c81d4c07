"""Exports as stock vLLM serves them, without the plugin, against their simulation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import PreTrainedModel

from fptquant.export.plan import Online
from fptquant.export.simulation import stock_simulation
from fptquant.export.write import Exporter, prepare
from fptquant.format.arithmetic import block_hadamard, hadamard_factors
from fptquant.loading import load_model, open_source
from fptquant.progress import Stages
from tests import forkserver
from tests.conftest import VOCABULARY
from tests.vllm_fptquant.serve_stock import write_answers
from tests.vllm_fptquant.serve_tokens import ENVIRONMENT, serve_tokens
from tests.vllm_fptquant.serving import quantized

ALL = ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"]
# No matrix has sizes that AMX's kernel takes, which multiplies in 16 bits only.
ODD = {"hidden": 40, "intermediate": 72}
CHECKPOINTS: dict[str, dict[str, Any]] = {
    "static": {"precision": "w4a8", "transforms": ALL[:4], "sink": "none"},
    "groups": {"precision": "w4a8kv8-g32", "transforms": [], "sink": "none"},
    "dynamic": {"precision": "w4a8kv8", "transforms": ALL, **ODD},
    "packed": {"precision": "w4a16", "transforms": ALL},
}
TOLERANCE = {"float32": 1e-4, "float16": 0.05}
PROMPTS = [
    torch.randint(0, VOCABULARY, (length,), generator=torch.Generator().manual_seed(length)).tolist()
    for length in (3, 17, 40)
]
NEW_TOKENS = 8


def packs() -> bool:
    """Whether vLLM multiplies packed weights here: it needs AVX-512."""
    import vllm._custom_ops  # noqa: F401  (registers the operators)

    return hasattr(torch.ops._C, "cpu_gemm_wna16")


def export(checkpoint: Path, directory: Path, online: Online = "undo") -> Exporter:
    exporter = prepare(open_source(checkpoint), directory, online=online)
    exporter.run(None, Stages())
    return exporter


@pytest.fixture(scope="module")
def exports(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Exporter]]:
    """By name, an exported directory and its export."""
    found = {}
    for name, fields in CHECKPOINTS.items():
        if name != "packed" or packs():
            path = tmp_path_factory.mktemp(name)
            found[name] = path / "stock", export(quantized(path, **fields), path / "stock")
    return found


@pytest.fixture(scope="module")
def served(exports: dict[str, tuple[Path, Exporter]], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What stock vLLM answers for each, in one process that never imports the plugin."""
    folder = tmp_path_factory.mktemp("served")
    models = {str(path): "float16" if name == "packed" else "float32" for name, (path, _) in exports.items()}
    request = (models, PROMPTS, NEW_TOKENS)
    process = forkserver.run(write_answers, folder / "answers.json", *request, VLLM_PLUGINS="", **ENVIRONMENT)
    assert process.returncode == 0, (process.stdout + process.stderr)[-3000:]
    found: dict[str, Any] = json.loads((folder / "answers.json").read_text())
    assert found["plugin"] == []
    return {name: found["answers"][str(path)] for name, (path, _) in exports.items()}


@torch.no_grad()
def log_probabilities(model: PreTrainedModel, tokens: list[int]) -> Tensor:
    found: Tensor = model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)
    return found[:-1]


def deviation(model: PreTrainedModel, answers: list[dict[str, Any]]) -> float:
    """Largest difference of log probabilities between a model and what was served; greedy tokens are compared."""
    found = 0.0
    for prompt, answer in zip(PROMPTS, answers, strict=True):
        expected = log_probabilities(model, prompt + answer["tokens"])
        found = max(found, float((expected - torch.tensor(answer["logprobs"])).abs().max()))
    return found


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_stock_vllm_computes_what_the_export_says(
    name: str, exports: dict[str, tuple[Path, Exporter]], served: dict[str, Any]
) -> None:
    if name not in exports:
        pytest.skip("vLLM multiplies packed weights on CPUs with AVX-512 only")
    directory, exporter = exports[name]
    simulated = stock_simulation(open_source(directory), exporter.plan)
    tolerance = TOLERANCE["float16" if name == "packed" else "float32"]
    assert deviation(simulated, served[name]) < tolerance
    ours = deviation(load_model(exporter.source), served[name])
    assert ours < tolerance if name in ("static", "packed") else ours > 0.05  # where an INT8 cache and more are lost


def test_online_hadamards_that_stay(
    exports: dict[str, tuple[Path, Exporter]], one_process: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """VLLM's GPU operator is emulated: where it is called, with what block, and what comes out is quantized."""
    blocks = []

    def hadacore(x: Tensor, inplace: bool = True) -> Tensor:
        blocks.append(x.shape[-1])
        return block_hadamard(x, *hadamard_factors(x.shape[-1]))

    monkeypatch.setattr("vllm._custom_ops.hadacore_transform", hadacore)
    source = exports["dynamic"][1].source
    exporter = export(source.path, tmp_path / "stock", "keep")
    answers = serve_tokens(tmp_path / "stock", PROMPTS, NEW_TOKENS, quantization=None)
    assert set(blocks) == {8}
    assert deviation(stock_simulation(open_source(tmp_path / "stock"), exporter.plan), answers) < TOLERANCE["float32"]
    assert deviation(stock_simulation(open_source(exports["dynamic"][0]), exports["dynamic"][1].plan), answers) > 0.05
