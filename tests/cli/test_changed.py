"""Changed runs in a sweep: reported once, and moved into one dated folder by `--fresh`."""

from __future__ import annotations

import json
import os
import pty
import shutil
import subprocess
from pathlib import Path

import pytest

from runner.cli.changed import ChangedRun, choose_folders, move_changed
from runner.cli.main import main
from runner.plan.select import select_recipes
from runner.plan.status import read_status
from runner.run.lease import Lease
from runner.run.paths import content_cache_path
from runner.run.record import now_utc
from tests.support.fake_launcher import BIN_DIR, FakeLauncher, fake, finish
from tests.support.fake_nvidia_smi import TWO, add_nvidia_smi
from tests.support.settled import settle

__all__ = ["fake"]

FRESH = ["sweep", "recipes/toy", "--fresh"]


def edit(fake: FakeLauncher, *names: str, old: str, new: str) -> None:
    for name in names:
        path = fake.root / "recipes" / "toy" / f"{name}.yaml"
        text = path.read_text()
        assert old in text
        path.write_text(text.replace(old, new))


def dated(fake: FakeLauncher, suffix: str = "") -> Path:
    return fake.root / "runs" / f".changed-{now_utc()[:10]}{suffix}"


def test_data_that_changed_are_told_by_what_only_looks_and_read_by_a_dry_run(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy"]) == 0
    for verb in (["status"], ["report"], ["sweep", "--dry-run"]):
        main([*verb, "recipes/toy"])
    assert "changed" not in "".join(capsys.readouterr())
    with (fake.root / "data.jsonl").open("a") as stream:
        stream.write("\n")
    before = fake.tree()
    for verb in ("status", "report"):
        main([verb, "recipes/toy"])
        error = capsys.readouterr().err
        assert "warning: data.jsonl was touched since its content was last read" in error, verb
        assert "which `runner sweep --dry-run recipes/toy` shows; this warning" in error, verb
    assert main(["sweep", "recipes/toy", "--dry-run"]) == 1
    assert "refuse  toy/a  " in capsys.readouterr().out
    assert fake.tree() == before
    assert main(["sweep", "recipes/toy"]) == 1
    main(["status", "recipes/toy"])
    captured = capsys.readouterr()
    assert "warning: data.jsonl" not in captured.err and "changed" in captured.out


@pytest.fixture
def changed(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> FakeLauncher:
    """Five completed runs, of which all but `e` were made for another `max_steps`, and `d` for
    another loss too.
    """
    fake.add("a", "b", "c", "d", "e")
    assert main(["sweep", "recipes/toy"]) == 0
    settle(content_cache_path(fake.root / "runs"))  # so that they are not read and kept again
    edit(fake, "a", "b", "c", "d", old="max_steps: 2", new="max_steps: 3")
    edit(fake, "d", old="loss: full", new="loss: completion")
    capsys.readouterr()
    return fake


def test_many_changed_runs_are_told_once(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = changed.tree()
    assert main(["sweep", "recipes/toy"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "skip    toy/e  completed: stopped by max_steps",
        "refuse  4 runs are changed: their directories hold other experiments",
        "            4 runs  training.max_steps: 2 -> 3",
        '            1 run   loss: "full" -> "completion"',
        "          toy/a, toy/b, toy/c and 1 more; `runner status recipes/toy` names all",
        "          the numbers: runner report runs/toy",
        "          runner sweep recipes/toy --fresh"
        "  # moves the changed runs into one dated folder and starts them from step 0",
    ]
    assert changed.tree() == before
    assert main(["report", "runs/toy", "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["state"] for row in rows] == ["completed"] * 5
    assert all(row["tuned_nll_per_completion_token"] == 1.0 for row in rows)
    edit(changed, "b", old="max_steps: 3", new="max_steps: 4")
    assert main(["sweep", "recipes/toy", "--where", "size=1", "--output-root", "./runs"]) == 1
    said = capsys.readouterr().out
    assert "  4 runs  training.max_steps: different values\n" in said
    assert "runner sweep recipes/toy --where size=1 --fresh" in said


def test_one_changed_run_is_told_with_all_that_differs(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["rerun", "recipes/toy/d.yaml"]) == 1
    assert capsys.readouterr().out.splitlines() == [
        "refuse  toy/d  changed: the recipe changed since the run was made:"
        ' loss: "full" -> "completion"',
        '          loss: "full" -> "completion"',
        "          training.max_steps: 2 -> 3",
        "          the numbers: runner report runs/toy",
        "          runner sweep recipes/toy/d.yaml --fresh"
        "  # moves the changed runs into one dated folder and starts them from step 0",
    ]


def test_fresh_moves_what_is_changed_and_starts_it_anew(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    kept = {path: state for path, state in changed.tree().items() if path.startswith("runs/toy/")}
    assert main([*FRESH, "--yes"]) == 0
    said = capsys.readouterr().out.splitlines()
    folder = dated(changed).relative_to(changed.root)
    assert said[1] == f"fresh   4 runs will be moved into {folder}"
    assert said[-5:] == [
        f"moved   4 runs; the numbers: runner report {folder}",
        *(f"launch  toy/{name}  pending: never started" for name in "abcd"),
    ]
    now = changed.tree()
    for path, state in kept.items():
        name = path.split("/")[2]
        moved = f"{folder}/{path.removeprefix('runs/')}" if name != "e" else path
        assert now[moved] == state, path
    assert changed.started().count("e") == 1 and changed.started().count("a") == 2
    assert main(["sweep", "recipes/toy"]) == 0, "all are completed"
    capsys.readouterr()
    assert main(["report", str(folder), "--format", "json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [(row["run"], row["state"]) for row in rows] == [(name, "completed") for name in "abcd"]
    assert main(["status", str(folder)]) == 0
    assert capsys.readouterr().out.count("completed") == 4
    for named in (["runs/toy"], ["runs"], []):
        assert main(["status", *named, "--json"]) == 0
        found = json.loads(capsys.readouterr().out)
        assert [one["name"] for one in found] == list("abcde"), "each once"


def test_a_second_time_on_one_day_mixes_nothing(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*FRESH, "--yes"]) == 0
    first = changed.tree()
    edit(changed, "a", old="max_steps: 3", new="max_steps: 5")
    assert main([*FRESH, "--yes"]) == 0
    assert [path.name for path in (dated(changed, "-2") / "toy").iterdir()] == ["a"]
    folder = str(dated(changed).relative_to(changed.root))
    assert {path: state for path, state in changed.tree().items() if folder + "/" in path} == {
        path: state for path, state in first.items() if folder + "/" in path
    }


def test_after_a_kill_between_two_moves_the_rest_goes_into_the_same_folder(
    changed: FakeLauncher,
) -> None:
    """Each run is moved by one rename, so that a kill leaves whole directories."""
    (dated(changed) / "toy").mkdir(parents=True)
    changed.paths("a").run_dir.rename(dated(changed) / "toy" / "a")
    assert main([*FRESH, "--yes"]) == 0
    assert sorted(path.name for path in (dated(changed) / "toy").iterdir()) == list("abcd")
    assert main(["sweep", "recipes/toy"]) == 0


def test_without_a_terminal_nothing_is_moved_unless_yes_says_so(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = changed.tree()
    code, _, stderr = finish(changed.start(*FRESH))
    folder = dated(changed).relative_to(changed.root)
    assert code == 2
    assert f"`--fresh` moves 4 changed runs into {folder}, but stdin is not a terminal" in stderr
    assert "hint: add `--yes`" in stderr
    assert changed.tree() == before
    assert main(["sweep", "recipes/toy", "--yes"]) == 2
    assert "`--yes` answers the question of `--fresh`" in capsys.readouterr().err
    told = ["--engine", "kubernetes", "--dry-run", "--image", "i", "--storage", "s"]
    assert main([*FRESH, "--yes", *told]) == 2
    assert "`--engine kubernetes` only prints a file" in capsys.readouterr().err
    assert changed.tree() == before


@pytest.mark.parametrize(("answer", "is_moved"), [("y\n", True), ("n\n", False), ("\n", False)])
def test_on_a_terminal_it_asks(changed: FakeLauncher, answer: str, is_moved: bool) -> None:
    before = changed.tree()
    ours, theirs = pty.openpty()
    os.write(ours, answer.encode())
    process = subprocess.run(
        [BIN_DIR / "runner", *FRESH],
        cwd=changed.root,
        env=changed.environment,
        stdin=theirs,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    os.close(ours)
    os.close(theirs)
    folder = dated(changed).relative_to(changed.root)
    assert f"move 4 changed runs into {folder} and start from step 0? (y/N) " in process.stderr
    assert process.stdout.count("runs  training.max_steps: 2 -> 3") == 1
    assert process.returncode == (0 if is_moved else 2)
    assert dated(changed).exists() == is_moved
    if not is_moved:
        assert "nothing was moved or started" in process.stderr
        assert changed.tree() == before


def test_a_dry_run_shows_what_would_be_done(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    before = changed.tree()
    assert main([*FRESH, "--dry-run"]) == 0
    said = capsys.readouterr().out
    folder = dated(changed).relative_to(changed.root)
    assert f"fresh   4 runs would be moved into {folder}\n" in said
    assert said.count("accelerate launch") == said.count("launch  toy/") == 4
    assert changed.tree() == before


def test_nothing_is_moved_where_the_sweep_is_refused(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(changed, "d", old="num_processes: 1", new="num_processes: 2")
    add_nvidia_smi(changed.home, TWO)
    before = changed.tree()
    assert main([*FRESH, "--yes", "--gpus", "0"]) == 2
    assert "toy/d needs 2 GPUs" in capsys.readouterr().err
    assert changed.tree() == before


def test_one_run_that_cannot_be_moved_leaves_the_others_to_be_started(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = dated(changed)
    (folder / "toy").mkdir(parents=True)
    changed.paths("b").lease_path.unlink()
    changed.paths("b").lease_path.mkdir()
    assert main([*FRESH, "--yes"]) == 1
    captured = capsys.readouterr()
    assert "refuse  toy/b  " in captured.out and "lease is a folder" in captured.out
    assert changed.started().count("a") == changed.started().count("c") == 2


@pytest.mark.parametrize("answered", [["--dry-run"], []])
def test_a_preview_ends_as_the_sweep_does(fake: FakeLauncher, answered: list[str]) -> None:
    fake.add("a", told="fail data row 7")
    assert main(["sweep", "recipes/toy"]) == 1
    assert main(["sweep", "recipes/toy", *answered]) == 1
    assert fake.started() == ["a"]


def judge(fake: FakeLauncher, name: str) -> ChangedRun:
    [selected] = select_recipes([f"recipes/toy/{name}.yaml"], Path("runs"))
    status = read_status(selected.read_facts(), selected.recipe, {})
    assert status.state == "changed"
    return ChangedRun(selected, {}, status)


def test_a_run_that_runs_or_was_begun_anew_since_it_was_looked_at_is_left_alone(
    changed: FakeLauncher,
) -> None:
    a, b, c = (judge(changed, name) for name in "abc")
    folder = choose_folders([a, b, c])[Path("runs")]
    lease = Lease(a.paths.lease_path)
    assert lease.try_acquire()
    shutil.rmtree(b.paths.run_dir)
    assert main(["launch", "recipes/toy/b.yaml"]) == 0
    before = changed.tree()
    skipped = [move_changed(one, folder) for one in (a, b)]
    assert [one and (one.action, one.why) for one in skipped] == [
        ("skip", "running, so it is not moved"),
        ("skip", "no longer changed: another sweep was faster"),
    ]
    assert changed.tree() == before
    assert move_changed(c, folder) is None and (folder / "toy" / "c" / "result.json").exists()
    lease.close()


def test_a_run_that_is_running_is_skipped_by_fresh(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    lease = Lease(changed.paths("a").lease_path)
    assert lease.try_acquire()
    assert main([*FRESH, "--yes"]) == 0
    assert "skip    toy/a  running" in capsys.readouterr().out
    assert sorted(path.name for path in (dated(changed) / "toy").iterdir()) == list("bcd")
    lease.close()


def test_the_numbers_of_runs_whose_data_changed_are_still_reported(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    """The report of a run directory shows the recorded numbers."""
    fake.add("a", "b")
    assert main(["sweep", "recipes/toy"]) == 0
    (fake.root / "data.jsonl").write_text('{"other": 1}\n')
    capsys.readouterr()
    assert main(["sweep", "recipes/toy"]) == 1
    said = capsys.readouterr().out
    assert "2 runs  content of data.jsonl: " in said and "runner report runs/toy" in said
    for named, state in (("recipes/toy", "changed"), ("runs/toy", "completed")):
        assert main(["report", named, "--format", "json"]) == 0
        rows = json.loads(capsys.readouterr().out)["rows"]
        assert [row["state"] for row in rows] == [state] * 2, named


def test_runs_with_remote_storage_are_told_what_becomes_of_it(
    changed: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    edit(
        changed,
        "a",
        "b",
        old='checkpoints: {save_strategy: "no"}',
        new='checkpoints: {save_strategy: "no", remote: {url: "memory://x"}}',
    )
    assert main([*FRESH, "--dry-run"]) == 0
    assert "2 with `checkpoints.remote`: the stored checkpoints stay; " in capsys.readouterr().out


def test_a_sweep_over_completed_runs_of_older_rules_says_what_a_report_will_not_compare(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    assert main(["sweep", "recipes/toy"]) == 0
    for name in "ab":
        path = fake.paths(name).recipe_path
        content = json.loads(path.read_text())
        del content["rules"]
        path.write_text(json.dumps(content))
    capsys.readouterr()
    assert main(["sweep", "recipes/toy"]) == 0
    assert "rules" not in capsys.readouterr().err, "nothing is launched"
    fake.add("c")
    assert main(["sweep", "recipes/toy"]) == 0
    assert (
        "note: 2 completed runs of this sweep follow other rules of rows and masks than the"
        " runs launched now (rules 2)" in capsys.readouterr().err
    )
