"""Secrets: recognizes them, finds the environment variables that hold one, and masks them in text.

Secrets come only from the environment. Recipes, grids, templates and arguments are refused if they
hold one; the message has its name, never its value. Output and records are scrubbed. A training
process's output is scrubbed as it is printed. Text that libraries write to the attempt's log past
Python is scrubbed after the attempt has ended; until then only text that goes through Python is
surely clean. A secret that neither looks like one nor is in the environment cannot be recognized.
"""

from __future__ import annotations

import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

MASK: Final = "***"
# Of a variable's value. Shorter ones are switches and names, which are in every second line.
_MIN_MASKED_CHARACTERS: Final = 8
_MIN_REFUSED_CHARACTERS: Final = 16

_SECRET_VARIABLE: Final = re.compile(
    r"TOKEN|SECRET|PASSWORD|PASSWD|PASSPHRASE|CREDENTIALS?|CONNECTION_STRING|APIKEY|ACCESSKEY"
    r"|(^|_)(KEY|KEYS|PASS|PAT)(_|$)|_PWD$",
    re.IGNORECASE,
)
_HARMLESS_VARIABLE: Final = re.compile(r"_(PATH|FILE|DIR|TYPE|PARALLELISM)$", re.IGNORECASE)
_SECRET_KEY: Final = re.compile(
    r"secret|token$|pass|pwd|credential|connection_string|(^|_)key$", re.IGNORECASE
)


class _Shape:
    """A regular expression that is tried only on a text with one of `hints`, which takes a
    hundredth of the time.
    """

    def __init__(
        self, hints: tuple[str, ...], pattern: str, flags: re.RegexFlag = re.NOFLAG
    ) -> None:
        self._hints, self.pattern = hints, re.compile(pattern, flags)

    def may_be_in(self, text: str) -> bool:
        """True if a search is worthwhile; `text` must be lowercase if the pattern ignores case."""
        return any(hint in text for hint in self._hints)


# Secrets that are recognized anywhere, by their issuer's notation. Repeats have limits, so a search
# stays linear.
_SHAPES: Final[Mapping[str, _Shape]] = {
    "a Hugging Face token": _Shape(("hf_", "api_org_"), r"\b(?:hf|api_org)_[A-Za-z0-9]{20,}"),
    "an API key": _Shape(("sk-",), r"(?<![A-Za-z0-9_-])sk-[A-Za-z0-9_-]{20,}"),
    "an AWS access key": _Shape(("AKIA", "ASIA"), r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b"),
    "a GitHub token": _Shape(
        ("ghp_", "gho_", "ghu_", "ghs_", "ghr_", "github_pat_"),
        r"\b(?:gh[pousr]_[A-Za-z0-9]{30,}|github_pat_[A-Za-z0-9_]{22,})",
    ),
    "a GitLab token": _Shape(("glpat-",), r"\bglpat-[A-Za-z0-9_-]{20,}"),
    "a Slack token": _Shape(("xox",), r"\bxox[abeoprs]-[A-Za-z0-9-]{10,}"),
    "a Google key": _Shape(
        ("AIza", "ya29."), r"\bAIza[0-9A-Za-z_-]{35}|\bya29\.[0-9A-Za-z_-]{20,}"
    ),
    "a Weights & Biases key": _Shape(("wandb_v1_",), r"\bwandb_v1_[A-Za-z0-9_]{20,}"),
    "a package index token": _Shape(("pypi-",), r"\bpypi-[A-Za-z0-9_-]{50,}"),
    "a signed token": _Shape(
        ("eyJ",), r"\beyJ[A-Za-z0-9_-]{10,2000}\.eyJ[A-Za-z0-9_-]{10,4000}\.[A-Za-z0-9_-]{10,}"
    ),
    "a private key": _Shape(
        ("PRIVATE KEY-----",),
        r"-----BEGIN [A-Z0-9 ]{0,40}PRIVATE KEY-----"
        r"(?:[\s\S]{0,20000}?-----END [A-Z0-9 ]{0,40}KEY-----)?",
    ),
    "a URL with a password": _Shape(("://",), r"(?<=://)[^\s/:@'\"]*:[^\s/@'\"]+(?=@)"),
}
# Secrets that are recognized by the words before them. Recipes may hold these words, in prompts.
_AFTER_WORDS: Final = (
    _Shape(
        ("bearer", "basic"), r"(?<![a-z])(?:bearer|basic)\s{1,9}[a-z0-9._~+/=-]{16,}", re.IGNORECASE
    ),
    _Shape(
        ("passw", "passphrase", "secret", "key", "token"),
        r"(?:password|passwd|passphrase|secret"
        r"|secret_?(?:access_?)?key|api_?key|access_?key|account_?key"
        r"|access_?token|auth_?token|session_?token|hub_?token)"
        r"[\"']?\s{0,9}[=:]\s{0,9}[\"']?[^\s\"',;&)}\]]{8,}",
        re.IGNORECASE,
    ),
    _Shape(
        ("sig=", "signature=", "credential=", "security-token="),
        r"[?&](?:sig|X-(?:Amz|Goog)-(?:Signature|Credential|Security-Token))=[^\s&\"']{8,}",
        re.IGNORECASE,
    ),
)


def scrub(text: str, environment: Mapping[str, str] | None = None) -> str:
    """`text` with every secret masked: values of the environment, and everything that looks like a
    token or follows the name of one.

    >>> scrub("401 for hf_" + "a1B2" * 8, {})
    '401 for ***'
    >>> scrub("s3cr3t-value!", {"STORE_PASSWORD": "s3cr3t-value!"})
    '***'
    >>> scrub("sftp://me:pw@host/folder, api_key=0123456789, pad_token=eos", {})
    'sftp://***@host/folder, ***, pad_token=eos'
    """
    text = _values_pattern(tuple(_list_values(environment))).sub(MASK, text)
    for shape in _SHAPES.values():
        if shape.may_be_in(text):
            text = shape.pattern.sub(MASK, text)
    lowered = text.lower()
    for shape in _AFTER_WORDS:
        if shape.may_be_in(lowered):
            text = shape.pattern.sub(MASK, text)
    return text


def scrub_json(value: Any, environment: Mapping[str, str] | None = None) -> Any:
    """A JSON value with every text in it scrubbed, and every text under a key that names a secret
    masked entirely.
    """
    if isinstance(value, str):
        return scrub(value, environment)
    if isinstance(value, Mapping):
        return {
            key: (
                MASK
                if isinstance(item, str) and item and names_secret(key)
                else scrub_json(item, environment)
            )
            for key, item in value.items()
        }
    return (
        [scrub_json(item, environment) for item in value]
        if isinstance(value, list | tuple)
        else value
    )


def find_secret(text: str, environment: Mapping[str, str] | None = None) -> tuple[str, int] | None:
    """The kind of the first secret in `text`, without its value, and its position; None if there is
    none.

    >>> find_secret("see sftp://me:pw@host", {})
    ('a URL with a password', 11)
    >>> find_secret("sftp://me@host/a:b, task-1_060_completion_8_auto", {})
    """
    for kind, shape in _SHAPES.items():
        if shape.may_be_in(text) and (found := shape.pattern.search(text)):
            return kind, found.start()
    for name, value in _list_refused(environment):
        if (start := text.find(value)) >= 0:
            return f"the value of the environment variable {name}", start
    return None


def list_refused_values() -> list[str]:
    """The values of environment variables that `find_secret` finds."""
    return [value for _, value in _list_refused(None)]


def _list_refused(environment: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    for name, value in _list_variables(environment):
        if len(value) >= _MIN_REFUSED_CHARACTERS:
            yield name, value


def names_secret(key: str) -> bool:
    """True if a key is a usual name for a secret.

    >>> keys = ("aws_secret_access_key", "key", "token", "endpoint_url", "keyed")
    >>> [names_secret(key) for key in keys]
    [True, True, True, False, False]
    """
    return _SECRET_KEY.search(key) is not None


def _list_variables(environment: Mapping[str, str] | None) -> Iterator[tuple[str, str]]:
    """The name and value of variables with a secret's name; a path to a secret does not count."""
    for name, value in (os.environ if environment is None else environment).items():
        if not _is_secret_variable(name):
            continue
        if len(value) >= _MIN_MASKED_CHARACTERS and not (
            value.startswith("/") and os.path.exists(value)
        ):
            yield name, value


@lru_cache(maxsize=1024)
def _is_secret_variable(name: str) -> bool:
    return _SECRET_VARIABLE.search(name) is not None and _HARMLESS_VARIABLE.search(name) is None


def _list_values(environment: Mapping[str, str] | None) -> list[str]:
    """Every form in which a variable's value is printed, longest first, because a short one may be
    the start of another.
    """
    forms: set[str] = set()
    for _, value in _list_variables(environment):
        escaped = (
            json.dumps(value)[1:-1],
            json.dumps(value, ensure_ascii=False)[1:-1],
            repr(value)[1:-1],
        )
        forms |= {value, value.strip(), quote(value, safe="", errors="surrogateescape"), *escaped}
    forms = {form for form in forms if len(form) >= _MIN_MASKED_CHARACTERS}
    return sorted(forms, key=lambda form: (-len(form), form))


@lru_cache(maxsize=8)
def _values_pattern(values: tuple[str, ...]) -> re.Pattern[str]:
    return re.compile("|".join(map(re.escape, values)) or "(?!)")


_PIECE_BYTES: Final = 8 * 2**20


class _ScrubbedStream(io.TextIOWrapper):
    """A text stream that masks secrets in each text that is written to it."""

    def write(self, text: str, /) -> int:
        super().write(scrub(text))
        return len(text)


def scrub_output() -> None:
    """Mask secrets in everything that this process prints through `sys.stdout` and `sys.stderr`.

    Call it before importing libraries, because their loggers keep the stream that they find. A
    second call changes nothing, even in a fork.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, _ScrubbedStream):
            continue
        stream.flush()
        scrubbed = _ScrubbedStream(
            stream.buffer,
            encoding=stream.encoding,
            errors="backslashreplace",
            line_buffering=True,
            write_through=True,
        )
        setattr(sys, name, scrubbed)


def scrub_log(path: Path) -> bool:
    """Mask every secret in a file that is no longer written; False if there was none, or no file.

    A kill leaves the old file or the new one.
    """
    from runner.files import fsync_dir  # imported here: `--help` needs this module, but no hashes

    if not path.is_file() or not any(scrub(piece) != piece for piece in _read_pieces(path)):
        return False
    temporary = path.with_name(f".{path.name}.scrubbed.tmp")
    try:
        with temporary.open("wb") as target:
            for piece in _read_pieces(path):
                target.write(scrub(piece).encode(errors="surrogateescape"))
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
    fsync_dir(path.parent)
    return True


def _read_pieces(path: Path) -> Iterator[str]:
    """The text in pieces that end at a line end, so that no secret is cut in two unless its line is
    too long.
    """
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE_BYTES):
            yield (piece + stream.readline(_PIECE_BYTES)).decode(errors="surrogateescape")
