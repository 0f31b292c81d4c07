"""One recipe of each kind, quantized and served: vLLM gives the simulation's log-probabilities."""

from __future__ import annotations

from pathlib import Path

import pytest

from fptquant import pipeline
from fptquant.evaluation.equivalence import check_served_exactly
from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source
from fptquant.simulate.install import set_exact
from tests.conftest import EXCERPT
from tests.fptquant.test_shipped_recipes import SERVED, short
from tests.fptquant.train.test_training import make_job

# fptquant-light's kind is served in test_served_sink.py, rtn's in test_served_tiny.py.
CHOSEN = [name for name in SERVED if name not in ("rtn", "fptquant-light")]


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("name", CHOSEN)
def test_served_equals_simulated(name: str, tmp_path: Path, one_process: None) -> None:
    sizes = {"hidden_size": 64, "intermediate_size": 128, "head_dim": 32}
    job = make_job("gqa", tmp_path, sizes, **{**short(name), "precision": "w4a4kv4"})
    pipeline.quantize(job, tmp_path / "out")
    source = open_source(tmp_path / "out")
    model = load_model(source)
    set_exact(model)
    engine = VLLMEngine(tmp_path / "out", 128, exact=True, num_gpu_blocks_override=64)
    windows = evaluation_windows(source.tokenizer, EXCERPT, 3, 80, special_tokens=False)
    exact = check_served_exactly(transformers_scorer(model), engine.score, windows)
    engine.close()
    assert exact.passed, exact
