"""Python functions of the user's project that a recipe names: their section, their files, and calls
in a separate process.

Nothing runs before `with_sources` has received the texts of all files. Only `run.allowed_code`,
which knows the allowed files, calls it. Arguments and return values are JSON.
"""

from __future__ import annotations

import hashlib
import json
import os
import stat
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal, Self

from pydantic import AfterValidator, Field, PrivateAttr, StringConstraints

from runner.child import ChildLostError, LimitedChild
from runner.errors import DataError, RefusedError
from runner.strict import Section

CPU_SECONDS: Final = 5  # of one call
WALL_SECONDS: Final = 120.0  # of one call; a busy machine needs long for a second of CPU time
_LOAD_CPU_SECONDS: Final = 60  # of the imports, before the first call
_GRACE_SECONDS: Final = 10.0  # time for the process to report its place itself
_FILE_BYTES: Final = 1 << 20

Score = Callable[[str, Sequence[str], Mapping[str, Any], str], float | None]


def _check_path(path: str) -> str:
    parts = path.split("/")
    if path.startswith(("/", "~")) or "\\" in path or {"", ".", ".."} & set(parts):
        raise ValueError(
            f"{path!r} should be the path of a file in the project: relative to the folder where"
            " `runner` is started, with `/`, without `.` and `..`, such as functions/rows.py"
        )
    if not path.endswith(".py"):
        raise ValueError(f"{path!r} should be a Python file, with a name that ends in .py")
    return path


def _check_function(function: str) -> str:
    path, colon, name = function.rpartition(":")
    if not colon or not name.isidentifier():
        raise ValueError(
            f"{function!r} should name a file and a function in it, such as rows.py:build"
        )
    _check_path(path)
    return function


def _check_module(path: str) -> str:
    parts = PurePosixPath(_check_path(path)).with_suffix("").parts
    if not all(part.isidentifier() for part in parts):
        raise ValueError(
            f"{path!r} cannot be imported: its name and those of its folders may hold only letters,"
            " digits and _"
        )
    if parts[0] in sys.stdlib_module_names or parts[0] == "runner":
        raise ValueError(f"{path!r} would hide Python's module `{parts[0]}`: rename it")
    return path


FunctionName = Annotated[str, AfterValidator(_check_function)]
ModulePath = Annotated[str, AfterValidator(_check_module)]


@dataclass(frozen=True)
class PythonFile:
    """One file of the project, as read."""

    path: str
    content: bytes

    @property
    def sha256(self) -> str:
        """The hash that the user allows, and that a recipe's digest contains."""
        return hashlib.sha256(self.content).hexdigest()


class UserFunction(Section):
    """A function of the project, `FILE.py:NAME`, and the other project files that it may import,
    each by its path (`lib/text.py` as `lib.text`).
    """

    function: FunctionName = Field(
        description="A function of the project, as FILE.py:NAME.",
        examples=["functions/rows.py:build"],
    )
    python_files: tuple[ModulePath, ...] = Field(
        default=(),
        description="Other files of the project that the function imports.",
        examples=[["lib/text.py"]],
    )
    _sources: Mapping[str, str] | None = PrivateAttr(None)

    def list_files(self) -> dict[str, str]:
        """`key of this section -> path` of all its files."""
        others = {f"python_files.{at}": path for at, path in enumerate(self.python_files)}
        return {"function": self.function.rpartition(":")[0], **others}

    def with_sources(self, sources: Mapping[str, str]) -> Self:
        """The same section, callable; `sources` maps the path of each of its files to its text."""
        allowed = self.model_copy()
        allowed._sources = {path: sources[path] for path in self.list_files().values()}
        return allowed

    @contextmanager
    def open_function(self) -> Iterator[FunctionProcess]:
        """The function, loaded in a separate process, which ends with the context.

        Raises:
            DataError: it cannot be loaded.
        """
        if self._sources is None:
            raise RefusedError(
                f"{self.function} was not allowed to run",
                hint="runner check --allow-code RECIPE",
            )
        path, _, name = self.function.rpartition(":")
        with FunctionProcess(self._sources, path, name) as process:
            yield process


class FunctionProcess:
    """One function in a separate process."""

    def __init__(
        self,
        sources: Mapping[str, str],
        path: str,
        name: str,
        *,
        cpu_seconds: int = CPU_SECONDS,
        wall_seconds: float = WALL_SECONDS,
    ) -> None:
        self._sources, self._path, self._name = sources, path, name
        self._cpu_seconds, self._wall_seconds = cpu_seconds, wall_seconds
        self._child = LimitedChild(
            "runner.function_child", wall_seconds=wall_seconds + _GRACE_SECONDS
        )

    def __enter__(self) -> Self:
        try:
            self._load()
        except BaseException:
            self._child.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self._child.close()

    def __call__(self, where: str, *arguments: Any) -> Any:
        """The function's return value for one row; `where` names the row in errors.

        Raises:
            DataError: it failed, exceeded a limit, or returned a value that JSON cannot hold.
        """
        if not self._child.is_running:  # lost in an earlier call
            self._load()
        request = {"arguments": [as_json(argument, where) for argument in arguments]}
        return self._ask(request, where, self._cpu_seconds)

    def _load(self) -> None:
        request = {"sources": dict(self._sources), "path": self._path, "name": self._name}
        self._ask(request, None, _LOAD_CPU_SECONDS)

    def _ask(self, request: Mapping[str, Any], where: str | None, cpu_seconds: int) -> Any:
        limits = {"cpu_seconds": cpu_seconds, "wall_seconds": self._wall_seconds}
        try:
            # The process reports its own place if it can still run Python.
            reply = self._child.ask({**request, **limits}, cpu_seconds=cpu_seconds + 1)
        except ChildLostError as error:
            raise self._fail(where, f"{self._path}, in `{self._name}`: {error}") from None
        if (failure := reply.get("failure")) is not None:
            path, line = failure["path"] or self._path, failure["line"]
            place = path if line is None else f"{path} line {line}"
            said = ": ".join(filter(None, (failure["kind"], failure["text"])))
            within = f", in `{self._name}`" if where is not None else ""
            raise self._fail(where, f"{place}{within}: {said}", failure["missing_module"])
        return reply["value"]

    def _fail(self, where: str | None, said: str, missing_module: str | None = None) -> DataError:
        hint = (
            f"fix the function or the row; a call may use {self._cpu_seconds} s of CPU time,"
            f" {self._wall_seconds:g} s of wall-clock time and 4 GiB; a failing function never"
            " leaves a row out or counts an answer as 0"
        )
        if missing_module is not None:
            path = missing_module.replace(".", "/")
            hint = f"install the package in the Python of `runner`: {missing_module}"
            if os.path.exists(f"{path}.py"):
                hint = f"name the file next to the function: python_files: [{path}.py]"
            elif os.path.isdir(path):
                hint = f"name the files of {path}/ that it needs in `python_files`"
        elif where is None:
            hint = f"define a function `{self._name}` in {self._path}"
        row = "" if where is None else f"{where}: "
        return DataError(f"{row}{said}", hint=hint)


class Metric(UserFunction):
    """A metric of generated answers: `NAME(prediction, references, row)` returns one number, or
    None if the answer is not judged.
    """

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z][A-Za-z0-9_]{0,63}$")] = Field(
        description="The metric's name in results and reports.", examples=["brief"]
    )
    mode: Literal["min", "max"] = Field(
        description="min: smaller is better. max: larger is better.", examples=["max"]
    )

    @contextmanager
    def open_score(self) -> Iterator[Score]:
        """The score of `(prediction, references, row, where)`; `where` names the row in errors.

        Raises:
            DataError: the function cannot be loaded, or a call fails or returns anything but a
                finite number or None.
        """
        with self.open_function() as function:

            def score(
                prediction: str, references: Sequence[str], row: Mapping[str, Any], where: str
            ) -> float | None:
                value = function(where, prediction, list(references), row)
                if value is None:
                    return None
                if not isinstance(value, int | float) or not abs(value) <= sys.float_info.max:
                    raise DataError(
                        f"{where}: {self.function} returned {json.dumps(value)[:100]} for the"
                        f" metric `{self.name}`",
                        hint="return one finite number, or None if an answer is not judged",
                    )
                return float(value)

            yield score


def read_python_file(path: str) -> PythonFile:
    """A file of the project, below the working directory.

    Raises:
        RefusedError: it or a folder above it is a link, or it is not a file of at most 1 MiB.
        DataError: it does not exist, or is not UTF-8.
    """
    place = Path()
    for part in PurePosixPath(path).parts:
        place /= part
        if place.is_symlink():
            raise RefusedError(
                f"{place} is a link to {os.readlink(place)}, but code must be inside the project",
                hint="copy the file into the project",
            )
    try:
        descriptor = os.open(place, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        with os.fdopen(descriptor, "rb") as stream:
            facts = os.fstat(descriptor)
            if not stat.S_ISREG(facts.st_mode) or facts.st_size > _FILE_BYTES:
                raise RefusedError(f"{place} is not a file of at most {_FILE_BYTES >> 20} MiB")
            content = stream.read()
    except OSError as error:
        raise DataError(f"{place} cannot be read: {error.strerror}") from None
    try:
        content.decode()
    except UnicodeDecodeError as error:
        raise DataError(f"{place}: is not UTF-8 text ({error})") from None
    return PythonFile(path, content)


def as_json(value: Any, where: str) -> Any:
    """A value in JSON's types, as a function receives it: dates and the like, from Arrow files,
    become texts.

    Raises:
        DataError: it holds bytes.
    """
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, Mapping):
        return {str(name): as_json(item, where) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [as_json(item, where) for item in value]
    if isinstance(value, bytes | bytearray | memoryview):
        raise DataError(
            f"{where}: holds bytes, which cannot be passed to a function",
            hint="leave the column out of the file",
        )
    return str(value)
