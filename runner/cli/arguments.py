"""The verbs and their options."""

from __future__ import annotations

import argparse
from functools import partial
from pathlib import Path
from typing import Any

from runner import __version__
from runner.cli.engines import add_engine_options
from runner.cli.recipe import add_recipe_verb
from runner.cli.shared_arguments import VerbParser, add_output_root, add_overrides, add_paths
from runner.cli.view_arguments import add_view_verbs
from runner.text import positive


def build_parser() -> VerbParser:
    """All verbs and their options."""
    parser = VerbParser(
        prog="runner",
        description=(
            "Render, launch and compare grids of YAML recipes for supervised fine-tuning."
        ),
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    parser.add_argument(
        "--version",
        action="version",
        version=f"recipe-runner {__version__}",
        help="show the version",
    )
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_project_verbs(verbs)
    add_recipe_verb(verbs)
    _add_check_verbs(verbs)
    _add_doctor(verbs)
    _add_launch_verb(verbs)
    _add_sweep_verbs(verbs)
    add_view_verbs(verbs)
    _add_model_verbs(verbs)
    for name in ("check", "masks", "launch", "sweep", "rerun", "why"):
        verbs.choices[name].is_about_recipes = True
    return parser


def _add_project_verbs(verbs: Any) -> None:
    """Verbs that create the files of a project."""
    init = verbs.add_parser(
        "init", help="create a project folder with a starter grid on your rows, or a stock grid"
    )
    init.add_argument("folder", type=Path, metavar="DIR", help="a folder that is empty or new")
    init.add_argument(
        "--from",
        dest="from_grid",
        metavar="GRID",
        help="copy this stock grid; a wrong name lists all",
    )
    init.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help=(
            "your rows: a file (JSONL, JSON, CSV, Parquet, ...), a folder or a hub id;"
            " may be repeated for files; default: a sample"
        ),
    )
    init.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="MODEL",
        help=(
            "a folder, hub id or name of a stock card; may be repeated;"
            " default: a small demo model, built offline"
        ),
    )
    init.add_argument(
        "--axis",
        dest="axes",
        action="append",
        default=[],
        metavar="KEY=VALUE,...",
        help=(
            "a recipe key and the values to try, such as training.learning_rate=1e-4,3e-4;"
            " may be repeated; `seed`, `loss`, `samples` and `model` are always axes,"
            " and get these values"
        ),
    )
    init.add_argument(
        "--prompt",
        metavar="TEXT",
        help='the prompt, with columns of your rows in braces: "{ticket}"; needs --completion',
    )
    init.add_argument("--completion", metavar="COLUMN", help="the column with the answers")

    demo_models = verbs.add_parser(
        "demo-models", help="build the demo's missing base models, offline"
    )
    demo_models.add_argument(
        "--output",
        type=Path,
        default=Path("demo_models"),
        metavar="DIR",
        help="folder of the models; default: demo_models",
    )

    render = verbs.add_parser("render", help="write recipes/GRID/*.yaml from recipe_templates/GRID")
    render.add_argument("grid", metavar="GRID", nargs="?", help="name of a grid; default: all")
    render.add_argument(
        "--check", action="store_true", help="write nothing; if recipes differ, show a diff, exit 1"
    )
    render.add_argument(
        "--prune", action="store_true", help="remove recipes that are no longer in the grid"
    )
    render.add_argument(
        "--force",
        action="store_true",
        help="also overwrite or remove recipes that were edited since they were rendered",
    )


def _add_check_verbs(verbs: Any) -> None:
    """Verbs that inspect recipes and their data before anything is launched."""
    check = verbs.add_parser(
        "check", help="validate recipes, then their data: rows, lengths, truncation, labels"
    )
    add_paths(check, takes_overrides=True)
    how = check.add_mutually_exclusive_group()
    how.add_argument(
        "--json",
        action="store_true",
        help="print all findings of each run as JSON; see docs/preflight.md",
    )
    how.add_argument("--schema-only", action="store_true", help="do not load tokenizers or data")
    check.add_argument(
        "--allow-code",
        action="store_true",
        help="allow the Python functions that these recipes name, as they are now",
    )
    check.add_argument(
        "--device-gib",
        type=positive,
        metavar="GIB",
        help="device memory that the runs will have; default: that of the GPU here, if any",
    )

    masks = verbs.add_parser(
        "masks", help="show rows as the model sees them: every token, the trained ones colored"
    )
    masks.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a recipe file, a run directory, or a name"
    )
    add_overrides(masks, "apply these to the recipe first")
    masks.add_argument(
        "--split",
        choices=("train", "validation", "eval", "test"),
        default="train",
        help="default: train; eval means validation",
    )
    rows = masks.add_mutually_exclusive_group()
    rows.add_argument(
        "--rows", type=positive, default=3, metavar="N", help="the first N rows drawn; default: 3"
    )
    rows.add_argument(
        "--row",
        metavar="ID|NUMBER",
        help="one row, by its id in samples.json or its number in the split",
    )
    masks.add_argument(
        "--format",
        choices=("ansi", "html", "json"),
        default="ansi",
        help="default: ansi; html prints one web page to stdout",
    )
    add_output_root(masks)


def _add_doctor(verbs: Any) -> None:
    doctor = verbs.add_parser(
        "doctor", help="show what this machine has, and what recipes need that it lacks"
    )
    add_paths(doctor, nargs="*")


def _add_launch_verb(verbs: Any) -> None:
    launch = verbs.add_parser("launch", help="start one run now, or resume it")
    launch.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a recipe file, or the name of its run"
    )
    add_overrides(launch, "overrides: run another experiment, named after them")
    launch.add_argument(
        "--name", help="name of the run; default: the recipe's name plus the overrides"
    )
    mode = launch.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="print environment and command, or why nothing would start; change nothing",
    )
    mode.add_argument(
        "--prepare",
        action="store_true",
        help="also write the run directory, so that you can start the run by hand",
    )
    launch.add_argument(
        "--num-processes",
        type=positive,
        metavar="N",
        help="processes to train on; keeps the global batch; default: the recipe's",
    )
    launch.add_argument(
        "--fresh", action="store_true", help="move an existing run aside and start from step 0"
    )
    launch.add_argument(
        "--resume",
        default="auto",
        metavar="auto|latest|best|PATH|URL",
        help=(
            "checkpoint to resume from: the newest verified one (auto), the newest or the best one,"
            " a folder or archive, or an archive in remote storage;"
            " newer checkpoints are moved aside"
        ),
    )
    launch.add_argument(
        "--repair",
        action="store_true",
        help="rewrite model/ of a completed run from its best checkpoint",
    )
    _add_own_base(launch)
    add_output_root(launch)


def _add_sweep_verbs(verbs: Any) -> None:
    """Verbs that launch many runs."""
    sweep = verbs.add_parser("sweep", help="start or resume many runs; completed ones are skipped")
    _add_sweep_options(sweep)
    what = sweep.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print each decision and command; start nothing"
    )
    what.add_argument(
        "--list", action="store_true", help="print the paths of the selected recipes, one per line"
    )
    sweep.add_argument(
        "--fresh",
        action="store_true",
        help="move the changed runs into one dated folder and start them from step 0; asks first",
    )
    sweep.add_argument("--yes", action="store_true", help="with --fresh: do not ask")
    sweep.add_argument(
        "--retry-failed",
        action="store_true",
        help="also launch runs that failed for a lasting reason",
    )
    sweep.add_more = partial(add_engine_options, writes_files=True)

    rerun = verbs.add_parser("rerun", help="sweep over the interrupted and failed runs only")
    _add_sweep_options(rerun)
    rerun.add_argument(
        "--dry-run", action="store_true", help="print each decision and command; start nothing"
    )
    rerun.add_more = partial(add_engine_options, writes_files=False)
    rerun.set_defaults(list=False, retry_failed=True, fresh=False, yes=False)


def _add_model_verbs(verbs: Any) -> None:
    """Verbs that use the model of one run."""
    chat = verbs.add_parser("chat", help="chat with the tuned model of a run in the terminal")
    _add_tuned_run(chat)
    chat.add_argument("--base", action="store_true", help="also show the base model's answers")
    chat.add_argument(
        "--prompt", metavar="TEXT", help="print the answer to this prompt on stdout and exit"
    )
    chat.add_argument(
        "--system", metavar="TEXT", help="a system message that opens the conversation"
    )
    chat.add_argument(
        "--max-new-tokens",
        type=positive,
        default=512,
        metavar="N",
        help="most tokens of an answer; default: 512",
    )

    export = verbs.add_parser(
        "export", help="write the tuned model of a run to a folder with a model card"
    )
    _add_tuned_run(export)
    export.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder; without it, --push sends the model of the run as it is",
    )
    export.add_argument(
        "--merge", action="store_true", help="write one whole model instead of an adapter"
    )
    export.add_argument(
        "--push",
        nargs="?",
        const="",
        metavar="OWNER/NAME",
        help="also push it to the hub; default: the recipe's tracking.hub_model_id",
    )


def _add_tuned_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN",
        help="a run directory such as runs/demo/gemma_060_full_seed1, a name, or a recipe",
    )
    add_output_root(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="best|latest|PATH",
        help="use the weights of this checkpoint; the run need not be completed",
    )


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    add_paths(parser, takes_overrides=True)
    room = parser.add_mutually_exclusive_group()
    room.add_argument(
        "--slots", type=positive, metavar="N", help="runs at the same time; default: 1"
    )
    room.add_argument(
        "--gpus",
        metavar="0,1,...",
        help="GPUs to use, by nvidia-smi's numbers or UUIDs; each run gets its own",
    )
    parser.add_argument(
        "--per-gpu",
        type=positive,
        metavar="N",
        help="runs at the same time on each GPU, of --gpus or of all; default: 1",
    )
    parser.add_argument(
        "--fail-fast", action="store_true", help="start no more runs after a failure"
    )
    parser.add_argument(
        "--cold",
        action="store_true",
        help="cold starts only: each run imports its libraries itself",
    )
    _add_own_base(parser)


def _add_own_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--own-base",
        action="store_true",
        help="score the base model in each run; neither read nor share base scores",
    )
