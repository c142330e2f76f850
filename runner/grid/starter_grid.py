"""Writes the files of the starter grid of `runner init`: `grid.yaml`, the recipe template, model
cards and the sweep.

`starter` chooses the values that suit the rows, `given_axes` reads the axes that the user wants.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runner.errors import RunnerError
from runner.grid.given_axes import COUNT_AXIS, LOSS_AXIS, GivenAxis
from runner.grid.spec import SEED_AXIS
from runner.grid.starter import (
    BATCH,
    DEMO_MODELS,
    GRID,
    DataPlan,
    choose_max_steps,
    find_package_dir,
)
from runner.grid.template import quote_yaml
from runner.grid.template_keys import drop_key, set_key
from runner.project_folder import TEMPLATES

_NUM_EVALUATIONS: Final = 6
_MIN_SEEDS: Final = 3
_FEW_SEEDS: Final = "one allows no verdict, two find only very large differences"
_QUESTION: Final = (
    "Does training only on the assistant's words beat training on every token, and how much do"
    " more rows help?"
)
_COMPARE: Final = """\
# The question of this grid, declared before its first run. The report confirms this comparison and
# calls all others exploratory. With `margin: 0.02` it also says if a difference is too small to
# matter.
compare:
  - {axis: loss, from: full, to: completion, metric: nll_per_completion_token}
"""
_COMPARE_NOTHING: Final = """\
# The question of this grid, declared before its first run. The report confirms this comparison and
# calls all others exploratory. Uncomment these lines, and name two values of an axis:
# compare:
#   - {axis: AXIS, from: VALUE, to: VALUE, metric: nll_per_completion_token}
"""


@dataclass(frozen=True)
class StarterGrid:
    """The contents of the starter grid: rows, a card for each model, and the user's axes."""

    data: DataPlan
    cards: Mapping[str, Mapping[str, Any]]
    axes: Sequence[GivenAxis] = ()

    def get_values(self, name: str, otherwise: Sequence[Any]) -> list[Any]:
        """The values of an axis that every starter grid has: the user's, or `otherwise`."""
        given = next((axis.values for axis in self.axes if axis.name == name), otherwise)
        return list(given)

    @property
    def more_axes(self) -> list[GivenAxis]:
        """The axes that only this grid has."""
        return [axis for axis in self.axes if not axis.is_starters]

    @property
    def counts(self) -> list[int]:
        """The sizes of the training sets."""
        return self.get_values(COUNT_AXIS, self.data.train_counts)

    def check_counts(self) -> None:
        """Raise RunnerError for a size that the rows do not allow."""
        typed = next((axis.typed for axis in self.axes if axis.name == COUNT_AXIS), COUNT_AXIS)
        if None in self.counts:
            raise RunnerError(
                f"`--axis {typed}=...`: got null, expected numbers of rows",
                hint=f"--axis samples={','.join(map(str, self.data.train_counts))}",
            )
        if max(self.counts) > self.data.num_train:
            raise RunnerError(
                f"`--axis {typed}=...`: got {max(self.counts)} for `data.{COUNT_AXIS}`, but"
                f" {self.data.num_train} rows are left to train on, after"
                f" {self.data.num_validation} for validation and {self.data.num_test} for test"
            )


def write_starter(project_dir: Path, grid: StarterGrid) -> None:
    """Write the starter grid, its cards and its sweep into a project that has stock templates."""
    values = _describe_rows(grid) | _describe_axes(grid)
    starter_dir = find_package_dir() / "grid" / "starter_files"
    templates_root = project_dir / TEMPLATES
    targets = {
        "grid.yaml": templates_root / GRID / "grid.yaml",
        "recipe.yaml.j2": templates_root / GRID / "recipe.yaml.j2",
        "sweep.sh": project_dir / "sweeps" / f"{GRID}.sh",
    }
    for name, target in targets.items():
        text = (starter_dir / name).read_text()
        # One pass over the text, because an inserted value may look like another mark.
        text = re.sub(r"@([A-Z_]+)@", lambda match: values.get(match[1], match[0]), text)
        if name == "recipe.yaml.j2":
            text = _write_axes(text, grid.more_axes)
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(text)
    for name, card in grid.cards.items():
        path = templates_root / "models" / f"{name}.yaml"
        if not path.exists():
            path.write_text("".join(f"{key}: {quote_yaml(value)}\n" for key, value in card.items()))


def _describe_rows(grid: StarterGrid) -> dict[str, str]:
    """The starter files' values for the rows, and for the updates that suit them."""
    data, counts = grid.data, grid.counts
    max_steps = choose_max_steps(max(counts))
    stated = [axis.values for axis in grid.axes if axis.key == "training.max_steps"]
    fewest = min(
        [one for values in stated for one in values if isinstance(one, int)] or [max_steps]
    )
    return {
        "TRAIN_COUNTS": quote_yaml(counts),
        "TRAIN_COUNTS_WORDS": " ".join(map(str, sorted(counts))),
        "SOURCES": _write_sources(data.sources),
        "TASK": "\n".join(_write_task(data)),
        "NUM_VALIDATION": str(data.num_validation),
        "NUM_TEST": str(data.num_test),
        "MAX_LENGTH": str(data.max_length),
        "BATCH": str(BATCH),
        "MAX_STEPS": str(max_steps),
        "EVAL_STEPS": str(math.ceil(fewest / _NUM_EVALUATIONS)),
        # A model of a million parameters learns nothing at the rate that suits a real one.
        "LEARNING_RATE": "4e-3" if set(grid.cards) <= set(DEMO_MODELS) else "2e-4",
    }


def _describe_axes(grid: StarterGrid) -> dict[str, str]:
    """The grid file's values for the axes and the declared comparison."""
    seeds = grid.get_values(SEED_AXIS, (1, 2, 3))
    losses = grid.get_values(LOSS_AXIS, ("full", "completion"))
    more = grid.more_axes
    parts = [
        "{{ model }}",
        f"{{{{ '%0{max(3, len(str(max(grid.counts))))}d' % num_train_samples }}}}",
        "{{ loss }}",
        *(axis.write_name() for axis in more),
        "seed{{ seed }}",
    ]
    return {
        "TITLE": _word_question(grid),
        "NAME": "_".join(parts),
        "MODELS": quote_yaml(list(grid.cards)),
        "LOSSES": f"[{', '.join(losses)}]",
        "AXES": "".join(f"  {axis.name}: {axis.write_values()} # {axis.key}\n" for axis in more),
        "SEEDS": quote_yaml(seeds),
        "SEEDS_WORDS": _word_seeds(len(seeds)),
        "COMPARE": _COMPARE if {"full", "completion"} <= set(losses) else _COMPARE_NOTHING,
    }


def _word_question(grid: StarterGrid) -> str:
    names = [axis.name for axis in grid.axes if len(axis.values) > 1 and axis.name != SEED_AXIS]
    if grid.more_axes or LOSS_AXIS in [axis.name for axis in grid.axes]:
        return f"Which values are best: {', '.join(names)}?" if names else "A grid of one setting"
    return _QUESTION


def _word_seeds(num_seeds: int) -> str:
    if num_seeds >= _MIN_SEEDS:
        times = {3: "three times", 5: "five times"}.get(num_seeds, f"{num_seeds} times")
        return f"each cell is trained {times}: {_FEW_SEEDS}"
    return f"runs of each cell: {_FEW_SEEDS}"


def _write_axes(template: str, axes: Sequence[GivenAxis]) -> str:
    """The recipe template with the axes in place of fixed values."""
    for axis in axes:
        if axis.replaces:
            template = drop_key(template, axis.replaces)
        template = set_key(template, axis.key, axis.expression)
        section, _, key = axis.key.partition(".")
        if section == "model":  # keys that depend on the card now depend on the axis
            template = re.sub(rf"\bcard\.{key}\b", axis.variable, template)
    return template


def _write_task(data: DataPlan) -> list[str]:
    """The lines of the recipe below `data.task:`."""
    lines = [f"    {key}: {_quote_text(value)}" for key, value in data.task.items()]
    if data.ignored:
        ignored = _quote_text(list(data.ignored))
        lines.append(f"  ignore: {ignored} # these are not used in any row's text")
    return lines


def _quote_text(value: str | list[str]) -> str:
    """Texts as YAML in which Jinja finds no expression, whatever they contain."""
    return re.sub(r"\{(?=[{%#])", r"\\x7b", quote_yaml(value))


def _write_sources(sources: Mapping[str, Mapping[str, str]]) -> str:
    """The data sources of a recipe as YAML, below `data`."""
    lines = []
    for split in ("train", "validation", "test"):
        if split in sources:
            lines.append(f"  {split}:")
            lines += [f"    {key}: {quote_yaml(text)}" for key, text in sources[split].items()]
        else:
            lines.append(f"  {split}: null # taken from `train`")
    return "\n".join(lines)
