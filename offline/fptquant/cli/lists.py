"""`fptquant families` and `fptquant recipes`."""

from __future__ import annotations

from typing import Annotated

import typer
import yaml
from rich.markup import escape

from fptquant.cli.app import command
from fptquant.console import grid, out
from fptquant.options.transforms import TRANSFORM_OPTIONS
from fptquant.recipe import PRECISIONS, Recipe, settings
from fptquant.recipe_files import read_recipe, shipped_recipes


@command()
def families() -> None:
    """List the model families that can be quantized and served, and what holds for them."""
    from fptquant.report.families import COLUMNS, rows

    shown = grid(*COLUMNS)
    for row in rows():
        shown.add_row(*map(escape, row))
    out.print(shown)


@command()
def recipes(
    name: Annotated[
        str, typer.Argument(show_default="list all", help="print all settings of this recipe (a name, or a YAML file)")
    ] = "",
    fields: Annotated[bool, typer.Option("--fields", help="list what a recipe may set, with the defaults")] = False,
) -> None:
    """List the shipped recipes, the precisions and the transforms; or what is in a recipe."""
    if name:
        typer.echo(yaml.safe_dump(Recipe.load(name).to_dict(), sort_keys=False), nl=False)
        return
    if fields:
        shown = grid("field", "default", "")
        for setting in settings(Recipe):
            shown.add_row(*map(escape, setting))
        out.print(shown)
        return
    shown = grid("recipe", "description")
    shown.columns[0].no_wrap = True
    for name in shipped_recipes():
        shown.add_row(name, str(read_recipe(name).get("description", "")))
    out.print(shown)
    out.print(f"precisions: {', '.join(PRECISIONS)}\ntransforms: {', '.join(TRANSFORM_OPTIONS)}")
