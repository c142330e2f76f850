"""The manifest of a completed run: size and checksum of `model/`, of `recipe.json` and of every
file that `result.json` sums up.

Owns how the files are listed and compared with what was recorded. `result.json` holds the manifest,
and `plan.status` says what damage means. Checkpoints, trackers and attempts are not listed.
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

_MAX_NAME: Final = 200
_SIGNATURE: Final = "result_sha256"
_MODEL_PREFIX: Final = f"{RunPaths(Path()).model_dir.name}/"
FOREIGN: Final = "was not written by the run"  # the damage of a file that is not listed
# What libraries load of a folder with a model; a README is nothing to them.
_LOADED_SUFFIXES: Final = frozenset({".bin", ".jinja", ".json", ".model", ".py", ".safetensors"})
_LOADED_NAMES: Final = frozenset({"merges.txt", "vocab.txt"})
_OUTSIDE: Final = frozenset({"", ".", ".."})  # parts of names that lead elsewhere


class FileRecord(BaseModel):
    """Size and content of one file."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    size: Annotated[int, Field(ge=0)]
    sha256: Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


def _require_inner(name: str) -> str:
    # Not by `pathlib`, which takes ten times as long: thousands of results are read at once.
    is_inner = not _OUTSIDE.intersection(name.split("/"))
    if not is_inner or not name.isprintable() or len(name) > _MAX_NAME:
        raise ValueError(f"the file name {escape_controls(name)!r} leads out of the run directory")
    return name


# Relative to the run directory, as POSIX writes paths; a record may come from anybody.
InnerName = Annotated[str, AfterValidator(_require_inner)]
Manifest = Mapping[str, FileRecord]


def list_summed_files(paths: RunPaths) -> list[Path]:
    """The files that `result.json` sums up, and the recipe that it is of; answers are there only
    where some were generated.
    """
    named = [paths.samples_path, paths.metrics_path, paths.eval_rows_path, paths.predictions_path]
    return [path for path in (paths.recipe_path, *named) if path.exists()]


def list_model_files(model_dir: Path) -> list[Path]:
    """Every file of an export, in order, without hidden ones: those are of file systems and
    desktops.
    """
    found = [path for path in model_dir.rglob("*") if path.is_file()]
    return sorted(path for path in found if not _is_hidden(path, model_dir))


def _is_hidden(path: Path, folder: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(folder).parts)


def record_files(files: list[Path], folder: Path) -> dict[str, FileRecord]:
    """The records of files, by their names relative to `folder`; reads every byte."""
    return {
        path.relative_to(folder).as_posix(): FileRecord(
            size=path.stat().st_size, sha256=hash_file(path)
        )
        for path in files
    }


def record_model(model_dir: Path) -> dict[str, FileRecord]:
    """The records of an export, which may still have another name, as the files of `model/`."""
    found = record_files(list_model_files(model_dir), model_dir)
    return {f"{_MODEL_PREFIX}{inner}": record for inner, record in found.items()}


def is_of_model(name: str) -> bool:
    """Whether a file of the manifest is one of `model/`.

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
    """The sizes of the files of the manifest that are there, by name: one look at each, no byte is
    read.

    Raises:
        OSError: a file cannot be looked at, which does not mean that it is gone.
    """
    sizes: dict[str, int] = {}
    folder = str(paths.run_dir)  # joining paths takes longer than looking at them
    for name in manifest:
        try:
            state = os.stat(f"{folder}/{name}")
        except (FileNotFoundError, NotADirectoryError):
            continue
        if stat.S_ISREG(state.st_mode):
            sizes[name] = state.st_size
    return sizes


def is_model_removed(manifest: Manifest, sizes: Mapping[str, int]) -> bool:
    """Whether `model/` is gone as a whole: somebody made room, and nothing is damaged by it."""
    names = [name for name in manifest if is_of_model(name)]
    return bool(names) and not any(name in sizes for name in names)


def find_other_sizes(manifest: Manifest, sizes: Mapping[str, int]) -> dict[str, str]:
    """What is wrong with each file that is missing or has another size, by its name; pure.

    A `model/` that is gone as a whole is nothing wrong.
    """
    is_removed = is_model_removed(manifest, sizes)
    damage: dict[str, str] = {}
    for name, record in manifest.items():
        size = sizes.get(name)
        if size is None:
            if not (is_removed and is_of_model(name)):
                damage[name] = "is missing"
        elif size != record.size:
            damage[name] = f"has {size:,} bytes, {record.size:,} were recorded"
    return damage


def find_damage(paths: RunPaths, manifest: Manifest) -> dict[str, str]:
    """What is wrong with each file, by its name; empty for a run that is whole. Reads every byte.

    A file in `model/` that the run has not written is damage too where a library that loads the
    folder would read it, say as the weights.

    Raises:
        OSError: a file cannot be read.
    """
    sizes = measure_files(paths, manifest)
    damage = find_other_sizes(manifest, sizes)
    for name, record in manifest.items():
        if name not in sizes or name in damage:
            continue
        if hash_file(paths.run_dir / name) != record.sha256:
            damage[name] = "holds other bytes than were recorded"
    if any(map(is_of_model, manifest)) and not is_model_removed(manifest, sizes):
        damage |= dict.fromkeys(_list_foreign(paths, manifest), FOREIGN)
    return damage


def sign_result(content: Mapping[str, Any]) -> dict[str, Any]:
    """What `result.json` holds: the result, and a checksum of all of it."""
    return {**content, _SIGNATURE: hash_json(content)}


def find_other_result(paths: RunPaths) -> dict[str, str]:
    """What is wrong with `result.json` by its own checksum, as `find_damage` says it; an older run
    has none, and no manifest either.
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
    except (ValueError, RecursionError):  # nothing that was ever signed
        pass
    return {paths.result_path.name: "is not as it was written: its checksum does not match"}


def select_recipe(paths: RunPaths, manifest: Manifest) -> Manifest:
    """The record of `recipe.json` alone; empty where there is none."""
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
    """One line for each file that `model/` needs and of which the export beside it has not the
    recorded one.

    A file of `model/` that is whole is kept, so another version of a library may write it
    differently.
    """
    found, recorded = record_model(paths.model_partial_dir), _select_model(manifest)
    lines = []
    for name in _list_needed(paths, recorded):
        if name not in found:
            lines.append(f"{name} would be missing")
        elif found[name] != recorded[name]:
            lines.append(
                f"{name} would have {found[name].size:,} bytes of sha256 {found[name].sha256[:12]},"
                f" recorded are {recorded[name].size:,} of {recorded[name].sha256[:12]}"
            )
    return lines


def _select_model(manifest: Manifest) -> Manifest:
    return {name: record for name, record in manifest.items() if is_of_model(name)}


def _list_needed(paths: RunPaths, recorded: Manifest) -> list[str]:
    """The recorded files that are missing in `model/` or damaged, by name; all where it is gone."""
    sizes, damaged = measure_files(paths, recorded), find_damage(paths, recorded)
    return sorted(name for name in recorded if name in damaged or name not in sizes)


def mend_model(paths: RunPaths, manifest: Manifest) -> None:
    """Put what `model/` needs of the export beside it, which `find_other_export` has compared, into
    its place.

    File by file, each by one rename, and only where another one is there: a kill in between leaves
    some mended and the others as they were.
    """
    partial_dir, model_dir = paths.model_partial_dir, paths.model_dir
    recorded = _select_model(manifest)
    for path in list_model_files(partial_dir):
        if f"{_MODEL_PREFIX}{path.relative_to(partial_dir).as_posix()}" not in recorded:
            path.unlink()  # another version of a library writes more
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
    """One line: the first damaged file, and how many there are besides it.

    >>> describe_damage({"metrics.jsonl": "is missing", "model/config.json": "is missing"})
    'metrics.jsonl is missing, and 1 more file'
    """
    (name, what), *more = damage.items()
    if not more:
        return f"{name} {what}"
    return f"{name} {what}, and {len(more)} more file{'s' if len(more) > 1 else ''}"
