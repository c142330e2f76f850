"""The parser of a verb, and the arguments that most verbs have."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NoReturn

from runner.errors import escape_controls
from runner.secrets import scrub


class VerbParser(argparse.ArgumentParser):
    """Repeats wrong arguments without secrets and control characters."""

    # Adds options of this verb that are slow to find; called only when the verb is used.
    add_more: Callable[[argparse.ArgumentParser], None] | None = None

    # True for verbs about recipes: users pass them the options of other trainers.
    is_about_recipes = False

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

    def error(self, message: str) -> NoReturn:
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
