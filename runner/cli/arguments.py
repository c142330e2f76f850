"""The verbs and their options."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NoReturn

from runner.cli.engines import add_engine_options
from runner.errors import escape_controls
from runner.secrets import scrub
from runner.text import positive


class _Parser(argparse.ArgumentParser):
    """Repeats wrong arguments without what must not be shown."""

    # Adds options of this verb that take time to find; called when the verb is used.
    add_more: Callable[[argparse.ArgumentParser], None] | None = None

    # True of verbs about recipes, which people give the options of other trainers.
    is_about_recipes = False

    def parse_known_args(self, args: Any = None, namespace: Any = None) -> Any:
        """As argparse's.

        Raises:
            RunnerError: an option of another trainer.
        """
        self._complete()
        if self.is_about_recipes and any(word.startswith("--") for word in args):
            self._refuse_foreign_options(args)
        return super().parse_known_args(args, namespace)

    def format_help(self) -> str:
        """As argparse's."""
        self._complete()
        return super().format_help()

    def _complete(self) -> None:
        if self.add_more is not None:
            add_more, self.add_more = self.add_more, None
            add_more(self)

    def _refuse_foreign_options(self, words: Sequence[str]) -> None:
        known = self._option_string_actions
        if all(word.partition("=")[0] in known for word in words if word.startswith("--")):
            return  # what answers takes time to import
        from runner.cli.habits import refuse_foreign_options

        refuse_foreign_options(self.prog, words, known)

    def error(self, message: str) -> NoReturn:
        super().error(escape_controls(scrub(message)))


def build_parser() -> argparse.ArgumentParser:
    """All verbs and their options."""
    parser = _Parser(
        prog="runner",
        description=(
            "Grids of YAML recipes for supervised fine-tuning: rendered, launched, compared."
        ),
    )
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    verbs = parser.add_subparsers(dest="verb", required=True, metavar="VERB")
    _add_project_verbs(verbs)
    _add_check_verbs(verbs)
    _add_doctor(verbs)
    _add_launch_verb(verbs)
    _add_sweep_verbs(verbs)
    _add_view_verbs(verbs)
    _add_model_verbs(verbs)
    for name in ("check", "masks", "launch", "sweep", "rerun", "why"):
        verbs.choices[name].is_about_recipes = True
    return parser


def _add_project_verbs(verbs: Any) -> None:
    """What makes the files of a project."""
    init = verbs.add_parser(
        "init", help="a new project folder: a starter grid on your rows and models, or a stock grid"
    )
    init.add_argument("folder", type=Path, metavar="DIR", help="must be empty or not exist yet")
    init.add_argument(
        "--from",
        dest="from_grid",
        metavar="GRID",
        help="a stock grid, copied; a wrong name lists all",
    )
    init.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="DATA",
        help=(
            "your rows: a file (JSONL, JSON, CSV, Parquet, ...), a folder, a hub id; may be"
            " repeated for files; default: a sample"
        ),
    )
    init.add_argument(
        "--model",
        dest="models",
        action="append",
        default=[],
        metavar="MODEL",
        help=(
            "folder, hub id or name of a stock card; may be repeated;"
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
            "a key of the recipe and the values that are tried, such as"
            " training.learning_rate=1e-4,3e-4; may be repeated; `seed`, `loss`, `samples` and"
            " `model` are axes anyway, and get these values"
        ),
    )
    init.add_argument(
        "--prompt",
        metavar="TEXT",
        help='the prompt, with columns of your rows in braces: "{ticket}"; needs --completion',
    )
    init.add_argument("--completion", metavar="COLUMN", help="the column of the answer")

    demo_models = verbs.add_parser(
        "demo-models", help="the demo's base models, built offline where they are missing"
    )
    demo_models.add_argument(
        "--output",
        type=Path,
        default=Path("demo_models"),
        metavar="DIR",
        help="default: demo_models",
    )

    render = verbs.add_parser("render", help="recipe_templates/GRID -> recipes/GRID/*.yaml")
    render.add_argument("grid", metavar="GRID", nargs="?", help="default: every grid")
    render.add_argument(
        "--check", action="store_true", help="write nothing; exit 1 and show a diff on drift"
    )
    render.add_argument(
        "--prune", action="store_true", help="remove recipes that the grid no longer has"
    )
    render.add_argument(
        "--force",
        action="store_true",
        help="also overwrite, or remove, recipes that were edited since they were rendered",
    )


def _add_check_verbs(verbs: Any) -> None:
    """What looks at recipes and their data before anything is launched."""
    check = verbs.add_parser(
        "check", help="validate recipes, then their data: rows, lengths, truncation, labels"
    )
    _add_paths(check, takes_overrides=True)
    how = check.add_mutually_exclusive_group()
    how.add_argument(
        "--json", action="store_true", help="everything found, per run; see docs/preflight.md"
    )
    how.add_argument("--schema-only", action="store_true", help="do not load tokenizers and data")
    check.add_argument(
        "--allow-code",
        action="store_true",
        help="let the Python functions that these recipes name run, as they are now",
    )
    check.add_argument(
        "--device-gib",
        type=positive,
        metavar="GIB",
        help="memory of the device that the runs will have; default: of the GPU here, if any",
    )

    masks = verbs.add_parser(
        "masks", help="rows as the model sees them: every token, the trained ones coloured"
    )
    masks.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a recipe file, a run directory, or a name"
    )
    masks.add_argument(
        "overrides", nargs="*", metavar="key=value", help="look at the recipe under them"
    )
    masks.add_argument(
        "--split",
        choices=("train", "validation", "eval", "test"),
        default="train",
        help="eval: validation",
    )
    rows = masks.add_mutually_exclusive_group()
    rows.add_argument(
        "--rows", type=positive, default=3, metavar="N", help="the first N rows drawn, default 3"
    )
    rows.add_argument(
        "--row",
        metavar="ID|NUMBER",
        help="one row: its id in samples.json, or its number in the split",
    )
    masks.add_argument(
        "--format",
        choices=("ansi", "html", "json"),
        default="ansi",
        help="html: one page, to stdout",
    )
    _add_output_root(masks)


def _add_doctor(verbs: Any) -> None:
    doctor = verbs.add_parser(
        "doctor", help="what this machine has, and what recipes need that it has not"
    )
    _add_paths(doctor, nargs="*")


def _add_launch_verb(verbs: Any) -> None:
    launch = verbs.add_parser("launch", help="one run, now")
    launch.add_argument(
        "recipe", type=Path, metavar="RECIPE", help="a recipe file, or the name of its run"
    )
    launch.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="make another experiment, named after them",
    )
    launch.add_argument("--name", help="name of the run; default: the recipe's, and the overrides")
    mode = launch.add_mutually_exclusive_group()
    mode.add_argument(
        "--dry-run",
        action="store_true",
        help="print environment and command, or why nothing would be started; touch nothing",
    )
    mode.add_argument(
        "--prepare", action="store_true", help="also write the run directory, to start it by hand"
    )
    launch.add_argument(
        "--num-processes",
        type=positive,
        metavar="N",
        help="default: the recipe's; keeps the global batch",
    )
    launch.add_argument(
        "--fresh", action="store_true", help="move an existing run aside and start anew"
    )
    launch.add_argument(
        "--resume",
        default="auto",
        metavar="auto|latest|best|PATH|URL",
        help=(
            "what to go on from: the newest checkpoint that verifies (auto), the newest or the best"
            " one, a folder or archive, or an archive in remote storage;"
            " what is newer is moved aside"
        ),
    )
    launch.add_argument(
        "--repair",
        action="store_true",
        help="write model/ of a completed run again, from its best checkpoint",
    )
    _add_own_base(launch)
    _add_output_root(launch)


def _add_sweep_verbs(verbs: Any) -> None:
    """What launches many runs."""
    sweep = verbs.add_parser(
        "sweep", help="many runs: what is done is skipped, what is pending is launched"
    )
    _add_sweep_options(sweep)
    what = sweep.add_mutually_exclusive_group()
    what.add_argument(
        "--dry-run", action="store_true", help="print each decision and command, start nothing"
    )
    what.add_argument("--list", action="store_true", help="print one selected recipe path per line")
    sweep.add_argument(
        "--fresh",
        action="store_true",
        help="move the changed runs into one dated folder and start them anew; asks first",
    )
    sweep.add_argument("--yes", action="store_true", help="with --fresh: do not ask")
    sweep.add_argument(
        "--retry-failed", action="store_true", help="launch also what failed for a lasting reason"
    )
    sweep.add_more = partial(add_engine_options, writes_files=True)

    rerun = verbs.add_parser("rerun", help="a sweep over the interrupted and failed runs only")
    _add_sweep_options(rerun)
    rerun.add_argument(
        "--dry-run", action="store_true", help="print each decision and command, start nothing"
    )
    rerun.add_more = partial(add_engine_options, writes_files=False)
    rerun.set_defaults(list=False, retry_failed=True, fresh=False, yes=False)


def _add_view_verbs(verbs: Any) -> None:
    """What looks at runs, or asks them to stop."""
    status = verbs.add_parser("status", help="one line per run: status, step, loss, time, why")
    _add_paths(status, nargs="*")
    how = status.add_mutually_exclusive_group()
    how.add_argument("--json", action="store_true")
    how.add_argument(
        "--watch",
        action="store_true",
        help="live: the grid as a table, progress, time left, failures",
    )

    why = verbs.add_parser(
        "why", help="one run: what would happen next, and exactly what decides it"
    )
    why.add_argument(
        "recipe",
        type=Path,
        metavar="RUN",
        help="a recipe file, a run directory, or the name of a run",
    )
    why.add_argument("overrides", nargs="*", metavar="key=value", help="as for launch")
    why.add_argument("--name", help="as for launch")
    why.add_argument("--num-processes", type=positive, metavar="N", help="as for launch")
    why.add_argument("--json", action="store_true")
    _add_output_root(why)

    logs = verbs.add_parser("logs", help="what the last attempt of a run printed")
    logs.add_argument(
        "run",
        metavar="RUN",
        help="a recipe, run directory or name; of a folder or grid, the run that is running",
    )
    logs.add_argument(
        "-f",
        "--follow",
        action="store_true",
        help="go on with what is printed, until the run is done",
    )
    logs.add_argument("--attempt", type=positive, metavar="N", help="another attempt than the last")
    _add_output_root(logs)

    stop = verbs.add_parser(
        "stop", help="ask running runs to checkpoint at the end of their step and to leave"
    )
    _add_paths(stop)

    report = verbs.add_parser(
        "report", help="the comparison: what the runs allow to conclude, effects, then cells"
    )
    _add_paths(report)
    report.add_argument(
        "--verify",
        action="store_true",
        help="read every byte that completed runs recorded; what is damaged has no numbers",
    )
    report.add_more = _add_report_formats

    compare = verbs.add_parser(
        "compare",
        help="two runs or two values of an axis: what is equal, what differs, by how much",
    )
    for name in ("a", "b"):
        compare.add_argument(
            name,
            metavar=name.upper(),
            help="a recipe, a run directory, the name of a run, or axis=value of --grid",
        )
    compare.add_argument(
        "--axis", help="the one thing that may differ: exit 1 where anything else does"
    )
    compare.add_argument("--grid", metavar="GRID", help="of axis=value, or of the names of runs")
    compare.add_argument("--json", action="store_true")
    _add_rows_fixed(compare)
    _add_output_root(compare)
    _add_power(verbs)

    clean = verbs.add_parser(
        "clean", help="remove what runs share and can compute again; no run is touched"
    )
    clean.add_argument("--dry-run", action="store_true", help="only show what there is")
    clean.add_argument("--yes", action="store_true", help="do not ask")
    _add_output_root(clean)


def _add_power(verbs: Any) -> None:
    power = verbs.add_parser(
        "power", help="how many seeds and test rows find a difference, from the runs of a pilot"
    )
    _add_paths(power)
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
        help="how often it is to be found, default 0.8",
    )
    power.add_argument(
        "--metric", metavar="NAME", help="default: the NLL per completion token, or bits per byte"
    )
    power.add_argument("--json", action="store_true")


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
    from runner.report.format import FORMATS

    names = list(FORMATS)
    report.add_argument("--format", choices=names, default=names[0])
    report.add_argument(
        "--metric",
        action="append",
        metavar="NAME",
        help="compare by this instead of the metrics that fit; may be repeated",
    )
    _add_rows_fixed(report)
    _add_report_pages(report)


def _add_rows_fixed(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--rows-fixed",
        action="store_true",
        help="speak of these very test rows, as of a public benchmark: only seeds are random",
    )


def _add_report_pages(report: argparse.ArgumentParser) -> None:
    report.add_argument(
        "--html", type=Path, metavar="FILE", help="also write the report as one web page"
    )
    report.add_argument(
        "--rows", type=Path, metavar="DIR", help="a page of all test rows for each two arms"
    )
    report.add_argument(
        "--figures", type=Path, metavar="DIR", help="the figures of the page as PDF"
    )
    report.add_argument(
        "--without-rows",
        action="store_true",
        help="leave prompts, references and answers out of all pages",
    )


def _add_model_verbs(verbs: Any) -> None:
    """What is done with the model of one run."""
    chat = verbs.add_parser("chat", help="talk to the tuned model of a run in the terminal")
    _add_tuned_run(chat)
    chat.add_argument(
        "--base", action="store_true", help="show the base model's answers beside the tuned model's"
    )
    chat.add_argument("--prompt", metavar="TEXT", help="answer this on stdout, and leave")
    chat.add_argument(
        "--system", metavar="TEXT", help="a system message in front of the conversation"
    )
    chat.add_argument(
        "--max-new-tokens", type=positive, default=512, metavar="N", help="per answer, default 512"
    )

    export = verbs.add_parser(
        "export", help="the tuned model of a run as a folder with a model card, for others"
    )
    _add_tuned_run(export)
    export.add_argument(
        "--output",
        type=Path,
        metavar="DIR",
        help="a new folder; without it, --push sends the model of the run as it is",
    )
    export.add_argument(
        "--merge", action="store_true", help="one whole model instead of an adapter"
    )
    export.add_argument(
        "--push",
        nargs="?",
        const="",
        metavar="OWNER/NAME",
        help="also send it to the hub; default: the recipe's tracking.hub_model_id",
    )


def _add_tuned_run(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run_dir",
        type=Path,
        metavar="RUN",
        help="a run directory such as runs/demo/gemma_060_full_seed1, a name, or a recipe",
    )
    _add_output_root(parser)
    parser.add_argument(
        "--checkpoint",
        metavar="best|latest|PATH",
        help="its weights instead of a completed run's, whatever the state",
    )


def _add_paths(
    parser: argparse.ArgumentParser, nargs: str = "+", *, takes_overrides: bool = False
) -> None:
    parser.add_argument(
        "paths",
        nargs=nargs,
        metavar="PATH",
        help=(
            "recipes: files, folders, globs; run directories; names of runs and grids"
            + ("; and key=value, as for launch, for each recipe" if takes_overrides else "")
        ),
    )
    # Found among the paths: argparse could not tell where those end.
    parser.set_defaults(overrides=[], takes_overrides=takes_overrides)
    parser.add_argument(
        "--where", action="append", default=[], metavar="axis=value[,value]", help="may be repeated"
    )
    _add_output_root(parser)


def _add_output_root(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--output-root", type=Path, metavar="DIR", help="default: runs, in the project"
    )


def _add_sweep_options(parser: argparse.ArgumentParser) -> None:
    _add_paths(parser, takes_overrides=True)
    room = parser.add_mutually_exclusive_group()
    room.add_argument("--slots", type=positive, metavar="N", help="runs at a time, default 1")
    room.add_argument(
        "--gpus",
        metavar="0,1,...",
        help="each run gets its own of these, by nvidia-smi's numbers or UUIDs",
    )
    parser.add_argument(
        "--per-gpu",
        type=positive,
        metavar="N",
        help="runs at a time on each GPU, of --gpus or of all that there are, default 1",
    )
    parser.add_argument(
        "--fail-fast", action="store_true", help="start nothing more after a failure"
    )
    parser.add_argument(
        "--cold", action="store_true", help="fork no runs: each imports its libraries itself"
    )
    _add_own_base(parser)


def _add_own_base(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--own-base",
        action="store_true",
        help="each run scores the base model itself, and neither reads nor keeps such scores",
    )
