"""The verbs of the command line, from parsed arguments to an exit code.

The verbs that launch runs are in `launch` and `sweep`.
"""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from runner.cli.clean import run_clean
from runner.cli.launch import run_launch, select_run, suggest_fresh
from runner.cli.pushes import PushPlan
from runner.cli.reading import (
    note_edited,
    note_idle_overrides,
    note_unrendered,
    select,
    select_readable,
    warn_of_moved_names,
    warn_of_other_base_scores,
    warn_of_outdated,
)
from runner.cli.recipe import run_recipe
from runner.cli.report import run_power, run_report
from runner.cli.sweep import run_rerun, run_sweep
from runner.errors import (
    RunnerError,
    hide_bitsandbytes_warning,
)
from runner.plan.names import RECIPES_DIR, find_one
from runner.plan.select import Selected, UnreadableRun, run_paths
from runner.plan.status import (
    RunStatus,
    read_status_unverified,
    suggest_fixes,
)
from runner.project_folder import (
    TEMPLATES,
    describe_no_project,
    find_project_above,
    pasteable,
    say_pasteable,
)
from runner.recipe.contents import ContentHashes, KnownContents, hint_at_missing
from runner.recipe.parse import Recipe, dump_recipe, load_recipe, parse_recipe
from runner.run.allowed_code import allow_code, load_code, suggest_allowing
from runner.run.failures import name_command
from runner.run.paths import (
    RunPaths,
    content_cache_path,
    find_output_root,
)
from runner.run.record import FailureKind, load_stored_recipe
from runner.text import format_count


def run_init(arguments: argparse.Namespace) -> int:
    """`runner init`."""
    from runner.grid.project import Wishes, init_project

    wishes = Wishes(
        arguments.data,
        arguments.models,
        arguments.axes,
        arguments.prompt,
        arguments.completion,
    )
    return init_project(arguments.folder, arguments.from_grid, wishes)


def run_demo_models(arguments: argparse.Namespace) -> int:
    """`runner demo-models`: prints the folders of the models, one per line."""
    from runner.demo.models import build_demo_models

    here, project = Path.cwd(), find_project_above(Path.cwd())
    if project not in (None, here) and not arguments.output.is_absolute():
        print(
            f"note: the models are built in {here / arguments.output}; recipes look for them in the"
            f" project, {project}",
            file=sys.stderr,
        )
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

    if (nowhere := describe_no_project()) is not None:
        raise RunnerError(nowhere, hint="`runner init FOLDER` creates a project; cd into it")
    grid = arguments.grid
    if grid is not None:  # may also be the folder of its recipes or of its template
        folder, *rest = Path(grid).parts
        grid = rest[0] if len(rest) == 1 and folder in (RECIPES_DIR.name, TEMPLATES) else grid
    return render_grids(
        grid,
        check=arguments.check,
        prune=arguments.prune,
        force=arguments.force,
        root=Path(),
    )


def run_check(arguments: argparse.Namespace) -> int:
    """`runner check`: every recipe, then their data in one pass over the distinct tokenizers and
    data sections.
    """
    # For --allow-code, each recipe is parsed: the cache must not decide what may run.
    selected, is_all = select_readable(arguments, arguments.paths, is_uncached=arguments.allow_code)
    note_idle_overrides(selected)
    recipes = [one.recipe for one in selected]
    note_edited(selected)
    note_unrendered(selected)
    if arguments.allow_code:
        stream = sys.stderr if arguments.json else sys.stdout
        for file in allow_code(recipes, arguments.output_root):
            size = format_count(len(file.content), "byte")
            print(f"allowed {file.path}, {size}, sha256 {file.sha256}", file=stream)
    if arguments.schema_only:
        if arguments.device_gib is not None:
            raise RunnerError(
                "`--device-gib` needs models and rows, but `--schema-only` loads none",
                hint="leave out one of the two options",
            )
        what = "recipe is" if len(selected) == 1 else "recipes are"
        print(f"{len(selected)} {what} well-formed")
        return 0 if is_all else 1
    _refuse_pushes(selected)
    hide_bitsandbytes_warning()
    from runner.preflight.check import print_check

    finished = [one.full_name for one in selected if one.paths.result_path.exists()]
    allow = suggest_allowing(
        arguments.paths, arguments.output_root, arguments.where, arguments.overrides
    )
    code = print_check(
        recipes,
        arguments.output_root,
        finished,
        is_json=arguments.json,
        allow_hint=allow,
        device_gib=arguments.device_gib,
    )
    return code if is_all else max(code, 1)


def run_doctor(arguments: argparse.Namespace) -> int:
    """`runner doctor`: checks the machine, and the recipes if some are named."""
    hide_bitsandbytes_warning()
    from runner.preflight.doctor import print_doctor

    if arguments.where and not arguments.paths:
        where = shlex.join(word for one in arguments.where for word in ("--where", one))
        raise RunnerError(
            f"no recipe is named, only {where}", hint=f"runner doctor recipes {where}"
        )
    if not arguments.paths:
        return print_doctor([], arguments.output_root)
    selected, is_all = select_readable(arguments, arguments.paths)
    code = print_doctor(selected, arguments.output_root)
    return code if is_all else max(code, 1)


def _refuse_pushes(selected: Sequence[Selected]) -> None:
    """Refuse runs that cannot be pushed, as `runner sweep` does before it starts anything."""
    pushes = PushPlan()
    for one in selected:
        pushes.add(one, one.read_facts(), is_due=True)
    pushes.refuse()


def run_masks(arguments: argparse.Namespace) -> int:
    """`runner masks`: loads the tokenizer, never the model."""
    from runner.preflight.masks import build_views, format_views
    from runner.preflight.names import pin_recipes

    path = find_one(str(arguments.recipe), arguments.output_root, "recipe")
    output_root = find_output_root(path) if path.is_dir() else arguments.output_root
    recipe = load_code(
        _load_recipe_or_run(path, arguments.overrides),
        output_root,
        suggest_allowing([str(path)], output_root, overrides=arguments.overrides),
    )
    split = "validation" if arguments.split == "eval" else arguments.split
    (recipe,) = pin_recipes([recipe], output_root).recipes
    views = build_views(recipe, split, arguments.rows, arguments.row)
    is_colored = "NO_COLOR" not in os.environ and (
        sys.stdout.isatty() or "FORCE_COLOR" in os.environ
    )
    print(format_views(views, recipe, arguments.format, is_colored=is_colored), end="")
    return 0


def run_status(arguments: argparse.Namespace) -> int:
    """`runner status`: only reads files, hashes nothing. If no path is given, runs that were never
    started are only counted.
    """
    import json

    unreadable: list[UnreadableRun] = []
    named = arguments.paths or _everything(arguments)
    selected = select(arguments, named, unreadable, prefer="both")
    if arguments.watch:
        from runner.view.watch import watch

        return watch(selected, content_cache_path(arguments.output_root), unreadable)
    if not named and (nowhere := describe_no_project()) is not None:
        print(f"note: {nowhere}", file=sys.stderr)
    known = KnownContents(content_cache_path(arguments.output_root))
    facts = [one.read_facts() for one in selected]
    rows = [
        (one, read_status_unverified(those, one.recipe, known.look(one.recipe)))
        for one, those in zip(selected, facts, strict=True)
    ]
    warn_of_outdated(known, arguments)
    warn_of_moved_names(facts)
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
        warn_of_other_base_scores(selected)
        return 1 if any(one["state"] in ("unreadable", "damaged") for one in content) else 0
    warn_of_other_base_scores(selected)
    never: list[Selected] = []
    if not arguments.paths and not arguments.where:
        never = [one for one, status in rows if _was_never_started(one, status)]
        rows = [(one, status) for one, status in rows if not _was_never_started(one, status)]
    names = [one.full_name for one, _ in rows] + [lost.full_name for lost in unreadable]
    width = max(map(len, names), default=0)
    for one, status in rows:
        step = "" if status.step is None else f"{status.step}/{status.max_steps or '?'}"
        loss = "" if status.loss is None else f"loss {status.loss:.4f}"
        seconds = "" if status.seconds is None else f"{status.seconds:.0f} s"
        kind = status.failure.kind if status.failure and status.state == "interrupted" else None
        why = ": ".join(filter(None, (kind, status.why.partition("\n")[0])))
        why = "; ".join(filter(None, (why, status.notes)))
        print(
            f"{one.full_name:<{width}}  {status.state:<11}  {step:>9}"
            f"  {loss:>11}  {seconds:>7}  {why}"
        )
    for lost in unreadable:
        print(
            f"{lost.full_name:<{width}}  {'unreadable':<11}  {'':>9}  {'':>11}  {'':>7}  {lost.why}"
        )
    if never:
        print(_describe_never_started(never))
    damaged = [one.paths.run_dir for one, status in rows if status.state == "unreadable"]
    damaged += [lost.paths.run_dir for lost in unreadable]
    return _print_hints(rows, damaged, never)


def _was_never_started(one: Selected, status: RunStatus) -> bool:
    return status.state == "pending" and not one.paths.recipe_path.exists()


def _describe_never_started(never: Sequence[Selected]) -> str:
    folders = list(dict.fromkeys(shlex.quote(str(one.source_path.parent)) for one in never))
    count = "1 recipe was" if len(never) == 1 else f"{len(never)} recipes were"
    if len(folders) == 1:
        return (
            f"{count} never started: `{pasteable(f'runner status {folders[0]}')}` lists them,"
            f" `{pasteable(f'runner sweep {folders[0]}')}` starts them"
        )
    return (
        f"{count} never started, in {len(folders)} grids:"
        f" `{pasteable(f'runner status {RECIPES_DIR}/GRID')}` lists them; GRID is one of"
        f" {', '.join(Path(folder).name for folder in folders)}"
    )


def _print_hints(
    rows: Sequence[tuple[Selected, RunStatus]],
    unreadable: Sequence[Path],
    never: Sequence[Selected],
) -> int:
    """Print one hint per kind of failure to stderr; returns the exit code of `runner status`.

    `never` are runs that were never started and that `rows` do not hold.
    """
    statuses = [status for _, status in rows]
    run_dirs: dict[FailureKind, list[Path]] = {}
    recipe_folders: dict[FailureKind, dict[Path, None]] = {}
    pending = [*never, *(one for one, status in rows if status.state == "pending")]
    with_pending = {one.source_path.parent for one in pending}
    for one, status in rows:
        # Changed and damaged runs are refused, whatever their failure was.
        if status.failure is not None and status.state not in ("changed", "damaged"):
            run_dirs.setdefault(status.failure.kind, []).append(one.paths.run_dir)
            recipe_folders.setdefault(status.failure.kind, {})[one.source_path.parent] = None
    for kind in run_dirs:
        # A sweep leaves out runs that no recipe in these folders describes.
        folders = list(recipe_folders[kind])
        sweeps = folders if set(folders) <= with_pending else []
        _print_hint(f"{kind}: {name_command(kind, run_dirs[kind], sweeps)}")
    if unreadable:
        more = f"; likewise for {len(unreadable) - 1} more" if len(unreadable) > 1 else ""
        _print_hint(f"unreadable: {suggest_fresh(unreadable[0])}{more}")
    missing = dict.fromkeys(path for status in statuses for path in status.inputs_missing)
    if missing:
        _print_hint(f"inputs missing: {hint_at_missing(missing)}")
    fixes = [suggest_fixes(status.damage) for status in statuses if status.state == "damaged"]
    for hint in dict.fromkeys(fixes):
        _print_hint(f"damaged: {hint}")
    return 1 if unreadable or fixes else 0


def _print_hint(hint: str) -> None:
    print(say_pasteable(f"hint: {hint}"), file=sys.stderr)


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
    hashes = ContentHashes(content_cache_path(arguments.output_root), is_kept=False)
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

    selected, is_all = select_readable(arguments, arguments.paths, "run", is_uncached=True)
    code = stop_runs(selected)
    return code if is_all else max(code, 1)


def run_compare(arguments: argparse.Namespace) -> int:
    """`runner compare`."""
    from runner.cli.compare import compare_arms

    return compare_arms(arguments)


def run_chat(arguments: argparse.Namespace) -> int:
    """`runner chat`."""
    hide_bitsandbytes_warning()
    from runner.publish.chat import chat

    return chat(
        _find_run_dir(arguments),
        checkpoint=arguments.checkpoint,
        with_base=arguments.base,
        prompt=arguments.prompt,
        system=arguments.system,
        max_new_tokens=arguments.max_new_tokens,
    )


def run_export(arguments: argparse.Namespace) -> int:
    """`runner export`."""
    if arguments.output is None:
        return _push_model(arguments)
    hide_bitsandbytes_warning()
    from runner.publish.export import export_run

    difference = export_run(
        _find_run_dir(arguments),
        arguments.output,
        checkpoint=arguments.checkpoint,
        is_merged=arguments.merge,
        push_to=arguments.push,
    )
    print(
        f"{arguments.output}: after reloading,"
        f" its logits differ from the run's by at most {difference:.2g}"
    )
    return 0


def _find_run_dir(arguments: argparse.Namespace) -> Path:
    """The run directory that a verb for one tuned model names, directly or by a name or recipe.

    Raises:
        RunnerError: it does not exist, or the run was never started.
    """
    path = find_one(str(arguments.run_dir), arguments.output_root, "run")
    if path.is_dir():
        return path
    run_dir = run_paths(load_recipe(path), arguments.output_root).run_dir
    if not run_dir.exists():
        raise RunnerError(
            f"{path} has no run yet: {run_dir} does not exist",
            hint=f"runner launch {shlex.quote(str(path))}",
        )
    return run_dir


def _push_model(arguments: argparse.Namespace) -> int:
    """`runner export RUN --push`: the model as it is in the run directory, without torch."""
    if arguments.push is None or arguments.merge or arguments.checkpoint is not None:
        raise RunnerError(
            "`runner export` needs a new folder; without one, only `--push` works,"
            " and sends the model of a completed run as it is",
            hint=f"runner export {shlex.quote(str(arguments.run_dir))} --output exports/NAME",
        )
    from runner.publish.push import push_run

    commit = push_run(_find_run_dir(arguments), arguments.push)
    print(commit.url)
    return 0


def _load_recipe_or_run(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file or a run directory, with the overrides applied."""
    if path.is_dir():
        stored = load_stored_recipe(RunPaths(path))
        if stored is None:
            raise RunnerError(
                f"{path} is a folder but not a run directory",
                hint="name one recipe file or one run",
            )
        return parse_recipe(dump_recipe(stored.recipe), where=str(path), overrides=overrides)
    return load_recipe(path, overrides)


def _everything(arguments: argparse.Namespace) -> list[str]:
    """The paths that `status` uses if none are given: all existing recipes and runs."""
    recipes, runs = RECIPES_DIR.glob("*/*.yaml"), arguments.output_root.glob("*/*/recipe.json")
    return [
        str(folder)
        for folder, found in ((RECIPES_DIR, recipes), (arguments.output_root, runs))
        if next(found, None) is not None
    ]


# By the name of the verb; each returns the exit code.
VERBS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "init": run_init,
    "demo-models": run_demo_models,
    "render": run_render,
    "recipe": run_recipe,
    "check": run_check,
    "masks": run_masks,
    "doctor": run_doctor,
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
