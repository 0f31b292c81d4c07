"""The pages for people: they build, their links and paths lead somewhere, and their commands are commands."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

from fptquant import cli
from fptquant.cli.options import OPTIONS, listed
from fptquant.errors import FPTQuantError
from fptquant.options.transforms import TRANSFORM_OPTIONS
from fptquant.recipe import Recipe
from fptquant.recipe_files import read_recipe

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
PAGES = (README, ROOT / "CONTRIBUTING.md", *sorted(DOCS.glob("*.md")))
COMMANDS: dict[str, Any] = typer.main.get_command(cli.app).commands  # type: ignore[attr-defined]
FIELDS = {"precision": "precision", "rounding": "rounding.method", "seed": "seed", "dtype": "dtype"}


def build(config: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "-f", str(config), "-d", str(site)]
    return subprocess.run(command, capture_output=True, text=True, cwd=config.parent)


# -- the site --


def test_the_site_builds_and_fetches_nothing(tmp_path: Path) -> None:
    result = build(ROOT / "mkdocs.yml", tmp_path)
    assert result.returncode == 0, result.stdout + result.stderr
    for page in tmp_path.rglob("*.html"):
        fetched = re.findall(r'<(?:script|img)[^>]*src="(?:https?:)?//|<link[^>]*stylesheet[^>]*//', page.read_text())
        assert not fetched, (page.name, fetched)


def test_a_broken_link_and_a_page_that_is_nowhere_are_seen(tmp_path: Path) -> None:
    shutil.copy(ROOT / "mkdocs.yml", tmp_path)
    shutil.copytree(DOCS, tmp_path / "docs")
    index = tmp_path / "docs" / "index.md"
    index.write_text(index.read_text() + "\n[a](no-page.md) [b](method.md#no-section)\n")
    (tmp_path / "docs" / "apart.md").write_text("# Apart\n")
    result = build(tmp_path / "mkdocs.yml", tmp_path / "site")
    assert result.returncode == 1 and "Aborted with 3 warnings" in result.stdout + result.stderr


def test_links_of_pages_outside_the_site() -> None:
    for page in (README, ROOT / "CONTRIBUTING.md", ROOT / "docker" / "README.md"):
        for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
            if "://" not in target:
                file, _, anchor = target.partition("#")
                path = page.parent / file if file else page
                assert path.is_file(), (page.name, target)
                assert not anchor or anchor in anchors(path.read_text()), (page.name, target)


def anchors(text: str) -> set[str]:
    """Of a page's headings."""
    titles = re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    return {re.sub(r"[\s-]+", "-", re.sub(r"[^\w\s-]", "", title.lower()).strip()) for title in titles}


def test_files_that_pages_name_exist() -> None:
    """In code, with their path from the root. The log tells of files that were, CONTRIBUTING of one that could be."""
    pattern = re.compile(r"`((?:offline|vllm_fptquant|tests|benchmarks|scripts|docker)/[\w/.-]+)`")
    found = [
        (page.name, name)
        for page in PAGES
        if page.name not in ("log.md", "CONTRIBUTING.md")
        for name in pattern.findall(page.read_text())
    ]
    assert len(found) > 10
    assert not [item for item in found if not (ROOT / item[1]).exists()]


# -- README --


def test_readme_is_short() -> None:
    assert len(README.read_text().split()) < 700


def test_readme_has_the_figures_of_the_results() -> None:
    rows = json.loads((DOCS / "results.json").read_text())
    for precision, column in (("w4a8kv8", 1), ("w4a4kv4", 2)):
        table = re.findall(r"^\| \**([\w-]+)\** \| \**([\d.]+)\** \| \**([\d.]+)\** \|$", README.read_text(), re.M)
        assert len(table) == 9
        for row in table:
            measured = rows[f"{precision} | recipes | {row[0]} | 0"]["wiki"]["perplexity"]
            assert row[column] == f"{measured:.{1 if measured < 1000 else 0}f}", row


# -- commands --


def command_lines(text: str) -> Iterator[tuple[str, bool]]:
    """Lines that call `fptquant`, as given to it, and whether they stand in a block and so have to be complete."""
    text = re.sub(r"\\\n\s*", " ", text)
    pattern = r"^(?:\$ +| {4,}| *)?(?:\w+=\S+ )*(?:torchrun .*?-m |\S*python -m )?fptquant (.+)$"
    inside, previous = False, ""
    for line in text.splitlines():
        if line.startswith("```"):
            inside = not inside
        elif inside or (line.startswith("    ") and not previous.strip()):
            found = re.match(pattern, line)
            if found:
                yield found[1], True
        else:
            yield from ((match, False) for match in re.findall(r"`(?:torchrun .*?-m )?fptquant ([^`]+)`", line))
        previous = "" if line.startswith("    ") and not previous.strip() else line


def complaint(line: str, complete: bool) -> str | None:
    """What the command line would say is wrong with its arguments; None where nothing is.

    Words in capitals stand for a user's own, brackets for what may be left out.
    """
    words = shlex.split(re.sub(r"[\[\]]", "", line), comments=True)
    if not words or words[0] in ("...", "--install-completion", "--help"):
        return None
    name, given = words[0], [word for word in words[1:] if word != "..."]
    if name not in COMMANDS:
        return f"no command {name}"
    command = COMMANDS[name]
    context = command.context_class(command, info_name=name, **command.context_settings)
    try:
        values, rest, _ = command.make_parser(context).parse_args(list(given))
        if rest and name != "serve":
            return f"too many arguments: {rest}"
        for parameter in command.params:
            value = values.get(parameter.name)
            if isinstance(value, str) and not re.fullmatch(r"[A-Z]+", value) and parameter.param_type_name == "option":
                parameter.process_value(context, value)
        fields = {FIELDS[key]: value for key, value in values.items() if key in FIELDS and isinstance(value, str)}
        nested = {key: value for key, value in fields.items() if "." not in key}
        if "rounding.method" in fields:
            nested["rounding"] = {"method": fields["rounding.method"]}
        if isinstance(values.get("budget"), str):
            nested["budget"] = dict([values["budget"].split("=")])
        Recipe().changed("options", OPTIONS, **nested)
        recipe = values.get("recipe")
        if isinstance(recipe, str) and not re.fullmatch(r"[A-Z]+|.*\.yaml", recipe):
            read_recipe(recipe)
        if isinstance(values.get("without"), str):
            assert set(listed(values["without"])) <= TRANSFORM_OPTIONS.keys(), values["without"]
    except (FPTQuantError, AssertionError) as error:
        return str(error)
    except Exception as error:  # Typer's own, of the copy of Click inside of it
        if not hasattr(error, "format_message"):
            raise
        return str(error.format_message())
    missing = [p.name for p in command.params if p.required and values.get(p.name) is None]
    return f"missing: {missing}" if complete and missing and "..." not in words else None


def test_commands_of_the_pages_are_commands() -> None:
    found = [(page.name, line, complete) for page in PAGES for line, complete in command_lines(page.read_text())]
    wrong = [(page, line, said) for page, line, complete in found if (said := complaint(line, complete))]
    assert not wrong
    assert {line.split()[0] for _, line, _ in found} >= COMMANDS.keys()


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("quantise MODEL -o OUT", "no command"),
        ("quantize MODEL -o OUT --precison w4a4kv4", "--precison"),
        ("quantize MODEL -o OUT --precision w4a4kv5", "w4a4kv5"),
        ("quantize MODEL -o OUT --sequences many", "--sequences"),
        ("quantize MODEL -o OUT --recipe fptquant-lite", "fptquant-lite"),
        ("quantize MODEL -o OUT --residency somewhere", "somewhere"),
        ("quantize MODEL -o OUT --budget places=4", "places"),
        ("quantize MODEL -o OUT --without T_x", "T_x"),
        ("quantize MODEL", "output"),
        ("evaluate OUT OTHER --text FILE", "too many"),
    ],
)
def test_a_wrong_command_is_seen(line: str, said: str) -> None:
    (found,) = command_lines(f"```sh\nfptquant {line}  # comment\n```\n")
    assert said in str(complaint(*found))
    (found,) = command_lines(f"text\n\n    fptquant {line}\n")
    assert said in str(complaint(*found))


def test_scripts_and_targets_of_the_pages_exist() -> None:
    """`python benchmarks/x.py --option` and `make target`, in code."""
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    seen = 0
    for page in PAGES:
        if page.name == "log.md":
            continue
        for script, options in re.findall(r"\b((?:benchmarks|scripts)/\w+\.\w+)([^`\n#|]*)", page.read_text()):
            source = (ROOT / script).read_text()
            for option in re.findall(r"(?<=\s)--[a-z][\w-]*", options.split(" -- ")[0].split(";")[0]):
                assert option in source, (page.name, script, option)
                seen += 1
        for words in re.findall(r"(?:`|^\$? ?|^ {4})make ([a-z -]+)", page.read_text(), re.MULTILINE):
            assert set(words.split()) <= targets, (page.name, words)
    assert seen > 5


def test_recipes_of_the_pages_are_recipes() -> None:
    blocks = [
        block
        for page in DOCS.glob("*.md")
        if page.name != "log.md"
        for block in re.findall(r"^```yaml\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)
    ]
    assert len(blocks) >= 3
    for block in blocks:
        Recipe.parse(yaml.safe_load(block))
    with pytest.raises(FPTQuantError, match="precison"):
        Recipe.parse({"precison": "w4a4kv4"})
