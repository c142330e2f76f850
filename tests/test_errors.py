"""An error prints the place, the value found, the values accepted, and a hint."""

from __future__ import annotations

import pytest

from runner.errors import CorruptFileError, Problem, RecipeError, RunnerError


def test_all_problems_stand_in_one_table() -> None:
    problems = [
        Problem("training.learning_rate", "got the text 'fast', expected a number", 31),
        Problem("early_stopping.patiense", "unknown key, did you mean `patience`?", 44),
        Problem("loss", "got the text 'x', expected full or completion"),
    ]
    error = RecipeError("recipes/a/b.yaml", problems, hint="runner render a")
    assert str(error) == (
        "recipes/a/b.yaml has 3 problems\n"
        "\n"
        "  line 31   training.learning_rate   got the text 'fast', expected a number\n"
        "  line 44   early_stopping.patiense  unknown key, did you mean `patience`?\n"
        "  override  loss                     got the text 'x', expected full or completion\n"
        "\n"
        "hint: runner render a"
    )
    assert error.problems == tuple(problems) and error.where == "recipes/a/b.yaml"


def test_one_problem_is_not_called_problems() -> None:
    assert str(RecipeError("r.yaml", [Problem("a", "is missing", 1)])).startswith(
        "r.yaml has 1 problem\n"
    )


def test_without_a_hint_there_is_no_empty_one() -> None:
    assert str(RunnerError("no such grid")) == "no such grid"


def test_who_verifies_files_catches_a_damaged_one_as_a_value_error() -> None:
    with pytest.raises(ValueError):
        raise CorruptFileError("x is not JSON")
    assert issubclass(CorruptFileError, RunnerError)
