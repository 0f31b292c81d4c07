"""Serves exports on vLLM without the plugin, one after the other, in a process of its own; answers go to a file."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tests.vllm_fptquant.serve_tokens import serve_tokens


def write_answers(output: Path, models: dict[str, str], prompts: list[list[int]], max_tokens: int) -> None:
    """Serves models, by directory their dtype; writes answers, and which of the plugin's modules were imported."""
    answers = {
        name: serve_tokens(Path(name), prompts, max_tokens, dtype=dtype, quantization=None)
        for name, dtype in models.items()
    }
    ours = [name for name in sys.modules if name.partition(".")[0] == "vllm_fptquant"]
    output.write_text(json.dumps({"answers": answers, "plugin": ours}))


def write_chat(
    output: Path, model: Path, dtype: str, messages: list[dict[str, str]], schema: dict[str, object]
) -> None:
    """Writes what a model answers as JSON of a schema, in at most 40 tokens; greedily."""
    from vllm import LLM, SamplingParams
    from vllm.sampling_params import StructuredOutputsParams

    llm = LLM(str(model), dtype=dtype, enforce_eager=True, max_model_len=512)
    form = StructuredOutputsParams(json=schema)
    (answer,) = llm.chat(messages, SamplingParams(temperature=0, max_tokens=40, structured_outputs=form))
    output.write_text(answer.outputs[0].text)
    llm.llm_engine.engine_core.shutdown()
