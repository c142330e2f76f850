"""A recipe is read without OmegaConf where it has nothing to do: what comes out must be the same,
for any YAML.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf

from runner.recipe.parse import _load_plain, parse_recipe
from tests.conftest import RECIPE_TEXT, ROOT


def load_by_omegaconf(text: str) -> Any:
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    return OmegaConf.to_container(config, resolve=True, throw_on_missing=True)


def describe(value: Any) -> Any:
    """A value with its types, and NaN equal to itself."""
    if isinstance(value, dict):
        return [(describe(key), describe(item)) for key, item in value.items()]
    if isinstance(value, list):
        return [describe(item) for item in value]
    return (
        type(value).__name__,
        "nan" if isinstance(value, float) and math.isnan(value) else value,
    )


def assert_same(text: str) -> bool:
    """Whether the short way was taken; the error, or what was read, must be the same."""
    try:
        expected, refusal = load_by_omegaconf(text), None
    except Exception as error:
        expected, refusal = None, error
    try:
        plain = _load_plain(text)
    except Exception as error:
        assert type(error) is type(refusal) and str(error) == str(refusal)
        return False
    if plain is not None:
        assert refusal is None and describe(plain) == describe(expected)
    return plain is not None


def test_every_committed_recipe_is_read_the_short_way() -> None:
    paths = sorted((ROOT / "recipes").glob("*/*.yaml"))
    assert len(paths) > 200
    for path in paths:
        assert assert_same(path.read_text()), path


def words(characters: str) -> st.SearchStrategy[str]:
    return st.text(alphabet=characters, max_size=8)


SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.text(max_size=6),
    words("0123456789+-eE._:xo"),
    words("${}.:\\\\a?'\"#&*!|>%@`,[] \n\t-"),
    st.sampled_from(
        [
            "???",
            "${a}",
            "\\${a}",
            "$",
            "${oc.env:HOME}",
            "no",
            "1e-5",
            "012",
            "~",
            "2026-01-01",
            "1:30",
            "",
        ]
    ),
)
KEYS = st.one_of(st.text(max_size=4), st.sampled_from(["a", "b.c", "a", "???", "${a}", "<<", "="]))
TREES = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=3),
    max_leaves=12,
)


@given(st.dictionaries(KEYS, TREES, max_size=4), st.sampled_from([None, False, True]))
@settings(max_examples=150, deadline=None)
def test_any_dumped_tree_is_read_alike(tree: dict[str, Any], is_flow: bool | None) -> None:
    assert_same(yaml.safe_dump(tree, default_flow_style=is_flow, allow_unicode=True))


LINES = st.builds(
    "{0}{1}{2}{3}".format,
    st.sampled_from(["", "  ", "    ", "- ", "  - "]),
    st.sampled_from(["a", "b", "'c'", '"a"', "<<", "? a", "1", "1e-5", "no", "~", "[x]", "=", ""]),
    st.sampled_from(
        [": ", ":", ": &x ", ": *x", ": !!str ", ": !!binary ", ": !!set ", ": !!omap ", " "]
    ),
    st.one_of(
        words("0123456789+-eE._:xo"),
        st.sampled_from(
            [
                "*x",
                "{a: 1, a: 2}",
                "[1, no]",
                "???",
                '"\\x24{a}"',
                "${b}",
                "|",
                "{<<: *x, a: 2}",
                "# c",
                "~",
            ]
        ),
    ),
)


@given(st.lists(LINES, max_size=5).map("\n".join))
@settings(max_examples=500, deadline=None)
def test_any_text_is_read_alike(text: str) -> None:
    assert_same(text)


@pytest.mark.parametrize(
    "value", ["1e-5", "1E5", "no", "012", "0o12", "1_000", ".5", "2026-01-01", "1:30", "on", "0x1f"]
)
def test_what_yaml_reads_in_its_own_way_is_read_as_before(value: str) -> None:
    assert assert_same(f"a: {value}\nb: [{value}]\n")


@pytest.mark.parametrize(
    "text",
    [
        "a: ${b}\nb: 1",
        'a: "\\x24{b}"\nb: 1',
        "a: ???",
        "a: {1: b}",
        "a: !!binary aGk=",
        "- a",
        "a",
        "",
        "7",
    ],
)
def test_what_omegaconf_has_to_read_it_reads(text: str) -> None:
    assert not assert_same(text)


def test_both_ways_give_equal_recipes() -> None:
    text = json.loads(json.dumps(RECIPE_TEXT))
    assert _load_plain(text) is not None
    referring = text.replace("seed: 7", "seed: ${training.seed}").replace("seed: 3", "seed: 7")
    assert _load_plain(referring) is None
    assert parse_recipe(referring, where="x") == parse_recipe(
        text.replace("seed: 3", "seed: 7"), where="x"
    )


def test_aliases_beyond_the_limit_are_refused_alike(tmp_path: Path) -> None:
    bomb = "a0: &a0 [x, x]\n" + "".join(
        f"a{n}: &a{n} [*a{n - 1}, *a{n - 1}]\n" for n in range(1, 20)
    )
    with pytest.raises(yaml.constructor.ConstructorError, match="expansion"):
        _load_plain(bomb)
    assert not assert_same(bomb)
