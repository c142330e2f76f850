"""Draws the rows of each split: the same for every model, prompt, template and loss mode.

Rows are ordered by a seeded hash of their group (the row's own key, if the task has no groups),
then of their key. Test rows are drawn first, then validation rows, both under a fixed seed, then
training rows under `data.seed`. Splits are therefore disjoint by row and by group, and independent
of the order of the file. Smaller training sets are prefixes of larger ones, and `data.seed` changes
training rows only.
"""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Final

from runner.data.mixture import interleave
from runner.data.sources import load_rows
from runner.data.tasks.base import EMPTY, NEUTRAL_COLUMNS, Conversation, Example, list_names
from runner.data.tasks.conversations import CONVERSATION_COLUMNS
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.data_section import DataSection, DataSource
from runner.recipe.reasons import count_reason
from runner.strict import list_texts
from runner.text import format_count

SPLITS: Final = ("train", "validation", "test")
# The seed of the validation and test splits, independent of `data.seed`.
_HELD_OUT_SEED: Final = 0
# Columns of messages, whose keys `data.ignore` may name too.
_MESSAGE_COLUMNS: Final = (*CONVERSATION_COLUMNS, "prompt", "completion")


@dataclass(frozen=True)
class RawRow:
    """One conversation as drawn, before anything model-specific.

    `completions` are the indices of the assistant messages that are trained and scored, `untrained`
    those of weight 0.
    """

    where: str
    key: str
    group: str
    messages: Conversation
    tools: tuple[Mapping[str, Any], ...] = ()
    references: tuple[str, ...] = ()
    completions: tuple[int, ...] = ()
    untrained: frozenset[int] = frozenset()
    turn: int | None = None  # the message that this row ends with, if the conversation is split
    is_last_turn: bool = True  # of the conversation that is split
    # The row's columns, for metrics of the project; empty if it was built from several rows.
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)

    @property
    def row_id(self) -> str:
        """Stable id: the start of the row's key, and the turn of a conversation that is split."""
        return self.key[:16] if self.turn is None else f"{self.key[:16]}.{self.turn}"

    @cached_property
    def content_hash(self) -> str:
        """A hash of everything that a mask depends on. Two prompts give two contents with the same
        key.
        """
        turns = [list(self.completions), sorted(self.untrained)]
        return hash_json([list(self.messages), list(self.tools), turns])


@dataclass(frozen=True)
class LeftOut:
    """Counts of everything left out of rows, splits and sources, by reason; apart from this, only
    rows beyond the requested number are missing.
    """

    num_duplicates: int = 0
    # Rows with another row of their group in a split that is drawn earlier.
    num_left_out_by_group: int = 0
    # Split of the source -> reason -> count.
    by_task: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # Split of the source -> column that is not part of the rows' content -> rows that have it.
    columns: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    # Split of the source -> reason, with names -> files next to the rows that are not read.
    skipped: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    unknown: tuple[str, ...] = ()  # names in `data.ignore` that no row has

    def describe(self) -> list[str]:
        """One line for each reason."""
        lines = [
            f"{split}: {count_reason(count, reason)}"
            for split, left in self.by_task.items()
            for reason, count in left.items()
        ]
        for split, skipped in self.skipped.items():
            lines += [
                f"{split}: {count_reason(count, reason)}, not read"
                for reason, count in skipped.items()
            ]
        for split, columns in self.columns.items():
            named = ", ".join(_name_column(column, count) for column, count in columns.items())
            lines.append(f"{split}: not used in any row's text: {named}")
        for name in self.unknown:
            lines.append(f"nothing for `{name}` in `data.ignore`: no row has it")
        if self.num_left_out_by_group:
            lines.append(
                f"{format_count(self.num_left_out_by_group, 'row')} whose group is in another split"
            )
        if self.num_duplicates:
            lines.append(format_count(self.num_duplicates, "duplicate row"))
        return lines


def _name_column(column: str, count: int) -> str:
    """A column that is not used, and the number of rows that have it.

    >>> _name_column("id", 3), _name_column("note (empty)", 1200)
    ('`id` (3 rows)', '`note` (empty, 1,200 rows)')
    """
    name = column.removesuffix(EMPTY)
    return f"`{name}` ({'' if name == column else 'empty, '}{format_count(count, 'row')})"


@dataclass(frozen=True)
class RawSplits:
    """The rows drawn for each split, before anything model-specific."""

    train: tuple[RawRow, ...]
    validation: tuple[RawRow, ...]
    test: tuple[RawRow, ...]
    left_out: LeftOut


def draw_splits(data: DataSection) -> RawSplits:
    """The rows of each split: the same for every model, prompt, loss mode and training seed.

    A row is a duplicate if its key occurred before, in an earlier split or earlier in its own; it
    is counted and left out. So is a row whose group already has a row in an earlier split. Raises
    DataError for a split that is empty or has fewer rows than requested.
    """
    reader = _Reader(data)
    pools: dict[str, list[list[RawRow]]] = {}  # one for each source of a split
    for split in ("test", "validation", "train"):
        pools[split] = [reader.read(source, split) for source in _list_sources(data, split)]
    drawn: dict[str, tuple[RawRow, ...]] = {}
    num_left_out_by_group = 0
    for split in ("test", "validation", "train"):
        own = pools[split] or pools["train"]
        groups = {raw.group for rows in drawn.values() for raw in rows}
        for pool in own:
            allowed = [raw for raw in pool if raw.group not in groups]
            num_left_out_by_group += len(pool) - len(allowed)
            _sort(allowed, data.seed if split == "train" else _HELD_OUT_SEED)
            pool[:] = allowed
        left_out = reader.describe(num_left_out_by_group)
        wanted = data.num_train_rows if split == "train" else getattr(data, f"num_{split}_samples")
        if own is pools["train"] and data.train_shares is not None:
            drawn[split] = _draw_mixed(own, data, split, wanted, left_out)
        else:
            drawn[split] = _draw(own[0], split, wanted, left_out)
        taken = {raw.key for raw in drawn[split]}
        for pool in own:
            pool[:] = [raw for raw in pool if raw.key not in taken]
    return RawSplits(drawn["train"], drawn["validation"], drawn["test"], left_out)


def _list_sources(data: DataSection, split: str) -> tuple[DataSource, ...]:
    """The split's own sources; empty if it is drawn from the training rows."""
    if split == "train":
        return data.train_sources
    source: DataSource | None = getattr(data, split)
    return () if source is None else (source,)


def _draw_mixed(
    pools: Sequence[Sequence[RawRow]],
    data: DataSection,
    split: str,
    wanted: int | None,
    left_out: LeftOut,
) -> tuple[RawRow, ...]:
    """The first rows of several sources of training rows, in their shares."""
    assert data.train_shares is not None and wanted is not None, "the schema requires both"
    names = [source.path for source in data.train_sources]
    try:
        rows = interleave(pools, data.train_shares, wanted, names=names)
    except DataError as error:
        reasons = "".join(f"\n  left out: {line}" for line in left_out.describe())
        raise DataError(f"the {split} split: {error.message}{reasons}", hint=error.hint) from None
    return tuple(raw for _, raw in rows)


class _Reader:
    """Reads the sources of one recipe; a row whose key was read before is a duplicate."""

    def __init__(self, data: DataSection) -> None:
        self._data = data
        self._seen: dict[str, tuple[str, str]] = {}  # key -> hash of the texts, and the place
        self._holders: dict[str, str] = {}  # group of the task -> that of `data.group_column`
        self._num_duplicates = 0
        # Split -> name or reason -> count; several sources of a split are added up.
        self._by_task: dict[str, Counter[str]] = {}
        self._columns: dict[str, Counter[str]] = {}
        self._skipped: dict[str, Counter[str]] = {}

    def describe(self, num_left_out_by_group: int) -> LeftOut:
        """The counts of everything left out, once all sources have been read."""
        known = {name for columns in self._columns.values() for name in columns}
        return LeftOut(
            self._num_duplicates,
            num_left_out_by_group,
            self._by_task,
            self._columns,
            self._skipped,
            tuple(name for name in self._data.ignore if name not in known),
        )

    def read(self, source: DataSource, split: str) -> list[RawRow]:
        """The distinct rows of one source."""
        columns: Counter[str] = Counter()
        groups: dict[str, str] = {}
        try:
            loaded = load_rows(source)
        except DataError as error:  # about the source, not yet about a row
            raise DataError(f"data.{split}: {error.message}", hint=error.hint) from None
        rows = self._prepare(loaded.rows, columns, groups)
        column = self._data.group_column
        used = frozenset() if column is None else frozenset({column})
        try:
            examples = self._data.task.build_examples(rows, used=used)
        except RecursionError:
            raise DataError(f"{source.path}: a row is nested too deeply") from None
        columns.update(examples.unused)
        for counts, found in (
            (self._skipped, loaded.count_skipped()),
            (self._by_task, examples.left_out),
            (self._columns, columns),
        ):
            if found:
                counts.setdefault(split, Counter()).update(found)
        kept = []
        for example in examples.examples:
            said = _hash_words(example)
            if example.key in self._seen:
                self._num_duplicates += 1
                _require_same_words(self._seen[example.key], said, example)
                continue
            self._seen[example.key] = (said, example.where)
            kept.append(_build_raw_row(example, self._find_group(example, groups)))
        return kept

    def _prepare(
        self, rows: Iterator[tuple[str, Any]], columns: Counter[str], groups: dict[str, str]
    ) -> Iterator[tuple[str, Any]]:
        """The rows without the names in `data.ignore`; counts those, and notes each row's group."""
        column = self._data.group_column
        for where, row in rows:
            if column is not None:
                groups[where] = _read_group(row, column, where)
            yield where, ignore_columns(row, self._data.ignore, columns)

    def _find_group(self, example: Example, groups: Mapping[str, str]) -> str:
        if self._data.group_column is None:
            return example.key if example.group is None else example.group
        if example.where not in groups:
            raise DataError(
                f"{example.where}: the task `{self._data.task.name}` builds one conversation from"
                " several rows, and has its own groups",
                hint="leave `data.group_column` out of the recipe",
            )
        group = groups[example.where]
        if example.group is not None and self._holders.setdefault(example.group, group) != group:
            raise DataError(
                f"{example.where}: `data.group_column: {self._data.group_column}` puts it into"
                f" another group than a row that the task `{self._data.task.name}` keeps together"
                " with it",
                hint="name a column with larger groups, or leave `data.group_column` out",
            )
        return group


def _hash_words(example: Example) -> str:
    """A hash of a row's texts without whitespace, in which two rows with one key may differ."""
    texts = "".join(list_texts([example.messages, example.tools]))
    return hash_json("".join(texts.split()))


def _require_same_words(first: tuple[str, str], said: str, example: Example) -> None:
    """Raises: DataError, if a duplicate has other texts than the first row with its key."""
    known, where = first
    if said != known:
        raise DataError(
            f"{where} and {example.where} differ only in columns that are not part of a row's"
            f" content ({list_names(NEUTRAL_COLUMNS)}), but become different conversations",
            hint="rename the column that the function reads in the file",
        )


def _build_raw_row(example: Example, group: str) -> RawRow:
    completions = (
        index
        for index, message in enumerate(example.messages)
        if message["role"] == "assistant" and index not in example.untrained
    )
    return RawRow(
        example.where,
        example.key,
        group,
        example.messages,
        example.tools,
        example.references,
        tuple(completions),
        example.untrained,
        columns=example.columns,
    )


def _read_group(row: Any, column: str, where: str) -> str:
    """The group of a row according to `data.group_column`."""
    value = row.get(column) if isinstance(row, Mapping) else None
    if isinstance(value, bool) or not isinstance(value, str | int) or value == "":
        is_there = isinstance(row, Mapping) and column in row
        found = f"{value!r}" if is_there else "no such column"
        raise DataError(
            f"{where}: `data.group_column: {column}` names a column with a text or a whole number"
            f" that all rows of a group share, found {found}",
            hint="give every row a group, or leave `data.group_column` out of the recipe",
        )
    return f"{column}: {value}"


def ignore_columns(row: Any, names: Collection[str], counts: Counter[str]) -> Any:
    """The row without the columns in `names`, and its messages without the keys in `names`
    (`messages.KEY`); counts the rows that have one of them.
    """
    if not names:
        return row
    if isinstance(row, list):
        return _ignore_in_messages(row, names, counts)
    if not isinstance(row, Mapping):
        return row
    kept = {}
    for column, value in row.items():
        if column in names:
            counts[column] += value is not None
        elif column in _MESSAGE_COLUMNS and isinstance(value, list):
            kept[column] = _ignore_in_messages(value, names, counts)
        else:
            kept[column] = value
    return kept


def _ignore_in_messages(messages: list[Any], names: Collection[str], counts: Counter[str]) -> Any:
    kept = []
    found = set()
    for message in messages:
        if isinstance(message, Mapping):
            ignored = [key for key in message if f"messages.{key}" in names]
            found |= {f"messages.{key}" for key in ignored if message[key] is not None}
            message = {key: value for key, value in message.items() if key not in ignored}
        kept.append(message)
    counts.update(found)
    return kept


def _sort(rows: list[RawRow], seed: int) -> None:
    rows.sort(key=lambda raw: (_rank(seed, raw.group), _rank(seed, raw.key)))


def _rank(seed: int, text: str) -> str:
    return hashlib.sha256(f"{seed}:{text}".encode()).hexdigest()


def _draw(
    pool: Sequence[RawRow], split: str, wanted: int | None, left_out: LeftOut
) -> tuple[RawRow, ...]:
    """The first rows that are left for a split."""
    count = len(pool) if wanted is None else wanted
    if len(pool) < count or count == 0:
        reasons = "".join(f"\n  left out: {line}" for line in left_out.describe())
        raise DataError(
            f"{format_count(len(pool), 'different row')}"
            f" {'is' if len(pool) == 1 else 'are'} left for the {split} split, which needs"
            f" {wanted or 'at least 1'}" + reasons,
            hint=(
                f"lower `data.num_{split}_samples`,"
                " or those of the splits drawn before it (test, then validation)"
            ),
        )
    return tuple(pool[:count])
