"""Recipes as files, those of the package and a user's own: read without importing torch, checked as YAML only."""

from __future__ import annotations

from importlib import resources
from pathlib import Path
from typing import Any

import yaml

from fptquant.errors import FPTQuantError, unknown


class _UniqueKeys(yaml.SafeLoader):
    """YAML's plain types; a key that is given twice is an error, where PyYAML takes the last one."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        """Builds a mapping, and refuses a key that is given twice."""
        seen: set[str] = set()
        for key, _ in node.value:
            if isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' is given twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


def shipped_recipes() -> list[str]:
    """Names of the recipes in the package."""
    folder = resources.files("fptquant") / "recipes"
    return sorted(item.name.removesuffix(".yaml") for item in folder.iterdir() if item.name.endswith(".yaml"))


def read_recipe(name_or_file: str) -> dict[str, Any]:
    """The fields that a shipped recipe, or a YAML file, sets; its name among them.

    Raises:
        FPTQuantError: no such recipe or file, or no mapping.
    """
    path = Path(name_or_file)
    if path.suffix in (".yaml", ".yml"):
        if not path.is_file():
            raise FPTQuantError(f"recipe file '{path}' does not exist")
        try:
            text = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise FPTQuantError(f"recipe file '{path}' can't be read: {error}") from None
    else:
        shipped = shipped_recipes()
        if name_or_file not in shipped:
            raise unknown("recipe", name_or_file, shipped)
        text = (resources.files("fptquant") / "recipes" / f"{name_or_file}.yaml").read_text(encoding="utf-8")
    try:
        data = yaml.load(text, _UniqueKeys)
    except yaml.YAMLError as error:
        raise FPTQuantError(f"{name_or_file}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(data, dict):
        raise FPTQuantError(f"{name_or_file}: a recipe is a mapping of fields")
    return {"name": path.stem, **data}
