"""Which Python files of a project may run: the list of allowed hashes under an output root, and
recipes whose functions may be called.

`runner check --allow-code` alone writes the list. A file that changed is another file, and the list
counts only in the folder that it was written in: a copy, of somebody else's runs perhaps, allows
nothing. Reading it on another machine that shares the folder does.
"""

from __future__ import annotations

import shlex
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.errors import CorruptFileError, RefusedError
from runner.files import load_json, write_json_atomic
from runner.functions import PythonFile, read_python_file
from runner.project_folder import pasteable
from runner.recipe.parse import Recipe
from runner.run.paths import allowed_code_path


def suggest_allowing(
    paths: Sequence[str],
    output_root: Path,
    where: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> str:
    """The hint at the command that allows the functions of these recipes.

    >>> suggest_allowing(["recipes/my study"], Path("runs"))
    "runner check --allow-code 'recipes/my study'  # after you have read them"
    """
    words = ["runner", "check", "--allow-code"]
    return (
        f"{spell_command(words, paths, output_root, where, overrides)}  # after you have read them"
    )


def spell_command(
    words: Sequence[str],
    paths: Sequence[str],
    output_root: Path,
    where: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> str:
    """A command about the same runs, as it can be pasted."""
    words = [*words, *paths, *overrides]
    for one in where:
        words += ["--where", one]
    if output_root.absolute() != Path("runs").absolute():
        words += ["--output-root", str(output_root)]
    return pasteable(shlex.join(words))


def list_code_paths(recipes: Iterable[Recipe]) -> list[str]:
    """The Python files that recipes name, each once."""
    paths = (path for recipe in recipes for path in recipe.list_python_files().values())
    return list(dict.fromkeys(paths))


def allow_code(recipes: Iterable[Recipe], output_root: Path) -> list[PythonFile]:
    """Note the files of these recipes as they are now, beside those that were allowed before;
    returns them.

    Raises:
        RefusedError: a file is a link, or is no file.
        DataError: a file cannot be read.
    """
    files = [read_python_file(path) for path in list_code_paths(recipes)]
    if files:
        allowed = _load_allowed(output_root)
        allowed |= {
            file.sha256: {"path": file.path, "num_bytes": len(file.content)} for file in files
        }
        output_root.mkdir(parents=True, exist_ok=True)
        content = {"folder": _identify(output_root), "allowed": allowed}
        write_json_atomic(allowed_code_path(output_root), content)
    return files


def require_allowed(recipes: Iterable[Recipe], output_root: Path, hint: str) -> None:
    """Refuse recipes with functions that were not allowed as they are now; `hint` says how to
    allow them.

    Raises:
        RefusedError: with all files that were not.
        DataError: a file cannot be read.
    """
    paths = list_code_paths(recipes)
    if paths:
        _refuse_others([read_python_file(path) for path in paths], output_root, hint)


def load_code(
    recipe: Recipe, output_root: Path, hint: str, contents: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe with functions that may be called: they run as they were read here, whatever
    becomes of the files.

    `contents` are the hashes that the files must have, `path -> SHA-256`, of a run.

    Raises:
        RefusedError: a file was not allowed, or is another one than the run began with.
        DataError: a file cannot be read.
    """
    paths = list_code_paths([recipe])
    if not paths:
        return recipe
    files = [read_python_file(path) for path in paths]
    _refuse_others(files, output_root, hint)
    if contents is not None:
        changed = [file.path for file in files if contents.get(file.path) != file.sha256]
        if changed:
            raise RefusedError(
                f"{', '.join(changed)} changed since the run was prepared",
                hint="change it back, or launch the run anew with --fresh",
            )
    return recipe.with_sources({file.path: file.content.decode() for file in files})


def _refuse_others(files: Sequence[PythonFile], output_root: Path, hint: str) -> None:
    allowed = _load_allowed(output_root)
    others = [file for file in files if file.sha256 not in allowed]
    if not others:
        return
    known = {entry.get("path") for entry in allowed.values() if isinstance(entry, dict)}
    lines = []
    for file in others:
        why = "changed since it was allowed" if file.path in known else "was not allowed yet"
        size = f"{len(file.content):,} bytes"
        lines.append(f"  {file.path}  {why}, {size}, sha256 {file.sha256[:12]}...")
    raise RefusedError(
        "recipes name Python files that would run with your rights:\n" + "\n".join(lines),
        hint=hint,
    )


def _load_allowed(output_root: Path) -> dict[str, Any]:
    """`SHA-256 -> path and size`; empty where there is no list, or one that was written elsewhere
    or by something else.
    """
    try:
        content = load_json(allowed_code_path(output_root))
        if content["folder"] == _identify(output_root) and isinstance(content["allowed"], dict):
            return dict(content["allowed"])
    except (CorruptFileError, OSError, TypeError, LookupError):
        pass
    return {}


def _identify(output_root: Path) -> int:
    """A number that a copy of the folder does not have, and that machines which share it agree
    on.
    """
    return output_root.stat().st_ino
