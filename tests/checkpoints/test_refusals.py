"""Refusals before any device time: every key of a recipe that changes between two attempts, every
file, launch and library; a refusal leaves nothing behind.
"""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest

from runner.checkpoints.archive import write_archive
from runner.checkpoints.choose import look_ahead, read_inventory
from runner.checkpoints.retention import strip_checkpoint
from runner.cli.main import main
from runner.errors import DataError, RefusedError
from runner.files import write_json_atomic
from runner.launch.attempt import start_attempt
from runner.launch.command import LaunchCommand
from runner.launch.run_files import prepare_run
from runner.plan.decide import Decision, Launch, decide
from runner.plan.select import Selected
from runner.plan.status import RunStatus, read_status
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.identity import build_resume_fingerprint, derive_digest, load_launch_settings
from runner.recipe.parse import Recipe
from runner.run.facts import read_facts
from runner.run.lease import is_leased
from runner.run.paths import RunPaths, content_cache_path, marker_path
from runner.run.record import RunRecord, load_record, write_record
from tests.recipe.test_identity import (
    CANNOT_CHANGE_ALONE,
    KINDS,
    MAKES_A_KIND,
    PLACEMENT_KINDS,
    change,
    list_keys,
    parse,
)
from tests.support.fake_checkpoints import flip_bit, interrupt
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.settled import settle

__all__ = ["fake"]

# Keys that may change between two attempts of a run, and why the results cannot change.
MAY_CHANGE = {
    "run.grid": "names the directory: another grid is another run",
    "run.name": "names the directory: another name is another run",
    "run.axes": "labels for reports; what they stand for is elsewhere in the recipe",
    "run.overrides": "how the recipe came about, not what it says",
    "run.declared": "what is asked of the runs; each keeps what its first attempt recorded",
    "launch.retries.transient": "how often, not what",
    "launch.retries.lost": "how often, not what",
    "launch.retries.out_of_memory": (
        "permits a start at step 0 in smaller micro-batches; never a resume in them"
    ),
    "launch.retries.stalled": "how often, not what",
    "launch.retries.backoff_seconds": "when, not what",
    "launch.stall_minutes": "how long a silence is waited for",
    "launch.on_version_change": "decides about a change, and is none",
    "checkpoints.keep_latest": (
        "the best one always stays, and nothing that is computed depends on others"
    ),
    "checkpoints.keep_best": "as above",
    "checkpoints.save_optimizer": "of older checkpoints; a stripped one is never resumed",
    "checkpoints.archive": "a copy",
    "checkpoints.remote": "a copy",
    "checkpoints.remote.url": "a copy",
    "checkpoints.remote.options": "a copy",
    "checkpoints.remote.num_retries": "how often, not what",
    "checkpoints.remote.load": "what is loaded is held against the same fingerprint",
    "tracking.report_to": "who is told, not what",
    "tracking.project": "where it is shown",
    "tracking.run_name": "where it is shown",
    "tracking.tags": "where it is shown",
    "tracking.watch": "reads gradients, changes none",
    "tracking.log_steps": "how often trackers are told",
    "tracking.log_model": "a copy",
    "tracking.hub_model_id": "where `runner export` sends the model",
    "tracking.hub_private": "where `runner export` sends the model",
    "tracking.hub_push": "when the model is sent",
}


@pytest.fixture(autouse=True)
def files(fake: FakeLauncher) -> None:
    """The files that the recipes name beyond the fake's own, and those that the proposed values
    name.
    """
    for name in ("chat.jinja", "one.jsonl", "two.jsonl", "rows.py", "scores.py", "one.py"):
        (fake.root / name).write_text(name)
    (fake.root / "one").write_text("use_cpu: false\n")


def contents_of(recipe: Recipe) -> dict[str, str]:
    return hash_contents(recipe, ContentHashes(Path("cache.json")))


def judge(paths: RunPaths, recipe: Recipe, **asked: Any) -> tuple[Decision, RunStatus]:
    status = read_status(read_facts(paths), recipe, contents_of(recipe), **asked)
    return decide(status), status


def refusal_of(paths: RunPaths, recipe: Recipe) -> list[str] | None:
    """The lines with which the launch side refuses; None if it launches."""
    try:
        decision, status = judge(paths, recipe)
    except DataError as error:
        quoted = re.findall(r"`(\w+: [^`]*)`", error.message)  # a key that means nothing there
        return [*quoted, *(line.strip() for line in error.message.splitlines()[1:])]
    if decision.action == "launch":
        assert not status.differences and not status.obstacles
        return None
    assert decision.action == "refuse", decision
    return [*status.differences, *status.obstacles]


def names(lines: list[str], key: str) -> bool:
    """True if one of the lines is about the key: by its dotted name, or as the fingerprint calls
    it.
    """
    last = key.rpartition(".")[2]
    starts = (f"{key}:", f"{key}.", f"{last}:", f"{last}.")
    return any(line.startswith(starts) for line in lines)


def test_every_key_that_changes_between_attempts_is_refused_and_named_but_for_a_short_list(
    tmp_path: Path,
) -> None:
    tried, keys = set(), set()
    for number, overrides in enumerate([*KINDS, *PLACEMENT_KINDS]):
        recipe = parse(*overrides)
        paths = interrupt(recipe, RunPaths(tmp_path / f"run-{number}"))
        assert refusal_of(paths, recipe) is None, "nothing changed"
        for key, annotation in list_keys(recipe):
            keys.add(key)
            changed = None if key in tried else change(recipe, key, annotation)
            if changed is None:
                continue
            tried.add(key)
            lines = refusal_of(paths, changed)
            if key in MAY_CHANGE:
                assert lines is None, f"{key}: {lines}"
            else:
                assert lines is not None and names(lines, key), f"{key}: {lines}"
    assert keys - tried == CANNOT_CHANGE_ALONE | MAKES_A_KIND, "a new key has to be tried"
    assert keys >= MAY_CHANGE.keys() and all(MAY_CHANGE.values())


def test_another_kind_of_section_is_refused_and_named(tmp_path: Path) -> None:
    paths = interrupt(parse(), RunPaths(tmp_path / "run"))
    for overrides in KINDS[1:]:
        lines = refusal_of(paths, parse(*overrides))
        assert lines is not None and any(
            names(lines, override.partition("=")[0]) for override in overrides
        ), lines


@pytest.mark.parametrize("path", ["data.jsonl", "models/toy/config.json", "chat.jinja"])
def test_other_content_of_a_file_is_refused_and_named(path: str, tmp_path: Path) -> None:
    recipe = parse("model.chat_template=chat.jinja")
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    Path(path).write_text("other content")
    lines = refusal_of(paths, recipe)
    assert lines is not None and any(
        line.startswith("content of ")
        and line.split(":")[0].endswith("models/toy" if "toy" in path else path)
        for line in lines
    )
    with pytest.raises(RefusedError, match="content of"):
        prepare_run(recipe, contents_of(recipe), read_facts(paths))


def test_how_processes_start_counts_by_what_the_files_say_and_not_by_their_names(
    tmp_path: Path,
) -> None:
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 3}}))
    Path("zero.yaml").write_text(
        "distributed_type: DEEPSPEED\ndeepspeed_config: {deepspeed_config_file: ds.json}\n"
    )
    recipe = parse("launch.accelerate_config=zero.yaml")
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    shutil.copy("ds.json", "moved.json")
    Path("moved.yaml").write_text(
        "# with a comment, and where processes start\nnum_machines: 4\nmain_process_port:"
        " 0\ndeepspeed_config: {deepspeed_config_file: moved.json, deepspeed_multinode_launcher:"
        " standard}\ndistributed_type: DEEPSPEED\n"
    )
    assert refusal_of(paths, parse("launch.accelerate_config=moved.yaml")) is None
    Path("ds.json").write_text(json.dumps({"zero_optimization": {"stage": 2}}))
    stage = (
        "accelerate_config.deepspeed_config.deepspeed_config_file.zero_optimization.stage: 3 -> 2"
    )
    assert refusal_of(paths, recipe) == [stage]
    Path("ds.json").unlink()
    assert "ds.json is not there" in str(refusal_of(paths, recipe))


@pytest.mark.parametrize("content", [b"", b"[1]", b"a: [", b"\xff\x00", b"deepspeed_config: 3"])
def test_a_strange_launch_config_is_no_traceback(content: bytes) -> None:
    Path("strange.yaml").write_bytes(content)
    load_launch_settings(Path("strange.yaml"))


def test_another_number_of_processes_is_refused_where_it_is_asked_for(tmp_path: Path) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    decision, status = judge(paths, recipe, num_processes=1)
    assert (
        decision.action == "refuse"
        and status.state == "interrupted"
        and status.checkpoint_step == 4
    )
    assert status.obstacles == ("gradient_accumulation_steps: 4 -> 12", "num_processes: 3 -> 1")
    assert (
        "step 4 cannot be resumed: gradient_accumulation_steps: 4 -> 12, num_processes: 3 -> 1"
        in status.notes
    )
    decision, status = judge(paths, recipe, num_processes=5)
    assert decision.action == "refuse" and "24" in status.obstacles[0], (
        "the global batch does not divide"
    )


@pytest.mark.parametrize("policy", ["warn", "refuse"])
def test_a_library_that_changed_since_the_checkpoint_warns_or_refuses(
    policy: str, tmp_path: Path
) -> None:
    recipe = parse(f"launch.on_version_change={policy}")
    versions = build_resume_fingerprint(recipe, "d", 3, threads="1")["versions"]
    paths = interrupt(
        recipe, RunPaths(tmp_path / "run"), versions=versions | {"torch": "2.0", "trl": "absent"}
    )
    decision, status = judge(paths, recipe)
    lines = (
        f'versions.torch: "2.0" -> "{versions["torch"]}"',
        f'versions.trl: "absent" -> "{versions["trl"]}"',
    )
    if policy == "refuse":
        assert decision.action == "refuse" and (status.obstacles, status.version_changes) == (
            lines,
            (),
        )
    else:
        assert decision.action == "launch" and (status.obstacles, status.version_changes) == (
            (),
            lines,
        )
    assert all(line in status.notes for line in lines) and "step 4" in status.notes


def test_threads_count_once_they_are_known(tmp_path: Path) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    digest = derive_digest(recipe, contents_of(recipe))

    def changes(recipe: Recipe, threads: str | None) -> tuple[str, ...]:
        choice = look_ahead(read_inventory(paths), recipe, digest, 3, threads=threads)
        assert choice.decisive_step is not None
        return choice.version_warnings or choice.obstacles

    assert changes(recipe, None) == changes(recipe, "1") == ()
    assert changes(recipe, "7") == ('versions.OMP_NUM_THREADS: "1" -> "7"',)


def test_the_newest_marker_that_can_be_read_decides(tmp_path: Path) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"), num_processes=2)
    interrupt(recipe, paths, step=8)
    assert refusal_of(paths, recipe) is None
    write_archive(paths.checkpoint_dir(8), paths.archive_path(8))
    shutil.rmtree(paths.checkpoint_dir(8))
    assert refusal_of(paths, recipe) is None, "an archive alone is restored"
    paths.archive_path(8).write_bytes(b"no archive")
    assert refusal_of(paths, recipe) == ["num_processes: 2 -> 3"]
    flip_bit(marker_path(paths.checkpoint_dir(4)))
    assert refusal_of(paths, recipe) is None, "nothing to resume: it starts at step 0"


def test_a_stripped_one_is_shown_and_the_one_before_it_decides(tmp_path: Path) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    interrupt(recipe, paths, step=8)
    strip_checkpoint(paths.checkpoint_dir(8))
    decision, status = judge(paths, recipe)
    assert (decision.action, status.checkpoint_step) == ("launch", 8)
    assert (status.step, status.max_steps) == (8, recipe.training.max_steps), "no attempt trained"
    shutil.rmtree(paths.checkpoint_dir(4))
    interrupt(recipe, paths, num_processes=2)
    decision, status = judge(paths, recipe)
    assert (decision.action, status.checkpoint_step) == ("refuse", 4), (
        "as the training process does"
    )
    assert status.obstacles == ("num_processes: 2 -> 3",)


def test_what_is_named_by_resume_decides_instead(tmp_path: Path) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"), num_processes=2)
    elsewhere = interrupt(recipe, RunPaths(tmp_path / "copy"))
    write_archive(elsewhere.checkpoint_dir(4), elsewhere.archive_path(4))
    for resume, action in {
        "auto": "refuse",
        "latest": "refuse",
        "best": "refuse",
        "none": "launch",
        "s3://bucket/step-4.zip": "launch",  # the training process reads it
        str(elsewhere.checkpoint_dir(4)): "launch",
        str(elsewhere.archive_path(4)): "launch",
        str(paths.checkpoint_dir(4)): "refuse",
        str(tmp_path / "nowhere"): "launch",  # the training process reports the error
    }.items():
        assert judge(paths, recipe, resume=resume)[0].action == action, resume


def test_smaller_micro_batches_after_running_out_of_memory_are_a_new_start_and_no_obstacle(
    tmp_path: Path,
) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    (attempt,) = load_record(paths).attempts
    write_record(
        paths, RunRecord(attempts=(attempt.model_copy(update={"micro_batch_divisor": 2}),))
    )
    assert refusal_of(paths, recipe) is None
    assert refusal_of(paths, parse("launch.num_processes=1")) is None, (
        "nothing from before is resumed, even if other things changed"
    )
    interrupt(recipe, paths, step=8, **_cut(recipe, 2))
    write_record(
        paths, RunRecord(attempts=(attempt.model_copy(update={"micro_batch_divisor": 2}),))
    )
    assert refusal_of(paths, recipe) is None, "resumed in the same smaller ones"
    lines = refusal_of(paths, parse("launch.num_processes=1"))
    assert lines is not None and "num_processes: 3 -> 1" in lines, (
        "and nothing else may change with them"
    )
    changed = {**_cut(recipe, 2), "per_device_eval_batch_size": 7}
    interrupt(recipe, paths, step=12, **changed)
    write_record(
        paths, RunRecord(attempts=(attempt.model_copy(update={"micro_batch_divisor": 2}),))
    )
    lines = refusal_of(paths, recipe)
    assert lines is not None and names(lines, "per_device_eval_batch_size"), (
        "only other micro-batches of training are left behind"
    )
    shutil.rmtree(paths.checkpoint_dir(12))
    write_record(paths, RunRecord(attempts=(attempt,)))
    assert refusal_of(paths, recipe) is not None, "and never in larger ones again"


def _cut(recipe: Recipe, divisor: int) -> Mapping[str, Any]:
    return build_resume_fingerprint(
        recipe, derive_digest(recipe, contents_of(recipe)), 3, divisor, threads="1"
    )


def test_a_run_whose_record_is_lost_is_still_held_against_its_checkpoint(tmp_path: Path) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"))
    paths.record_path.unlink()
    assert judge(paths, recipe)[0].action == "launch"
    decision, status = judge(paths, recipe, num_processes=1)
    assert (decision.action, status.state) == ("refuse", "pending")


def test_completed_and_running_runs_are_skipped_whatever_they_were_launched_with(
    tmp_path: Path,
) -> None:
    recipe = parse()
    paths = interrupt(recipe, RunPaths(tmp_path / "run"), num_processes=2)
    score = dict(
        num_rows=1,
        num_completion_tokens=1,
        num_tokens=1,
        num_bytes=1,
        completion_nll_sum=1.0,
        nll_sum=1.0,
    )
    result = dict(
        outcome="completed",
        stop_reason="max_steps",
        num_steps=2,
        best_step=2,
        best_metric=1.0,
        metric="m",
    )
    digest = derive_digest(recipe, contents_of(recipe))
    write_json_atomic(
        paths.result_path,
        result
        | {
            "recipe_digest": digest,
            "num_train_rows": 1,
            "base": {"test": score},
            "tuned": {"test": score},
        },
    )
    decision, status = judge(paths, recipe)
    assert decision.action == "skip" and status.obstacles == () and status.checkpoint_step is None


# With a scripted `accelerate`, which is not called.


def interrupt_fake(fake: FakeLauncher, name: str, **changed: Any) -> RunPaths:
    from runner.recipe.parse import load_recipe

    fake.add(name, num_processes=1)
    return interrupt(load_recipe(Path("recipes/toy", f"{name}.yaml")), fake.paths(name), **changed)


def test_a_refused_launch_touches_nothing_and_names_what_to_type(fake: FakeLauncher) -> None:
    interrupt_fake(fake, "a", num_processes=2, gradient_accumulation_steps=2)
    before = fake.tree()
    for more in ((), ("--prepare",)):
        process = fake.start("launch", "recipes/toy/a.yaml", *more)
        _, errors = process.communicate()
        assert process.returncode == 2
        assert "step 4 cannot be resumed exactly" in errors
        assert "\n  gradient_accumulation_steps: 2 -> 4\n  num_processes: 2 -> 1\n" in errors
        assert "hint: runner launch recipes/toy/a.yaml --num-processes 2  # as before\n" in errors
        assert "runner launch recipes/toy/a.yaml --fresh  # moves" in errors
    after = fake.tree()
    changed = {name for name in after.keys() | before.keys() if after.get(name) != before.get(name)}
    assert changed <= {"runs", "runs/.content_hashes.json"} and not fake.events()
    done = fake.start("launch", "recipes/toy/a.yaml", "--num-processes", "2")
    assert done.wait() == 0 and fake.started() == ["a"] and len(fake.attempts("a")) == 2


def test_a_sweep_refuses_one_run_launches_the_others_and_needs_no_retry_failed_later(
    fake: FakeLauncher,
) -> None:
    paths = interrupt_fake(fake, "a", num_machines=2)
    fake.add("b")
    process = fake.start("sweep", "recipes/toy")
    output, _ = process.communicate()
    assert process.returncode == 1 and fake.started() == ["b"]
    assert "refuse  toy/a  interrupted" in output and "\n          num_machines: 2 -> 1" in output
    assert len(fake.attempts("a")) == 1, "no failed attempt was left behind"
    status = fake.start("status", "recipes/toy/a.yaml").communicate()[0]
    assert "interrupted" in status and "step 4 cannot be resumed: num_machines: 2 -> 1" in status
    shutil.rmtree(paths.checkpoints_dir)
    again = fake.start("sweep", "recipes/toy")
    assert again.wait() == 0 and fake.started() == ["b", "a"]


def test_a_finished_grid_is_the_same_to_the_byte_however_often_it_is_run_again(
    fake: FakeLauncher,
) -> None:
    fake.add("a", "b", "c")
    assert main(["sweep", "recipes/toy", "--slots", "2"]) == 0
    settle(content_cache_path(Path("runs")))  # otherwise hashes of such new files are kept again
    before, num_started = fake.tree(), len(fake.events())
    for words in (
        ["sweep", "recipes/toy"],
        ["rerun", "recipes/toy"],
        ["launch", "recipes/toy/b.yaml"],
    ) * 3:
        assert main(words) == 0 and fake.tree() == before, words
    assert len(fake.events()) == num_started


def test_a_start_is_refused_under_the_lease_too(fake: FakeLauncher) -> None:
    """The plan of an engine can be older than another launch."""
    from runner.recipe.parse import load_recipe

    paths = interrupt_fake(fake, "a", num_processes=2)
    recipe = load_recipe(Path("recipes/toy/a.yaml"))
    command = LaunchCommand(("accelerate", "launch", str(paths.run_dir)), {"OMP_NUM_THREADS": "1"})
    recipe_bytes = paths.recipe_path.read_bytes()
    changed = recipe.model_copy(
        update={"tracking": recipe.tracking.model_copy(update={"tags": ("new",)})}
    )
    with pytest.raises(RefusedError, match="num_processes: 2 -> 1"):
        start_attempt(
            Launch(Selected(changed, Path("a.yaml"), paths), contents_of(recipe), 1), command
        )
    assert (
        len(load_record(paths).attempts) == 1
        and not is_leased(paths.lease_path)
        and not fake.events()
    )
    assert paths.recipe_path.read_bytes() == recipe_bytes, (
        "nothing of the new launch was written down"
    )
