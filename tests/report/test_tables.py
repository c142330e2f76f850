"""CSV, JSON and LaTeX say everything, and nothing in them is a command."""

import csv
import io
import json
import re
from importlib.resources import files
from pathlib import Path
from typing import Any

import jsonschema
import pytest

from runner.errors import CONTROLS
from runner.report.format import FORMATS, format_markdown
from runner.report.tables import escape_tex, format_csv, format_json, format_tex
from runner.run.record import RunRecord, write_record
from runner.text import measure
from tests.support.effects import make_report, replicated_rows
from tests.support.reports import (
    Run,
    completed,
    make_answers,
    make_recipe,
    pending,
    report,
)
from tests.support.scored_runs import make_attempt, scored

SCHEMA: dict[str, Any] = json.loads(
    (files("runner.report") / "report.schema.json").read_text(encoding="utf-8")
)
HOSTILE = (
    "<b>bold</b>",
    "</script><script>alert(1)</script>",
    r"\input{/etc/passwd}",
    "=cmd|' /C calc'!A0",
    "+1+1",
    "-2+3",
    "@SUM(A1)",
    "\t=1",
    "red \x1b[31m\x1b[2J\x9b2J\u202e",
    "a\r\nb | c & d % e # f ~ g ^ h _ i $ j",
    "[x]*--`",
)


def validate(text: str) -> dict[str, Any]:
    parsed: dict[str, Any] = json.loads(text)
    jsonschema.Draft202012Validator(SCHEMA).validate(parsed)
    return parsed


def test_the_schema_is_one_and_lets_nothing_through() -> None:
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        validate(json.dumps({"rows": []}))


def test_json_has_every_number_of_an_effect(tmp_path: Path) -> None:
    parsed = validate(format_json(make_report(replicated_rows(tmp_path))))
    first, second = parsed["effects"][0]["simple"]["samples"]
    assert (first["estimate"], first["interval"], first["level"]) == (-0.3, [-0.35, -0.25], 0.975)
    assert first["adjustment"] == "Holm" and second["adjustment"] == "Benjamini-Hochberg"
    shown = {"margin": 0.02, "interval": [-0.34, -0.26], "is_shown": False, "level": 0.9}
    assert first["equivalence"] == shown
    assert second["why_exploratory"].startswith("declared since run")
    [pair] = first["pairs"]
    cells = parsed["cells"]
    assert cells[pair["reference"]]["axes"] == {"loss": "full", "samples": 60}
    assert cells[pair["compared"]]["axes"] == {"loss": "completion", "samples": 60}
    assert [one["seed"] for one in pair["by_seed"]] == [1, 2, 3]
    assert all(one["difference"] == pytest.approx(-0.3) for one in pair["by_seed"])
    [refused] = parsed["effects"][1]["cells"]
    assert refused["estimate"] is None and refused["refused"]
    assert parsed["noise_floors"][0]["value"] == 0.12
    missing = {"estimate", "v_seed", "noise_floor", "nll_per_completion_token"}
    assert not missing - set(parsed["definitions"])


def test_each_run_says_what_it_declared_and_where_it_ran(tmp_path: Path) -> None:
    """The JSON alone shows the declarations and hardware behind a confirmatory effect."""
    declared = "{axis: loss, from: full, to: completion, metric: nll_per_token"
    stated = f"run.declared=[{declared}, margin: 0.05}}]"
    made = make_attempt(
        hardware={"cpu": "Xeon", "gpu": "2 x H200", "note": "node-17"},
        runner_is_dirty=True,
        num_processes=2,
    )
    again = made.model_copy(update={"number": 2, "micro_batch_divisor": 2})
    recipe = make_recipe("a_1", {"loss": "full", "seed": 1}, stated)
    _, paths, status = scored(tmp_path, recipe, 1.0, attempt=made)
    write_record(paths, RunRecord(attempts=(made, again)))
    today = make_recipe("a_1", {"loss": "full", "seed": 1}, f"run.declared=[{declared}}}]")
    runs: list[Run] = [(today, paths, status), pending(tmp_path, make_recipe("b_1", {"loss": "x"}))]
    first, second = validate(report(runs, "json"))["rows"]
    contrast = {"axis": "loss", "from": "full", "to": "completion", "metric": "nll_per_token"}
    assert first["declared_then"] == [contrast | {"margin": 0.05}]
    assert first["declared_now"] == [contrast | {"margin": None}]
    assert first["started_at_utc"].startswith("2026-01-02T03:04:05")
    assert first["hardware"] == {"cpu": "Xeon", "gpu": "2 x H200"}
    assert (first["runner_is_dirty"], first["num_processes"]) == (True, [2])
    assert first["micro_batch_divisors"] == [1, 2]
    assert (second["declared_then"], second["declared_now"]) == (None, [])
    assert (second["started_at_utc"], second["hardware"], second["num_processes"]) == (None, {}, [])
    text = report(runs, "csv")
    line = next(csv.DictReader(io.StringIO(text)))
    assert (line["hardware.gpu"], line["num_processes"]) == ("2 x H200", "2")
    assert (line["runner_is_dirty"], line["micro_batch_divisors"]) == ("true", "1 then 2")
    assert "node-17" not in text and "host-1" not in text


def test_json_has_a_cell_with_its_spread(tmp_path: Path) -> None:
    parsed = validate(format_json(make_report(replicated_rows(tmp_path))))
    score = parsed["cells"][0]["scores"]["nll_per_completion_token"]
    assert score["mean"] == pytest.approx(2.02) and score["sd"] == pytest.approx(0.01)
    assert len(score["by_seed"]) == 3 and score["base"] == 3.0


def test_csv_has_one_line_per_run_with_its_digest(tmp_path: Path) -> None:
    rows = replicated_rows(tmp_path)
    lines = list(csv.DictReader(io.StringIO(format_csv(make_report(rows)))))
    assert [line["run"] for line in lines] == [row.name for row in rows]
    assert len({line["recipe_digest"] for line in lines}) == len(rows)
    assert lines[0]["seed"] == "1" and lines[0]["test.ids_hash"] == "a1" * 32


def test_tex_has_spread_and_marks_what_was_declared(tmp_path: Path) -> None:
    text = format_tex(make_report(replicated_rows(tmp_path)))
    assert r"$2.0200 \pm 0.0100$" in text and "$-0.3500$ to $-0.2500$" in text
    assert r"$0.0021^\dagger$" in text and "($-0.1000$)" in text and "$$" not in text
    assert r"sst2 and squad\_v2" in text and "Warning: 2 different sets" in text
    for begin, end in ((r"\begin{table}", r"\end{table}"), (r"\toprule", r"\bottomrule")):
        assert text.count(begin) == text.count(end) == 3


# All that our own tables are made of; a backslash of data would be none of these.
TEX_COMMANDS = re.compile(
    r"\\(?:usepackage|begin|end|centering|caption|toprule|midrule|bottomrule|item|footnotesize"
    r"|pm|times|dagger|textbackslash|textasciicircum|textasciitilde|textless|textgreater|textbar"
    r"|textquotedbl|textasciigrave)(?![A-Za-z])|\\[\\{}$&#%_]"
)


@pytest.mark.parametrize("text", HOSTILE)
def test_no_text_is_a_command(tmp_path: Path, text: str) -> None:
    made = make_report(
        replicated_rows(tmp_path, completion=text),
        verdicts=(f"{text} wins",),
        warnings=(f"{text} is odd",),
    )
    written = {name: write(made) for name, write in FORMATS.items()}
    for name, one in written.items():
        assert not CONTROLS.search(one), name
    assert "\\" not in TEX_COMMANDS.sub("", written["tex"])
    body = written["tex"].partition("\n")[2]
    assert re.search(r"(?<!\\)%", body) is None
    assert re.search(r"\\\\\s*[\[*]", body) is None
    parsed = validate(written["json"])
    assert parsed["effects"][0]["compared"] == text and parsed["verdicts"] == [f"{text} wins"]
    for line in csv.reader(io.StringIO(written["csv"])):
        assert not any(cell.lstrip()[:1] in ("=", "+", "@") for cell in line)
    widths = {measure(line) for line in written["md"].splitlines() if line.startswith("| loss")}
    assert widths and max(map(measure, written["md"].splitlines())) <= 120


def test_a_million_characters_are_cut_in_what_people_read(tmp_path: Path) -> None:
    for text in ("x" * 1_000_000, "a b " * 250_000, "日本" * 500_000):
        made = make_report(
            replicated_rows(tmp_path / str(ord(text[0])), completion=text),
            verdicts=(text,),
            warnings=(text,),
        )
        shown = format_markdown(made)
        assert len(shown) < 30_000 and max(map(measure, shown.splitlines())) <= 120
        assert len(format_tex(made)) < 30_000
        assert validate(format_json(made))["verdicts"] == [text]
        lines = csv.DictReader(io.StringIO(format_csv(made)))
        csv.field_size_limit(10_000_000)
        assert {line["axes.loss"] for line in lines} == {"full", text.strip() and text}


def test_a_number_is_no_formula_in_csv(tmp_path: Path) -> None:
    recipes = [make_recipe(f"r{at}", {"x": x}) for at, x in enumerate((-1.5, "-1.5", "-x", 1e-9))]
    runs = [pending(tmp_path, recipe) for recipe in recipes]
    lines = csv.DictReader(io.StringIO(report(runs, "csv")))
    assert sorted(line["axes.x"] for line in lines) == sorted(["-1.5", "-1.5", "'-x", "1e-09"])


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("50% & $1_000", r"50\% \& \$1\_000"),
        ("a--b---c", "a-{}-b-{}-{}-c"),
        ("[x]", "{[}x{]}"),
        ("日本語 é", "日本語 é"),
    ],
)
def test_escape_tex(text: str, expected: str) -> None:
    assert escape_tex(text) == expected


def test_answers_and_what_is_missing_are_valid(tmp_path: Path, answering_runs: list[Run]) -> None:
    parsed = validate(report([*answering_runs, pending(tmp_path, make_recipe("p", {}))], "json"))
    assert any(row["tuned_accuracy"] is not None for row in parsed["rows"] if "_" in row["run"])
    assert validate(report([], "json"))["rows"] == []
    run = completed(
        tmp_path, make_recipe("a", {}), 2.0, answers=make_answers({"f1": 0.5}, {"f1": 0.75})
    )
    assert "tuned_f1" in report([run], "csv").partition("\n")[0]
