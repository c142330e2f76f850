"""The rows of `runner init --data`: a file, several files, a folder, or a data set on the hub, by
the splits in their names.

Decides where they are read from now, and which files are copied into the project. `starter` decides
how they are used.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Final

from runner.errors import DataError, RunnerError
from runner.recipe.data_files import find_source_files, find_split, list_splits, name_format
from runner.recipe.data_section import DataSource

_SPLITS: Final = ("train", "validation", "test")
_BY_HAND: Final = (
    "start without --data, and write `data.train` into recipe_templates/first/recipe.yaml.j2"
)


@dataclass(frozen=True)
class GivenData:
    """Rows that the user names.

    `sources` are the splits as they are read now, always with `train`. `path` is their later place
    in recipes: below the project, or on the hub. `copies` are the files to copy, by their path
    below the project.
    """

    name: str  # as the user wrote it
    path: str
    sources: Mapping[str, DataSource]
    copies: Mapping[str, Path] = field(default_factory=dict)

    def describe_sources(self) -> dict[str, dict[str, str]]:
        """The recipe's keys of each split that has its own source."""
        described = {}
        for split, source in self.sources.items():
            described[split] = {"path": self.path}
            if source.states_split:
                described[split]["split"] = source.split
        return described


@contextmanager
def open_given_data(data: Sequence[str]) -> Iterator[GivenData]:
    """The rows of one or several `--data`; they can be read inside the `with` block. Raises:
    RunnerError.
    """
    if len(data) == 1:
        yield _find_one(data[0])
        return
    for name in data:
        if not Path(name).is_file():
            what = "is a folder" if Path(name).is_dir() else "does not exist"
            raise RunnerError(
                f"`--data {name}` {what}; several --data must be files, which make one folder",
                hint=f"name only one folder, or {_BY_HAND}",
            )
    with tempfile.TemporaryDirectory() as folder:
        links: dict[Path, str] = {}
        for name in data:
            link = Path(folder, name_in_project(Path(name)))
            if link in links:
                raise RunnerError(
                    f"{links[link]} and {name} would both be called {link.name} in the project",
                    hint="rename one of them",
                )
            link.symlink_to(Path(name).absolute())
            links[link] = name
        try:
            given = _find_folder(", ".join(data), Path(folder), "rows")
            unclear = sorted(links[link] for link in set(links) - set(given.copies.values()))
            if unclear:
                raise RunnerError(
                    f"the names of other files contain a split, but that of {unclear[0]} contains"
                    " none, or a different one",
                    hint="name each file after train, validation or test, or none of them",
                )
            yield given
        except RunnerError as error:
            raise _with_own_names(error, links) from None


def name_in_project(path: PurePath) -> str:
    """The name of a file or folder of rows in the project: plain characters and the same suffix."""
    stem = re.sub(r"[^A-Za-z0-9._-]+", "-", path.stem).strip("-._")[:100] or "rows"
    return f"{stem}{path.suffix}"


def _with_own_names(error: RunnerError, links: Mapping[Path, str]) -> RunnerError:
    """The error with files named as the user named them."""
    texts = [error.message, error.hint or ""]
    for link, name in links.items():
        texts = [text.replace(str(link), name) for text in texts]
    folder = str(next(iter(links)).parent)
    texts = [text.replace(f"the folder {folder} holds", "these files hold") for text in texts]
    return type(error)(texts[0], hint=texts[1] or None)


def _find_one(name: str) -> GivenData:
    path = Path(name).expanduser()
    if path.is_dir():
        return _find_folder(name, path, name_in_project(PurePath(path.resolve().name)))
    if path.is_file():
        target = f"data/{name_in_project(path)}"
        return GivenData(name, target, {"train": DataSource(path=str(path))}, {target: path})
    is_id = re.fullmatch(r"[A-Za-z0-9][\w.-]*(/[\w.-]+)?", name) and name_format(path) is None
    if not is_id:
        raise RunnerError(
            f"`--data {name}` does not exist, and it is not a hub id like stanfordnlp/sst2",
            hint=f"name a file, several (one --data each), a folder or a hub id; or {_BY_HAND}",
        )
    return _find_on_hub(name)


def _find_folder(name: str, folder: Path, target: str) -> GivenData:
    path = f"data/{target}"
    splits = list_splits(folder)
    sources = {"train": DataSource(path=str(folder))}
    if any(split is not None for split in splits):
        sources = _name_splits(name, str(folder), splits)
    copies: dict[str, Path] = {}
    for source in sources.values():
        try:
            found = find_source_files(source)
        except DataError as error:
            raise DataError(error.message, hint=f"{error.hint}; or {_BY_HAND}") from None
        for file in (*found.files, *found.read_for_choice):
            copies[f"{path}/{file.relative_to(folder).as_posix()}"] = file
    return GivenData(name, path, sources, copies)


def _name_splits(name: str, path: str, splits: Sequence[str | None]) -> dict[str, DataSource]:
    """The sources of the splits that exist. Raises: RunnerError, if none is for training."""
    sources = {}
    for split in _SPLITS:
        own = find_split(splits, split)
        if own is not None:
            sources[split] = DataSource(path=path, split=own)
    if "train" not in sources:
        found = ", ".join(split for split in splits if split is not None)
        raise RunnerError(
            f"`--data {name}` has rows of the split {found}, but none of a split called train",
            hint=f"rename the files to train on to train; or {_BY_HAND}",
        )
    return sources


def _find_on_hub(name: str) -> GivenData:
    from runner.data.sources import list_hub_splits

    try:
        splits = list_hub_splits(name)
    except DataError as error:
        raise DataError(
            f"`--data {name}` is not a file or folder here, and {error.message}",
            hint=f"check the path or the id, and the network; or {_BY_HAND}",
        ) from None
    return GivenData(name, name, _name_splits(name, name, splits))
