"""The parser of a verb, and the arguments that most verbs have."""

from __future__ import annotations

import argparse
import difflib
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, NoReturn

from runner.errors import escape_controls
from runner.secrets import scrub


class VerbParser(argparse.ArgumentParser):
    """Repeats wrong arguments without secrets and control characters."""

    # Adds options of this verb that are slow to find; called only when the verb is used.
    add_more: Callable[[argparse.ArgumentParser], None] | None = None

    # True for verbs about recipes: users pass them the options of other trainers.
    is_about_recipes = False

    # The parser of each verb; only the top parser has them.
    verbs: Mapping[str, VerbParser] = MappingProxyType({})

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """Parse as argparse does.

        Raises:
            RunnerError: an option of another trainer.
        """
        self.add_late_options()
        if self.is_about_recipes and any(word.startswith("--") for word in args):
            self._refuse_foreign_options(args)
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

    def _refuse_foreign_options(self, words: Sequence[str]) -> None:
        known = self._option_string_actions
        if all(word.partition("=")[0] in known for word in words if word.startswith("--")):
            return  # the module below is slow to import
        from runner.cli.habits import refuse_foreign_options

        refuse_foreign_options(self.prog, words, known)

    def refuse_unknown(self, words: Sequence[str]) -> NoReturn:
        """Exit with the usage of this verb and with the options that are close to these words."""
        options = [word.partition("=")[0] for word in words if word.startswith("--")]
        close = [
            match
            for option in options
            for match in difflib.get_close_matches(option, self._option_string_actions, n=1)
        ]
        nearest = f", did you mean {' '.join(dict.fromkeys(close))}?" if close else ""
        self.error(f"unrecognized arguments: {' '.join(words)}{nearest}")

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


def add_output_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-root",
        type=Path,
        metavar="DIR",
        help="folder of all runs; default: runs, in the project",
    )
