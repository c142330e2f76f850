"""The status of a run is derived from its files, each state from its own traces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from runner.errors import CorruptFileError, RefusedError
from runner.files import append_jsonl, load_json, write_json_atomic
from runner.launch.run_files import prepare_run
from runner.plan.decide import decide
from runner.plan.status import RunStatus, find_differences, read_status
from runner.recipe.identity import RULES, derive_digest
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.facts import read_facts
from runner.run.lease import Lease
from runner.run.paths import AttemptPaths, RunPaths, marker_path
from runner.run.record import (
    Attempt,
    Failure,
    FailureKind,
    RunRecord,
    describe_phase,
    load_failure,
    load_progress,
    load_record,
    load_stored_recipe,
    write_record,
)
from runner.run.result import SplitScore, TrainResult, load_result
from tests.recipe.test_parse import TEXT

CONTENTS = {"data.jsonl": "a" * 64, "models/toy": "b" * 64}


@dataclass
class Run:
    """A run directory that is filled piece by piece."""

    paths: RunPaths
    recipe: Recipe

    def status(self, *overrides: str, contents: Mapping[str, str] = CONTENTS) -> RunStatus:
        recipe = (
            parse_recipe(TEXT, where="r.yaml", overrides=overrides) if overrides else self.recipe
        )
        return read_status(read_facts(self.paths), recipe, contents)

    def attempt(self, **fields: Any) -> Attempt:
        earlier = load_record(self.paths).attempts
        attempt = Attempt(
            number=len(earlier) + 1,
            started_at_utc="2026-01-01T00:00:00+00:00",
            command=("accelerate",),
            environment={},
            num_processes=1,
            host="here",
        ).model_copy(update=fields)
        write_record(self.paths, RunRecord(attempts=(*earlier, attempt)))
        self.paths.attempt(attempt.number).log_path.parent.mkdir(parents=True, exist_ok=True)
        self.paths.attempt(attempt.number).log_path.touch()
        return attempt

    def result(self, **fields: Any) -> None:
        stored = load_stored_recipe(self.paths)
        assert stored is not None
        score = SplitScore(
            num_rows=1,
            num_completion_tokens=2,
            num_tokens=4,
            num_bytes=8,
            completion_nll_sum=1.0,
            nll_sum=6.0,
        )
        assert (score.nll_per_completion_token, score.nll_per_token) == (0.5, 1.5)
        result = TrainResult(
            recipe_digest=stored.recipe_digest,
            outcome="completed",
            stop_reason="early_stopping",
            num_steps=9,
            best_step=6,
            best_metric=0.5,
            metric="nll_per_completion_token",
            num_train_rows=3,
            base={"test": score},
            tuned={"test": score},
        ).model_copy(update=fields)
        write_json_atomic(self.paths.result_path, result.model_dump(mode="json"))


@pytest.fixture
def empty(tmp_path: Path) -> Run:
    return Run(RunPaths(tmp_path / "toy" / "base"), parse_recipe(TEXT, where="r.yaml"))


@pytest.fixture
def run(empty: Run) -> Run:
    """With its recipe, and nothing else."""
    prepare_run(empty.recipe, CONTENTS, read_facts(empty.paths))
    return empty


def test_pending(empty: Run) -> None:
    assert empty.status() == RunStatus(state="pending", why="never started")
    assert not empty.paths.run_dir.exists(), "asking makes nothing"
    prepare_run(empty.recipe, CONTENTS, read_facts(empty.paths))
    assert empty.status().state == "pending"


def test_pending_when_prepared(run: Run) -> None:
    run.paths.attempt(run.attempt().number).log_path.unlink()
    assert (run.status().state, run.status().why) == (
        "pending",
        "prepared, waiting for a manual start",
    )


def test_running_while_the_lease_is_held_whatever_else_is_there(run: Run) -> None:
    attempt = run.attempt()
    lease = Lease(run.paths.lease_path)
    assert run.status().state == "interrupted", "a lease file alone means nothing"
    assert lease.try_acquire()
    assert run.status().state == "running"
    assert run.status().why.startswith("starting, "), "the launcher itself takes that long"
    progress = {"phase": "training", "step": 4, "max_steps": 9, "loss": 1.5}
    write_json_atomic(run.paths.attempt(attempt.number).progress_path, progress)
    status = run.status("loss=completion")
    assert (status.state, status.why, status.step, status.max_steps, status.loss) == (
        "running",
        "training",
        4,
        9,
        1.5,
    )
    assert status.seconds is not None and status.seconds > 0, (
        "the time of the running attempt counts"
    )
    lease.close()
    assert run.status().state == "interrupted" and run.status().seconds is None


@pytest.mark.parametrize(
    ("phase", "began", "shown"),
    [
        ("loading the model", "2026-01-01T00:00:00+00:00", "loading the model, 40 s"),
        ("evaluating", "2025-12-31T23:46:55+00:00", "evaluating, 14 min"),
        ("evaluating", "2026-01-01T00:00:36+00:00", "evaluating"),
        ("evaluating", "2026-01-01T00:00:50+00:00", "evaluating"),  # by another machine's clock
        ("training", "2026-01-01T00:00:00+00:00", "training"),
        ("loading", None, "loading"),
        ("loading", "yesterday", "loading"),
        ("loading", "2026-01-01T00:00:00", "loading"),  # of no time zone
    ],
)
def test_a_phase_that_lasts_says_how_long(phase: str, began: str | None, shown: str) -> None:
    assert describe_phase(phase, began, "2026-01-01T00:00:40+00:00") == shown


def test_the_progress_of_an_older_version_is_read(run: Run) -> None:
    attempt = run.attempt()
    path = run.paths.attempt(attempt.number).progress_path
    write_json_atomic(path, {"phase": "loading", "step": 0, "max_steps": None, "loss": None})
    progress = load_progress(path)
    assert progress is not None and progress.phase_began_at_utc is None
    lease = Lease(run.paths.lease_path)
    assert lease.try_acquire()
    assert run.status().why == "loading"
    lease.close()


def test_completed_is_a_result_of_the_same_digest_and_nothing_else(run: Run) -> None:
    run.attempt(ended_at_utc="2026-01-01T00:01:00+00:00", exit_status=0)
    status = run.status()
    assert (status.state, status.why) == ("damaged", "result.json is missing")
    run.result()
    status = run.status()
    assert (status.state, status.why) == ("completed", "stopped by early_stopping")
    assert (status.step, status.max_steps, status.seconds) == (9, 9, 60.0)


def test_completed_although_the_launcher_died(run: Run) -> None:
    run.attempt()
    run.result()
    assert run.status().state == "completed"


@pytest.mark.parametrize("kind", ["lost", "preempted"])
def test_interrupted_by_what_is_nobodys_fault(kind: FailureKind, run: Run) -> None:
    failure = Failure(kind=kind, message="the sweep was stopped")
    run.attempt(ended_at_utc="2026-01-01T00:00:05+00:00", failure=failure)
    status = run.status()
    assert (status.state, status.why, status.failure) == (
        "interrupted",
        "the sweep was stopped",
        failure,
    )


def test_interrupted_when_an_attempt_has_no_end(run: Run) -> None:
    run.attempt()
    assert (run.status().state, run.status().why) == (
        "interrupted",
        "attempt 1 was killed together with its launcher",
    )


@pytest.mark.parametrize(
    "kind", ["configuration", "data", "out_of_memory", "diverged", "transient", "crashed"]
)
def test_failed(kind: FailureKind, run: Run) -> None:
    run.attempt(
        ended_at_utc="2026-01-01T00:00:05+00:00", failure=Failure(kind=kind, message="because")
    )
    assert (run.status().state, run.status().why) == ("failed", f"{kind}: because")


def test_a_refused_resume_is_no_failure_of_the_recipe(run: Run) -> None:
    """A sweep must take such a run up again: one wrong `--resume` of one launch says nothing of the
    next.
    """
    failure = Failure(kind="configuration", message="not of this run")
    run.attempt(
        ended_at_utc="2026-01-01T00:00:05+00:00", failure=failure, resume="/other/step-3.zip"
    )
    status = run.status()
    assert (status.state, status.why) == (
        "interrupted",
        "--resume /other/step-3.zip was refused: not of this run",
    )
    assert decide(status).action == "launch"
    run.attempt(ended_at_utc="2026-01-01T00:00:07+00:00", failure=failure)
    assert (run.status().state, decide(run.status()).action) == ("failed", "skip")


def test_failed_when_only_the_trainer_could_say_so(run: Run) -> None:
    """The launcher was killed after the training process wrote its failure, before it recorded the
    end itself.
    """
    attempt = run.attempt()
    failure = Failure(kind="diverged", message="nan at step 3")
    write_json_atomic(run.paths.attempt(attempt.number).failure_path(), failure.model_dump())
    assert (run.status().state, run.status().failure) == ("failed", failure)


def test_only_the_last_attempt_decides(run: Run) -> None:
    run.attempt(
        ended_at_utc="2026-01-01T00:00:05+00:00", failure=Failure(kind="data", message="because")
    )
    run.attempt(
        ended_at_utc="2026-01-01T00:00:07+00:00",
        failure=Failure(kind="preempted", message="stopped"),
    )
    status = run.status()
    assert (status.state, status.num_attempts, status.seconds) == ("interrupted", 2, 12.0)


@pytest.mark.parametrize("is_completed", [False, True])
def test_changed_recipe(is_completed: bool, run: Run) -> None:
    if is_completed:
        run.result()
    status = run.status("loss=completion", "training.max_steps=5")
    assert status.state == "changed"
    assert status.differences == ('loss: "full" -> "completion"', "training.max_steps: 2 -> 5")
    assert run.status("launch.num_processes=1", "tracking.project=x").state != "changed", (
        "placement is no change"
    )


def test_changed_content(run: Run) -> None:
    status = run.status(contents={**CONTENTS, "data.jsonl": "c" * 64})
    assert status.differences == (f"content of data.jsonl: {'a' * 12} -> {'c' * 12}",)
    assert run.status(contents={}).state == "pending", (
        "what was not looked at is taken as unchanged"
    )
    assert run.status(contents={"new.jsonl": "d" * 64}).differences == (
        f"content of new.jsonl: (not used) -> {'d' * 12}",
    )


def test_changed_when_result_and_recipe_are_of_two_experiments(run: Run) -> None:
    run.result(recipe_digest="e" * 64)
    assert run.status().state == "changed" and "e" * 12 in run.status().why
    run.result()
    run.paths.recipe_path.unlink()
    assert run.status().state == "changed" and "missing" in run.status().why


def put_checkpoint(run: Run) -> None:
    """A committed checkpoint that looks complete without verification."""
    folder = run.paths.checkpoint_dir(4)
    folder.mkdir(parents=True)
    marker_path(folder).write_text("{}")


def write_under_rules(run: Run, rules: int) -> None:
    """`recipe.json` as a runner of these rules wrote it; of 1, the file does not say so."""
    digest = derive_digest(run.recipe, CONTENTS, rules)
    content = json.loads(run.paths.recipe_path.read_text()) | {"recipe_digest": digest}
    content |= {"rules": rules}
    if rules == 1:
        del content["rules"]
    write_json_atomic(run.paths.recipe_path, content)


@pytest.mark.parametrize("rules", [1, 3])
def test_completed_stays_completed_under_other_rules(rules: int, run: Run) -> None:
    put_checkpoint(run)
    write_under_rules(run, rules)
    run.result()
    assert run.status().state == "completed"
    assert run.status("loss=completion").differences == ('loss: "full" -> "completion"',)


@pytest.mark.parametrize("rules", [1, 3])
@pytest.mark.parametrize("kind", ["preempted", "crashed"])
def test_a_checkpoint_of_other_rules_is_not_continued(
    kind: FailureKind, rules: int, run: Run
) -> None:
    write_under_rules(run, rules)
    put_checkpoint(run)
    run.attempt(
        ended_at_utc="2026-01-01T00:00:05+00:00", failure=Failure(kind=kind, message="because")
    )
    line = (
        f"rules of rows and masks: {rules} -> {RULES} (only a runner with rules {rules} can"
        " resume it)"
    )
    status = run.status()
    assert (status.state, status.differences) == ("changed", (line,))
    assert status.why == f"the runner changed since the run was made: {line}"
    before = run.paths.recipe_path.read_bytes()
    with pytest.raises(RefusedError) as refused:
        prepare_run(run.recipe, CONTENTS, read_facts(run.paths))
    assert f"the runner changed since:\n  {line}" in refused.value.message
    assert run.paths.recipe_path.read_bytes() == before
    both = run.status("loss=completion")
    assert both.differences == ('loss: "full" -> "completion"', line)
    assert both.why.startswith("the recipe changed since the run was made: loss: ")


def test_without_a_checkpoint_a_run_of_rules_1_starts_anew(run: Run) -> None:
    """It has nothing that could be mixed up with other rows."""
    write_under_rules(run, 1)
    run.attempt()
    assert run.status().state == "interrupted"
    prepare_run(run.recipe, CONTENTS, read_facts(run.paths))
    stored = load_stored_recipe(run.paths)
    assert stored is not None and stored.rules == RULES == 2
    assert stored.recipe_digest == derive_digest(run.recipe, CONTENTS)
    assert json.loads(run.paths.recipe_path.read_text())["rules"] == 2


def test_a_digest_that_no_key_explains_is_told_in_the_same_words_everywhere(run: Run) -> None:
    digest = derive_digest(run.recipe, CONTENTS)
    content = json.loads(run.paths.recipe_path.read_text()) | {"recipe_digest": "e" * 64}
    write_json_atomic(run.paths.recipe_path, content)
    run.attempt()
    assert run.status().state == "interrupted", "it would start at step 0"
    put_checkpoint(run)
    status = run.status()
    line = (
        f"recipe_digest: {'e' * 12} -> {digest[:12]}, but no key differs: recipe.json was changed"
        " by hand, or another version of the runner wrote it"
    )
    assert (status.state, status.differences) == ("changed", (line,))
    with pytest.raises(RefusedError) as refused:
        prepare_run(run.recipe, CONTENTS, read_facts(run.paths))
    assert f"  {line}" in refused.value.message
    assert run.status("loss=completion").differences == ('loss: "full" -> "completion"',)


def test_quarantine_and_uploads_that_did_not_arrive_are_told_in_every_state(run: Run) -> None:
    assert run.status().notes == "" and run.status().quarantined == ()
    files = run.paths.attempt(run.attempt(resume="best").number)
    for name in ("step-8.1", "step-8.zip.1"):
        (run.paths.quarantine_dir / name).mkdir(parents=True)
    run.paths.uploads_dir.mkdir(parents=True)
    (run.paths.uploads_dir / "step-12.zip").touch()
    (run.paths.uploads_dir / ".step-16.zip.tmp").touch()
    assert run.status().notes == "2 in quarantine; not in remote storage: step-12.zip", (
        "on its way, as far as we know"
    )
    for outcome in (
        {"outcome": "failed", "message": "ConnectionError: no\nroute"},
        {"outcome": "uploaded"},
    ):
        append_jsonl(files.uploads_path, {"step": 12, "url": "s3://bucket", **outcome})
    status = run.status()
    assert status.notes.endswith("step-12.zip (ConnectionError: no)")
    assert status.state == "interrupted" and status.quarantined == ("step-8.1", "step-8.zip.1")
    run.result()
    assert run.status().state == "completed" and run.status().pending_uploads == ("step-12.zip",)


def test_a_field_that_a_newer_version_added_does_no_harm(run: Run) -> None:
    write_json_atomic(run.paths.record_path, {"attempts": [], "colour": "red"})
    assert load_record(run.paths) == RunRecord()


def test_absent_files_are_nothing_and_damaged_ones_are_errors(empty: Run, tmp_path: Path) -> None:
    path = tmp_path / "file.json"
    assert load_record(empty.paths) == RunRecord()
    assert load_result(empty.paths) is None and load_stored_recipe(empty.paths) is None
    assert load_failure(AttemptPaths(tmp_path)) is None and load_progress(path) is None
    assert (
        find_differences(read_facts(empty.paths), empty.recipe, CONTENTS, has_checkpoints=False)
        == []
    )
    damaged: list[Any] = [None, [], {}, {"kind": "tired", "message": "x"}, 3]
    for content in damaged:
        write_json_atomic(tmp_path / "failure.json", content)
        with pytest.raises(CorruptFileError, match=r"failure\.json cannot be read"):
            load_failure(AttemptPaths(tmp_path))
        assert load_progress(path) is None, "it is only drawn"


def test_a_stored_recipe_comes_back_whole(run: Run) -> None:
    stored = load_stored_recipe(run.paths)
    assert stored is not None and stored.recipe == run.recipe and stored.contents == CONTENTS
    assert (
        find_differences(read_facts(run.paths), run.recipe, CONTENTS, has_checkpoints=False) == []
    )


def test_a_stored_recipe_stays_readable_when_a_value_is_refused_since(tmp_path: Path) -> None:
    """Otherwise a completed run would be unreadable after an update."""
    paths = RunPaths(tmp_path)
    recipe = parse_recipe(TEXT, where="r.yaml").model_dump(mode="json")
    recipe["training"]["optim"] = "adalomo"
    recipe["data"]["task"] = {"name": "summarization", "prompt": "{document} {summary}"}
    stored = {"recipe": recipe, "recipe_digest": "0" * 64, "contents": {}}
    paths.recipe_path.write_text(json.dumps(stored))
    read = load_stored_recipe(paths)
    assert read is not None and read.recipe.training.model_dump()["optim"] == "adalomo"
    with pytest.raises(ValueError, match="cannot be used here"):
        Recipe.model_validate_json(json.dumps(recipe))


def test_an_attempt_of_before_scores_were_shared_has_scored_itself(run: Run) -> None:
    run.attempt()
    record = load_json(run.paths.record_path)
    del record["attempts"][0]["base"]
    write_json_atomic(run.paths.record_path, record)
    assert load_record(run.paths).attempts[0].base == "own"
