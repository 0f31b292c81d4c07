"""What scripts/check_versions.py installs; `make newest` and `make oldest` are the real runs. The page of versions."""

import re
import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

import check_versions
import compatibility
import environments
import fptquant
import vllm_fptquant

LISTING = "torch (2.15.0)\nAvailable versions: 2.15.0+cpu, 2.15.0, 2.14.1, 2.9.0+cpu, 2.10.1+cpu, 2.8.0"


@pytest.mark.parametrize(
    "requirement, build",
    [
        ("torch>=2.9,<2.16", "2.15.0+cpu"),
        ("torch>=2.9,<2.15", "2.10.1+cpu"),
        ("torch>=2.10.2,<2.15", None),
        ("torch>=2.15,<3", "2.15.0+cpu"),
        ("torch==2.9", "2.9.0+cpu"),
        ("torch==2.8", None),
    ],
)
def test_takes_the_newest_cpu_build_within_the_bounds(requirement: str, build: str | None) -> None:
    assert environments.newest_cpu_build(LISTING, requirement) == build


def test_everything_that_is_depended_on_has_both_bounds() -> None:
    for line in environments.requirements():
        assert re.fullmatch(r"[\w-]+>=[\d.]+,<[\d.]+", line), line
        assert re.fullmatch(r"[\w-]+==[\d.]+", environments.lower_bound(line)), line


def test_one_version() -> None:
    """The package's is the one that is built; both halves and the changelog have it."""
    assert fptquant.__version__ == vllm_fptquant.__version__ == check_versions.changelog_version()
    project = tomllib.loads((environments.ROOT / "pyproject.toml").read_text())
    assert project["project"]["dynamic"] == ["version"]
    assert environments.ROOT / project["tool"]["hatch"]["version"]["path"] == Path(fptquant.__file__)


def test_page_of_versions_is_what_the_jobs_wrote() -> None:
    """Where bounds were changed, the jobs have to run again: they write the page."""
    columns = compatibility.read()
    assert compatibility.PAGE.read_text() == compatibility.page(columns)
    for line in environments.requirements():
        name, bounds = environments.package(line), Requirement(line).specifier
        assert all(Version(column[name]) in bounds for column in columns.values()), line
        assert Version(columns["oldest"][name]) == Version(environments.lower_bound(line).partition("==")[2]), line


def test_page_changes_where_versions_do(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    page, job = tmp_path / "page.md", "newest"
    before = compatibility.PAGE.read_text()
    page.write_text(before)
    monkeypatch.setattr(compatibility, "PAGE", page)
    recorded = compatibility.read()
    versions = {name: version for name, version in recorded[job].items() if name != compatibility.SINCE}
    compatibility.record(job, versions)
    assert page.read_text() == before
    compatibility.record(job, versions | {"torch": "2.14.9+cpu"})
    found = compatibility.read()
    assert found.pop(job)["torch"] == "2.14.9+cpu"
    assert found == {name: column for name, column in recorded.items() if name != job}


def test_versions_of_this_environment() -> None:
    versions = compatibility.installed()
    assert versions.keys() == compatibility.allowed().keys()
    assert versions["typer"] and Version(versions["torch"]) in Requirement("torch>=2").specifier


def test_an_environment_is_filled_once_and_again_where_that_failed(tmp_path, monkeypatch):
    monkeypatch.setattr(environments, "ROOT", tmp_path)
    environment, filled = environments.Environment("own"), []

    def fill():
        filled.append(environment.python.is_file())
        (environment.folder / "left").touch(exist_ok=False)  # nothing is there from before
        if len(filled) == 1:
            raise SystemExit("no network")

    with pytest.raises(SystemExit, match="no network"):
        environment.filled_once("package==1", fill)
    environment.filled_once("package==1", fill)
    environment.filled_once("package==1", fill)
    assert filled == [True, True]
