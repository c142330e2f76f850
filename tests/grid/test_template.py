"""The `yaml` filter, which must give back any value, and the sandbox around templates."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError, TemplateSyntaxError
from omegaconf import OmegaConf

from runner.errors import GridError, RunnerError
from runner.grid.render import render_grid
from runner.grid.template import build_sandbox, locate_error, quote_yaml, run_limited
from tests.support.toy_grid import GRID, build_toy

texts = st.text(st.characters(exclude_categories=["Cs"])) | st.text(
    "\\${}?:. ab\n\"'#-[],&*!|>%@`~", max_size=30
)
scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | texts
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner) | st.dictionaries(texts, inner), max_leaves=12
)


def read_back(text: str) -> Any:
    """The value of the key `a`, as OmegaConf reads a file; so is a recipe, says `test_loading`."""
    config = OmegaConf.merge(OmegaConf.create(text), OmegaConf.from_dotlist([]))
    container = OmegaConf.to_container(config, resolve=True, throw_on_missing=True)
    assert isinstance(container, dict)
    return json.loads(json.dumps(container))["a"]


def render_value(
    folder: Path, value: Any, template: str = "a: {{ value | yaml }}\nb: after\n"
) -> str:
    (folder / "t.j2").write_text(template)
    return build_sandbox(folder).get_template("t.j2").render({"value": value})


@settings(max_examples=150, deadline=None)
@given(texts)
@example("${a}")
@example("\\${a}")
@example("\\\\${a}\\")
@example("$${a}")
@example("${oc.env:HOME}")
@example("???")
@example("\\???")
@example("\\\\???")
@example("a ???")
@example("---")
@example("--- a\n...\n")
@example("no")
@example("012")
@example("1e5")
@example("2e-05")
@example("")
@example(" ")
@example("\n")
@example("\r\n\x85\u2028\u2029\ufeff\xa0\x00\x7f\x9f")
@example("\ufffe\uffff\U0001fffe\U0010ffff\U0001f600")
@example('"')
@example("'")
@example("# no comment")
@example("a: b")
@example("{{ x }}{% y %}")
@example("null")
@example("~")
@example("<<")
@example("!!python/object:os.system")
@example("\t\x1b[31m")
def test_any_text_comes_back(text: str) -> None:
    quoted = quote_yaml(text)
    assert quoted.isprintable() or not set(quoted) & set("\n\r\x85\u2028\u2029")
    assert read_back(f"a: {quoted}\nb: after\n") == text
    assert read_back(f"b: before\na: {quoted} # comment\n") == text
    assert read_back(f"b: [{quoted}, {{k: {quoted}}}]\na: {quoted}") == text


@settings(max_examples=100, deadline=None)
@given(values)
@example(2e-5)
@example(1e16)
@example(-0.0)
@example(5e-324)
@example(True)
@example([])
@example({})
@example({"no": 1, "1": 2, "": 3, "a b": 4, "${x}": 5, "<<": 6, "=": 7, "null": 8, "???": 9})
@example({"a": {"b": ["${c}", None, {"d": "???"}]}})
def test_any_value_comes_back_with_its_type(value: Any) -> None:
    assert json.dumps(read_back(f"a: {quote_yaml(value)}\n")) == json.dumps(value)


@given(st.floats(allow_nan=False, allow_infinity=False))
def test_a_number_is_a_number_for_every_yaml_reader(value: float) -> None:
    assert yaml.safe_load(quote_yaml(value)) == value
    assert isinstance(yaml.safe_load(quote_yaml(value)), float)


@pytest.mark.parametrize(
    "value", [object(), {1: 2}, float("nan"), float("inf"), b"x", {"a"}, "\ud800", ["\udfff"]]
)
def test_what_yaml_cannot_hold_is_refused(value: Any) -> None:
    with pytest.raises(GridError):
        quote_yaml(value)


def test_a_template_writes_what_the_filter_gives(tmp_path: Path) -> None:
    for value in ("a\nb: 1", "${x}", 1e-5, ["no", {"k": None}]):
        assert read_back(render_value(tmp_path, value)) == value
    assert (
        render_value(tmp_path, "x\ny: 1", "# {{ value | yaml }}\na: 1\n") == '# "x\\ny: 1"\na: 1\n'
    )


@pytest.mark.parametrize(
    "template",
    [
        "a: {{ value | yaml }}",
        "a:   {{ value | yaml }}   # why",
        "  - {{ value | yaml }}\n",
        "- - {{ value | yaml }}\n",
        "- a: {{ value | yaml }}\n",
        "a: [{{ value | yaml }}, {{ value | yaml }}]\n",
        "a: {b: {{ value | yaml }}, c: 1}\n",
        "{{ value | yaml }}: {{ value | yaml }}\n",
        '"a b": {{ value | yaml }}\n',
        "a: # {{ value | yaml }} {{ value | yaml }}\n",
        "a:\n  {{ value | yaml }}\n",
        "{% for x in [1, 2] %}\n- {{ x | yaml }}\n{% endfor %}",
        "{% if value is defined %}\na: {{ value | default(3) | yaml }}\n{% endif %}",
        "{% set x = value ~ 'b' %}\na: {{ (x | upper) | yaml }}\n",
        "a: {{ (value if value else 'b') | yaml }}\n",
        "a: {% raw %}{{ x }}{% endraw %}\n{# {{ y }} #}",
    ],
)
def test_templates_that_are_allowed(tmp_path: Path, template: str) -> None:
    assert render_value(tmp_path, "v", template)


@pytest.mark.parametrize(
    ("template", "line"),
    [
        ("a: 1\nb: {{ value }}", 2),
        ("a: {{ value | upper }}", 1),
        ("a: {{ value | yaml | trim }}", 1),
        ("a: {{ value | yaml ~ 'x' }}", 1),
        ("a: {{ value if value else 'b' | yaml }}", 1),
        ("a: {{ 'literal' }}", 1),
        ("\n\na: data/{{ value | yaml }}", 3),
        ("a: {{ value | yaml }}.jsonl", 1),
        ("a: say {{ value | yaml }}", 1),
        ("a: Hello, {{ value | yaml }}", 1),
        ('a: "{{ value | yaml }}"', 1),
        ("a: {{ value | yaml }}{{ value | yaml }}", 1),
        ("a: {{ value | yaml }} {{ value | yaml }}", 1),
        ("a: {{ value | yaml }}#", 1),
        ("{% if 1 %}\n{% for x in [1] %}\nb: {{ x }}\n{% endfor %}{% endif %}", 3),
        ("{% filter upper %}a{% endfilter %}", 1),
        ("{% macro m() %}{% endmacro %}", 1),
        ("{% set x %}a{% endset %}", 1),
        ("{% extends 't.j2' %}", 1),
        ("{% import 't.j2' as t %}", 1),
        ("{% from 't.j2' import t %}", 1),
        ("{% block b %}{% endblock %}", 1),
        ("{% include 'x' ignore missing %}", 1),
        ("{% with a = 1 %}{% endwith %}", 1),
    ],
)
def test_templates_that_are_refused_before_they_run(
    tmp_path: Path, template: str, line: int
) -> None:
    with pytest.raises(TemplateSyntaxError) as caught:
        render_value(tmp_path, "v", template)
    assert locate_error(caught.value, tmp_path) == (tmp_path / "t.j2", line)


@pytest.mark.parametrize(
    "expression",
    [
        "''.__class__.__mro__[1].__subclasses__()",
        "value.__init__.__globals__",
        "(value|attr('__class__'))",
        "''.format.__self__",
        "'{0.__class__.__mro__}'.format(value)",
        "range(10 ** 9) | list",
        "cycler.__init__",
        "lipsum()",
        "[1, 2] | random",
        "self.__dict__",
        "missing",
        "value.missing",
        "[].append(1)",
    ],
)
def test_an_escape_from_the_sandbox_fails(tmp_path: Path, expression: str) -> None:
    with pytest.raises((TemplateError, OverflowError, GridError)):
        render_value(tmp_path, {"k": 1}, f"a: {{{{ ({expression}) | yaml }}}}\n")


DOUBLED = "{% set a = 'x' %}" + "{% set a = a OP a %}" * 40
GROWING = {
    "loops in loops": (
        "{% for i in range(90000) %}{% for j in range(90000) %}{% endfor %}{% endfor %}"
    ),
    "loops with output": (
        "{% for i in range(90000) %}{% for j in range(90000) %}#\n{% endfor %}{% endfor %}"
    ),
    "texts joined": DOUBLED.replace("OP", "~") + "a: {{ a | yaml }}",
    "texts added": DOUBLED.replace("OP", "+") + "a: {{ a | yaml }}",
    "lists added": DOUBLED.replace("'x'", "[1]").replace("OP", "+") + "a: {{ a | yaml }}",
    "lists in lists": "{% set a = [1] %}" + "{% set a = [a, a] %}" * 40 + "a: {{ a | yaml }}",
    "lists in lists as text": (
        "{% set a = [1] %}" + "{% set a = [a, a] %}" * 40 + "a: {{ (a | string) | yaml }}"
    ),
    "lists in lists in a text": (
        "{% set a = [1] %}" + "{% set a = [a, a] %}" * 40 + "a: {{ (a ~ '') | yaml }}"
    ),
    "replaced": (
        "{% set a = 'xxxxxxxxxx' %}" + "{% set a = a | replace('x', a) %}" * 9 + "a: {{ a | yaml }}"
    ),
    "joined by long texts": (
        "{% set a = range(9000) | join('x') %}a: {{ (range(9000) | list | join(a)) | yaml }}"
    ),
    "a wide format": "a: {{ ('%999999999s' % 1) | yaml }}",
    "a starred format": "a: {{ ('%*s' % (999999999, 1)) | yaml }}",
    "a padded text": "a: {{ ('x'.ljust(999999999)) | yaml }}",
    "a formatted text": "a: {{ ('{:>999999999}'.format(1)) | yaml }}",
    "a repeated text": "a: {{ ('a' * 10 ** 9) | yaml }}",
    "a repeated list": "a: {{ ([0] * 10 ** 9) | yaml }}",
    "a large number": "a: {{ (9 ** 999) | yaml }}",
    "a number that takes minutes": "a: {{ ((9 ** 9999999) ** 99 > 1) | yaml }}",
    "brackets": "a: {{ " + "(" * 20_000 + "1" + ")" * 20_000 + " | yaml }}",
}


@pytest.mark.parametrize("name", GROWING)
def test_nothing_grows_without_end(tmp_path: Path, name: str) -> None:
    """With 1 s instead of 10, at which the kernel ends what no exception can."""
    root = build_toy(tmp_path)(template=GROWING[name])
    with pytest.raises(GridError, match=r"toy/recipe\.yaml\.j2") as caught:
        render_grid(root / "recipe_templates", "toy", base_seconds=1)
    assert len(str(caught.value)) < 20_000


@pytest.mark.parametrize(
    ("template", "words"),
    [
        (
            GROWING["loops in loops"],
            "j2, line 1: needs more than 1 seconds of CPU time\n\n  in",
        ),
        (
            GROWING["a repeated list"],
            "j2, line 1: needs more than 2 GiB of memory\n\n  in the",
        ),
        (
            GROWING["a number that takes minutes"],
            "or the name pattern next to it, needs more than 1 seconds of CPU time or 2 GiB",
        ),
    ],
)
def test_a_limit_is_named(tmp_path: Path, template: str, words: str) -> None:
    root = build_toy(tmp_path)(template=template)
    with pytest.raises(GridError, match=words):
        render_grid(root / "recipe_templates", "toy", base_seconds=1)


def test_a_name_pattern_has_the_same_limits(tmp_path: Path) -> None:
    root = build_toy(tmp_path)(GRID.replace('name: "', f'name: "{GROWING["loops in loops"]}'))
    with pytest.raises(GridError, match=r"the grid toy, .* needs more than 1 seconds"):
        render_grid(root / "recipe_templates", "toy", base_seconds=1)


@pytest.mark.slow
def test_a_template_without_end_ends(tmp_path: Path) -> None:
    """On the command line: after 10 s, with a clear error, exit code 2 and nothing written."""
    root = build_toy(tmp_path)(template=GROWING["loops in loops"])
    words = [Path(sys.executable).parent / "runner", "render", "toy"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, timeout=120)
    assert done.returncode == 2 and done.stdout == "" and not (root / "recipes").exists()
    assert done.stderr.startswith("error: recipe_templates/toy/recipe.yaml.j2, line 1: needs more")
    assert "10 seconds of CPU time" in done.stderr and "Traceback" not in done.stderr


def test_the_answer_of_a_limited_process_is_that_of_the_work() -> None:
    def refuse() -> Any:
        raise RunnerError("no", hint="yes")

    def fail() -> Any:
        raise KeyError("a defect")

    assert run_limited(lambda: {"a": [1, None, "\u20ac"]}, 5, "here") == {"a": [1, None, "\u20ac"]}
    with pytest.raises(GridError, match="no\n\nhint: yes"):
        run_limited(refuse, 5, "here")
    with pytest.raises(RuntimeError, match=r"Traceback[\s\S]*KeyError: 'a defect'"):
        run_limited(fail, 5, "here")
    with pytest.raises(GridError, match="more than 256 MiB together"):
        run_limited(lambda: "x" * 2**28, 5, "here")
    for number in (signal.SIGKILL, signal.SIGXCPU):
        with pytest.raises(GridError, match="here needs more than 5 seconds of CPU time or 2 GiB"):
            run_limited(lambda sent=number: os.kill(os.getpid(), sent), 5, "here")


def test_ctrl_c_ends_the_child(tmp_path: Path) -> None:
    started = tmp_path / "pid"

    def wait() -> None:
        started.write_text(str(os.getpid()))
        os.kill(os.getppid(), signal.SIGINT)
        time.sleep(60)

    began = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        run_limited(wait, 5, "here")
    assert time.monotonic() - began < 30
    assert not Path("/proc", started.read_text()).exists()


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "a/../../secret", "..\\secret"])
def test_a_file_outside_the_folder_is_not_found(tmp_path: Path, name: str) -> None:
    (tmp_path / "secret").write_text("a: 1")
    (tmp_path / "in").mkdir()
    with pytest.raises(TemplateError):
        render_value(tmp_path / "in", name, "{% include value %}")


def test_the_place_of_an_error_is_the_innermost_template(tmp_path: Path) -> None:
    (tmp_path / "inner.j2").write_text("b: 1\nc: {{ (1 / 0) | yaml }}\n")
    with pytest.raises(ZeroDivisionError) as caught:
        render_value(tmp_path, 1, "a: 1\n{% include 'inner.j2' %}\n")
    assert locate_error(caught.value, tmp_path) == (tmp_path / "inner.j2", 2)
    assert locate_error(ValueError(), tmp_path) == (None, None)
