"""The verbs that inspect runs or ask them to stop, and their options."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any, Final

from runner.cli.shared_arguments import add_output_root, add_overrides, add_paths
from runner.text import positive

# The keys of `runner.report.format.FORMATS`, whose import takes seconds: completion and `--help` do
# without.
REPORT_FORMATS: Final = ("md", "csv", "json", "tex")


def add_view_verbs(verbs: Any) -> None:
    """Verbs that inspect runs or ask them to stop."""
    status = verbs.add_parser("status", help="list runs: status, step, loss, time, reason")
    add_paths(status, nargs="*")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true", help="print JSON")
    how.add_argument(
        "--watch",
        action="store_true",
        help="keep showing the grid as a table, progress, time left and failures",
    )

    why = verbs.add_parser(
        "why", help="explain what `launch` would do with one run, and what decides it"
    )
    why.add_argument(
        "recipe",
        type=Path,
        metavar="RUN",
        help="a recipe file or a name; or a run directory, read with its recorded recipe",
    )
    add_overrides(why, "as for launch")
    why.add_argument("--name", help="as for launch")
    why.add_argument("--num-processes", type=positive, metavar="N", help="as for launch")
    why.add_argument("--json", action="store_true", help="print JSON")
    add_output_root(why)

    logs = verbs.add_parser("logs", help="print the log of a run's last attempt")
    logs.add_argument(
        "run",
        metavar="RUN",
        help="a recipe, run directory or name; for a folder or grid, the run that is running",
    )
    logs.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="keep printing new output until the run ends",
    )
    logs.add_argument("--attempt", type=positive, metavar="N", help="number; default: the last")
    add_output_root(logs)

    stop = verbs.add_parser(
        "stop", help="ask running runs to write a checkpoint after their current step and exit"
    )
    add_paths(stop)

    report = verbs.add_parser(
        "report", help="compare runs over a grid: conclusions, effects, then cells"
    )
    add_paths(report)
    report.add_argument(
        "--verify",
        action="store_true",
        help="check every byte of completed runs; damaged ones get no numbers",
    )
    _add_report_formats(report)

    compare = verbs.add_parser(
        "compare",
        help="compare two runs or axis values: what is equal, what differs, by how much",
    )
    for name in ("a", "b"):
        compare.add_argument(
            name,
            metavar=name.upper(),
            help="a recipe, a run directory, the name of a run, or axis=value of --grid",
        )
    compare.add_argument(
        "--axis", help="the only axis that may differ; exit 1 if anything else does"
    )
    compare.add_argument(
        "--grid", metavar="GRID", help="the grid in which axis=value and run names are looked up"
    )
    compare.add_argument("--json", action="store_true", help="print JSON")
    _add_rows_fixed(compare)
    add_output_root(compare)
    _add_power(verbs)

    clean = verbs.add_parser(
        "clean", help="remove shared caches that runs can compute again; no run is touched"
    )
    clean.add_argument("--dry-run", action="store_true", help="only list the caches and sizes")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    add_output_root(clean)


def _add_power(verbs: Any) -> None:
    power = verbs.add_parser(
        "power", help="estimate from pilot runs how many seeds and test rows find a difference"
    )
    add_paths(power)
    power.add_argument(
        "--effect",
        type=_above_zero,
        required=True,
        metavar="X",
        help="the smallest difference that matters, in the metric's unit, such as 0.02",
    )
    power.add_argument(
        "--power",
        type=_share,
        default=0.8,
        metavar="P",
        help="probability of finding it; default: 0.8",
    )
    power.add_argument(
        "--metric", metavar="NAME", help="default: NLL per completion token, or bits per byte"
    )
    power.add_argument("--json", action="store_true", help="print JSON")


def _above_zero(text: str) -> float:
    return _between(text, 0.0, float("inf"), "a number above 0")


def _share(text: str) -> float:
    return _between(text, 0.5, 1.0, "between 0.5 and 1")


def _between(text: str, low: float, high: float, expected: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = low
    if not low < value < high:
        raise argparse.ArgumentTypeError(f"got {text!r}, expected {expected}")
    return value


def _add_report_formats(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "--format",
        choices=REPORT_FORMATS,
        default=REPORT_FORMATS[0],
        help="output format; default: the first",
    )
    report.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="use this metric instead of those that fit the task; may be repeated",
    )
    _add_rows_fixed(report)
    _add_report_pages(report)


def _add_rows_fixed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows-fixed",
        action="store_true",
        help="treat the test rows as fixed, like a public benchmark: only seeds are random",
    )


def _add_report_pages(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the report as one web page"
    )
    report.add_argument(
        "--rows",
        type=Path,
        metavar="DIR",
        help="also write a page of all test rows per pair of arms",
    )
    report.add_argument(
        "--figures", type=Path, metavar="DIR", help="also write the page's figures as PDF"
    )
    report.add_argument(
        "--without-rows",
        action="store_true",
        help="leave prompts, references and answers out of all pages",
    )
