"""The quantizer in an environment of its own, with the newest or the oldest versions that pyproject.toml allows.

`make newest` and `make oldest` run it. The wheel, built from the source archive, is installed as users install it,
without vLLM and without this source tree on the path; then a tiny random model goes all the way, and the committed
checkpoints must still give the logits that were recorded. The versions that passed go into docs/compatibility.md.

The newest environment is kept for the day, until pyproject.toml changes; the oldest, which may take 7 GB, is deleted
once it has passed. `make release-check` makes the newest anew, takes the source archive, and leaves both archives in
dist/.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from environments import ROOT, Environment, run, step

GOLDEN = ROOT / "tests" / "fptquant" / "test_golden.py"
COMMAND_LINE = ROOT / "tests" / "fptquant" / "test_cli.py::test_what_is_quick"
COMPATIBILITY = ROOT / "scripts" / "compatibility.py"
TEXT = ROOT / "tests" / "data" / "wiki.test.txt"

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
    parser.add_argument("job", choices=("newest", "oldest", "release"), help="as the targets of the Makefile")
    job = parser.parse_args().job
    started = time.monotonic()
    environment = Environment(".venv-oldest" if job == "oldest" else ".venv-newest")
    if job == "oldest":
        environment.make_oldest()
    elif job == "newest" and environment.is_todays:
        print(f"{environment.folder.name}: made today from this pyproject.toml")
    else:
        environment.make_newest()
    install_package(environment, job)
    run(environment.python, COMPATIBILITY, cwd=ROOT)
    with tempfile.TemporaryDirectory() as folder:
        check(environment, Path(folder))
    run(environment.python, COMPATIBILITY, "oldest" if job == "oldest" else "newest", cwd=ROOT)
    if job == "oldest":
        environment.remove()
    print(f"passed after {time.monotonic() - started:.0f} s")


def install_package(environment: Environment, job: str) -> None:
    """Builds both archives and installs one, always: the sources may have changed.

    Args:
        environment: where to.
        job: `release` installs the source archive, as who trusts no wheel does, and keeps both in dist/.
    """
    step("Source archive of this source tree, and the wheel of that")
    with tempfile.TemporaryDirectory() as folder:
        run(environment.python, "-m", "build", "--outdir", folder, ROOT, cwd=ROOT, quiet=True)
        (wheel,), (source,) = Path(folder).glob("*.whl"), Path(folder).glob("*.tar.gz")
        if job != "oldest":  # which has no twine: the one that goes with its packages doesn't know today's metadata
            run(environment.python, "-m", "twine", "check", "--strict", wheel, source, cwd=ROOT, quiet=True)
        print(
            f"{source.name} ({source.stat().st_size:,} bytes), {wheel.name} ({wheel.stat().st_size:,} bytes)",
            flush=True,
        )
        environment.pip("install", "--quiet", "--no-deps", "--force-reinstall", source if job == "release" else wheel)
        if job == "release":
            shutil.rmtree(ROOT / "dist", ignore_errors=True)
            shutil.copytree(folder, ROOT / "dist")
    environment.pip("check")
    said = run(environment.fptquant, "--version", cwd=environment.folder, quiet=True).split()[-1]
    if said != (written := changelog_version()):
        sys.exit(f"`fptquant --version` says {said}, CHANGELOG.md {written}")


def changelog_version() -> str:
    """The version of the newest entry in CHANGELOG.md."""
    headings = re.findall(r"^## \[(.+?)\]", (ROOT / "CHANGELOG.md").read_text(encoding="utf-8"), re.MULTILINE)
    return str(headings[0])


def check(environment: Environment, folder: Path) -> None:
    """Takes a tiny model through every command that needs no vLLM, and reads the committed checkpoints."""
    command, python, model, out = environment.fptquant, environment.python, folder / "model", folder / "out"
    run(python, "-c", MAKE_MODEL, model, cwd=ROOT, quiet=True)
    windows = ("--text", TEXT, "--windows", "2", "--length", "64")
    step("quantize")
    calibration = ("--calibration", TEXT, "--sequences", "4")
    run(command, "quantize", model, "-o", out, "--recipe", "fptquant-light", *calibration, cwd=folder, quiet=True)
    exported = ("-o", folder / "exported", *windows[:2], "--length", "64")
    checks: dict[str, tuple[str | Path, ...]] = {
        "evaluate": (command, "evaluate", out, *windows),
        "verify": (command, "verify", out, "--against", model, *windows),
        "transformers, without an import of ours": (python, "-c", LOAD, model, out),
        "report": (command, "report", out),
        "inspect": (command, "inspect", out),
        "export": (command, "export", out, *exported),
    }
    # Each is a Python that imports for seconds, and takes one core.
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        said = {name: pool.submit(run, *line, cwd=folder, quiet=True) for name, line in checks.items()}
        for name, output in said.items():
            step(name)
            print(output.result(), end="", flush=True)
    if GOLDEN.is_file():
        step("the committed checkpoints; help and errors of the command")
        run(python, "-m", "pytest", "-q", "-p", "no:cacheprovider", GOLDEN, COMMAND_LINE, cwd=ROOT)


if __name__ == "__main__":
    main()
