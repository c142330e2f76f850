"""Rows come from files by way of our own source and of libraries; this says by which of them.

It is found out when the module is imported, with the code that it speaks of: a worker lives while a
checkout is edited or a library upgraded.
"""

from __future__ import annotations

import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Final

import runner
from runner.errors import CorruptFileError
from runner.files import hash_json, hash_sources, load_json
from runner.recipe.identity import RULES

# That read files, render chats, make tokens of them, or write what is stored.
_LIBRARIES: Final = (
    "transformers",
    "tokenizers",
    "jinja2",
    "datasets",
    "pyarrow",
    "pandas",
    "numpy",
    "pydantic",
    "zstandard",
)
_NAME: Final = "recipe-runner"  # of the runner, as it is installed
# Packages of the runner that read, draw, render, prove and mask; beside them its own files at the
# top, on which these stand.
PACKAGES: Final = ("data", "recipe")


def _list_versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for name in _LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def _list_installed() -> list[str]:
    """Names and versions of all that can be imported, as the names of folders say them."""
    folders = (Path(folder or ".") for folder in sys.path)
    return sorted({path.name for folder in folders for path in folder.glob("*.*-info")})


def hash_installed() -> str:
    """Of names and versions of all that was installed at the import and is now: what is imported
    late, such as a function of the project, may be of either.
    """
    return hash_json([_INSTALLED, _list_installed()])


def list_editable() -> list[str]:
    """Names of what is installed to be edited in place, but for the runner: its version stays the
    same while its code changes, so that nobody knows what a function of the project imports.
    """
    names = set()
    for folder in {Path(folder or ".") for folder in sys.path}:
        names |= {path.stem for path in folder.glob("*.egg-link")}
        for path in folder.glob("*.dist-info/direct_url.json"):
            try:
                is_editable = load_json(path)["dir_info"].get("editable", False)
            except (KeyError, AttributeError):  # of an archive, or a commit
                continue
            except (CorruptFileError, OSError, TypeError):  # nobody can tell
                is_editable = True
            if is_editable:
                names.add(path.parent.name.partition("-")[0].replace("_", "-"))
    return sorted(names - {_NAME})


_ROOT: Final = Path(runner.__file__).parent
SOURCE_OF_RUNNER: Final = hash_sources(_ROOT, ("*",))
_INSTALLED: Final = _list_installed()
PROVENANCE: Final[dict[str, Any]] = {
    "rules": RULES,
    "source": hash_sources(_ROOT, PACKAGES),
    "versions": _list_versions(),
}
