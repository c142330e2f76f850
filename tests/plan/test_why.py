"""`runner why`: the answer, what decides it, and that nothing was touched."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.files import write_json_atomic
from runner.recipe.parse import load_recipe
from runner.run.paths import RunPaths
from runner.run.record import Failure, RunRecord, load_record, write_record
from tests.support.fake_checkpoints import flip_bit, interrupt
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]


@pytest.fixture
def why(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> Any:
    """`why(run, ...)` gives its lines, after a look that nothing was changed by it."""

    def ask(run: str | Path, *more: str) -> list[str]:
        capsys.readouterr()
        before = fake.tree()
        assert main(["why", str(run), *more]) == 0
        assert fake.tree() == before
        return capsys.readouterr().out.splitlines()

    return ask


def value_of(lines: list[str], label: str) -> str:
    """The text after a label, including its continuation lines."""
    found, is_in = [], False
    for line in lines[1:]:
        is_in = line[2:14].strip() == label if line[2:14].strip() else is_in
        if is_in:
            found.append(line[14:])
    return "\n".join(found)


def interrupted(fake: FakeLauncher, **changed: Any) -> RunPaths:
    fake.add("a", num_processes=1)
    return interrupt(load_recipe(Path("recipes/toy/a.yaml")), fake.paths("a"), **changed)


def end_with(paths: RunPaths, kind: Any, message: str) -> None:
    (attempt,) = load_record(paths).attempts
    failure = Failure(kind=kind, message=message, log_tail=("last words",))
    write_record(
        paths,
        RunRecord(attempts=(attempt.model_copy(update={"failure": failure, "exit_status": 1}),)),
    )


RECIPE = "recipes/toy/a.yaml"


@pytest.mark.parametrize("name", ["toy/a", "a", "runs/toy/a", "runs/toy/a/"])
def test_a_run_is_named_whether_or_not_it_was_started(
    fake: FakeLauncher, why: Any, name: str
) -> None:
    fake.add("a", "ab")
    lines = why(name)
    assert lines == why(RECIPE)
    assert value_of(why(name, "loss=full"), "next").startswith("launch from step 0")
    fake.paths("a").run_dir.mkdir(parents=True)
    assert why(name) == lines, "a run directory that holds no recipe"
    interrupted(fake)
    assert why(name)[0] == "toy/a  runs/toy/a"
    assert value_of(why(name), "state").startswith("interrupted")


def test_a_name_is_read_from_its_recipe_file_as_launch_does(fake: FakeLauncher, why: Any) -> None:
    """`why NAME` said *interrupted* of a run that `launch NAME` refused as *changed*."""
    interrupted(fake)
    text = Path(RECIPE).read_text()
    Path(RECIPE).write_text(text.replace("max_steps: 2,", "max_steps: 3,"))
    for name in ("toy/a", "a", RECIPE):
        assert value_of(why(name), "next").startswith("refuse: changed"), name
        assert value_of(why(name), "differs") == "training.max_steps: 2 -> 3"
    assert value_of(why("runs/toy/a"), "state").startswith("interrupted"), "as it was recorded"
    Path(RECIPE).unlink()
    assert value_of(why("a"), "state").startswith("interrupted"), "there is nothing else"


def test_a_name_of_no_run_is_2_and_words(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main(["why", "toy/b"]) == 2
    said = capsys.readouterr().err
    assert "no recipe, run or grid is named 'toy/b'" in said and "runner status" in said
    assert main(["why", "recipes/toy/a.yam"]) == 2
    assert "did you mean recipes/toy/a.yaml?" in capsys.readouterr().err


def test_a_cut_recipe_has_the_way_on(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    paths = interrupted(fake)
    paths.recipe_path.write_text("{")
    assert main(["why", "runs/toy/a"]) == 2
    said = capsys.readouterr().err
    assert "runs/toy/a is unreadable: " in said and "recipe.json" in said
    assert "hint: `runner launch recipes/toy/a.yaml --fresh` moves the run aside" in said
    Path(RECIPE).unlink()
    assert main(["why", "runs/toy/a"]) == 2
    assert "hint: `runner launch RECIPE --fresh`" in capsys.readouterr().err


def test_a_run_that_was_never_started(fake: FakeLauncher, why: Any) -> None:
    fake.add("a")
    lines = why(RECIPE)
    assert lines[0] == "toy/a  runs/toy/a"
    assert value_of(lines, "next") == "launch from step 0, 1 process"
    assert value_of(lines, "rerun").startswith("skip: pending") and value_of(
        lines, "sweep"
    ).startswith("launch")
    assert value_of(lines, "rule") == "`run.json` records no attempt that was started"
    assert value_of(lines, "lease") == "free"


def test_an_interrupted_run_goes_on_from_its_newest_whole_checkpoint(
    fake: FakeLauncher, why: Any
) -> None:
    paths = interrupted(fake)
    interrupt(load_recipe(Path(RECIPE)), paths, step=8)
    assert value_of(why(RECIPE), "next") == "launch from step 8, 1 process"
    flip_bit(paths.checkpoint_dir(8) / "optimizer.pt")
    paths.quarantine_dir.mkdir()
    (paths.quarantine_dir / "step-12.1").mkdir()
    paths.uploads_dir.mkdir()
    (paths.uploads_dir / "step-4.zip").write_text("x")
    for lines in (why(RECIPE), why(paths.run_dir)):
        assert value_of(lines, "next") == "launch from step 4, 1 process"
        newest, older = value_of(lines, "checkpoint").splitlines()
        assert (
            newest.startswith("step-8  damaged: optimizer.pt does not match its")
            and "would move it" in newest
        )
        assert older == "step-4  intact; an attempt would resume from here"
        assert value_of(lines, "quarantine") == "step-12.1"
        assert value_of(lines, "upload") == "step-4.zip has not reached remote storage"
        assert "killed together with its launcher" in value_of(lines, "state")


def test_a_launch_that_is_refused_names_the_field_of_the_marker(
    fake: FakeLauncher, why: Any
) -> None:
    interrupted(fake)
    lines = why(RECIPE, "--num-processes", "2")
    assert value_of(lines, "next").startswith("refuse: interrupted")
    assert (
        value_of(lines, "differs") == "gradient_accumulation_steps: 4 -> 2\nnum_processes: 1 -> 2"
    )
    assert "from a different launch: gradient_accumulation_steps" in value_of(lines, "checkpoint")
    assert value_of(why(RECIPE, "--num-processes", "3"), "next").startswith("refuse: ")
    assert value_of(why(RECIPE), "next") == "launch from step 4, 1 process"


def test_behind_a_damaged_checkpoint_the_older_one_is_refused_too(
    fake: FakeLauncher, why: Any
) -> None:
    """Only reading every byte shows that the training process would refuse once it has started."""
    paths = interrupted(fake, num_processes=2)
    interrupt(load_recipe(Path(RECIPE)), paths, step=8)
    assert value_of(why(RECIPE), "next") == "launch from step 8, 1 process"
    flip_bit(paths.checkpoint_dir(8) / "optimizer.pt")
    assert value_of(why(RECIPE), "next") == (
        "refuse: the checkpoint of step 4 cannot be resumed exactly, because these changed"
        " since:\n  num_processes: 2 -> 1"
    )
    known = json.loads("\n".join(why(RECIPE, "--json")))
    assert (known["next"], known["start_step"]) == ("refuse", None)


def test_behind_a_damaged_checkpoint_versions_are_compared_too(
    fake: FakeLauncher, why: Any
) -> None:
    fake.add("a", num_processes=1)
    text = Path(RECIPE).read_text().replace("launch:", "launch:\n  on_version_change: refuse", 1)
    Path(RECIPE).write_text(text)
    recipe = load_recipe(Path(RECIPE))
    paths = interrupt(recipe, fake.paths("a"), versions={"torch": "1.0"})
    interrupt(recipe, paths, step=8)
    assert value_of(why(RECIPE), "next") == "launch from step 8, 1 process"
    flip_bit(paths.checkpoint_dir(8) / "optimizer.pt")
    lines = why(RECIPE)
    assert value_of(lines, "next").startswith("refuse: the checkpoint of step 4 cannot be")
    assert 'versions.torch: "1.0" -> ' in value_of(lines, "next")


def test_a_changed_recipe_file_and_a_missing_one(fake: FakeLauncher, why: Any) -> None:
    interrupted(fake)
    Path("data.jsonl").write_text("{}\n{}\n")
    lines = why(RECIPE)
    assert value_of(lines, "next").startswith(
        "refuse: changed"
    ) and "content of data.jsonl" in value_of(lines, "differs")
    Path("data.jsonl").unlink()
    lines = why(RECIPE)
    assert value_of(lines, "next") == "refuse: files that the recipe names are missing"
    assert value_of(lines, "missing") == "data.train.path: data.jsonl"


def test_a_run_that_is_refused_is_not_said_to_go_on(
    fake: FakeLauncher, why: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    end_with(interrupted(fake), "preempted", "stopped at step 4, which is saved")
    hint = value_of(why(RECIPE), "hint")
    assert hint == "`runner rerun runs/toy/a` resumes from the newest checkpoint"
    assert main(["rerun", "runs/toy/a", "--dry-run"]) == 0
    assert "launch  toy/a  interrupted" in capsys.readouterr().out
    Path("data.jsonl").write_text("{}\n{}\n")
    lines = why(RECIPE)
    assert value_of(lines, "failure").startswith("preempted")
    assert "resumes from the newest" not in "\n".join(lines)
    text = Path(RECIPE).read_text()
    Path(RECIPE).write_text(text.replace("seed: 1", "seed: 2"))
    assert main(["status", RECIPE]) == 0
    told = capsys.readouterr()
    assert "changed" in told.out and "resumes from the newest" not in told.err


def test_a_library_of_another_version_is_told(fake: FakeLauncher, why: Any) -> None:
    interrupted(fake, versions={"torch": "1.0"})
    lines = why(RECIPE)
    assert value_of(lines, "next") == "launch from step 4, 1 process"
    assert 'versions.torch: "1.0" -> ' in value_of(lines, "changed") and "warn" in value_of(
        lines, "changed"
    )


def test_a_lasting_failure_is_skipped_by_a_sweep_and_tried_by_a_launch(
    fake: FakeLauncher, why: Any
) -> None:
    paths = interrupted(fake)
    end_with(paths, "diverged", "the loss of step 5 is nan\n\nhint: a lower learning rate")
    lines = why(RECIPE)
    assert value_of(lines, "sweep").startswith("skip: failed") and "--retry-failed" in value_of(
        lines, "sweep"
    )
    assert value_of(lines, "next") == "launch from step 4, 1 process"
    assert value_of(lines, "failure").startswith("diverged: the loss of step 5 is nan")
    assert value_of(lines, "log") == "| last words\nruns/toy/a/attempts/1/log.txt"
    assert "learning_rate" in value_of(lines, "hint")


def test_smaller_micro_batches_after_running_out_of_memory(fake: FakeLauncher, why: Any) -> None:
    fake.add("a", micro_batch=2)
    paths = interrupt(load_recipe(Path(RECIPE)), fake.paths("a"))
    end_with(paths, "out_of_memory", "CUDA out of memory")
    (attempt,) = load_record(paths).attempts
    write_record(
        paths, RunRecord(attempts=(attempt.model_copy(update={"micro_batch_divisor": 2}),))
    )
    lines = why(RECIPE)
    assert (
        value_of(lines, "next")
        == "launch from step 0, 1 process, micro-batches divided by 2 since it ran out of memory"
    )
    assert "in larger micro-batches" in value_of(lines, "checkpoint")


def test_a_running_run_is_told_with_its_process_and_a_completed_one_by_its_result(
    fake: FakeLauncher, why: Any
) -> None:
    fake.add("a", told="wait")
    process = fake.start("launch", RECIPE)
    _, pid = fake.next_started()
    lines = why(RECIPE)
    assert value_of(lines, "next").startswith("skip: running")
    assert f"held by {pid}  " in value_of(
        lines, "lease"
    ) and f"held by {process.pid}  " in value_of(lines, "lease")
    assert f"held by {os.getpid()} " not in value_of(lines, "lease")
    write_json_atomic(fake.paths("a").stop_path, {"attempt": 1, "why": "dinner"})
    assert "asked to stop: dinner" in value_of(why(RECIPE), "lease")
    fake.let_go("a")
    assert process.wait() == 0
    lines = why(RECIPE)
    assert value_of(lines, "next") == "skip: completed: stopped by max_steps"
    assert "`result.json` exists" in value_of(lines, "rule") and value_of(lines, "lease") == "free"


def test_overrides_and_names_lead_to_the_same_run_as_for_launch(
    fake: FakeLauncher, why: Any
) -> None:
    fake.add("a")
    assert (
        why(RECIPE, "training.seed=2")[0] == "toy/a--training.seed-2  runs/toy/a--training.seed-2"
    )
    assert why(RECIPE, "training.seed=2", "--name", "b")[0] == "toy/b  runs/toy/b"


def test_json_for_scripts(fake: FakeLauncher, why: Any) -> None:
    paths = interrupted(fake)
    known = json.loads("\n".join(why(RECIPE, "--json")))
    assert (known["next"], known["start_step"], known["status"]["state"]) == (
        "launch",
        4,
        "interrupted",
    )
    assert known["checkpoints"] == [
        {"name": "step-4", "is_next": True, "what": "intact; an attempt would resume from here"}
    ]
    assert {verb: decision["action"] for verb, decision in known["decisions"].items()} == {
        "sweep": "launch",
        "rerun": "launch",
        "launch": "launch",
    }
    known = json.loads("\n".join(why(RECIPE, "--json", "--num-processes", "2")))
    assert (known["next"], known["start_step"]) == ("refuse", None)
    shutil.rmtree(paths.checkpoints_dir)
    assert json.loads("\n".join(why(RECIPE, "--json", "--num-processes", "2")))["start_step"] == 0


@pytest.mark.parametrize("name", ["run.json", "recipe.json", "result.json"])
def test_a_record_that_cannot_be_read_is_named(fake: FakeLauncher, why: Any, name: str) -> None:
    paths = interrupted(fake)
    (paths.run_dir / name).write_text("{")
    lines = why(RECIPE)
    assert value_of(lines, "next").startswith("refuse: unreadable: ") and name in value_of(
        lines, "state"
    )
    assert (
        "--fresh" in value_of(lines, "next")
        and json.loads("\n".join(why(RECIPE, "--json")))["next"] == "refuse"
    )


def test_what_is_no_run_is_an_error_in_words(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    interrupted(fake)
    for arguments in (["recipes/none.yaml"], ["runs/toy/a", "training.seed=1"], ["fake"]):
        assert main(["why", *arguments]) == 2
        assert capsys.readouterr().err.startswith("error: ")
