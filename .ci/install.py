"""Installs this project into the virtual environment that runs it, in the versions of
constraints.txt. `make` calls it: `.venv/bin/python .ci/install.py .`, or `'.[dev]'`.

uv installs in seconds, pip in a minute. uv is used if it is on PATH or in the package index; if it
fails, pip is used. uv reads none of pip's settings, so this passes on the settings about the source
of packages. If pip has a setting without a counterpart here, pip installs. Both install the same
versions: all are pinned.

Uses the standard library only, because a new machine has nothing else.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import os
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Final

ROOT: Final = Path(__file__).resolve().parent.parent
CONSTRAINTS: Final = str(ROOT / "constraints.txt")
PIP: Final = (sys.executable, "-m", "pip")

# Setting of pip -> variable of uv, and the separator of a list there.
_VARIABLES: Final = {
    "cert": ("SSL_CERT_FILE", ""),
    "constraint": ("UV_CONSTRAINT", " "),
    "default-timeout": ("UV_HTTP_TIMEOUT", ""),
    "extra-index-url": ("UV_INDEX", " "),
    "find-links": ("UV_FIND_LINKS", ","),
    "index-url": ("UV_DEFAULT_INDEX", ""),
    "timeout": ("UV_HTTP_TIMEOUT", ""),
    "trusted-host": ("UV_INSECURE_HOST", " "),
}
# These do not change what is installed, nor from where.
_WITHOUT_EFFECT: Final = {
    "cache-dir",
    "disable-pip-version-check",
    "no-cache-dir",
    "no-color",
    "no-input",
    "no-warn-script-location",
    "progress-bar",
    "quiet",
    "require-virtualenv",
    "retries",
    "root-user-action",
    "verbose",
}


def parse_settings(lines: Iterable[str]) -> dict[str, str]:
    """Settings that `pip install` uses, from the lines of `pip config list`: environment variables
    override the section `install`, which overrides `global`.

    >>> parse_settings([":env:.index-url='b'", "global.index-url='a'", "download.pre='true'"])
    {'index-url': 'b'}
    """
    found: dict[str, dict[str, str]] = {"global": {}, "install": {}, ":env:": {}}
    for line in lines:
        name, _, value = line.partition("=")
        section, _, key = name.rpartition(".")
        # pip, too, takes an empty value for none.
        if section in found and (text := str(ast.literal_eval(value))):
            found[section][key] = text
    return found["global"] | found["install"] | found[":env:"]


def find_unknown(settings: Mapping[str, str]) -> list[str]:
    """The settings that only pip can heed.

    >>> find_unknown({"index-url": "a", "no-binary": "numpy", "retries": "3"})
    ['no-binary']
    """
    return sorted(settings.keys() - _VARIABLES.keys() - _WITHOUT_EFFECT)


def build_variables(settings: Mapping[str, str]) -> dict[str, str]:
    """The variables with the same meaning for uv.

    >>> build_variables({"find-links": "/a\\n/b", "trusted-host": "here there"})
    {'UV_FIND_LINKS': '/a,/b', 'UV_INSECURE_HOST': 'here there'}
    """
    return {
        variable: separator.join(settings[key].split()) if separator else settings[key]
        for key, (variable, separator) in _VARIABLES.items()
        if key in settings
    }


def find_uv() -> list[str] | None:
    """The command that runs uv, installed first if it is missing; None if it cannot be
    installed.
    """
    path = shutil.which("uv")
    if path is not None:
        return [path]
    if importlib.util.find_spec("uv") is None:
        subprocess.run([*PIP, "install", "--quiet", "--constraint", CONSTRAINTS, "uv"], check=False)
        importlib.invalidate_caches()
    return [sys.executable, "-m", "uv"] if importlib.util.find_spec("uv") is not None else None


def install_with_uv(what: str, settings: Mapping[str, str]) -> str | None:
    """None after it was installed, otherwise the reason why uv did not."""
    if unknown := find_unknown(settings):
        return f"pip gets {', '.join(unknown)}, which uv would ignore"
    uv = find_uv()
    if uv is None:
        return "the package index has no uv for this machine"
    command = [*uv, "pip", "install", "--python", sys.executable, "--constraint", CONSTRAINTS]
    # As pip: the best version of all indexes, not the first index that has any.
    command += ["--index-strategy", "unsafe-best-match"]
    # pip compiles all that it installs. A demo runs a quarter of it, which make imports once.
    command += [] if what == "." else ["--compile-bytecode"]
    command += ["--editable", what]
    # Who has set a variable of uv has said more than a setting of pip does.
    done = subprocess.run(command, env={**build_variables(settings), **os.environ}, cwd=ROOT)
    return f"uv failed with {done.returncode}" if done.returncode else None


def main() -> int:
    """The exit code of the installer that came last."""
    os.environ["PIP_DISABLE_PIP_VERSION_CHECK"] = "1"
    (what,) = sys.argv[1:]
    shown = subprocess.run([*PIP, "config", "list"], check=True, capture_output=True, text=True)
    reason = install_with_uv(what, parse_settings(shown.stdout.splitlines()))
    if reason is None:
        return 0
    print(f"{reason}: pip installs", flush=True)
    command = [*PIP, "install", "--constraint", CONSTRAINTS, "--editable", what]
    return subprocess.run(command, cwd=ROOT, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
