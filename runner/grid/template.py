"""Jinja for recipes: a sandbox that is strict about names and quotes every interpolation for YAML.

Defines the `yaml` filter, limits what a template may do and how much time and memory it may use,
and finds the place of a template's error. Knows nothing about grids.

Jinja's sandbox gives templates from others access only to their variables. It does not limit what
they compute, so a child process renders them under the kernel's limits.
"""

from __future__ import annotations

import json
import math
import os
import re
import resource
import signal
import traceback
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any, Final, NoReturn

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateSyntaxError,
    Undefined,
    nodes,
)
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runner.errors import GridError, RunnerError
from runner.processes import die_with_parent
from runner.recipe.problems import escape_text
from runner.secrets import find_secret

_MEMORY_GIB: Final = 2
_WORDING_SECONDS: Final = 2  # from the limit of CPU time to the kill, to write the error message
_MAX_ANSWER_BYTES: Final = 2**28
_MAX_ERROR_CHARACTERS: Final = 10_000

# Jinja's own filters, without those that are random, write markup, or put text around a quoted
# value.
_FILTERS: Final = (
    "abs",
    "default",
    "first",
    "float",
    "int",
    "items",
    "join",
    "last",
    "length",
    "list",
    "lower",
    "map",
    "max",
    "min",
    "reject",
    "rejectattr",
    "replace",
    "round",
    "select",
    "selectattr",
    "sort",
    "string",
    "sum",
    "trim",
    "unique",
    "upper",
)
_STATEMENTS: Final = (nodes.Output, nodes.If, nodes.For, nodes.Include, nodes.Assign)
# A quoted value must be a whole YAML value, not part of one: `data/{{ task | yaml }}` would keep
# its quotes.
_COMMENT: Final = re.compile(r"(^|\s)#")
_BEFORE_VALUE: Final = re.compile(
    r'\s*(- +)*(("[^"]*"|[\w.-]*): +|- +)?|[^#]*[\[{]([^#]*[\[{,:])? *'
)
_AFTER_VALUE: Final = re.compile(r" *($|[,\]}]|: )| +#")

# Control characters, no-break space, zero-width and direction marks, line and paragraph separators,
# BOM, noncharacters: YAML refuses some and folds others, and the rest are invisible.
_ESCAPED: Final = re.compile(
    '[\x00-\x1f"\\\\\x7f-\xa0\xad\u061c\u200b-\u200f'
    "\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\U000e0000-\U000e0fff]"
)
_SHORT_ESCAPES: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_PLAIN_KEY: Final = re.compile(
    r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[A-Za-z_][A-Za-z0-9_]*", re.IGNORECASE
)


def quote_yaml(value: Any) -> str:
    r"""One line of YAML that a recipe reader turns back into `value`, whatever characters it holds.

    >>> print(quote_yaml("no"), quote_yaml(2e-5), quote_yaml([True, None]), quote_yaml("a ${b}\n"))
    "no" 2.0e-05 [true, null] "a \\${b}\n"

    Raises:
        GridError: `value` is not made of text, numbers, booleans, null, lists and mappings.
    """
    if isinstance(value, Undefined):
        str(value)  # raises UndefinedError, which contains the name
    if isinstance(value, str):
        return _quote_text(escape_text(value))
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float) and math.isfinite(value):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML 1.1 reads 2e-05 as a text
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return (
            "{"
            + ", ".join(f"{_quote_key(key)}: {quote_yaml(item)}" for key, item in value.items())
            + "}"
        )
    if isinstance(value, list | tuple):
        return "[" + ", ".join(quote_yaml(item) for item in value) + "]"
    raise GridError(f"{value!r} ({type(value).__name__}) cannot be written to a recipe")


def _quote_text(text: str) -> str:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise GridError(f"{text!r} holds half of a surrogate pair, which UTF-8 cannot encode")
    return '"' + _ESCAPED.sub(lambda match: _escape_character(match[0]), text) + '"'


def _escape_character(character: str) -> str:
    code = ord(character)
    return _SHORT_ESCAPES.get(character) or (
        f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
    )


def _quote_key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else _quote_text(key)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Templates of one folder: strict about names, with few filters and no function but `range`."""

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(
            loader=None if folder is None else _CheckedLoader(folder),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self.filters = {name: self.filters[name] for name in _FILTERS}
        self.globals = {"range": self.globals["range"]}


class _CheckedLoader(FileSystemLoader):
    """Reads a template only if every interpolation in it is quoted; does not find `..` and absolute
    paths.
    """

    def get_source(
        self, environment: Environment, template: str
    ) -> tuple[str, str, Callable[[], bool]]:
        source, filename, is_fresh = super().get_source(environment, template)
        if secret := find_secret(source):
            line = source.count("\n", 0, secret[1]) + 1
            raise TemplateSyntaxError(
                f"holds {secret[0]}: secrets come from the environment only",
                line,
                template,
                filename,
            )
        for line, what in _list_template_problems(environment.parse(source, template, filename)):
            raise TemplateSyntaxError(what, line, template, filename)
        return source, filename, is_fresh


def _list_template_problems(tree: nodes.Template) -> list[tuple[int, str]]:
    problems: list[tuple[int, str]] = []
    for statement in tree.find_all(nodes.Stmt):
        if not isinstance(statement, _STATEMENTS):
            what = (
                f"`{type(statement).__name__.lower()}` is not allowed in recipe templates:"
                " use if, for, set and include"
            )
            problems.append((statement.lineno, what))
        elif isinstance(statement, nodes.Include) and statement.ignore_missing:
            problems.append((statement.lineno, "`ignore missing` would hide a misspelt file"))
        elif isinstance(statement, nodes.Output):
            problems += _list_output_problems(statement.nodes)
    return sorted(problems)


def _list_output_problems(parts: Sequence[nodes.Expr]) -> list[tuple[int, str]]:
    problems: list[tuple[int, str]] = []
    text = [part.data if isinstance(part, nodes.TemplateData) else '""' for part in parts]
    for position, part in enumerate(parts):
        if isinstance(part, nodes.TemplateData):
            continue
        before = "".join(text[:position]).rpartition("\n")[2]
        after = "".join(text[position + 1 :]).partition("\n")[0]
        if not (isinstance(part, nodes.Filter) and part.name == "yaml"):
            what = (
                "this interpolation is not quoted:"
                " end it with `| yaml`, and put ( ) around the expression before"
            )
            problems.append((part.lineno, what))
        elif not (
            _COMMENT.search(before)
            or (_BEFORE_VALUE.fullmatch(before) and _AFTER_VALUE.match(after))
        ):
            what = (
                "a quoted value inside a longer one would keep its quotes: write"
                ' {{ ("text" ~ variable) | yaml }} instead'
            )
            problems.append((part.lineno, what))
    return problems


def build_sandbox(folder: Path) -> TemplateSandbox:
    """The environment of recipe templates, with the filter `yaml`, which writes values."""
    sandbox = TemplateSandbox(folder)
    sandbox.filters["yaml"] = quote_yaml
    return sandbox


def compile_name(pattern: str) -> Callable[[Mapping[str, Any]], str]:
    """A function from the labels of a cell to its run name. Raises: `jinja2.TemplateError`, as does
    the function.
    """
    sandbox = TemplateSandbox()
    sandbox.finalize = lambda value: (
        json.dumps(value) if value is None or isinstance(value, bool) else value
    )
    return sandbox.from_string(pattern).render


def locate_error(error: Exception, folder: Path) -> tuple[Path | None, int | None]:
    """The file inside `folder` and the 1-based line at which an exception was raised, by Jinja or
    by code that it called.
    """
    if isinstance(error, TemplateSyntaxError) and error.filename:
        return Path(error.filename), error.lineno
    found: tuple[Path | None, int | None] = (None, None)
    step = error.__traceback__
    while step is not None:
        path = Path(step.tb_frame.f_code.co_filename)
        if path.is_relative_to(folder):
            found = (path, step.tb_lineno)
        step = step.tb_next
    return found


def word_error(error: Exception) -> str:
    """The message of an exception that an expression of a template raised."""
    if isinstance(error, MemoryError):
        return f"needs more than {_MEMORY_GIB} GiB of memory"
    return str(error)


class _OutOfTime(Exception):
    """The limit of CPU time is reached."""


def run_limited(work: Callable[[], Any], cpu_seconds: int, place: str) -> Any:
    """The JSON value that `work` returns in a child process with limits on CPU time and on memory
    (2 GiB).

    Both limits raise exceptions in `work`, as any expression may, so `work` can report the place.
    The kernel kills a child that does not get that far or has no memory left for it.

    Raises:
        GridError: `work` raised a RunnerError, or a limit was reached at `place`.
    """
    parent_pid = os.getpid()
    readable, writable = os.pipe()
    child_pid = os.fork()
    if child_pid == 0:
        _answer(work, cpu_seconds, writable, parent_pid)
    os.close(writable)
    try:
        with open(readable, "rb") as pipe:
            text = pipe.read()
    except BaseException:  # Ctrl-C
        os.kill(child_pid, signal.SIGKILL)
        raise
    finally:
        os.waitpid(child_pid, 0)
    try:
        answer = json.loads(text)
    except ValueError:  # cut off, or none
        raise GridError(
            f"{place} needs more than {cpu_seconds} seconds of CPU time"
            f" or {_MEMORY_GIB} GiB of memory"
        ) from None
    if "refusal" in answer:
        message, hint = answer["refusal"]
        raise GridError(message, hint=hint)
    if "defect" in answer:
        raise RuntimeError(answer["defect"])
    return answer["value"]


def _answer(work: Callable[[], Any], cpu_seconds: int, writable: int, parent_pid: int) -> NoReturn:
    """Run the child and write its answer; at a limit there is none. Never returns."""
    try:
        die_with_parent(parent_pid)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent decides
        _limit_this_process(cpu_seconds)
        try:
            answer: dict[str, Any] = {"value": work()}
        except RunnerError as error:
            answer = {"refusal": [error.message[:_MAX_ERROR_CHARACTERS], error.hint]}
        except OSError as error:
            answer = {"refusal": [str(error), None]}
        except Exception as error:
            if isinstance(error, MemoryError | _OutOfTime):
                os._exit(1)
            answer = {"defect": traceback.format_exc()}
        text = json.dumps(answer).encode()
        if len(text) > _MAX_ANSWER_BYTES:
            what = f"the recipes of the grid take more than {_MAX_ANSWER_BYTES >> 20} MiB together"
            text = json.dumps({"refusal": [what, None]}).encode()
        with open(writable, "wb") as pipe:
            pipe.write(text)
        os._exit(0)
    finally:
        os._exit(1)


def _limit_this_process(cpu_seconds: int) -> None:
    def run_out(number: int, frame: FrameType | None) -> NoReturn:
        signal.signal(signal.SIGXCPU, signal.SIG_IGN)  # it comes every second from now on
        raise _OutOfTime(f"needs more than {cpu_seconds} seconds of CPU time")

    signal.signal(signal.SIGXCPU, run_out)
    _lower_limit(resource.RLIMIT_CPU, cpu_seconds, cpu_seconds + _WORDING_SECONDS)
    # In addition to the parent's memory: in tests it includes torch, which maps more than 2 GiB.
    num_pages = int(Path("/proc/self/statm").read_text().split()[0])
    num_bytes = num_pages * resource.getpagesize() + _MEMORY_GIB * 2**30
    _lower_limit(resource.RLIMIT_AS, num_bytes, num_bytes)
    _lower_limit(resource.RLIMIT_CORE, 0, 0)


def _lower_limit(kind: int, soft: int, hard: int) -> None:
    ceiling = resource.getrlimit(kind)[1]
    if ceiling != resource.RLIM_INFINITY:  # set by `ulimit`
        soft, hard = min(soft, ceiling), min(hard, ceiling)
    resource.setrlimit(kind, (soft, hard))
