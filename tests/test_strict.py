"""A frozen value cannot be changed, and thaws to its original."""

from __future__ import annotations

import pytest

from runner.strict import freeze, thaw


def test_frozen_values_thaw_to_what_they_were() -> None:
    value = {"a": [1, {"b": [2]}], "c": None}
    frozen = freeze(value)
    assert thaw(frozen) == value
    with pytest.raises(TypeError):
        frozen["a"] = 1
    with pytest.raises(TypeError):
        frozen["a"][1]["b"] = 1
    assert frozen["a"][1]["b"] == (2,)
