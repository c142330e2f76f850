"""Whether two mathematical answers are equal, decided by math-verify in a process of its own.

The process has a limit of CPU time and memory for each pair: a generated `9^{9^{9^9}}` keeps a
computer algebra system busy for ever, inside C code that no signal handler can interrupt, and
math-verify's own timeouts are signals of wall clock time, which would let a busy machine change a
score. A pair that exceeds the limit is unequal.
"""

from __future__ import annotations

import json
import logging
import os
import re
import resource
import subprocess
import sys
from collections.abc import Callable
from types import TracebackType
from typing import Final

from runner.processes import die_with_parent

_MEMORY_BYTES: Final = 4 << 30  # of address space; sympy alone takes a tenth


class MathJudge:
    """A context in which `judge(reference, answer)` can be asked; its process starts with the first
    hard question.

    `cpu_seconds` is the limit of one pair; what math-verify decides, it decides in well under one.
    """

    def __init__(self, cpu_seconds: int = 5) -> None:
        self._cpu_seconds = cpu_seconds
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> MathJudge:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()

    def __call__(self, reference: str, answer: str) -> bool:
        """Whether the two are equal: as texts, or else as mathematics."""
        return normalise_latex(reference) == normalise_latex(answer) or self._ask(reference, answer)

    def _ask(self, reference: str, answer: str) -> bool:
        if self._process is None:
            self._process = subprocess.Popen(
                [
                    sys.executable,
                    "-m",
                    "runner.data.math_judge",
                    str(os.getpid()),
                    str(self._cpu_seconds),
                ],
                # Sympy walks through sets: the same way each time.
                env={**os.environ, "PYTHONHASHSEED": "0"},
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=subprocess.DEVNULL,
                text=True,
                encoding="utf-8",
            )
        assert self._process.stdin is not None and self._process.stdout is not None
        try:
            print(json.dumps([reference, answer]), file=self._process.stdin, flush=True)
            reply = self._process.stdout.readline()
        except BrokenPipeError:
            reply = ""
        if not reply:  # ended by a limit
            self._stop()
        return reply == "true\n"

    def _stop(self) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None


def normalise_latex(text: str) -> str:
    r"""The text without what changes only the looks of a formula.

    >>> normalise_latex(r"\left( \dfrac{1}{2},\, 3 \right)."), normalise_latex(r"\text{ 5 cm}")
    ('(\\frac{1}{2},3)', '5cm')
    """
    text = re.sub(r"\\(?:left|right|displaystyle)(?![a-zA-Z])|\\[,;:! ]|[$~]", "", text)
    text = re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text)
    text = re.sub(r"\\(?:text|mathrm|textbf|mathbf)\{([^{}]*)\}", r"\1", text)
    return "".join(text.split()).rstrip(".")


def main() -> int:
    """Answer pairs of texts from stdin, one JSON line each, with `true` or `false`, until a limit
    ends the process.
    """
    parent_pid, cpu_seconds = map(int, sys.argv[1:])
    die_with_parent(parent_pid)
    resource.setrlimit(resource.RLIMIT_AS, (_MEMORY_BYTES, _MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    replies, sys.stdout = sys.stdout, sys.stderr
    is_equal = load_comparison()
    for line in sys.stdin:
        used = resource.getrusage(resource.RUSAGE_SELF)
        limit = int(used.ru_utime + used.ru_stime) + 1 + cpu_seconds
        resource.setrlimit(resource.RLIMIT_CPU, (limit, resource.RLIM_INFINITY))
        print(json.dumps(is_equal(*json.loads(line))), file=replies, flush=True)
    return 0


def load_comparison() -> Callable[[str, str], bool]:
    """math-verify's comparison of two LaTeX texts, without its timeouts."""
    from math_verify import parse, verify

    logging.disable(logging.CRITICAL)  # it warns that its timeouts are off

    def is_equal(reference: str, answer: str) -> bool:
        expected, found = (
            parse(f"\\boxed{{{text}}}", parsing_timeout=None) for text in (reference, answer)
        )
        return bool(verify(expected, found, timeout_seconds=None))

    return is_equal


if __name__ == "__main__":
    sys.exit(main())
