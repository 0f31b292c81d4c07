"""Shared set-up: vLLM's parallel layers in one process, with a faked tensor-parallel world."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack
from typing import Any

import pytest
import torch

pytest.importorskip("vllm")

os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")


@pytest.fixture(scope="session", autouse=True)
def registered() -> None:
    """Registers the plugin as vLLM's entry point does, and the GPU's operators, emulated."""
    import vllm_fptquant
    from tests.vllm_fptquant import gpu_emulation

    vllm_fptquant.register()
    gpu_emulation.define_operators()


@pytest.fixture
def parallel_world(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, int], None]]:
    """Function that pretends this process is `rank` of `size`; the world is one rank until it is called.

    Layers are only built and computed, never reduced across ranks.
    """

    def pretend(rank: int, size: int) -> None:
        for module in (
            "vllm.model_executor.layers.linear",
            "vllm.model_executor.layers.vocab_parallel_embedding",
            "vllm.model_executor.parameter",
            "vllm_fptquant.kv_cache",
        ):
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_rank", lambda: rank)
            monkeypatch.setattr(f"{module}.get_tensor_model_parallel_world_size", lambda: size)

    pretend(0, 1)
    with serving_config():
        yield pretend


@pytest.fixture
def serving() -> Iterator[Callable[..., None]]:
    """Function that makes a `VllmConfig` with these arguments the current one."""
    with ExitStack() as stack:
        yield lambda **arguments: stack.enter_context(serving_config(**arguments))


@pytest.fixture
def forked_workers(one_process: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """VLLM's workers are forks of this process. On CPUs it spawns them, and each imports for twenty seconds."""
    context = multiprocessing.get_context("fork")
    monkeypatch.setattr("vllm.v1.executor.multiproc_executor.get_mp_context", lambda: context)


class NoModel:
    """Stands for a `ModelConfig`; the attention layer asks for the dtype, and for features we do not use."""

    dtype = torch.float32

    def __getattr__(self, name: str) -> None:
        return None


def serving_config(**arguments: Any) -> AbstractContextManager[Any]:
    """A `VllmConfig` as the current one: vLLM's layers refuse to be built without."""
    from vllm.config import VllmConfig, set_current_vllm_config

    config = VllmConfig(**arguments)
    config.model_config = NoModel()
    return set_current_vllm_config(config)


@pytest.fixture
def operators(monkeypatch: pytest.MonkeyPatch) -> None:
    """GPU operators and Humming, emulated, as if nothing had used them before."""
    from tests.vllm_fptquant import gpu_emulation
    from tests.vllm_fptquant.humming_model import HummingModel
    from vllm_fptquant.kernels import humming

    monkeypatch.setattr(*gpu_emulation.WORKSPACE)
    monkeypatch.setattr(humming, "humming", HummingModel)
    monkeypatch.setattr(humming, "unavailable", lambda: None)
    humming.layer_config.cache_clear()
    monkeypatch.setitem(gpu_emulation.split, "blocks", 1)
    monkeypatch.setitem(gpu_emulation.split, "warps", 1)
    gpu_emulation.accumulators.clear()


@pytest.fixture
def pretend_gpu(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Function that makes the plugin believe in a GPU of this capability; 8.0 until it is called."""
    from tests.vllm_fptquant.gpu_emulation import pretended_platform

    def pretend(capability: int) -> None:
        for target, platform in pretended_platform(capability):
            monkeypatch.setattr(target, platform)

    pretend(80)
    return pretend
