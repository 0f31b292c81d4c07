"""The quantizer in a fresh environment, with the newest versions that pyproject.toml allows. Run it with `make newest`.

The wheel, built from the source archive, is installed as users install it, without vLLM and without this source tree on
the path; then a tiny random model goes all the way, and the committed checkpoints must still give the logits that were
recorded. The environment is kept for the day, until pyproject.toml changes. `make release-check` makes it anew, takes
the source archive, and leaves both archives in dist/.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
import venv
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv-newest"
PYTHON = VENV / "bin" / "python"
STAMP = VENV / "made"
GOLDEN = ROOT / "tests" / "fptquant" / "test_golden.py"
TEXT = ROOT / "tests" / "data" / "wiki.test.txt"
TORCH_INDEX_URL = os.environ.get("TORCH_INDEX_URL", "https://download.pytorch.org/whl/cpu")
# An index that can't be reached is asked once.
WITHOUT_WAITING = ("--retries", "0", "--timeout", "60")

# With the tests' own model. Run in ROOT, which only this step sees.
MAKE_MODEL = """
import sys, torch
from tests.conftest import build_model, build_tokenizer
model = build_model("gqa")
model.config.dtype = torch.float32
model.save_pretrained(sys.argv[1])
build_tokenizer(bos=True).save_pretrained(sys.argv[1])
"""

# No import of ours: transformers has to find the installed package by itself.
LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_grad_enabled(False)
tokens = AutoTokenizer.from_pretrained(sys.argv[2])("The old man and the sea", return_tensors="pt")["input_ids"]
before, after = (AutoModelForCausalLM.from_pretrained(path)(tokens).logits for path in sys.argv[1:])
error = float((after - before).pow(2).mean().sqrt() / before.std())
print(f"error of the logits: {error:.3f} of their spread")
sys.exit(not 0 < error < 0.5)
"""


def main() -> None:
    """Makes the environment or takes today's, and runs every check; the first that fails ends it."""
    parser = argparse.ArgumentParser(description="Checks the package in an environment of its own.")
    parser.add_argument("--release", action="store_true", help="what is to be uploaded, from the start")
    release = parser.parse_args().release
    started = time.monotonic()
    if not release and STAMP.is_file() and STAMP.read_text() == stamp():
        print(f"{VENV.name}: made today from this pyproject.toml")
    else:
        make_environment()
    install_package(release=release)
    print(versions())
    with tempfile.TemporaryDirectory() as folder:
        check(Path(folder))
    print(f"passed after {time.monotonic() - started:.0f} s")


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
        sys.exit(f"check_newest.py: failed: {' '.join(map(str, command))}")
    return done.stdout or ""


def pip(*args: str | Path) -> str:
    """Runs the environment's pip, and returns what it printed."""
    return run(PYTHON, "-m", "pip", *args, cwd=ROOT, quiet=True)


def stamp() -> str:
    """What an environment was made from: it is made again when this changes."""
    digest = hashlib.sha256((ROOT / "pyproject.toml").read_bytes()).hexdigest()
    return json.dumps({"pyproject": digest, "day": date.today().isoformat(), "python": sys.version})


def requirements() -> list[str]:
    """What pyproject.toml asks for, without extras."""
    return list(tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])


def make_environment() -> None:
    """Installs the newest of everything; torch first, whose CPU build PyPI doesn't have."""
    step(f"Fresh environment {VENV.name}")
    shutil.rmtree(VENV, ignore_errors=True)
    venv.create(VENV, with_pip=True)
    torch = newest_cpu_torch(next(line for line in requirements() if re.match(r"torch\b", line)))
    step(f"{torch}, and the newest of the rest")
    pip("install", "--quiet", "--no-deps", torch, "--extra-index-url", TORCH_INDEX_URL, *WITHOUT_WAITING)
    # Named once more, or a newer CUDA build, several GB, would replace it.
    pip("install", "--quiet", *requirements(), torch, "pytest", "build", "twine")
    STAMP.write_text(stamp())


def newest_cpu_torch(requirement: str) -> str:
    """The newest CPU build that pip's own configuration or TORCH_INDEX_URL offers within the bounds.

    Args:
        requirement: torch's line in pyproject.toml.

    Raises:
        SystemExit: there is none.
    """
    if sys.platform != "linux":
        return requirement  # PyPI's is the CPU build there
    listing = pip("index", "versions", "torch", "--extra-index-url", TORCH_INDEX_URL, *WITHOUT_WAITING)
    build = newest_cpu_build(listing, requirement)
    if build is None:
        sys.exit(
            f"check_newest.py: neither pip's index nor {TORCH_INDEX_URL} has a CPU build of {requirement}; "
            "set TORCH_INDEX_URL to an index that has one"
        )
    return f"torch=={build}"


def newest_cpu_build(listing: str, requirement: str) -> str | None:
    """The newest version ending in +cpu within the bounds, among those that `pip index versions` lists."""
    bounds = re.findall(r"(>=|<)([\d.]+)", requirement)
    fitting = [
        build
        for build in re.findall(r"[\d.]+\+cpu", listing)
        if all((release(build) >= release(bound)) == (sign == ">=") for sign, bound in bounds)
    ]
    return max(fitting, key=release, default=None)


def release(version: str) -> tuple[int, ...]:
    """A version's numbers, without a suffix such as +cpu."""
    return tuple(int(number) for number in version.split("+")[0].split("."))


def install_package(*, release: bool) -> None:
    """Builds both archives and installs one, always: the sources may have changed.

    Args:
        release: install the source archive, as who trusts no wheel does, and keep both in dist/.
    """
    step("Source archive of this source tree, and the wheel of that")
    with tempfile.TemporaryDirectory() as folder:
        run(PYTHON, "-m", "build", "--outdir", folder, ROOT, cwd=ROOT, quiet=True)
        (wheel,), (source,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        run(PYTHON, "-m", "twine", "check", "--strict", wheel, source, cwd=ROOT, quiet=True)
        print(f"{source.name} ({source.stat().st_size:,} bytes), {wheel.name} ({wheel.stat().st_size:,} bytes)")
        pip("install", "--quiet", "--no-deps", "--force-reinstall", source if release else wheel)
        if release:
            shutil.rmtree(ROOT / "dist", ignore_errors=True)
            shutil.copytree(folder, ROOT / "dist")
    pip("check")
    said = run(VENV / "bin" / "fptquant", "--version", cwd=VENV, quiet=True).split()[-1]
    if said != (written := changelog_version()):
        sys.exit(f"check_newest.py: `fptquant --version` says {said}, CHANGELOG.md {written}")


def changelog_version() -> str:
    """The version of the newest entry in CHANGELOG.md."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    return str(headings[0])


def versions() -> str:
    """The versions that are checked, in the order of pyproject.toml."""
    installed = {package["name"].lower(): package["version"] for package in json.loads(pip("list", "--format=json"))}
    names = [re.split(r"[^\w-]", line)[0].lower() for line in requirements()]
    return ", ".join(f"{name} {installed[name]}" for name in names)


def check(folder: Path) -> None:
    """Quantizes, evaluates, verifies and loads a tiny model, and reads the committed checkpoints."""
    command, model, out = VENV / "bin" / "fptquant", folder / "model", folder / "out"
    run(PYTHON, "-c", MAKE_MODEL, model, cwd=ROOT, quiet=True)
    step("quantize")
    calibration = ("--calibration", TEXT, "--sequences", "4")
    run(command, "quantize", model, "-o", out, "--recipe", "fptquant-light", *calibration, cwd=folder, quiet=True)
    step("evaluate")
    run(command, "evaluate", out, "--text", TEXT, "--windows", "2", "--length", "64", cwd=folder)
    step("verify")
    run(command, "verify", out, "--against", model, "--text", TEXT, "--windows", "2", "--length", "64", cwd=folder)
    step("transformers, without an import of ours")
    run(PYTHON, "-c", LOAD, model, out, cwd=folder)
    if GOLDEN.is_file():
        step("the committed checkpoints")
        run(PYTHON, "-m", "pytest", "-q", "-p", "no:cacheprovider", GOLDEN, cwd=ROOT)


if __name__ == "__main__":
    main()
