"""Masked rows of large data, stored as entries below the output root: found by a key of everything
that they depend on, or else drawn, masked and written.

The key identifies data by the hash of its files, not of its rows, so a run that finds an entry
reads no row. It is as strict as the rows' keys: files with the same bytes, read under the same
section by the same source files and libraries, give the same rows in the same order. Data that
cannot be pinned this way (a data set on the hub without a commit) is never stored.
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

MIN_STORED_ROWS: Final = 5_000  # drawn, over all splits; storing fewer saves no time
ROWS_PER_SHARD: Final = 4_000
# Below this it does not pay to start processes, which import libraries for some seconds each.
_MIN_ROWS_PER_PROCESS: Final = 2_500
_LOSSES: Final[tuple[Loss, ...]] = get_args(Loss)
_COMMIT: Final = re.compile("[0-9a-f]{40}")
_SHARD: Final = re.compile(r"[a-z]+-[0-9]{5,}\.arrow")


def count_stated_rows(recipe: Recipe) -> int | None:
    """The number of rows that the recipe requests in all splits; None if a split uses all rows."""
    data = recipe.data
    counts = (data.num_train_rows, data.num_validation_samples, data.num_test_samples)
    return None if None in counts else sum(count for count in counts if count is not None)


def build_parts(
    recipe: Recipe, tokenizer: Any, contents: Mapping[str, str]
) -> dict[str, Any] | None:
    """Everything that the rows of a recipe depend on; its hash is the entry's name. None if
    something is not pinned.
    """
    if not getattr(tokenizer, "is_fast", False):
        return None
    named = pin_data(recipe, contents)
    if named is None:
        return None
    return {
        "data": recipe.data.model_dump(mode="json"),
        # A folder of rows may hold several splits only if the split is stated.
        "states_split": [source.states_split for source in recipe.data.sources.values()],
        "contents": named,
        "tokenizer": hash_tokenizer(tokenizer),
        "with_columns": bool(recipe.evaluation.metrics),
        "columns": [str(field) for field in SCHEMA],
        **PROVENANCE,
        # It is unknown what a function of the project imports in addition to its own files.
        "installed": hash_installed() if _list_task_files(recipe) else None,
    }


def pin_data(recipe: Recipe, contents: Mapping[str, str]) -> dict[str, str] | None:
    """`path -> SHA-256` or commit of everything that the rows come from; None if one is unknown."""
    pinned: dict[str, str | None] = {}
    for source in recipe.data.sources.values():
        is_commit = source.revision is not None and _COMMIT.fullmatch(source.revision)
        is_hub = source.path not in contents and not Path(source.path).exists()
        pinned[source.path] = source.revision if is_hub and is_commit else contents.get(source.path)
    for path in _list_task_files(recipe):  # it is unknown what they import from editable packages
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
        CorruptFileError: its content is not in the format of this version.
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
            raise ValueError(f"{shard!r} is not listed in its manifest")
    if not isinstance(dropped, list) or not all(isinstance(one, str) for one in dropped):
        raise ValueError(f"the ids of dropped rows should be a list of texts, found {dropped!r}")
    if any(not isinstance(facts[loss], dict) for loss in _LOSSES):
        raise ValueError(
            f"the facts about its rows should be an object for each loss, found {facts!r}"
        )
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
    """Mask the rows of each split and write them to a folder, with as many processes as are useful
    on `num_cores`; `with_columns` is needed if metrics of the project judge answers. `report` is
    called with the numbers of finished and of all rows, for each row or several times a second.

    Raises:
        DataError: as in `build_samples`.
        OSError: the rows cannot be written, or a process was lost.
    """
    rows = {name: expand_turns(getattr(raw, name), work.data.turns) for name in SPLITS}
    tasks = {}
    for name in SPLITS:  # training rows are not answered
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
    """The content of `StoredSplit.facts`."""

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
    """All shards of a split. Raises: DataError, the first one among the outcomes."""
    shards = []
    for outcome in outcomes:
        if isinstance(outcome, DataError):
            raise outcome
        shards.append(outcome)
    return shards
