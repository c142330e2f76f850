"""The files written before an attempt starts: another experiment is refused, `--fresh` moves a run
aside, `--prepare` writes its command, and declarations from before the first attempt stay.
"""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.errors import RefusedError
from runner.files import load_json, write_json_atomic
from runner.launch.run_files import move_aside, prepare_run, take_lease
from runner.plan.status import read_status
from runner.recipe.parse import load_recipe
from runner.run.facts import read_facts
from runner.run.record import Failure
from tests.launch.test_attempt import load_toy
from tests.support.fake_launcher import (
    FakeLauncher,
    fake,
    finish,
)

__all__ = ["fake"]


def test_a_changed_recipe_is_refused_with_a_diff(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    recipe_path = fake.root / "recipes" / "toy" / "a.yaml"
    recipe_path.write_text(recipe_path.read_text().replace("max_steps: 2", "max_steps: 3"))
    before = fake.tree()
    assert main(["launch", "recipes/toy/a.yaml"]) == 2
    stderr = capsys.readouterr().err
    assert "holds another experiment" in stderr and "training.max_steps: 2 -> 3" in stderr
    assert "hint: runner launch recipes/toy/a.yaml --fresh" in stderr
    assert main(["sweep", "recipes/toy"]) == 1
    stdout = capsys.readouterr().out
    assert "refuse  toy/a" in stdout and "training.max_steps: 2 -> 3" in stdout
    assert fake.tree() == before and len(fake.started()) == 1


def test_changed_data_is_refused_and_lost_data_too(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="exit 1")
    assert main(["launch", "recipes/toy/a.yaml"]) == 14
    capsys.readouterr()
    (fake.root / "data.jsonl").write_text('{"other": 1}\n')
    assert main(["launch", "recipes/toy/a.yaml"]) == 2
    assert "content of data.jsonl: " in capsys.readouterr().err
    (fake.root / "data.jsonl").write_text("{}\n")
    # Now it could be an id on the hub.
    (fake.root / "models" / "toy").rename(fake.root / "models" / "moved")
    assert main(["launch", "recipes/toy/a.yaml"]) == 2
    assert "content of models/toy: no longer there" in capsys.readouterr().err
    assert len(fake.started()) == 1


def test_fresh_moves_the_old_run_aside_and_loses_nothing(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    for number in (1, 2):
        assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == 0
        result = fake.paths("a").result_path.read_bytes()
        assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == 0
        old = fake.root / "runs" / "toy" / ".old"
        assert (old / f"a-{2 * number - 1}" / "result.json").read_bytes() == result
    assert len(fake.started()) == 4 and len(fake.attempts("a")) == 1
    capsys.readouterr()
    assert main(["status", "runs"]) == 0
    assert len(capsys.readouterr().out.splitlines()) == 1, (
        "runs that were moved aside are not listed"
    )


def test_fresh_refuses_a_running_run(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="wait")
    launch = fake.start("launch", "recipes/toy/a.yaml")
    fake.next_started()
    assert main(["launch", "recipes/toy/a.yaml", "--fresh"]) == 2
    assert "is running" in capsys.readouterr().err
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    assert "running: starting" in capsys.readouterr().out
    fake.let_go("a")
    assert finish(launch)[0] == 0


def test_a_lease_of_a_directory_that_was_moved_aside_is_worth_nothing(fake: FakeLauncher) -> None:
    """Between opening and locking the lease, `--fresh` in another process may move the
    directory.
    """
    from runner.run.lease import Lease

    fake.add("a")
    paths = fake.paths("a")
    late = Lease(paths.lease_path)
    first = take_lease(paths)
    assert first is not None
    assert move_aside(paths) is None, "nothing was begun"
    paths.record_path.write_text("{}")
    assert move_aside(paths) == fake.root / "runs" / "toy" / ".old" / "a-1"
    first.close()
    assert not late.try_acquire()
    late.close()
    again = take_lease(paths)
    assert again is not None
    again.close()


def test_prepare_writes_the_run_and_its_command_works_when_pasted(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main(["launch", "recipes/toy/a.yaml", "--prepare"]) == 0
    [command] = capsys.readouterr().out.splitlines()
    recipe, contents, paths = load_toy(fake)
    status = read_status(read_facts(paths), recipe, contents)
    assert (status.state, status.why) == ("pending", "prepared, waiting for a manual start")
    assert fake.events() == []
    subprocess.run(
        ["bash", "-c", command], env=fake.environment, stdin=subprocess.DEVNULL, check=True
    )
    assert fake.started() == ["a"]
    assert read_status(read_facts(paths), recipe, contents).state == "completed"


def test_whose_base_scores_an_attempt_may_take_is_recorded_as_it_was_asked(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", "c")
    assert main(["launch", "recipes/toy/a.yaml", "--prepare", "--own-base"]) == 0
    assert "own-base" not in capsys.readouterr().out, (
        "the training process reads it from the record"
    )
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    fake.tell("b", "fail crashed once")
    main(["sweep", "recipes/toy", "--own-base"])
    fake.tell("b", "")
    main(["rerun", "recipes/toy"])
    asked = {name: [one["base"] for one in fake.attempts(name)] for name in "abc"}
    assert asked["a"] == ["own", "shared"] and asked["c"] == ["own"]
    assert asked["b"] == ["own", "shared"]


def test_what_was_prepared_can_be_swept_and_its_failure_by_hand_counts(fake: FakeLauncher) -> None:
    fake.add("a", "b")
    for name in "ab":
        assert main(["launch", f"recipes/toy/{name}.yaml", "--prepare"]) == 0
    failure = Failure(kind="data", message="because")
    write_json_atomic(fake.paths("b").attempt(1).failure_path(), failure.model_dump())
    assert read_status(read_facts(fake.paths("b")), *load_toy(fake, "b")[:2]).state == "failed"
    assert main(["sweep", "recipes/toy"]) == 1
    assert fake.started() == ["a"] and len(fake.attempts("a")) == 2


def test_overrides_make_a_run_of_their_own(fake: FakeLauncher) -> None:
    fake.add("a")
    assert main(["launch", "recipes/toy/a.yaml", "training.max_steps=7"]) == 0
    assert main(["launch", "recipes/toy/a.yaml", "training.max_steps=7", "--name", "seven"]) == 0
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    names = ["a--training.max_steps-7", "seven", "a"]
    assert fake.started() == names
    runs = [load_json(fake.paths(name).recipe_path)["recipe"] for name in names]
    assert [run["training"]["max_steps"] for run in runs] == [7, 7, 2]
    assert [run["run"]["overrides"] for run in runs] == [["training.max_steps=7"]] * 2 + [[]]


def test_what_was_declared_before_the_first_attempt_stays_recorded(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="exit 1")
    path = fake.root / "recipes" / "toy" / "a.yaml"
    text = path.read_text()

    def declare(metric: str) -> None:
        one = f"declared: [{{axis: size, from: 1, to: 2, metric: {metric}}}]"
        path.write_text(text.replace("name: a,", f"name: a, {one},"))

    def find_recorded() -> list[str]:
        stored = load_json(fake.paths("a").recipe_path)["recipe"]["run"]["declared"]
        return [f"{one['from']} to {one['to']} by {one['metric']}" for one in stored]

    declare("bits_per_byte")
    assert text != path.read_text()
    recipe, contents, paths = load_toy(fake)
    prepare_run(recipe, contents, read_facts(paths))
    declare("nll_per_token")  # nothing has run yet
    assert main(["launch", str(path)]) == 14
    assert find_recorded() == ["1 to 2 by nll_per_token"]

    declare("nll_per_completion_token")
    assert main(["why", str(path)]) == 0
    assert "changed" not in capsys.readouterr().out
    fake.tell("a", "complete")
    assert main(["launch", str(path)]) == 0
    assert find_recorded() == ["1 to 2 by nll_per_token"], "the first attempt's"
    path.write_text(text)
    assert read_status(read_facts(paths), load_recipe(path), contents).state == "completed"


def test_preparing_twice_changes_nothing_but_the_attempts(fake: FakeLauncher) -> None:
    fake.add("a")
    recipe, contents, paths = load_toy(fake)
    prepare_run(recipe, contents, read_facts(paths))
    before = paths.recipe_path.read_bytes()
    prepare_run(recipe, contents, read_facts(paths))
    assert paths.recipe_path.read_bytes() == before
    with pytest.raises(RefusedError, match=r"content of data\.jsonl"):
        prepare_run(recipe, {**contents, "data.jsonl": "0" * 64}, read_facts(paths))


def test_placement_may_change_between_attempts(fake: FakeLauncher, tmp_path: Path) -> None:
    fake.add("a", told="exit 1")
    assert main(["launch", "recipes/toy/a.yaml"]) == 14
    assert main(["launch", "recipes/toy/a.yaml", "--num-processes", "2"]) == 14
    assert main(["launch", "recipes/toy/a.yaml", "--num-processes", "3"]) == 2, (
        "4 sequences cannot be cut in 3"
    )
    assert [attempt["num_processes"] for attempt in fake.attempts("a")] == [1, 2]
