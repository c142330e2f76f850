"""The engines that there are, found by their files, and the command line's options of each."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol, cast

import runner.engines

if TYPE_CHECKING:
    from runner.launch.placement import PlanRuns


class Engine(Protocol):
    """One file in `runner/engines`. `runner sweep --help` imports it for its options, so that it
    imports what is slow in its functions only.
    """

    @property
    def ONLY_WRITES_FILES(self) -> bool:
        """True for an engine that prints what a person submits; it works in a dry run only."""

    @property
    def OPTIONS(self) -> Mapping[str, Mapping[str, Any]]:
        """Flag -> arguments of argparse's `add_argument`, beyond the options that every sweep has.
        Engines may have a flag in common if they describe it alike.
        """

    def parse_options(self, arguments: argparse.Namespace) -> Any:
        """Its own frozen options. Raises: RunnerError for options that it cannot submit under."""

    def submit(self, plan: PlanRuns, options: Any) -> int:
        """Call `plan` once, launch what it returns, or print how in a dry run; returns an exit
        code.
        """


def load_engines() -> dict[str, Engine]:
    """The engines by name, first those that start runs."""
    names = {
        path.stem for folder in runner.engines.__path__ for path in Path(folder).glob("[!_]*.py")
    }
    modules = {name: import_module(f"runner.engines.{name}") for name in sorted(names)}
    engines: list[tuple[str, Engine]] = []
    for name, module in modules.items():
        if hasattr(module, "submit"):  # the others are what engines share
            engines.append((name, cast(Engine, module)))
    return dict(sorted(engines, key=lambda named: named[1].ONLY_WRITES_FILES))


def add_engine_options(parser: argparse.ArgumentParser, *, writes_files: bool) -> None:
    """`--engine` and what belongs to each; `writes_files`: also the engines that only write a file
    (`--dry-run`).
    """
    engines = {
        name: engine
        for name, engine in load_engines().items()
        if writes_files or not engine.ONLY_WRITES_FILES
    }
    writers = " and ".join(name for name in engines if engines[name].ONLY_WRITES_FILES)
    group = parser.add_argument_group(
        "engines", f"with --dry-run, {writers} print a file to submit" if writers else None
    )
    group.add_argument("--engine", choices=[*engines], default="local", help="default: local")
    added: dict[str, Mapping[str, Any]] = {}
    for engine in engines.values():
        for flag, settings in engine.OPTIONS.items():
            if added.get(flag) != settings:
                group.add_argument(flag, **settings)
                added[flag] = settings
