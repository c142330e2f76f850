"""The files and folders that a recipe names by path: which they are, which are missing, and the
SHA-256 of what they hold, cached in one file.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError, DataError
from runner.files import hash_file, hash_json, load_json, write_json_atomic
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

    def known(self, path: Path) -> str | None:
        """The hash if it is cached for the file as it is now; nothing is read."""
        if path.is_dir():
            parts = {str(file.relative_to(path)): self.known(file) for file in _files_in(path)}
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

    def hash(self, path: Path) -> str:
        """The hash of a file's bytes, or of a folder's relative names and their bytes."""
        if path.is_dir():
            return hash_json(
                {str(file.relative_to(path)): self.hash(file) for file in _files_in(path)}
            )
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
            with contextlib.suppress(OSError):
                write_json_atomic(
                    self._cache_path, {**_load_cache(self._cache_path), **self._cache}
                )
            self._is_changed = False


def _load_cache(path: Path) -> dict[str, list[Any]]:
    try:
        cache = load_json(path)
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


def list_content_paths(recipe: Recipe) -> dict[str, str]:
    """`dotted key -> relative path` of what the recipe names by path; hub ids name themselves by
    revision.
    """
    named = {
        "model.path": recipe.model.path,
        "model.chat_template": recipe.model.chat_template,
        "data.train.path": recipe.data.train.path,
        "data.validation.path": recipe.data.validation and recipe.data.validation.path,
        "data.test.path": recipe.data.test and recipe.data.test.path,
    }
    return {
        key: path
        for key, path in named.items()
        if path and (Path(path).exists() or _is_surely_local(key, path))
    }


def _is_surely_local(key: str, path: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else is a path, whether or not it is there."""
    has_file_suffix = Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".jinja")
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
    """`relative path -> SHA-256` of everything that the recipe names by path.

    Raises:
        DataError: a file is missing (all missing ones are named) or cannot be read.
    """
    if missing := list_missing_files(recipe):
        raise DataError(
            f"recipe {recipe.run.name} names files that are not there:\n"
            + "\n".join(f"  {key}: {path}" for key, path in missing.items()),
            hint=hint_at_missing(missing.values()),
        )
    paths = list_content_paths(recipe)
    try:
        contents = {path: hashes.hash(Path(path)) for path in sorted(set(paths.values()))}
    except OSError as error:
        raise DataError(
            f"recipe {recipe.run.name} names a file that cannot be read: {error}"
        ) from None
    hashes.save()
    return contents


def known_contents(recipe: Recipe, hashes: ContentHashes) -> dict[str, str]:
    """As `hash_contents`, for what is cached and still there; reads no file."""
    known = {
        path: hashes.known(Path(path))
        for path in list_content_paths(recipe).values()
        if Path(path).exists()
    }
    return {path: digest for path, digest in known.items() if digest is not None}
