"""The files and folders that a recipe names by path: lists them, finds those that are missing, and
computes the SHA-256 of their contents, cached in one file.
"""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Collection, Container, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, NamedTuple

from runner.errors import CorruptFileError, DataError, escape_controls, put_in_words
from runner.files import (
    FileState,
    hash_file,
    hash_json,
    load_json,
    look_at,
    write_json_atomic,
)
from runner.project_folder import find_user_folder, pasteable
from runner.recipe.data_files import find_source_files, list_splits, name_format
from runner.recipe.data_section import DataSource
from runner.recipe.model_files import find_missing_model_file
from runner.recipe.parse import Recipe
from runner.text import format_bytes

# Built by `runner demo-models`. Never requested from the hub, where anybody could take the name.
_DEMO_MODELS: Final = "demo_models/"
# Endings of the files that a model's folder may lack.
_OF_MODELS: Final = ("config.json", ".safetensors")
# A file that changed this recently may change again without new time stamps.
_SETTLED_AFTER_NANOSECONDS: Final = 2_000_000_000
# Reading more, or for longer, prints a notice: nothing else shows that the command is alive.
_LARGE_BYTES: Final = 2**30
_LONG_SECONDS: Final = 2.0


class _Entry(NamedTuple):
    """One file as it was when it was read; the first four are `look_at`'s."""

    size: int
    mtime_ns: int
    ctime_ns: int
    inode: int
    read_at_ns: int
    sha256: str

    def is_of(self, state: FileState | None) -> bool:
        """True if size, mtime, ctime and inode are unchanged."""
        return self[:4] == state

    @property
    def is_settled(self) -> bool:
        """True if every later change will have other time stamps."""
        # Only the ctime counts: anybody can set an mtime, even in the future.
        return self.read_at_ns - self.ctime_ns > _SETTLED_AFTER_NANOSECONDS


class ContentHashes:
    """SHA-256 of files and folders, cached by size, mtime, ctime and inode in one JSON file.

    `is_kept` is False in a preview; then `save` writes nothing.
    """

    def __init__(self, cache_path: Path, *, is_kept: bool = True) -> None:
        self._cache_path = cache_path
        self._cache = _load_cache(cache_path)
        self._is_kept = is_kept
        self._is_changed = False

    def known(self, path: Path, files: Iterable[Path] | None = None) -> str | None:
        """The cached hash, if nothing was touched since; reads no file.

        For views only: a file that changed twice in one instant looks unchanged.
        """
        if path.is_dir():
            files = _files_in(path) if files is None else files
            parts = {str(file.relative_to(path)): self.known(file) for file in files}
            return None if None in parts.values() else hash_json(parts)
        entry = self._find(path)
        return None if entry is None else entry.sha256

    def is_outdated(self, path: Path, files: Iterable[Path] | None = None) -> bool:
        """True if a hash is cached and something was touched since; reads no file."""
        if path.is_dir():
            files = list(_files_in(path) if files is None else files)
            are_cached = [str(file.resolve()) in self._cache for file in files]
            return any(are_cached) and self.known(path, files) is None
        return str(path.resolve()) in self._cache and self.known(path) is None

    def hash(self, path: Path, files: Iterable[Path] | None = None) -> str:
        """The hash of a file's bytes, or of a folder's relative names and their bytes.

        `files` are the files of the folder to hash; None: all except hidden ones.
        """
        if not path.is_dir():
            return self._hash_files(path, [path])[path]
        found = self._hash_files(path, _files_in(path) if files is None else files)
        return hash_json({str(file.relative_to(path)): digest for file, digest in found.items()})

    def measure_unread(self, files: Iterable[Path]) -> int:
        """The bytes that `hash` would read."""
        return sum(file.stat().st_size for file in files if self._find_settled(file) is None)

    def _hash_files(self, path: Path, files: Iterable[Path]) -> dict[Path, str]:
        """The hash of each file; reads only files that may have changed."""
        found: dict[Path, str] = {}
        unread: list[Path] = []
        for file in files:
            entry = self._find_settled(file)
            if entry is not None:
                found[file] = entry.sha256
            else:
                unread.append(file)
        if not unread:
            return found
        notice = _Notice(path, self.measure_unread(unread))
        for file in unread:
            # Taken before reading, so that a write in the meantime changes the state.
            read_at_ns, state = time.time_ns(), look_at(file)
            found[file] = hash_file(file, notice.print_once)
            if state is not None:
                self._cache[str(file.resolve())] = _Entry(*state, read_at_ns, found[file])
                self._is_changed = True
        return found

    def _find(self, path: Path) -> _Entry | None:
        state = look_at(path)
        entry = None if state is None else self._cache.get(str(path.resolve()))
        return entry if entry is not None and entry.is_of(state) else None

    def _find_settled(self, path: Path) -> _Entry | None:
        entry = self._find(path)
        return entry if entry is not None and entry.is_settled else None

    def save(self) -> None:
        """Write the cache. If it is lost or another process overwrites it, that only costs time."""
        if self._is_changed and self._is_kept:
            # A full disk should stop the runs that need space, not every command.
            with contextlib.suppress(CorruptFileError, OSError):
                write_json_atomic(
                    self._cache_path, {**_load_cache(self._cache_path), **self._cache}
                )
            self._is_changed = False


_MAX_CACHE_BYTES: Final = 256 << 20  # enough for a million files


class _Notice:
    """One line on stderr if reading takes long."""

    def __init__(self, path: Path, num_bytes: int) -> None:
        self._path, self._num_bytes = path, num_bytes
        self._began, self._is_printed = time.monotonic(), False

    def print_once(self) -> None:
        """Called after each block that was read."""
        is_long = time.monotonic() - self._began > _LONG_SECONDS
        if self._is_printed or not (is_long or self._num_bytes > _LARGE_BYTES):
            return
        self._is_printed = True
        print(
            f"reading {format_bytes(self._num_bytes)} of {escape_controls(str(self._path))}"
            " to check that nothing changed ...",
            file=sys.stderr,
        )


def _load_cache(path: Path) -> dict[str, _Entry]:
    """`path -> entry`, without the entries of another version."""
    try:
        cache = load_json(path, _MAX_CACHE_BYTES)
    except (CorruptFileError, OSError):
        return {}
    entries = cache.items() if isinstance(cache, dict) else ()
    return {name: _Entry(*entry) for name, entry in entries if _is_entry(entry)}


def _is_entry(value: Any) -> bool:
    if not isinstance(value, list) or len(value) != len(_Entry._fields):
        return False
    return all(isinstance(one, int) for one in value[:-1]) and isinstance(value[-1], str)


def _files_in(folder: Path) -> list[Path]:
    """The files of a folder at any depth, without hidden files and folders, in which downloads keep
    time stamps.
    """
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    # A hidden part has a dot at the start, or after a slash.
    return [folder / file for file in sorted(files) if "/." not in f"/{file.as_posix()}"]


@dataclass(frozen=True)
class Content:
    """A path that recipes name, and the data sources that read rows from it; models and templates
    have none.
    """

    path: str
    sources: tuple[DataSource, ...] = ()


def list_content_paths(recipe: Recipe) -> dict[str, str]:
    """`dotted key -> relative path` of everything that the recipe names by path. Hub ids are left
    out, because their revision identifies them.
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
    """The hash of a content, if it is cached and the files still exist; reads no file."""
    path = Path(content.path)
    try:
        return hashes.known(path, _find_files(content)) if path.exists() else None
    except DataError:  # `check` and a launch report it
        return None


def _is_outdated(content: Content, hashes: ContentHashes) -> bool:
    path = Path(content.path)
    try:
        return path.exists() and hashes.is_outdated(path, _find_files(content))
    except DataError:
        return False


def _find_files(content: Content) -> set[Path] | None:
    """The files that the sources choose in a folder of rows. None if they read all rows: then every
    file in it counts, as it did before files could be chosen.

    Raises: DataError, if a source does not say which files it means.
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


def _list_read(content: Content) -> Iterable[Path]:
    """The files that the hash covers."""
    path = Path(content.path)
    if not path.is_dir():
        return [path]
    files = _find_files(content)
    return _files_in(path) if files is None else files


def _is_surely_local(key: str, path: str) -> bool:
    """True if a name cannot be a hub id (`name` or `owner/name`) and is therefore a path, even if
    nothing is there.
    """
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
    """`dotted key -> path` of the named files that are missing, hashed or not. For a model's
    folder, the first file that is missing from it.
    """
    named = {
        **list_content_paths(recipe),
        "launch.accelerate_config": recipe.launch.accelerate_config,
    }
    missing = {key: path for key, path in named.items() if not Path(path).exists()}
    if lacking := find_missing_model_file(Path(recipe.model.path)):
        missing["model.path"] = str(lacking)
    return missing


def hint_at_missing(paths: Collection[str]) -> str:
    """A hint on how to provide the files that a recipe names."""
    if any(path.startswith(_DEMO_MODELS) for path in paths):
        return f"{pasteable('runner demo-models')}  # builds the demo's models"
    if any(Path(path).parent.is_dir() and path.endswith(_OF_MODELS) for path in paths):
        return (
            "copy the whole folder again, or name another one in `model.path`: a model's folder"
            " holds config.json and model.safetensors, or the shards that"
            " model.safetensors.index.json names (pickles such as *.bin are never loaded)"
        )
    user_folder = find_user_folder()
    found = [path for path in paths if user_folder is not None and (user_folder / path).exists()]
    if found:
        return (
            f"{found[0]} is in {user_folder}, but paths are relative to the project, {Path.cwd()}:"
            f" write the full path, {user_folder}/{found[0]}"
        )
    return (
        "paths are relative to the project; correct them in the recipe template, or for one launch"
        " with an override such as data.train.path=FILE"
    )


def _require_files(recipe: Recipe) -> None:
    """Refuse missing files, and data sources that do not say which files they mean."""
    if missing := list_missing_files(recipe):
        raise DataError(
            f"recipe {recipe.run.name} names files that do not exist:\n"
            + "\n".join(f"  {key}: {path}" for key, path in missing.items()),
            hint=hint_at_missing(missing.values()),
        )
    for key, source in recipe.data.sources.items():
        try:
            if Path(source.path).exists():
                find_source_files(source)
        except DataError as error:
            raise DataError(f"data.{key}: {error.message}", hint=error.hint) from None


def _build_unreadable(recipe: Recipe, error: OSError) -> DataError:
    return DataError(f"recipe {recipe.run.name} names a file that cannot be read: {error}")


def check_contents(recipe: Recipe) -> None:
    """Refuse what `hash_contents` refuses, without reading the files.

    Raises:
        DataError: as there.
    """
    _require_files(recipe)
    try:
        for content in list_contents(recipe):
            for file in _list_read(content):
                file.open("rb").close()
    except OSError as error:
        raise _build_unreadable(recipe, error) from None


def hash_contents(recipe: Recipe, hashes: ContentHashes) -> dict[str, str]:
    """`relative path -> SHA-256` of everything that the recipe names by path. The hash of a folder
    of rows covers only the files that are read.

    Raises:
        DataError: a file is missing (all missing ones are named) or cannot be read, or a data
            source does not say which files it means.
    """
    _require_files(recipe)
    try:
        contents = {
            content.path: hashes.hash(Path(content.path), _find_files(content))
            for content in list_contents(recipe)
        }
    except OSError as error:
        raise _build_unreadable(recipe, error) from None
    hashes.save()
    return contents


def find_contents(recipe: Recipe, hashes: ContentHashes, *, is_compared: bool) -> dict[str, str]:
    """`hash_contents` if the result will be compared; else an empty dict, after the same refusals.

    Raises:
        DataError: as there.
    """
    if is_compared:
        return hash_contents(recipe, hashes)
    check_contents(recipe)
    return {}


def hash_existing(
    recipe: Recipe, hashes: ContentHashes, only: Container[str] | None = None
) -> dict[str, str]:
    """Like `hash_contents`, without files that are missing and sources that do not say which files
    they mean. `only` limits it to these paths.
    """
    contents = {}
    is_model_whole = find_missing_model_file(Path(recipe.model.path)) is None
    for content in list_contents(recipe):
        if only is not None and content.path not in only:
            continue
        if content.path == recipe.model.path and not is_model_whole:
            continue
        path = Path(content.path)
        with contextlib.suppress(DataError):
            if path.exists():
                contents[content.path] = hashes.hash(path, _find_files(content))
    return contents


@dataclass(frozen=True)
class Inputs:
    """Facts about the files that a recipe names, found without reading them."""

    contents: Mapping[str, str]  # path -> SHA-256 of contents that are unchanged since last read
    named: tuple[str, ...] = ()  # paths of all contents
    touched: tuple[str, ...] = ()  # paths of contents that were touched since they were read
    unread: tuple[str, ...] = ()  # paths of contents never read under this output root
    missing: tuple[str, ...] = ()  # paths that do not exist, hashed or not


class KnownContents:
    """Like `hash_contents`, for contents that are cached and still exist; reads no file. Many
    recipes name the same few files, so each is checked once until `refresh`. `outdated` holds the
    paths that were touched since they were hashed. Recipes that name them are compared without
    them.
    """

    def __init__(self, cache_path: Path) -> None:
        self._cache_path = cache_path
        self._cache_state = look_at(cache_path)
        self._hashes = ContentHashes(cache_path)
        self._known: dict[Content, str | None] = {}
        self._exists: dict[str, bool] = {}
        self._lacking: dict[str, str | None] = {}  # missing files of models' folders, by path
        self.outdated: set[str] = set()

    def refresh(self) -> None:
        """Check everything again from now on, including the hash cache."""
        state = look_at(self._cache_path)
        if state != self._cache_state:
            self._cache_state, self._hashes = state, ContentHashes(self._cache_path)
        self._known.clear()
        self._exists.clear()
        self._lacking.clear()
        self.outdated.clear()

    def find(self, contents: Iterable[Content]) -> dict[str, str]:
        """`path -> SHA-256` of the contents that are cached and still exist."""
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

    def look(self, recipe: Recipe, contents: Sequence[Content] | None = None) -> Inputs:
        """The known facts about the files of a recipe; `contents` comes from `list_contents`."""
        contents = list_contents(recipe) if contents is None else contents
        found = self.find(contents)
        named = tuple(dict.fromkeys(content.path for content in contents))
        missing = [
            path for path in (*named, recipe.launch.accelerate_config) if not self._is_there(path)
        ]
        model = recipe.model.path
        unknown = [path for path in named if path not in found and path not in missing]
        if lacking := self._find_lacking(model):
            # Not "changed": a folder that lost a file cannot be compared.
            found.pop(model, None)
            unknown = [path for path in unknown if path != model]
            missing.append(lacking)
        return Inputs(
            found,
            named,
            touched=tuple(path for path in unknown if path in self.outdated),
            unread=tuple(path for path in unknown if path not in self.outdated),
            missing=tuple(missing),
        )

    def _is_there(self, path: str) -> bool:
        if path not in self._exists:
            self._exists[path] = Path(path).exists()
        return self._exists[path]

    def _find_lacking(self, model_path: str) -> str | None:
        if model_path not in self._lacking:
            lacking = find_missing_model_file(Path(model_path))
            self._lacking[model_path] = None if lacking is None else str(lacking)
        return self._lacking[model_path]


def list_changed(recipe: Recipe, contents: Mapping[str, str], cache_path: Path) -> dict[str, str]:
    """`path -> reason` of the contents that differ from `contents`, according to the cache. Reads
    only files that were touched since they were hashed, and none that are large.
    """
    inputs = KnownContents(cache_path).look(recipe)
    changed = {path: "is not there any more" for path in inputs.missing if path in contents}
    found = dict(inputs.contents)
    hashes = ContentHashes(cache_path)
    for content in list_contents(recipe):
        if content.path not in inputs.touched:
            continue
        try:
            if hashes.measure_unread(_list_read(content)) > _LARGE_BYTES:
                changed[content.path] = "was touched, and is too large to read again now"
                continue
            found[content.path] = hashes.hash(Path(content.path), _find_files(content))
        except (DataError, OSError) as error:
            changed[content.path] = f"cannot be read any more: {put_in_words(error)}"
    hashes.save()
    for path, digest in found.items():
        if contents.get(path, digest) != digest:
            changed[path] = "has another content"
    return changed
