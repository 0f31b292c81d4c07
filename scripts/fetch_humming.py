"""Fetches the Humming package and NVIDIA's run-time compiler for `tests/vllm_fptquant/test_humming_package.py`.

    python scripts/fetch_humming.py

About 250 MB, into a directory of its own: no GPU is needed, and nothing that is installed changes.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CONTRACT = Path(__file__).parents[1] / "tests/vllm_fptquant/gpu_contract.json"
VERSION: str = json.loads(CONTRACT.read_text())["humming"]["version"]
DIRECTORY = Path.home() / ".cache/vllm-fptquant" / f"humming-{VERSION}"
PACKAGES = (
    f"humming-kernels=={VERSION}",
    "nvidia-cuda-nvrtc==13.5.37",
    "nvidia-cuda-runtime==13.5.37",
    "nvidia-cuda-cccl==13.3.5.0.6",
    "cuda-bindings==13.5.0",
    "cuda-pathfinder==1.9.0",
    "tabulate>=0.9",
)


def main() -> None:
    """Installs the packages, without what they depend on: torch and the like are there."""
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(DIRECTORY), *PACKAGES]
    subprocess.run(command, check=True)
    print(f"{DIRECTORY} holds humming-kernels {VERSION}")


if __name__ == "__main__":
    main()
