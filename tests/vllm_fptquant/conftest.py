"""Shared set-up: vLLM's parallel layers on one process, with a faked tensor-parallel world where a test asks."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator

import pytest

pytest.importorskip("vllm")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """Registers the plugin as vLLM's entry point does."""
    import vllm_fptquant

    vllm_fptquant.register()


@pytest.fixture
def parallel_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Function that pretends this process is `rank` of `size`; the world is one rank until it is called.

    Layers are only built and computed, never reduced across ranks.
    """
    from vllm.config import VllmConfig, set_current_vllm_config

    def pretend(rank: int, size: int) -> None:
        for module in (
            "vllm.model_executor.layers.linear",
            "vllm.model_executor.parameter",
            "vllm_fptquant.kv_cache",
        ):
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    with set_current_vllm_config(VllmConfig()):
        yield pretend
