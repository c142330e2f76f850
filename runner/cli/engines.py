"""Finds the engines by their files, and adds their options to the command line."""

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
    """One file in `runner/engines`. `runner sweep --help` imports it for its options, so slow
    imports belong inside its functions.
    """

    @property
    def ONLY_WRITES_FILES(self) -> bool:
        """True for an engine that prints a file for a person to submit; it needs `--dry-run`."""

    @property
    def OPTIONS(self) -> Mapping[str, Mapping[str, Any]]:
        """Flag -> arguments of argparse's `add_argument`, beyond the options of every sweep.
        Engines may share a flag if they describe it identically.
        """

    def parse_options(self, arguments: argparse.Namespace) -> Any:
        """The engine's frozen options. Raises: RunnerError for options that it cannot use."""

    def submit(self, plan: PlanRuns, options: Any) -> int:
        """Call `plan` once and launch the runs that it returns; a dry run only prints how. Returns
        an exit code.
        """


def load_engines() -> dict[str, Engine]:
    """The engines by name; those that start runs come first."""
    names = {
        path.stem for folder in runner.engines.__path__ for path in Path(folder).glob("[!_]*.py")
    }
    modules = {name: import_module(f"runner.engines.{name}") for name in sorted(names)}
    engines: list[tuple[str, Engine]] = []
    for name, module in modules.items():
        if hasattr(module, "submit"):  # the other modules are shared by the engines
            engines.append((name, cast(Engine, module)))
    return dict(sorted(engines, key=lambda named: named[1].ONLY_WRITES_FILES))


def add_engine_options(parser: argparse.ArgumentParser, *, writes_files: bool) -> None:
    """Add `--engine` and the options of each engine. `writes_files`: also the engines that only
    write a file (`--dry-run`).
    """
    engines = {
        name: engine
        for name, engine in load_engines().items()
        if writes_files or not engine.ONLY_WRITES_FILES
    }
    writers = " and ".join(name for name in engines if engines[name].ONLY_WRITES_FILES)
    group = parser.add_argument_group(
        "engines", f"{writers} need --dry-run and print a file to submit" if writers else None
    )
    group.add_argument(
        "--engine", choices=[*engines], default="local", help="where to run; default: local"
    )
    added: dict[str, Mapping[str, Any]] = {}
    for engine in engines.values():
        for flag, settings in engine.OPTIONS.items():
            if added.get(flag) != settings:
                group.add_argument(flag, **settings)
                added[flag] = settings
