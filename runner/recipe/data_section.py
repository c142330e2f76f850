"""The section `data` of a recipe: the sources of the rows, the rows that are drawn, and the shape
of a row.

The files in `data/tasks` define the section `data.task`, one file for each task; `find_tasks`
finds them.
"""

from __future__ import annotations

import importlib
import pkgutil
from functools import reduce
from operator import or_
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, get_args

from pydantic import Discriminator, Field, Tag, model_validator

from runner.data import tasks
from runner.data.tasks.base import Task
from runner.recipe.schema import Positive, Turns
from runner.strict import Section, Text


class DataSource(Section):
    """A source of rows: a local file, a folder of files, or a data set on the hub."""

    path: Text = Field(
        description="A file of rows, a folder of such files, or a data set id on the hub.",
        examples=["rows.jsonl"],
    )
    config_name: str | None = Field(
        default=None,
        description="The configuration of the data set. null: its default.",
        examples=["plain_text"],
    )
    split: Text = Field(
        default="train",
        description="The split of a data set or of a folder; not used for a single file.",
        examples=["validation"],
    )
    revision: str | None = Field(
        default=None,
        description=(
            "A branch, tag or commit of the hub data set. null: the main branch, whose commit is"
            " recorded."
        ),
        examples=["main"],
    )

    @property
    def states_split(self) -> bool:
        """True if the recipe names the split, which a folder with several splits requires."""
        return "split" in self.model_fields_set


class MixedSource(DataSource):
    """One of several sources of training rows, with its share: `num_samples` in all of them, or
    `weight` in all of them.
    """

    num_samples: Positive | None = Field(
        default=None,
        description="Rows of this source. null: its share is `weight`.",
        examples=[500],
    )
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = Field(
        default=None,
        description=(
            "This source's part of `num_train_samples`, relative to the other weights. null: its"
            " share is `num_samples`."
        ),
        examples=[0.25],
    )


def find_tasks() -> list[type[Task]]:
    """The task that each file of `data/tasks` defines, in the order of errors."""
    found: list[type[Task]] = []
    for file in pkgutil.iter_modules(tasks.__path__, f"{tasks.__name__}."):
        for value in vars(importlib.import_module(file.name)).values():
            if isinstance(value, type) and issubclass(value, Task):
                has_name = bool(get_args(value.model_fields["name"].annotation))  # bases have none
                if has_name and value.__module__ == file.name:  # defined there, not imported
                    found.append(value)
    return sorted(found, key=lambda task: (task.ORDER, task.__module__))


if TYPE_CHECKING:  # the members of the union are known at run time only
    AnyTask = Task
else:
    AnyTask = Annotated[reduce(or_, find_tasks()), Field(discriminator="name")]


# As errors name them.
_SINGLE: Final = "a single source"
_ONE_OF_MANY: Final = "one of several sources"


def _is_one_or_many(value: Any) -> str:
    return _ONE_OF_MANY if isinstance(value, list | tuple) else _SINGLE


class DataSection(Section):
    """The sources of the rows, and the rows that are trained on, validated on and tested on."""

    train: Annotated[
        Annotated[DataSource, Tag(_SINGLE)]
        | Annotated[tuple[MixedSource, ...], Field(min_length=1), Tag(_ONE_OF_MANY)],
        Discriminator(_is_one_or_many),
    ] = Field(
        description="The source of the training rows, or a list of sources.",
        examples=[{"path": "rows.jsonl"}],
    )
    validation: DataSource | None = Field(
        default=None,
        description=(
            "The source of the validation rows. null: `num_validation_samples` rows of `train`,"
            " which are then not trained on."
        ),
        examples=[{"path": "validation.jsonl"}],
    )
    test: DataSource | None = Field(
        default=None,
        description=(
            "The source of the test rows. null: `num_test_samples` rows of `train`, which are then"
            " not trained on."
        ),
        examples=[{"path": "test.jsonl"}],
    )
    task: AnyTask = Field(
        description="The task: the shape of a row, and the judge of generated answers.",
        examples=[{"name": "prompt_completion"}],
    )
    num_train_samples: Positive | None = Field(
        default=None,
        description=(
            "Training rows. null: all that are left, or the sum of the sources' `num_samples`."
            " Required if sources have weights."
        ),
        examples=[1000],
    )
    num_validation_samples: Positive | None = Field(
        default=None,
        description=(
            "Validation rows. null: all rows of `validation`. Required if they are from `train`."
        ),
        examples=[100],
    )
    num_test_samples: Positive | None = Field(
        default=None,
        description="Test rows. null: all rows of `test`. Required if they are from `train`.",
        examples=[200],
    )
    seed: int = Field(
        description=(
            "Draws the rows and their order. The training rows are a prefix of that order, so a"
            " smaller count is part of a larger one."
        ),
        examples=[42],
    )
    ignore: tuple[Text, ...] = Field(
        default=(),
        description=(
            "Columns, and keys of messages (`messages.KEY`), to leave out before a row is read. A"
            " column that nothing uses is an error otherwise."
        ),
        examples=[["url", "messages.timestamp"]],
    )
    group_column: Text | None = Field(
        default=None,
        description=(
            "Rows with the same value in this column are never in different splits. null: the task"
            " decides."
        ),
        examples=["document_id"],
    )
    turns: Turns = Field(
        default="all",
        description=(
            "The assistant turns of a conversation that are completions, for training and scores."
            " all: all of them. last: the last one. split: one row for each."
        ),
    )
    max_length: Positive = Field(
        description="The maximum length of a row in tokens; see `truncation`.", examples=[2048]
    )
    truncation: Literal["refuse", "prompt_left", "turns_left", "drop"] = Field(
        default="refuse",
        description=(
            "The treatment of rows above `max_length`. refuse: an error. prompt_left: cut the"
            " prompt from the left. turns_left: drop the oldest turns. drop: leave the row out."
        ),
    )

    @model_validator(mode="after")
    def _check_group_column(self) -> Self:
        if self.group_column is not None and self.group_column in self.ignore:
            raise ValueError(
                f"`ignore` leaves out the column `{self.group_column}` that `group_column` names"
            )
        return self

    @model_validator(mode="after")
    def _carved_splits_have_sizes(self) -> Self:
        for split in ("validation", "test"):
            if getattr(self, split) is None and getattr(self, f"num_{split}_samples") is None:
                raise ValueError(
                    f"`num_{split}_samples` is needed when `{split}` is taken"
                    " from the training rows"
                )
        return self

    @model_validator(mode="after")
    def _several_sources_state_their_shares(self) -> Self:
        if isinstance(self.train, DataSource):
            return self
        counts = [source.num_samples for source in self.train if source.num_samples is not None]
        weights = [source.weight for source in self.train if source.weight is not None]
        if sorted((len(counts), len(weights))) != [0, len(self.train)]:
            raise ValueError(
                "each source of `train` states its share, all of them `num_samples` or all of them"
                " `weight`"
            )
        if weights and self.num_train_samples is None:
            raise ValueError("`num_train_samples` is needed if sources of `train` have weights")
        if counts and (self.num_train_samples or 0) > sum(counts):
            raise ValueError(
                f"`num_train_samples: {self.num_train_samples}` is more than the sources of `train`"
                f" have: their `num_samples` add up to {sum(counts)}"
            )
        return self

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """The sources of training rows, one or several."""
        return (self.train,) if isinstance(self.train, DataSource) else self.train

    @property
    def train_shares(self) -> tuple[int | float, ...] | None:
        """The share of each source of training rows, as counts or weights; None for a single
        source.
        """
        if isinstance(self.train, DataSource):
            return None
        shares = (source.num_samples or source.weight for source in self.train)
        return tuple(share for share in shares if share is not None)

    @property
    def num_train_rows(self) -> int | None:
        """The number of training rows: as stated, or the sum of the sources' counts; None for all
        that are left.
        """
        if self.num_train_samples is not None or isinstance(self.train, DataSource):
            return self.num_train_samples
        return sum(source.num_samples or 0 for source in self.train)

    @property
    def sources(self) -> dict[str, DataSource]:
        """Every source by its dotted key below `data`: `train`, or `train.0` and so on for several,
        `validation`, `test`.
        """
        many = not isinstance(self.train, DataSource)
        named: dict[str, DataSource | None] = {
            f"train.{number}" if many else "train": source
            for number, source in enumerate(self.train_sources)
        }
        named |= {"validation": self.validation, "test": self.test}
        return {key: source for key, source in named.items() if source is not None}
