"""`runner recipe`: the keys of a recipe as text, as JSON, and as a JSON Schema for editors."""

from __future__ import annotations

import argparse
import json
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any, Final

from runner.errors import CorruptFileError, RunnerError, put_in_words

_STDOUT: Final = Path("-")
_HINT: Final = (
    "\nhint: `runner recipe training` shows one section, `runner recipe training.learning_rate`"
    " explains one key"
)


def add_recipe_verb(verbs: Any) -> None:
    """Add the verb and its options."""
    recipe = verbs.add_parser(
        "recipe", help="the keys of a recipe: all of them, one explained, a JSON Schema for editors"
    )
    recipe.add_argument(
        "key",
        metavar="KEY",
        nargs="?",
        help="a key or a section, such as training.learning_rate or adapter; default: all",
    )
    how = recipe.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="one object for each key")
    how.add_argument(
        "--json-schema",
        type=Path,
        nargs="?",
        const=_STDOUT,
        metavar="FILE",
        help="write a JSON Schema; default: to stdout; see docs/recipe_keys.md",
    )


def run_recipe(arguments: argparse.Namespace) -> int:
    """`runner recipe`; works in any folder."""
    if arguments.json_schema is not None:
        return _write_schema(arguments.json_schema, arguments.key)
    from runner.recipe.explain import format_found, format_list, format_owned
    from runner.recipe.keys import find_keys, list_all_keys, list_groups

    width = shutil.get_terminal_size().columns if sys.stdout.isatty() else None
    if arguments.key is None:
        if arguments.json:
            print(json.dumps([key.as_json() for key in list_all_keys()], indent=2))
        else:
            print(format_list(list_groups(), width))
            if width is not None:
                print(_HINT, file=sys.stderr)
        return 0
    found = find_keys(arguments.key)
    if found is None:
        raise _refuse_unknown(arguments.key)
    if found.owned is None and not (found.keys or found.groups):
        raise RunnerError(str(found.note))
    if arguments.json:
        keys = [*found.keys, *(key for group in found.groups for key in group.keys)]
        content: list[dict[str, Any]] = [key.as_json() for key in keys]
        if found.owned is not None:
            content = [found.owned.as_json()]
        print(json.dumps(content, indent=2))
        return 0
    if found.owned is not None:
        print(format_owned(found.owned, width))
        return 0
    if found.note is not None:
        print(f"note: {found.note}", file=sys.stderr)
    print(format_found(found, width))
    return 0


def _refuse_unknown(query: str) -> RunnerError:
    from runner.recipe.keys import suggest_key

    near = suggest_key(query)
    if near is None:
        return RunnerError(f"{query!r} is not a recipe key", hint="runner recipe  # lists all")
    return RunnerError(
        f"{query!r} is not a recipe key, did you mean `{near}`?", hint=f"runner recipe {near}"
    )


def _write_schema(path: Path, key: str | None) -> int:
    """Write the schema of a whole recipe to a file or to stdout.

    Raises:
        RunnerError: a key was named too, or the file is not a JSON Schema and would be lost.
    """
    from runner.files import write_bytes_atomic
    from runner.recipe.json_schema import build_schema

    if key is not None:
        raise RunnerError(
            f"`--json-schema` is about a whole recipe, and {key!r} is one key",
            hint=f"runner recipe {shlex.quote(key)} --json",
        )
    text = json.dumps(build_schema(), indent=2, ensure_ascii=False)
    if path == _STDOUT:
        print(text)
        return 0
    _check_replaceable(path)
    try:
        write_bytes_atomic(path, f"{text}\n".encode())
    except OSError as error:
        raise RunnerError(f"{path} cannot be written: {put_in_words(error)}") from None
    print(path)
    return 0


def _check_replaceable(path: Path) -> None:
    """Raise RunnerError if a file that is not a JSON Schema would be replaced, such as a recipe."""
    from runner.files import load_json

    if not path.exists():
        return
    try:
        content = load_json(path)
    except (CorruptFileError, OSError):
        content = None
    if not isinstance(content, dict) or "$schema" not in content:
        raise RunnerError(
            f"{path} exists and is not a JSON Schema, so it is not replaced",
            hint="runner recipe --json-schema recipe.schema.json",
        )
