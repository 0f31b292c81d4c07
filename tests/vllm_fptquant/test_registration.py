"""The entry point: cheap, lazy, and safe to call again."""

from __future__ import annotations

import subprocess
import sys

import pytest

import vllm_fptquant
from fptquant.checkpoint import QUANT_METHOD


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_importing_the_plugin_imports_nothing_heavy() -> None:
    heavy = run_python(
        "import sys, vllm_fptquant; print(sorted({'torch', 'vllm', 'transformers'} & sys.modules.keys()))"
    )
    assert heavy.strip() == "[]"


def test_register_imports_neither_kernels_nor_models() -> None:
    loaded = run_python(
        "import sys, vllm_fptquant; vllm_fptquant.register();"
        "print(sorted(name for name in sys.modules if name.startswith('vllm_fptquant')))"
    )
    last_line = loaded.strip().splitlines()[-1]
    assert last_line == "['vllm_fptquant', 'vllm_fptquant.config', 'vllm_fptquant.options']"


def test_register_twice_registers_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from vllm.model_executor.layers import quantization
    from vllm.model_executor.models import ModelRegistry

    from vllm_fptquant.config import FPTQuantConfig

    monkeypatch.setattr(vllm_fptquant, "_registered", False)
    vllm_fptquant.register()
    monkeypatch.setattr(quantization, "register_quantization_config", None)  # a second call would fail
    vllm_fptquant.register()
    assert quantization.QUANTIZATION_METHODS.count(QUANT_METHOD) == 1
    assert quantization.get_quantization_config(QUANT_METHOD) is FPTQuantConfig
    assert "FPTQuantLlamaForCausalLM" in ModelRegistry.get_supported_archs()


def test_registered_model_class_resolves() -> None:
    from vllm.model_executor.models import ModelRegistry

    from vllm_fptquant.models.llama import FPTQuantLlamaForCausalLM

    model = ModelRegistry.models["FPTQuantLlamaForCausalLM"].load_model_cls()
    assert model is FPTQuantLlamaForCausalLM


def test_in_tree_llama_is_untouched() -> None:
    from vllm.model_executor.models import ModelRegistry

    model = ModelRegistry.models["LlamaForCausalLM"].load_model_cls()
    assert model.__module__ == "vllm.model_executor.models.llama"
