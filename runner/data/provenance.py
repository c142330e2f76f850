"""Identifies the code that turns files into rows: our own source and the versions of libraries.

It is determined when this module is imported, along with the code that it describes, because a
worker may still run after a checkout was edited or a library upgraded.
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

# Libraries that read files, render chats, tokenize them, or write stored rows.
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
_NAME: Final = "recipe-runner"  # of the runner's distribution
# Packages of the runner that read, draw, render, prove and mask. Its top-level files, on which
# these depend, are included too.
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
    """Names and versions of everything that can be imported, from the names of folders."""
    folders = (Path(folder or ".") for folder in sys.path)
    return sorted({path.name for folder in folders for path in folder.glob("*.*-info")})


def hash_installed() -> str:
    """A hash of the names and versions of everything installed at the import and now. Code that is
    imported later, such as a function of the project, may use either.
    """
    return hash_json([_INSTALLED, _list_installed()])


def list_editable() -> list[str]:
    """Names of editable installs, except the runner. Their code changes under the same version, so
    it is unknown which code a function of the project imports.
    """
    names = set()
    for folder in {Path(folder or ".") for folder in sys.path}:
        names |= {path.stem for path in folder.glob("*.egg-link")}
        for path in folder.glob("*.dist-info/direct_url.json"):
            try:
                is_editable = load_json(path)["dir_info"].get("editable", False)
            except (KeyError, AttributeError):  # from an archive, or a commit
                continue
            except (CorruptFileError, OSError, TypeError):  # unknown, so it counts as editable
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
