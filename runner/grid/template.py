"""Jinja as recipes may use it: a sandbox, strict about names, in which every interpolation is
quoted for YAML.

Owns the `yaml` filter, what a template may do, and where a template went wrong. Knows nothing of
grids.

The sandbox keeps borrowed templates away from everything but their variables. Loops, texts and
lists have limits, so that none of them takes minutes or gigabytes by accident or by one trick;
hundreds of tricks may still take long.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import wraps
from pathlib import Path
from typing import Any, Final

from jinja2 import (
    Environment,
    FileSystemLoader,
    StrictUndefined,
    TemplateSyntaxError,
    Undefined,
    nodes,
)
from jinja2.exceptions import SecurityError
from jinja2.runtime import Context, str_join
from jinja2.sandbox import ImmutableSandboxedEnvironment

from runner.errors import GridError
from runner.recipe.problems import escape_text
from runner.secrets import find_secret

MAX_OUTPUT_CHARACTERS: Final = 1_000_000
MAX_ROUNDS: Final = 200_000  # of all loops of one text together
_MAX_EXPONENT: Final = 100
_MAX_VALUE: Final = 1_000_000  # characters and items of one value, at every depth
# Of texts, lists and mappings; `format`, `ljust` and others make texts of any length.
_METHODS: Final = frozenset(
    (
        "upper",
        "lower",
        "capitalize",
        "title",
        "strip",
        "lstrip",
        "rstrip",
        "removeprefix",
        "removesuffix",
        "startswith",
    )
    + (
        "endswith",
        "split",
        "rsplit",
        "partition",
        "rpartition",
        "find",
        "count",
        "index",
        "isdigit",
        "items",
        "keys",
    )
    + ("values", "get")
)
_WIDE_FORMAT: Final = re.compile(r"%[^%a-zA-Z]*(\d{4}|\*)")
# Jinja's own filters without those that are random, that write markup, or that put text around a
# quoted value.
_FILTERS: Final = frozenset(
    (
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
    )
    + (
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
    )
    + ("unique", "upper")
)
_STATEMENTS: Final = (nodes.Output, nodes.If, nodes.For, nodes.Include, nodes.Assign)
# A quoted value must be a whole YAML value, not a part of one: `data/{{ task | yaml }}` would keep
# its quotes.
_COMMENT: Final = re.compile(r"(^|\s)#")
_BEFORE_VALUE: Final = re.compile(
    r'\s*(- +)*(("[^"]*"|[\w.-]*): +|- +)?|[^#]*[\[{]([^#]*[\[{,:])? *'
)
_AFTER_VALUE: Final = re.compile(r" *($|[,\]}]|: )| +#")

# Control characters, no-break space, zero-width and direction marks, line and paragraph separators,
# BOM, noncharacters: YAML refuses some and folds others, and nobody sees the rest.
_ESCAPED: Final = re.compile(
    '[\x00-\x1f"\\\\\x7f-\xa0\xad\u061c\u200b-\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\uffff\U000e0000-\U000e0fff]'
)
_SHORT_ESCAPES: Final = {"\n": "\\n", "\t": "\\t", "\r": "\\r", '"': '\\"', "\\": "\\\\"}
_PLAIN_KEY: Final = re.compile(
    r"(?!(?:y|n|yes|no|on|off|true|false|null)\Z)[A-Za-z_][A-Za-z0-9_]*", re.IGNORECASE
)


def quote_yaml(value: Any) -> str:
    r"""One line of YAML that a recipe reader turns back into `value`, whatever it holds.

    >>> print(quote_yaml("no"), quote_yaml(2e-5), quote_yaml([True, None]), quote_yaml("a ${b}\n"))
    "no" 2.0e-05 [true, null] "a \\${b}\n"

    Raises:
        GridError: `value` is not made of text, numbers, booleans, null, lists and mappings.
    """
    if isinstance(value, Undefined):
        str(value)  # raises UndefinedError, which knows the name
    if isinstance(value, str):
        return _quote_text(escape_text(value))
    if value is None or isinstance(value, bool | int):
        return json.dumps(value)
    if isinstance(value, float) and math.isfinite(value):
        return re.sub(r"^(-?\d+)e", r"\1.0e", repr(value))  # YAML 1.1 readers take 2e-05 for a text
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
        raise GridError(f"{text!r} holds half of a surrogate pair, which no UTF-8 file can")
    return '"' + _ESCAPED.sub(lambda match: _escape_character(match[0]), text) + '"'


def _escape_character(character: str) -> str:
    code = ord(character)
    return _SHORT_ESCAPES.get(character) or (
        f"\\U{code:08x}" if code > 0xFFFF else f"\\u{code:04x}"
    )


def _quote_key(key: str) -> str:
    return key if _PLAIN_KEY.fullmatch(key) else _quote_text(key)


class TemplateSandbox(ImmutableSandboxedEnvironment):
    """Templates of one folder. What could fill the memory, or never end, is refused."""

    intercepted_binops = frozenset({"*", "**", "+", "%"})

    def __init__(self, folder: Path | None = None) -> None:
        super().__init__(
            loader=None if folder is None else _CheckedLoader(folder),
            undefined=StrictUndefined,
            trim_blocks=True,
            lstrip_blocks=True,
            keep_trailing_newline=True,
        )
        self.filters = {name: _limit(name, self.filters[name]) for name in _FILTERS}
        self.filters |= {_COUNTED: self._count_rounds, _JOINED: _join}
        self.globals = {"range": self.globals["range"]}
        self.num_rounds = 0

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        """Loops count their rounds and `~` looks at lengths: both become filters of ours,
        unreachable by name.
        """
        tree = super()._parse(source, name, filename)
        for loop in list(tree.find_all(nodes.For)):
            loop.iter = nodes.Filter(loop.iter, _COUNTED, [], [], None, None, lineno=loop.lineno)
        _replace_concatenations(tree)
        return tree

    def _count_rounds(self, items: Any) -> Iterator[Any]:
        for item in items:
            self.num_rounds += 1
            if self.num_rounds > MAX_ROUNDS:
                raise SecurityError(f"loops of more than {MAX_ROUNDS:,} rounds together")
            yield item

    def is_safe_callable(self, obj: Any) -> bool:
        """`range`, and the methods of plain values that make nothing longer."""
        owner = getattr(obj, "__self__", None)
        is_plain = isinstance(owner, str | list | tuple | Mapping | dict)
        return obj is self.globals["range"] or (
            is_plain and getattr(obj, "__name__", "") in _METHODS
        )

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """`left * right` or `left ** right` for numbers of a sensible size, `left + right` and
        `left % right`.
        """
        if operator in "+%":
            measure(left, right)
            if operator == "%" and isinstance(left, str) and _WIDE_FORMAT.search(left):
                raise SecurityError(f"the format {left!r} is wider than 999 characters")
            return super().call_binop(context, operator, left, right)
        if not all(isinstance(side, int | float) for side in (left, right)):
            raise SecurityError(
                f"`{operator}` is for numbers, got {type(left).__name__} and {type(right).__name__}"
            )
        if operator == "**" and abs(right) > _MAX_EXPONENT:
            raise SecurityError(f"the exponent {right} is larger than {_MAX_EXPONENT}")
        return super().call_binop(context, operator, left, right)


# No template can spell these names.
_COUNTED: Final = "-counted"
_JOINED: Final = "-joined"


def measure(*values: Any) -> int:
    """Characters and items of values at every depth. Raises: SecurityError, beyond `_MAX_VALUE`."""
    size, waiting = 0, list(values)
    while waiting:
        value = waiting.pop()
        if isinstance(value, str):
            size += len(value)
        elif isinstance(value, Mapping):
            waiting += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            waiting += value
        size += 1
        if size + len(waiting) > _MAX_VALUE:
            raise SecurityError(f"a value of more than {_MAX_VALUE:,} characters and items")
    return size


def _limit(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """A filter that takes no large value, and joins and replaces to none."""

    @wraps(function)  # Jinja's own marks, such as that it wants the environment, stay
    def limited(*args: Any, **kwargs: Any) -> Any:
        plain = [
            value
            for value in (*args, *kwargs.values())
            if not isinstance(value, Environment | Context)
        ]
        plain = [value for value in plain if not isinstance(value, nodes.EvalContext)]
        size = measure(*plain)
        if (
            name == "replace"
            and len(texts := [str(value) for value in plain if not isinstance(value, Undefined)])
            > 2
        ):
            size += texts[0].count(texts[1]) * len(texts[2])
        elif name == "join" and len(plain) > 1 and hasattr(plain[0], "__len__"):
            size += len(plain[0]) * len(str(plain[1]))
        if size > _MAX_VALUE:
            raise SecurityError(f"`{name}` would give more than {_MAX_VALUE:,} characters")
        return function(*args, **kwargs)

    return limited


def _join(parts: list[Any]) -> str:
    """What `~` gives."""
    measure(*parts)
    return str_join(parts)


def _replace_concatenations(node: nodes.Node) -> None:
    for name, value in node.iter_fields():
        for position, child in enumerate(value if isinstance(value, list) else [value]):
            if not isinstance(child, nodes.Node):
                continue
            _replace_concatenations(child)
            if isinstance(child, nodes.Concat):
                parts = nodes.List(child.nodes, lineno=child.lineno)
                joined = nodes.Filter(parts, _JOINED, [], [], None, None, lineno=child.lineno)
                if isinstance(value, list):
                    value[position] = joined
                else:
                    setattr(node, name, joined)


class _CheckedLoader(FileSystemLoader):
    """Reads a template only if each interpolation in it is quoted; `..` and absolute paths are not
    found.
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
                f"`{type(statement).__name__.lower()}` is not for recipes: use if, for, set and"
                " include"
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
                "an interpolation that is not quoted: end it with `| yaml`, and put ( ) around what"
                " stands before"
            )
            problems.append((part.lineno, what))
        elif not (
            _COMMENT.search(before)
            or (_BEFORE_VALUE.fullmatch(before) and _AFTER_VALUE.match(after))
        ):
            what = (
                'a quoted value inside a longer one keeps its quotes: write {{ ("text" ~ variable)'
                " | yaml }} instead"
            )
            problems.append((part.lineno, what))
    return problems


def build_sandbox(folder: Path) -> TemplateSandbox:
    """The environment of recipe templates, with the one filter that writes values."""
    sandbox = TemplateSandbox(folder)
    sandbox.filters["yaml"] = _limit("yaml", quote_yaml)
    return sandbox


def compile_name(pattern: str) -> Callable[[Mapping[str, Any]], str]:
    """What turns the labels of a cell into its run name. Raises: `jinja2.TemplateError`, also when
    called.
    """
    sandbox = TemplateSandbox()
    sandbox.finalize = lambda value: (
        json.dumps(value) if value is None or isinstance(value, bool) else value
    )
    template = sandbox.from_string(pattern)

    def build_name(labels: Mapping[str, Any]) -> str:
        sandbox.num_rounds = 0
        return template.render(labels)

    return build_name


def render_text(sandbox: TemplateSandbox, template: str, variables: Mapping[str, Any]) -> str:
    """The text of one template. Raises: `jinja2.TemplateError`, or what an expression in it
    raises.
    """
    pieces: list[str] = []
    length = sandbox.num_rounds = 0
    for piece in sandbox.get_template(template).generate(variables):
        length += len(piece)
        if length > MAX_OUTPUT_CHARACTERS:
            raise SecurityError(f"the text is longer than {MAX_OUTPUT_CHARACTERS:,} characters")
        pieces.append(piece)
    return "".join(pieces)


def locate_error(error: Exception, folder: Path) -> tuple[Path | None, int | None]:
    """The file inside `folder` and its 1-based line that an exception of Jinja, or under it, came
    from.
    """
    if isinstance(error, TemplateSyntaxError) and error.filename:
        return Path(error.filename), error.lineno
    found: tuple[Path | None, int | None] = (None, None)
    traceback = error.__traceback__
    while traceback is not None:
        path = Path(traceback.tb_frame.f_code.co_filename)
        if path.is_relative_to(folder):
            found = (path, traceback.tb_lineno)
        traceback = traceback.tb_next
    return found
