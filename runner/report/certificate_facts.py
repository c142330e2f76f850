"""The facts that a certificate compares in addition to the recipes, each with the recipe keys that
can explain a difference.

The keys are exact: a learning rate does not change the order of the rows, so an axis of learning
rates never explains a different order.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final, Literal

from runner.report.comparability import get_base_tolerance
from runner.report.rows import ReportRow, join_numbers

Section = Literal["recipe", "rows", "model", "training", "software", "hardware"]

UPDATES: Final = "updates"
TRAINED_TOKENS: Final = "trained tokens"
ROW_ORDER: Final = "order of the rows"
# Differences in these do not matter if the files themselves are equal by hash
# Titles of the hashes of a split, by their names in `samples.json`
SPLIT_HASHES: Final = {
    "ids_hash": "{split} rows",
    "input_ids_hash": "input_ids of the {split} rows",
    "mask_hash": "label masks of the {split} rows",
}
SOURCE_STATES: Final = ("version of the runner", "commit of the runner", "uncommitted changes")

# Training length, without the number of rows: an axis of rows never explains other updates
_LENGTH: Final = ("training.max_steps", "training.num_train_epochs", "training.global_batch_size")
# Keys that determine the tokens of a drawn row
_TEXT: Final = (
    *("model.path", "model.revision", "model.chat_template", "model.chat_template_kwargs"),
    *("model.template_date", "model.end_of_turn", "data.task", "data.turns"),
    *("data.max_length", "data.truncation"),
)


@dataclass(frozen=True)
class Fact:
    """Something that runs record in addition to their recipe."""

    section: Section
    what: str
    find: Callable[[ReportRow], Any]  # None: not recorded
    # Recipe keys (or parents of keys) whose difference explains a difference in the fact
    causes: tuple[str, ...] = ()
    # Relative tolerance for two values of the same number; None: must be equal
    get_tolerance: Callable[[ReportRow], float] | None = None
    # Pairs to which the fact applies; None: all
    applies: Callable[[ReportRow, ReportRow], bool] | None = None

    def follows_from(self, key: str) -> bool:
        """True if a difference in this recipe key explains one in the fact."""
        return any(key == cause or key.startswith(f"{cause}.") for cause in self.causes)


def list_facts(rows: Sequence[ReportRow]) -> list[Fact]:
    """The facts of these runs that are compared in addition to the recipe."""
    return [
        Fact("rows", "rules of rows and masks", lambda row: row.rules),
        *(
            fact
            for split in ("train", "validation", "test")
            for fact in _list_of_split(split, rows)
        ),
        # A file that only one of a pair names is a difference between the recipes
        *(
            _build_entry("rows", f"content of {path}", "contents", path, all)
            for path in _list_keys(row.contents for row in rows)
        ),
        *_list_of_model(rows),
        *_list_of_training(rows),
        *(
            _build_entry("software", name, "versions", name, any)
            for name in _list_keys(row.versions for row in rows)
        ),
        Fact("software", "source of the runner", lambda row: row.source_hash),
        Fact("software", "version of the runner", lambda row: row.runner_version),
        Fact("software", "commit of the runner", lambda row: row.runner_commit),
        Fact("software", "uncommitted changes", lambda row: row.runner_is_dirty),
        Fact("hardware", "CPU", lambda row: row.hardware.get("cpu")),
        Fact("hardware", "GPU", lambda row: row.hardware.get("gpu")),
        Fact("hardware", "number of processes", lambda row: join_numbers(row.num_processes)),
        Fact(
            "hardware",
            "divisor of micro-batches",
            lambda row: join_numbers(row.micro_batch_divisors),
        ),
    ]


def _list_of_split(split: str, rows: Sequence[ReportRow]) -> list[Fact]:
    def of(name: str) -> Callable[[ReportRow], Any]:
        return lambda row: row.split_hashes.get(split, {}).get(name)

    drawn, read = _list_causes_of_rows(split, rows), _list_causes_of_tokens(split, rows)
    causes = {"ids_hash": drawn, "input_ids_hash": read, "mask_hash": (*read, "loss")}
    facts = [
        Fact("rows", title.format(split=split), of(name), causes[name])
        for name, title in SPLIT_HASHES.items()
    ]
    if split == "test":
        for name, what in (("num_completion_tokens", "scored tokens"), ("num_bytes", "bytes")):
            facts.append(Fact("rows", f"{what} of the test rows", of(name), read))
    return facts


def _list_causes_of_rows(split: str, rows: Sequence[ReportRow]) -> tuple[str, ...]:
    """The keys that select the rows of a split. Test rows are drawn first, then validation
    rows, then training rows; `data.seed` changes only the last.
    """
    earlier = ("test", "validation", "train")
    before = earlier[: earlier.index(split) + 1]
    # Rows from a separate source do not depend on sources that are read later
    has_own = split != "train" and all(
        getattr(row.recipe.data, name) is not None for row in rows for name in before
    )
    causes = [f"data.{name}" for name in (before if has_own else earlier)]
    causes += [f"data.num_{name}_samples" for name in before]
    causes += ["data.ignore", "data.group_column", "data.turns"]
    # Prompts change the content of a row, not the selection of rows
    causes += _list_below("data.task", rows, but=("prompt", "system"))
    causes += ["data.seed"] if split == "train" else []
    # If overlong rows are dropped, every key that changes the tokens of a row affects the selection
    is_any_dropped = any(row.recipe.data.truncation == "drop" for row in rows)
    return (*causes, *_TEXT) if is_any_dropped else tuple(causes)


def _list_below(place: str, rows: Sequence[ReportRow], but: Collection[str]) -> list[str]:
    """The keys below a dotted place in the recipes of the rows, except those in `but`."""
    names: dict[str, None] = {}
    for row in rows:
        section: Any = row.payload
        for name in place.split("."):
            section = section.get(name, {})
        names |= dict.fromkeys(section)
    return [f"{place}.{name}" for name in names if name not in but]


def _list_causes_of_tokens(split: str, rows: Sequence[ReportRow]) -> tuple[str, ...]:
    return (*_list_causes_of_rows(split, rows), *_TEXT)


def _list_causes_of_order(rows: Sequence[ReportRow]) -> tuple[str, ...]:
    """The keys that assign training rows to steps."""
    strategies = {row.recipe.training.train_sampling_strategy for row in rows}
    causes = (*_list_causes_of_rows("train", rows), *_LENGTH)
    causes += ("training.train_sampling_strategy", "training.dataloader_drop_last")
    if strategies != {"sequential"}:
        causes += ("training.seed",)
    # Batches are built from the numbers of tokens
    return (*causes, *_TEXT) if "group_by_length" in strategies else causes


def _list_of_model(rows: Sequence[ReportRow]) -> list[Fact]:
    scores = Fact(
        "model",
        "scores of the base model",
        lambda row: row.base.nll_per_completion_token,
        (
            *("model", "quantization", "training.bf16", "training.fp16"),
            *_list_causes_of_tokens("test", rows),
        ),
        get_tolerance=get_base_tolerance,
    )
    weights = Fact(
        "model",
        "initial trained weights",
        lambda row: row.initial_weights_hash,
        (
            *("model.path", "model.revision", "model.dtype", "model.pad_token"),
            *("model.end_of_turn", "quantization", "training.seed"),
            *_list_below("adapter", rows, but=("lora_dropout",)),
        ),
    )
    commits = [
        _build_entry("model", f"commit of {key}", "commits", key, any)
        for key in _list_keys(row.commits for row in rows)
    ]
    return [scores, *commits, weights]


def _list_of_training(rows: Sequence[ReportRow]) -> list[Fact]:
    order = _list_causes_of_order(rows)
    tokens = (*order, *_list_causes_of_tokens("train", rows), "loss")
    return [
        Fact("training", ROW_ORDER, lambda row: row.row_order_hash, order),
        Fact("training", UPDATES, lambda row: row.updates, _LENGTH),
        Fact("training", "length of the schedule", lambda row: row.schedule_steps, _LENGTH),
        Fact("training", TRAINED_TOKENS, lambda row: row.num_trained_tokens, tokens),
    ]


def _build_entry(
    section: Section, what: str, field: str, key: str, needs: Callable[[Iterable[bool]], bool]
) -> Fact:
    """The fact for entry `key` of a mapping; `needs`: any or all of a pair must have it."""
    causes: tuple[str, ...] = ()
    if field == "commits":  # explained by the hub name and the requested revision
        place = key.rpartition(".")[0]
        # All sources are one recipe key
        listed = ("data.train",) if place.startswith("data.train.") else ()
        causes = (key, f"{place}.revision", *listed)
    return Fact(
        section,
        what,
        find=lambda row: getattr(row, field).get(key),
        causes=causes,
        applies=lambda a, b: needs(key in getattr(row, field) for row in (a, b)),
    )


def _list_keys(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(key for mapping in mappings for key in mapping))
