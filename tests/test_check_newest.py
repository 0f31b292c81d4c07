"""scripts/check_newest.py: what it installs. `make newest` is the real run."""

import re
import tomllib
from pathlib import Path

import pytest

import check_newest
import fptquant
import vllm_fptquant

LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0+cpu, 2.15.0, 2.14.1, 2.9.0+cpu, 2.13.0+cpu, 2.5.1+cpu\n"


@pytest.mark.parametrize(
    ("requirement", "build"),
    [
        ("torch>=2.6,<2.15", "2.13.0+cpu"),
        ("torch>=2.6,<2.16", "2.15.0+cpu"),
        ("torch>=2.6,<2.10", "2.9.0+cpu"),
        ("torch>=2.14.1,<2.15", None),
    ],
)
def test_takes_the_newest_cpu_build_within_the_bounds(requirement: str, build: str | None) -> None:
    assert check_newest.newest_cpu_build(LISTING, requirement) == build


def test_everything_that_is_depended_on_has_an_upper_bound() -> None:
    assert not [line for line in check_newest.requirements() if not re.search(r",<[\d.]+$", line)]


def test_one_version() -> None:
    """The package's is the one that is built; both halves and the changelog have it."""
    assert fptquant.__version__ == vllm_fptquant.__version__ == check_newest.changelog_version()
    project = tomllib.loads((check_newest.ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert check_newest.ROOT / project["tool"]["hatch"]["version"]["path"] == Path(fptquant.__file__)
