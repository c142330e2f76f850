"""The weights that are used: those of a completed run, or of a checkpoint; everything else is
refused with a message.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import DataError, RefusedError
from runner.launch.run_files import prepare_run
from runner.publish.tuned import TunedRun, open_tuned_run
from runner.run.facts import read_facts
from runner.run.paths import RunPaths
from tests.conftest import Project


@pytest.fixture
def pending(project: Project) -> RunPaths:
    paths = project.paths("base")
    prepare_run(project.recipe(), {}, read_facts(paths))
    return paths


def test_a_folder_that_is_no_run_is_refused(pending: RunPaths) -> None:
    for folder in (
        pending.run_dir.parent,
        pending.run_dir.with_name("absent"),
        pending.recipe_path,
    ):
        with (
            pytest.raises(RefusedError, match="is not a run directory"),
            open_tuned_run(folder, None),
        ):
            pass


def test_a_run_that_is_not_completed_says_what_it_is(pending: RunPaths) -> None:
    with (
        pytest.raises(RefusedError, match="is not completed, it is pending") as caught,
        open_tuned_run(pending.run_dir, None),
    ):
        pass
    assert "--checkpoint best" in str(caught.value)
    with (
        pytest.raises(RefusedError, match="no checkpoint"),
        open_tuned_run(pending.run_dir, "best"),
    ):
        pass


def test_weights_without_a_chat_template_are_refused(
    pending: RunPaths, tiny_model: Callable[[str], Path]
) -> None:
    from runner.run.record import load_stored_recipe

    stored = load_stored_recipe(pending)
    assert stored is not None
    run = TunedRun(pending, stored, tiny_model("phi"), None)
    with pytest.raises(DataError, match="has no chat template"):
        run.load_tokenizer()
    assert TunedRun(pending, stored, tiny_model("llama"), None).load_tokenizer().pad_token_id == 2
