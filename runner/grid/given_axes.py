"""The axes of `runner init --axis KEY=VALUE,...`, for the starter grid.

Reads and checks them, and chooses the name of each axis and its part in the names of runs.
`starter_grid` writes them into the grid and the template.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from runner.errors import MAX_SHOWN_PROBLEMS, Problem, RecipeError, RunnerError
from runner.grid.spec import SEED_AXIS, TAKEN_NAMES, find_label, show_label
from runner.grid.template import quote_yaml
from runner.recipe.keys import find_keys
from runner.recipe.parse import parse_recipe
from runner.recipe.schema import Scalar
from runner.recipe.values import read_values

MODEL_AXIS: Final = "model"
LOSS_AXIS: Final = "loss"
COUNT_AXIS: Final = "num_train_samples"
# The axes that every starter grid has, by the keys of the recipe, and below their other names.
_STARTER_AXES: Final[Mapping[str, str]] = {
    "model.path": MODEL_AXIS,
    "loss": LOSS_AXIS,
    "data.num_train_samples": COUNT_AXIS,
    "training.seed": SEED_AXIS,
}
_OTHER_NAMES: Final = {
    "model": "model.path",
    "num_train_samples": "data.num_train_samples",
    "samples": "data.num_train_samples",
    "seed": "training.seed",
}
# A recipe states only one key of each pair.
_INSTEAD_OF: Final = {
    "training.num_train_epochs": "training.max_steps",
    "training.gradient_accumulation_steps": "training.global_batch_size",
}
# The prefix of a value in the names of runs; empty if the value is clear without one.
_SHORT_NAMES: Final = {
    "adapter.lora_alpha": "alpha",
    "adapter.lora_dropout": "dropout",
    "adapter.r": "r",
    "data.max_length": "len",
    "training.global_batch_size": "batch",
    "training.gradient_accumulation_steps": "acc",
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "",
    "training.max_steps": "steps",
    "training.num_train_epochs": "epochs",
    "training.optim": "",
    "training.warmup_steps": "warmup",
    "training.weight_decay": "wd",
}
# The hint if one value of an axis needs other keys than the others.
BY_HAND: Final = (
    "leave out this axis, and write it into recipe_templates/first yourself, with {% if %} around"
    " the keys that only one of its values needs"
)
_KEY: Final = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", re.ASCII)
_RANGE: Final = re.compile(r"(-?\d{1,9})(?:\.\.\.?|:)(-?\d{1,9})")
_MAX_VALUES: Final = 100  # of an axis, because each is tried
_SMALL: Final = 1e-3
_LARGE: Final = 1e6


@dataclass(frozen=True)
class GivenAxis:
    """An axis, identified by the dotted key of the recipe that it sets.

    `labels` replace the values in names, if a value is a text that does not fit in a file name.
    """

    key: str
    name: str
    values: tuple[Scalar, ...]
    labels: tuple[str, ...] = ()
    typed: str = ""  # the key as the user wrote it

    @property
    def is_starters(self) -> bool:
        """True if every starter grid has this axis."""
        return self.key in _STARTER_AXES

    @property
    def replaces(self) -> str | None:
        """The key that a recipe must not state together with this one."""
        return _INSTEAD_OF.get(self.key) or next(
            (key for key, other in _INSTEAD_OF.items() if other == self.key), None
        )

    @property
    def expression(self) -> str:
        """The interpolation of its value in the template."""
        return f"{{{{ {self.variable} | yaml }}}}"

    @property
    def variable(self) -> str:
        """Its value's name in the template."""
        return f"{self.name}.value" if self.labels else self.name

    def write_values(self) -> str:
        """The values as the grid file lists them."""
        if self.labels:
            pairs = zip(self.labels, self.values, strict=True)
            return quote_yaml([{"name": label, "value": value} for label, value in pairs])
        return f"[{', '.join(map(_write_value, self.values))}]"

    def show_values(self) -> str:
        """The values as messages and the command line list them."""
        return ",".join(_write_value(value).strip('"') for value in self.values)

    def write_name(self) -> str:
        """Its part of the grid's name pattern."""
        shown, form = self.name, _choose_form(self.values)
        if form is not None:
            shown = f"('{form}' % {self.name})"
            for long, brief in _POWERS:
                if any(long in form % value for value in self.values):
                    shown += f" | replace('{long}', '{brief}')"
        short = _SHORT_NAMES.get(self.key)
        are_numbers = all(_is_number(value) for value in self.values)
        if short is not None and (are_numbers or not short):
            return f"{short}{{{{ {shown} }}}}"
        return f"{short or self.name}-{{{{ {shown} }}}}"


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


# Python's exponents, and their usual short form.
_POWERS: Final = (("e-0", "e-"), ("e+0", "e"), ("e+", "e"))


def _write_value(value: Scalar) -> str:
    form = _choose_form([value])
    if form is None:
        return quote_yaml(value)
    text = form % value
    for long, brief in _POWERS:
        text = text.replace(long, brief)
    return text


def _choose_form(values: Sequence[Scalar]) -> str | None:
    """The format that writes all of the numbers with an exponent; None if plain numbers are easier
    to read.

    >>> [_choose_form(values) for values in ([1e-4, 3e-4], [1e-4, 1.5e-4], [0, 1e-5], [8, 0.05])]
    ['%.0e', '%.1e', '%g', None]
    """
    if not all(_is_number(value) for value in values):
        return None
    numbers = [float(value) for value in values if value is not None]
    has_float = any(isinstance(value, float) for value in values)
    if not has_float or all(not one or _SMALL <= abs(one) < _LARGE for one in numbers):
        return None
    forms = [*(["%g"] if 0 in numbers else []), *(f"%.{digits}e" for digits in range(17))]
    return next(form for form in forms if all(float(form % one) == one for one in numbers))


def read_given_axes(texts: Sequence[str]) -> list[GivenAxis]:
    """The axes of `--axis`, in the order given. Raises: RunnerError."""
    found: dict[str, tuple[Scalar, ...]] = {}
    typed: dict[str, str] = {}
    for text in texts:
        written, _, listed = text.partition("=")
        key = _OTHER_NAMES.get(written, written)
        if not _KEY.fullmatch(key) or not listed.strip():
            raise RunnerError(
                f"`--axis {text}`: expected a key of the recipe and its values",
                hint="--axis training.learning_rate=1e-4,3e-4",
            )
        if key.partition(".")[0] == "run":
            raise RunnerError(f"`--axis {text}`: the grid itself sets the keys of `run`")
        if key in found:
            raise RunnerError(
                f"`--axis {text}`: `{key}` is already an axis", hint="list all values in one --axis"
            )
        found[key] = _read_values(text, listed)
        typed[key] = written
    for key, other in _INSTEAD_OF.items():
        if key in found and other in found:
            raise RunnerError(f"`{key}` and `{other}` cannot both be axes: a recipe states one")
    return [
        GivenAxis(key, name, found[key], _build_labels(found[key]), typed[key])
        for key, name in _name_axes(found).items()
    ]


def list_given_models(axes: Sequence[GivenAxis]) -> list[str]:
    """The models that `--axis model=...` names. Raises: RunnerError."""
    for axis in axes:
        if axis.name == MODEL_AXIS:
            return [_require_text(value) for value in axis.values]
    return []


def _require_text(value: Scalar) -> str:
    if not isinstance(value, str):
        raise RunnerError(f"`--axis model=...`: got {show_label(value)}, expected a model")
    return value


def _read_values(text: str, listed: str) -> tuple[Scalar, ...]:
    what = f"`--axis {text}`"
    try:
        read = json.loads(read_values(f"values: [{listed}]", where=what))
    except RecipeError as error:
        raise RunnerError(f"{what}: {error.problems[0].what}") from None
    values = read.get("values")
    if list(read) != ["values"] or not isinstance(values, list):
        raise RunnerError(f"{what}: expected values with commas between them")
    if len(values) > _MAX_VALUES:
        raise RunnerError(
            f"`--axis {text[:60]}...`: got {len(values):,} values, expected at most {_MAX_VALUES}"
            " here",
            hint="write them into recipe_templates/first/grid.yaml",
        )
    for at, value in enumerate(values):
        if isinstance(value, str) and (match := _RANGE.fullmatch(value)):
            first, last = int(match[1]), int(match[2])
            shown = [str(one) for one in range(first, min(last + 1, first + _MAX_VALUES))]
            raise RunnerError(
                f"{what}: got the range {value}, expected each value",
                hint=f"--axis {text.partition('=')[0]}={','.join(shown)}" if shown else None,
            )
        if isinstance(value, dict | list):
            raise RunnerError(
                f"{what}: got a {'mapping' if isinstance(value, dict) else 'list'}, expected texts,"
                " numbers, true, false or null",
                hint=(
                    "start without this axis, and write it into recipe_templates/first/grid.yaml,"
                    " as mappings with a `name`"
                ),
            )
        # 1 and 1.0 are one experiment; 1 and true are two values.
        earlier = [one for one in values[:at] if _is_number(one) and _is_number(value)]
        if value in earlier or find_label(value, values) != at:
            raise RunnerError(f"{what}: has {show_label(value)} twice")
    return tuple(values)


def _name_axes(keys: Iterable[str]) -> dict[str, str]:
    """The axis name of each key: its last part, or all its parts if the last is already taken."""
    names: dict[str, str] = {}
    lasts = [key.rpartition(".")[2] for key in keys]
    for key in keys:
        last = key.rpartition(".")[2]
        taken = last in TAKEN_NAMES or last in _STARTER_AXES.values() or last == "card"
        if not re.match("[A-Za-z]", last):
            taken = True
        names[key] = _STARTER_AXES.get(
            key, key.replace(".", "_") if taken or lasts.count(last) > 1 else last
        )
    return names


def _build_labels(values: Sequence[Scalar]) -> tuple[str, ...]:
    """Labels for the values, if one of them is a text that does not fit in a name; else none."""
    if all(
        not isinstance(value, str) or re.fullmatch(r"[\w.-]{1,40}", value, re.ASCII)
        for value in values
    ):
        return ()
    labels: list[str] = []
    for at, value in enumerate(values, 1):
        text = value if isinstance(value, str) else show_label(value)
        label = re.sub(r"[^A-Za-z0-9._-]+", "-", text).strip("-._")[:30].rstrip("-._") or str(at)
        labels.append(f"{label}-{at}" if label in labels else label)
    return tuple(labels)


def check_given_axes(axes: Sequence[GivenAxis], base_text: str) -> None:
    """Raise RunnerError, with the schema's own messages, for keys and values that the recipe
    `base_text` does not accept.
    """
    found = _try_values(axes, base_text)
    if not found.lines:
        return
    lines = "\n".join(list(found.lines)[:MAX_SHOWN_PROBLEMS])
    hint = _suggest_key(axes, found.unknown, base_text)
    hint = hint or _suggest_values(axes, found.overrides)
    hint = hint or _suggest_missing(axes, list(found.missing), base_text)
    if hint is None and (found.missing or "does not go with" in lines):
        hint = BY_HAND
    raise RunnerError(f"the recipes do not accept these values of `--axis`\n\n{lines}", hint=hint)


@dataclass(frozen=True)
class _Refused:
    """The problems that the recipe has with values of the axes. A dict keeps the order and holds
    each line or key once.
    """

    lines: dict[str, None] = field(default_factory=dict)
    unknown: set[str] = field(default_factory=set)
    missing: dict[str, None] = field(default_factory=dict)
    overrides: dict[str, list[str]] = field(default_factory=dict)  # as written, by key

    def add(self, problem: Problem, what: str, overrides: Sequence[str]) -> None:
        """Add a problem of the recipe with `overrides`, which a message calls `what`."""
        is_missing = problem.what == "is missing"
        key = what if problem.key == "(recipe)" else problem.key
        self.lines[f"  {key}: {problem.what}{f' with {what}' if is_missing else ''}"] = None
        self.overrides.setdefault(problem.key, []).extend(overrides)
        if problem.what.startswith("unknown key"):
            self.unknown.add(problem.key)
        if is_missing:
            self.missing[problem.key] = None


def _try_values(axes: Sequence[GivenAxis], base_text: str) -> _Refused:
    first = [_write_override(axis, axis.values[0]) for axis in axes]
    instead = [f"{axis.replaces}=null" for axis in axes if axis.replaces]
    if any(axis.key == "model.dtype" for axis in axes):  # the template derives these from it
        instead += ["training.bf16=false", "training.fp16=false"]
    # The first values together, then each other value in place of the first one of its axis.
    tried = {" ".join(first): first}
    for at, axis in enumerate(axes):
        for value in axis.values[1:]:
            override = _write_override(axis, value)
            tried[override] = [*first[:at], override, *first[at + 1 :]]
    found = _Refused()
    for what, overrides in tried.items():
        try:
            parse_recipe(base_text, where="--axis", overrides=[*overrides, *instead])
        except RecipeError as error:
            for problem in error.problems:
                found.add(problem, what, overrides)
    return found


def _suggest_values(
    axes: Sequence[GivenAxis], refused: Mapping[str, Collection[str]]
) -> str | None:
    """The first axis with only some values refused, as an option with its other values."""
    for axis in axes:
        written = refused.get(axis.key, ())
        kept = [one for one in axis.values if _write_override(axis, one) not in written]
        if written and kept:
            others = ",".join(_write_value(one).strip('"') for one in kept)
            return f"--axis {axis.key}={others}"
    return None


def _suggest_missing(
    axes: Sequence[GivenAxis], missing: Sequence[str], base_text: str
) -> str | None:
    """The options that set the missing keys, with the values of their examples, if all recipes
    accept these; None if only some values of an axis need the keys.
    """
    more = []
    for key in missing:
        found = find_keys(key)
        if found is None or len(found.keys) != 1 or found.keys[0].example is None:
            return None
        more.append(GivenAxis(key, key, (found.keys[0].example,)))
    if not more or _try_values([*axes, *more], base_text).lines:
        return None
    words = " ".join(f"--axis {axis.key}={axis.show_values()}" for axis in more)
    return f"add {words}"


def _write_override(axis: GivenAxis, value: Scalar) -> str:
    return f"{axis.key}={quote_yaml(value)}"


def _suggest_key(axes: Sequence[GivenAxis], unknown: Collection[str], base_text: str) -> str | None:
    """The option with the whole key of an axis that was named by a part of it or a short name."""
    dumped = parse_recipe(base_text, where="--axis").model_dump(mode="json")
    keys = [*_SHORT_NAMES, *_INSTEAD_OF]
    for section, values in dumped.items():
        if section != "run" and isinstance(values, dict):
            keys += [f"{section}.{name}" for name in values]
    key_of = {_SHORT_NAMES.get(key, ""): key for key in keys}
    key_of |= {key.rpartition(".")[2]: key for key in keys}
    key_of |= {name: name for name in _OTHER_NAMES}
    for axis in axes:
        section, name = axis.key.partition(".")[0], axis.key.rpartition(".")[2]
        close = difflib.get_close_matches(name, list(key_of), n=1)
        if close and (axis.key in unknown or section in unknown):
            return f"--axis {key_of[close[0]]}={axis.show_values()}"
    return None
