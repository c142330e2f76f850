"""`runner init`: makes a folder in which every other verb works, with a starter grid or a copy of a
stock grid.

Defines the layout of a project. Everything is made and rendered in a hidden folder, which is then
renamed, so a failure leaves nothing behind.
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Final

from runner.data.tasks.prompts import list_placeholders
from runner.errors import GridError, RefusedError, RunnerError
from runner.grid import starter as init_starter
from runner.grid.given_axes import (
    BY_HAND,
    MODEL_AXIS,
    check_given_axes,
    list_given_models,
    read_given_axes,
)
from runner.grid.given_data import GivenData, open_given_data
from runner.grid.recipe_files import RenderedGrid
from runner.grid.render import render_grid
from runner.grid.spec import list_grids
from runner.grid.starter import SHARED_FOLDERS, find_stock_dir, require_stock_grid
from runner.grid.starter_grid import StarterGrid, write_starter
from runner.project_folder import MARKER_TEXT, SETTINGS_FILE, TEMPLATES
from runner.recipe.contents import list_content_paths
from runner.recipe.parse import Recipe, parse_recipe
from runner.text import format_count

_SAMPLE: Final = "data/demo.jsonl"
_SAMPLE_WORDS: Final = "made-up chats of a customer with a shop, and a summary of each"
_MAX_LISTED: Final = 8
_IGNORED: Final = (
    "# Runs stay on this machine; recipes, templates and data are committed.\n/runs/\n"
)
_BUILD_DEMO_MODELS: Final = "runner demo-models"


@dataclass(frozen=True)
class Project:
    """The new project: its grid, a summary of its recipes, notes and the next commands."""

    grid: str
    summary: str
    notes: tuple[str, ...]
    commands: tuple[tuple[str, str], ...]  # (command, its purpose)


@dataclass(frozen=True)
class Wishes:
    """The user's options for the starter grid: `--data`, `--model`, `--axis`, `--prompt`,
    `--completion`.
    """

    data: Sequence[str] = ()
    models: Sequence[str] = ()
    axes: Sequence[str] = ()
    prompt: str | None = None
    completion: str | None = None

    def name_option(self) -> str | None:
        """One of the given options, None if there are none."""
        given = {
            "--data": self.data,
            "--model": self.models,
            "--axis": self.axes,
            "--prompt": self.prompt,
            "--completion": self.completion,
        }
        # An empty text counts as given.
        return next((option for option, value in given.items() if value or value == ""), None)


@dataclass(frozen=True)
class _Starter:
    """The starter grid as it will be written."""

    given: GivenData
    is_own: bool  # the user's rows, not our sample
    grid: StarterGrid


@dataclass
class _Needs:
    """The rows and models that recipes name: those that were copied, and those that are missing."""

    # A dict keeps the order and holds each name once.
    missing_data: dict[str, None] = field(default_factory=dict)
    shipped_data: dict[str, None] = field(default_factory=dict)
    samples: dict[str, None] = field(default_factory=dict)
    hub_data: dict[str, None] = field(default_factory=dict)
    hub_models: dict[str, None] = field(default_factory=dict)
    needs_demo_models: bool = False


def init_project(target: Path, from_grid: str | None, wishes: Wishes) -> int:
    """Make the project and print the next commands. Raises: RunnerError; nothing is left behind."""
    if from_grid is not None and (option := wishes.name_option()) is not None:
        raise RunnerError(
            f"{option} goes with the starter grid, but --from {from_grid} copies a grid unchanged",
            hint=(
                f"runner init {shlex.quote(str(target))} --from {from_grid}, then edit "
                f"recipe_templates/{from_grid} and run `runner render`"
            ),
        )
    stock_dir = find_stock_dir()
    if from_grid is not None:
        require_stock_grid(stock_dir, from_grid)
    _refuse_occupied(target)
    if from_grid is not None:
        _make_project(stock_dir, target, from_grid, None)
        return 0
    axes = read_given_axes(wishes.axes)
    models = [*wishes.models, *list_given_models(axes)]
    if wishes.models and len(models) > len(wishes.models):
        raise RunnerError("`--model` and `--axis model=...` mean the same: leave one of them out")
    with open_given_data(wishes.data or [str(stock_dir / _SAMPLE)]) as given:
        columns = init_starter.GivenColumns(wishes.prompt, wishes.completion)
        plan = init_starter.plan_data(given, columns)
        cards = init_starter.build_cards(models, plan, stock_dir / TEMPLATES, target)
        axes = [axis for axis in axes if axis.name != MODEL_AXIS]
        starter = _Starter(given, bool(wishes.data), StarterGrid(plan, cards, axes))
        _make_project(stock_dir, target, init_starter.GRID, starter)
    return 0


def _make_project(stock_dir: Path, target: Path, grid: str, starter: _Starter | None) -> None:
    """Make and render the project, with a starter grid or a copy of a stock grid, and print the
    next commands.
    """
    with _staged(target) as staging_dir:
        _copy_shared(stock_dir, staging_dir)
        if starter is None:
            _copy_grid(stock_dir, staging_dir, grid)
            rendered = render_grid(staging_dir / TEMPLATES, grid)
        else:
            for path, source_path in starter.given.copies.items():
                _copy(source_path, staging_dir / path)
            rendered = _write_starter(staging_dir, starter.grid)
            _make_executable(staging_dir / "sweeps" / f"{grid}.sh")
        recipes = [parse_recipe(text, where=name) for name, text in rendered.texts.items()]
        needs = _copy_samples(stock_dir, staging_dir, recipes)
        project = _describe(
            target, rendered, recipes, needs, [] if starter is None else _describe_starter(starter)
        )
        (staging_dir / "README.md").write_text(_build_readme(target, project))
        (staging_dir / SETTINGS_FILE).write_text(MARKER_TEXT)
        (staging_dir / ".gitignore").write_text(
            _IGNORED + ("/demo_models/\n" if needs.needs_demo_models else "")
        )
    print("\n".join(_build_message(target, project)))


def _write_starter(staging_dir: Path, grid: StarterGrid) -> RenderedGrid:
    """Write and render the starter grid. Raises: RunnerError, also for axes that do not fit the
    recipe.
    """
    templates_root = staging_dir / TEMPLATES
    if grid.axes:
        write_starter(staging_dir, replace(grid, axes=()))
        base = render_grid(templates_root, init_starter.GRID)
        check_given_axes(grid.axes, next(iter(base.texts.values())))
        grid.check_counts()
    try:
        write_starter(staging_dir, grid)
        return render_grid(templates_root, init_starter.GRID)
    except GridError as error:
        # The hidden folder will not exist any more.
        message = error.message.replace(f"{staging_dir}/", "")
        hint = error.hint or (BY_HAND if grid.axes else None)
        raise GridError(message, hint=hint) from None


def _refuse_occupied(target: Path) -> None:
    if target.is_symlink() and not target.exists():
        raise RefusedError(f"{target} is a broken link")
    if not target.exists():
        return
    if not target.is_dir():
        raise RefusedError(f"{target} is a file; `runner init` makes a folder")
    names = sorted(path.name for path in target.iterdir())
    if names:
        raise RefusedError(
            f"{target} is not empty, so nothing was written; it contains {_shorten(names)}",
            hint="name a folder that is empty or does not exist yet",
        )


def _shorten(names: Sequence[str]) -> str:
    more = f" and {len(names) - _MAX_LISTED} more" if len(names) > _MAX_LISTED else ""
    return ", ".join(names[:_MAX_LISTED]) + more


@contextmanager
def _staged(target: Path) -> Iterator[Path]:
    """A hidden folder that becomes `target` on success and is removed on failure.

    An empty `target` is kept, because it may be a mount point or a shell's working directory. The
    files then move into it.
    """
    home = target if target.exists() else target.absolute().parent
    home.mkdir(parents=True, exist_ok=True)
    staging_dir = home / f".{target.absolute().name}.init-{os.getpid()}"
    moved: list[Path] = []
    try:
        staging_dir.mkdir()
        yield staging_dir
        if home is target:
            for child in sorted(staging_dir.iterdir()):
                moved.append(target / child.name)
                child.rename(moved[-1])
        else:
            staging_dir.rename(target)
    except BaseException:
        for path in moved:
            shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(staging_dir, ignore_errors=True)


def _copy_shared(stock_dir: Path, project_dir: Path) -> None:
    """Copy launch configs and the files that templates share: cards, chat templates, and other
    folders that are not grids.
    """
    grids = list_grids(stock_dir / TEMPLATES)
    folders = [
        *SHARED_FOLDERS,
        *(f"{TEMPLATES}/{path.name}" for path in sorted((stock_dir / TEMPLATES).iterdir())),
    ]
    for folder in folders:
        if Path(folder).name not in grids:
            _copy(stock_dir / folder, project_dir / folder)


def _copy_grid(stock_dir: Path, project_dir: Path, grid: str) -> None:
    _copy(stock_dir / TEMPLATES / grid, project_dir / TEMPLATES / grid)
    sweep = Path("sweeps") / f"{grid}.sh"
    if (stock_dir / sweep).exists():
        _copy(stock_dir / sweep, project_dir / sweep)
        _make_executable(project_dir / sweep)


def _describe_starter(starter: _Starter) -> list[str]:
    """Notes on the starter grid's use of the rows and models, one line each."""
    given, plan = starter.given, starter.grid.data
    path = given.path
    prompts = list_placeholders(plan.task.get("prompt", ""))
    columns = [", ".join(prompts)] if prompts else []
    columns += [
        value
        for key, value in plan.task.items()
        if key.endswith("_column") and value not in prompts
    ]
    task = ": ".join([plan.task["name"], *([" -> ".join(columns)] if columns else [])])
    notes = [f"{path}: {format_count(plan.num_rows, 'different row')}, read as {task}"]
    if not starter.is_own:
        notes.append(f"{path} comes with the runner: {_SAMPLE_WORDS}; your own rows: --data FILE")
    if starter.is_own and given.copies:
        notes.append(
            f"{path} is a copy of {given.name}: edit the copy, or name another file in the template"
        )
    unsaid = [one for one in plan.unused if not any(f"`{one}`" in said for said in plan.left_out)]
    if unsaid:
        notes.append(f"not read, columns of {path}: {', '.join(unsaid)}")
    notes += [f"left out of {path}: {line}" for line in plan.left_out]
    notes += plan.empty
    if plan.ignored:
        notes.append("`data.ignore` in the recipe lists the ones that may hold content")
    own = [split for split in plan.sources if split != "train"]
    notes.append(
        f"rows: {plan.num_validation} for validation, {plan.num_test} for test, "
        f"{' or '.join(map(str, starter.grid.counts))} to train on"
        + (f"; from separate files: {', '.join(own)}" if own else "")
    )
    notes += _describe_turns(starter)
    for name, card in starter.grid.cards.items():
        template = card["chat_template"] or "the tokenizer's own"
        notes.append(f"model {name}: {card['path']}, {card['dtype']}, chat template: {template}")
    notes += [
        f"axis {axis.name}: {axis.key}={axis.show_values()}" for axis in starter.grid.more_axes
    ]
    keys = {axis.key for axis in starter.grid.more_axes}
    if "adapter.r" in keys and "adapter.lora_alpha" not in keys:
        notes.append("adapter.lora_alpha is fixed, so the scale lora_alpha / r changes with r")
    return notes


def _describe_turns(starter: _Starter) -> list[str]:
    """A note on rows that the chat templates of some models refuse; empty if there are none."""
    plan, cards = starter.grid.data, starter.grid.cards
    kinds = []
    if plan.num_system:
        kinds.append(f"{format_count(plan.num_system, 'row')} with a system turn")
    if plan.num_irregular:
        kinds.append(
            f"{format_count(plan.num_irregular, 'row')} with turns that do not alternate between"
            " user and assistant"
        )
    if not kinds:
        return []
    if "demo-gemma" in cards:
        return [f"demo-gemma refuses {' and '.join(kinds)}; --model demo-llama accepts them"]
    if "demo-llama" in cards:
        return [f"{' and '.join(kinds)}, which demo-gemma would refuse"]
    return [f"{' and '.join(kinds)}, which some chat templates refuse: see `runner check`"]


def _copy_samples(stock_dir: Path, project_dir: Path, recipes: Sequence[Recipe]) -> _Needs:
    """Copy the shipped rows that the recipes name, or samples in their schema. Returns all names of
    rows and models.
    """
    needs = _Needs()
    for recipe in recipes:
        local = set(list_content_paths(recipe).values())
        for source in recipe.data.sources.values():
            if (project_dir / source.path).exists():
                continue
            is_ours = source.path.startswith("data/") and ".." not in Path(source.path).parts
            if is_ours and (stock_dir / source.path).exists():
                _copy(stock_dir / source.path, project_dir / source.path)
                needs.shipped_data[source.path] = None
                continue
            for sample in (f"data/{recipe.data.task.name}", f"data/{recipe.run.grid}_sample"):
                if (stock_dir / sample).is_dir():
                    _copy(stock_dir / sample, project_dir / sample)
                    needs.samples[sample] = None
            is_local = is_ours or source.path in local
            (needs.missing_data if is_local else needs.hub_data)[source.path] = None
        if recipe.model.path.startswith("demo_models/"):
            needs.needs_demo_models = True
        elif not Path(recipe.model.path).is_absolute() and not recipe.model.path.startswith("."):
            needs.hub_models[recipe.model.path] = None
    return needs


def _copy(source: Path, target: Path) -> None:
    """Copy contents without modes, because an installed package may be read-only."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if source.is_dir():
        ignored = shutil.ignore_patterns("__pycache__", "*.pyc", ".*")
        shutil.copytree(
            source, target, ignore=ignored, copy_function=shutil.copyfile, dirs_exist_ok=True
        )
        return
    shutil.copyfile(source, target)


def _make_executable(path: Path) -> None:
    mode = path.stat().st_mode
    path.chmod(mode | (mode & 0o444) >> 2)  # everyone who may read it, according to the umask


def _describe(
    target: Path,
    rendered: RenderedGrid,
    recipes: Sequence[Recipe],
    needs: _Needs,
    notes: Sequence[str],
) -> Project:
    grid = rendered.grid
    axes = " x ".join(f"{len(labels)} {axis}" for axis, labels in _collect_labels(recipes).items())
    more = []
    if needs.shipped_data:
        more.append(f"rows: a sample that comes with the runner: {', '.join(needs.shipped_data)}")
    if needs.missing_data:
        more.append(
            "rows that do not come with the runner; put yours there:"
            f" {_shorten(list(needs.missing_data))}"
        )
    more += [f"rows come from the hub: {', '.join(needs.hub_data)}"] if needs.hub_data else []
    if needs.samples:
        more.append(
            "a few rows in the same schema, to try with `data.train.path=...`:"
            f" {', '.join(needs.samples)}"
        )
    if needs.hub_models:
        more.append(
            f"models come from the hub: {', '.join(needs.hub_models)}"
            " (a gated one needs `hf auth login`)"
        )
    folder = os.path.relpath(target.absolute())
    commands = [(f"cd {shlex.quote(folder)}", "")] if folder != "." else []
    if needs.needs_demo_models:
        commands.append(
            (_BUILD_DEMO_MODELS, "builds small models for trying things: offline, about a minute")
        )
    commands += [
        ("runner render", f"recipe_templates/{grid} -> recipes/{grid}"),
        (
            f"runner check recipes/{grid}",
            "checks rows, lengths, truncation, labels before any device time",
        ),
        (f"runner sweep recipes/{grid} --dry-run", "shows the runs that would start"),
        (f"runner sweep recipes/{grid}", "after an interruption, run it again: it resumes"),
        (f"runner report recipes/{grid}", ""),
    ]
    return Project(
        grid,
        f"the grid `{grid}`, {format_count(len(recipes), 'recipe')} ({axes})",
        (*notes, *more),
        tuple(commands),
    )


def _collect_labels(recipes: Sequence[Recipe]) -> dict[str, dict[str, None]]:
    """The distinct labels on each axis."""
    labels: dict[str, dict[str, None]] = {}
    for recipe in recipes:
        for axis, label in recipe.run.axes.items():
            labels.setdefault(axis, {})[json.dumps(label)] = None
    return labels


def _build_message(target: Path, project: Project) -> list[str]:
    lines = [
        f"{target} is ready: {project.summary}",
        *(f"  {note}" for note in project.notes),
        "",
        "next:",
    ]
    return lines + _list_commands(project.commands)


def _list_commands(commands: Sequence[tuple[str, str]]) -> list[str]:
    width = max(len(command) for command, _ in commands)
    return [
        f"  {command:<{width}}  # {why}" if why else f"  {command}" for command, why in commands
    ]


def _build_readme(target: Path, project: Project) -> str:
    commands = [
        line[2:]
        for line in _list_commands(
            [one for one in project.commands if not one[0].startswith("cd ")]
        )
    ]
    notes = "".join(f"- {note}\n" for note in project.notes)
    return _README.format(
        title=target.absolute().name, grid=project.grid, notes=notes, commands="\n".join(commands)
    )


_README: Final = """\
# {title}

{notes}
```bash
{commands}
```

- `recipe_templates/{grid}/grid.yaml`: the axes. `recipe.yaml.j2` next to it: \
everything else in a recipe.
- `recipe_templates/models/`: one card per base model. \
`recipe_templates/chat/`: chat templates for models that have none.
- `recipes/{grid}/`: one generated recipe per run. Change the template, then run `runner render`. \
Commit them.
- `runs/{grid}/`: logs, checkpoints, scores and models, one folder per run. Not committed.
- `runner.toml`: marks this folder as the project. Paths in recipes are relative to it, \
wherever `runner` is started.
- `accelerate_configs/`, `ds_configs/`: launch settings. `sweeps/{grid}.sh`: runs the grid from \
bash.
"""
