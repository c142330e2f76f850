"""The base of all tasks, and what they share: examples, judgements, reading the fields of a row.

A task turns the rows of a data set into examples: a conversation, and what a generated answer is
judged against. Nothing here knows tokens, splits or models. A row that cannot be read is an error
that names it; what a task leaves out on purpose is counted by reason.

Every other file of this folder defines one task, a subclass of `Task`; `recipe.schema` finds it
there, and nothing else has to name it. A task imports what is heavy inside its functions: the
launch side imports all tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar, Final, get_args

from runner.errors import DataError
from runner.files import hash_json
from runner.strict import Section

# `role` and `content`, a text; where the row has them also `reasoning_content`, `tool_calls`,
# `tool_call_id` and `name`, as chat templates take them.
Message = Mapping[str, Any]
Conversation = tuple[Message, ...]
References = tuple[str, ...]
# Columns that say nothing of a row's content.
NEUTRAL_COLUMNS: Final = ("id", "name", "source")
EMPTY: Final = " (empty)"  # ends the name of an unused column that holds nothing


@dataclass(frozen=True)
class Example:
    """One conversation; `where` names the file and row for errors.

    A generated answer is judged against `references`: any of them counts. They are empty where a
    SQuAD question has no answer, and in tasks that judge nothing. Rows of one `group` never stand
    in two splits; None: the example is a group of its own.

    `key` decides order, row id and duplicates (`derive_row_key`); `Task.build_examples` sets it.
    `tools` are the functions that the assistant may call, as JSON schemas. `untrained` are the
    indices of assistant messages of weight 0: context, and neither trained nor scored. `unused` are
    keys of messages, and columns, that the task read past (`find_unused`); `Task.build_examples`
    decides on them.
    """

    where: str
    messages: Conversation
    references: References = ()
    group: str | None = None
    key: str = field(default="", compare=False)
    tools: tuple[Mapping[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    unused: tuple[str, ...] = field(default=(), compare=False)


@dataclass(frozen=True)
class Examples:
    """All examples of a source, and what was left out of them: reason -> count."""

    examples: tuple[Example, ...]
    left_out: Mapping[str, int]


@dataclass(frozen=True)
class Judgement:
    """Scores of one answer, between 0 and 1, larger is better; none where there is nothing to judge
    it against.

    `is_readable` is false where the answer is no answer to the question: no label, or no final
    result. It scores 0.
    """

    scores: dict[str, float] = field(default_factory=dict)
    is_readable: bool = True


@dataclass(frozen=True)
class Recognised:
    """A task for rows of some shape: the section `data.task`, and the columns that it reads."""

    section: Mapping[str, str]
    columns: tuple[str, ...]


Judge = Callable[[str, References], Judgement]
Judged = tuple[References, dict[str, float]]  # a row's references, and the scores of its answer


class Task(Section):
    """Makes conversations of rows. `METRICS` are those of the texts that a model generates, larger
    is better.

    A task defines its `name` as a literal and overrides `build_example`, or `build_examples` where
    an example is not one row. A task that judges answers states its `METRICS` and overrides
    `judge`, or `open_judge` where judging needs something built or started first; and
    `combine_scores` where a metric is more than the mean of a score. `runner init` proposes
    a task for rows with columns that it is `RECOGNISED_BY`.
    """

    METRICS: ClassVar[tuple[str, ...]] = ()
    # Its place where an error lists the tasks; those with the same number go by the names of their
    # files.
    ORDER: ClassVar[int] = 100
    # Sets of columns, the preferred ones first, and what the section says for each beside the name.
    RECOGNISED_BY: ClassVar[tuple[tuple[tuple[str, ...], Mapping[str, str]], ...]] = ()
    # Its place where several tasks recognise a row: the lowest is proposed.
    RECOGNITION_ORDER: ClassVar[int] = 100

    name: str

    @classmethod
    def recognise(cls, row: Any) -> Recognised | None:
        """The section that reads rows like this one; None if the row is another task's."""
        if isinstance(row, Mapping):
            (name,) = get_args(cls.model_fields["name"].annotation)
            for columns, settings in cls.RECOGNISED_BY:
                if all(column in row for column in columns):
                    return Recognised({"name": name, **settings}, columns)
        return None

    def build_examples(self, rows: Iterable[tuple[str, Any]]) -> Examples:
        """The examples of all rows of a source, given as `(where, row)`.

        Raises:
            DataError: a column is missing or has another shape than the task expects.
        """
        examples = []
        for where, row in rows:
            example = self.build_example(row, where)
            examples.append(replace(example, key=derive_row_key(row)))
        return Examples(tuple(examples), {})

    def list_used_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        """The columns of a row that its example is built from: by default those that the task is
        `RECOGNISED_BY`.
        """
        return {column for columns, _ in self.RECOGNISED_BY for column in columns}

    def build_example(self, row: Any, where: str) -> Example:
        """The example of one row."""
        raise NotImplementedError

    @contextmanager
    def open_judge(self) -> Iterator[Judge]:
        """The judge of `(prediction, references)` of one row; it may keep a process while it is
        open.
        """
        yield self.judge

    def judge(self, prediction: str, references: References) -> Judgement:
        """The scores of one answer; none for a task that judges nothing."""
        return Judgement()

    def summarise(self, rows: Sequence[tuple[References, Judgement]]) -> dict[str, float]:
        """The task's metrics over a split, each over the rows that it is defined for; one that has
        none is left out.
        """
        judged = [
            (references, judgement.scores) for references, judgement in rows if judgement.scores
        ]
        metrics = self.combine_scores(judged)
        return {name: metrics[name] for name in self.METRICS if name in metrics}

    def combine_scores(self, judged: Sequence[Judged]) -> dict[str, float]:
        """The metrics of rows that all have scores: the mean of each score."""
        return mean_scores([scores for _, scores in judged])


def derive_row_key(row: Any) -> str:
    """The SHA-256 of a row's columns as canonical JSON: names sorted, without null values and
    without the columns `id`, `name` and `source`; texts stripped at both ends, `\\r\\n` as `\\n`.

    >>> derive_row_key({"q": "2+2? ", "id": 7, "note": None}) == derive_row_key({"q": "2+2?"})
    True
    """
    if isinstance(row, Mapping):
        row = {name: value for name, value in row.items() if name not in NEUTRAL_COLUMNS}
    return hash_json(_canonicalise(row))


def _canonicalise(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").strip()
    if isinstance(value, Mapping):
        return {str(name): _canonicalise(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonicalise(item) for item in value]
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)  # NaN; dates and the like, of Arrow files


def is_empty(value: Any) -> bool:
    """True of what holds nothing: null, a blank text, an empty list or object.

    >>> [is_empty(value) for value in (None, " ", [], 0, False)]
    [True, True, True, False, False]
    """
    return value is None or value in ([], {}, ()) or (isinstance(value, str) and not value.strip())


def find_unused(row: Mapping[str, Any], used: Container[str], prefix: str = "") -> list[str]:
    """The names of a row, or of a message, that are not among `used`; those that hold nothing are
    marked.

    >>> find_unused({"a": 1, "b": 2, "c": None}, ("a",), "messages.")
    ['messages.b', 'messages.c (empty)']
    """
    names = []
    for name, value in row.items():
        if name not in used:
            names.append(f"{prefix}{name}{EMPTY if is_empty(value) else ''}")
    return names


def mean_scores(rows: Sequence[dict[str, float]]) -> dict[str, float]:
    """The mean of each score; none without rows."""
    means = {}
    for name in rows[0] if rows else ():
        means[name] = math.fsum(scores[name] for scores in rows) / len(rows)
    return means


def build_answered(
    where: str, prompt: str, completion: str, references: References = ()
) -> Example:
    """One user turn and the assistant's answer to it."""
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Example(where, turns, references)


def require_placeholders(prompt: str, *names: str) -> None:
    """Raises ValueError for a `prompt` that does not hold each placeholder exactly once."""
    for name in names:
        if prompt.count(f"{{{name}}}") != 1:
            raise ValueError(f"`prompt` must hold the placeholder {{{name}}} exactly once")


def fill_prompt(prompt: str, **texts: str) -> str:
    """The prompt with its placeholders replaced; one inside a replacement stays as it is.

    >>> fill_prompt("{context} Q: {question}", context="a {question}", question="b")
    'a {question} Q: b'
    """
    # The last one first.
    for name in sorted(texts, key=lambda name: prompt.index(f"{{{name}}}"), reverse=True):
        before, _, after = prompt.partition(f"{{{name}}}")
        prompt = before + texts[name] + after
    return prompt


def require_object(row: Any, where: str) -> Mapping[str, Any]:
    """The row, if it has columns."""
    if not isinstance(row, Mapping):
        raise DataError(f"{where}: expected an object with columns, found {describe_value(row)}")
    return row


def require_column(row: Mapping[str, Any], column: str, where: str) -> Any:
    """The value of a column that must be there."""
    if column not in row:
        raise DataError(
            f"{where}: the column `{column}` is missing",
            hint=(
                f"its columns are {', '.join(map(str, row))}; choose another `data.task`, or name"
                " the right one in it"
            ),
        )
    return row[column]


def read_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column."""
    value = require_column(row, column, where)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column `{column}` should be a text, found {describe_value(value)}"
        )
    return value


def list_names(names: Iterable[str]) -> str:
    """The names as an error lists them.

    >>> list_names(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{name}`" for name in names)


def describe_value(value: Any) -> str:
    """The kind of a value, as people name it.

    >>> describe_value([]), describe_value(None), describe_value(3)
    ('an empty list', 'nothing (null)', 'a number')
    """
    names = {
        dict: "an object",
        list: "a list",
        str: "a text",
        bool: "true or false",
        type(None): "nothing (null)",
    }
    if value == []:
        return "an empty list"
    return names.get(
        type(value), "a number" if isinstance(value, int | float) else type(value).__name__
    )
