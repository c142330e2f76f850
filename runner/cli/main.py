# PYTHON_ARGCOMPLETE_OK: bash's and zsh's global completion looks for this mark.
"""The command line: verbs, error printing, exit codes. Every verb imports what it needs when it is
called.

Exit codes: 0 all done or nothing to do, 1 a run failed (or drift was found), 2 usage or recipe
error, 130 stopped, 141 the reader of the output has closed the pipe.
"""

from __future__ import annotations

import argparse
import errno
import os
import shlex
import sys
from collections.abc import Sequence

from runner.errors import RunnerError, escape_controls, put_in_words
from runner.secrets import scrub


def main(argv: Sequence[str] | None = None) -> int:
    """Run one verb and return its exit code."""
    try:
        return _run(argv)
    except KeyboardInterrupt:
        if "--debug" in (sys.argv if argv is None else argv):
            raise
        print("stopped", file=sys.stderr)
        return 130


def _run(argv: Sequence[str] | None) -> int:
    if "_ARGCOMPLETE" in os.environ:  # the shell asks for completions
        from runner.cli.completion import complete

        complete()
    if not _open_standard_streams():
        _print_error(
            "standard output is closed, so nothing can be shown\n\n"
            "hint: add `> /dev/null` to discard the output"
        )
        return 2
    try:
        arguments = parse_arguments(argv)
    except RunnerError as error:
        _print_error(str(error))
        return 2
    if arguments.debug:
        return _call(arguments)
    try:
        return _call(arguments)
    except RunnerError as error:
        _print_error(str(error))
        return 2
    except BrokenPipeError:  # `runner status | head`
        _drop_output()
        return 141
    except Exception as error:
        # A missing permission or a full disk is the machine's problem, not a bug of ours.
        # safetensors and torch wrap it in their own exception classes.
        if not isinstance(error, OSError) and os.strerror(errno.ENOSPC) not in str(error):
            raise
        _print_error(_describe(error))
        return 2


def _open_standard_streams() -> bool:
    """Open the null device for streams that the caller closed (`>&-`); False if stdout was closed.

    Otherwise the next opened files would get their numbers, and children would write into them.
    """
    is_open = sys.stdout is not None
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            try:
                os.fstat(number)
            except OSError:
                os.open(os.devnull, os.O_RDWR)
            setattr(sys, name, os.fdopen(number, "w" if number else "r", closefd=False))
    return is_open


def _describe(error: Exception) -> str:
    """The error as a sentence. The system does not name the file of a failed write; it may be
    stdout.
    """
    is_write = isinstance(error, OSError) and error.strerror and error.filename is None
    place = " (standard output, or a file that was being written)" if is_write else ""
    return f"{put_in_words(error)}{place}"


def _drop_output() -> None:
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _print_error(text: str) -> None:
    """Print to stderr. Secrets and control characters are removed: errors quote files and
    arguments that may come from anyone.
    """
    print(escape_controls(scrub(f"error: {text}")), file=sys.stderr)


def _call(arguments: argparse.Namespace) -> int:
    from runner.cli.commands import VERBS
    from runner.cli.places import in_project

    with in_project(arguments):
        code = VERBS[arguments.verb](arguments)
        sys.stdout.flush()
    return code


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    """The arguments of one verb; overrides and paths may come before, between and after its
    options.

    argparse accepts positional arguments in one piece only and returns the rest.
    """
    from runner.cli.arguments import build_parser  # imported where Ctrl-C is already caught

    parser = build_parser()
    arguments: argparse.Namespace
    arguments, rest = parser.parse_known_args(argv)
    more = next((name for name in ("paths", "overrides") if hasattr(arguments, name)), None)
    if rest and (more is None or any(argument.startswith("-") for argument in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}{_suggest_output(arguments, rest)}")
    if rest and more is not None:
        setattr(arguments, more, [*getattr(arguments, more), *rest])
    arguments.typed = tuple(sys.argv[1:] if argv is None else argv)
    if more is not None:
        _separate_overrides(arguments)
    return arguments


def _suggest_output(arguments: argparse.Namespace, rest: Sequence[str]) -> str:
    """A hint for a single word that may be the output of a verb with `--output`; else empty."""
    if len(rest) > 1 or rest[0].startswith("-") or not hasattr(arguments, "output"):
        return ""
    return f"\n\nhint: --output {shlex.quote(rest[0])}"


def _name_a_grid() -> str:
    """An existing folder of recipes, else the placeholder `RECIPE`."""
    from runner.plan.names import RECIPES_DIR

    return next((str(one.parent) for one in sorted(RECIPES_DIR.glob("*/*.yaml"))), "RECIPE")


def _separate_overrides(arguments: argparse.Namespace) -> None:
    """Move `key=value` from the paths to the overrides, for verbs that accept several paths.

    Raises:
        RunnerError: a word is not an override, or the verb accepts no overrides.
    """
    from runner.plan.variants import is_override

    if not hasattr(arguments, "paths"):
        if malformed := [one for one in arguments.overrides if "=" not in one]:
            raise RunnerError(f"{malformed[0]!r} is not an override of the form key=value")
        return
    overrides = [word for word in arguments.paths if is_override(word)]
    arguments.paths = [word for word in arguments.paths if word not in overrides]
    if overrides and not arguments.takes_overrides:
        raise RunnerError(
            f"`{arguments.verb}` takes no overrides such as {overrides[0]!r}",
            hint=f"runner {arguments.verb} {shlex.join(arguments.paths)}".rstrip()
            + "  # variants are included; `--where axis=value` selects part of a grid",
        )
    if overrides and not arguments.paths:
        raise RunnerError(
            f"no recipe is named, only {overrides[0]!r}",
            hint=f"runner {arguments.verb} {_name_a_grid()} {shlex.join(overrides)}",
        )
    arguments.overrides = overrides
