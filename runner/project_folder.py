"""The project folder: finds it, records it in a run, and writes commands that can be pasted in the
user's current folder.

Every path in a recipe is relative to the project. The command line enters it before a verb, so all
other code reads paths relative to the current folder.
"""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import Final

from runner.errors import RunnerError

SETTINGS_FILE: Final = "runner.toml"
TEMPLATES: Final = "recipe_templates"
MARKER_TEXT: Final = """\
# This file marks the folder as a project of `runner`: paths in recipes are relative to it, from
# wherever `runner` is started. It has no settings yet, and no key is accepted.
"""
_MAX_SETTINGS_BYTES: Final = 65_536
# The commands in a hint: at the start of a line, in backquotes, or after a colon.
_COMMAND: Final = re.compile(r"(^ *|`|: )(runner [a-z]|mv )", re.MULTILINE)

# The user's folder while the project is the current folder, and the project.
_user_folder: Path | None = None
_project: Path | None = None


def is_project(folder: Path) -> bool:
    """True for a folder that holds `recipe_templates/` or `runner.toml`."""
    # Not with `Path`, which raises if a folder may not be read.
    return os.path.isdir(folder / TEMPLATES) or os.path.isfile(folder / SETTINGS_FILE)


def find_project_above(folder: Path) -> Path | None:
    """The nearest project at or above an absolute folder; None if there is none."""
    return next((one for one in (folder, *folder.parents) if is_project(one)), None)


def describe_no_project() -> str | None:
    """A message if the current folder is in no project; else None."""
    here = Path.cwd()
    if find_project_above(here) is not None:
        return None
    return f"no project here: neither {SETTINGS_FILE} nor {TEMPLATES}/ in {here} or above it"


def is_same_folder(one: Path, other: Path) -> bool:
    """True for two names of one existing folder."""
    with contextlib.suppress(OSError):
        return one.samefile(other)
    return False


def name_project(project: Path, folder: Path) -> str | None:
    """The text by which `folder`, of a run or of a submission, records its project: a relative path
    if it is inside, so that both can be moved or copied together; else the absolute path.

    None if JSON cannot hold the path.

    >>> name_project(Path("/study"), Path("/study/runs/demo/a"))
    '../../..'
    >>> name_project(Path("/study"), Path("/scratch/demo/a"))
    '/study'
    """
    project, folder = project.resolve(), folder.resolve()
    if folder.is_relative_to(project):
        return os.path.relpath(project, folder)
    try:
        str(project).encode()
    except UnicodeEncodeError:
        return None
    return str(project)


def check_settings(project: Path) -> None:
    """Raises: RunnerError for a `runner.toml` that cannot be read, or that holds a key."""
    path = project / SETTINGS_FILE
    if not os.path.isfile(path):
        return
    with path.open("rb") as stream:
        content = stream.read(_MAX_SETTINGS_BYTES + 1)
    if len(content) > _MAX_SETTINGS_BYTES:
        raise RunnerError(f"{path} has more than {_MAX_SETTINGS_BYTES} bytes")
    try:
        settings = tomllib.loads(content.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise RunnerError(f"{path} is not TOML: {error}") from None
    except RecursionError:
        raise RunnerError(f"{path} is not TOML: it is nested too deeply") from None
    if settings:
        raise RunnerError(
            f"{path}: {', '.join(settings)}: {SETTINGS_FILE} has no settings yet, it only marks the"
            " project",
            hint=f"remove the keys from {path}: recipes and options define a run",
        )


@contextlib.contextmanager
def entering(project: Path) -> Iterator[None]:
    """Make the project the current folder inside the `with` block."""
    global _user_folder, _project
    before = _user_folder, _project
    _user_folder, _project = Path.cwd(), project
    try:
        with contextlib.chdir(project):
            yield
    finally:
        _user_folder, _project = before


def find_user_folder() -> Path | None:
    """The user's current folder; None if it is the project."""
    return _user_folder


def pasteable(command: str) -> str:
    """A command with paths relative to the project, changed so that it can be pasted in the user's
    folder.
    """
    if _project is None:
        return command
    return f"cd {shlex.quote(str(_project))} && {command}"


def say_pasteable(text: str) -> str:
    """A hint whose commands can be pasted in the user's folder."""
    return _COMMAND.sub(lambda match: match[1] + pasteable(match[2]), text)
