"""The verbs of the command line, from parsed arguments to an exit code.

The verbs that launch runs are in `launch` and `sweep`.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shlex
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from runner.cli.clean import run_clean
from runner.cli.launch import run_launch, select_run
from runner.cli.report_pages import require_page_targets, write_report_pages
from runner.cli.sweep import run_rerun, run_sweep
from runner.errors import (
    CorruptFileError,
    RunnerError,
    escape_controls,
    hide_bitsandbytes_warning,
)
from runner.plan.select import Selected, UnreadableRun, select_recipes, suggest_path
from runner.plan.status import (
    NOT_VERIFIABLE,
    RunStatus,
    is_verifiable,
    read_status,
    suggest_mending,
    verify_files,
)
from runner.recipe.cache import RecipeCache
from runner.recipe.contents import ContentHashes, KnownContents, list_contents
from runner.recipe.parse import Recipe, dump_recipe, load_recipe, parse_recipe
from runner.run.allowed_code import allow_code, load_code, suggest_allowing
from runner.run.base_scores import find_other_base_scores
from runner.run.facts import RunFacts
from runner.run.failures import HINTS, UNREADABLE_HINT
from runner.run.paths import (
    RunPaths,
    content_cache_path,
    find_output_root,
    recipe_cache_path,
)
from runner.run.record import load_stored_recipe
from runner.run.siblings import Loaded, find_moved, list_loaded

if TYPE_CHECKING:
    from runner.report.rows import ReportRow


def run_init(arguments: argparse.Namespace) -> int:
    """`runner init`."""
    from runner.grid.project import init_project

    return init_project(arguments.folder, arguments.from_grid, arguments.data, arguments.models)


def run_demo_models(arguments: argparse.Namespace) -> int:
    """`runner demo-models`: prints the folders of the models, one a line."""
    from runner.demo.models import build_demo_models

    try:
        model_dirs = build_demo_models(arguments.output)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("\n".join(map(str, model_dirs.values())))
    return 0


def run_render(arguments: argparse.Namespace) -> int:
    """`runner render`."""
    from runner.grid.render import render_grids

    return render_grids(arguments.grid, check=arguments.check, prune=arguments.prune, root=Path())


def run_check(arguments: argparse.Namespace) -> int:
    """`runner check`: every recipe, then their data in one pass over the distinct tokenizers and
    data sections.
    """
    # What is allowed to run is read from the recipes themselves.
    selected = (_select_anew if arguments.allow_code else _select)(arguments, arguments.paths)
    recipes = [one.recipe for one in selected]
    if arguments.allow_code:
        stream = sys.stderr if arguments.json else sys.stdout
        for file in allow_code(recipes, arguments.output_root):
            size = f"{len(file.content):,} bytes"
            print(f"allowed {file.path}, {size}, sha256 {file.sha256}", file=stream)
    if arguments.schema_only:
        if arguments.device_gib is not None:
            raise RunnerError(
                "`--device-gib` compares models and rows with a device, `--schema-only` loads none",
                hint="leave one of them out",
            )
        print(f"{len(selected)} recipes are well-formed")
        return 0
    hide_bitsandbytes_warning()
    from runner.preflight.check import print_check

    finished = [one.full_name for one in selected if one.paths.result_path.exists()]
    allow = suggest_allowing(arguments.paths, arguments.output_root, arguments.where)
    return print_check(
        recipes,
        arguments.output_root,
        finished,
        is_json=arguments.json,
        allow_hint=allow,
        device_gib=arguments.device_gib,
    )


def run_masks(arguments: argparse.Namespace) -> int:
    """`runner masks`: loads the tokenizer, never the model."""
    from runner.preflight.masks import build_views, format_views
    from runner.preflight.names import pin_recipes

    path = arguments.recipe
    output_root = find_output_root(path) if path.is_dir() else arguments.output_root
    recipe = load_code(
        _load_recipe_or_run(path, arguments.overrides),
        output_root,
        suggest_allowing([str(path)], output_root, overrides=arguments.overrides),
    )
    split = "validation" if arguments.split == "eval" else arguments.split
    (recipe,) = pin_recipes([recipe], output_root).recipes
    views = build_views(recipe, split, arguments.rows, arguments.row)
    is_coloured = "NO_COLOR" not in os.environ and (
        sys.stdout.isatty() or "FORCE_COLOR" in os.environ
    )
    print(format_views(views, recipe, arguments.format, is_coloured=is_coloured), end="")
    return 0


def run_status(arguments: argparse.Namespace) -> int:
    """`runner status`: reads files only, hashes nothing."""
    import json

    unreadable: list[UnreadableRun] = []
    named = arguments.paths or _everything(arguments)
    selected = _select(arguments, named, unreadable)
    if arguments.watch:
        from runner.view.watch import watch

        return watch(selected, content_cache_path(arguments.output_root), unreadable)
    known = KnownContents(content_cache_path(arguments.output_root))
    facts = [one.read_facts() for one in selected]
    rows = [
        (one, read_status(those, one.recipe, known.find(list_contents(one.recipe))))
        for one, those in zip(selected, facts, strict=True)
    ]
    _warn_of_outdated(known)
    _warn_of_moved_names(facts)
    if arguments.json:
        content: list[dict[str, Any]] = [
            {
                "grid": one.recipe.run.grid,
                "name": one.recipe.run.name,
                "axes": dict(one.recipe.run.axes),
            }
            | {"run_dir": str(one.paths.run_dir), **status.model_dump()}
            for one, status in rows
        ]
        for lost in unreadable:
            grid, _, name = lost.full_name.partition("/")
            status = RunStatus(state="unreadable", why=lost.why)
            content.append(
                {"grid": grid, "name": name, "axes": {}, "run_dir": str(lost.paths.run_dir)}
            )
            content[-1] |= status.model_dump()
        print(json.dumps(content, indent=2))
        _warn_of_other_base_scores(selected)
        return 1 if any(one["state"] in ("unreadable", "damaged") for one in content) else 0
    _warn_of_other_base_scores(selected)
    names = [one.full_name for one in selected] + [lost.full_name for lost in unreadable]
    width = max(map(len, names), default=0)
    for one, status in rows:
        step = "" if status.step is None else f"{status.step}/{status.max_steps or '?'}"
        loss = "" if status.loss is None else f"{status.loss:.4f}"
        seconds = "" if status.seconds is None else f"{status.seconds:.0f} s"
        kind = status.failure.kind if status.failure and status.state == "interrupted" else None
        why = ": ".join(filter(None, (kind, status.why.partition("\n")[0])))
        why = "; ".join(filter(None, (why, status.notes)))
        print(
            f"{one.full_name:<{width}}  {status.state:<11}  {step:>9}"
            f"  {loss:>8}  {seconds:>7}  {why}"
        )
    for lost in unreadable:
        print(
            f"{lost.full_name:<{width}}  {'unreadable':<11}  {'':>9}  {'':>8}  {'':>7}  {lost.why}"
        )
    return _print_hints([status for _, status in rows], num_unreadable=len(unreadable))


def _warn_of_other_base_scores(selected: Sequence[Selected]) -> None:
    """On stderr, once for each output root: scores that a run kept for others and that another one
    does not compute.
    """
    for root in sorted({find_output_root(one.paths.run_dir) for one in selected}):
        for one in find_other_base_scores(root):
            print(f"warning: {one.describe()}", file=sys.stderr)


def _warn_of_moved_names(facts: Iterable[RunFacts]) -> None:
    """On stderr: names on the hub that are not the same commit in all runs of a grid."""
    loaded: list[Loaded] = []
    for one in facts:
        with contextlib.suppress(CorruptFileError, OSError):  # its state says so
            if one.stored is not None:
                loaded += list_loaded(one.paths.run_dir, one.stored)
    for moved in find_moved(loaded):
        print(f"warning: {moved.describe()}", file=sys.stderr)


def _print_hints(statuses: Sequence[RunStatus], *, num_unreadable: int) -> int:
    """What to do, once for each kind of failure, on stderr; the exit code of `runner status`."""
    for kind in dict.fromkeys(
        status.failure.kind
        for status in statuses
        if status.failure is not None
        and status.state not in ("changed", "damaged")  # refused, whatever it failed of
    ):
        print(f"hint: {kind}: {HINTS[kind]}", file=sys.stderr)
    is_any_unreadable = num_unreadable > 0 or any(
        status.state == "unreadable" for status in statuses
    )
    if is_any_unreadable:
        print(f"hint: unreadable: {UNREADABLE_HINT}", file=sys.stderr)
    mending = [suggest_mending(status.damage) for status in statuses if status.state == "damaged"]
    for hint in dict.fromkeys(mending):
        print(f"hint: damaged: {hint}", file=sys.stderr)
    return 1 if is_any_unreadable or mending else 0


def run_logs(arguments: argparse.Namespace) -> int:
    """`runner logs`."""
    from runner.view.logs import print_log

    return print_log(
        arguments.run, arguments.output_root, arguments.attempt, follow=arguments.follow
    )


def run_why(arguments: argparse.Namespace) -> int:
    """`runner why`."""
    import json

    from runner.plan.why import build_lines, explain, gather_evidence

    selected = select_run(arguments)
    hashes = ContentHashes(content_cache_path(arguments.output_root))
    recipe, facts = selected.recipe, selected.read_facts()
    count = arguments.num_processes or recipe.launch.num_processes
    found = explain(facts, gather_evidence(facts, recipe, hashes, count), recipe, count)
    print(
        json.dumps(found.as_json(), indent=2) if arguments.json else "\n".join(build_lines(found))
    )
    return 0


def run_stop(arguments: argparse.Namespace) -> int:
    """`runner stop`."""
    from runner.view.logs import stop_runs

    return stop_runs(_select_anew(arguments, arguments.paths))


def run_report(arguments: argparse.Namespace) -> int:
    """`runner report`."""
    has_pages = require_page_targets(arguments)
    from runner.report.build import build_report
    from runner.report.format import FORMATS
    from runner.report.rows import build_rows, name_other_base_scores

    unreadable: list[UnreadableRun] = []
    selected = _select(arguments, arguments.paths, unreadable)
    known = KnownContents(content_cache_path(arguments.output_root))
    runs = []
    for one in selected:
        facts = one.read_facts(with_samples=True)
        # Of a run directory the numbers are asked for, whatever became of its files since.
        is_named_itself = one.source_path == one.paths.run_dir
        contents = {} if is_named_itself else known.find(list_contents(one.recipe))
        status = read_status(facts, one.recipe, contents)
        if arguments.verify:
            status = verify_files(facts, status)
            if status.state == "completed" and not is_verifiable(facts):
                print(f"warning: {one.full_name} {NOT_VERIFIABLE}", file=sys.stderr)
        runs.append((one.recipe, facts, status))
    roots = {find_output_root(one.paths.run_dir) for one in selected}
    rows = name_other_base_scores(
        build_rows(runs),
        [found for root in sorted(roots) for found in find_other_base_scores(root)],
    )
    _require_metrics(arguments.metric, rows)
    report = build_report(rows, metrics=arguments.metric, rows_fixed=arguments.rows_fixed)
    print(FORMATS[arguments.format](report), end="")
    if has_pages:
        write_report_pages(arguments, report)
    _point_at_changed(rows, selected)
    _warn_of_outdated(known)
    _warn_of_moved_names(facts for _, facts, _ in runs)
    whys = [(lost.full_name, lost.why) for lost in unreadable]
    whys += [
        (row.recipe.run.full_name, "see `runner status`")
        for row in rows
        if row.state == "unreadable"
    ]
    for name, why in whys:
        print(f"warning: {name} is unreadable: {why}", file=sys.stderr)
    damaged = [(recipe, status) for recipe, _, status in runs if status.state == "damaged"]
    for recipe, status in damaged:
        print(f"warning: {recipe.run.full_name} is damaged: {status.why}", file=sys.stderr)
        print(f"  hint: {suggest_mending(status.damage)}", file=sys.stderr)
    return 1 if whys or damaged else 0


def run_compare(arguments: argparse.Namespace) -> int:
    """`runner compare`."""
    from runner.cli.compare import compare_arms

    return compare_arms(arguments)


def _require_metrics(names: Sequence[str] | None, rows: Sequence[ReportRow]) -> None:
    from runner.report.row_scores import LIKELIHOODS
    from runner.report.rows import list_metrics

    known = [*LIKELIHOODS, *list_metrics(rows)]
    if unknown := [name for name in names or () if name not in known]:
        raise RunnerError(
            f"no run has the metric {unknown[0]!r}", hint=f"the metrics are {', '.join(known)}"
        )


def _point_at_changed(rows: Sequence[ReportRow], selected: Sequence[Selected]) -> None:
    """On stderr: how many runs hold another experiment than their recipes, and the command that
    shows their numbers.
    """
    changed = {row.recipe.run.full_name for row in rows if row.state == "changed"}
    run_dirs = [one.paths.run_dir for one in selected if one.full_name in changed]
    if not run_dirs:
        return
    folders = dict.fromkeys(str(run_dir.parent) for run_dir in run_dirs)
    runs = "1 run is" if len(run_dirs) == 1 else f"{len(run_dirs)} runs are"
    they = "its directory holds" if len(run_dirs) == 1 else "their directories hold"
    print(
        f"warning: {runs} changed: {they} another experiment, whose numbers are not shown\n"
        f"hint: {shlex.join(['runner', 'report', *folders])}",
        file=sys.stderr,
    )


def run_power(arguments: argparse.Namespace) -> int:
    """`runner power`."""
    import json

    from runner.report.power import as_json, build_power_reports, format_power
    from runner.report.rows import build_rows

    paths = [_find_grid(path, arguments.output_root) for path in arguments.paths]
    known = KnownContents(content_cache_path(arguments.output_root))
    unreadable: list[UnreadableRun] = []
    runs = []
    for one in _select(arguments, paths, unreadable):
        facts = one.read_facts(with_samples=True)
        # As in a report: what ran is asked for, not what its recipe says today
        is_named_itself = one.source_path == one.paths.run_dir
        contents = {} if is_named_itself else known.find(list_contents(one.recipe))
        runs.append((one.recipe, facts, read_status(facts, one.recipe, contents)))
    for lost in unreadable:
        why = escape_controls(f"{lost.full_name} is unreadable: {lost.why}")
        print(f"warning: {why}", file=sys.stderr)
    reports = build_power_reports(
        build_rows(runs), arguments.effect, arguments.power, arguments.metric
    )
    if arguments.json:
        print(json.dumps([as_json(report) for report in reports], indent=2))
    else:
        text = "\n\n".join(format_power(report) for report in reports)
        print(escape_controls(text))  # axes and paths are anybody's
    return 0


def _find_grid(path: str, output_root: Path) -> str:
    """A path as it is, or the folder of recipes or of runs of a grid of that name."""
    if Path(path).exists():
        return path
    folders = (Path("recipes") / path, output_root / path)
    return next((str(folder) for folder in folders if folder.is_dir()), path)


def _warn_of_outdated(known: KnownContents) -> None:
    for path in sorted(known.outdated):
        print(
            f"warning: {path} was changed since its content was last read, and is not read here:"
            " runs that name it may be *changed*, as `runner sweep ... --dry-run` tells",
            file=sys.stderr,
        )


def run_chat(arguments: argparse.Namespace) -> int:
    """`runner chat`."""
    hide_bitsandbytes_warning()
    from runner.publish.chat import chat

    return chat(
        arguments.run_dir,
        checkpoint=arguments.checkpoint,
        with_base=arguments.base,
        prompt=arguments.prompt,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
    )


def run_export(arguments: argparse.Namespace) -> int:
    """`runner export`."""
    hide_bitsandbytes_warning()
    from runner.publish.export import export_run

    difference = export_run(
        arguments.run_dir,
        arguments.output,
        checkpoint=arguments.checkpoint,
        is_merged=arguments.merge,
        push_to=arguments.push,
    )
    print(
        f"{arguments.output}: loaded again,"
        f" its logits differ from the run's by at most {difference:.2g}"
    )
    return 0


def _select(
    arguments: argparse.Namespace,
    paths: Sequence[str],
    unreadable: list[UnreadableRun] | None = None,
) -> list[Selected]:
    """As `select_recipes`, by the cache: for verbs that start nothing and change no run."""
    cache = RecipeCache(recipe_cache_path(arguments.output_root))
    selected = select_recipes(
        paths, arguments.output_root, arguments.where, unreadable, load=cache.load
    )
    cache.save()
    return selected


def _select_anew(arguments: argparse.Namespace, paths: Sequence[str]) -> list[Selected]:
    return select_recipes(paths, arguments.output_root, arguments.where)


def _load_recipe_or_run(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file or of a run directory, under overrides."""
    if path.is_dir():
        stored = load_stored_recipe(RunPaths(path))
        if stored is None:
            raise RunnerError(
                f"{path} is a folder, but no run directory", hint="name one recipe file, or one run"
            )
        return parse_recipe(dump_recipe(stored.recipe), where=str(path), overrides=overrides)
    if not path.exists():
        raise RunnerError(f"there is no recipe {path}", hint=suggest_path(path))
    return load_recipe(path, overrides)


def _everything(arguments: argparse.Namespace) -> list[str]:
    """What `status` is about when nothing is named: all recipes and all runs that there are."""
    recipes, runs = Path("recipes").glob("*/*.yaml"), arguments.output_root.glob("*/*/recipe.json")
    return [
        str(folder)
        for folder, found in ((Path("recipes"), recipes), (arguments.output_root, runs))
        if next(found, None) is not None
    ]


# By the name of the verb; each returns the exit code.
VERBS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "init": run_init,
    "demo-models": run_demo_models,
    "render": run_render,
    "check": run_check,
    "masks": run_masks,
    "launch": run_launch,
    "sweep": run_sweep,
    "rerun": run_rerun,
    "status": run_status,
    "why": run_why,
    "logs": run_logs,
    "stop": run_stop,
    "report": run_report,
    "compare": run_compare,
    "power": run_power,
    "clean": run_clean,
    "chat": run_chat,
    "export": run_export,
}
