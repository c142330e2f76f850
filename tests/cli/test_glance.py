"""Looking at many runs: what the cache of recipes and the watch's looking at fewer files may never
change.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.files import write_json_atomic
from runner.plan.select import select_recipes
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.identity import RULES, derive_digest
from runner.recipe.parse import load_recipe
from runner.run.paths import content_cache_path, recipe_cache_path
from runner.view.watch import RunsReader
from tests.conftest import RECIPE_TEXT, ROOT, RUNNER, build_environment
from tests.support.model_folders import make_model_folder

NUM_RECIPES = 66  # more than are read without the cache
LAST = f"r{NUM_RECIPES - 1}"
RUNS = Path("runs")
RUN_DIR = RUNS / "tests" / LAST
RECIPE = Path("recipes/tests") / f"{LAST}.yaml"
VERBS = (
    ("status",),
    ("status", "--json", "recipes"),
    ("status", "--watch", "recipes"),
    ("report", "recipes"),
    ("check", "--schema-only", "recipes"),
)
SCORE = {
    "num_rows": 1,
    "num_completion_tokens": 2,
    "num_tokens": 3,
    "num_bytes": 4,
    "completion_nll_sum": 1.0,
    "nll_sum": 2.0,
}
Answers = list[tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Recipes, of which the first and the last one are completed runs."""
    monkeypatch.chdir(tmp_path)
    Path("accelerate_configs").mkdir()
    for path in (ROOT / "accelerate_configs").glob("*.yaml"):
        (Path("accelerate_configs") / path.name).write_text(path.read_text())
    write_data("{}\n")
    make_model_folder(Path("models/gemma"))
    RECIPE.parent.mkdir(parents=True)
    for number in range(NUM_RECIPES):
        name = f"r{number:02}"  # the last one in order is read by the cache
        text = RECIPE_TEXT.replace("name: base", f"name: {name}")
        text = text.replace("loss: completion}", f"number: {number}}}")
        RECIPE.with_stem(name).write_text(text)
        if number in (0, NUM_RECIPES - 1):
            build_run(name)
    return tmp_path


def write_data(text: str) -> None:
    Path("data.jsonl").write_text(text)


def build_run(name: str) -> None:
    recipe = load_recipe(RECIPE.with_stem(name))
    contents = hash_contents(recipe, ContentHashes(content_cache_path(RUNS)))
    digest = derive_digest(recipe, contents)
    attempt = {
        "number": 1,
        "started_at_utc": "2026-01-01T00:00:00+00:00",
        "ended_at_utc": "2026-01-01T00:01:00+00:00",
        "command": ["accelerate"],
        "environment": {},
        "num_processes": 1,
        "host": "here",
    }
    splits = {"validation": SCORE, "test": SCORE}
    run_dir = RUN_DIR.with_name(name)
    stored = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": digest, "rules": RULES}
    write_json_atomic(run_dir / "recipe.json", stored | {"contents": contents})
    write_json_atomic(run_dir / "run.json", {"attempts": [attempt]})
    result = {
        "recipe_digest": digest,
        "outcome": "completed",
        "stop_reason": "max_steps",
        "num_steps": 4,
        "best_step": 4,
        "best_metric": 1.0,
        "metric": "nll_per_completion_token",
        "num_train_rows": 22,
        "base": splits,
        "tuned": splits,
    }
    write_json_atomic(run_dir / "result.json", result)
    write_json_atomic(run_dir / "samples.json", {"splits": {"test": {"ids_hash": "0"}}})
    progress = {"phase": "training", "step": 2, "max_steps": 4, "loss": 1.0}
    write_json_atomic(run_dir / "attempts/1/progress.json", progress)


def ask(capsys: pytest.CaptureFixture[str]) -> Answers:
    """The current output of the verbs."""
    answers = []
    for verb in VERBS:
        capsys.readouterr()
        code = main(verb)
        output, errors = capsys.readouterr()
        answers.append((code, re.sub(r"\d\d:\d\d:\d\d$", "", output, flags=re.MULTILINE), errors))
    return answers


def ask_without_cache(capsys: pytest.CaptureFixture[str]) -> Answers:
    path = recipe_cache_path(RUNS)
    path.unlink(missing_ok=True)
    path.mkdir()
    answers = ask(capsys)
    path.rmdir()
    return answers


def edit(path: Path, before: str, after: str) -> None:
    """Other bytes of the same number under the same time."""
    text, state = path.read_text(), path.stat()
    assert before in text and len(before) == len(after)
    path.write_text(text.replace(before, after))
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))


def put(name: str, old: str, new: str) -> Callable[[], None]:
    """Replace a record, as a launch or a training process does."""

    def change() -> None:
        path = RUN_DIR / name
        text = path.read_text()
        assert old in text
        write_json_atomic(path, json.loads(text.replace(old, new)))

    return change


def fail_again() -> None:
    record = json.loads((RUN_DIR / "run.json").read_text())
    failure = {"kind": "crashed", "message": "a new failure"}
    second = record["attempts"][0] | {"number": 2, "failure": failure}
    write_json_atomic(RUN_DIR / "run.json", {"attempts": [*record["attempts"], second]})
    (RUN_DIR / "result.json").unlink()


def change_data() -> None:
    write_data("{} \n")
    hash_contents(load_recipe(RECIPE), ContentHashes(content_cache_path(RUNS)))


CHANGES: dict[str, Callable[[], object]] = {
    "recipe of the same size and time": lambda: edit(RECIPE, "seed: 3", "seed: 4"),
    "recipe that is wrong now": lambda: edit(RECIPE, "seed: 3", "sead: 3"),
    "recipe of another run": lambda: edit(RECIPE, f"name: {LAST}", "name: xxx"),
    "recipe that is gone": RECIPE.unlink,
    "recipe.json": put("recipe.json", '"seed": 3', '"seed": 4'),
    "run.json": put("run.json", "00:01:00", "00:09:00"),
    "run.json in place, under the same time": lambda: edit(
        RUN_DIR / "run.json", "00:01:00", "00:09:00"
    ),
    "result.json": put("result.json", '"num_steps": 4', '"num_steps": 9'),
    "result.json that is damaged": lambda: (RUN_DIR / "result.json").write_text("{"),
    "result.json that is gone": lambda: (RUN_DIR / "result.json").unlink(),
    "another attempt": fail_again,
    "progress.json": put("attempts/1/progress.json", '"loss": 1.0', '"loss": 3.0'),
    "quarantine": lambda: (RUN_DIR / "quarantine" / "step-2").mkdir(parents=True),
    "data": change_data,
}


@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_no_answer_is_stale(
    change: Callable[[], object], folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    before = ask(capsys)
    assert recipe_cache_path(RUNS).is_file(), "the cache is at work"
    change()
    now = ask(capsys)
    assert now != before, "it shows"
    assert now == ask_without_cache(capsys)


WATCHED = [name for name in CHANGES if not name.startswith("recipe ")]


@pytest.mark.parametrize("name", WATCHED)
def test_a_watch_sees_what_changes_under_it(name: str, folder: Path) -> None:
    reader = RunsReader(select_recipes(["recipes"], RUNS), content_cache_path(RUNS))
    before = [reading.status for reading in reader.read()]
    again = [reading.status for reading in reader.read()]
    assert all(one is other for one, other in zip(before, again, strict=True)), "nothing is derived"
    CHANGES[name]()
    anew = RunsReader(select_recipes(["recipes"], RUNS), content_cache_path(RUNS))
    now = [reading.status for reading in reader.read()]
    assert now != before
    assert now == [reading.status for reading in anew.read()]


def test_another_accelerate_config_is_seen(
    folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ask(capsys)
    edit(RECIPE, "configs/cpu.yaml", "configs/gpu.yaml")
    Path("accelerate_configs/cpu.yaml").unlink()
    assert ask(capsys) == ask_without_cache(capsys)


def test_several_at_once_say_the_same(folder: Path) -> None:
    def start() -> subprocess.Popen[str]:
        command = [str(RUNNER), "status", "recipes"]
        return subprocess.Popen(
            command, env=build_environment(), stdout=subprocess.PIPE, text=True, cwd=folder
        )

    outputs = {process.communicate()[0] for process in [start() for _ in range(3)]}
    outputs.add(start().communicate()[0])
    assert len(outputs) == 1 and outputs.pop().count("pending") == NUM_RECIPES - 2
    assert json.loads(recipe_cache_path(RUNS).read_text())["recipes"].keys() >= {
        str(folder / RECIPE)
    }
    assert not list(RUNS.glob(".*.tmp"))


def test_status_makes_no_output_root(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "recipes", "--output-root", "elsewhere"]) == 0
    assert not Path("elsewhere").exists()


def test_a_sweep_does_not_read_the_cache(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The cached recipe is wrong in a way that no checksum shows."""
    ask(capsys)
    content = json.loads(recipe_cache_path(RUNS).read_text())
    content["recipes"] = {name: ["no", "such"] for name in content["recipes"]}
    recipe_cache_path(RUNS).write_text(json.dumps(content))
    state = recipe_cache_path(RUNS).read_bytes()
    assert main(["sweep", "recipes", "--dry-run"]) == 0
    assert recipe_cache_path(RUNS).read_bytes() == state
