"""The entry point: cheap, lazy, and safe to call again."""

from __future__ import annotations

import logging
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from packaging.specifiers import SpecifierSet

import vllm_fptquant
from fptquant.errors import FPTQuantError
from fptquant.format import QUANT_METHOD, CheckpointConfig
from fptquant.wiring import FAMILIES, Architecture
from tests.vllm_fptquant.tiny_llama import TinyLlama
from vllm_fptquant.versions import TESTED, is_first_process


def run_python(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout


def test_halves_of_different_versions_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_fptquant, "_registered", False)
    monkeypatch.setattr("fptquant.__version__", "0.0.9")
    with pytest.raises(FPTQuantError, match="vllm_fptquant 0.1.0 .* and fptquant 0.0.9 .*different versions"):
        vllm_fptquant.register()


@pytest.mark.parametrize(
    ("version", "warnings"), [("0.40.1", 1), ("0.3.3", 1), ("0.34.0", 1), ("0.33.0", 0), ("0.31.0", 0), (None, 0)]
)
def test_untested_vllm_is_warned_of_once(version: str | None, warnings: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_fptquant, "_registered", False)
    if version is not None:
        monkeypatch.setattr("vllm.__version__", version)
    said: list[str] = []

    def warn(self: logging.Logger, message: str, *arguments: object) -> None:
        if self.name == "vllm.vllm_fptquant.versions":
            said.append(message % arguments)

    monkeypatch.setattr(logging.Logger, "warning", warn)
    vllm_fptquant.register()
    vllm_fptquant.register()
    assert len(said) == warnings
    assert all(f"tested with vLLM 0.31, 0.32 and 0.33, not with {version}: compare" in message for message in said)


def test_processes_of_vllm_do_not_warn_again() -> None:
    assert is_first_process()
    with multiprocessing.get_context("spawn").Pool(1) as pool:
        assert not pool.apply(is_first_process)


def test_what_was_tested_is_what_is_declared() -> None:
    declared = Path(__file__, "../../../pyproject.toml").resolve().read_text(encoding="utf-8")
    found = re.search(r'^vllm = \["vllm(.*)"\]$', declared, re.MULTILINE)
    assert found is not None
    assert all(SpecifierSet(found[1]).contains(f"{release}.0") for release in TESTED)


@pytest.mark.slow
def test_extension_that_does_not_load_is_named_before_anything_starts(tmp_path: Path) -> None:
    (origin,) = find_spec("vllm").submodule_search_locations  # type: ignore[union-attr, misc]
    shutil.copytree(origin, tmp_path / "vllm", copy_function=os.symlink, ignore=shutil.ignore_patterns("_C*.so"))
    checkpoint = TinyLlama.random(CheckpointConfig()).write(tmp_path / "checkpoint")
    code = (
        "import sys; from vllm.engine.arg_utils import EngineArgs;"
        "EngineArgs(sys.argv[1], dtype='float32', skip_tokenizer_init=True).create_engine_config()"
    )
    process = subprocess.run(
        [sys.executable, "-c", code, str(checkpoint)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])},
        capture_output=True,
        text=True,
    )
    assert process.returncode != 0
    assert "vLLM's compiled extension for 'cpu' can't be loaded" in process.stderr


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
    assert last_line == str(["vllm_fptquant"] + [f"vllm_fptquant.{name}" for name in ("config", "options", "versions")])


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


@pytest.mark.parametrize("family", FAMILIES.values(), ids=list(FAMILIES))
def test_every_family_has_a_model_class(family: Architecture) -> None:
    from vllm.model_executor.models import ModelRegistry

    from vllm_fptquant.models.decoder import FPTQuantForCausalLM

    assert ModelRegistry.models[f"FPTQuant{family.class_name}"].load_model_cls() is FPTQuantForCausalLM


def test_in_tree_llama_is_untouched() -> None:
    from vllm.model_executor.models import ModelRegistry

    model = ModelRegistry.models["LlamaForCausalLM"].load_model_cls()
    assert model.__module__ == "vllm.model_executor.models.llama"
