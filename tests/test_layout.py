"""Imports go one way: each room of the package knows those below it, and none above."""

from __future__ import annotations

import ast
from pathlib import Path

import fptquant

# From the bottom up; what stands on one line may not know each other.
ORDER = (
    ("errors",),
    ("files", "parallel", "process_memory", "schemes", "units"),
    ("options",),
    ("devices", "progress", "weight_files"),
    ("format",),
    ("wiring",),
    ("hf_config", "transforms", "quantize", "simulate"),
    ("hf_models",),
    ("hf_entries", "hf_quantizer"),
    ("layers", "read_as"),
    ("loading",),
    ("calibration", "train"),
    ("recipe_errors", "recipe_files"),
    ("recipe",),
    ("run",),
    ("sensitivity",),
    ("report",),
    ("console", "export", "pipeline"),
    ("evaluation",),
    ("cli",),
    ("__main__",),
)
RANK = {room: rank for rank, rooms in enumerate(ORDER) for room in rooms}
ROOT = Path(fptquant.__file__).parent


def imports(source: str) -> set[str]:
    """Rooms of the package that a module's source imports."""
    found = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.ImportFrom) and node.module == "fptquant":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("fptquant."):
            found.add(str(node.module).split(".")[1])
    return found - {"__version__"}


def rooms() -> dict[str, set[str]]:
    """What each room imports of the others."""
    found: dict[str, set[str]] = {}
    for file in ROOT.rglob("*.py"):
        room = file.relative_to(ROOT).parts[0].removesuffix(".py")
        if room != "__init__":
            found.setdefault(room, set()).update(imports(file.read_text(encoding="utf-8")) - {room})
    return found


def test_every_room_has_its_place() -> None:
    assert rooms().keys() == RANK.keys()


def test_imports_go_down() -> None:
    wrong = [f"{room} -> {other}" for room, others in rooms().items() for other in others if RANK[other] >= RANK[room]]
    assert not wrong


def test_an_arrow_up_is_seen() -> None:
    assert imports("from fptquant.run.job import Job\nfrom fptquant import pipeline") == {"run", "pipeline"}
