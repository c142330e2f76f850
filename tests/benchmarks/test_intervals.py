"""The short version of `benchmarks/intervals.py`: intervals and tests meet their bars."""

from __future__ import annotations

import importlib
import pickle
from pathlib import Path
from types import ModuleType

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture
def intervals(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(FOLDER))
    return importlib.import_module("intervals")


def test_effects_meet_their_bars(intervals: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    code = intervals.main(["--quick", "--processes", "1"])
    text = capsys.readouterr().out
    assert code == 0, text
    assert "| base, paired, power |" in text and "0 figures beyond their bar" in text


def test_another_process_compares_base_by_its_references(intervals: ModuleType) -> None:
    sent = pickle.loads(pickle.dumps(intervals.BASE))
    assert intervals.list_designs(sent) == ["paired", "Welch", "pool of 4"]


def test_a_share_beyond_its_bar_is_marked(intervals: ModuleType) -> None:
    figure = intervals.Figure("rate", 0.09, 0.0, 0.065, 1000)
    assert figure.is_missed(0.0) and figure.is_missed(3.0)
    assert not intervals.Figure("rate", 0.08, 0.0, 0.065, 1000).is_missed(3.0)
    assert intervals.Figure("rate", float("nan"), 0.0, 0.065, 1000).is_missed(3.0)
    table = intervals.format_table([intervals.Line("base", "3 x 100", (figure,))], 0.0)
    assert table.splitlines()[-1] == "| base | .090! |"
