"""Reads the rows of a data source, local or on the hub, as they are; nothing here knows the meaning
of columns.

`recipe.data_files` decides which local files a source means, `formats` reads one of them.
"""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from runner.data.formats import Rows, load_file
from runner.errors import DataError
from runner.recipe.data_files import describe_files, find_source_files, name_format
from runner.recipe.data_section import DataSource
from runner.recipe.hub import find_prepared, is_commit

_NETWORK_TIMEOUT_SECONDS: Final = 5.0


@dataclass(frozen=True)
class SourceRows:
    """The rows of a source, which can be read once, and the names of content next to them that is
    not read, by reason. `skipped` is complete once all rows have been read.
    """

    rows: Rows
    skipped: dict[str, tuple[str, ...]]

    def __iter__(self) -> Rows:
        return self.rows

    def count_skipped(self) -> Mapping[str, int]:
        """The number of skipped names for each reason; the reason lists the first few."""
        return {
            f"{reason} ({describe_files(names)})": len(names)
            for reason, names in self.skipped.items()
        }


def load_rows(source: DataSource) -> SourceRows:
    """`(where, row)` for every row of a local file, a folder of files, or a data set on the hub, in
    file order.

    Raises: DataError, here if the source is ambiguous, and later while rows are read.
    """
    path = Path(source.path)
    if not path.exists():
        if name_format(path) is not None:
            raise DataError(
                f"the data file {path} does not exist",
                hint=(
                    "put your rows there, or name another file,"
                    " such as data.train.path=FILE on the command line"
                ),
            )
        return SourceRows(_load_hub(source), {})
    found = find_source_files(source)
    skipped = dict(found.skipped)
    if found.saved_dir is not None:
        return SourceRows(_load_saved(found.saved_dir), skipped)
    return SourceRows((row for file in found.files for row in load_file(file, skipped)), skipped)


def list_hub_splits(name: str) -> list[str]:
    """The splits of a data set on the hub. Raises: DataError, also without a network."""
    go_offline_without_network()
    import datasets

    try:
        return [str(split) for split in datasets.get_dataset_split_names(name)]
    except Exception as error:  # a dozen kinds, as below
        raise DataError(
            f"the data set {name!r} cannot be looked up on the hub: {type(error).__name__}: {error}"
        ) from None


def go_offline_without_network() -> None:
    """Use only the cache if the hub cannot be reached: its client would retry for 46 s per model.

    Has an effect only before the client is imported, which reads the variable once.
    """
    is_decided = any(
        name in os.environ for name in ("HF_HUB_OFFLINE", "HTTPS_PROXY", "https_proxy", "ALL_PROXY")
    )
    if is_decided or "huggingface_hub" in sys.modules:
        return
    url = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    try:
        socket.create_connection(
            (url.hostname or "", url.port or 443), timeout=_NETWORK_TIMEOUT_SECONDS
        ).close()
    except OSError as error:
        print(f"{url.hostname} cannot be reached ({error}): using only the cache", file=sys.stderr)
        os.environ["HF_HUB_OFFLINE"] = "1"


def _load_saved(folder: Path) -> Rows:
    """The rows of a data set that `save_to_disk` has written."""
    import datasets

    try:
        rows = datasets.load_from_disk(str(folder))
        yield from ((f"{folder} row {number}", row) for number, row in enumerate(rows, start=1))
    except Exception as error:  # a dozen kinds, as below, some only when a row is read
        raise DataError(
            f"{folder}: cannot be read as a data set that `save_to_disk` has written:"
            f" {type(error).__name__}: {error}"
        ) from None


def _load_hub(source: DataSource) -> Iterator[tuple[str, Any]]:
    import datasets

    try:
        if is_commit(source.revision):
            rows = _load_at_commit(source, source.revision)
        else:
            rows = datasets.load_dataset(
                source.path, source.config_name, split=source.split, revision=source.revision
            )
    # The library raises a dozen unrelated kinds for a missing name, split or network.
    except Exception as error:
        raise DataError(
            f"cannot load the data set {source.path!r}, split {source.split!r}:"
            f" {type(error).__name__}: {error}",
            hint=(
                "name a local file in `data.train.path`, or check the hub id,"
                " its split, and the network"
            ),
        ) from error
    yield from (
        (f"{source.path}[{source.split}] row {number}", row) for number, row in enumerate(rows)
    )


def _load_at_commit(source: DataSource, commit: str) -> Any:
    """The rows at a commit, from the cache without a request, else from the hub. If the hub does
    not answer, `datasets` would use the rows that it prepared last, at any commit.
    """
    import datasets
    from datasets.packaged_modules.cache.cache import Cache

    folder = _choose_prepared(source, commit)
    if folder is not None:
        config_name, version = folder.parts[-3:-1]
        name = source.path.rpartition("/")[2]
        return Cache(
            dataset_name=name,
            repo_id=source.path,
            config_name=config_name,
            version=version,
            hash=commit,
        ).as_dataset(split=source.split)
    builder = datasets.load_dataset_builder(source.path, source.config_name, revision=commit)
    if builder.hash != commit:
        raise FileNotFoundError(
            f"the commit {commit} is not in the cache, which has {builder.hash}, and the hub does"
            " not provide it"
        )
    builder.download_and_prepare()
    return builder.as_dataset(split=source.split)


def _choose_prepared(source: DataSource, commit: str) -> Path | None:
    """The folder of prepared rows of the source's config; None if the cache does not contain it."""
    by_config = {folder.parts[-3]: folder for folder in find_prepared(source.path, commit)}
    if not by_config:
        return None
    return by_config.get(source.config_name or _find_default_config(source.path, commit))


def _find_default_config(name: str, commit: str) -> str:
    """The config of a source that states none, according to the data set's README."""
    from datasets.info import DatasetInfosDict
    from datasets.utils.metadata import MetadataConfigs
    from huggingface_hub import DatasetCard, try_to_load_from_cache

    card = try_to_load_from_cache(name, "README.md", revision=commit, repo_type="dataset")
    if not isinstance(card, str):
        return "default"
    data = DatasetCard.load(card).data
    stated = MetadataConfigs.from_dataset_card_data(data).get_default_config_name()
    described = list(DatasetInfosDict.from_dataset_card_data(data))
    return stated or (described[0] if len(described) == 1 else "default")
