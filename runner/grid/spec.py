"""The files that a user writes next to a template, `grid.yaml` and the model cards, as frozen,
typed objects.

Defines what these files may hold. `render` multiplies the axes and fills the template.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, NoReturn, TypeVar

from pydantic import AfterValidator, BeforeValidator, Field, model_validator

from runner.errors import GridError, Problem, RecipeError
from runner.recipe.parse import read_yaml
from runner.recipe.problems import find_line, suggest
from runner.recipe.schema import NAME_PATTERN, DeclaredContrast, ModelSection, Scalar
from runner.strict import FrozenDict, Section, Text, freeze

_Model = TypeVar("_Model", bound=Section)
_AXIS_NAME: Final = r"[A-Za-z][A-Za-z0-9_]*"
# The axis of the replicates of a grid.
SEED_AXIS: Final = "seed"
# Names that already have a meaning in a template.
TAKEN_NAMES: Final = frozenset(
    (
        "axes",
        "cell_seed",
        "declared",
        "grid",
        "models",
        "name",
        "range",
        "loop",
        "self",
        "and",
        "else",
        "elif",
        "for",
        "if",
        "in",
        "is",
        "not",
        "or",
        "set",
        "include",
        "true",
        "false",
        "none",
        "True",
        "False",
        "None",
        "recursive",
        "with",
        "without",
    )
)


def get_label(value: Any) -> Scalar:
    """The label of an axis value, which is used in names, on the command line and in `run.axes`."""
    label: Scalar = value["name"] if isinstance(value, Mapping) else value
    return label


def _check_label(label: Any) -> Any:
    if isinstance(label, str) and not re.fullmatch(
        r"[^\s,]([^,\x00-\x1f\x7f]{0,198}[^\s,])?", label
    ):
        raise ValueError(
            f"{label!r} cannot be chosen with --where: a label has no comma, no line break, no"
            " space at either end and at most 200 characters;"
            " write a long value as a mapping with a short `name`"
        )
    if not isinstance(label, str | bool | int | float | None):
        raise ValueError(f"{label!r} is not a label: expected a text, number, boolean or null")
    return label


def _check_axis_value(value: Any) -> Any:
    if isinstance(value, Mapping) and "name" not in value:
        raise ValueError("a mapping as an axis value needs the key `name`, its label")
    _check_label(get_label(value))
    return freeze(value)


def _listed(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else (value,)


AxisValue = Annotated[Any, AfterValidator(_check_axis_value)]
Labels = Annotated[
    tuple[Annotated[Any, AfterValidator(_check_label)], ...],
    Field(min_length=1),
    BeforeValidator(_listed),
]
Conditions = Annotated[dict[str, Labels], AfterValidator(freeze)]


class Axis(Section):
    """The values of one axis. With `when`, the axis exists only in cells in which each named
    earlier axis has one of the listed labels.
    """

    values: Annotated[tuple[AxisValue, ...], Field(min_length=1)]
    when: Conditions = Field(default_factory=dict)

    @model_validator(mode="before")
    @classmethod
    def _take_a_bare_list(cls, value: Any) -> Any:
        definition = {"values": value} if isinstance(value, list) else value
        if not isinstance(definition, dict):
            raise ValueError(
                f"got {json.dumps(value)}, expected a list, or a mapping with `values`"
            )
        if isinstance(definition.get("values"), list):
            return {**definition, "values": tuple(definition["values"])}
        return definition


class Exclusion(Section):
    """Cells to leave out, and the reason to print."""

    when: Annotated[Conditions, Field(min_length=1)]
    why: Text


class GridSpec(Section):
    """One `grid.yaml`."""

    name: Text
    axes: Annotated[dict[str, Axis], Field(min_length=1), AfterValidator(freeze)]
    exclude: tuple[Exclusion, ...] = ()
    include: tuple[FrozenDict, ...] = ()
    # own: each cell derives its own training seed from the number on the axis `seed`
    seeds: Literal["shared", "own"] = "shared"
    compare: tuple[DeclaredContrast, ...] = ()


class ModelCard(ModelSection):
    """One file of `recipe_templates/models`: the `model` section of a recipe, and the modules that
    LoRA adapts.
    """

    target_modules: Text | tuple[Text, ...]


def list_grids(templates_root: Path) -> list[str]:
    """The names of all grids."""
    return sorted(path.parent.name for path in templates_root.glob("*/grid.yaml"))


def load_grid(templates_root: Path, grid: str) -> GridSpec:
    """The checked grid file of a grid. Raises: GridError, with every problem and its line."""
    known = list_grids(templates_root)
    if grid not in known or not re.fullmatch(NAME_PATTERN, grid):
        message = f"no grid {grid!r} in {templates_root}{suggest(grid, known)}"
        raise GridError(message, hint=f"the grids are {', '.join(known)}" if known else None)
    path = templates_root / grid / "grid.yaml"
    spec = _read(path, GridSpec)
    if wrong := list(_check_spec(spec)):
        raise_grid_problems(path, wrong)
    return spec


def raise_grid_problems(path: Path, wrong: Sequence[tuple[str, str]]) -> NoReturn:
    """Raise GridError with the line of each dotted key of a grid file that is wrong."""
    text = path.read_text(encoding="utf-8")
    problems = [Problem(key, what, find_line(key, text)) for key, what in wrong]
    raise GridError(RecipeError(str(path), problems).message)


def load_cards(templates_root: Path) -> dict[str, dict[str, Any]]:
    """All model cards by file stem, as plain values. Raises: GridError."""
    paths = sorted((templates_root / "models").glob("*.yaml"))
    return {path.stem: _read(path, ModelCard).model_dump(mode="json") for path in paths}


def applies(when: Mapping[str, Sequence[Scalar]], cell: Mapping[str, Any]) -> bool:
    """True if a cell has one of the labels of each axis in `when`; an absent axis has no label."""
    return all(
        axis in cell and find_label(get_label(cell[axis]), labels) is not None
        for axis, labels in when.items()
    )


def show_label(label: Any) -> str:
    return label if isinstance(label, str) else json.dumps(label)


def find_label(label: Any, values: Sequence[Any]) -> int | None:
    """The position of a label among axis values; 1, 1.0, true and "1" are four labels."""
    wanted = json.dumps(label)
    return next(
        (n for n, value in enumerate(values) if json.dumps(get_label(value)) == wanted), None
    )


def _check_spec(spec: GridSpec) -> Iterator[tuple[str, str]]:
    """The dotted key and the problem of everything that types cannot check."""
    names = list(spec.axes)
    for position, (name, axis) in enumerate(spec.axes.items()):
        if not re.fullmatch(_AXIS_NAME, name) or name in TAKEN_NAMES:
            yield (
                f"axes.{name}",
                "is not an axis name: expected letters, digits and _, and no word that templates"
                " use",
            )
        for n, value in enumerate(axis.values):
            if find_label(get_label(value), axis.values) != n:
                yield f"axes.{name}", f"has {show_label(get_label(value))} twice"
        earlier = {other: spec.axes[other] for other in names[:position]}
        yield from _check_conditions(
            f"axes.{name}.when", axis.when, earlier, "an axis above this one"
        )
    for n, rule in enumerate(spec.exclude):
        yield from _check_conditions(f"exclude.{n}.when", rule.when, spec.axes, "an axis")
    for n, cell in enumerate(spec.include):
        yield from _check_inclusion(spec, f"include.{n}", cell)
    if spec.seeds == "own":
        yield from _check_own_seeds(spec)
    yield from _check_contrasts(spec)


def _check_own_seeds(spec: GridSpec) -> Iterator[tuple[str, str]]:
    axis = spec.axes.get(SEED_AXIS)
    if axis is None:
        yield "seeds", f"`own` needs an axis `{SEED_AXIS}` of whole numbers, such as [1, 2, 3]"
        return
    if axis.when:
        yield f"axes.{SEED_AXIS}.when", "does not go with `seeds: own`: every cell needs seeds"
    stated = [(f"axes.{SEED_AXIS}", value) for value in axis.values]
    stated += [
        (f"include.{n}.{SEED_AXIS}", cell[SEED_AXIS])
        for n, cell in enumerate(spec.include)
        if SEED_AXIS in cell
    ]
    for key, value in stated:
        if not is_seed(get_label(value)):
            yield key, f"got {json.dumps(get_label(value))}, expected a whole number of 0 or more"


def is_seed(label: Any) -> bool:
    return isinstance(label, int) and not isinstance(label, bool) and label >= 0


def _check_contrasts(spec: GridSpec) -> Iterator[tuple[str, str]]:
    """The problems of `compare` that do not depend on the recipes; `design` finds the others."""
    first_of: dict[str, int] = {}
    for n, contrast in enumerate(spec.compare):
        key, axis = f"compare.{n}", spec.axes.get(contrast.axis)
        if axis is None:
            yield f"{key}.axis", _describe_no_axis(contrast.axis, spec.axes)
            continue
        if contrast.axis == SEED_AXIS:
            yield f"{key}.axis", f"`{SEED_AXIS}` repeats the other cells and cannot be compared"
            continue
        known = [get_label(value) for value in axis.values]
        known += [cell[contrast.axis] for cell in spec.include if contrast.axis in cell]
        for end, label in (("from", contrast.from_), ("to", contrast.to)):
            if find_label(label, known) is None:
                yield f"{key}.{end}", _describe_no_value(label, known)
        ends = sorted(map(json.dumps, (contrast.from_, contrast.to)))
        same = json.dumps([contrast.axis, contrast.metric, ends])
        if first_of.setdefault(same, n) != n:
            yield key, f"is already declared by compare.{first_of[same]}"


def _describe_no_axis(name: str, axes: Mapping[str, Axis]) -> str:
    return f"got {name!r}, expected an axis: {', '.join(axes)}" + suggest(name, list(axes))


def _describe_no_value(label: Scalar, known: Sequence[Any]) -> str:
    labels = [get_label(value) for value in known]
    shown = ", ".join(json.dumps(item) for item in labels[:8])
    what = f"got {json.dumps(label)}, which is not a value of the axis: {shown}"
    return what + suggest(str(label), [item for item in labels if isinstance(item, str)])


def _check_conditions(
    key: str, when: Mapping[str, Sequence[Scalar]], axes: Mapping[str, Axis], expected: str
) -> Iterator[tuple[str, str]]:
    for name, labels in when.items():
        if name not in axes:
            yield f"{key}.{name}", f"is not {expected}" + suggest(name, list(axes))
            continue
        known = [get_label(value) for value in axes[name].values]
        for label in labels:
            if find_label(label, known) is None:
                yield f"{key}.{name}", _describe_no_value(label, known)


def _check_inclusion(
    spec: GridSpec, key: str, cell: Mapping[str, Any]
) -> Iterator[tuple[str, str]]:
    for name in cell:
        if name not in spec.axes:
            yield f"{key}.{name}", "is not an axis" + suggest(name, list(spec.axes))
    values: dict[str, Any] = {}
    for name, axis in spec.axes.items():
        if name in cell:
            try:
                _check_axis_value(cell[name])
            except ValueError as error:
                yield f"{key}.{name}", str(error)
                continue
            yield from _check_included_value(f"{key}.{name}", cell[name], axis)
            values[name] = cell[name]
        if applies(axis.when, values) != (name in cell):
            yield (
                f"{key}.{name}",
                (
                    "does not apply in this cell"
                    if name in cell
                    else "is missing: a cell needs every axis that applies"
                ),
            )


def _check_included_value(key: str, value: Any, axis: Axis) -> Iterator[tuple[str, str]]:
    position = find_label(get_label(value), axis.values)
    if isinstance(value, Mapping) and position is not None:
        yield (
            key,
            (
                f"gives another meaning to {show_label(get_label(value))}, a value of the axis:"
                " write only the label"
            ),
        )
    elif (
        position is None
        and not isinstance(value, Mapping)
        and any(isinstance(v, Mapping) for v in axis.values)
    ):
        yield key, f"{show_label(value)} is not a value of the axis: write a mapping with `name`"


def _read(path: Path, model: type[_Model]) -> _Model:
    try:
        return read_yaml(path, model)
    except RecipeError as error:
        raise GridError(error.message) from None
