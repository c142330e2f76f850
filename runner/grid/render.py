"""Renders a grid and its template into recipes: the cells, their names and their texts.

Each text is loaded again and must describe the run that it was rendered for. `recipe_files` writes
the recipes, `template` limits what a template may do, `recipe.parse` defines what a recipe means.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, UndefinedError

from runner.errors import GridError, RecipeError, RunnerError
from runner.grid.design import derive_cell_seed, find_design_problems, list_declared
from runner.grid.recipe_files import (
    GridFiles,
    RenderedGrid,
    bring_up_to_date,
    compare,
    refuse_losses,
    report_drift,
    seal,
)
from runner.grid.spec import (
    GridSpec,
    applies,
    find_label,
    get_label,
    list_grids,
    load_cards,
    load_grid,
    raise_grid_problems,
    show_label,
)
from runner.grid.template import (
    build_sandbox,
    compile_name,
    locate_error,
    run_limited,
    word_error,
)
from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.problems import find_line, suggest
from runner.recipe.schema import NAME_PATTERN, Scalar
from runner.strict import freeze
from runner.text import format_count

MAX_CELLS: Final = 20_000


@dataclass(frozen=True)
class RunKey:
    """One cell with its run name. `values` are as in grid.yaml; an axis that does not apply is
    absent.
    """

    grid: str
    name: str
    values: Mapping[str, Any]

    @property
    def axes(self) -> dict[str, Scalar]:
        """The labels, as `run.axes` of the recipe holds them."""
        return {axis: get_label(value) for axis, value in self.values.items()}


@dataclass(frozen=True)
class KeyList:
    """The runs of a grid. `num_excluded` has one count per exclusion; each cell counts under the
    first exclusion that matches it.
    """

    keys: tuple[RunKey, ...]
    num_cells: int
    num_excluded: tuple[int, ...]
    num_included: int


def name_cell(labels: Mapping[str, Scalar]) -> str:
    """The name of a cell in messages.

    >>> name_cell({"model": "phi-2", "lora_r": 8})
    'model=phi-2, lora_r=8'
    """
    return ", ".join(f"{axis}={show_label(label)}" for axis, label in labels.items())


def derive_keys(spec: GridSpec, grid: str) -> KeyList:
    """Every run of a grid in the order of its axes, the first axis slowest; inclusions last.

    Raises:
        GridError: the name pattern fails or repeats a name, or no run is left.
    """
    cells = _derive_cells(spec)
    num_excluded = [0] * len(spec.exclude)
    kept: list[dict[str, Any]] = []
    for cell in cells:
        rule = next((n for n, rule in enumerate(spec.exclude) if applies(rule.when, cell)), None)
        if rule is None:
            kept.append(cell)
        else:
            num_excluded[rule] += 1
    included = [_complete_cell(spec, cell) for cell in spec.include]
    if not kept and not included:
        raise GridError(
            f"the grid {grid} has no runs: all of its"
            f" {format_count(len(cells), 'cell')} are excluded"
        )
    keys = tuple(_name_cells(spec, grid, [*kept, *included]))
    return KeyList(keys, len(cells), tuple(num_excluded), len(included))


def _derive_cells(spec: GridSpec) -> list[dict[str, Any]]:
    cells: list[dict[str, Any]] = [{}]
    for name, axis in spec.axes.items():
        longer: list[dict[str, Any]] = []
        for cell in cells:
            longer += (
                [{**cell, name: value} for value in axis.values]
                if applies(axis.when, cell)
                else [cell]
            )
        if len(longer) > MAX_CELLS:
            raise GridError(
                f"the axes up to `{name}` make {len(longer):,} cells, more than {MAX_CELLS:,}"
            )
        cells = longer
    return cells


def _complete_cell(spec: GridSpec, cell: Mapping[str, Any]) -> dict[str, Any]:
    """An included cell in the order of the axes, with each label replaced by its mapping."""
    values: dict[str, Any] = {}
    for name, axis in spec.axes.items():
        if name in cell:
            position = (
                None if isinstance(cell[name], Mapping) else find_label(cell[name], axis.values)
            )
            values[name] = cell[name] if position is None else axis.values[position]
    return values


def _name_cells(spec: GridSpec, grid: str, cells: Sequence[Mapping[str, Any]]) -> Iterator[RunKey]:
    pattern = f"the name pattern of the grid {grid}, {spec.name!r},"
    try:
        build_name = compile_name(spec.name)
    except TemplateError as error:
        raise GridError(f"{pattern} is wrong: {error}") from None
    cell_of_name: dict[str, str] = {}
    for values in cells:
        labels = {axis: get_label(value) for axis, value in values.items()}
        cell = name_cell(labels)
        try:
            name = build_name(labels)
        except Exception as error:  # an expression of the pattern may raise anything
            raise GridError(f"{pattern} fails for {cell}: {word_error(error)}") from None
        if not re.fullmatch(NAME_PATTERN, name):
            accepted = (
                "at most 200 letters, digits, dots, dashes and underscores,"
                " starting with a letter or digit"
            )
            raise GridError(
                f"the grid {grid} names the cell {cell} {name[:200]!r}, expected {accepted}"
            )
        # Some file systems ignore case.
        if (other := cell_of_name.setdefault(name.lower(), cell)) is not cell:
            message = (
                f"the grid {grid} uses the name {name!r} twice"
                f" (letter case does not count):\n\n  {other}\n  {cell}"
            )
            raise GridError(message, hint="use every axis that differs in the name pattern")
        yield RunKey(grid, name, freeze(values))


class _Cards(dict[str, dict[str, Any]]):
    """Model cards; the error for a missing card lists the existing ones."""

    def __missing__(self, card: str) -> NoReturn:
        raise GridError(
            f"no model card {card!r}{suggest(str(card), list(self))}",
            hint=f"the cards in recipe_templates/models are {', '.join(self)}",
        )


def render_grid(templates_root: Path, grid: str, *, base_seconds: int = 10) -> RenderedGrid:
    """Every recipe of a grid, each loaded again to check that it is the run that it was rendered
    for.

    A child process renders them with a limit of `base_seconds` of CPU time, plus 10 ms per cell,
    and 2 GiB.

    Raises: GridError.
    """
    spec = load_grid(templates_root, grid)
    cpu_seconds = base_seconds + (len(_derive_cells(spec)) + len(spec.include)) // 100
    place = f"{templates_root / grid / 'recipe.yaml.j2'}, or the name pattern next to it,"
    texts, summary = run_limited(
        lambda: _render_cells(spec, templates_root, grid), cpu_seconds, place
    )
    return RenderedGrid(grid, texts, summary)


def word_unrendered(templates_root: Path, grid: str, paths: Sequence[Path]) -> str | None:
    """A note on the recipes among `paths` that the template now renders differently; None without
    any.
    """
    changed = f"{templates_root / grid} or {templates_root / 'models'}"
    try:
        rendered = render_grid(templates_root, grid)
    except RunnerError:
        return (
            f"{changed} changed after rendering and can no longer be rendered:"
            f" `runner render {grid}` shows why; these recipes are the old ones"
        )
    drift = compare(rendered, paths[0].parent)
    names = {path.stem for path in paths} - {*drift.edited}
    differing = len(names & {*drift.changed})
    stale = len(names & {*drift.stale})
    is_whole_grid = len(paths) == len(list(paths[0].parent.glob("*.yaml")))
    found = []
    if differing:
        found.append(f"{differing} of {format_count(len(paths), 'recipe')} would differ")
    if stale:
        found.append(f"{format_count(stale, 'recipe')} would be stale")
    if drift.missing and is_whole_grid:
        found.append(f"{format_count(len(drift.missing), 'recipe')} would be new")
    if not found:
        return None
    prune = " --prune" if stale else ""
    return (
        f"{changed} changed after rendering: {', '.join(found)};"
        f" `runner render {grid}{prune}` updates them"
    )


def _render_cells(spec: GridSpec, templates_root: Path, grid: str) -> tuple[Mapping[str, str], str]:
    """The texts and the summary of a grid; its templates may come from anybody."""
    keys = derive_keys(spec, grid)
    cards = _Cards(load_cards(templates_root))
    sandbox = build_sandbox(templates_root)
    texts: dict[str, str] = {}
    recipes: list[Recipe] = []
    declared = list_declared(spec)
    for key in keys.keys:
        own: dict[str, Any] = {"axes": key.axes, "grid": grid, "name": key.name}
        own["declared"] = declared
        seed = derive_cell_seed(spec, grid, key.axes)
        if seed is not None:
            own["cell_seed"] = seed
        try:
            template = sandbox.get_template(f"{grid}/recipe.yaml.j2")
            body = template.render({**key.values, **own, "models": cards})
        except Exception as error:  # an expression in a template may raise anything
            _raise_template_error(error, templates_root, spec, key, [*own, "models"])
        text = seal(grid, f"{body.rstrip()}\n")
        recipe = _check_text(text, key, templates_root, declared)
        if spec.seeds == "own":
            _check_seed(text, recipe, seed, key, templates_root)
        texts[key.name] = text
        recipes.append(recipe)
    if wrong := list(find_design_problems(spec, recipes)):
        raise_grid_problems(templates_root / grid / "grid.yaml", wrong)
    return texts, describe(spec, keys, grid)


def _raise_template_error(
    error: Exception, templates_root: Path, spec: GridSpec, key: RunKey, own: Sequence[str]
) -> NoReturn:
    path, line = locate_error(error, templates_root)
    place = f"{path or templates_root / key.grid / 'recipe.yaml.j2'}, line {line or 1}"
    what, hint = word_error(error), None
    if isinstance(error, RunnerError):
        what, hint = error.message, error.hint
    elif isinstance(error, UndefinedError) and (match := re.match(r"'(\w+)' is undefined", what)):
        name, known = match[1], [*key.values, *own]
        what += suggest(name, known)
        hint = f"a template can use {', '.join(known)}"
        if name in spec.axes:
            hint = (
                f"`{name}` does not apply in every cell: put {{% if {name} is defined %}} around"
                " the lines that use it"
            )
    raise GridError(f"{place}: {what}\n\n  in the run {name_cell(key.axes)}", hint=hint) from None


def _check_text(
    text: str, key: RunKey, templates_root: Path, declared: Sequence[Mapping[str, Any]]
) -> Recipe:
    """The recipe in a rendered text, after checking that it is the run that it was rendered for."""
    try:
        recipe = parse_recipe(text, where=key.name)
    except RecipeError as error:
        lines = [f"{templates_root / key.grid / 'recipe.yaml.j2'} renders an invalid recipe", ""]
        for problem in error.problems:
            place = _find_template_line(text, problem.line or 1, templates_root / key.grid)
            lines.append(f"  {place}  {problem.key}  {problem.what}")
        raise GridError("\n".join([*lines, "", f"  in the run {name_cell(key.axes)}"])) from None
    found = recipe.run.model_dump(mode="json")
    expected = {"grid": key.grid, "name": key.name, "axes": key.axes, "declared": declared}
    for part in expected:
        if json.dumps(found[part], sort_keys=True) != json.dumps(expected[part], sort_keys=True):
            line = next(
                (n for n, row in enumerate(text.splitlines(), 1) if re.match(rf"\s*{part}:", row)),
                1,
            )
            place = _find_template_line(text, line, templates_root / key.grid)
            what = (
                f"`run.{part}` is {json.dumps(found[part])},"
                f" but the template was given {json.dumps(expected[part])}"
            )
            where = "there" if line > 1 else "below `run:`"
            hint = f"write `{part}: {{{{ {part} | yaml }}}}` {where}"
            raise GridError(f"{place}: {what}\n\n  in the run {name_cell(key.axes)}", hint=hint)
    return recipe


def _check_seed(
    text: str, recipe: Recipe, seed: int | None, key: RunKey, templates_root: Path
) -> None:
    """Check that a cell with its own seeds trains with its derived seed."""
    if recipe.training.seed == seed:
        return
    line = find_line("training.seed", text)
    place = _find_template_line(text, line or 1, templates_root / key.grid)
    raise GridError(
        f"{place}: `training.seed` is {recipe.training.seed}, but the seed of this run is {seed}"
        f" (`seeds: own` in grid.yaml)\n\n  in the run {name_cell(key.axes)}",
        hint="write `seed: {{ cell_seed | yaml }}` there",
    )


def _find_template_line(text: str, line: int, folder: Path) -> str:
    """The place in a template that wrote a line of a recipe: the line with the same start. If
    several have it, the one at the same position among them.
    """
    # No template wrote the header: the problem belongs to the whole recipe.
    if line == 1:
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
    """A summary of a grid: the axes, exclusions, inclusions and the resulting number of recipes."""
    axes = []
    for name, axis in spec.axes.items():
        where = " and ".join(
            f"{other}={'|'.join(map(show_label, labels))}" for other, labels in axis.when.items()
        )
        axes.append(f"{name} ({len(axis.values)}{' where ' + where if where else ''})")
    combinations = f"{'combination' if keys.num_cells == 1 else 'combinations':<12}"
    rows = [f"{grid}", f"  {keys.num_cells:>5} {combinations}  {' x '.join(axes)}"]
    for rule, count in zip(spec.exclude, keys.num_excluded, strict=True):
        when = ", ".join(
            f"{name}={'|'.join(map(show_label, labels))}" for name, labels in rule.when.items()
        )
        rows.append(f"  {f'-{count}':>5} excluded      {when}: {rule.why}")
    if keys.num_included:
        rows.append(f"  {f'+{keys.num_included}':>5} included")
    recipes = "recipe" if len(keys.keys) == 1 else "recipes"
    return "\n".join([*rows, f"  {len(keys.keys):>5} {recipes}"])


def render_grids(
    grid: str | None, *, check: bool, prune: bool, root: Path, force: bool = False
) -> int:
    """The exit code of `runner render`, after printing its findings and changes.

    `grid` None means every grid. With `check` nothing is written, and any difference returns 1.
    Without `force`, recipes that were edited since they were rendered are not overwritten or
    removed.

    Raises:
        GridError, RefusedError: before any file of any grid is written.
    """
    if check and (prune or force):
        option = "--prune" if prune else "--force"
        raise RunnerError(f"--check changes nothing, so it does not go with {option}")
    grids: list[GridFiles] = []
    for name in list_grids(root / "recipe_templates") if grid is None else [grid]:
        rendered = render_grid(root / "recipe_templates", name)
        recipes_dir = root / "recipes" / name
        grids.append(GridFiles(rendered, recipes_dir, compare(rendered, recipes_dir)))
    if not check and not force:
        refuse_losses(grids, prune=prune)
    exit_code = 0
    for files in grids:
        print(files.rendered.summary)
        if check:
            exit_code |= report_drift(files)
        else:
            bring_up_to_date(files, prune=prune)
    return exit_code
