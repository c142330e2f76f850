"""The commits of names on the hub: found before the first attempt, kept from then on, compared
within a grid. The hub is on the loopback interface and its branch moves; training is faked.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.recipe.identity import build_resume_fingerprint
from runner.run.record import load_stored_recipe
from tests.support.fake_checkpoints import commit_under
from tests.support.fake_launcher import BIN_DIR, FakeLauncher, fake
from tests.support.moving_hub import MovingHub, moving_hub

__all__ = ["fake"]

A, B, C = "a" * 40, "b" * 40, "c" * 40
# Exit codes of `launch`: the fake went without a result; it was never started.
LOST, REFUSED = 14, 10


@pytest.fixture
def hub() -> Iterator[MovingHub]:
    """With a model and a data set at commit A."""
    with moving_hub() as hub:
        move(hub, A)
        yield hub


def move(hub: MovingHub, commit: str) -> None:
    hub.commit("models", "org/tiny", commit, {"config.json": b"{}", "model.safetensors": b"w"})
    hub.commit("datasets", "org/rows", commit, {"train.jsonl": b"{}\n"})


def cache_all(fake: FakeLauncher, commit: str) -> None:
    """Write a model and a data set into the cache as the libraries do after loading them."""
    model_dir = fake.root / "cache/hub/models--org--tiny/snapshots" / commit
    rows_dir = fake.root / "cache/datasets/org___rows/default/0.0.0" / commit
    for path in (model_dir / "config.json", model_dir / "model.safetensors"):
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("{}")
    rows_dir.mkdir(parents=True)
    (rows_dir / "dataset_info.json").write_text("{}")


def run(
    fake: FakeLauncher, hub: MovingHub, *arguments: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    """Run `runner ARGUMENTS`, with the hub in reach unless `offline` is set."""
    environment = {**fake.environment, **hub.environment(fake.root / "cache")}
    if offline:
        environment["HF_HUB_OFFLINE"] = "1"
    return subprocess.run(
        [str(BIN_DIR / "runner"), *arguments],
        cwd=fake.root,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )


def launch(
    fake: FakeLauncher, hub: MovingHub, name: str, *options: str, offline: bool = False
) -> subprocess.CompletedProcess[str]:
    return run(fake, hub, "launch", f"recipes/toy/{name}.yaml", *options, offline=offline)


def add(
    fake: FakeLauncher,
    *names: str,
    model: str = "null",
    rows: str = "null",
    told: str | None = None,
) -> None:
    """Recipes that load from the hub, at the revisions that are given for model and rows."""
    fake.add(*names, told=told)
    for name in names:
        path = fake.root / "recipes" / "toy" / f"{name}.yaml"
        text = path.read_text().replace("models/toy,", f"org/tiny, revision: {model},")
        path.write_text(text.replace("path: data.jsonl", f"path: org/rows, revision: {rows}"))


def save(fake: FakeLauncher, name: str, **more: object) -> Path:
    """Write the checkpoint of a run as a training process does; `more` is of its fingerprint."""
    stored, paths = load_stored_recipe(fake.paths(name)), fake.paths(name)
    assert stored is not None
    fingerprint = build_resume_fingerprint(stored.recipe, stored.recipe_digest, 1, threads="1")
    paths.checkpoints_dir.mkdir(exist_ok=True)
    commit_under(paths, 4, {**fingerprint, **more})
    return paths.checkpoint_dir(4)


def read_commits(fake: FakeLauncher, name: str) -> dict[str, str]:
    commits: dict[str, str] = json.loads(fake.paths(name).recipe_path.read_text())["commits"]
    return commits


def test_the_first_attempt_asks_once_and_records(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a")
    assert launch(fake, hub, "a").returncode == 0
    assert read_commits(fake, "a") == {"model.path": A, "data.train.path": A}
    assert sorted(hub.take_requests()) == ["GET /api/datasets/org/rows", "GET /api/models/org/tiny"]


def test_a_sweep_asks_once_for_all_its_runs(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a", "b", "c")
    assert run(fake, hub, "sweep", "recipes/toy").returncode == 0
    assert len(hub.take_requests()) == 2
    assert {read_commits(fake, name)["model.path"] for name in "abc"} == {A}


@pytest.mark.parametrize("told", ["exit 1", "write samples.json {}"])
def test_a_later_attempt_has_the_same_commit_and_asks_nobody(
    fake: FakeLauncher, hub: MovingHub, told: str
) -> None:
    """Wherever the first one ended: before it had read any rows, or after."""
    add(fake, "a", told=f"{told}\nthen complete")
    assert launch(fake, hub, "a").returncode == LOST
    cache_all(fake, A)
    move(hub, B)
    hub.take_requests()
    assert launch(fake, hub, "a").returncode == 0
    assert hub.take_requests() == []
    assert read_commits(fake, "a") == {"model.path": A, "data.train.path": A}


def test_the_digest_does_not_say_the_commit(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a", "b")
    launch(fake, hub, "a")
    move(hub, B)
    launch(fake, hub, "b")
    stored = [json.loads(fake.paths(name).recipe_path.read_text()) for name in "ab"]
    assert stored[0]["recipe_digest"] == stored[1]["recipe_digest"]
    assert stored[0]["commits"] != stored[1]["commits"]
    assert stored[0]["recipe"]["model"]["revision"] is None


def test_a_commit_that_is_gone_is_refused_before_anything_starts(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    add(fake, "a", told="exit 1")
    launch(fake, hub, "a")
    move(hub, B)
    del hub.repositories["models", "org/tiny"].commits[A]
    result = launch(fake, hub, "a")
    assert result.returncode == REFUSED and fake.started() == ["a"]
    assert f"`model.path`: this run loaded org/tiny at the commit {A}" in result.stderr
    assert "neither in the cache of this machine nor on the hub any more" in result.stderr
    assert "runner launch RECIPE --fresh" in result.stderr
    cache_all(fake, A)
    assert launch(fake, hub, "a").returncode == LOST and fake.started() == ["a", "a"]


def test_a_data_set_that_is_gone_is_refused(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a", told="exit 1")
    launch(fake, hub, "a")
    del hub.repositories["datasets", "org/rows"]
    result = launch(fake, hub, "a")
    assert result.returncode == REFUSED and fake.started() == ["a"]
    assert f"`data.train.path`: this run loaded org/rows at the commit {A}" in result.stderr
    assert "or it was deleted" in result.stderr


@pytest.mark.parametrize("status", [401, 403])
def test_what_may_not_be_read_here_is_not_called_gone(
    fake: FakeLauncher, hub: MovingHub, status: int
) -> None:
    add(fake, "a", told="exit 1")
    launch(fake, hub, "a")
    hub.refuses_with = status
    result = launch(fake, hub, "a")
    assert result.returncode == REFUSED and fake.started() == ["a"]
    assert "it needs a token that may read it" in result.stderr
    assert "HF_TOKEN" in result.stderr and "on the hub any more" not in result.stderr


def test_a_stated_branch_that_moved_is_refused_with_the_line_to_paste(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    add(fake, "a", "b", model="main")
    add(fake, "c", model=A)
    launch(fake, hub, "a")
    move(hub, B)
    result = launch(fake, hub, "b")
    assert result.returncode == REFUSED and fake.started() == ["a"]
    assert not fake.paths("b").recipe_path.exists()
    assert f"`model.path`: the model org/tiny, revision `main` is the commit {B} now" in (
        result.stderr
    )
    assert f"{A[:12]} in 1 run (a)" in result.stderr
    assert f"\n  revision: {A}\n" in result.stderr
    assert launch(fake, hub, "c").returncode == 0
    assert read_commits(fake, "c") == {"model.path": A, "data.train.path": B}


def test_a_stated_branch_of_a_data_set_that_moved_is_refused(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    add(fake, "a", "b", rows="main")
    launch(fake, hub, "a")
    move(hub, B)
    result = launch(fake, hub, "b")
    assert result.returncode == REFUSED and fake.started() == ["a"]
    assert "`data.train.path`: the data set org/rows, revision `main` is" in result.stderr


def test_other_branches_names_and_grids_are_no_siblings(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a", "c", model="main")
    add(fake, "b", model="dev")
    launch(fake, hub, "a")
    move(hub, B)
    hub.repositories["models", "org/tiny"].branches["dev"] = C
    hub.repositories["models", "org/tiny"].commits[C] = {"config.json": b"{}"}
    assert launch(fake, hub, "b").returncode == 0
    assert read_commits(fake, "b")["model.path"] == C
    path = fake.root / "recipes" / "toy" / "c.yaml"
    path.write_text(path.read_text().replace("grid: toy", "grid: other"))
    assert launch(fake, hub, "c").returncode == 0
    assert run(fake, hub, "status", "runs").stderr.count("is not the same commit") == 1  # the rows


def test_who_states_nothing_is_warned(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a")
    run(fake, hub, "sweep", "recipes/toy")
    move(hub, B)
    add(fake, "a", "b")
    assert run(fake, hub, "sweep", "recipes/toy").returncode == 0
    assert [read_commits(fake, name)["model.path"] for name in "ab"] == [A, B]
    hub.take_requests()
    for verb in ("status", "report"):
        result = run(fake, hub, verb, "recipes/toy")
        assert result.returncode == 0
        for name in ("the model org/tiny", "the data set org/rows"):
            assert f"warning: {name} is not the same commit in all runs of toy:" in result.stderr
        assert f"{A[:12]} in 1 run (a); {B[:12]} in 1 run (b)" in result.stderr
        assert f"\n  revision: {A}\n" in result.stderr
    assert hub.take_requests() == [], "neither makes a request"


def test_the_line_makes_no_other_experiment_of_the_runs_that_loaded_it(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    add(fake, "a")
    fake.tell("a", "exit 1\nthen exit 1\nthen complete")
    run(fake, hub, "sweep", "recipes/toy")
    before = json.loads(fake.paths("a").recipe_path.read_text())
    move(hub, B)
    add(fake, "a", "b", model=A)
    fake.tell("a", "exit 1\nthen exit 1\nthen complete")
    assert run(fake, hub, "sweep", "recipes/toy").returncode == 1
    assert json.loads(fake.paths("a").recipe_path.read_text()) == before
    assert run(fake, hub, "sweep", "recipes/toy").returncode == 0
    states = json.loads(run(fake, hub, "status", "recipes/toy", "--json").stdout)
    assert [one["state"] for one in states] == ["completed", "completed"]
    assert [read_commits(fake, name)["model.path"] for name in "ab"] == [A, A]
    add(fake, "a", model=B)
    states = json.loads(run(fake, hub, "status", "recipes/toy/a.yaml", "--json").stdout)
    assert states[0]["differences"] == [f'model.revision: null -> "{B}"']


def test_without_the_hub_the_cache_says_what_a_name_stands_for(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    add(fake, "a", "b")
    launch(fake, hub, "a")
    move(hub, B)
    hub.take_requests()
    assert launch(fake, hub, "b", offline=True).returncode == 0
    assert hub.take_requests() == []
    assert read_commits(fake, "b") == {"model.path": A, "data.train.path": A}


def test_what_nobody_knows_is_not_recorded(fake: FakeLauncher, hub: MovingHub) -> None:
    """The training process reports the error; a commit that it could load is never guessed."""
    add(fake, "a", told="write samples.json {}")
    assert launch(fake, hub, "a", offline=True).returncode == LOST
    assert read_commits(fake, "a") == {}
    save(fake, "a")
    hub.take_requests()
    result = launch(fake, hub, "a")
    assert read_commits(fake, "a") == {} and hub.take_requests() == []
    assert "warning: `model.path`: the commit at which" in result.stderr
    assert "warning: `data.train.path`: the commit at which" in result.stderr


def test_a_checkpoint_that_was_made_without_the_hub_is_not_continued_with_it(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    """An older version recorded no commit, so its checkpoints only get a warning."""
    add(fake, "a", told="exit 1")
    assert launch(fake, hub, "a", offline=True).returncode == LOST
    save(fake, "a", commits={})
    result = launch(fake, hub, "a")
    assert result.returncode == REFUSED and fake.started() == ["a"]
    assert "`data.train.path`: the commit at which" in result.stderr
    assert "HF_HUB_OFFLINE=1" in result.stderr and "--fresh" in result.stderr
    result = launch(fake, hub, "a", offline=True)
    assert result.returncode == LOST and "warning: `model.path`: the commit at" in result.stderr


def test_a_checkpoint_brings_its_commits_along(fake: FakeLauncher, hub: MovingHub) -> None:
    """If `recipe.json` was lost, and into a run that has loaded something else but saved
    nothing.
    """
    add(fake, "a", "b", told="exit 1")
    launch(fake, hub, "a")
    cache_all(fake, A)
    folder = save(fake, "a", commits={"model.path": A, "data.train.path": A})
    move(hub, B)
    launch(fake, hub, "b")
    assert read_commits(fake, "b")["model.path"] == B
    hub.take_requests()
    assert launch(fake, hub, "b", "--resume", str(folder)).returncode == LOST
    assert read_commits(fake, "b") == {"model.path": A, "data.train.path": A}
    fake.paths("a").recipe_path.unlink()
    assert launch(fake, hub, "a").returncode == LOST
    assert read_commits(fake, "a") == {"model.path": A, "data.train.path": A}
    assert hub.take_requests() == []


def test_a_run_without_checkpoints_starts_anew_at_what_is_found_then(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    add(fake, "a", told="write samples.json {}")
    assert launch(fake, hub, "a", offline=True).returncode == LOST
    assert launch(fake, hub, "a").returncode == LOST
    assert read_commits(fake, "a") == {"model.path": A, "data.train.path": A}


@pytest.mark.parametrize("status", [429, 503])
def test_nothing_is_started_while_the_hub_does_not_answer(
    fake: FakeLauncher, hub: MovingHub, status: int
) -> None:
    """It would give the files, of a commit that nobody knows."""
    add(fake, "a", "b")
    hub.refuses_with = status
    result = launch(fake, hub, "a")
    assert result.returncode == LOST and fake.started() == []
    assert "transient: " in result.stderr, result.stderr
    assert "the hub does not say which commit the data set org/rows is" in result.stderr
    assert str(status) in result.stderr and "HF_HUB_OFFLINE=1" in result.stderr
    assert not fake.paths("a").recipe_path.exists()
    hub.take_requests()
    assert run(fake, hub, "sweep", "recipes/toy").returncode == 1 and fake.started() == []
    assert len(hub.take_requests()) == 1, "one of both runs has asked"
    hub.refuses_with = None
    assert run(fake, hub, "sweep", "recipes/toy").returncode == 0
    assert read_commits(fake, "a") == {"model.path": A, "data.train.path": A}


def test_where_the_hub_says_no_the_cache_says_what_is_loaded(
    fake: FakeLauncher, hub: MovingHub
) -> None:
    """An example is a private name without a token: the libraries load the cached commit."""
    add(fake, "a", "b")
    launch(fake, hub, "a")
    hub.refuses_with = 401
    assert launch(fake, hub, "b").returncode == 0
    assert read_commits(fake, "b") == {"model.path": A, "data.train.path": A}


def test_a_local_path_is_no_name(fake: FakeLauncher, hub: MovingHub) -> None:
    fake.add("a")
    assert run(fake, hub, "launch", "recipes/toy/a.yaml").returncode == 0
    assert read_commits(fake, "a") == {} and hub.take_requests() == []


def test_a_prepared_run_has_its_commits(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a")
    assert launch(fake, hub, "a", "--prepare").returncode == 0
    assert read_commits(fake, "a") == {"model.path": A, "data.train.path": A}


def test_several_sources_are_recorded_each(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a")
    path = fake.root / "recipes" / "toy" / "a.yaml"
    first = "{path: org/rows, num_samples: 1}, "
    second = f"{{path: org/rows, revision: {A}, num_samples: 1}}"
    text = path.read_text().replace("{path: org/rows, revision: null}", f"[{first}{second}]")
    path.write_text(text)
    move(hub, B)
    result = launch(fake, hub, "a")
    assert result.returncode == 0, result.stderr
    assert read_commits(fake, "a") == {
        "model.path": B,
        "data.train.0.path": B,
        "data.train.1.path": A,
    }


def test_why_says_what_was_loaded_and_asks_nobody(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a")
    run(fake, hub, "sweep", "recipes/toy")
    hub.take_requests()
    shown = run(fake, hub, "why", "recipes/toy/a.yaml").stdout
    assert f"model.path: org/tiny at {A}" in shown
    assert f"data.train.path: org/rows at {A}" in shown
    assert hub.take_requests() == []


def test_records_that_are_no_commits_are_refused(fake: FakeLauncher, hub: MovingHub) -> None:
    add(fake, "a")
    run(fake, hub, "sweep", "recipes/toy")
    path: Path = fake.paths("a").recipe_path
    path.write_text(path.read_text().replace(A, "../../elsewhere"))
    result = run(fake, hub, "status", "recipes/toy")
    assert result.returncode == 1 and "recipe.json cannot be read: commits." in result.stdout
