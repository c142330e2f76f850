"""The manifest of a completed run: size and checksum of `model/`, of `recipe.json` and of every
file that `result.json` summarizes.

Owns how the files are listed and compared with their records. `result.json` holds the manifest, and
`plan.status` interprets damage. Checkpoints, trackers and attempts are not listed.
"""

from __future__ import annotations

import os
import shutil
import stat
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any, Final

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, StringConstraints

from runner.errors import escape_controls
from runner.files import fsync_dir, hash_file, hash_json, load_json
from runner.run.paths import RunPaths
from runner.text import format_count

_MAX_NAME: Final = 200
_SIGNATURE: Final = "result_sha256"
_MODEL_PREFIX: Final = f"{RunPaths(Path()).model_dir.name}/"
FOREIGN: Final = "was not written by the run"  # the damage of a file that is not listed
# File types that libraries load from a model folder; a README is not one of them.
_LOADED_SUFFIXES: Final = frozenset({".bin", ".jinja", ".json", ".model", ".py", ".safetensors"})
_LOADED_NAMES: Final = frozenset({"merges.txt", "vocab.txt"})
_OUTSIDE: Final = frozenset({"", ".", ".."})  # parts of names that lead outside


class FileRecord(BaseModel):
    """Size and content of one file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _require_inner(name: str) -> str:
    # Without `pathlib`, which is ten times as slow: thousands of results are read at a time.
    is_inner = not _OUTSIDE.intersection(name.split("/"))
    if not is_inner or not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"the file name {escape_controls(name)!r} is outside the run directory")
    return name


# Relative to the run directory, with POSIX separators; records are not trusted.
InnerName = Annotated[str, AfterValidator(_require_inner)]
Manifest = Mapping[str, FileRecord]


def list_summed_files(paths: RunPaths) -> list[Path]:
    """The files that `result.json` summarizes, and the recipe that it belongs to. There are answers
    only if texts were generated.
    """
    named = [paths.samples_path, paths.metrics_path, paths.eval_rows_path, paths.predictions_path]
    return [path for path in (paths.recipe_path, *named) if path.exists()]


def list_model_files(model_dir: Path) -> list[Path]:
    """Every file of an export, in order. Hidden files are left out: file systems and desktops
    create them.
    """
    found = [path for path in model_dir.rglob("*") if path.is_file()]
    return sorted(path for path in found if not _is_hidden(path, model_dir))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def record_files(files: list[Path], folder: Path) -> dict[str, FileRecord]:
    """The records of files, by name relative to `folder`; reads every byte."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            size=path.stat().st_size, sha256=hash_file(path)
        )
        for path in files
    }


def record_model(model_dir: Path) -> dict[str, FileRecord]:
    """The records of an export, which may still have another folder name, as the files of
    `model/`.
    """
    found = record_files(list_model_files(model_dir), model_dir)
    return {f"{_MODEL_PREFIX}{inner}": record for inner, record in found.items()}


def is_of_model(name: str) -> bool:
    """True if a file of the manifest belongs to `model/`.

    >>> [is_of_model(name) for name in ("model/config.json", "metrics.jsonl")]
    [True, False]
    """
    return name.startswith(_MODEL_PREFIX)


def measure_model(manifest: Manifest) -> int:
    """The recorded bytes of `model/`.

    >>> record = FileRecord(size=7, sha256="0" * 64)
    >>> measure_model({"model/config.json": record, "metrics.jsonl": record})
    7
    """
    return sum(record.size for name, record in manifest.items() if is_of_model(name))


def measure_files(paths: RunPaths, manifest: Manifest) -> dict[str, int]:
    """The sizes of the manifest's files that exist, by name. One `stat` call each; no byte is read.

    Raises:
        OSError: a file cannot be examined, which does not mean that it is gone.
    """
    sizes: dict[str, int] = {}
    folder = str(paths.run_dir)  # joining paths is slower than `stat`
    for name in manifest:
        try:
            state = os.stat(f"{folder}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISREG(state.st_mode):
            sizes[name] = state.st_size
    return sizes


def is_model_removed(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    """True if all of `model/` is gone: a user made room, and this is not damage."""
    names = [name for name in manifest if is_of_model(name)]
    return bool(names) and not any(name in sizes for name in names)


def find_other_sizes(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, str]:
    """The problem with each file that is missing or has another size, by name; pure.

    A `model/` that is completely gone is not a problem.
    """
    is_removed = is_model_removed(manifest, sizes)
    damage: dict[str, str] = {}
    for name, record in manifest.items():
        size = sizes.get(name)
        if size is None:
            if not (is_removed and is_of_model(name)):
                damage[name] = "is missing"
        elif size != record.size:
            damage[name] = f"has {format_count(size, 'byte')}, {record.size:,} were recorded"
    return damage


def find_damage(paths: RunPaths, manifest: Manifest) -> dict[str, str]:
    """The problem with each damaged file, by name; empty for an intact run. Reads every byte.

    A file in `model/` that the run did not write is also damage if a library that loads the folder
    would read it, for example as weights.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = measure_files(paths, manifest)
    damage = find_other_sizes(manifest, sizes)
    for name, record in manifest.items():
        if name not in sizes or name in damage:
            continue
        if hash_file(paths.run_dir / name) != record.sha256:
            damage[name] = "does not match its recorded checksum"
    if any(map(is_of_model, manifest)) and not is_model_removed(manifest, sizes):
        damage |= dict.fromkeys(_list_foreign(paths, manifest), FOREIGN)
    return damage


def sign_result(content: Mapping[str, Any]) -> dict[str, Any]:
    """The content of `result.json`: the result, and a checksum over all of it."""
    return {**content, _SIGNATURE: hash_json(content)}


def find_other_result(paths: RunPaths) -> dict[str, str]:
    """The problem with `result.json` according to its own checksum, in the form of `find_damage`.
    An older run has neither checksum nor manifest.
    """
    content = load_json(paths.result_path)
    if not isinstance(content, dict):
        return {}
    stated = content.pop(_SIGNATURE, None)
    if stated is None and content.get("files") is None:
        return {}
    try:
        if stated == hash_json(content):
            return {}
    except (ValueError, RecursionError):  # never signed like this
        pass
    return {paths.result_path.name: "was changed after it was written: its checksum does not match"}


def select_recipe(paths: RunPaths, manifest: Manifest) -> Manifest:
    """The record of `recipe.json` alone; empty if there is none."""
    name = paths.recipe_path.name
    return {name: manifest[name]} if name in manifest else {}


def _list_foreign(paths: RunPaths, manifest: Manifest) -> Iterator[str]:
    for path in list_model_files(paths.model_dir):
        name = path.relative_to(paths.run_dir).as_posix()
        if name not in manifest and _is_loaded(path):
            yield escape_controls(name)


def _is_loaded(path: Path) -> bool:
    return path.name in _LOADED_NAMES or not _LOADED_SUFFIXES.isdisjoint(path.suffixes)


def find_other_export(paths: RunPaths, manifest: Manifest) -> list[str]:
    """One line for each file that `model/` needs and whose copy in the new export next to it is
    missing or differs from its record.

    Intact files of `model/` are kept, so another version of a library may write those differently.
    """
    found, recorded = record_model(paths.model_partial_dir), _select_model(manifest)
    lines = []
    for name in _list_needed(paths, recorded):
        if name not in found:
            lines.append(f"{name} would be missing")
        elif found[name] != recorded[name]:
            lines.append(
                f"{name} would have {format_count(found[name].size, 'byte')}, sha256"
                f" {found[name].sha256[:12]}, but {format_count(recorded[name].size, 'byte')},"
                f" {recorded[name].sha256[:12]}, were recorded"
            )
    return lines


def _select_model(manifest: Manifest) -> Manifest:
    return {name: record for name, record in manifest.items() if is_of_model(name)}


def _list_needed(paths: RunPaths, recorded: Manifest) -> list[str]:
    """The recorded files that are missing in `model/` or damaged, by name; all files if the folder
    is gone.
    """
    sizes, damaged = measure_files(paths, recorded), find_damage(paths, recorded)
    return sorted(name for name in recorded if name in damaged or name not in sizes)


def restore_model_files(paths: RunPaths, manifest: Manifest) -> None:
    """Move the files that `model/` needs into place, from the export next to it that
    `find_other_export` has compared.

    Each file is replaced by one rename, and only if it is damaged or missing: after a kill, each
    file is either repaired or as it was before.
    """
    partial_dir, model_dir = paths.model_partial_dir, paths.model_dir
    recorded = _select_model(manifest)
    for path in list_model_files(partial_dir):
        if f"{_MODEL_PREFIX}{path.relative_to(partial_dir).as_posix()}" not in recorded:
            path.unlink()  # another version of a library wrote more files
    if not model_dir.exists():
        partial_dir.rename(model_dir)
        fsync_dir(paths.run_dir)
        return
    for name in _list_needed(paths, recorded):
        target = paths.run_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        (partial_dir / name.removeprefix(_MODEL_PREFIX)).replace(target)
        fsync_dir(target.parent)
    shutil.rmtree(partial_dir)


def describe_damage(damage: Mapping[str, str]) -> str:
    """One line: the first damaged file, and the number of others.

    >>> describe_damage({"metrics.jsonl": "is missing", "model/config.json": "is missing"})
    'metrics.jsonl is missing, and 1 more file'
    """
    (name, what), *more = damage.items()
    if not more:
        return f"{name} {what}"
    return f"{name} {what}, and {len(more)} more file{'s' if len(more) > 1 else ''}"
