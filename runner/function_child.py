"""The program that runs one of the user's functions: loads it from the texts that the parent has
read and allowed, calls it row by row, and reports the place of a failure.

It reads no file of the project from the disk and imports only allowed files. It does not find a
file that the recipe does not name.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import importlib.util
import json
import os
import signal
import sys
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path, PurePosixPath
from types import FrameType, ModuleType
from typing import Any, Final

from runner.child import serve

# The module name of the function's file. Its own name could be that of a library.
_MODULE: Final = "function_of_the_project"


class LimitError(BaseException):
    """A call exceeded a limit; the function's `except Exception` does not catch this."""


class LoadError(Exception):
    """The file has no such function."""


class NamedFiles(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """Imports the named files of the project, each by its path: `lib/text.py` as `lib.text`."""

    def __init__(self, sources: Mapping[str, str]) -> None:
        self._sources = sources
        self._paths: dict[str, str] = {}
        self._packages: set[str] = set()
        for path in sources:
            parts = PurePosixPath(path).with_suffix("").parts
            if parts[-1] == "__init__" and len(parts) > 1:
                parts = parts[:-1]
                self._packages.add(".".join(parts))
            self._paths[".".join(parts)] = path
            self._packages |= {".".join(parts[:depth]) for depth in range(1, len(parts))}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        """Called by importlib."""
        if fullname not in self._paths and fullname not in self._packages:
            return None
        return importlib.util.spec_from_loader(
            fullname,
            self,
            origin=self._paths.get(fullname),
            is_package=fullname in self._packages,
        )

    def exec_module(self, module: ModuleType) -> None:
        """Called by importlib; a folder without a named `__init__.py` is an empty package."""
        if (path := self._paths.get(module.__name__)) is not None:
            exec(compile(self._sources[path], path, "exec"), module.__dict__)


class Program:
    """Answers the requests: the first loads the function, each later one has the arguments of a
    call.
    """

    def __init__(self) -> None:
        self._sources: Mapping[str, str] = {}
        self._function: Callable[..., Any] | None = None

    def __call__(self, request: Any) -> dict[str, Any]:
        """`{"value": ...}`, or `{"failure": ...}` with its kind, text and place."""
        try:
            signal.setitimer(signal.ITIMER_PROF, request["cpu_seconds"])
            signal.setitimer(signal.ITIMER_REAL, request["wall_seconds"])
            try:
                if self._function is None:
                    self._load(request)
                    return {"value": None}
                value = self._function(*request["arguments"])
                # Here, so that a value that JSON cannot hold counts as a failure of the function.
                text = json.dumps(value, default=_unpack_number, ensure_ascii=False)
                text.encode()
                return {"value": json.loads(text)}
            finally:
                signal.setitimer(signal.ITIMER_PROF, 0)
                signal.setitimer(signal.ITIMER_REAL, 0)
        except BaseException as error:
            return {"failure": self._describe(error)}

    def _load(self, request: Mapping[str, Any]) -> None:
        self._sources = request["sources"]
        _forget_project()
        sys.meta_path.insert(0, NamedFiles(self._sources))
        module = ModuleType(_MODULE)
        module.__file__ = request["path"]
        sys.modules[_MODULE] = module
        exec(compile(self._sources[request["path"]], request["path"], "exec"), module.__dict__)
        function = getattr(module, request["name"], None)
        if not callable(function):
            raise LoadError(f"defines no function `{request['name']}`")
        self._function = function

    def _describe(self, error: BaseException) -> dict[str, Any]:
        """The kind and text of an error, and the last line of the user's files in its traceback."""
        place: tuple[str | None, int | None] = (None, None)
        for frame, line in traceback.walk_tb(error.__traceback__):
            if frame.f_code.co_filename in self._sources:
                place = (frame.f_code.co_filename, line)
        if isinstance(error, SyntaxError) and error.filename in self._sources:
            place = (error.filename, error.lineno)
        kind = "" if isinstance(error, LimitError | LoadError) else type(error).__name__
        missing = error.name if isinstance(error, ModuleNotFoundError) else None
        text = error.msg if isinstance(error, SyntaxError) else str(error)
        return {
            "kind": kind,
            "text": text.encode(errors="backslashreplace").decode(),
            "path": place[0],
            "line": place[1],
            "missing_module": missing,
        }


def _forget_project() -> None:
    """Remove the folder where `runner` was started from the module path, and the folders below it
    that PYTHONPATH names.
    """
    project = Path.cwd().resolve()
    stated = set(os.environ.get("PYTHONPATH", "").split(os.pathsep))
    kept = []
    for entry in sys.path:
        folder = Path(entry).resolve()
        if folder == project or (entry in stated and folder.is_relative_to(project)):
            continue
        kept.append(entry)
    sys.path[:] = kept


def _unpack_number(value: Any) -> Any:
    """A NumPy number as a Python number."""
    if callable(item := getattr(value, "item", None)) and getattr(value, "size", 1) == 1:
        return item()
    raise TypeError(f"returned a {type(value).__name__}, which JSON cannot hold")


def _exceed_cpu(number: int, frame: FrameType | None) -> None:
    raise LimitError("used more CPU time than allowed for a call")


def _exceed_wall(number: int, frame: FrameType | None) -> None:
    raise LimitError("took longer than allowed for a call")


def main() -> int:
    """Load one function and call it until the parent sends no more requests."""
    signal.signal(signal.SIGPROF, _exceed_cpu)
    signal.signal(signal.SIGALRM, _exceed_wall)
    return serve(Program)


if __name__ == "__main__":
    sys.exit(main())
