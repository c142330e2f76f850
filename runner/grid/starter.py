"""Fits the starter grid of `runner init` to a user's rows and models, and finds the stock files.

Stock files (grids, model cards, chat templates, launch configs, sweeps, data samples) are at the
top of the source tree; a wheel holds them in `runner/stock`. `data` reads the data files, as it
does for training.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from importlib.resources import files
from itertools import islice
from pathlib import Path
from typing import Any, Final, Literal

from pydantic import ValidationError

from runner.data.tasks.base import (
    EMPTY,
    Example,
    Examples,
    UnusedColumnsError,
    find_meaning,
)
from runner.data.tasks.prompt_completion import PromptCompletionTask
from runner.data.tasks.prompts import describe_unfillable, list_unfillable
from runner.errors import DataError, RunnerError
from runner.grid.column_hints import (
    find_constant_columns,
    list_column_sets,
    list_columns,
    suggest_columns,
)
from runner.grid.empty_texts import Given, count_empty, refuse_empty_columns
from runner.grid.given_data import GivenData
from runner.grid.spec import list_grids, load_cards
from runner.project_folder import TEMPLATES
from runner.recipe.data_section import DataSection, DataSource, find_tasks
from runner.recipe.problems import list_problems, suggest

SHARED_FOLDERS: Final = ("accelerate_configs", "ds_configs")


def find_package_dir() -> Path:
    """The folder of the package, which contains the starter grid."""
    return Path(str(files("runner")))


def find_stock_dir() -> Path:
    """The folder of the stock files: inside an installed package, or around it in a source tree."""
    package_dir = find_package_dir()
    for folder in (package_dir / "stock", package_dir.parent):
        if (folder / TEMPLATES).is_dir():
            return folder
    raise RunnerError(
        f"the stock files are missing next to {package_dir}", hint="pip install --force-reinstall ."
    )


def list_stock_grids(stock_dir: Path) -> Mapping[str, str]:
    """Every stock grid with the first comment of its grid file."""
    titles: dict[str, str] = {}
    for grid in list_grids(stock_dir / TEMPLATES):
        first_line = (stock_dir / TEMPLATES / grid / "grid.yaml").read_text().partition("\n")[0]
        titles[grid] = first_line.lstrip("# ") if first_line.startswith("#") else ""
    return titles


def require_stock_grid(stock_dir: Path, grid: str) -> None:
    """Raise RunnerError, listing all stock grids, for a name that is not one of them."""
    titles = list_stock_grids(stock_dir)
    if grid not in titles:
        width = max(map(len, titles))
        listed = "\n".join(f"  {name:<{width}}  {title}" for name, title in titles.items())
        raise RunnerError(
            f"there is no stock grid {grid!r}{suggest(grid, list(titles))}\n\n{listed}"
        )


GRID: Final = "first"
# The models that `runner demo-models` builds, by the names of their cards.
DEMO_MODELS: Final[Mapping[str, str]] = {
    "demo-gemma": "demo_models/gemma",
    "demo-llama": "demo_models/llama",
}
# The role of every other message from the first on, in chats that all chat templates accept.
_PLAIN_ROLES: Final = ("user", "assistant")
_CARD_KEYS: Final = (
    "path",
    "dtype",
    "attn_implementation",
    "chat_template",
    "pad_token",
    "target_modules",
)
_MIN_ROWS: Final = 4
_NUM_FIRST_ROWS: Final = 100  # read to suggest columns
_MAX_HELD_OUT: Final = 100
_MAX_TRAIN: Final = 1000
BATCH: Final = 8  # rows of one update
_MIN_STEPS: Final = 12
_LENGTHS: Final = (128, 256, 512, 1024, 2048, 4096)
_NO_TEMPLATE: Final = "recipe_templates/chat/human_assistant.jinja"
_UNREMARKABLE_COLUMNS: Final = ("id", "idx")  # not worth a note if unread


@dataclass(frozen=True)
class DataPlan:
    """The task, the splits and the numbers that suit a user's rows.

    `sources` has the recipe's keys of each split that has its own rows. `num_rows` counts the
    distinct rows for training and for splits without their own rows. `unused` are columns and keys
    of messages that are not read; `ignored` are those of them that the recipe must list.
    """

    sources: Mapping[str, Mapping[str, str]]
    task: Mapping[str, str]
    num_rows: int
    unused: tuple[str, ...]
    ignored: tuple[str, ...]
    left_out: tuple[str, ...]  # the rows that the task or the splits leave out, one line each
    empty: tuple[str, ...]  # the rows with an empty prompt or answer, one line each
    num_validation: int
    num_test: int
    num_train: int  # rows left for training
    train_counts: tuple[int, ...]
    max_length: int  # tokens
    num_system: int  # rows with a system turn
    num_irregular: int  # rows without one, with turns not alternating between user and assistant


@dataclass(frozen=True)
class GivenColumns:
    """The user's column, or text with columns, for the prompt, and the column of the answer."""

    prompt: str | None = None
    completion: str | None = None


def plan_data(given: GivenData, columns: GivenColumns) -> DataPlan:
    """The task and splits that suit the rows. Raises: RunnerError, also for rows that cannot be
    read.
    """
    from runner.data.draw import draw_splits
    from runner.data.sources import load_rows

    head = list(islice(load_rows(given.sources["train"]), _NUM_FIRST_ROWS))
    if not head:
        raise RunnerError(f"{given.name} holds no rows")
    first = head[0]
    constant = find_constant_columns([row for _, row in head])
    task = state_task(columns, first[1], constant) or detect_task(first[1], first[0], constant)

    def read(num_held_out: int, ignored: Sequence[str] = ()) -> DataSection:
        sources = {split: source.model_dump() for split, source in given.sources.items()}
        # A split with its own rows uses all of them.
        counts = {
            f"num_{split}_samples": num_held_out
            for split in ("validation", "test")
            if split not in sources
        }
        rest = {"task": task, "ignore": list(ignored), "seed": 42, "max_length": 1}
        section = DataSection.model_validate_json(json.dumps({**sources, **counts, **rest}))
        return section.model_copy(update=dict(given.sources))  # keeps the keys that they state

    rows = Given(read(1).task, given.name, first[1], columns.prompt)
    examples, ignored = _build_examples(rows, given.sources)
    empty = count_empty(rows, {split: one.examples for split, one in examples.items()})
    num_bytes = {
        split: {one.key: _count_bytes(one) for one in examples[split].examples}
        for split in examples
    }  # of each distinct row
    num_rows = len(num_bytes["train"])
    if num_rows < _MIN_ROWS:
        found = f"{num_rows} different {'row' if num_rows == 1 else 'rows'}"
        raise RunnerError(
            f"{given.name} holds {found}, but training, validation and test need {_MIN_ROWS}"
        )
    # Rows of one group stay together, so fewer may be left.
    distinct = {one.key: one for those in examples.values() for one in those.examples}
    kinds = Counter(map(_classify_turns, distinct.values()))
    splits = draw_splits(read(max(1, min(_MAX_HELD_OUT, num_rows // 6)), ignored))
    unused = dict.fromkeys(
        name for those in examples.values() for name in those.unused if _is_news(name)
    )
    return DataPlan(
        sources=given.describe_sources(),
        task=task,
        num_rows=num_rows,
        unused=(*unused, *ignored),
        ignored=ignored,
        left_out=tuple(splits.left_out.describe()),
        empty=tuple(empty),
        num_validation=min(_MAX_TRAIN, len(splits.validation)),
        num_test=min(_MAX_TRAIN, len(splits.test)),
        num_train=len(splits.train),
        train_counts=choose_train_counts(len(splits.train)),
        max_length=guess_max_length(max(max(sizes.values()) for sizes in num_bytes.values())),
        num_system=kinds["system"],
        num_irregular=kinds["irregular"],
    )


def _build_examples(
    given: Given, sources: Mapping[str, DataSource]
) -> tuple[dict[str, Examples], tuple[str, ...]]:
    """The examples of each split, and the names that the recipe must ignore. Raises: DataError,
    also if such a name has a known meaning, because only the user may leave that out.
    """
    from runner.data.draw import ignore_columns
    from runner.data.sources import load_rows

    examples: dict[str, Examples] = {}
    ignored: dict[str, None] = {}

    def build(source: DataSource) -> Examples:
        # Rows that differ only in ignored columns are duplicates, as in training.
        rows = (
            (where, ignore_columns(row, ignored, Counter())) for where, row in load_rows(source)
        )
        return given.task.build_examples(rows)

    for split, source in sources.items():
        try:
            examples[split] = build(source)
        except UnusedColumnsError as error:
            if any(find_meaning(name) for name in error.names):
                raise
            ignored |= dict.fromkeys(error.names)
            examples[split] = build(source)
        except DataError:
            refuse_empty_columns(given, source)  # says more than the first row's problem
            raise
    return examples, tuple(ignored)


def _classify_turns(example: Example) -> Literal["plain", "system", "irregular", "tools"]:
    """The kind of a chat: the chat template of demo-gemma accepts only plain ones, that of
    demo-llama all but tools.
    """
    roles = [message["role"] for message in example.messages]
    if example.tools or "tool" in roles:
        return "tools"
    if "system" in roles:
        return "system"
    is_plain = all(role == _PLAIN_ROLES[at % 2] for at, role in enumerate(roles))
    return "plain" if is_plain else "irregular"


def _count_bytes(example: Example) -> int:
    """The bytes of all texts of an example, and of its calls and tools as JSON."""
    texts = [json.dumps(example.tools)] if example.tools else []
    for message in example.messages:
        for key, value in message.items():
            if key != "role":
                texts.append(value if isinstance(value, str) else json.dumps(value, default=str))
    return len("".join(texts).encode())


def _is_news(name: str) -> bool:
    return name not in _UNREMARKABLE_COLUMNS and not name.endswith(EMPTY)


def detect_task(row: Any, where: str, constant: Collection[str] = ()) -> Mapping[str, str]:
    """The task section for rows like this one; errors suggest no `constant` column. Raises:
    RunnerError.
    """
    tasks = sorted(find_tasks(), key=lambda task: task.RECOGNITION_ORDER)
    for task in tasks:
        found = task.recognise(row)
        if found is not None:
            return found.section
    sets = [needed for task in tasks for needed, _ in task.RECOGNISED_BY]
    raise RunnerError(
        f"{where}: cannot tell the task from the columns: {list_columns(row)}",
        hint=(
            f"name the columns of the prompt and the answer, for example"
            f" {suggest_columns(row, taken=constant)}\n"
            f"{list_column_sets(row, sets)}"
            "      or, if Python must build the rows: start without --data, and write"
            " `data.train.path` and\n"
            "      `data.task: {name: python, function: rows.py:build}` into"
            " recipe_templates/first/recipe.yaml.j2"
        ),
    )


def state_task(
    columns: GivenColumns, row: Any, constant: Collection[str] = ()
) -> Mapping[str, str] | None:
    """The task section for the columns that the user names, or None; errors suggest no `constant`
    column. Raises: RunnerError.
    """
    prompt, completion = columns.prompt, columns.completion
    if prompt is None and completion is None:
        return None
    if prompt is None or completion is None:
        missing = "--prompt" if prompt is None else "--completion"
        raise RunnerError(
            f"`{missing}` is missing: --prompt and --completion go together"
            f"\n\ncolumns: {list_columns(row)}",
            hint=suggest_columns(row, prompt, completion, constant),
        )
    if isinstance(row, Mapping):
        _refuse_no_columns(prompt, completion, row)
    # A bare column, whose name may contain characters that `{...}` does not allow.
    is_column = isinstance(row, Mapping) and prompt in row
    section = {
        "name": "prompt_completion",
        "prompt_column" if is_column else "prompt": prompt,
        "completion_column": completion,
    }
    try:
        PromptCompletionTask.model_validate_json(json.dumps(section))
    except ValidationError as error:
        problems = list_problems(error, PromptCompletionTask, section, "")
        what = problems[0].what
        raise RunnerError(
            f"`--prompt`: {what}\n\ncolumns: {list_columns(row)}",
            hint=suggest_columns(row, prompt, completion, constant),
        ) from None
    return section


# Python's notation for nested values: `{chat.question}`, `{chat[0]}`.
_NESTED: Final = re.compile(r"\{([^\W\d]\w*)[.\[][^{}]*\}")


def _refuse_no_columns(prompt: str, completion: str, row: Mapping[str, Any]) -> None:
    """Raise RunnerError if the answer is not a column, or if the prompt names a nested value or
    a column that braces cannot hold.
    """
    if prompt not in row:
        for name in list_unfillable(prompt, row):
            raise RunnerError(
                f"`--prompt`: {describe_unfillable(name)}",
                hint=(
                    f"rename the column; or make it the whole prompt:"
                    f" --prompt {shlex.quote(name)} --completion {shlex.quote(completion)}"
                ),
            )
        for match in _NESTED.finditer(prompt):
            if match[1] in row:
                raise _build_nested(f"`--prompt`: {match[0]}", match[1])
    if completion in row:
        return
    column = re.split(r"[.\[]", completion.strip("{}"))[0]
    if column in row and column != completion.strip("{}"):
        raise _build_nested(f"`--completion {completion}`", column)
    names = [str(name) for name in row]
    what = f"`--completion {completion}`: the rows have no such column"
    raise RunnerError(
        f"{what}{suggest(completion.strip('{}'), names)}\n\ncolumns: {list_columns(row)}"
    )


def _build_nested(what: str, column: str) -> RunnerError:
    return RunnerError(
        f"{what} is inside the column `{column}`: a nested value cannot be used",
        hint=(
            "name a top-level column, or start without --data and write a Python function"
            " (`data.task: {name: python, function: rows.py:build}`)"
        ),
    )


def choose_train_counts(num_left: int) -> tuple[int, ...]:
    """A quarter and all of the rows that are left for training, within bounds.

    >>> [choose_train_counts(num_left) for num_left in (320, 2, 1, 100_000)]
    [(80, 320), (1, 2), (1,), (250, 1000)]
    """
    largest = min(_MAX_TRAIN, num_left)
    return tuple(sorted({max(1, largest // 4), largest}))


def choose_max_steps(num_rows: int) -> int:
    """The updates of eight rows in three passes over the largest training set, with a minimum so
    that the model learns anything.

    >>> [choose_max_steps(num_rows) for num_rows in (2, 320, 1000)]
    [12, 120, 375]
    """
    return max(_MIN_STEPS, 3 * math.ceil(num_rows / BATCH))


def guess_max_length(num_bytes: int) -> int:
    """A `max_length` in tokens that fits a row of `num_bytes`, at two bytes per token, up to a
    length that common models accept.

    >>> guess_max_length(300), guess_max_length(100_000)
    (256, 4096)
    """
    return next((length for length in _LENGTHS if 2 * length >= num_bytes + 64), _LENGTHS[-1])


def build_cards(
    models: Sequence[str], plan: DataPlan, templates_root: Path, project_dir: Path
) -> dict[str, Mapping[str, Any]]:
    """A card for every `--model`, by name: a stock card, or a new one from the model's folder.
    Without models, the card of a demo model that accepts the rows.
    """
    if not models:
        models = ["demo-llama" if plan.num_system or plan.num_irregular else "demo-gemma"]
    stock = load_cards(templates_root)
    cards: dict[str, Mapping[str, Any]] = {}
    for model in models:
        name, card = _find_card(model, stock, project_dir)
        if name in cards:
            raise RunnerError(
                f"two of the models would be called {name!r};"
                " name one --model, and add the other card by hand"
            )
        cards[name] = card
    return cards


def _find_card(
    model: str, stock: Mapping[str, Mapping[str, Any]], project_dir: Path
) -> tuple[str, Mapping[str, Any]]:
    folder = Path(model).expanduser()
    if not folder.exists():
        for name, path in DEMO_MODELS.items():
            if model in (name, path):
                return name, _new_card(path, "float32", None)
        for name, card in stock.items():
            if model.lower() in (name.lower(), str(card["path"]).lower()):
                return name, {key: card[key] for key in _CARD_KEYS}
        if not re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", model):
            raise RunnerError(
                f"`--model {model}` does not exist,"
                " and it is not a hub id like google/gemma-2-2b-it",
                hint=f"name a folder, a hub id, or one of the stock cards {', '.join(stock)}",
            )
        return _name_card(model, stock), _new_card(model, "bfloat16", None)
    config_path = folder / "config.json"
    if not config_path.is_file():
        raise RunnerError(f"`--model {model}`: the folder has no config.json, so it is not a model")
    try:
        config = json.loads(config_path.read_text())
        dtype = config.get("dtype") or config.get("torch_dtype")
    except (ValueError, AttributeError) as error:
        raise RunnerError(f"{config_path} cannot be read: {error}") from None
    dtype = dtype if dtype in ("float32", "bfloat16", "float16") else "bfloat16"
    path = str(folder) if folder.is_absolute() else _relative_to(folder, project_dir)
    template = None if _has_chat_template(folder) else _NO_TEMPLATE
    return _name_card(folder.resolve().name, stock), _new_card(path, dtype, template)


def _relative_to(folder: Path, project_dir: Path) -> str:
    """The path relative to the project, as in recipes; on the command line it is relative to the
    current folder.
    """
    return os.path.relpath(folder.resolve(), project_dir.resolve())


def _has_chat_template(folder: Path) -> bool:
    if any((folder / name).exists() for name in ("chat_template.jinja", "chat_template.json")):
        return True
    try:
        return bool(json.loads((folder / "tokenizer_config.json").read_text()).get("chat_template"))
    except (OSError, ValueError, AttributeError):
        return False


def _name_card(model: str, stock: Mapping[str, Any]) -> str:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", model.rpartition("/")[2]).strip(".-_")[:60] or "model"
    return f"{name}-own" if name in stock else name


def _new_card(path: str, dtype: str, chat_template: str | None) -> dict[str, Any]:
    values = (path, dtype, None, chat_template, "auto", "all-linear")
    return dict(zip(_CARD_KEYS, values, strict=True))
