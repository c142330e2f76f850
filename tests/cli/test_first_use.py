"""The first hour of somebody new: what is missing, mistyped or in the wrong place is said in words,
before anything is started or moved.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from runner.cli.main import main
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]


@pytest.mark.parametrize("is_whole_once", [True, False])
def test_a_model_without_weights_is_refused_before_anything_is_moved(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], is_whole_once: bool
) -> None:
    fake.add("a")
    if is_whole_once:
        assert main(["sweep", "recipes/toy"]) == 0
    (fake.root / "models/toy/model.safetensors").unlink()
    before, recipe = fake.tree(), "recipes/toy/a.yaml"
    capsys.readouterr()
    for words in (
        ["sweep", "recipes/toy"],
        ["sweep", "recipes/toy", "--fresh", "--yes"],
        ["launch", recipe],
        ["launch", recipe, "--fresh"],
        ["check", recipe],
    ):
        for option in [[]] if words[0] == "check" else [["--dry-run"], []]:
            assert main([*words, *option]) == 2, words
            output = capsys.readouterr()
            assert "models/toy/model.safetensors" in output.err, words
            assert "hint: a model's folder holds config.json and model.safetensors" in output.err
            assert "--fresh" not in output.out + output.err
    assert main(["why", recipe]) == 0
    assert "missing     model.path: models/toy/model.safetensors" in capsys.readouterr().out
    assert main(["status", recipe]) == 0
    output = capsys.readouterr()
    state = "completed" if is_whole_once else "pending"
    assert f"toy/a  {state}" in output.out and "changed" not in output.out
    assert "inputs missing: models/toy/model.safetensors" in output.out
    assert fake.tree() == before
