"""The pages and figures that `runner report` writes in addition to the printed report."""

from __future__ import annotations

import argparse
import shlex
import sys
from typing import TYPE_CHECKING

from runner.errors import RunnerError

if TYPE_CHECKING:
    from runner.report.effects import Report


def require_page_targets(arguments: argparse.Namespace) -> bool:
    """True if a page, figures or pages of rows are requested and can be written there."""
    if not (arguments.html or arguments.rows or arguments.figures):
        if arguments.without_rows:
            raise RunnerError(
                "--without-rows leaves texts out of pages, but no page is requested",
                hint="add --html report.html",
            )
        return False
    from runner.report.html import require_targets

    require_targets(arguments.html, arguments.rows, arguments.figures)
    return True


def write_report_pages(arguments: argparse.Namespace, report: Report) -> None:
    """Write the requested pages. Their paths go to stderr, because stdout holds the report."""
    from runner.report.html import PageOptions, write_pages

    words = ["runner", "report", *map(str, arguments.paths)]
    for name in arguments.metric or ():
        words += ["--metric", name]
    words += ["--rows-fixed"] if arguments.rows_fixed else []
    words += ["--without-rows"] if arguments.without_rows else []
    options = PageOptions(
        with_rows=not arguments.without_rows,
        command=shlex.join([*words, "--html", "report.html"]),
    )
    lines = write_pages(
        report, options, page=arguments.html, figures=arguments.figures, rows=arguments.rows
    )
    print("\n".join(lines), file=sys.stderr)
