"""The base of all tasks, and the code that they share: examples, judgements, reading the fields of
a row.

A task turns the rows of a data set into examples: a conversation, and references against which a
generated answer is judged. Nothing here knows tokens, splits or models. A row that cannot be read
is an error that names it; rows that a task leaves out on purpose are counted by reason.

Every other file of this folder defines one task, a subclass of `Task`; `recipe.data_section` finds
it there, and no other code has to name it. A task imports heavy libraries inside its functions,
because the launch side imports all tasks.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Container, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from types import MappingProxyType
from typing import Any, ClassVar, Final, get_args

from runner.errors import DataError
from runner.files import hash_json
from runner.strict import Section

# `role` and `content`, a text; if the row has them also `reasoning_content`, `tool_calls`,
# `tool_call_id` and `name`, in the form of chat templates.
Message = Mapping[str, Any]
Conversation = tuple[Message, ...]
References = tuple[str, ...]
# Columns that are not part of a row's content.
NEUTRAL_COLUMNS: Final = ("id", "name", "source")
KEY_PREFIX: Final = "messages."  # opens the name of a key of messages, as in `data.ignore`
EMPTY: Final = " (empty)"  # ends the name of an unused column that holds nothing
_READS_CONVERSATIONS: Final = "the task `conversations` reads it"
_TEXTS_ONLY: Final = "only texts are trained on; leave such rows out of the file"
_WEIGHTS: Final = (
    "the task `conversations` reads `weight` or `train`, 0 or 1, of a message; leave rows with"
    " weight 0 out of the file"
)
_PREFERENCES: Final = "preference pairs are not trained on; give only the right answer"
# Names that have a meaning in some well-known format, and the advice for each.
MEANINGS: Final[Mapping[str, str]] = MappingProxyType(
    {
        **dict.fromkeys(
            ("tools", "functions", "tool_calls", "function_call"), _READS_CONVERSATIONS
        ),
        **dict.fromkeys(("reasoning_content", "thinking", "reasoning"), _READS_CONVERSATIONS),
        **dict.fromkeys(("weight", "train", "trainable", "loss", "loss_mask"), _WEIGHTS),
        **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), _TEXTS_ONLY),
        **dict.fromkeys(("chosen", "rejected"), _PREFERENCES),
        "messages": _READS_CONVERSATIONS,
        "conversations": _READS_CONVERSATIONS,
        "system": "`data.task.system` may hold `{system}`, and the task `conversations` reads it",
        "input": "the task `alpaca` reads it",
        "context": "the prompt of the task `prompt_completion` may hold `{context}`",
        "history": "the task `conversations` reads turns as a list of messages",
    }
)


@dataclass(frozen=True)
class Example:
    """One conversation; `where` names the file and row for errors.

    A generated answer is judged against `references`: any of them counts. They are empty if a SQuAD
    question has no answer, and in tasks that judge nothing. Rows of one `group` are never in two
    splits; None: the example forms its own group.

    `key` determines order, row id and duplicates (`derive_row_key`); `Task.build_examples` sets it.
    `tools` are the functions that the assistant may call, as JSON schemas. `untrained` are the
    indices of assistant messages of weight 0, which are context and neither trained nor scored.
    `unused` are keys of messages (`messages.KEY`), and columns, that the task did not use
    (`find_unused`); `Task.build_examples` decides whether to refuse them.
    """

    where: str
    messages: Conversation
    references: References = ()
    group: str | None = None
    key: str = field(default="", compare=False)
    tools: tuple[Mapping[str, Any], ...] = ()
    untrained: frozenset[int] = frozenset()
    unused: tuple[str, ...] = field(default=(), compare=False)
    # The row's columns, for metrics of the project; `Task.build_examples` sets them. Empty if an
    # example is not one row.
    columns: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Examples:
    """All examples of a source, and the counts of what was left out: reason -> count.

    `unused` are columns and keys of messages that are not content: name -> rows that have it.
    """

    examples: tuple[Example, ...]
    left_out: Mapping[str, int]
    unused: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class Judgement:
    """Scores of one answer, between 0 and 1, larger is better; empty if there is nothing to judge
    it against.

    `is_readable` is false if the text does not answer the question: it has no label, or no final
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
    # Its position when an error lists the tasks; ties are sorted by file name.
    ORDER: ClassVar[int] = 100
    # Sets of columns, the preferred ones first, and the settings for each in addition to the name.
    RECOGNISED_BY: ClassVar[tuple[tuple[tuple[str, ...], Mapping[str, str]], ...]] = ()
    # Columns of the task's own data set that are not part of a row's content.
    BOOKKEEPING: ClassVar[tuple[str, ...]] = ()
    # Its priority if several tasks recognize a row: the lowest number is proposed.
    RECOGNITION_ORDER: ClassVar[int] = 100

    name: str

    @classmethod
    def recognise(cls, row: Any) -> Recognised | None:
        """The section that reads rows like this one; None if the row is not for this task."""
        if isinstance(row, Mapping):
            (name,) = get_args(cls.model_fields["name"].annotation)
            for columns, settings in cls.RECOGNISED_BY:
                if all(column in row for column in columns):
                    return Recognised({"name": name, **settings}, columns)
        return None

    def build_examples(
        self, rows: Iterable[tuple[str, Any]], *, used: frozenset[str] = frozenset()
    ) -> Examples:
        """The examples of all rows of a source, given as `(where, row)`; `used` are names of
        columns, and of keys of messages, that other code uses.

        Raises:
            DataError: a column is missing, has an unexpected shape, or is not used
                (`UnusedColumnsError`).
        """
        examples = []
        leftovers = Leftovers(self, used)
        for where, row in rows:
            example = self.build_example(row, where)
            columns: list[str] = []
            texts: Collection[str] = ()
            if isinstance(row, Mapping):
                columns = find_unused(row, self.list_used_columns(row))
                texts = self.list_text_columns(row)
            leftovers.add(where, [*columns, *example.unused])
            example = replace(example, key=derive_row_key(row, self.BOOKKEEPING, texts))
            examples.append(replace(example, columns=_name_columns(row)))
        leftovers.refuse()
        return Examples(tuple(examples), {}, leftovers.count())

    def list_used_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        """The columns of a row from which its example is built: by default those that the task is
        `RECOGNISED_BY`.
        """
        return {column for columns, _ in self.RECOGNISED_BY for column in columns}

    def list_text_columns(self, row: Mapping[str, Any]) -> Collection[str]:
        """The columns of a row that are content regardless of their names: those that are used."""
        return self.list_used_columns(row)

    def for_check(self) -> Task:
        """The variant of the task with which `check` reads rows; it may take twice as long."""
        return self

    def build_example(self, row: Any, where: str) -> Example:
        """The example of one row."""
        raise NotImplementedError

    @contextmanager
    def open_judge(self) -> Iterator[Judge]:
        """A function that judges `(prediction, references)` of one row; it may keep a process while
        it is open.
        """
        yield self.judge

    def judge(self, prediction: str, references: References) -> Judgement:
        """The scores of one answer; empty for a task that judges nothing."""
        return Judgement()

    def summarise(self, rows: Sequence[tuple[References, Judgement]]) -> dict[str, float]:
        """The task's metrics over a split, each over the rows for which it is defined; a metric
        without rows is left out.
        """
        judged = [
            (references, judgement.scores) for references, judgement in rows if judgement.scores
        ]
        metrics = self.combine_scores(judged)
        return {name: metrics[name] for name in self.METRICS if name in metrics}

    def score_row(self, references: References, scores: Mapping[str, float]) -> dict[str, float]:
        """A row's value for each metric that is a mean over rows; a row without a value does not
        count in that metric.
        """
        return dict(scores)

    def combine_scores(self, judged: Sequence[Judged]) -> dict[str, float]:
        """The metrics of rows that all have scores: means over rows, unless a task adds others."""
        return mean_scores([self.score_row(references, scores) for references, scores in judged])


def _name_columns(row: Any) -> Mapping[str, Any]:
    return row if isinstance(row, Mapping) else {"messages": row}


def derive_row_key(row: Any, bookkeeping: Sequence[str] = (), texts: Collection[str] = ()) -> str:
    """The SHA-256 of a row's columns as canonical JSON: names sorted, without null values and
    without the columns `id`, `name`, `source` and `bookkeeping`, except those among `texts`, which
    are content; texts stripped at both ends, `\\r\\n` as `\\n`.

    >>> derive_row_key({"q": "2+2? ", "id": 7, "note": None}) == derive_row_key({"q": "2+2?"})
    True
    """
    if isinstance(row, Mapping):
        left_out = {*NEUTRAL_COLUMNS, *bookkeeping} - set(texts)
        row = {name: value for name, value in row.items() if name not in left_out}
    return hash_json(_canonicalize(row))


def _canonicalize(value: Any) -> Any:
    if isinstance(value, str):
        return value.replace("\r\n", "\n").strip()
    if isinstance(value, Mapping):
        return {str(name): _canonicalize(item) for name, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_canonicalize(item) for item in value]
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float) and math.isfinite(value):
        return value
    return str(value)  # NaN; dates and similar values of Arrow files


def is_empty(value: Any) -> bool:
    """True for null, a blank text, and an empty list or object.

    >>> [is_empty(value) for value in (None, " ", [], 0, False)]
    [True, True, True, False, False]
    """
    return value is None or value in ([], {}, ()) or (isinstance(value, str) and not value.strip())


def find_unused(row: Mapping[str, Any], used: Container[str], prefix: str = "") -> list[str]:
    """The names in a row, or with `KEY_PREFIX` in a message, that are not among `used`; names with
    an empty value are marked.

    >>> find_unused({"a": 1, "b": 2, "c": None}, ("a",))
    ['b', 'c (empty)']
    """
    names = []
    for name, value in row.items():
        if name not in used:
            names.append(f"{prefix}{name}{EMPTY if is_empty(value) else ''}")
    return names


def find_meaning(name: str) -> str | None:
    """The advice for a column or a key of messages that has a meaning in some well-known format."""
    return MEANINGS.get(name.removeprefix(KEY_PREFIX))


class Leftovers:
    """Columns, and keys of messages, from which no example of one source is built.

    Those that are not content are counted; all others are refused together.
    """

    def __init__(self, task: Task, used: frozenset[str]) -> None:
        self._task = task
        self._used = used
        self._harmless = {*NEUTRAL_COLUMNS, *task.BOOKKEEPING}
        self._refused: dict[str, str] = {}  # name -> its first place
        self._num_rows: Counter[str] = Counter()

    def add(self, where: str, names: Iterable[str]) -> None:
        """Add the unused names of one row, as `find_unused` returns them."""
        harmless = set()
        for name in names:
            bare = name.removeprefix(KEY_PREFIX)
            if name.removesuffix(EMPTY) in self._used:
                continue
            if name.endswith(EMPTY) or bare in self._harmless:
                harmless.add(name)
            else:
                kind = "column" if bare == name else "message key"
                self._refused.setdefault(name, f"{where}: the {kind} `{bare}`")
        self._num_rows.update(harmless)

    def count(self) -> Mapping[str, int]:
        """Harmless name -> number of rows that have it."""
        return dict(sorted(self._num_rows.items()))

    def refuse(self) -> None:
        """Raise UnusedColumnsError for names that may mean something."""
        if not self._refused:
            return
        names = tuple(self._refused)
        task = f"not used by the task `{self._task.name}`"
        if len(names) == 1:
            message = f"{self._refused[names[0]]} is {task}"
        else:
            message = "\n  ".join([f"these are {task}:", *self._refused.values()])
        raise UnusedColumnsError(message, names, hint=self._suggest_uses(names))

    def _suggest_uses(self, names: tuple[str, ...]) -> str:
        ways = [f"`data.ignore: [{', '.join(names)}]` leaves what you do not need out of the rows"]
        # Braces hold identifiers only.
        column = next((name for name in names if name.isidentifier()), None)
        if column is not None and "prompt" in type(self._task).model_fields:
            ways.append(f"`{{{column}}}` in `data.task.prompt` puts its text into the prompt")
        for name in names:
            if meaning := find_meaning(name):
                ways.append(f"`{name}`: {meaning}")
        return "\n      ".join(ways)


class UnusedColumnsError(DataError):
    """Columns, and keys of messages, that may be content but are not used by any example; `names`
    lists them.
    """

    def __init__(self, message: str, names: tuple[str, ...], *, hint: str) -> None:
        super().__init__(message, hint=hint)
        self.names = names


def judge_exact_match(prediction: str, references: References) -> Judgement:
    """1 if the answer equals a reference, ignoring whitespace around it.

    >>> judge_exact_match("It is 2. ", ("It is 2.",)).scores
    {'exact_match': 1.0}
    """
    is_equal = prediction.strip() in {reference.strip() for reference in references}
    return Judgement({"exact_match": float(is_equal)})


def mean_scores(rows: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """The mean of each score over the rows that have it; empty without rows."""
    scores: dict[str, list[float]] = {}
    for row in rows:
        for name, score in row.items():
            scores.setdefault(name, []).append(score)
    return {name: math.fsum(values) / len(values) for name, values in scores.items()}


def build_answered(
    where: str, prompt: str, completion: str, references: References = ()
) -> Example:
    """One user turn and the assistant's answer to it."""
    turns = ({"role": "user", "content": prompt}, {"role": "assistant", "content": completion})
    return Example(where, turns, references)


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
                " the right column in it"
            ),
        )
    return row[column]


def read_text(row: Mapping[str, Any], column: str, where: str) -> str:
    """The text in a column."""
    value = require_column(row, column, where)
    if not isinstance(value, str):
        raise DataError(
            f"{where}: column `{column}` should be a text, found {describe_value(value)}",
            hint=(
                "leave such rows out of the file"
                if value is None
                else "write the column as text; or build the rows with a function:"
                " `data.task: {name: python, function: rows.py:build}`"
            ),
        )
    return value


def list_names(names: Iterable[str]) -> str:
    """The names in the form used by errors.

    >>> list_names(["a", "b"])
    '`a`, `b`'
    """
    return ", ".join(f"`{name}`" for name in names)


def describe_value(value: Any) -> str:
    """The kind of a value in plain words.

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
