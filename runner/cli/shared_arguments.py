"""The parser of a verb, and the arguments that most verbs have."""

from __future__ import annotations

import argparse
import difflib
import re
import shlex
import sys
from collections.abc import Callable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NoReturn

from runner.errors import RunnerError, escape_controls
from runner.secrets import scrub


class VerbParser(argparse.ArgumentParser):
    """Accepts options only in full: a typo must not start a sweep. Repeats wrong arguments without
    secrets and control characters.
    """

    # Adds options of this verb that are slow to find; called only when the verb is used.
    add_more: Callable[[argparse.ArgumentParser], None] | None = None

    # True for verbs about recipes: users pass them the options of other trainers.
    is_about_recipes = False

    def __init__(self, **settings: Any) -> None:
        super().__init__(**settings, allow_abbrev=False)

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does.

        Raises:
            RunnerError: an option of another trainer, or an unknown one.
        """
        self.add_late_options()
        words = sys.argv[1:] if args is None else list(args)
        unknown = self._list_unknown_options(words)
        if unknown and self.is_about_recipes:
            from runner.cli.habits import refuse_foreign_options  # slow to import

            refuse_foreign_options(self.prog, words, self._option_string_actions)
        if unknown:
            self._refuse_option(unknown[0], words)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """The help of argparse, with the options that are slow to find."""
        self.add_late_options()
        return super().format_help()

    def add_late_options(self) -> None:
        """Add the options that take time to find; once."""
        if self.add_more is not None:
            add_more, self.add_more = self.add_more, None
            add_more(self)

    def _list_unknown_options(self, words: Sequence[str]) -> list[str]:
        """The words that look like options of this parser and are none of them."""
        known = self._option_string_actions
        own = list(takewhile(lambda word: word != "--", words))
        if self._subparsers is not None:  # the options after the verb belong to the verb
            own = list(takewhile(lambda word: word.startswith("-"), own))
        options = {word: word.partition("=")[0] for word in own if word.startswith("--")}
        # argparse accepts a word with a blank as a value, even after two hyphens.
        return [word for word, one in options.items() if " " not in one and one not in known]

    def _refuse_option(self, word: str, words: Sequence[str]) -> NoReturn:
        option, equals, value = word.partition("=")
        what = f"`{option}` is not an option of `{self.prog}`"
        close = self._find_close(option)
        if close is None:
            raise RunnerError(what, hint=f"`{self.prog} --help` lists the options")
        fixed = [close + equals + value if one == word else one for one in words]
        raise RunnerError(
            f"{what}; did you mean `{close}`?", hint=f"{self.prog} {shlex.join(fixed)}"
        )

    def _find_close(self, option: str) -> str | None:
        """The option that the user may have meant; None if none is similar."""
        known = [one for one in self._option_string_actions if one.startswith("--")]
        meant = option.replace("_", "-")
        longer = [one for one in known if one.startswith(meant)]
        return next(iter(longer or difflib.get_close_matches(meant, known, n=1, cutoff=0.7)), None)

    def error(self, message: str) -> NoReturn:
        """Exit with the usage and the message; for a wrong choice, name the closest one."""
        if wrong := re.search(r"invalid choice: '(.*?)' \(choose from (.*)\)", message):
            choices = re.findall(r"[\w-]+", wrong[2])
            close = difflib.get_close_matches(wrong[1], choices, n=1)
            message += f", did you mean {close[0]}?" if close else ""
        super().error(escape_controls(scrub(message)))


def add_paths(
    parser: argparse.ArgumentParser, nargs: str = "+", *, takes_overrides: bool = False
) -> None:
    parser.add_argument(
        "paths",
        nargs=nargs,
        metavar="PATH",
        help=(
            "recipe files, folders or globs, run directories, or names of runs and grids"
            + ("; key=value overrides apply to each recipe" if takes_overrides else "")
        ),
    )
    # `main` finds the overrides among the paths: argparse cannot tell where the paths end.
    parser.set_defaults(overrides=[], takes_overrides=takes_overrides)
    parser.add_argument(
        "--where",
        action="append",
        default=[],
        metavar="axis=value[,value]",
        help="only runs with these axis values; may be repeated",
    )
    add_output_root(parser)


def add_overrides(parser: argparse.ArgumentParser, description: str) -> None:
    """Optional overrides after one recipe."""
    # Without a default, argparse lists it among the required arguments that are missing.
    parser.add_argument("overrides", nargs="*", default=[], metavar="key=value", help=description)


def add_output_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-root",
        type=Path,
        metavar="DIR",
        help="folder of all runs; default: runs, in the project",
    )
