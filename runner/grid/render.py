"""A grid and its template become recipes: the cells and their names, the texts, and the files.

Each text is loaded again and must be the run that it was rendered for. Owns the folder
`recipes/<grid>`: writes only what differs and removes only what it once generated. `template` says
what a template may do, `recipe.parse` what a recipe means.
"""

from __future__ import annotations

import contextlib
import difflib
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NoReturn

from jinja2 import TemplateError, UndefinedError

from runner.errors import GridError, RecipeError, RunnerError
from runner.files import write_text_atomic
from runner.grid.design import derive_cell_seed, find_design_problems, list_declared
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

MAX_CELLS: Final = 20_000


@dataclass(frozen=True)
class RunKey:
    """One cell under its run name. `values` are as in grid.yaml; an axis that does not apply is
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
    """The runs of a grid; `num_excluded` has one count per exclusion, each cell counted under the
    first that fits.
    """

    keys: tuple[RunKey, ...]
    num_cells: int
    num_excluded: tuple[int, ...]
    num_included: int


def name_cell(labels: Mapping[str, Scalar]) -> str:
    """How messages call a cell.

    >>> name_cell({"model": "phi-2", "lora_r": 8})
    'model=phi-2, lora_r=8'
    """
    return ", ".join(f"{axis}={show_label(label)}" for axis, label in labels.items())


def derive_keys(spec: GridSpec, grid: str) -> KeyList:
    """Every run of a grid in the order of its axes, the first axis slowest; inclusions last.

    Raises:
        GridError: the name pattern fails or gives one name twice, or no run is left.
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
        raise GridError(f"the grid {grid} has no runs: all of its {len(cells)} cells are excluded")
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
                f"the axes up to `{name}` give {len(longer):,} cells, more than {MAX_CELLS:,}"
            )
        cells = longer
    return cells


def _complete_cell(spec: GridSpec, cell: Mapping[str, Any]) -> dict[str, Any]:
    """An included cell in the order of the axes, with the mapping that a label stands for."""
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
            raise GridError(f"the grid {grid} names {cell} {name[:200]!r}, expected {accepted}")
        # Some file systems ignore case.
        if (other := cell_of_name.setdefault(name.lower(), cell)) is not cell:
            message = (
                f"the grid {grid} gives the name {name!r} twice"
                f" (letter case does not count):\n\n  {other}\n  {cell}"
            )
            raise GridError(message, hint="let the name pattern use every axis that differs")
        yield RunKey(grid, name, freeze(values))


@dataclass(frozen=True)
class RenderedGrid:
    """The recipes of a grid as they should be on disk: run name -> text, in the order of the
    cells.
    """

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


def render_grid(templates_root: Path, grid: str, *, base_seconds: int = 10) -> RenderedGrid:
    """Every recipe of a grid, each loaded again and found to be the run that it was rendered for.

    A child process renders them, with `base_seconds` of CPU time, 10 ms more a cell, and 2 GiB.

    Raises: GridError.
    """
    spec = load_grid(templates_root, grid)
    cpu_seconds = base_seconds + (len(_derive_cells(spec)) + len(spec.include)) // 100
    place = f"{templates_root / grid / 'recipe.yaml.j2'}, or the name pattern beside it,"
    texts, summary = run_limited(
        lambda: _render_cells(spec, templates_root, grid), cpu_seconds, place
    )
    return RenderedGrid(grid, texts, summary)


def _render_cells(spec: GridSpec, templates_root: Path, grid: str) -> tuple[Mapping[str, str], str]:
    """The texts and the summary of a grid, from templates that may be anybody's."""
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
        text = f"{build_header(grid)}{body.rstrip()}\n"
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
        hint = f"a template knows {', '.join(known)}"
        if name in spec.axes:
            hint = (
                f"`{name}` does not apply in every cell: put {{% if {name} is defined %}} around"
                " what uses it"
            )
    raise GridError(f"{place}: {what}\n\n  in the cell {name_cell(key.axes)}", hint=hint) from None


def _check_text(
    text: str, key: RunKey, templates_root: Path, declared: Sequence[Mapping[str, Any]]
) -> Recipe:
    """The recipe that a text is, once it is known to be the run that it was rendered for."""
    try:
        recipe = parse_recipe(text, where=key.name)
    except RecipeError as error:
        lines = [f"{templates_root / key.grid / 'recipe.yaml.j2'} gives no valid recipe", ""]
        for problem in error.problems:
            place = _find_template_line(text, problem.line or 1, templates_root / key.grid)
            lines.append(f"  {place}  {problem.key}  {problem.what}")
        raise GridError("\n".join([*lines, "", f"  in the cell {name_cell(key.axes)}"])) from None
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
                f"`run.{part}` is {json.dumps(found[part])}"
                f" where {json.dumps(expected[part])} was rendered"
            )
            where = "there" if line > 1 else "below `run:`"
            hint = f"write `{part}: {{{{ {part} | yaml }}}}` {where}"
            raise GridError(f"{place}: {what}\n\n  in the cell {name_cell(key.axes)}", hint=hint)
    return recipe


def _check_seed(
    text: str, recipe: Recipe, seed: int | None, key: RunKey, templates_root: Path
) -> None:
    """A cell with seeds of its own trains with the one that was derived for it."""
    if recipe.training.seed == seed:
        return
    line = find_line("training.seed", text)
    place = _find_template_line(text, line or 1, templates_root / key.grid)
    raise GridError(
        f"{place}: `training.seed` is {recipe.training.seed} where {seed} is the seed of this cell,"
        f" by `seeds: own` in grid.yaml\n\n  in the cell {name_cell(key.axes)}",
        hint="write `seed: {{ cell_seed | yaml }}` there",
    )


def _find_template_line(text: str, line: int, folder: Path) -> str:
    """The place in a template that wrote a line of a recipe: a line that starts alike, the same one
    of several.
    """
    # The header, which no template wrote: the problem is that of the recipe as a whole.
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
    """How the axes, exclusions and inclusions come to the number of recipes."""
    axes = []
    for name, axis in spec.axes.items():
        where = " and ".join(
            f"{other}={'|'.join(map(show_label, labels))}" for other, labels in axis.when.items()
        )
        axes.append(f"{name} ({len(axis.values)}{' where ' + where if where else ''})")
    rows = [f"{grid}", f"  {keys.num_cells:>5} cells     {' x '.join(axes)}"]
    for rule, count in zip(spec.exclude, keys.num_excluded, strict=True):
        when = ", ".join(
            f"{name}={'|'.join(map(show_label, labels))}" for name, labels in rule.when.items()
        )
        rows.append(f"  {f'-{count}':>5} excluded  {when}: {rule.why}")
    if keys.num_included:
        rows.append(f"  {f'+{keys.num_included}':>5} included")
    return "\n".join([*rows, f"  {len(keys.keys):>5} recipes"])


_MAX_SHOWN_DIFFS: Final = 3


@dataclass(frozen=True)
class Drift:
    """How a folder differs from its template, in run names; `foreign` are recipes there that nobody
    generated.
    """

    changed: tuple[str, ...]
    missing: tuple[str, ...]
    stale: tuple[str, ...]
    foreign: tuple[str, ...]
    diff: str

    def __bool__(self) -> bool:
        return bool(self.changed or self.missing or self.stale or self.foreign)


def compare(rendered: RenderedGrid, recipes_dir: Path) -> Drift:
    """What differs, byte by byte, between the rendered texts and a folder; `diff` shows the first
    few.
    """
    on_disk: dict[str, bytes] = {}
    for path in sorted(recipes_dir.glob("*.yaml")):
        # Pruned by another `runner render` at this instant.
        with contextlib.suppress(FileNotFoundError):
            on_disk[path.stem] = path.read_bytes()
    header = build_header(rendered.grid).encode()
    unknown = [name for name in on_disk if name not in rendered.texts]
    changed = [
        name
        for name, text in rendered.texts.items()
        if on_disk.get(name, text.encode()) != text.encode()
    ]
    rows: list[str] = []
    for name in changed[:_MAX_SHOWN_DIFFS]:
        path = recipes_dir / f"{name}.yaml"
        old = on_disk[name].decode(errors="replace").splitlines()
        new = rendered.texts[name].splitlines()
        rows += difflib.unified_diff(old, new, str(path), f"{path} (rendered)", lineterm="")
    return Drift(
        changed=tuple(changed),
        missing=tuple(name for name in rendered.texts if name not in on_disk),
        stale=tuple(name for name in unknown if on_disk[name].startswith(header)),
        foreign=tuple(name for name in unknown if not on_disk[name].startswith(header)),
        diff="\n".join(rows),
    )


def write_recipes(rendered: RenderedGrid, recipes_dir: Path, drift: Drift) -> None:
    """Write what changed or is missing; a file that is right already keeps its modification
    time.
    """
    for name in (*drift.changed, *drift.missing):
        write_text_atomic(recipes_dir / f"{name}.yaml", rendered.texts[name])


def prune_recipes(recipes_dir: Path, drift: Drift) -> None:
    """Remove the generated recipes that no cell gives any more."""
    for name in drift.stale:
        (recipes_dir / f"{name}.yaml").unlink(missing_ok=True)


def render_grids(grid: str | None, *, check: bool, prune: bool, root: Path) -> int:
    """The exit code of `runner render`, after printing what was found and done.

    `grid` None means every grid. With `check` nothing is written and any difference gives 1.

    Raises:
        GridError: before any file of the grid is written.
    """
    if check and prune:
        raise RunnerError("--check changes nothing, so it does not go with --prune")
    exit_code = 0
    for name in list_grids(root / "recipe_templates") if grid is None else [grid]:
        rendered = render_grid(root / "recipe_templates", name)
        recipes_dir = root / "recipes" / name
        drift = compare(rendered, recipes_dir)
        print(rendered.summary)
        if check:
            exit_code |= _report_drift(drift, recipes_dir, name)
        else:
            _bring_up_to_date(rendered, drift, recipes_dir, prune)
    return exit_code


def _report_drift(drift: Drift, recipes_dir: Path, grid: str) -> int:
    if not drift:
        print(f"  {recipes_dir} is up to date")
        return 0
    for word, names in (
        ("differs from its template", drift.changed),
        ("is missing", drift.missing),
        ("is stale: no cell gives it", drift.stale),
        ("was not generated", drift.foreign),
    ):
        for name in names:
            print(f"  {recipes_dir / name}.yaml {word}")
    if drift.diff:
        print(drift.diff)
        if len(drift.changed) > _MAX_SHOWN_DIFFS:
            print(f"({len(drift.changed) - _MAX_SHOWN_DIFFS} more files differ)")
    print(f"\nhint: runner render {grid}{' --prune' if drift.stale else ''}")
    return 1


def _bring_up_to_date(rendered: RenderedGrid, drift: Drift, recipes_dir: Path, prune: bool) -> None:
    write_recipes(rendered, recipes_dir, drift)
    num_written = len(drift.changed) + len(drift.missing)
    print(
        f"  {num_written} written, {len(rendered.texts) - num_written} unchanged in {recipes_dir}"
    )
    if prune:
        prune_recipes(recipes_dir, drift)
    for name in drift.stale:
        print(
            f"  {recipes_dir / name}.yaml"
            f" {'removed' if prune else 'is stale: no cell gives it (--prune removes it)'}"
        )
    for name in drift.foreign:
        print(f"  {recipes_dir / name}.yaml was not generated; it is left as it is")
