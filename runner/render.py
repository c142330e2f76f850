"""A grid and its template become the texts of recipes, each loaded again and found to be the run that it is meant for.

`grid_cells` says which runs there are, `templating` what a template may do, `recipe` what a recipe means, and
`recipe_files` what happens on disk.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

from jinja2 import UndefinedError

from runner.errors import GridError, RecipeError, RunnerError
from runner.grid import GridSpec, load_cards, load_grid, show_label, suggest
from runner.grid_cells import KeyList, RunKey, derive_keys, name_cell
from runner.recipe import parse_recipe
from runner.templating import build_sandbox, locate_error, render_text


@dataclass(frozen=True)
class RenderedGrid:
    """The recipes of a grid as they should be on disk: run name -> text, in the order of the cells."""

    grid: str
    texts: Mapping[str, str]
    summary: str


class _Cards(dict[str, dict[str, Any]]):
    """Model cards; one that does not exist is named, with those that do."""

    def __missing__(self, card: str) -> NoReturn:
        raise GridError(
            f"no model card {card!r}{suggest(str(card), list(self))}",
            hint=f"the cards in recipe_templates/models are {', '.join(self)}",
        )


def build_header(grid: str) -> str:
    """The line that opens a generated recipe."""
    return f"# Generated from recipe_templates/{grid} by `runner render {grid}`; do not edit.\n"


def render_grid(templates_root: Path, grid: str) -> RenderedGrid:
    """Every recipe of a grid, each loaded again and found to be the run that it was rendered for. Raises: GridError."""
    spec = load_grid(templates_root, grid)
    keys = derive_keys(spec, grid)
    cards = _Cards(load_cards(templates_root))
    sandbox = build_sandbox(templates_root)
    texts: dict[str, str] = {}
    for key in keys.keys:
        own = {"axes": key.axes, "grid": grid, "name": key.name, "models": cards}
        try:
            body = render_text(sandbox, f"{grid}/recipe.yaml.j2", {**key.values, **own})
        except Exception as error:  # an expression in a template may raise anything
            _raise_template_error(error, templates_root, spec, key)
        text = f"{build_header(grid)}{body.rstrip()}\n"
        _check_text(text, key, templates_root)
        texts[key.name] = text
    return RenderedGrid(grid, texts, describe(spec, keys, grid))


def _raise_template_error(error: Exception, templates_root: Path, spec: GridSpec, key: RunKey) -> NoReturn:
    path, line = locate_error(error, templates_root)
    place = f"{path or templates_root / key.grid / 'recipe.yaml.j2'}, line {line or 1}"
    what, hint = str(error), None
    if isinstance(error, RunnerError):
        what, hint = error.message, error.hint
    elif isinstance(error, UndefinedError) and (match := re.match(r"'(\w+)' is undefined", what)):
        name, known = match[1], [*key.values, "axes", "grid", "name", "models"]
        what += suggest(name, known)
        hint = f"a template knows {', '.join(known)}"
        if name in spec.axes:
            hint = f"`{name}` does not apply in every cell: put {{% if {name} is defined %}} around what uses it"
    raise GridError(f"{place}: {what}\n\n  in the cell {name_cell(key.axes)}", hint=hint) from None


def _check_text(text: str, key: RunKey, templates_root: Path) -> None:
    try:
        run = parse_recipe(text, where=key.name).run
    except RecipeError as error:
        lines = [f"{templates_root / key.grid / 'recipe.yaml.j2'} gives no valid recipe", ""]
        for problem in error.problems:
            place = _find_template_line(text, problem.line or 1, templates_root / key.grid)
            lines.append(f"  {place}  {problem.key}  {problem.what}")
        raise GridError("\n".join([*lines, "", f"  in the cell {name_cell(key.axes)}"])) from None
    found = {"grid": run.grid, "name": run.name, "axes": dict(run.axes)}
    expected = {"grid": key.grid, "name": key.name, "axes": key.axes}
    for part in expected:
        if json.dumps(found[part], sort_keys=True) != json.dumps(expected[part], sort_keys=True):
            line = next((n for n, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*{part}:", row)), 1)
            place = _find_template_line(text, line, templates_root / key.grid)
            what = f"`run.{part}` is {json.dumps(found[part])} where {json.dumps(expected[part])} was rendered"
            hint = f"write `{part}: {{{{ {part} | yaml }}}}` there"
            raise GridError(f"{place}: {what}\n\n  in the cell {name_cell(key.axes)}", hint=hint)


def _find_template_line(text: str, line: int, folder: Path) -> str:
    """The place in a template that wrote a line of a recipe: a line that starts alike, the same one of several."""
    if line == 1:  # the header, which no template wrote: the problem is that of the recipe as a whole
        return str(folder / "recipe.yaml.j2")
    rows = text.splitlines()
    row = rows[min(line, len(rows)) - 1]
    start = re.match(r"\s*(- )?[^\s:]+:?", row)
    if start is not None:
        before = sum(other.startswith(start[0]) for other in rows[: line - 1])
        places = [
            f"{path}, line {n}"
            for path in sorted(folder.rglob("*"))
            if path.is_file() and path.name != "grid.yaml"
            for n, other in enumerate(path.read_text(errors="replace").splitlines(), 1)
            if other.startswith(start[0])
        ]
        if len(places) == 1 or len(places) == sum(other.startswith(start[0]) for other in rows):
            return places[min(before, len(places) - 1)]
    return f"line {line} of the rendered text, `{row.strip()}`"


def describe(spec: GridSpec, keys: KeyList, grid: str) -> str:
    """How the axes, exclusions and inclusions come to the number of recipes."""
    axes = []
    for name, axis in spec.axes.items():
        where = " and ".join(f"{other}={'|'.join(map(show_label, labels))}" for other, labels in axis.when.items())
        axes.append(f"{name} ({len(axis.values)}{' where ' + where if where else ''})")
    rows = [f"{grid}", f"  {keys.num_cells:>5} cells     {' x '.join(axes)}"]
    for rule, count in zip(spec.exclude, keys.num_excluded, strict=True):
        when = ", ".join(f"{name}={'|'.join(map(show_label, labels))}" for name, labels in rule.when.items())
        rows.append(f"  {f'-{count}':>5} excluded  {when}: {rule.why}")
    if keys.num_included:
        rows.append(f"  {f'+{keys.num_included}':>5} included")
    return "\n".join([*rows, f"  {len(keys.keys):>5} recipes"])
