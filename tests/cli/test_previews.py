"""Previews say what the run does: `status`, `why`, `sweep --dry-run` and `launch --dry-run`, after
each kind of change and for runs in each state.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest

from runner.cli.main import main
from runner.files import write_json_atomic
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.identity import derive_digest
from runner.recipe.parse import load_recipe
from runner.run.paths import content_cache_path
from tests.support.fake_checkpoints import flip_bit, interrupt
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.settled import settle

__all__ = ["fake"]

CACHE: Final = content_cache_path(Path("runs"))
DATA: Final = Path("data.jsonl")
WEIGHTS: Final = Path("models/toy/model.safetensors")
TEMPLATE: Final = Path("chat.jinja")
STATES: Final = ("pending", "interrupted", "completed")
SCORE: Final = {
    "num_rows": 1,
    "num_completion_tokens": 1,
    "num_tokens": 1,
    "num_bytes": 1,
    "completion_nll_sum": 1.0,
    "nll_sum": 1.0,
}


def recipe_path(name: str) -> Path:
    return Path(f"recipes/toy/{name}.yaml")


def complete(fake: FakeLauncher, name: str) -> None:
    recipe = load_recipe(recipe_path(name))
    paths = interrupt(recipe, fake.paths(name))
    contents = hash_contents(recipe, ContentHashes(CACHE, is_kept=False))
    result = {
        "recipe_digest": derive_digest(recipe, contents),
        "outcome": "completed",
        "stop_reason": "max_steps",
        "num_steps": 4,
        "best_step": 4,
        "best_metric": 1.0,
        "metric": "nll_per_completion_token",
        "num_train_rows": 1,
        "base": {"test": SCORE},
        "tuned": {"test": SCORE},
    }
    write_json_atomic(paths.result_path, result)


@pytest.fixture
def build(fake: FakeLauncher) -> Callable[[str], FakeLauncher]:
    """`build(state)`: the runs `a` and `b` in a state, whose files were hashed long ago."""
    WEIGHTS.write_bytes(bytes(range(256)))
    TEMPLATE.write_text("{{ messages[0].content }}{{ eos_token }}")

    def build(state: str) -> FakeLauncher:
        fake.add("a", "b", told="complete")
        for name in ("a", "b"):
            text = recipe_path(name).read_text()
            model = "./models/toy, chat_template: chat.jinja"
            recipe_path(name).write_text(text.replace("models/toy", model))
            if state == "interrupted":
                interrupt(load_recipe(recipe_path(name)), fake.paths(name))
            if state == "completed":
                complete(fake, name)
            hash_contents(load_recipe(recipe_path(name)), ContentHashes(CACHE))
        settle(CACHE)
        return fake

    return build


def keep_times(change: Callable[[Path], object], path: Path) -> None:
    """Restore the times, as a user does who wants to hide a change."""
    state = path.stat()
    change(path)
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert (path.stat().st_mtime_ns, path.stat().st_ino) == (state.st_mtime_ns, state.st_ino)


def touch_all() -> None:
    for path in (DATA, WEIGHTS, TEMPLATE):
        path.chmod(0o600)


def forget_and_change() -> None:
    CACHE.unlink()
    flip_bit(DATA)


def edit_recipes(old: str, new: str) -> None:
    for name in ("a", "b"):
        text = recipe_path(name).read_text()
        assert old in text
        recipe_path(name).write_text(text.replace(old, new))


@dataclass(frozen=True)
class Change:
    """A change, and what status, which reads nothing, says of it."""

    do: Callable[[], object]
    path: str = ""  # the one that status names
    field: str = ""  # of `RunStatus`, where it does
    is_other: bool = True  # whether the experiment is another one then


CHANGES: Final = {
    "nothing": Change(lambda: None, is_other=False),
    "bit of the data": Change(lambda: keep_times(flip_bit, DATA), str(DATA), "touched"),
    "bit of the weights": Change(lambda: keep_times(flip_bit, WEIGHTS), "./models/toy", "touched"),
    "bit of the template": Change(lambda: keep_times(flip_bit, TEMPLATE), "chat.jinja", "touched"),
    "another row": Change(lambda: DATA.write_text("{}\n{}\n"), str(DATA), "touched"),
    "data put in place": Change(
        lambda: (Path("new").write_text("{} \n"), Path("new").rename(DATA)), str(DATA), "touched"
    ),
    "another file of the model": Change(
        lambda: Path("models/toy/extra.json").write_text("{}"), "./models/toy", "touched"
    ),
    "the weights missing": Change(WEIGHTS.unlink, str(WEIGHTS), "missing"),
    "only touched": Change(touch_all, str(DATA), "touched", is_other=False),
    "cache lost": Change(CACHE.unlink, str(DATA), "unread", is_other=False),
    "cache lost and data changed": Change(forget_and_change, str(DATA), "unread"),
    "data missing": Change(DATA.unlink, str(DATA), "missing"),
    "model missing": Change(lambda: shutil.rmtree("models"), "./models/toy", "missing"),
    "template missing": Change(TEMPLATE.unlink, "chat.jinja", "missing"),
    "launch config missing": Change(Path("cpu.yaml").unlink, "cpu.yaml", "missing"),
    "other devices": Change(
        lambda: edit_recipes("num_processes: 1", "num_processes: 2"), is_other=False
    ),
    "recipe": Change(lambda: edit_recipes("max_steps: 2", "max_steps: 3")),
}


def expect(state: str, name: str) -> str:
    """The effects of the real command."""
    change = CHANGES[name]
    if change.field == "missing":
        return "error"
    if change.is_other and state != "pending":
        return "refuse"
    if name == "other devices" and state == "interrupted":
        return "refuse"
    return "skip" if state == "completed" else "launch"


@dataclass(frozen=True)
class Said:
    """The output of a verb."""

    code: int
    output: str
    errors: str

    def find_decision(self) -> str:
        """Of `sweep`: the lines on the run `a`, without the commands of a dry run."""
        found = re.search(r"^(launch|skip|refuse) +toy/a .*\n( {10}.*\n)*", self.output, re.M)
        return found[0] if found else ""


@pytest.mark.parametrize("state", STATES)
@pytest.mark.parametrize("name", CHANGES)
def test_a_preview_says_what_the_run_does(
    name: str,
    state: str,
    build: Callable[[str], FakeLauncher],
    capsys: pytest.CaptureFixture[str],
) -> None:
    def say(*arguments: str | Path) -> Said:
        capsys.readouterr()
        return Said(main([*map(str, arguments)]), *capsys.readouterr())

    fake, change, action = build(state), CHANGES[name], expect(state, name)
    change.do()
    before = fake.tree()
    table, [row] = say("status", recipe_path("a")), read_status(say)
    why = json.loads(say("why", recipe_path("a"), "--json").output)
    text = say("why", recipe_path("a")).output
    dry_sweep = say("sweep", recipe_path("a"), "--dry-run")
    dry_launch = say("launch", recipe_path("b"), "--dry-run")
    assert fake.tree() == before, "a preview changes nothing"

    sweep, launch = say("sweep", recipe_path("a")), say("launch", recipe_path("b"))
    started = fake.started()
    assert started == (["a", "b"] if action == "launch" else [])
    assert sweep.code == {"error": 2, "refuse": 1}.get(action, 0)
    assert launch.code == (2 if action in ("error", "refuse") else 0)

    assert dry_sweep.find_decision() == sweep.find_decision()
    assert sweep.find_decision().startswith(action if action != "error" else "")
    assert dry_sweep.code == sweep.code
    assert dry_launch.code == launch.code
    if action in ("error", "refuse"):
        assert dry_launch.errors == launch.errors
    if action == "error":
        assert dry_sweep.errors == sweep.errors
        assert "names files that do not exist" in sweep.errors and change.path in sweep.errors
    assert ("--config_file" in dry_launch.output) == (action == "launch")

    shown = "refuse" if action == "error" else action
    assert why["next"] == shown
    assert (why["decisions"]["sweep"]["action"], why["decisions"]["launch"]["action"]) == (
        (shown, shown)
    )
    assert ("would resume from here" in text) == (action == "launch" and state == "interrupted")
    check_status(row, table.output, change, state, name)


def read_status(say: Callable[..., Said]) -> Any:
    return json.loads(say("status", recipe_path("a"), "--json").output)


def check_status(row: Any, table: str, change: Change, state: str, name: str) -> None:
    """Unknown facts are reported where they matter, and nothing is where nothing changed."""
    is_compared = state != "pending" or change.field == "missing"
    words = {
        "touched": "inputs not verified (touched since): ",
        "unread": "inputs not verified (not read here yet): ",
        "missing": "inputs missing: ",
    }
    for field, said in words.items():
        is_named = change.field == field and is_compared
        assert (change.path in row[f"inputs_{field}"]) == is_named
        assert (said in table) == is_named
    if change.field:
        assert row["state"] == state
        assert not is_compared or change.path in table
    elif state == "pending":
        assert row["state"] == "pending"
    else:
        assert row["state"] == ("changed" if change.is_other else state)


@pytest.mark.parametrize("name", ["bit of the data", "bit of the weights", "only touched"])
def test_what_a_sweep_has_read_is_known(
    name: str, build: Callable[[str], FakeLauncher], capsys: pytest.CaptureFixture[str]
) -> None:
    build("completed")
    CHANGES[name].do()
    main(["sweep", "recipes/toy"])
    capsys.readouterr()
    main(["status", "recipes/toy"])
    captured = capsys.readouterr()
    assert "not verified" not in captured.out and captured.err == ""
    assert captured.out.count("changed") >= (2 if CHANGES[name].is_other else 0)


def test_a_model_that_is_gone_is_no_longer_taken_for_one_of_the_hub(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    """`models/toy` could be a name on the hub; the run was made of a folder."""
    fake.add("a", told="complete")
    interrupt(load_recipe(recipe_path("a")), fake.paths("a"))
    hash_contents(load_recipe(recipe_path("a")), ContentHashes(CACHE))
    shutil.rmtree("models")
    for verb in (["status"], ["why"], ["sweep", "--dry-run"], ["sweep"]):
        main([*verb, str(recipe_path("a"))])
        captured = capsys.readouterr()
        assert "changed" in captured.out, verb
        assert "content of models/toy: no longer there" in captured.out, verb
    assert main(["launch", str(recipe_path("a")), "--dry-run"]) == 2
    said = capsys.readouterr().err
    assert main(["launch", str(recipe_path("a"))]) == 2
    assert capsys.readouterr().err == said and "no longer there" in said
    assert fake.started() == []


def test_status_of_nothing_named_counts_what_was_never_started(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    def say(*arguments: str) -> str:
        capsys.readouterr()
        assert main(["status", *arguments]) == 0
        return capsys.readouterr().out

    fake.add("a", "b", "c", told="complete")
    assert say() == (
        "3 recipes were never started: `runner status recipes/toy` lists them,"
        " `runner sweep recipes/toy` starts them\n"
    )
    main(["launch", str(recipe_path("a"))])
    Path("recipes/other").mkdir()
    text = recipe_path("b").read_text().replace("grid: toy", "grid: other")
    Path("recipes/other/b.yaml").write_text(text)
    first, last = say().splitlines()
    assert first.startswith("toy/a  completed")
    assert last == (
        "3 recipes were never started, in 2 grids: `runner status recipes/GRID` lists them;"
        " GRID is one of other, toy"
    )
    Path("recipes/other/b.yaml").unlink()
    recipe_path("b").unlink()
    assert say().splitlines()[1].startswith("1 recipe was never started: `runner status rec")
    assert [run["name"] for run in json.loads(say("--json"))] == ["a", "c"]
    for named in (["recipes"], ["recipes/toy"], ["--where", "size=1"]):
        assert "toy/c  pending" in say(*named), named


def test_status_says_how_missing_files_come_to_be_there(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    DATA.unlink()
    assert main(["status", "recipes/toy"]) == 0
    captured = capsys.readouterr()
    assert captured.out.count("never started; inputs missing: data.jsonl\n") == 2
    assert captured.err.count("hint: inputs missing: paths are relative to the project") == 1


def test_a_checkpoint_of_a_run_that_is_not_launched_promises_nothing(
    build: Callable[[str], FakeLauncher], capsys: pytest.CaptureFixture[str]
) -> None:
    fake = build("completed")
    capsys.readouterr()

    def find_checkpoints() -> list[str]:
        main(["why", str(recipe_path("a")), "--json"])
        return [one["what"] for one in json.loads(capsys.readouterr().out)["checkpoints"]]

    assert find_checkpoints() == ["intact; nothing would be started: the run is completed"]
    flip_bit(DATA)
    assert find_checkpoints() == ["intact; a launch would be refused: the run is changed"]
    flip_bit(fake.paths("a").checkpoint_dir(4) / "optimizer.pt")
    assert find_checkpoints() == ["damaged: optimizer.pt does not match its committed checksum"]
    DATA.unlink()
    main(["why", str(recipe_path("a"))])
    said = capsys.readouterr().out
    assert "refuse: recipe a names files that do not exist" in said
