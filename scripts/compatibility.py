"""The table in docs/compatibility.md: versions that a job passed with.

`make oldest`, `make test` and `make newest` run this once they have passed, with their name and the Python that they
tested: it replaces the job's column by the versions installed there. Nothing changes where they are the same. Without a
name it prints the versions.
"""

from __future__ import annotations

import sys
from datetime import date
from importlib import metadata

from environments import ROOT, package, project

PAGE = ROOT / "docs" / "compatibility.md"
JOBS = ("oldest", "test", "newest")
EXTRAS = ("vllm", "data", "gguf", "eval")
SINCE = "with these since"
TEXT = """# Compatibility

Versions that were tested. Each job writes its column itself, once it has passed:

- `make oldest`: the oldest versions that `pyproject.toml` allows, and the newest of what those depend on. A tiny model
  is quantized, evaluated, verified, reported on, exported and loaded in transformers; the committed checkpoints give
  the logits that were recorded.
- `make test`: all tests, served by vLLM on CPUs.
- `make newest`: as `make oldest`, with the newest versions that are allowed, of torch the newest CPU build that pip's
  index has.

An empty field says that the package isn't installed there. vLLM on GPUs: [GPUs](gpu.md#what-was-run).

{table}
"""


def record(job: str, versions: dict[str, str]) -> None:
    """Replaces the job's column of the page, and its date, where the versions are others.

    Args:
        job: one of `JOBS`.
        versions: by package, Python among them.
    """
    columns = read()
    if columns[job] | versions != columns[job]:
        columns[job] = {**versions, SINCE: date.today().isoformat()}
    PAGE.write_text(page(columns))


def read() -> dict[str, dict[str, str]]:
    """What the page says, by job and package."""
    lines = [line for line in PAGE.read_text().splitlines() if line.startswith("|")]
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines[2:]]
    return {job: {row[0]: row[number] for row in rows} for number, job in enumerate(JOBS, start=2)}


def page(columns: dict[str, dict[str, str]]) -> str:
    """The page with these columns, beside today's bounds."""
    rows = [["", "allowed", *(f"`make {job}`" for job in JOBS)], ["---"] * (2 + len(JOBS))]
    for name, bounds in {**allowed(), SINCE: ""}.items():
        rows.append([name, bounds, *(columns[job].get(name, "") for job in JOBS)])
    return TEXT.format(table="\n".join("| " + " | ".join(cells) + " |" for cells in rows))


def allowed() -> dict[str, str]:
    """The bounds by package: Python, what we depend on, what extras add."""
    facts = project()
    extras = [line for extra in EXTRAS for line in facts["optional-dependencies"][extra]]
    bounds = {package(line): line.removeprefix(package(line)) for line in [*facts["dependencies"], *extras]}
    return {"python": facts["requires-python"], **bounds}


def installed() -> dict[str, str]:
    """The versions in this environment by package; an empty one where it isn't installed."""
    python = f"{sys.version_info.major}.{sys.version_info.minor}"
    return {name: python if name == "python" else _version(name) for name in allowed()}


def _version(name: str) -> str:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return ""


if __name__ == "__main__":
    found = installed()
    if not sys.argv[1:]:
        print(", ".join(f"{name} {version}" for name, version in found.items() if version))
    elif sys.argv[1] == "test" and not found["vllm"]:
        print("without vLLM its tests were skipped: no versions are recorded")
    else:
        record(sys.argv[1], found)
