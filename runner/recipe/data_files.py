"""The files of a local data source: those that a recipe reads, and those that it skips, with the
reason.

Splits are found by the names of files and folders, as the hub's libraries do
(https://huggingface.co/docs/hub/datasets-file-names-and-splits). Reads no rows and imports nothing
heavy, because `status` uses it to hash.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePath
from typing import Any, Final

import yaml

from runner.errors import DataError
from runner.recipe.data_section import DataSource
from runner.recipe.problems import suggest
from runner.recipe.reasons import count_reason
from runner.text import format_count

COMPRESSIONS: Final = (".gz", ".zst")
_TEXT_FORMATS: Final = (".jsonl", ".json", ".csv")
_FORMATS: Final = (*_TEXT_FORMATS, ".parquet", ".arrow")
ACCEPTED: Final = (
    f"{', '.join(_FORMATS)} (the first three also packed, as {' or '.join(COMPRESSIONS)})"
)
# Files that the hub and `save_to_disk` write next to the rows.
_METADATA: Final = frozenset(
    {"config.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json", "state.json"}
)
_KEYWORDS: Final = {
    "train": ("train", "training"),
    "validation": ("validation", "valid", "dev", "val"),
    "test": ("test", "testing", "eval", "evaluation"),
}
_CANONICAL: Final = {word: split for split, words in _KEYWORDS.items() for word in words}
# A keyword counts only as a separate word: no letter may be next to it.
_KEYWORD: Final = re.compile(
    rf"(?<![^-._ 0-9])({'|'.join(sorted(_CANONICAL, key=len, reverse=True))})(?![^-._ 0-9])",
    re.IGNORECASE,
)
_SHARD: Final = re.compile(r"(\w+(?:\.\w+)*)-[0-9]{5}-of-[0-9]{5}")
_MAX_README_CHARACTERS: Final = 1_000_000
_NUM_NAMED: Final = 3

HIDDEN: Final = "hidden files"
_OTHER_FORMATS: Final = "files that hold no rows"
_LINKED: Final = "links to folders"
_NO_SPLIT: Final = "files whose names contain no split"

Files = tuple[Path, ...]


@dataclass(frozen=True)
class SourceFiles:
    """The files that a local data source is read from, in order, with facts about the others.

    `skipped` maps a reason to the names of the files that are not read. `saved_dir` is the folder
    that `save_to_disk` wrote, if any. `notes` name the keys that have no effect. `read_for_choice`
    are files that are also read, to choose the others.
    """

    files: Files
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    saved_dir: Path | None = None
    notes: tuple[str, ...] = ()
    read_for_choice: Files = ()


@dataclass(frozen=True)
class _Folder:
    """The data files of a folder by split; None: their names contain no split."""

    by_split: Mapping[str | None, Files]
    skipped: Mapping[str, tuple[str, ...]]
    saved_dirs: Mapping[str | None, Path] = field(default_factory=dict)
    read_for_choice: Files = ()


def name_format(path: PurePath) -> str | None:
    """The suffix of a file's format, without that of its compression; None: unknown format.

    >>> name_format(PurePath("a.jsonl.gz")), name_format(PurePath("a.parquet.gz"))
    ('.jsonl', None)
    """
    suffix = path.suffix.lower()
    if suffix in COMPRESSIONS:
        suffix = path.with_suffix("").suffix.lower()
        return suffix if suffix in _TEXT_FORMATS else None
    return suffix if suffix in _FORMATS else None


def find_source_files(source: DataSource) -> SourceFiles:
    """The files that a data source reads from the file or folder at its path, which must exist.

    Raises:
        DataError: a key of the source has no meaning there, or the names do not determine the
            files.
    """
    path = Path(source.path)
    if source.revision is not None:
        raise DataError(
            f"`revision: {source.revision}` is a commit of a data set on the hub, and {path} is"
            f" a local {'folder' if path.is_dir() else 'file'}",
            hint="leave it out, or write `revision: null`; local files are hashed anyway",
        )
    if path.is_dir():
        return _choose_split(source, _list_folder(path, source.config_name))
    if source.config_name is not None:
        raise DataError(
            f"`config_name: {source.config_name}` names a part of a data set on the hub or of a"
            f" folder, and {path} is one file",
            hint="leave it out, or write `config_name: null`",
        )
    if not _is_split(source.split, ("train", name_split(PurePath(path.name)))):
        raise DataError(
            f"`split: {source.split}` chooses among the files of a folder or the splits of a data"
            f" set on the hub, and {path} is one file",
            hint="leave `split` out, or write `split: train`: all rows of the file are read",
        )
    return SourceFiles((path,), notes=_note_split(source, "is one file: all of its rows are read"))


def list_splits(folder: Path, config_name: str | None = None) -> tuple[str | None, ...]:
    """The splits that the names in a folder contain, train first; None stands for files without a
    split.
    """
    return tuple(_sort_splits(_list_folder(folder, config_name).by_split))


def find_split(splits: Sequence[str | None], wanted: str) -> str | None:
    """The name that a wanted split has among `splits`: `validation` also finds `valid`, `val` or
    `dev`.

    >>> find_split(["train", "dev"], "validation"), find_split(["dev"], "test")
    ('dev', None)
    """
    if wanted in splits:
        return wanted
    alike = [split for split in splits if split is not None and _is_split(wanted, (split,))]
    return alike[0] if len(alike) == 1 else None


def describe_files(names: Sequence[str]) -> str:
    """The first few of several names.

    >>> describe_files(["a", "b", "c", "d"])
    'a, b, c and 1 more'
    """
    more = f" and {len(names) - _NUM_NAMED} more" if len(names) > _NUM_NAMED else ""
    return ", ".join(names[:_NUM_NAMED]) + more


def _sort_splits(splits: Iterable[str | None]) -> list[str | None]:
    """Train, validation, test, then others by name, and last the files without a split."""
    known = list(_KEYWORDS)

    def place(split: str | None) -> tuple[int, str]:
        if split is None:
            return len(known) + 1, ""
        kind = _CANONICAL.get(split)
        return len(known) if kind is None else known.index(kind), split

    return sorted(splits, key=place)


def _is_split(wanted: str, names: Sequence[str | None]) -> bool:
    return any(
        name is not None and _CANONICAL.get(name, name) == _CANONICAL.get(wanted, wanted)
        for name in names
    )


def _note_split(source: DataSource, why: str) -> tuple[str, ...]:
    if not source.states_split:
        return ()
    return (f"`split: {source.split}` has no effect: {source.path} {why}",)


def _choose_split(source: DataSource, folder: _Folder) -> SourceFiles:
    by_split, path = folder.by_split, source.path
    if not by_split:
        reasons = "".join(
            f"\n  {count_reason(len(names), reason)}: {describe_files(names)}"
            for reason, names in folder.skipped.items()
        )
        raise DataError(f"the folder {path} holds no {ACCEPTED} file{reasons}")
    named = [split for split in _sort_splits(by_split) if split is not None]
    if not named:
        if source.split != "train":
            raise DataError(
                f"the folder {path} has no files for `split: {source.split}`: no name in it"
                f" contains a split ({_count(by_split)})",
                hint=(
                    "leave `split` out to read all of them, or name files after splits, such as"
                    f" {source.split}.jsonl"
                ),
            )
        notes = _note_split(source, "has no files named after splits: all of them are read")
        saved_dir = folder.saved_dirs.get(None)
        return SourceFiles(by_split[None], folder.skipped, saved_dir, notes, folder.read_for_choice)
    found = find_split(list(by_split), source.split)
    if found is None or (not source.states_split and len(by_split) > 1):
        raise _refuse_choice(source, by_split, named)
    skipped = dict(folder.skipped)
    if None in by_split:
        root = Path(path)
        skipped[_NO_SPLIT] = tuple(str(file.relative_to(root)) for file in by_split[None])
    return SourceFiles(
        by_split[found],
        skipped,
        folder.saved_dirs.get(found),
        read_for_choice=folder.read_for_choice,
    )


def _refuse_choice(
    source: DataSource, by_split: Mapping[str | None, Files], named: Sequence[str]
) -> DataError:
    holds = f"the folder {source.path} holds {_count(by_split)}"
    what = (
        f"no split {source.split!r}"
        if source.states_split
        else "the recipe does not say which split to read"
    )
    proposed = find_split(named, "train") or named[0]
    others = ", ".join(f"`split: {name}`" for name in named if name != proposed)
    hint = f"write `split: {proposed}` next to `path: {source.path}`"
    if others:
        hint += f", or {others}"
    if None in by_split:
        hint += "; or name a single file as `path`"
    return DataError(f"{holds}, and {what}", hint=hint)


def _count(by_split: Mapping[str | None, Files]) -> str:
    """The splits with their numbers of files.

    >>> _count({"train": (Path("a"), Path("b")), None: (Path("c"),)})
    'train (2 files), without a split (1 file: c)'
    """
    parts = []
    for split in _sort_splits(by_split):
        files = by_split[split]
        number = format_count(len(files), "file")
        if split is None:
            number += f": {describe_files([file.name for file in files])}"
        parts.append(f"{'without a split' if split is None else split} ({number})")
    return ", ".join(parts)


def _list_folder(folder: Path, config_name: str | None) -> _Folder:
    configs = _read_configs(folder)
    if configs:
        config = _choose_config(folder, configs, config_name)
        base = _inside(folder, config.get("data_dir") or ".")
        listed = (
            _list_patterns(folder, base, config["data_files"])
            if config.get("data_files")
            else _list_by_name(base)
        )
        return replace(listed, read_for_choice=(folder / "README.md",))
    if config_name is None:
        return _list_by_name(folder)
    base = _inside(folder, config_name)
    if not base.is_dir():
        names = [path.name for path in sorted(folder.iterdir()) if path.is_dir()]
        shown = [name for name in names if not _is_hidden(PurePath(name))]
        raise DataError(
            f"`config_name: {config_name}` is a folder inside a local data set, and {folder} has"
            f" no such folder{suggest(config_name, shown)}",
            hint=(f"its folders are {', '.join(shown)}" if shown else "write `config_name: null`"),
        )
    return _list_by_name(base)


def _list_by_name(folder: Path) -> _Folder:
    if saved := _list_saved(folder):
        return saved
    by_split: dict[str | None, list[Path]] = {}
    files, skipped = _walk(folder)
    for file in files:
        name = file.relative_to(folder)
        try:
            split = name_split(name)
        except ValueError as error:
            raise DataError(
                f"{file}: its name contains two splits, {error}",
                hint="rename it, or name single files or another folder as `path`",
            ) from None
        by_split.setdefault(split, []).append(file)
    return _Folder({split: tuple(found) for split, found in by_split.items()}, skipped)


def _walk(folder: Path) -> tuple[list[Path], dict[str, tuple[str, ...]]]:
    """The data files below a folder, sorted, and the others by the reason for skipping them."""
    files: list[Path] = []
    skipped: dict[str, list[str]] = {}
    for file in sorted(path for path in folder.rglob("*") if path.is_symlink() or path.is_file()):
        name = file.relative_to(folder)
        if _is_hidden(name):
            skipped.setdefault(HIDDEN, []).append(str(name))
        elif file.is_dir():  # a link, which may lead back here; `rglob` does not follow it
            skipped.setdefault(_LINKED, []).append(str(name))
        elif name_format(name) is None or name.name in _METADATA:
            skipped.setdefault(_OTHER_FORMATS, []).append(str(name))
        else:
            files.append(file)
    return files, {reason: tuple(names) for reason, names in skipped.items()}


def _is_hidden(name: PurePath) -> bool:
    """True for by-products of notebooks, archives, downloads and Python."""
    return any(part.startswith(".") or part in ("__MACOSX", "__pycache__") for part in name.parts)


def _list_saved(folder: Path) -> _Folder | None:
    """A folder that `save_to_disk` wrote: one data set, or one per split; None if it is not one."""
    dict_path, skipped = folder / "dataset_dict.json", _walk(folder)[1]
    hidden = {reason: names for reason, names in skipped.items() if reason == HIDDEN}
    if dict_path.is_file():
        try:
            splits = [str(split) for split in json.loads(dict_path.read_bytes())["splits"]]
        except (ValueError, KeyError, TypeError):
            raise DataError(f"{dict_path} does not list splits as `save_to_disk` does") from None
        dirs: dict[str | None, Path] = {split: _inside(folder, split) for split in splits}
    elif (folder / "state.json").is_file() and (folder / "dataset_info.json").is_file():
        dirs = {None: folder}
    else:
        return None
    by_split = {
        split: tuple(
            path
            for path in sorted(saved_dir.rglob("*"))
            if not path.is_dir() and not _is_hidden(path.relative_to(saved_dir))
        )
        for split, saved_dir in dirs.items()
    }
    read_for_choice = () if dirs == {None: folder} else (dict_path,)
    return _Folder(by_split, hidden, dirs, read_for_choice)


def name_split(name: PurePath) -> str | None:
    """The split in a file's path below a folder; None if there is none.

    A shard's name states it exactly (`train_sft-00000-of-00002.parquet`); otherwise it is a keyword
    in the name of the file or of a folder. Raises: ValueError, with both, if there are two.

    >>> [name_split(PurePath(n)) for n in ("val.csv", "dev/a.csv", "data/x-00000-of-00001.csv")]
    ['validation', 'validation', 'x']
    """
    shard = _SHARD.match(name.name)
    if shard is not None and (name.parts[:-1] == ("data",) or _KEYWORD.search(shard[1])):
        return shard[1]
    found: dict[str, None] = {}
    for part in name.parts:
        for keyword in _KEYWORD.findall(part):
            found[_CANONICAL[keyword.lower()]] = None
    if len(found) > 1:
        raise ValueError(" and ".join(found))
    return next(iter(found), None)


def _inside(folder: Path, name: Any) -> Path:
    """A path below a folder. Raises: DataError, for a path that leads out of it."""
    pure = PurePath(str(name))
    if pure.is_absolute() or ".." in pure.parts:
        raise DataError(f"{folder}: {str(name)!r} leads out of the folder")
    return folder / pure


def _read_configs(folder: Path) -> list[Mapping[str, Any]]:
    """The `configs` in the header of a data set's README, as the hub writes them; an empty list if
    there are none.
    """
    try:
        with (folder / "README.md").open(encoding="utf-8-sig") as stream:
            text = stream.read(_MAX_README_CHARACTERS)
    except (OSError, UnicodeDecodeError):
        return []
    head = re.match(r"---[ \t]*\n(.*?)\n---[ \t]*(?:\n|\Z)", text, re.DOTALL)
    # Only this block: the rest of the header can be long, and is not needed.
    block = head and re.search(r"^configs:.*\n(?:[ \t-].*\n?|\n)*", head[1] + "\n", re.MULTILINE)
    if not block:
        return []
    try:
        configs = yaml.safe_load(block[0])["configs"]
    except (yaml.YAMLError, RecursionError, ValueError, TypeError, KeyError) as error:
        line = str(error).partition("\n")[0]
        raise DataError(f"{folder}/README.md: its `configs` cannot be read: {line}") from None
    if not isinstance(configs, list | None):
        raise DataError(f"{folder}/README.md: its `configs` are not a list")
    named = [one for one in configs or [] if isinstance(one, Mapping) and "config_name" in one]
    if len(named) != len(configs or []):
        raise DataError(f"{folder}/README.md: one of its `configs` has no `config_name`")
    return named


def _choose_config(
    folder: Path, configs: Sequence[Mapping[str, Any]], wanted: str | None
) -> Mapping[str, Any]:
    names = [str(config["config_name"]) for config in configs]
    if wanted in names:
        return configs[names.index(wanted)]
    if wanted is None:
        by_default = [config for config in configs if config.get("default") is True] or [
            config for config in configs if config["config_name"] == "default"
        ]
        if len(configs) == 1 or len(by_default) == 1:
            return by_default[0] if by_default else configs[0]
        raise DataError(
            f"{folder}/README.md names {len(configs)} parts of this data set, and the recipe does"
            " not say which to read",
            hint=f"write `config_name: {names[0]}`; its parts are {', '.join(names)}",
        )
    raise DataError(
        f"{folder}/README.md has no part `config_name: {wanted}`{suggest(wanted, names)}",
        hint=f"its parts are {', '.join(names)}",
    )


def _list_patterns(folder: Path, base: Path, data_files: Any) -> _Folder:
    """The files that match a README's patterns, by split."""
    by_split: dict[str | None, Files] = {}
    for split, patterns in _read_patterns(data_files):
        found: dict[Path, None] = {}
        for pattern in patterns:
            for path in _glob(base, pattern):
                if path.is_file() and not _is_hidden(path.relative_to(folder)):
                    found[path] = None
        if found:
            by_split[split] = (*by_split.get(split, ()), *found)
    named = {path for files in by_split.values() for path in files}
    files, skipped = _walk(base)
    for path in named:
        if name_format(path) is None:
            raise DataError(f"{path}: cannot tell the format, expected one of {ACCEPTED}")
    others = [str(path.relative_to(base)) for path in files if path not in named]
    if others:
        skipped["files that match no split of the README"] = tuple(others)
    return _Folder(by_split, skipped)


def _glob(base: Path, pattern: Any) -> list[Path]:
    """The paths that match a pattern below a folder. Raises: DataError, for an invalid pattern."""
    _inside(base, pattern)
    try:
        return sorted(base.glob(str(pattern)))
    except (ValueError, IndexError, NotImplementedError) as error:
        raise DataError(
            f"{base}: the README's pattern {str(pattern)!r} finds nothing: {error}"
        ) from None


def _read_patterns(data_files: Any) -> Iterator[tuple[str, Sequence[Any]]]:
    entries = data_files if isinstance(data_files, list) else [data_files]
    for entry in entries:
        if isinstance(entry, Mapping):
            path = entry.get("path") or []
            yield str(entry.get("split", "train")), path if isinstance(path, list) else [path]
        else:
            yield "train", [entry]
