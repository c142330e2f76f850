"""Trackers get each step once across attempts, cannot stop training, and stay off where nobody
asked for them.
"""

from __future__ import annotations

import base64
import hashlib
import json
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback, TrainerControl, TrainerState
from transformers.integrations.integration_utils import INTEGRATION_TO_CALLBACK

from runner.files import append_jsonl, load_json
from runner.run.paths import RunPaths
from runner.run.record import load_progress
from runner.run.result import SplitScore, TrainResult
from runner.sft.callbacks import ProgressCallback
from runner.sft.tracking import Trackers, open_trackers, read_sent_steps
from runner.sft.trainer import build_training_args
from tests.conftest import ROOT, Project
from tests.support.contexts import make_recorder, open_context
from tests.support.training_runs import (
    RUNS,
    alone_with,
    assert_same_outputs,
    launch,
    launch_killed_at,
    read_evaluations,
    read_log,
    read_losses,
)

ARGUMENTS: Any = None  # our trackers do not look at them


SCORE: Any = SplitScore(
    num_rows=1,
    num_completion_tokens=1,
    num_tokens=2,
    num_bytes=3,
    completion_nll_sum=1.0,
    nll_sum=2.0,
)
RESULT = TrainResult(
    recipe_digest="digest",
    outcome="completed",
    stop_reason="max_steps",
    num_steps=12,
    best_step=8,
    best_metric=1.0,
    metric="nll_per_token",
    num_train_rows=22,
    base={"test": SCORE},
    tuned={"test": SCORE},
)


def tell_steps(trackers: Trackers, steps: range, *, evaluate_every: int = 4) -> None:
    """Report steps as the training process does; the loss of a step is a tenth of its number."""
    for step in steps:
        state = TrainerState(global_step=step, max_steps=12, epoch=step / 6)
        trackers.on_log(
            ARGUMENTS, state, TrainerControl(), logs={"loss": step / 10, "epoch": step / 6}
        )
        if step % evaluate_every == 0:
            trackers.on_log(
                ARGUMENTS,
                state,
                TrainerControl(),
                logs={"eval_nll_per_token": step / 5, "epoch": 0.5},
            )
    trackers.on_train_end(ARGUMENTS, TrainerState(global_step=12), TrainerControl())


def read_scalars(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """`tag -> (step, value)` as TensorBoard itself reads a folder of event files."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)]
        for tag in events.Tags()["scalars"]
    }


def read_wandb_records(run_dir: Path) -> list[list[Any]]:
    """The records of each offline run below a run directory, oldest first: a log in blocks of 32
    KiB, as LevelDB's.
    """
    from wandb.proto.wandb_internal_pb2 import Record

    def scan(content: bytes) -> Iterator[Any]:
        at, parts = 7, []
        while at + 7 <= len(content):
            if (rest := 32768 - at % 32768) < 7:
                at += rest
                continue
            _, length, kind = struct.unpack("<IHB", content[at : at + 7])
            parts.append(content[at + 7 : at + 7 + length])
            at += 7 + length
            if kind in (1, 4):  # whole, or the last part
                record = Record()
                record.ParseFromString(b"".join(parts))
                parts.clear()
                yield record

    return [
        list(scan(path.read_bytes()))
        for path in sorted(run_dir.glob("wandb/offline-run-*/*.wandb"))
    ]


def read_wandb_history(records: list[Any]) -> list[dict[str, Any]]:
    """Rows of the history, by key."""
    rows = [record.history for record in records if record.WhichOneof("record_type") == "history"]
    return [
        {(i.key or "/".join(i.nested_key)): json.loads(i.value_json) for i in row.item}
        for row in rows
    ]


def digest_of(content: bytes | str) -> str:
    """The digest that Weights & Biases writes into an artifact."""
    return base64.b64encode(
        hashlib.md5(content.encode() if isinstance(content, str) else content).digest()
    ).decode()


def test_nothing_is_tracked_unless_the_recipe_asks(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(project.root)
    for name, value in {
        "WANDB_PROJECT": "x",
        "WANDB_LOG_MODEL": "end",
        "KUBEFLOW_TRAINER_SERVER_URL": "http://x",
    }.items():
        monkeypatch.setenv(name, value)
    context = open_context(project)
    assert build_training_args(context).report_to == []
    tell_steps(open_trackers(context, None), range(1, 5))
    assert not context.paths.tracking_path.exists() and not context.paths.tensorboard_dir.exists()


def test_tensorboard_shows_each_step_once_after_a_resume(project: Project) -> None:
    context = open_context(project, "tracking.report_to=[tensorboard]")
    # Killed at step 10, with a checkpoint of step 8.
    tell_steps(open_trackers(context, None), range(1, 11))
    tell_steps(open_trackers(context, 8), range(9, 13))
    scalars = read_scalars(context.paths.tensorboard_dir)
    assert [step for step, _ in scalars["train/loss"]] == list(range(1, 13))
    assert [value for _, value in scalars["train/loss"]] == pytest.approx(
        [step / 10 for step in range(1, 13)]
    )
    assert [step for step, _ in scalars["eval/nll_per_token"]] == [4, 8, 12]
    assert [step for step, _ in scalars["train/epoch"]] == list(range(1, 13)), (
        "not once more with an evaluation"
    )
    tell_steps(open_trackers(context, None), range(1, 3))  # every checkpoint was lost
    assert [step for step, _ in read_scalars(context.paths.tensorboard_dir)["train/loss"]] == [1, 2]


def test_trackers_get_every_nth_step_and_all_evaluations(project: Project) -> None:
    context = open_context(project, "tracking={report_to: [tensorboard], log_steps: 5}")
    tell_steps(open_trackers(context, None), range(1, 13))
    scalars = read_scalars(context.paths.tensorboard_dir)
    assert [step for step, _ in scalars["train/loss"]] == [5, 10]
    assert [step for step, _ in scalars["eval/nll_per_token"]] == [4, 8, 12]


class FlakyTracker(TrainerCallback):  # type: ignore[misc]
    """A tracker whose server is away during some steps."""

    away: range
    told: list[int]

    def on_log(self, args: Any, state: TrainerState, control: TrainerControl, **_: Any) -> None:
        type(self).told.append(state.global_step)
        if state.global_step in self.away:
            raise ConnectionError("no route to host")


@pytest.mark.parametrize(("away", "told"), [(range(2, 4), 12), (range(2, 12), 4)])
def test_a_tracker_that_fails_does_not_stop_training(
    project: Project,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    away: range,
    told: int,
) -> None:
    FlakyTracker.away, FlakyTracker.told = away, []
    monkeypatch.setitem(INTEGRATION_TO_CALLBACK, "dvclive", FlakyTracker)
    context = open_context(project, "tracking.report_to=[dvclive, tensorboard]")
    tell_steps(open_trackers(context, None), range(1, 13), evaluate_every=100)
    assert len(FlakyTracker.told) == told, "given up after three failures in a row"
    assert len(read_scalars(context.paths.tensorboard_dir)["train/loss"]) == 12
    assert (
        "warning: the tracker dvclive failed at on_log, training continues"
        in capsys.readouterr().out
    )


def test_a_tracker_that_cannot_start_does_not_stop_training(
    project: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    context = open_context(project, "tracking.report_to=[tensorboard]")
    context.paths.tensorboard_dir.write_text("a file where the folder should be")
    tell_steps(open_trackers(context, None), range(1, 3))
    assert "tensorboard failed at start, training continues without it" in capsys.readouterr().out


def test_sent_steps_are_those_of_the_metrics(project: Project) -> None:
    context = open_context(project)
    assert read_sent_steps(context) == {"loss": -1, "eval": -1}
    for row in (
        {"step": 0, "split": "test"},
        {"step": 4, "loss": 1.0},
        {"step": 4, "split": "validation"},
    ):
        append_jsonl(context.paths.metrics_path, row)
    append_jsonl(context.paths.metrics_path, {"step": 5, "loss": 1.0})
    assert read_sent_steps(context) == {"loss": 5, "eval": 4}


def test_wandb_run_goes_on_where_the_last_attempt_ended(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    import wandb

    monkeypatch.setenv("WANDB_MODE", "offline")
    context = open_context(project, "tracking={report_to: [wandb], log_model: checkpoint}")
    for name, path in {
        "weights of step 8": context.paths.checkpoint_dir(8),
        "best": context.paths.model_dir,
    }.items():
        path.mkdir(parents=True)
        (path / "model.safetensors").write_text(name)
    # Killed twice at step 10.
    for first, last, resume_step in ((1, 10, None), (9, 10, 8), (9, 12, 8)):
        trackers = open_trackers(context, resume_step)
        make_recorder(context).rewind(resume_step)
        for step in range(first, last + 1):
            append_jsonl(context.paths.metrics_path, {"step": step, "loss": 1.0})
            if step % 4 == 0:
                append_jsonl(context.paths.metrics_path, {"step": step, "split": "validation"})
        tell_steps(trackers, range(first, last + 1))
        if resume_step is None:
            trackers.on_save(ARGUMENTS, TrainerState(global_step=8), TrainerControl())
        trackers.finish(RESULT)
        wandb.teardown()  # its service, as with the process of an attempt
    attempts = read_wandb_records(context.paths.run_dir)
    assert (
        len(
            {
                record.run.run_id
                for records in attempts
                for record in records
                if record.HasField("run")
            }
        )
        == 1
    )
    sent = [row["train/global_step"] for records in attempts for row in read_wandb_history(records)]
    assert sorted(sent) == [
        1,
        2,
        3,
        4,
        4,
        5,
        6,
        7,
        8,
        8,
        9,
        10,
        11,
        12,
        12,
    ], "an evaluation is a row of its own"
    artifacts = [
        record.artifact for records in attempts for record in records if record.HasField("artifact")
    ]
    assert {
        (*({*one.aliases} - {"latest"}), one.manifest.contents[0].digest) for one in artifacts
    } == {
        ("step-8", digest_of("weights of step 8")),
        ("best", digest_of("best")),
    }


def test_a_resumed_attempt_counts_its_own_tokens_only(project: Project) -> None:
    callback = ProgressCallback(open_context(project))
    history = [
        {"step": 1, "num_tokens": 900.0},
        {"step": 2, "num_tokens": 1000.0},
        {"step": 2, "eval_nll_per_token": 1},
    ]
    state = TrainerState(log_history=history, global_step=3, max_steps=4, epoch=0.5)
    callback.on_train_begin(ARGUMENTS, state)
    callback.on_epoch_begin(ARGUMENTS, TrainerState(global_step=2))
    callback.on_log(
        ARGUMENTS,
        state,
        TrainerControl(),
        logs={"loss": 1.0, "learning_rate": 0.1, "num_tokens": 1040.0, "epoch": 0.5},
    )
    assert callback.num_tokens == 40
    progress = load_progress(project.paths("base").attempt(1).progress_path)
    assert progress is not None and (progress.step, progress.max_steps) == (3, 4)
    assert progress.tokens_per_second and progress.seconds_per_step
    assert progress.tokens_per_second * progress.seconds_per_step == pytest.approx(40), (
        "both of this one step"
    )


def test_wandb_without_credentials_is_a_configuration_error(project: Project) -> None:
    """In its own process, because Weights & Biases keeps what it learned about the environment."""
    code = (
        "from pathlib import Path\n"
        "from runner.errors import RunnerError\n"
        "from tests.sft.test_tracking import Project, open_context, open_trackers\n"
        "project = Project(Path('.').resolve(), lambda family: Path(family))\n"
        "try:\n    open_trackers(open_context(project, 'tracking.report_to=[wandb]'), None)\n"
        "except RunnerError as error:\n    print(error)\n"
    )
    environment = {
        name: value for name, value in os.environ.items() if not name.startswith("WANDB_")
    }
    environment |= {
        "HOME": str(project.root),
        "PYTHONPATH": f"{ROOT}:{environment.get('PYTHONPATH', '')}",
    }
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=project.root,
        env=environment,
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        timeout=120,
    )
    assert (
        "Weights & Biases refuses to start" in done.stdout and "WANDB_MODE=offline" in done.stdout
    ), done.stderr


@pytest.fixture(scope="module")
def tracked(finished: Project) -> RunPaths:
    """A LoRA run with two trackers that is killed while it saves step 8 and resumes from step 4."""
    overrides = (
        *RUNS["gemma-lora"],
        (
            "tracking={report_to: [tensorboard, wandb], project: lab, run_name: shown, tags: [one,"
            " two]}"
        ),
        "tracking.watch=gradients",
        "tracking.log_model=end",
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        with alone_with(finished, "tracked, killed"):
            if not finished.paths("tracked").run_dir.exists():
                at, path = "open", "checkpoint-8/trainer_state.json"
                launch_killed_at(finished, "tracked", *overrides, event=at, path=path)
        return launch(finished, "tracked", *overrides)


@pytest.mark.slow
def test_tracking_changes_no_byte_of_a_run(finished: Project, tracked: RunPaths) -> None:
    assert "resuming from step 4" in read_log(tracked)
    assert_same_outputs(tracked, finished.paths("gemma-lora"))


@pytest.mark.slow
def test_tensorboard_of_a_killed_run_equals_its_metrics(tracked: RunPaths) -> None:
    scalars, losses = read_scalars(tracked.tensorboard_dir), read_losses(tracked)
    assert len(list(tracked.tensorboard_dir.iterdir())) == 2, "one event file per attempt"
    assert dict(scalars["train/loss"]) == pytest.approx(losses) and len(
        scalars["train/loss"]
    ) == len(losses)
    evaluations = {step: row["nll_per_token"] for step, row in read_evaluations(tracked).items()}
    shown = scalars["eval/nll_per_token"]
    assert dict(shown) == pytest.approx(evaluations) and len(shown) == len(evaluations)


@pytest.mark.slow
def test_wandb_of_a_killed_run_is_one_run_with_each_step_once(tracked: RunPaths) -> None:
    attempts = read_wandb_records(tracked.run_dir)
    runs = [record.run for records in attempts for record in records if record.HasField("run")]
    assert len(attempts) == 2 and {run.run_id for run in runs} == {
        load_json(tracked.tracking_path)["wandb"]["run_id"]
    }
    for run in runs:
        assert (run.project, run.display_name, list(run.tags)) == ("lab", "shown", ["one", "two"])
        config = {update.key: json.loads(update.value_json) for update in run.config.update}
        assert (
            config["axes"] == {"model": "gemma", "loss": "completion"}
            and config["adapter"]["r"] == 4
        )
    rows = [row for records in attempts for row in read_wandb_history(records)]
    losses = read_losses(tracked)
    sent = [(row["train/global_step"], row["train/loss"]) for row in rows if "train/loss" in row]
    assert sent == [(step, losses[step]) for step, _ in sent] and sorted(set(sent)) == sent, (
        "none twice, in order"
    )
    evaluated = [row["train/global_step"] for row in rows if "eval/nll_per_token" in row]
    assert sorted(set(evaluated)) == evaluated
    # killed at step 8; calls of the second before may be lost
    second = read_wandb_history(attempts[1])
    assert [row["train/global_step"] for row in second if "train/loss" in row] == list(range(9, 16))
    assert [row["train/global_step"] for row in second if "eval/nll_per_token" in row] == [12, 15]
    assert any(name.startswith("gradients/") for row in rows for name in row)
    assert not any(name.startswith("parameters/") for row in rows for name in row)


@pytest.mark.slow
def test_wandb_gets_the_exported_model(tracked: RunPaths) -> None:
    artifacts = [
        record.artifact for records in read_wandb_records(tracked.run_dir) for record in records
    ]
    (model,) = [artifact for artifact in artifacts if artifact.name]
    assert model.name == "model-tracked" and "best" in model.aliases
    digests = {entry.path: entry.digest for entry in model.manifest.contents}
    assert digests == {
        path.name: digest_of(path.read_bytes()) for path in tracked.model_dir.iterdir()
    }


@pytest.mark.slow
def test_logs_hold_every_step_of_an_attempt(finished: Project) -> None:
    paths = finished.paths("gemma-full")
    header, *lines = paths.attempt(1).logs_path.read_text().splitlines()
    assert header.split() == ["step", "epoch", "loss", "learning_rate", "tokens/s"]
    assert {len(line) for line in (header, *lines)} == {len(header)}, "aligned"
    cells = [line.split() for line in lines]
    losses = read_losses(paths)
    assert [(row[0], row[2]) for row in cells] == [
        (f"{step}/12", f"{loss:.6f}") for step, loss in losses.items()
    ]
    assert all(float(row[4]) > 0 for row in cells)
    assert load_json(paths.attempt(1).timing_path)["tokens_per_second"] > 0
