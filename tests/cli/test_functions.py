"""Functions of the project through the command line: confirmed once per content, run by `check` and
`masks`, refused before anything starts, with errors that name the row.
"""

from __future__ import annotations

import json
import shlex
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.errors import RefusedError
from runner.sft.context import RunContext
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace
from tests.conftest import Project

ROWS = """\
def build(row):
    print("building a row")
    turns = [("user", row["q"]), ("assistant", row["a"])]
    messages = [{"role": role, "content": text} for role, text in turns]
    return {"messages": messages, "references": [row["a"]]}
"""
SCORES = """\
def words_off(prediction, references, row):
    return abs(len(prediction.split()) - row["words"])


def flat(prediction, references, row):
    return 1
"""
GENERATION = "generation: {enabled: true, max_new_tokens: 6, during_training: true}"
METRICS = (
    "[{name: words_off, function: 'scores.py:words_off', mode: min},"
    " {name: flat, function: 'scores.py:flat', mode: min}]"
)
OVERRIDES = (
    "data.task={name: python, function: 'rows.py:build'}",
    f"evaluation={{{GENERATION}, metrics: {METRICS}}}",
    "checkpoints={metric: words_off, mode: min}",
)


@pytest.fixture
def study(project: Project) -> Project:
    """A project with rows that no other task reads, a function that does, and two metrics."""
    project.add_model()
    (project.root / "data.jsonl").unlink()
    write_rows(project)
    (project.root / "rows.py").write_text(ROWS)
    (project.root / "scores.py").write_text(SCORES)
    project.write_recipe("study.json", *OVERRIDES)
    return project


def write_rows(project: Project) -> None:
    rows = [{"q": f"What is {n}?", "a": f"It is {n}.", "words": 3} for n in range(80)]
    (project.root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def refuse(project: Project, *arguments: str) -> str:
    """The errors of a command that ends with 2."""
    done = project.call(*arguments)
    assert done.returncode == 2, done.stdout + done.stderr
    return done.stderr


def test_nothing_runs_before_it_was_allowed(
    study: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.root)
    recipe = "study.json"
    for arguments in (
        ("check", recipe),
        ("masks", recipe),
        ("launch", recipe, "--dry-run"),
        ("launch", recipe, "--prepare"),
        ("launch", recipe),
        ("sweep", recipe, "--dry-run"),
        ("sweep", recipe),
    ):
        assert main(arguments) == 2
        said = capfd.readouterr().err
        assert "rows.py  was not allowed yet, 235 bytes, sha256 " in said, arguments
        assert "hint: runner check --allow-code study.json  # after you have read them" in said
        assert "building a row" not in said
    assert not (study.root / "runs" / "tests").exists(), "no attempt began"
    for arguments in (("status", recipe), ("why", recipe), ("report", recipe), ("stop", recipe)):
        assert main(arguments) == 0 and "building a row" not in capfd.readouterr().err, arguments


def test_what_was_allowed_runs_until_it_changes(
    study: Project, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.root)
    done = study.cli("check", "study.json", "--allow-code")
    assert done.returncode == 0, done.stderr
    assert "allowed rows.py, 235 bytes, sha256 " in done.stdout
    assert "building a row" in done.stderr and "building a row" not in done.stdout
    assert "metric words_off: 0 on the own answers of the test rows, 15 of 15 judged" in done.stdout
    assert main(["check", "study.json", "--json"]) == 0
    facts = json.loads(capfd.readouterr().out)["runs"][0]["metrics"]
    assert [(one["name"], one["split"], one["mean"]) for one in facts] == [
        ("words_off", "validation", 0.0),
        ("flat", "validation", 1.0),
        ("words_off", "test", 0.0),
        ("flat", "test", 1.0),
    ]
    assert main(["masks", "study.json", "--rows", "1"]) == 0
    assert main(["launch", "study.json", "--dry-run"]) == 0
    (study.root / "rows.py").write_text(ROWS + "# changed\n")
    for arguments in (("check", "study.json"), ("launch", "study.json"), ("sweep", "study.json")):
        assert main(arguments) == 2
        assert "rows.py  changed since it was allowed" in capfd.readouterr().err
    assert main(["check", "study.json", "--output-root", "others"]) == 2
    said = capfd.readouterr().err
    assert "hint: runner check --allow-code study.json --output-root others" in said


def test_the_trainer_refuses_by_itself(study: Project, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(study.root)
    main(["check", "study.json", "--allow-code", "--schema-only"])
    assert main(["launch", "study.json", "--prepare"]) == 0
    run_dir = Path("runs/tests/study")

    def open_run() -> RunContext:
        place = WorldPlace()
        return RunContext.open(run_dir, place, Preemption(study.paths("study"), 1, place))

    open_run()
    (study.root / "scores.py").write_text(SCORES + "\n")
    with pytest.raises(RefusedError, match=r"scores\.py  changed since it was allowed"):
        open_run()
    main(["check", "study.json", "--allow-code", "--schema-only"])
    with pytest.raises(RefusedError, match=r"scores\.py changed since the run was prepared"):
        open_run()
    (study.root / "runs/.allowed_code.json").unlink()
    with pytest.raises(RefusedError) as raised:
        open_run()
    assert raised.value.hint is not None
    assert raised.value.hint.startswith("runner check --allow-code runs/tests/study  #")


def test_a_run_is_not_moved_aside_for_code_that_may_not_run(
    study: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.root)
    main(["check", "study.json", "--allow-code", "--schema-only"])
    assert main(["launch", "study.json", "--prepare"]) == 0
    (study.root / "rows.py").write_text(ROWS + "# changed\n")
    for arguments in (
        ["sweep", "study.json", "--fresh", "--yes"],
        ["launch", "study.json", "--fresh"],
    ):
        assert main(arguments) == 2
        assert "rows.py  changed since it was allowed" in capsys.readouterr().err
    assert study.paths("study").recipe_path.exists()


CHANGED = "data.task.function='other.py:build'"


def test_a_file_that_only_an_override_names_is_allowed_with_it(
    study: Project, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.root)
    (study.root / "other.py").write_text(ROWS)
    for verb in (["launch", "study.json", "--dry-run"], ["masks", "study.json"]):
        assert main([*verb, CHANGED]) == 2
        said = capsys.readouterr().err
        assert "other.py  was not allowed yet" in said
        hint = said.partition("hint: ")[2].partition("  #")[0]
        assert shlex.split(hint)[1:] == ["check", "--allow-code", "study.json", CHANGED]
    assert main([*shlex.split(hint)[1:], "--schema-only"]) == 0
    assert "allowed other.py" in capsys.readouterr().out
    assert main(["launch", "study.json", CHANGED, "--dry-run"]) == 0


BAD_CODE = {
    "an exception": (
        "rows.py",
        "def build(row):\n    return row['question']\n",
        "data.jsonl line 1: rows.py line 2, in `build`: KeyError: 'question'",
    ),
    "no function": ("rows.py", "", "rows.py: defines no function `build`"),
    "a mistake": ("rows.py", "def build(row)\n", "rows.py line 1: SyntaxError: expected ':'"),
    "a dropped row": (
        "rows.py",
        "def build(row):\n    return None\n",
        "data.jsonl line 1, what rows.py:build returned: found nothing (None)",
    ),
    "no conversation": (
        "rows.py",
        "def build(row):\n    return row['q']\n",
        "data.jsonl line 1, what rows.py:build returned: found a text",
    ),
    "an unknown key": (
        "rows.py",
        ROWS.replace('"references"', '"answers"'),
        "data.jsonl line 1, what rows.py:build returned: has the unknown key 'answers'",
    ),
    "references that are no list": (
        "rows.py",
        ROWS.replace('[row["a"]]}', 'row["a"]}'),
        "what rows.py:build returned: 'references' should be a list of texts, found a text",
    ),
    "a group that is no text": (
        "rows.py",
        ROWS.replace('"references": [row["a"]]', '"group": 7'),
        "what rows.py:build returned: 'group' should be a text, found a number",
    ),
    "chance": (
        "rows.py",
        ROWS.replace('row["q"]', 'row["q"] + str(random.random())') + "import random\n",
        "data.jsonl line 1: rows.py:build returned other messages when it was called again",
    ),
    "an unnamed file": (
        "rows.py",
        "import scores\n",
        "hint: name the file next to the function: python_files: [scores.py]",
    ),
    "no number": (
        "scores.py",
        SCORES.replace("return 1", "return 'good'"),
        'scores.py:flat returned "good" for the metric `flat`',
    ),
    "a metric that fails on no answer": (
        "scores.py",
        SCORES.replace("return 1", "return 1 / len(prediction)"),
        "scores.py line 6, in `flat`: ZeroDivisionError: division by zero",
    ),
    "a metric of chance": (
        "scores.py",
        SCORES.replace("return 1", "return random.random()") + "import random\n",
        "scores.py:flat returned 0.",
    ),
}


def test_check_names_what_is_wrong_with_a_function(study: Project) -> None:
    """All in one call: each case is a recipe with its own file."""
    (study.root / "study.json").unlink()
    for number, (replaced, text, _) in enumerate(BAD_CODE.values()):
        (study.root / f"bad{number}.py").write_text(text)
        overrides = [one.replace(f"'{replaced}:", f"'bad{number}.py:") for one in OVERRIDES]
        study.write_recipe(f"bad/case{number}.yaml", *overrides)
    said = refuse(study, "check", "bad", "--allow-code")
    for number, (name, (replaced, _, words)) in enumerate(BAD_CODE.items()):
        assert words.replace(replaced, f"bad{number}.py", 1) in said or words in said, (name, said)


def test_a_function_that_reads_what_says_nothing_is_refused(study: Project) -> None:
    """Two rows that differ in their ids alone are one row, and cannot be two conversations."""
    rows = [{"q": "Which?", "a": "This.", "words": 1, "id": f"n{n}"} for n in range(60)]
    (study.root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (study.root / "rows.py").write_text(ROWS.replace('row["q"])', 'row["id"])'))
    said = refuse(study, "check", "study.json", "--allow-code")
    assert (
        "data.jsonl line 1 and data.jsonl line 2 differ only in columns that are not part" in said
    )


BAD_RECIPES = {
    "a path out of the project": (
        "data.task={name: python, function: '../rows.py:build'}",
        "relative to the folder where `runner` is started",
    ),
    "no function": ("data.task={name: python, function: rows.py}", "such as rows.py:build"),
    "a name of the library": (
        "data.task={name: python, function: 'rows.py:build', python_files: [json.py]}",
        "would hide Python's module `json`",
    ),
    "no direction": (
        "evaluation.metrics=[{name: short, function: 'scores.py:flat'}]",
        "evaluation.metrics.0.mode",
    ),
    "a name that is taken": (
        "evaluation.metrics=[{name: nll_per_token, function: 'scores.py:flat', mode: min}]",
        "`nll_per_token` is measured already",
    ),
    "a name twice": (f"evaluation.metrics={METRICS.replace('flat,', 'words_off,')}", "two metrics"),
    "no answers": ("evaluation.generation={enabled: false}", "judge generated answers"),
    "answers too late": (
        "evaluation.generation={enabled: true, max_new_tokens: 4, during_training: false}",
        "never evaluated on the validation split",
    ),
    "the wrong direction": ("checkpoints.mode=max", "better when it is smaller: its `mode` must"),
    "an unknown metric": ("checkpoints.metric=words", "expected one of nll_per_completion_token"),
}


@pytest.mark.parametrize("case", BAD_RECIPES)
def test_a_recipe_that_cannot_work_is_refused(
    study: Project, case: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(study.root)
    override, words = BAD_RECIPES[case]
    assert main(["launch", "study.json", "--dry-run", override]) == 2
    assert words in capsys.readouterr().err


def test_a_link_is_refused(study: Project) -> None:
    (study.root / "rows.py").rename(study.root / "elsewhere.py")
    (study.root / "rows.py").symlink_to("elsewhere.py")
    for arguments in (("check", "study.json", "--allow-code"), ("launch", "study.json")):
        assert "rows.py is a link to elsewhere.py" in refuse(study, *arguments)
    (study.root / "rows.py").unlink()
    said = refuse(study, "check", "study.json")
    assert "data.task.function" in said and "rows.py" in said


def test_a_metric_of_a_task_keeps_its_name(study: Project) -> None:
    said = refuse(
        study,
        *("launch", "study.json", "--dry-run", "data.task={name: prompt_completion}"),
        "evaluation.metrics=[{name: exact_match, function: 'scores.py:flat', mode: max}]",
    )
    assert "`exact_match` is a metric of the task `prompt_completion`" in said
