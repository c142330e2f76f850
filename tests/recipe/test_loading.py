"""YAML is read as OmegaConf reads it, but for references, which nothing resolves, and for plain
values that mean something else than they look like: what comes out must be the same, for any text.
"""

from __future__ import annotations

import contextlib
import math
import re
import time
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import GrammarParseError
from pydantic import ConfigDict

from runner.errors import CONTROLS, RecipeError
from runner.recipe.parse import parse_yaml
from runner.recipe.problems import escape_text, read_escapes
from runner.strict import Section
from tests.conftest import ROOT


class Anything(Section):
    """A file that may hold any keys."""

    model_config = ConfigDict(extra="allow")


def read(text: str) -> dict[str, Any]:
    extra = parse_yaml(text, Anything, where="any.yaml").model_extra
    assert extra is not None
    return extra


def load_by_omegaconf(text: str) -> tuple[Any, bool]:
    """The value, and whether it is one that a recipe may hold without looking anything up."""
    if not isinstance(yaml.safe_load(text), dict | None):
        raise ValueError("OmegaConf makes a mapping of a text")
    config = OmegaConf.create(text)
    assert isinstance(config, DictConfig)
    unresolved = OmegaConf.to_container(config, resolve=False)
    is_literal = all(
        read_escapes(leaf) is not None for leaf in list_leaves(unresolved) if isinstance(leaf, str)
    )
    value = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    return value, is_literal and all(map(is_usable, list_leaves(value, keys=True)))


def list_leaves(value: Any, *, keys: bool = False) -> list[Any]:
    """Every value that is no mapping and no list; with `keys` also those, in a tuple where they are
    no texts.
    """
    if isinstance(value, list):
        return [leaf for item in value for leaf in list_leaves(item, keys=keys)]
    if not isinstance(value, dict):
        return [value]
    leaves = list_leaves(list(value.values()), keys=keys)
    names = [name if isinstance(name, str) else (name,) for name in value]
    return leaves + (names if keys else [])


def is_usable(leaf: Any) -> bool:
    if isinstance(leaf, str):
        return CONTROLS.search(leaf) is None
    if isinstance(leaf, float):
        return math.isfinite(leaf)
    return leaf is None or (isinstance(leaf, int) and abs(leaf) < 2**63)


def describe(value: Any) -> Any:
    """A value with its types; the order of keys is none of ours."""
    if isinstance(value, dict):
        return {key: describe(item) for key, item in value.items()}
    if isinstance(value, list):
        return [describe(item) for item in value]
    return (type(value).__name__, value)


def assert_same(text: str) -> bool:
    """True if the text was accepted; then OmegaConf reads the same. Every text that OmegaConf reads
    without looking anything up must be accepted.
    """
    try:
        expected, is_usable = load_by_omegaconf(text)
    except Exception:  # it lets all kinds out
        with pytest.raises(RecipeError):
            read(text)
        return False
    if not is_usable:
        with pytest.raises(RecipeError):
            read(text)
        return False
    try:
        found = read(text)
    except RecipeError as error:
        assert all("in quotes" in problem.what for problem in error.problems), error
        assert holds_doubtful_value(text), error
        return False
    assert describe(found) == describe(expected)
    return True


def holds_doubtful_value(text: str) -> bool:
    """True if the text has a plain value that looks like a date, a clock time, a switch, or a
    number with a leading zero or underscores.
    """
    return any(
        isinstance(token, yaml.ScalarToken)
        and token.plain
        and re.fullmatch(
            r"(?i)y|n|yes|no|on|off|=|[-+]?0[0-9_o].*|[-+]?[0-9_.]+:.*|[-+]?[0-9.]*_.*|\d{4}-\d.*"
            r"|[-+]?[0-9][0-9_.]*",  # as a key
            token.value,
        )
        for token in yaml.scan(text)
    )


def test_every_committed_recipe_is_read_alike() -> None:
    paths = sorted((ROOT / "recipes").glob("*/*.yaml"))
    assert len(paths) > 200
    for path in paths[::10]:
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
    st.sampled_from(["a", "b", "'c'", '"a"', "<<", "? a", "1", "1e-5", "no", "~", "[x]", ""]),
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
    "value",
    ["1e-5", "1E5", "1_000", ".5", "0x1f", "0b11", "0", "-0.5", "true", "False", "~", "null"]
    + ["1.5e5", "1.e5", "+10e5", ".5e5", "1e5_0", "-1E+5", "1:30.5e5", ".5e+5", "12:75", "0:30"],
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
        "a: !!set {b}",
        "a: !!omap [b: 1]",
        "a: &a [*a]",
        "a: 1\nb: {c: 2, c: 2}",
        "a: 1\nb: {c: 2, 'c': 2}",
        "- a",
        "a",
        "7",
    ],
)
def test_what_is_refused(text: str) -> None:
    assert not assert_same(text)


@given(words("\\${}?. ab"))
@example("\\\\\\${a}\\")
@example("\\${a} \\\\${b}")
@example("\\???")
@example("a ???")
@settings(max_examples=500, deadline=None)
def test_backslashes_mean_what_they_mean_to_omegaconf(text: str) -> None:
    meant = read_escapes(text)
    if meant is not None:
        config = OmegaConf.create({"a": text})
        assert OmegaConf.to_container(config, resolve=True, throw_on_missing=True) == {"a": meant}
    else:
        with contextlib.suppress(GrammarParseError):
            config = OmegaConf.create({"a": text})
            assert OmegaConf.is_interpolation(config, "a") or OmegaConf.is_missing(config, "a")
    assert read_escapes(escape_text(text)) == text


def test_many_backslashes_take_no_time() -> None:
    backslashes, before = "\\" * 100_000, time.process_time()
    assert read(f"a: {backslashes} \\${{a}}") == {"a": f"{backslashes} ${{a}}"}
    assert time.process_time() - before < 2  # with the square of their number, a minute


def test_no_key_comes_twice_not_even_where_omegaconf_takes_the_last() -> None:
    with pytest.raises(RecipeError, match=r"line 2 .*found duplicate key ="):
        read("=: 1\n=: 2\n")


def test_values_are_counted_as_often_as_aliases_repeat_them() -> None:
    def build(count: int) -> str:
        return f"a: &a [{', '.join('x' * 90)}]\nb: [{', '.join(['*a'] * count)}]\n"

    assert assert_same(build(100))
    with pytest.raises(RecipeError, match="more than 10,000 values, aliases expanded"):
        read(build(110))
