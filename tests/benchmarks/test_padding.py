"""Numbers that `benchmarks/padding.py` computes from the lengths of rows."""

from __future__ import annotations

import importlib
from pathlib import Path

import pytest

from tests.conftest import Project

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


def test_padding_is_what_fills_a_batch_to_its_longest_row(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.syspath_prepend(str(FOLDER))
    padding = importlib.import_module("padding")
    recipe = project.recipe("training.global_batch_size=4")
    mixed = [10, 90] * 16  # a pool of 8 global batches, all of the rows
    assert padding.measure_padding(mixed, recipe, 1, "random") == 0
    assert padding.measure_padding(mixed, recipe, 4, "group_by_length") == 0
    # 16 of 31 partners are of the other kind, and such a pair is padded to 2 x 90.
    mean_width = (16 * 90 + 7.5 * 90 + 7.5 * 10) / 31
    share = padding.measure_padding(mixed, recipe, 2, "random")
    assert share == pytest.approx(1 - 50 / mean_width, abs=0.02)
