"""Random content of files and arguments gives a clear error, nothing written outside, and never a
traceback.

The fast tests use the same examples each time; `make fuzz` continues with new ones and prints how
to repeat a failure.
"""

from __future__ import annotations

import io
import json
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from runner.cli.main import main
from runner.errors import CONTROLS, RunnerError
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.identity import RULES, derive_digest
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.record import EXIT_CODES
from tests.conftest import RECIPE_TEXT, ROOT
from tests.support.model_folders import make_model_folder
from tests.support.toy_grid import GRID, TEMPLATE

FACTOR: Final = int(os.environ.get("FUZZ_FACTOR", "1"))
EXIT_CODES_OF_ANSWERS: Final = {0, 1, 2, *EXIT_CODES.values()}


def fuzzed(num_examples: int) -> settings:
    return settings(
        max_examples=num_examples * FACTOR,
        deadline=None,
        suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    )


@dataclass(frozen=True)
class Place:
    """A project inside another folder, so that writes outside of it are visible."""

    root: Path

    def write(self, name: str, content: str | bytes) -> Path:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(
            content if isinstance(content, bytes) else content.encode(errors="surrogatepass")
        )
        return path

    def run(self, *arguments: str | Path) -> str:
        """The output of `runner`. Checks that it ends with one of its exit codes, prints no control
        characters, and changes nothing outside.
        """
        before, out, err = self.list_outside(), io.StringIO(), io.StringIO()
        try:
            with redirect_stdout(out), redirect_stderr(err):
                code: Any = main([*map(str, arguments)])
        except SystemExit as left:  # argparse
            code = left.code
        printed = out.getvalue() + err.getvalue()
        assert code in EXIT_CODES_OF_ANSWERS, (code, printed)
        assert "Traceback" not in printed and not CONTROLS.search(printed.replace("\u2028", "")), (
            printed
        )
        assert self.list_outside() == before
        return printed

    def list_outside(self) -> list[str]:
        return sorted(os.listdir(self.root.parent)) + sorted(
            os.listdir(self.root.parent / "outside")
        )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Place]:
    around = tmp_path_factory.mktemp("fuzz")
    (around / "outside").mkdir()
    (around / "outside" / "theirs.yaml").write_text(RECIPE_TEXT)
    root = around / "project"
    root.mkdir()
    for name in ("accelerate_configs", "ds_configs"):
        (root / name).symlink_to(ROOT / name)
    (root / "data.jsonl").write_text("{}\n")
    make_model_folder(root / "models" / "gemma")
    before = Path.cwd()
    os.chdir(root)
    yield Place(root)
    os.chdir(before)


# Texts with a meaning for some parser, and texts that no parser expects.
SCRAPS: Final = (
    (
        "..",
        "../outside",
        "/",
        "/etc/passwd",
        "~",
        "\\",
        "a\\b",
        "C:x",
        ".",
        "",
        " ",
        "a" * 300,
        "\0",
        "\x1b[2J",
        "\r\n",
    )
    + (
        "\ufeff",
        "\u202e",
        "\ud800",
        "\x85",
        "\u2028",
        "${run.name}",
        "${oc.env:HOME}",
        "${",
        "???",
        "{{ x }}",
        "{% if",
    )
    + (
        "!!python/object/apply:os.system ['true']",
        "!!binary aGk=",
        "&a [*a]",
        "*a",
        "<<: *a",
        "- ",
        "? ",
        ": ",
        "[",
    )
    + (
        "{",
        "'",
        '"',
        "|",
        ">",
        "#",
        "%YAML 9.9",
        "---",
        "...",
        "no",
        "null",
        "~",
        "1:1:1",
        "0x1f",
        "1e999",
        ".nan",
        ".inf",
    )
    + (
        "-0",
        "9" * 30,
        "2001-01-01",
        "hf_" + "a" * 34,
        "s3://me:hunter22@host",
        "true",
        "1",
        "-1",
        "0",
        "1.5",
        "a,b",
        "=",
    )
    + ("a=b", "--help", "-x", "💥")
)
scraps = st.sampled_from(SCRAPS)
texts = scraps | st.text(max_size=12)
numbers = st.integers(-3, 10) | st.integers() | st.floats()
scalars = st.none() | st.booleans() | numbers | texts
values = st.recursive(
    scalars,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(texts, inner, max_size=4),
    max_leaves=8,
)


@st.composite
def damaged_texts(draw: st.DrawFn, text: str) -> bytes:
    """A text with lines and bytes cut, repeated, moved and put in."""
    lines = text.splitlines(keepends=True)
    for _ in range(draw(st.integers(0, 3))):
        at = draw(st.integers(0, len(lines) - 1)) if lines else 0
        change = draw(st.sampled_from(("cut", "repeat", "insert", "replace", "swap")))
        if not lines or change == "insert":
            lines.insert(at, draw(texts) + "\n")
        elif change == "cut":
            del lines[at]
        elif change == "repeat":
            lines.insert(at, lines[at])
        elif change == "swap":
            other = draw(st.integers(0, len(lines) - 1))
            lines[at], lines[other] = lines[other], lines[at]
        else:
            column = draw(st.integers(0, len(lines[at])))
            lines[at] = (
                lines[at][:column] + draw(texts) + lines[at][column + draw(st.integers(0, 5)) :]
            )
    content = bytearray("".join(lines).encode(errors="surrogatepass"))
    if draw(st.integers(0, 3)) == 0:
        at = draw(st.integers(0, len(content)))
        content[at : at + draw(st.integers(0, 3))] = draw(st.binary(max_size=4))
    return bytes(content)


@st.composite
def damaged_trees(draw: st.DrawFn, tree: Any) -> Any:
    """A JSON value with something in it replaced, removed, renamed or added."""
    if isinstance(tree, dict) and tree and draw(st.integers(0, 9)):
        copied, key = dict(tree), draw(st.sampled_from(sorted(tree)))
        change = draw(st.sampled_from(("deeper", "deeper", "deeper", "drop", "rename", "add")))
        if change == "drop":
            del copied[key]
        elif change == "rename":
            copied[draw(texts)] = copied.pop(key)
        elif change == "add":
            copied[draw(texts)] = draw(values)
        else:
            copied[key] = draw(damaged_trees(copied[key]))
        return copied
    if isinstance(tree, list) and tree and draw(st.booleans()):
        at = draw(st.integers(0, len(tree) - 1))
        return [*tree[:at], draw(damaged_trees(tree[at])), *tree[at + draw(st.integers(0, 1)) :]]
    return draw(values)


@fuzzed(60)
@given(content=damaged_texts(RECIPE_TEXT))
def test_a_damaged_recipe_is_answered(place: Place, content: bytes) -> None:
    path = place.write("case.yaml", content)
    place.run("launch", path, "--dry-run")
    place.run("sweep", path, "--dry-run")


@fuzzed(60)
@given(tree=damaged_trees(yaml.safe_load(RECIPE_TEXT)))
def test_a_recipe_of_other_values_is_refused_or_comes_back_as_it_was_read(
    place: Place, tree: Any
) -> None:
    text = json.dumps(tree)
    place.write("case.yaml", text)
    place.run("launch", "case.yaml", "--dry-run")
    try:
        recipe = parse_recipe(text, where="case.yaml")
    except RunnerError:
        return
    stored = recipe.model_dump(mode="json")
    assert Recipe.model_validate_json(json.dumps(stored)) == recipe


KEYS: Final = (
    "run.name",
    "run.grid",
    "run.axes.x",
    "model.path",
    "training.learning_rate",
    "adapter.method",
    "z",
    "",
)
overrides = st.tuples(st.sampled_from(KEYS) | texts, texts | values.map(repr)).map("=".join)


@fuzzed(60)
@given(
    overrides=st.lists(overrides | texts, max_size=3),
    name=st.none() | texts,
    root=st.sampled_from(("runs", "./runs/../runs")),
)
def test_any_override_and_any_name_stay_under_the_root(
    place: Place, overrides: Sequence[str], name: str | None, root: str
) -> None:
    path = place.write("case.yaml", RECIPE_TEXT)
    plain = [override.replace("\0", "") for override in overrides]  # no argument can hold one
    named = [] if name is None else [f"--name={name}".replace("\0", "")]
    place.run("launch", path, *plain, *named, "--dry-run", "--output-root", root)
    place.run("why", path, *plain, *named)


@fuzzed(40)
@given(grid=damaged_texts(GRID), template=damaged_texts(TEMPLATE))
def test_a_damaged_grid_or_template_is_answered(place: Place, grid: bytes, template: bytes) -> None:
    shutil.rmtree(place.root / "recipes", ignore_errors=True)
    place.write("recipe_templates/toy/grid.yaml", grid)
    place.write("recipe_templates/toy/recipe.yaml.j2", TEMPLATE)
    place.run("render", "toy")
    place.write("recipe_templates/toy/grid.yaml", GRID)
    place.write("recipe_templates/toy/recipe.yaml.j2", template)
    place.run("render")


NAMES: Final = (
    "model",
    "loss",
    "axes",
    "models",
    "name",
    "range",
    "self",
    "loop",
    "none",
    "missing",
    "1",
    "99",
    "'x'",
    "[]",
)
OPERATORS: Final = ("~", "+", "*", "**", "%", "//", "-", "==", "in", "and", "if 1 else")
FILTERS: Final = ("join", "replace('x', 'y' )", "list", "length", "sum", "string", "float", "sort")
SUFFIXES: Final = (".__class__", ".mro()", "()", "[0]", ".format(1)", ".items()", "['__init__']")
expressions = st.recursive(
    st.sampled_from(NAMES) | scraps.map(repr),
    lambda inner: st.one_of(
        st.tuples(inner, st.sampled_from(OPERATORS), inner).map(" ".join),
        st.tuples(inner, st.sampled_from(FILTERS)).map(" | ".join),
        st.tuples(inner, st.sampled_from(SUFFIXES)).map("".join),
        inner.map(lambda text: f"[{text}, {text}]"),
        inner.map(lambda text: f"range({text})"),
    ),
    max_leaves=6,
)


@fuzzed(60)
@given(one=expressions, other=expressions)
def test_no_expression_of_a_template_is_more_than_an_error(
    place: Place, one: str, other: str
) -> None:
    place.write("recipe_templates/toy/grid.yaml", GRID)
    looped = f"{{% for i in {one} %}}{{% for j in {other} %}}{{% endfor %}}{{% endfor %}}\n"
    for template in (
        TEMPLATE.replace("{{ loss | yaml }}", f"{{{{ ({one}) | yaml }}}}"),
        f"{{% set a = {one} %}}{{% set b = [a, {other}] %}}{looped}{TEMPLATE}",
    ):
        place.write("recipe_templates/toy/recipe.yaml.j2", template)
        place.run("render", "toy", "--check")


def make_run(place: Place) -> Path:
    """A run directory as a completed attempt leaves it, without the large files."""
    recipe = parse_recipe(RECIPE_TEXT, where="r")
    contents = hash_contents(recipe, ContentHashes(place.root / "hashes.json"))
    digest = derive_digest(recipe, contents)
    score = {
        "num_rows": 1,
        "num_completion_tokens": 2,
        "num_tokens": 3,
        "num_bytes": 4,
        "completion_nll_sum": 1.0,
        "nll_sum": 2.0,
    }
    splits = {"validation": score, "test": score}
    attempt = {
        "number": 1,
        "started_at_utc": "2026-01-01T00:00:00+00:00",
        "command": ["accelerate"],
        "environment": {},
        "num_processes": 1,
        "host": "here",
    }
    shutil.rmtree(place.root / "runs", ignore_errors=True)
    files: dict[str, Any] = {
        "recipe.json": {
            "recipe": recipe.model_dump(mode="json"),
            "recipe_digest": digest,
            "contents": contents,
            "rules": RULES,
        },
        "run.json": {"attempts": [attempt]},
        "result.json": {
            "recipe_digest": digest,
            "outcome": "completed",
            "stop_reason": "max_steps",
            "num_steps": 4,
            "best_step": 4,
            "best_metric": 1.0,
            "metric": "nll_per_completion_token",
            "num_train_rows": 22,
            "base": splits,
            "tuned": splits,
        },
        "samples.json": {"loss": "completion", "splits": {"train": {"num_rows": 22}}},
        "attempts/1/progress.json": {"phase": "training", "step": 2, "max_steps": 4, "loss": 1.0},
        "attempts/1/failure.json": {
            "kind": "crashed",
            "message": "why",
            "log_tail": ["one", "two"],
        },
        "attempts/1/timing.json": {"phase_seconds": {"training": 1.0}, "tokens_per_second": 9.0},
    }
    for name, content in files.items():
        place.write(f"runs/tests/base/{name}", json.dumps(content))
    place.write("runs/tests/base/eval_rows.jsonl", '{"model": "base", "row_id": "a"}\n')
    place.write("runs/tests/base/metrics.jsonl", '{"step": 0, "split": "test"}\n')
    place.write("runs/tests/base/checkpoints/step-4/COMMITTED.json", '{"step": 4}')
    return place.root / "runs/tests/base"


RECORDS: Final = (
    ("recipe.json", "run.json", "result.json", "samples.json", "metrics.jsonl", "eval_rows.jsonl")
    + (
        "attempts/1/progress.json",
        "attempts/1/failure.json",
        "attempts/1/timing.json",
        "stop",
        "tracking.json",
    )
    + ("checkpoints/step-4/COMMITTED.json",)
)


@fuzzed(60)
@given(data=st.data(), name=st.sampled_from(RECORDS), has_result=st.booleans())
def test_any_record_in_a_run_directory_is_answered(
    place: Place, data: st.DataObject, name: str, has_result: bool
) -> None:
    run_dir = make_run(place)
    place.write("case.yaml", RECIPE_TEXT)
    old = (run_dir / name).read_text() if (run_dir / name).exists() else "{}"
    tree = json.loads(old) if not name.endswith(".jsonl") else json.loads(old.splitlines()[0])
    content = data.draw(
        damaged_trees(tree).map(json.dumps) | damaged_texts(old) | st.binary(max_size=20)
    )
    if not has_result:
        (run_dir / "result.json").unlink()
    place.write(f"runs/tests/base/{name}", content + "\n" if isinstance(content, str) else content)
    for arguments in (
        ("status", "runs"),
        ("status", "case.yaml", "--json"),
        ("report", "runs"),
        ("power", "runs", "--effect", "0.1"),
        ("why", "case.yaml"),
        ("sweep", "case.yaml", "--dry-run"),
        ("launch", "case.yaml", "--prepare"),
    ):
        place.run(*arguments)
