"""Scoring windows through vLLM, as served; importing this imports neither torch nor vLLM."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from fptquant.errors import FPTQuantError

if TYPE_CHECKING:
    from torch import Tensor


def vllm_installed() -> bool:
    """Whether vLLM can be imported, without importing it."""
    return find_spec("vllm") is not None


def require_vllm() -> None:
    """Raises FPTQuantError where vLLM is not installed."""
    if not vllm_installed():
        raise FPTQuantError("vLLM is not installed: run scripts/install.sh (--backend gpu on a GPU)")


def on_gpu() -> bool:
    """Whether vLLM serves on a GPU here: in 16 bits, which its kernels need, and without the exact mode."""
    import torch

    return torch.cuda.is_available()


@contextmanager
def _environment(**defaults: str) -> Iterator[None]:
    """Sets what is not set, for as long as it takes to start the engine's processes."""
    added = {name: value for name, value in defaults.items() if name not in os.environ}
    os.environ.update(added)
    try:
        yield
    finally:
        for name in added:
            del os.environ[name]


@contextmanager
def engine_settings() -> Iterator[dict[str, Any]]:
    """Options of an engine for measuring, and the environment in which it has to be started.

    Raises:
        FPTQuantError: vLLM is not installed.
    """
    require_vllm()
    dtype, environment = "float32", {"VLLM_CPU_KVCACHE_SPACE": "1", "VLLM_LOGGING_LEVEL": "WARNING"}
    if on_gpu():
        # Asking torch for a GPU is enough for CUDA to refuse to work in a fork of this process.
        dtype, environment["VLLM_WORKER_MULTIPROC_METHOD"] = "auto", "spawn"
    with _environment(**environment):
        yield {"dtype": dtype, "enforce_eager": True, "max_num_seqs": 8}


class VLLMEngine:
    """vLLM's offline engine on one checkpoint, for measuring."""

    def __init__(self, model: Path, max_length: int, *, exact: bool = False, **options: Any) -> None:
        """Starts the engine (about a minute on a CPU).

        Args:
            model: checkpoint directory, ours or any other.
            max_length: longest prompt plus answer.
            exact: independent of the order of float32 sums, for comparing bit by bit (see `vllm_fptquant.exact`).
            options: passed to `vllm.LLM`; eager and on CPUs float32 unless said otherwise (GPU kernels need 16 bits).

        Raises:
            FPTQuantError: vLLM is not installed.
        """
        if exact:
            options |= {
                "additional_config": {"fptquant": {"exact": True}},
                "compilation_config": {"custom_ops": ["none"]},
            }
        with engine_settings() as settings:
            from vllm import LLM  # reads the logging level on import

            self.engine = LLM(model=str(model), max_model_len=max_length, **{**settings, **options})

    def score(self, window: Tensor) -> Tensor:
        """Log probabilities (L - 1,) of a window's tokens, each given those before."""
        import torch
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0)
        tokens = window.tolist()
        output = self.engine.generate({"prompt_token_ids": tokens}, sampling, use_tqdm=False)[0]
        rows = output.prompt_logprobs[1:]  # one entry per token; the first has no context
        return torch.tensor([row[token].logprob for row, token in zip(rows, tokens[1:], strict=True)])

    def greedy(self, prompts: list[list[int]], new_tokens: int) -> list[list[int]]:
        """Greedy continuations of tokenized prompts, all submitted together."""
        from vllm import SamplingParams

        sampling = SamplingParams(max_tokens=new_tokens, temperature=0.0, ignore_eos=True)
        outputs = self.engine.generate([{"prompt_token_ids": p} for p in prompts], sampling, use_tqdm=False)
        return [list(output.outputs[0].token_ids) for output in outputs]

    def close(self) -> None:
        """Shuts the engine's processes down."""
        self.engine.llm_engine.engine_core.shutdown()
