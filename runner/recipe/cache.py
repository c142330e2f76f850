"""A cache of the values in many recipe files, in one JSON file, for the verbs that only view runs.

Parsing YAML takes most of the time of a thousand recipes. An entry is valid only for the exact
bytes that it was made from, whatever their time stamps, and only under the code that made it. Its
values are validated again each time. A cache that is damaged, lost or overwritten only costs time.
Nothing that starts a run reads it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
from pathlib import Path
from typing import Any, Final

import pydantic
import yaml
from pydantic import ValidationError

import runner
from runner.errors import CorruptFileError, RecipeError
from runner.files import hash_json, hash_sources, load_json, read_plain, write_bytes_atomic
from runner.recipe.parse import Recipe, load_recipe
from runner.recipe.problems import SAFE_LOADER
from runner.recipe.values import read_values
from runner.secrets import list_refused_values
from runner.strict import list_texts

# Reading this many recipes is faster than reading the cache.
_NUM_PLAIN: Final = 64
_MAX_BYTES: Final = 64_000_000  # size of the cache file: more than the largest grid needs


class RecipeCache:
    """Loads recipes, from the cache if it has them; `save` adds the others to it.

    The first `num_plain` recipes are read without it.
    """

    def __init__(self, cache_path: Path, num_plain: int = _NUM_PLAIN) -> None:
        self._cache_path = cache_path
        self._num_plain = num_plain
        self._made_by = ""
        self._kept: dict[str, Any] | None = None  # the file's entries; None: not read yet
        self._used: dict[str, list[str]] = {}
        self._is_changed = False
        self._secrets = list_refused_values()

    def load(self, path: Path) -> Recipe:
        """Like `load_recipe`.

        Raises:
            RecipeError: as in `load_recipe`.
        """
        if self._num_plain > 0:
            self._num_plain -= 1
            return load_recipe(path)
        if self._kept is None:
            self._made_by = _describe_maker(self._cache_path.parent)
            self._kept = _load_entries(self._cache_path, self._made_by)
        try:
            content = read_plain(path) or b""
            text = content.decode()
        except (CorruptFileError, OSError, UnicodeDecodeError):
            return load_recipe(path)
        name, digest = os.path.abspath(path), hashlib.sha256(content).hexdigest()
        entry = _check_entry(self._kept.get(name), name, digest)
        try:
            if entry is None:
                # The line ends of a file that is opened as text.
                lines = text.replace("\r\n", "\n").replace("\r", "\n")
                entry = _build_entry(name, digest, read_values(lines, where=name))
            recipe = Recipe.model_validate_json(entry[2])
        except (RecipeError, ValidationError):  # `load_recipe` reports it
            return load_recipe(path)
        if self._secrets and self._holds_secret(text, entry[2]):
            return load_recipe(path)
        self._is_changed |= entry != self._kept.get(name)
        self._used[name] = entry
        return recipe

    def save(self) -> None:
        """Write new entries and drop those whose file no longer exists; creates no folder."""
        if not self._is_changed or not self._cache_path.parent.is_dir():
            return
        entries, num_bytes = {}, 0
        # Read again: another process may have written it in the meantime.
        for name, entry in {**_load_entries(self._cache_path, self._made_by), **self._used}.items():
            is_wanted = name in self._used or os.path.exists(name)
            size = len(name) + len(str(entry))
            if is_wanted and num_bytes + size <= _MAX_BYTES:
                entries[name] = entry
                num_bytes += size
        text = json.dumps({"made_by": self._made_by, "recipes": entries})
        # A full disk or a folder of another user must not stop a command that only views runs.
        with contextlib.suppress(CorruptFileError, OSError):
            write_bytes_atomic(self._cache_path, text.encode())
        self._is_changed = False

    def _holds_secret(self, text: str, values: str) -> bool:
        """True if the recipe holds the value of a secret variable of the current environment."""
        texts = "\n".join([text, *list_texts(json.loads(values))])
        return any(secret in texts for secret in self._secrets)


def _load_entries(cache_path: Path, made_by: str) -> dict[str, Any]:
    """`absolute path -> entry`; empty if other code made the file, or there is none."""
    try:
        content = load_json(cache_path, 2 * _MAX_BYTES)
        if content["made_by"] == made_by and isinstance(content["recipes"], dict):
            return dict(content["recipes"])
    except (CorruptFileError, OSError, TypeError, LookupError):
        pass
    return {}


def _build_entry(name: str, digest: str, values: str) -> list[str]:
    """The SHA-256 of the recipe file, a checksum of the entry, and the values as JSON."""
    return [digest, _compute_checksum(name, digest, values), values]


def _check_entry(entry: Any, name: str, digest: str) -> list[str] | None:
    """The entry, if it was made from a file with this hash and its checksum is right; else None."""
    if not isinstance(entry, list) or len(entry) != 3 or entry[0] != digest:
        return None
    is_whole = isinstance(entry[2], str) and entry[1] == _compute_checksum(name, digest, entry[2])
    return entry if is_whole else None


def _compute_checksum(name: str, digest: str, values: str) -> str:
    content = f"{digest} {name} {values}".encode(errors="surrogatepass")
    return hashlib.sha256(content).hexdigest()


def _describe_maker(output_root: Path) -> str:
    """A hash of everything that determines the values of a text: the code that reads it, by version
    and by content. It also depends on the output root, so another user's copy is not used.
    """
    sources = hash_sources(Path(runner.__file__).parent, ("recipe",))
    libraries = [
        yaml.__version__,
        SAFE_LOADER.__name__,
        pydantic.VERSION,
        platform.python_version(),
    ]
    with contextlib.suppress(OSError):
        libraries.append(str(output_root.stat().st_ino))
    return hash_json([runner.__version__, sources, libraries])
