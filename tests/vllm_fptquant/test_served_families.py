"""Every family through vLLM, in each of its variants: log-probabilities and tokens of the simulation, bit for bit."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from fptquant import pipeline
from fptquant.evaluation.equivalence import check_greedy, check_served_exactly
from fptquant.evaluation.perplexity import evaluation_windows, transformers_scorer
from fptquant.evaluation.vllm_backend import VLLMEngine
from fptquant.loading import load_model, open_source
from fptquant.simulate.install import set_exact
from tests.conftest import TEXT
from tests.families import VARIANTS, WINDOW, make_job

LENGTH = 60  # of prompts
RECIPES: dict[str, dict[str, Any]] = {
    "w4a8kv8": {"transforms": ["T_k", "T_v", "T_u", "T_r"]},
    "w4a4kv4": {"transforms": ["T_k", "T_v", "T_u", "T_r", "T_d", "S_n"]},
}


@pytest.mark.vllm
@pytest.mark.slow
@pytest.mark.parametrize("precision", RECIPES)
@pytest.mark.parametrize("variant", VARIANTS)
def test_served_equals_simulated(variant: str, precision: str, tmp_path: Path) -> None:
    """Prompts are longer than a window, and start with the constant token; prefill and decoding."""
    assert LENGTH > 2 * WINDOW
    job = make_job(variant, tmp_path, precision=precision, rounding={"method": "nearest"}, **RECIPES[precision])
    pipeline.quantize(job, tmp_path / "out")
    source = open_source(tmp_path / "out")
    model = load_model(source)
    set_exact(model)
    engine = VLLMEngine(tmp_path / "out", 128, exact=True)
    windows = evaluation_windows(source.tokenizer, TEXT, 2, LENGTH, special_tokens=True)
    checks = (
        check_served_exactly(transformers_scorer(model), engine.score, windows),
        check_greedy(model, engine, windows[:, : LENGTH // 2], new_tokens=WINDOW),
    )
    engine.close()
    assert all(check.passed for check in checks), checks
