"""Environments of their own, with the newest or the oldest versions that pyproject.toml allows."""

from __future__ import annotations

import hashlib
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCH_INDEX_URL = os.environ.get("TORCH_INDEX_URL", "https://download.pytorch.org/whl/cpu")
# An index that can't be reached is asked once.
WITHOUT_WAITING = ("--retries", "0", "--timeout", "60")


def step(text: str) -> None:
    """Prints the headline of a step."""
    print(f"==> {text}", flush=True)


def run(*command: str | Path, cwd: Path, quiet: bool = False) -> str:
    """Runs a command without this source tree on Python's path, and returns what it printed.

    Args:
        command: the program and its arguments.
        cwd: where to run it.
        quiet: prints the output only where the command fails.

    Raises:
        SystemExit: it failed.
    """
    env = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    env |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1", "COLUMNS": "120"}
    output = subprocess.PIPE if quiet else None
    done = subprocess.run(command, cwd=cwd, env=env, text=True, stdout=output, stderr=subprocess.STDOUT)
    if done.returncode:
        print(done.stdout or "", end="")
        sys.exit(f"failed: {' '.join(map(str, command))}")
    return done.stdout or ""


def project() -> dict[str, Any]:
    """The table `project` of pyproject.toml."""
    return dict(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"])


def requirements() -> list[str]:
    """What pyproject.toml asks for, without extras."""
    return list(project()["dependencies"])


def package(requirement: str) -> str:
    """The name in a requirement."""
    return re.split(r"[^\w-]", requirement)[0]


class Environment:
    """A virtual environment in this source tree."""

    def __init__(self, name: str) -> None:
        """Names a directory; nothing is made yet."""
        self.folder = ROOT / name
        self.python = self.folder / "bin" / "python"
        self.fptquant = self.folder / "bin" / "fptquant"
        self._stamp = self.folder / "made"

    @property
    def is_todays(self) -> bool:
        """Whether `make_newest` made it today, by this Python and from this pyproject.toml."""
        return self._holds(_made_from())

    def filled_once(self, what: str, fill: Callable[[], object]) -> None:
        """Makes it and fills it, unless that was done to the end with the same `what`."""
        if not self._holds(what):
            self._fill(what, fill)

    def _fill(self, what: str, fill: Callable[[], object]) -> None:
        self._make()
        fill()
        self._stamp.write_text(what)

    def _holds(self, what: str) -> bool:
        return self._stamp.is_file() and self._stamp.read_text() == what

    def pip(self, *args: str | Path) -> str:
        """Runs the environment's pip, and returns what it printed."""
        return run(self.python, "-m", "pip", *args, cwd=ROOT, quiet=True)

    def make_newest(self) -> None:
        """Makes it anew, with the newest of everything, of torch the newest CPU build."""
        self._fill(_made_from(), self._install_newest)

    def _install_newest(self) -> None:
        wanted = requirements()
        torch = next(line for line in wanted if package(line) == "torch")
        build = self._cpu_build(torch)
        if build is None:
            sys.exit(
                f"neither pip's index nor {TORCH_INDEX_URL} has a CPU build of {torch}; "
                "set TORCH_INDEX_URL to an index that has one"
            )
        self._install(build, [*wanted, "pytest", "build", "twine"])

    def make_oldest(self) -> None:
        """Installs the lower bounds, and the newest of what those need; torch's CUDA build where there is no other."""
        self._make()
        pins = [lower_bound(line) for line in requirements()]
        torch = next(pin for pin in pins if package(pin) == "torch")
        self._install(self._cpu_build(torch) or torch, [*pins, "pytest", "build"])

    def remove(self) -> None:
        """Deletes it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _make(self) -> None:
        step(f"Fresh environment {self.folder.name}")
        self.remove()
        venv.create(self.folder, with_pip=True)

    def _cpu_build(self, requirement: str) -> str | None:
        """The newest CPU build of torch that pip's own configuration or TORCH_INDEX_URL offers, as a requirement."""
        if sys.platform != "linux":
            return requirement  # PyPI's is the CPU build there
        listing = self.pip("index", "versions", "torch", "--extra-index-url", TORCH_INDEX_URL, *WITHOUT_WAITING)
        build = newest_cpu_build(listing, requirement)
        return build and f"torch=={build}"

    def _install(self, torch: str, rest: list[str]) -> None:
        step(f"{torch}, then the rest")
        self.pip("install", "--quiet", "--no-deps", torch, "--extra-index-url", TORCH_INDEX_URL, *WITHOUT_WAITING)
        # Named once more, or another build, of several GB, would replace it.
        self.pip("install", "--quiet", *rest, torch)


def newest_cpu_build(listing: str, requirement: str) -> str | None:
    """The newest version ending in +cpu within the bounds, among those that `pip index versions` lists."""
    holds = {">=": operator.ge, "<": operator.lt, "==": operator.eq}
    bounds = re.findall(r"(>=|<|==)([\d.]+)", requirement)
    fitting = [
        build
        for build in re.findall(r"[\d.]+\+cpu", listing)
        if all(holds[sign](release(build), release(bound)) for sign, bound in bounds)
    ]
    return max(fitting, key=release, default=None)


def lower_bound(requirement: str) -> str:
    """The requirement for the oldest version that this one allows: `torch==2.10` for `torch>=2.10,<2.16`."""
    return re.sub(r">=([\d.]+),<.*", r"==\1", requirement)


def release(version: str) -> tuple[int, ...]:
    """A version's three numbers, without a suffix such as +cpu."""
    numbers = [int(number) for number in version.split("+")[0].split(".")]
    return (*numbers, 0, 0)[:3]


def _made_from() -> str:
    """What an environment is made from: it is made again when this changes."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return json.dumps({"pyproject": digest, "day": date.today().isoformat(), "python": sys.version})
