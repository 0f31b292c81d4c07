"""scripts/check_newest.py: what it installs. `make newest` is the real run."""

import re

import pytest

import check_newest

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
