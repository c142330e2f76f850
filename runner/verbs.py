"""What each verb of the command line does, from parsed arguments to an exit code.

What launches runs is in `launch_verbs`.
"""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path

from runner.errors import RunnerError
from runner.identity import ContentHashes, known_contents
from runner.launch_verbs import run_launch, run_rerun, run_sweep, select_run
from runner.paths import RunPaths, content_cache_path
from runner.recipe import Recipe, load_recipe, parse_recipe
from runner.record import derive_status, load_stored_recipe
from runner.selection import select_recipes, suggest_path

__all__ = [
    "run_chat",
    "run_check",
    "run_export",
    "run_init",
    "run_launch",
    "run_masks",
    "run_render",
    "run_report",
    "run_rerun",
    "run_status",
    "run_sweep",
    "run_why",
]


def run_init(arguments: argparse.Namespace) -> int:
    """`runner init`."""
    from runner.init_project import run_init

    return run_init(arguments.folder, arguments.from_grid, arguments.data, arguments.models)


def run_render(arguments: argparse.Namespace) -> int:
    """`runner render`."""
    from runner.recipe_files import run_render

    return run_render(arguments.grid, check=arguments.check, prune=arguments.prune, root=Path())


def run_check(arguments: argparse.Namespace) -> int:
    """`runner check`: every recipe, then their data in one pass over the distinct tokenizers and data sections."""
    selected = select_recipes(arguments.paths, arguments.output_root, arguments.where)
    if arguments.schema_only:
        print(f"{len(selected)} recipes are well-formed")
        return 0
    from runner.sft.check_report import run_check

    finished = [one.full_name for one in selected if one.paths.result_path.exists()]
    return run_check([one.recipe for one in selected], arguments.output_root, finished, is_json=arguments.json)


def run_masks(arguments: argparse.Namespace) -> int:
    """`runner masks`: loads the tokenizer, never the model."""
    from runner.sft.mask_formats import format_views
    from runner.sft.mask_view import build_views

    recipe = _load_recipe_or_run(arguments.recipe, arguments.overrides)
    split = "validation" if arguments.split == "eval" else arguments.split
    views = build_views(recipe, split, arguments.rows, arguments.row)
    is_coloured = "NO_COLOR" not in os.environ and (sys.stdout.isatty() or "FORCE_COLOR" in os.environ)
    print(format_views(views, recipe, arguments.format, is_coloured=is_coloured), end="")
    return 0


def run_status(arguments: argparse.Namespace) -> int:
    """`runner status`: reads files only, hashes nothing."""
    import json

    selected = select_recipes(arguments.paths or _everything(arguments), arguments.output_root, arguments.where)
    if arguments.watch:
        from runner.watch import watch

        return watch(selected, content_cache_path(arguments.output_root))
    hashes = ContentHashes(content_cache_path(arguments.output_root))
    rows = [(one, derive_status(one.paths, one.recipe, known_contents(one.recipe, hashes))) for one in selected]
    if arguments.json:
        content = [
            {"grid": one.recipe.run.grid, "name": one.recipe.run.name, "axes": dict(one.recipe.run.axes)}
            | {"run_dir": str(one.paths.run_dir), **status.model_dump()}
            for one, status in rows
        ]
        print(json.dumps(content, indent=2))
        return 0
    width = max((len(one.full_name) for one, _ in rows), default=0)
    for one, status in rows:
        step = "" if status.step is None else f"{status.step}/{status.max_steps or '?'}"
        loss = "" if status.loss is None else f"{status.loss:.4f}"
        seconds = "" if status.seconds is None else f"{status.seconds:.0f} s"
        why = "; ".join(filter(None, (status.why.partition("\n")[0], status.notes)))
        print(f"{one.full_name:<{width}}  {status.state:<11}  {step:>9}  {loss:>8}  {seconds:>7}  {why}")
    return 0


def run_why(arguments: argparse.Namespace) -> int:
    """`runner why`."""
    import json

    from runner.why import build_lines, gather_facts

    selected = select_run(arguments)
    hashes = ContentHashes(content_cache_path(arguments.output_root))
    facts = gather_facts(selected.recipe, selected.paths, hashes, arguments.num_processes)
    print(json.dumps(facts.as_json(), indent=2) if arguments.json else "\n".join(build_lines(facts)))
    return 0


def run_report(arguments: argparse.Namespace) -> int:
    """`runner report`."""
    from runner.report import build_rows
    from runner.report_comparisons import build_comparisons
    from runner.report_format import format_report

    selected = select_recipes(arguments.paths, arguments.output_root, arguments.where)
    hashes = ContentHashes(content_cache_path(arguments.output_root))
    runs = [
        (one.recipe, one.paths, derive_status(one.paths, one.recipe, known_contents(one.recipe, hashes)))
        for one in selected
    ]
    rows = build_rows(runs)
    print(format_report(rows, build_comparisons(rows), arguments.format), end="")
    return 0


def run_chat(arguments: argparse.Namespace) -> int:
    """`runner chat`."""
    from runner.sft.chat import chat

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
    from runner.sft.publish import export_run

    difference = export_run(
        arguments.run_dir,
        arguments.output,
        checkpoint=arguments.checkpoint,
        is_merged=arguments.merge,
        push_to=arguments.push,
    )
    print(f"{arguments.output}: loaded again, its logits differ from the run's by at most {difference:.2g}")
    return 0


def _load_recipe_or_run(path: Path, overrides: list[str]) -> Recipe:
    """The recipe of a file or of a run directory, under overrides."""
    if path.is_dir():
        stored = load_stored_recipe(RunPaths(path))
        if stored is None:
            raise RunnerError(f"{path} is a folder, but no run directory", hint="name one recipe file, or one run")
        return parse_recipe(stored.recipe.model_dump_json(), where=str(path), overrides=overrides)
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
