"""The files and folders that a recipe names by path: which they are, which are missing, and the
SHA-256 of what they hold, cached in one file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Container, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError, DataError
from runner.files import hash_file, hash_json, load_json, look_at, write_json_atomic
from runner.recipe.data_files import find_source_files, list_splits, name_format
from runner.recipe.data_section import DataSource
from runner.recipe.parse import Recipe

# Built by `runner demo-models`; never to be asked of the hub, where such a name is free.
_DEMO_MODELS: Final = "demo_models/"
# A file that was written this recently may be written again under the same modification time.
_SETTLED_AFTER_NANOSECONDS: Final = 2_000_000_000


class ContentHashes:
    """SHA-256 of files and folders, cached by size, mtime and inode in one JSON file."""

    def __init__(self, cache_path: Path) -> None:
        self._cache_path = cache_path
        self._cache = _load_cache(cache_path)
        self._is_changed = False

    def known(self, path: Path, files: Iterable[Path] | None = None) -> str | None:
        """The hash if it is cached for the file as it is now; nothing is read."""
        if path.is_dir():
            files = _files_in(path) if files is None else files
            parts = {str(file.relative_to(path)): self.known(file) for file in files}
            return None if None in parts.values() else hash_json(parts)
        try:
            state = path.stat()
        except OSError:
            return None
        entry = self._cache.get(str(path.resolve()))
        return (
            entry[3]
            if entry and entry[:3] == [state.st_size, state.st_mtime_ns, state.st_ino]
            else None
        )

    def is_outdated(self, path: Path, files: Iterable[Path] | None = None) -> bool:
        """Whether something was hashed here and has changed since, as far as size, mtime and inode
        tell; nothing is read.
        """
        if path.is_dir():
            files = list(_files_in(path) if files is None else files)
            are_cached = [str(file.resolve()) in self._cache for file in files]
            return any(are_cached) and self.known(path, files) is None
        return str(path.resolve()) in self._cache and self.known(path) is None

    def hash(self, path: Path, files: Iterable[Path] | None = None) -> str:
        """The hash of a file's bytes, or of a folder's relative names and their bytes.

        `files` are those of the folder that are read; None: all but hidden ones.
        """
        if path.is_dir():
            files = _files_in(path) if files is None else files
            return hash_json({str(file.relative_to(path)): self.hash(file) for file in files})
        if (known := self.known(path)) is not None:
            return known
        state, digest = path.stat(), hash_file(path)
        if time.time_ns() - state.st_mtime_ns > _SETTLED_AFTER_NANOSECONDS:
            self._cache[str(path.resolve())] = [
                state.st_size,
                state.st_mtime_ns,
                state.st_ino,
                digest,
            ]
            self._is_changed = True
        return digest

    def save(self) -> None:
        """Write the cache; a cache that is lost or overwritten by another process only costs
        time.
        """
        if self._is_changed:
            # A full disk stops those runs that need it, not every command.
            with contextlib.suppress(CorruptFileError, OSError):
                write_json_atomic(
                    self._cache_path, {**_load_cache(self._cache_path), **self._cache}
                )
            self._is_changed = False


_MAX_CACHE_BYTES: Final = 256 << 20  # of a million files


def _load_cache(path: Path) -> dict[str, list[Any]]:
    try:
        cache = load_json(path, _MAX_CACHE_BYTES)
    except (CorruptFileError, OSError):
        return {}
    entries = cache.items() if isinstance(cache, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 4}


def _files_in(folder: Path) -> list[Path]:
    """Its files at any depth, without hidden ones and hidden folders: downloads keep time stamps
    there.
    """
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    # A hidden part shows as a dot at the start, or behind a slash.
    return [folder / file for file in sorted(files) if "/." not in f"/{file.as_posix()}"]


@dataclass(frozen=True)
class Content:
    """A path that recipes name, and the sources that read rows of it; none for models and
    templates.
    """

    path: str
    sources: tuple[DataSource, ...] = ()


def list_content_paths(recipe: Recipe) -> dict[str, str]:
    """`dotted key -> relative path` of what the recipe names by path; hub ids name themselves by
    revision.
    """
    named = {
        "model.path": recipe.model.path,
        "model.chat_template": recipe.model.chat_template,
        **{f"data.{key}.path": source.path for key, source in recipe.data.sources.items()},
    }
    local = {
        key: path
        for key, path in named.items()
        if path and (Path(path).exists() or _is_surely_local(key, path))
    }
    return local | recipe.list_python_files()


def list_contents(recipe: Recipe) -> list[Content]:
    """Everything that the recipe names by path, sorted by path; each path once."""
    sources = recipe.data.sources.values()
    return [
        Content(path, tuple(source for source in sources if source.path == path))
        for path in sorted(set(list_content_paths(recipe).values()))
    ]


def known_content(content: Content, hashes: ContentHashes) -> str | None:
    """The hash of what is named, if it is cached and still there; reads no file."""
    path = Path(content.path)
    try:
        return hashes.known(path, _find_files(content)) if path.exists() else None
    except DataError:  # it is for `check` and a launch to say so
        return None


def _is_outdated(content: Content, hashes: ContentHashes) -> bool:
    path = Path(content.path)
    try:
        return path.exists() and hashes.is_outdated(path, _find_files(content))
    except DataError:
        return False


def _find_files(content: Content) -> set[Path] | None:
    """The files of a folder of rows that the sources choose there; None where they read all of its
    rows: then everything in it counts, as it did before files could be chosen.

    Raises: DataError, where a source leaves open which files it means.
    """
    if not content.sources:
        return None
    folder = Path(content.path)
    if folder.is_dir() and all(
        list_splits(folder, source.config_name) == (None,) for source in content.sources
    ):
        return None
    found = map(find_source_files, content.sources)
    return {file for one in found for file in (*one.files, *one.read_for_choice)}


def _is_surely_local(key: str, path: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else is a path, whether or not it is there."""
    has_file_suffix = Path(path).suffix == ".jinja" or name_format(Path(path)) is not None
    if path.startswith(_DEMO_MODELS):
        return True
    return (
        key == "model.chat_template"
        or has_file_suffix
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
    )


def list_missing_files(recipe: Recipe) -> dict[str, str]:
    """`dotted key -> path` of what the recipe names by path and is not there, content or not."""
    named = {
        **list_content_paths(recipe),
        "launch.accelerate_config": recipe.launch.accelerate_config,
    }
    return {key: path for key, path in named.items() if not Path(path).exists()}


def hint_at_missing(paths: Iterable[str]) -> str:
    """How files come to be there that a recipe names."""
    if any(path.startswith(_DEMO_MODELS) for path in paths):
        return "runner demo-models  # builds the demo's models"
    return (
        "paths are relative to the folder where `runner` is started; replace them in the recipe"
        " template, or for one launch with an override such as data.train.path=FILE"
    )


def hash_contents(recipe: Recipe, hashes: ContentHashes) -> dict[str, str]:
    """`relative path -> SHA-256` of everything that the recipe names by path; of a folder of rows,
    of the files that are read.

    Raises:
        DataError: a file is missing (all missing ones are named) or cannot be read, or a source of
            rows leaves open which files are meant.
    """
    if missing := list_missing_files(recipe):
        raise DataError(
            f"recipe {recipe.run.name} names files that are not there:\n"
            + "\n".join(f"  {key}: {path}" for key, path in missing.items()),
            hint=hint_at_missing(missing.values()),
        )
    for key, source in recipe.data.sources.items():
        try:
            if Path(source.path).exists():
                find_source_files(source)
        except DataError as error:
            raise DataError(f"data.{key}: {error.message}", hint=error.hint) from None
    try:
        contents = {
            content.path: hashes.hash(Path(content.path), _find_files(content))
            for content in list_contents(recipe)
        }
    except OSError as error:
        raise DataError(
            f"recipe {recipe.run.name} names a file that cannot be read: {error}"
        ) from None
    hashes.save()
    return contents


def hash_what_is_there(
    recipe: Recipe, hashes: ContentHashes, only: Container[str] | None = None
) -> dict[str, str]:
    """As `hash_contents`, without what is missing or leaves open which files are meant, and `only`
    of these paths.
    """
    contents = {}
    for content in list_contents(recipe):
        if only is not None and content.path not in only:
            continue
        path = Path(content.path)
        with contextlib.suppress(DataError):
            if path.exists():
                contents[content.path] = hashes.hash(path, _find_files(content))
    return contents


class KnownContents:
    """As `hash_contents`, for what is cached and still there; reads no file. Many recipes name the
    same few files: each is looked at once until `refresh`.

    `outdated` are paths of what was changed since it was hashed: what names them is compared
    without them.
    """

    def __init__(self, cache_path: Path) -> None:
        self._cache_path = cache_path
        self._cache_state = look_at(cache_path)
        self._hashes = ContentHashes(cache_path)
        self._known: dict[Content, str | None] = {}
        self.outdated: set[str] = set()

    def refresh(self) -> None:
        """Look again at everything from here on, also at the cache of hashes."""
        state = look_at(self._cache_path)
        if state != self._cache_state:
            self._cache_state, self._hashes = state, ContentHashes(self._cache_path)
        self._known.clear()
        self.outdated.clear()

    def find(self, contents: Iterable[Content]) -> dict[str, str]:
        """`path -> SHA-256` of what is cached and still there."""
        found = {}
        for content in contents:
            if content not in self._known:
                self._known[content] = known_content(content, self._hashes)
                if self._known[content] is None and _is_outdated(content, self._hashes):
                    self.outdated.add(content.path)
            digest = self._known[content]
            if digest is not None:
                found[content.path] = digest
        return found
