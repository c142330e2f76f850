"""The section `data` of a recipe: where rows come from, which of them are drawn, and what a row is.

The section `data.task` is that of a task: a file in `data/tasks` defines it, and is found there.
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
    """A local file of rows, a folder of them, or a data set id on the hub."""

    path: Text
    config_name: str | None = None
    split: Text = "train"
    revision: str | None = None

    @property
    def states_split(self) -> bool:
        """True where the recipe names the split; a folder may leave a choice only where it does."""
        return "split" in self.model_fields_set


class MixedSource(DataSource):
    """One of several sources of training rows, with its share of them."""

    num_samples: Positive | None = None  # rows
    weight: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None  # beside the others'


def find_tasks() -> list[type[Task]]:
    """The task that each file of `data/tasks` defines, in the order in which errors list them."""
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
    """Where the rows come from and which of them train, select and report; None counts mean all
    that are left.
    """

    train: Annotated[
        Annotated[DataSource, Tag(_SINGLE)]
        | Annotated[tuple[MixedSource, ...], Field(min_length=1), Tag(_ONE_OF_MANY)],
        Discriminator(_is_one_or_many),
    ]
    validation: DataSource | None = None  # None: taken from `train`, before the training rows
    test: DataSource | None = None
    task: AnyTask
    num_train_samples: Positive | None = None
    num_validation_samples: Positive | None = None
    num_test_samples: Positive | None = None
    # The order of the training rows; those that are used are a prefix, so smaller counts are nested
    # in larger ones.
    seed: int
    # Columns, and keys of messages (`messages.KEY`), that say nothing of a row: left out before it
    # is read.
    ignore: tuple[Text, ...] = ()
    # Rows with the same value in this column never stand in two splits.
    group_column: Text | None = None
    turns: Turns = "all"
    max_length: Positive  # tokens
    truncation: Literal["refuse", "prompt_left", "turns_left", "drop"] = "refuse"

    @model_validator(mode="after")
    def _groups_by_what_is_read(self) -> Self:
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
            raise ValueError("`num_train_samples` is needed where sources of `train` have weights")
        if counts and (self.num_train_samples or 0) > sum(counts):
            raise ValueError(
                f"`num_train_samples: {self.num_train_samples}` is more than the sources of `train`"
                f" give: their `num_samples` add up to {sum(counts)}"
            )
        return self

    @property
    def train_sources(self) -> tuple[DataSource, ...]:
        """The sources of training rows, one or several."""
        return (self.train,) if isinstance(self.train, DataSource) else self.train

    @property
    def train_shares(self) -> tuple[int | float, ...] | None:
        """The share of each source of training rows, as counts or weights; None for one source
        without.
        """
        if isinstance(self.train, DataSource):
            return None
        shares = (source.num_samples or source.weight for source in self.train)
        return tuple(share for share in shares if share is not None)

    @property
    def num_train_rows(self) -> int | None:
        """How many rows train: as stated, or what the sources' counts add up to; None: all that are
        left.
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
