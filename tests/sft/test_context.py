"""A training process checks its run before it does anything."""

from __future__ import annotations

import json
import os
import time

import pytest

from runner.errors import RefusedError
from runner.files import load_json
from runner.recipe.identity import derive_digest
from runner.run.record import Progress, load_progress, load_stored_recipe
from runner.sft.context import RunContext
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace
from tests.conftest import Project
from tests.support.contexts import ALONE, open_context


def test_a_run_prepared_under_other_rules_or_changed_by_hand_is_not_trained(
    project: Project,
) -> None:
    """It was prepared by an older runner, say, and is started by hand under this one."""
    project.add_model()
    assert project.cli("launch", "recipe.yaml", "--prepare", "--name", "prepared").returncode == 0
    paths = project.paths("prepared")

    def open_run() -> RunContext:
        return RunContext.open(paths.run_dir, ALONE, Preemption(paths, 1, ALONE))

    assert open_run().recipe_digest
    stored = load_stored_recipe(paths)
    content = json.loads(paths.recipe_path.read_text())
    assert stored is not None
    older = derive_digest(stored.recipe, stored.contents, rules=1)
    paths.recipe_path.write_text(json.dumps(content | {"rules": 1, "recipe_digest": older}))
    with pytest.raises(RefusedError, match="\n  rules of rows and masks: 1 -> 2 ") as refused:
        open_run()
    assert "`runner launch`" in str(refused.value)
    content["recipe"]["training"]["learning_rate"] = 1.0
    paths.recipe_path.write_text(json.dumps(content))
    with pytest.raises(RefusedError, match="but no key differs: recipe"):
        open_run()


def test_seconds_of_a_phase_are_without_those_of_phases_within_it(project: Project) -> None:
    context = open_context(project)
    path, began = context.attempt.progress_path, time.perf_counter()

    def now() -> Progress:
        progress = load_progress(path)
        assert progress is not None and progress.phase_began_at_utc is not None
        return progress

    with context.phase("restoring step 4"):
        assert now().phase == "restoring step 4"
        spend(0.02)
        context.enter_phase("training")
        with context.phase("evaluating"):
            assert now().phase == "evaluating"
            spend(0.1)
            with context.phase("generating"):
                spend(0.05)
            assert now().phase == "evaluating"
        assert now().phase == "training", "not a phase that has ended"
        context.report_progress(Progress(phase="training", step=3), is_forced=True)
        assert (now().phase, now().step) == ("training", 3)
        with context.phase("saving"):
            assert now().step == 3
    with context.phase("evaluating"):
        spend(0.02)
    total = time.perf_counter() - began
    context.write_timing(3, 1.0)
    seconds = load_json(context.attempt.timing_path)["phase_seconds"]
    assert sorted(seconds) == [
        *("evaluating", "generating", "restoring step 4", "saving", "training")
    ]
    assert seconds["evaluating"] >= 0.119 and seconds["generating"] >= 0.049
    assert 0.189 <= sum(seconds.values()) <= total + 0.01, "each second is counted once"


def test_a_phase_that_fails_is_over(project: Project) -> None:
    context = open_context(project)
    with context.phase("training"), pytest.raises(ValueError), context.phase("saving"):
        raise ValueError
    progress = load_progress(context.attempt.progress_path)
    assert progress is not None and progress.phase == "training"


def test_only_the_main_process_tells_its_phase(project: Project) -> None:
    context = open_context(project, place=WorldPlace(rank=1, world_size=2))
    with context.phase("evaluating"):
        assert not context.attempt.progress_path.exists()


def test_a_sign_of_life_touches_the_file_at_most_once_a_second(project: Project) -> None:
    context = open_context(project)
    path = context.attempt.progress_path
    context.sign_of_life()  # before there is a file, or where a full disk has taken it
    assert not path.exists()
    context = open_context(project)
    with context.phase("evaluating"):
        content = path.read_bytes()
        touched = []
        for _ in range(3):
            os.utime(path, (1, 1))
            context.sign_of_life()
            touched.append(path.stat().st_mtime != 1)
    assert touched == [True, False, False] and path.read_bytes() == content
    other = open_context(project, place=WorldPlace(rank=1, world_size=2))
    os.utime(path, (1, 1))
    other.sign_of_life()
    assert path.stat().st_mtime == 1


def spend(seconds: float) -> None:
    until = time.perf_counter() + seconds
    while time.perf_counter() < until:
        pass
