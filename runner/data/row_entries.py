"""Masked rows of large data, kept as entries below the output root: found by all that they depend
on, or drawn, masked and written.

The key names data by the hash of its files, not of its rows, so that who finds an entry reads no
row. It is as strict as the rows' keys: files of the same bytes, read under the same section by the
same source files and libraries, give the same rows in the same order. What is not pinned like that
(a data set on the hub without a commit) is never stored.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final, get_args

import pyarrow as pa

from runner.data.draw import SPLITS, LeftOut, RawRow, RawSplits
from runner.data.provenance import PROVENANCE, hash_installed, list_editable
from runner.data.rows import (
    Row,
    Samples,
    describe_split,
    expand_turns,
    refuse_same_tokens,
    refuse_too_long,
)
from runner.data.shards import Outcome, Shard, Task, Work, write_shards
from runner.data.stored_rows import SCHEMA, StoredRows, StoredSplit
from runner.data.tokenizer import hash_tokenizer
from runner.errors import CorruptFileError, DataError
from runner.files import MAX_ROWS_BYTES, hash_json, load_json, write_json_atomic
from runner.recipe.parse import Recipe
from runner.recipe.schema import Loss

MIN_STORED_ROWS: Final = 5_000  # drawn, of all splits; fewer are masked in less time than they save
ROWS_PER_SHARD: Final = 4_000
# From here on it pays to start processes, each of which imports libraries for some seconds.
_MIN_ROWS_PER_PROCESS: Final = 2_500
_LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_SHARD: Final = re.compile(r"[a-z]+-[0-9]{5,}\.arrow")


def count_stated_rows(recipe: Recipe) -> int | None:
    """The rows of all splits that the recipe asks for; None where it takes all that are there."""
    data = recipe.data
    counts = (data.num_train_rows, data.num_validation_samples, data.num_test_samples)
    return None if None in counts else sum(count for count in counts if count is not None)


def build_parts(
    recipe: Recipe, tokenizer: Any, contents: Mapping[str, str]
) -> dict[str, Any] | None:
    """Everything that the rows of a recipe depend on, of which an entry's name is the hash; None
    where something is not pinned.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    named = pin_data(recipe, contents)
    if named is None:
        return None
    return {
        "data": recipe.data.model_dump(mode="json"),
        # A folder of rows may leave a choice only where the split is stated.
        "states_split": [source.states_split for source in recipe.data.sources.values()],
        "contents": named,
        "tokenizer": hash_tokenizer(tokenizer),
        "with_columns": bool(recipe.evaluation.metrics),
        "columns": [str(field) for field in SCHEMA],
        **PROVENANCE,
        # What a function of the project imports beside its own files, nobody knows.
        "installed": hash_installed() if _list_task_files(recipe) else None,
    }


def pin_data(recipe: Recipe, contents: Mapping[str, str]) -> dict[str, str] | None:
    """`path -> SHA-256` or commit of all that the rows are made of; None where one is not known."""
    pinned: dict[str, str | None] = {}
    for source in recipe.data.sources.values():
        is_commit = source.revision is not None and _COMMIT.fullmatch(source.revision)
        is_hub = source.path not in contents and not Path(source.path).exists()
        pinned[source.path] = source.revision if is_hub and is_commit else contents.get(source.path)
    for path in _list_task_files(recipe):  # what they import of such packages, nobody knows
        pinned[path] = None if list_editable() else contents.get(path)
    known = {path: pin for path, pin in pinned.items() if pin is not None}
    return known if known.keys() == pinned.keys() else None


def _list_task_files(recipe: Recipe) -> list[str]:
    files = recipe.list_python_files()
    return [path for key, path in files.items() if key.startswith("data.")]


def name_entry(parts: Mapping[str, Any]) -> str:
    """The name of the entry's folder."""
    return hash_json(parts)


def load_entry(folder: Path) -> Samples:
    """The rows of an entry whose files have been compared with their checksums.

    Raises:
        CorruptFileError: it is not what this version writes.
    """
    try:
        content = load_json(folder / "rows.json", MAX_ROWS_BYTES)
        verified = set(load_json(folder / "manifest.json")["files"])
        if "rows.json" not in verified:
            raise ValueError("its manifest does not name rows.json")
        splits = {name: _load_split(folder, content["splits"][name], verified) for name in SPLITS}
        left_out = {**content["left_out"], "unknown": tuple(content["left_out"]["unknown"])}
        return Samples(**splits, left_out=LeftOut(**left_out))
    except (TypeError, KeyError, ValueError, AttributeError, OSError, pa.ArrowException) as error:
        raise CorruptFileError(f"{folder} cannot be read: {error}") from None


def _load_split(folder: Path, split: Mapping[str, Any], verified: Collection[str]) -> StoredSplit:
    shards, dropped, facts = split["shards"], split["dropped"], split["facts"]
    for shard in shards:
        if shard not in verified or not _SHARD.fullmatch(shard):
            raise ValueError(f"{shard!r} is no file of its manifest")
    if not isinstance(dropped, list) or not all(isinstance(one, str) for one in dropped):
        raise ValueError(f"no rows were dropped by the names {dropped!r}")
    if any(not isinstance(facts[loss], dict) for loss in _LOSSES):
        raise ValueError(f"nobody has described rows as {facts!r}")
    return StoredSplit(StoredRows([folder / shard for shard in shards]), tuple(dropped), facts)


def write_rows(
    folder: Path,
    raw: RawSplits,
    work: Work,
    tokenizer: Any,
    *,
    with_columns: bool = False,
    num_cores: int = 1,
    report: Callable[[int, int], None] = lambda num_done, num_rows: None,
) -> None:
    """Mask the rows of each split and write them into a folder, by as many processes as pay on
    `num_cores`; `with_columns` where metrics of the project judge answers. `report` is told how
    many rows are done, and of how many, for each row or some times a second.

    Raises:
        DataError: as `build_samples`.
        OSError: the rows cannot be written, or a process was lost.
    """
    rows = {name: expand_turns(getattr(raw, name), work.data.turns) for name in SPLITS}
    tasks = {}
    for name in SPLITS:  # nobody answers training rows
        tasks[name] = _cut(folder / name, rows[name], with_columns and name != "train")
    num_rows = sum(map(len, rows.values()))
    outcomes = write_shards(
        work,
        tokenizer,
        [task for name in SPLITS for task in tasks[name]],
        max(1, min(num_cores, num_rows // _MIN_ROWS_PER_PROCESS)),
        lambda num_done: report(num_done, num_rows),
    )
    splits: dict[str, Any] = {}
    origins = {}
    for name in SPLITS:
        own, outcomes = outcomes[: len(tasks[name])], outcomes[len(tasks[name]) :]
        shards = _require(own)
        too_long = [
            (task.rows[at], num_tokens)
            for task, shard in zip(tasks[name], shards, strict=True)
            for at, num_tokens in shard.too_long
        ]
        refuse_too_long(too_long, sum(shard.num_rows for shard in shards), name, work.data)
        origins[name] = [origin for shard in shards for origin in shard.origins]
        splits[name] = {
            "shards": [task.path.name for task in tasks[name]],
            "dropped": [row.row_id for row, _ in too_long],
        }
    refuse_same_tokens(origins)
    for split in splits.values():
        stored = StoredRows([folder / shard for shard in split["shards"]])
        split["facts"] = _describe(stored, lambda: report(num_rows, num_rows))
    content = {"splits": splits, "left_out": vars(raw.left_out)}
    write_json_atomic(folder / "rows.json", content)


def _describe(rows: StoredRows, sign_of_life: Callable[[], None]) -> dict[Loss, dict[str, Any]]:
    """`StoredSplit.facts`."""

    def walk() -> Iterator[Row]:
        for row in rows:
            sign_of_life()
            yield row

    ids, groups = rows.list_texts("row_id"), rows.list_texts("group")
    described = describe_split(walk(), _LOSSES, ids, groups, ())
    lists = StoredSplit.LISTS
    return {
        loss: {key: value for key, value in facts.items() if key not in lists}
        for loss, facts in described.items()
    }


def _cut(stem: Path, rows: Sequence[RawRow], with_columns: bool) -> list[Task]:
    return [
        Task(stem.with_name(f"{stem.name}-{start // ROWS_PER_SHARD:05}.arrow"), chunk, with_columns)
        for start in range(0, len(rows), ROWS_PER_SHARD)
        if (chunk := rows[start : start + ROWS_PER_SHARD])
    ]


def _require(outcomes: Sequence[Outcome]) -> list[Shard]:
    """All shards of a split. Raises: DataError, of the first row that has one."""
    shards = []
    for outcome in outcomes:
        if isinstance(outcome, DataError):
            raise outcome
        shards.append(outcome)
    return shards
