"""`runner report` and `runner power`: read the runs and write the conclusions they support."""

from __future__ import annotations

import argparse
import json
import shlex
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from runner.cli.reading import (
    select,
    warn_of_moved_names,
    warn_of_outdated,
    warn_of_unreadable,
)
from runner.cli.report_pages import require_page_targets, write_report_pages
from runner.errors import escape_controls
from runner.plan.read import ReadRun, read_runs
from runner.plan.select import Selected, UnreadableRun
from runner.plan.status import NOT_VERIFIABLE, is_verifiable, suggest_fixes, verify_files
from runner.recipe.contents import KnownContents
from runner.run.base_scores import find_other_base_scores
from runner.run.paths import content_cache_path, find_output_root
from runner.run.siblings import find_absent

if TYPE_CHECKING:
    from runner.report.rows import ReportRow


def run_report(arguments: argparse.Namespace) -> int:
    """`runner report`."""
    has_pages = require_page_targets(arguments)
    from runner.report.build import build_report
    from runner.report.format import FORMATS
    from runner.report.rows import build_rows, name_other_base_scores, require_metrics

    unreadable: list[UnreadableRun] = []
    selected = select(arguments, arguments.paths, unreadable, prefer="both")
    known = KnownContents(content_cache_path(arguments.output_root))
    runs = read_runs(selected, known)
    if arguments.verify:
        runs = _verify(runs)
    roots = {find_output_root(one.paths.run_dir) for one in selected}
    rows = name_other_base_scores(
        build_rows(runs),
        [found for root in sorted(roots) for found in find_other_base_scores(root)],
    )
    require_metrics(arguments.metric, rows)
    report = build_report(
        rows,
        metrics=arguments.metric,
        rows_fixed=arguments.rows_fixed,
        absent=find_absent((one.recipe.run.grid, one.paths.run_dir) for one in selected),
    )
    print(FORMATS[arguments.format](report), end="")
    if has_pages:
        write_report_pages(arguments, report)
    _point_at_changed(rows, selected)
    warn_of_outdated(known, arguments)
    warn_of_moved_names(facts for _, facts, _ in runs)
    warn_of_unreadable(unreadable)
    lost = [row for row in rows if row.state == "unreadable"]
    for row in lost:
        name = row.recipe.run.full_name
        print(f"warning: {name} is unreadable: see `runner status`", file=sys.stderr)
    damaged = [(recipe, status) for recipe, _, status in runs if status.state == "damaged"]
    for recipe, status in damaged:
        print(f"warning: {recipe.run.full_name} is damaged: {status.why}", file=sys.stderr)
        print(f"  hint: {suggest_fixes(status.damage)}", file=sys.stderr)
    return 1 if unreadable or lost or damaged else 0


def run_power(arguments: argparse.Namespace) -> int:
    """`runner power`."""
    from runner.report.power import as_json, build_power_reports, format_power
    from runner.report.rows import build_rows

    unreadable: list[UnreadableRun] = []
    known = KnownContents(content_cache_path(arguments.output_root))
    runs = read_runs(select(arguments, arguments.paths, unreadable, prefer="both"), known)
    warn_of_unreadable(unreadable)
    reports = build_power_reports(
        build_rows(runs), arguments.effect, arguments.power, arguments.metric
    )
    if arguments.json:
        print(json.dumps([as_json(report) for report in reports], indent=2))
    else:
        text = "\n\n".join(format_power(report) for report in reports)
        print(escape_controls(text))  # axes and paths may come from anyone
    return 0


def _verify(runs: Sequence[ReadRun]) -> list[ReadRun]:
    """The runs, each with its state after reading every byte."""
    verified = []
    for recipe, facts, before in runs:
        status = verify_files(facts, before)
        if status.state == "completed" and not is_verifiable(facts):
            print(f"warning: {recipe.run.full_name} {NOT_VERIFIABLE}", file=sys.stderr)
        verified.append((recipe, facts, status))
    return verified


def _point_at_changed(rows: Sequence[ReportRow], selected: Sequence[Selected]) -> None:
    """Print to stderr how many run directories hold another experiment than their recipes, and the
    command that shows their numbers.
    """
    changed = {row.recipe.run.full_name for row in rows if row.state == "changed"}
    run_dirs = [one.paths.run_dir for one in selected if one.full_name in changed]
    if not run_dirs:
        return
    folders = dict.fromkeys(str(run_dir.parent) for run_dir in run_dirs)
    runs = "1 run is" if len(run_dirs) == 1 else f"{len(run_dirs)} runs are"
    they = "its directory holds" if len(run_dirs) == 1 else "their directories each hold"
    print(
        f"warning: {runs} changed: {they} another experiment, whose numbers are not shown\n"
        f"hint: {shlex.join(['runner', 'report', *folders])}",
        file=sys.stderr,
    )
