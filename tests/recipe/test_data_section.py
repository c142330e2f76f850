"""Several sources of training rows: their shares, and refusals."""

from __future__ import annotations

import pytest

from tests.recipe.test_parse import edit, parse, problems_of

SEVERAL = edit(
    "train: {path: data.jsonl}",
    "train: [{path: a.jsonl, num_samples: 10}, {path: b, split: train, num_samples: 20}]",
)


def test_training_rows_may_come_from_several_sources() -> None:
    data = parse(text=SEVERAL).data
    assert [source.path for source in data.train_sources] == ["a.jsonl", "b"]
    assert (data.train_shares, data.num_train_samples, data.num_train_rows) == ((10, 20), None, 30)
    assert [source.states_split for source in data.train_sources] == [False, True]
    assert list(data.sources) == ["train.0", "train.1"]
    assert parse("data.num_train_samples=12", text=SEVERAL).data.num_train_rows == 12
    weighted = "data.train=[{path: a, weight: 1}, {path: b, weight: 0.5}]"
    data = parse(weighted, "data.num_train_samples=7").data
    assert data.train_shares == (1.0, 0.5) and data.num_train_rows == 7


def test_one_source_has_no_shares() -> None:
    data = parse("data.validation={path: v}").data
    assert data.train_sources == (data.train,)
    assert (data.train_shares, data.num_train_rows) == (None, None)
    assert list(data.sources) == ["train", "validation"]


@pytest.mark.parametrize(
    ("old", "new", "key", "words"),
    [
        ("num_samples: 20", "weight: 2", "data", "each source of `train` states its share"),
        (", num_samples: 20", "", "data", "all of them `num_samples` or all of them `weight`"),
        ("num_samples: 20", "num_samples: 0", "data.train.1.num_samples", "got 0"),
        ("num_samples: 20", "wieght: 2", "data.train.1.wieght", "did you mean `weight`?"),
        ("path: a.jsonl, num_samples: 10", "num_samples: 10", "data.train.0.path", "is missing"),
        (
            "seed: 3",
            "seed: 3\n  num_train_samples: 31",
            "data",
            "is more than the sources of `train` have",
        ),
    ],
)
def test_wrong_shares_are_refused(old: str, new: str, key: str, words: str) -> None:
    problems = problems_of(text=SEVERAL.replace(old, new))
    assert [one for one in problems if one.key == key and words in one.what], problems


@pytest.mark.parametrize("weight", ["0", "-1", ".inf", "a"])
def test_a_weight_is_a_number_above_zero(weight: str) -> None:
    second = f"{{path: b, weight: {weight}}}"
    problems = problems_of(
        f"data.train=[{{path: a, weight: 1}}, {second}]", "data.num_train_samples=3"
    )
    assert [one.key for one in problems] == ["data.train.1.weight"]


def test_weights_need_a_number_of_rows() -> None:
    (problem,) = problems_of("data.train=[{path: a, weight: 1}]")
    assert "`num_train_samples` is needed" in problem.what
    (problem,) = problems_of("data.train={path: a, weight: 1}")
    assert problem.what.startswith("does not go with `a single source`, which accepts path, config")
    (problem,) = problems_of("data.train=[]")
    assert problem.key == "data.train"


def test_an_override_of_sources_says_which() -> None:
    name = "data.train"
    for part in (".path", "[0].path", ".0.path"):
        (problem,) = problems_of(f"{name}{part}=x", text=SEVERAL)
        assert (problem.key, problem.line) == (f"{name}{part}", None)
        assert "`data.train` is a list here: override the whole list" in problem.what
    assert parse("data.train={path: x}", text=SEVERAL).data.train_sources[0].path == "x"
    assert parse("data.train.path=x", "data.train.split=b").data.sources["train"].split == "b"
    one = parse("data.train=[{path: x, num_samples: 1}]").data
    assert one.train_shares == (1,) and one.num_train_rows == 1
    two = "data.train=[{path: x, num_samples: 1}, {path: b, num_samples: 1}]"
    assert parse(two, text=SEVERAL).data.num_train_rows == 2
