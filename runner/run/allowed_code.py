"""The Python files of a project that may run: the list of allowed hashes under an output root, and
recipes whose functions may be called.

Only `runner check --allow-code` writes the list. A changed file is a different file. The list is
valid only in the folder that it was written in, so a copy, perhaps of another person's runs, allows
nothing. Another machine that shares the folder can read it.
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
from runner.text import format_count


def suggest_allowing(
    paths: Sequence[str],
    output_root: Path,
    where: Sequence[str] = (),
    overrides: Sequence[str] = (),
) -> str:
    """The hint with the command that allows the functions of these recipes.

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
    """A command about the same runs, ready to paste."""
    words = [*words, *paths, *overrides]
    for one in where:
        words += ["--where", one]
    if output_root.absolute() != Path("runs").absolute():
        words += ["--output-root", str(output_root)]
    return pasteable(shlex.join(words))


def list_code_paths(recipes: Iterable[Recipe]) -> list[str]:
    """The Python files that recipes name, without repeats."""
    paths = (path for recipe in recipes for path in recipe.list_python_files().values())
    return list(dict.fromkeys(paths))


def allow_code(recipes: Iterable[Recipe], output_root: Path) -> list[PythonFile]:
    """Record the current contents of these recipes' files as allowed, in addition to those allowed
    before; return the files.

    Raises:
        RefusedError: a file is a link, or is not a file.
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
    """Refuse recipes whose functions are not allowed in their current form; `hint` says how to
    allow them.

    Raises:
        RefusedError: with all files that are not allowed.
        DataError: a file cannot be read.
    """
    paths = list_code_paths(recipes)
    if paths:
        _refuse_others([read_python_file(path) for path in paths], output_root, hint)


def load_code(
    recipe: Recipe, output_root: Path, hint: str, contents: Mapping[str, str] | None = None
) -> Recipe:
    """The recipe with functions that may be called. They run as read here, even if the files change
    later.

    `contents` are the hashes that the files of a run must have, `path -> SHA-256`.

    Raises:
        RefusedError: a file is not allowed, or differs from the one that the run began with.
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
                hint="change it back, or launch the run from step 0 with --fresh",
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
        size = format_count(len(file.content), "byte")
        lines.append(f"  {file.path}  {why}, {size}, sha256 {file.sha256[:12]}...")
    raise RefusedError(
        "recipes name Python files that would run with your rights:\n" + "\n".join(lines),
        hint=hint,
    )


def _load_allowed(output_root: Path) -> dict[str, Any]:
    """`SHA-256 -> path and size`; empty if there is no list, or if it was written elsewhere or by
    another program.
    """
    try:
        content = load_json(allowed_code_path(output_root))
        if content["folder"] == _identify(output_root) and isinstance(content["allowed"], dict):
            return dict(content["allowed"])
    except (CorruptFileError, OSError, TypeError, LookupError):
        pass
    return {}


def _identify(output_root: Path) -> int:
    """A number that a copy of the folder does not have, and on which machines that share it
    agree.
    """
    return output_root.stat().st_ino
