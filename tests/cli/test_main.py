"""The command line: fast, without torch, exit codes, clear errors, output for people and for
scripts.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

import runner
from runner.cli.commands import VERBS
from runner.cli.main import main
from runner.files import write_json_atomic
from runner.plan.variants import name_overridden
from runner.recipe.schema import NAME_PATTERN
from runner.run.paths import RunPaths
from runner.run.record import load_record
from tests.support.fake_launcher import BIN_DIR, FakeLauncher, fake
from tests.test_imports import HEAVY, list_loaded

__all__ = ["fake"]


def run(*arguments: str, cwd: Path, **options: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(BIN_DIR / "runner"), *arguments],
        cwd=cwd,
        env={**os.environ, **options},
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )


@pytest.mark.parametrize(
    "verb", [["--help"], ["sweep", "--help"], ["status"], ["sweep", "recipes/toy", "--dry-run"]]
)
def test_verbs_do_not_import_torch(verb: list[str], fake: FakeLauncher) -> None:
    fake.add("a")
    program = f"from runner.cli.main import main\ntry: main({verb!r})\nexcept SystemExit: pass"
    assert not list_loaded(program, fake.root) & HEAVY


def test_help_is_quick_and_names_every_verb(fake: FakeLauncher) -> None:
    assert "pydantic" not in list_loaded(
        "import runner.cli.arguments\nrunner.cli.arguments.build_parser().format_help()", fake.root
    )
    done = run("--help", cwd=fake.root)
    assert done.returncode == 0
    assert re.findall(r"^    ([a-z-]+)\b", done.stdout, re.MULTILINE) == list(VERBS)


def test_python_dash_m_is_the_same(fake: FakeLauncher) -> None:
    fake.add("a")
    done = subprocess.run(
        [sys.executable, "-m", "runner", "status"], capture_output=True, text=True, check=True
    )
    assert done.stdout == run("status", cwd=fake.root).stdout


@pytest.mark.parametrize(
    "arguments",
    [
        [],
        ["nonsense"],
        ["sweep"],
        ["sweep", "recipes/toy", "--slots", "0"],
        ["sweep", "recipes/toy", "--slots", "two"],
        ["sweep", "recipes/toy", "--slots", "1", "--gpus", "0"],
        ["sweep", "recipes/toy", "--list", "--dry-run"],
        ["launch", "recipes/toy/a.yaml", "--num-processes", "-1"],
        ["launch", "recipes/toy/a.yaml", "--dry-run", "--prepare"],
        ["check", "recipes/toy", "--schema-only", "--json"],
    ],
)
def test_a_usage_error_is_2(
    arguments: list[str], fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    with pytest.raises(SystemExit) as caught:
        main(arguments)
    assert caught.value.code == 2 and "usage: " in capsys.readouterr().err
    assert fake.events() == []


@pytest.mark.parametrize(
    ("verb", "name"), [("launch", "RECIPE"), ("masks", "RECIPE"), ("why", "RUN"), ("sweep", "PATH")]
)
def test_only_what_is_required_is_missing(
    verb: str, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Overrides are optional."""
    with pytest.raises(SystemExit):
        main([verb])
    assert capsys.readouterr().err.endswith(f"arguments are required: {name}\n")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "recipes/tox"], "no recipe, run or grid is named 'recipes/tox'"),
        (["sweep", "recipes/toy", "--where", "size=9"], "the axis 'size' has no value '9'"),
        (["launch", "recipes/toy"], "recipes/toy is a folder\n\nhint: runner sweep recipes/toy"),
        (
            ["launch", "recipes/toy/a.yaml", "loss"],
            "'loss' is not an override of the form key=value",
        ),
        (
            ["launch", "recipes/toy/a.yaml", "loss=x"],
            "override  loss  got the text 'x', expected full, completion or last",
        ),
        (
            ["launch", "recipes/toy/a.yaml", "--name", "../up"],
            "the name '../up' may only have letters",
        ),
        (
            ["launch", "recipes/toy/a.yaml", "--name", "a\n"],
            "the name 'a\\n' may only have letters",
        ),
        (
            ["launch", "recipes/toy/a.yaml", "data.train.path=none.jsonl"],
            "data.train.path: none.jsonl",
        ),
        (
            ["launch", "recipes/toy/a.yaml", "--num-processes", "3"],
            "is not divisible by 3 processes",
        ),
        (["status", "--output-root", "data.jsonl", "data.jsonl"], "data.jsonl looks like rows"),
        (["report", "nowhere"], "no recipe, run or grid is named 'nowhere'"),
    ],
)
def test_an_error_of_the_user_is_2_and_words(
    arguments: list[str], words: str, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    before = fake.tree()
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert (
        captured.err.startswith("error: ")
        and words in captured.err
        and "Traceback" not in captured.err
    )
    assert captured.out == ""
    assert fake.tree() == before, "nothing was written"


def test_debug_shows_where_it_came_from(fake: FakeLauncher) -> None:
    done = run("--debug", "sweep", "recipes/none", cwd=fake.root)
    assert done.returncode != 0 and "Traceback" in done.stderr and "select_recipes" in done.stderr
    assert "Traceback" not in run("sweep", "recipes/none", cwd=fake.root).stderr


def test_what_the_machine_refuses_is_said_in_words(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    (fake.root / "runs").write_text("a file in the way")
    assert main(["sweep", "recipes/toy"]) == 1
    captured = capsys.readouterr()
    assert "toy/a  unreadable: runs is a file, and should be a folder" in captured.out
    assert "[Errno" not in captured.out + captured.err and "Traceback" not in captured.err


def test_nothing_to_do_is_0(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy"]) == 0
    capsys.readouterr()
    assert main(["sweep", "recipes/toy"]) == main(["launch", "recipes/toy/a.yaml"]) == 0
    captured = capsys.readouterr()
    assert captured.out.splitlines() == [
        "skip    toy/a  completed: stopped by max_steps",
        "toy/a  completed: stopped by max_steps",
    ]
    assert captured.err == "nothing to launch\n1 run: 1 completed\n"
    assert fake.started() == ["a"]


def test_list_is_for_bash(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a", "bb")
    before = fake.tree()
    assert main(["sweep", "recipes/toy", "--list"]) == 0
    assert capsys.readouterr().out == "recipes/toy/a.yaml\nrecipes/toy/bb.yaml\n"
    assert main(["sweep", "recipes/toy", "--where", "size=2", "--list"]) == 0
    assert capsys.readouterr().out == "recipes/toy/bb.yaml\n"
    assert fake.tree() == before and fake.events() == []


def test_status_is_a_line_per_run_and_json_for_scripts(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "bb")
    fake.add("ccc", told="fail data row 7\nis empty")
    assert main(["sweep", "recipes/toy/a.yaml", "recipes/toy/ccc.yaml"]) == 1
    progress_path = fake.paths("ccc").attempt(1).progress_path
    write_json_atomic(progress_path, {"phase": "training", "step": 1, "max_steps": 2, "loss": 0.25})
    capsys.readouterr()
    before = fake.tree()
    assert main(["status", "recipes/toy"]) == 0
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert [line[:2] for line in lines] == [
        ["toy/a", "completed"],
        ["toy/bb", "pending"],
        ["toy/ccc", "failed"],
    ]
    assert lines[0][2] == "2/2" and lines[2][2:5] == ["1/2", "loss", "0.2500"]
    assert lines[2][-3:] == ["data:", "row", "7"], "the first line of a reason"
    assert main(["status", "recipes/toy", "--json"]) == 0
    a, bb, ccc = json.loads(capsys.readouterr().out)
    assert (a["state"], a["name"], a["grid"], a["axes"], a["run_dir"]) == (
        "completed",
        "a",
        "toy",
        {"size": 1},
        "runs/toy/a",
    )
    assert (bb["state"], bb["step"], bb["num_attempts"]) == ("pending", None, 0)
    assert (ccc["failure"]["kind"], ccc["failure"]["message"], ccc["loss"]) == (
        "data",
        "row 7\nis empty",
        0.25,
    )
    assert fake.tree() == before, "status writes nothing"


def test_status_without_arguments_shows_all_runs_that_there_are(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["status"]) == 0
    (fake.root / "runs").mkdir()
    (fake.root / "runs" / ".content_hashes.json").write_text("{}")
    assert main(["status"]) == 0
    assert capsys.readouterr().out == ""
    fake.add("a")
    assert main(["launch", "recipes/toy/a.yaml", "loss=completion"]) == 0
    capsys.readouterr()
    assert main(["status"]) == 0
    started, never = capsys.readouterr().out.splitlines()
    assert started.split()[:2] == ["toy/a--loss-completion", "completed"]
    assert never == (
        "1 recipe was never started: `runner status recipes/toy` lists them,"
        " `runner sweep recipes/toy` starts them"
    )


def test_an_output_root_of_ones_own(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy", "--output-root", "else where"]) == 0
    assert (fake.root / "else where" / "toy" / "a" / "result.json").exists() and not (
        fake.root / "runs"
    ).exists()
    path = fake.root / "recipes" / "toy" / "a.yaml"
    path.write_text(path.read_text().replace("loss: full", "loss: completion"))
    assert main(["launch", "recipes/toy/a.yaml", "--output-root", "else where"]) == 2
    assert (
        "hint: runner launch recipes/toy/a.yaml --output-root 'else where' --fresh"
        in capsys.readouterr().err
    )


def test_what_to_resume_from_is_recorded_for_the_trainer(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", "c", "d")
    (fake.root / "step-4.zip").touch()
    wanted = {"a": "best", "b": "step-4.zip", "c": "s3://bucket/toy/c/step-4.zip"}
    for name, resume in wanted.items():
        assert main(["launch", f"recipes/toy/{name}.yaml", "--resume", resume]) == 0
    assert main(["launch", "recipes/toy/d.yaml", "--fresh"]) == 0
    recorded = [
        load_record(RunPaths(fake.root / "runs" / "toy" / name)).attempts[0].resume
        for name in "abcd"
    ]
    assert recorded == ["best", str(fake.root / "step-4.zip"), wanted["c"], "none"]
    capsys.readouterr()
    assert main(["launch", "recipes/toy/a.yaml", "--resume", "best"]) == 0
    assert "--fresh" in capsys.readouterr().out, "a completed run is skipped, with a word about it"
    assert main(["launch", "recipes/toy/a.yaml", "--resume", "step-8"]) == 2
    assert "does not exist; expected a folder or an archive" in capsys.readouterr().err


def test_a_reader_that_leaves_is_no_traceback(fake: FakeLauncher) -> None:
    fake.add(*(f"run{number}" for number in range(100)))
    line = "runner sweep recipes/toy --list | true; echo ${PIPESTATUS[0]}"
    done = subprocess.run(
        ["bash", "-c", f"{line}; {line.replace('sweep recipes/toy --list', 'status')}"],
        env=fake.environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    assert set(done.stdout.split()) <= {"141", "0"}, (
        "0 where the pipe took all before it was closed"
    )


def test_a_closed_output_is_141(fake: FakeLauncher, monkeypatch: pytest.MonkeyPatch) -> None:
    fake.add("a")
    # What is left in the buffer is written at exit.
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    readable, writable = os.pipe()
    os.close(readable)
    done = subprocess.run(
        [str(BIN_DIR / "runner"), "sweep", "recipes/toy"],
        stdout=writable,
        stderr=subprocess.PIPE,
        check=False,
    )
    os.close(writable)
    assert (done.returncode, done.stderr) == (141, b"")
    assert fake.events() == [], "a sweep that cannot print does nothing"


def test_the_names_of_overridden_runs_differ_when_the_overrides_do() -> None:
    assert name_overridden("base", []) == "base"
    assert name_overridden("base", ["a.b=1e-4", "c=x"]) == "base--a.b-1e-4--c-x"
    lists = [
        ["p=a/b"],
        ["p=a-b"],
        ["p=a b"],
        ["p=[a,b]"],
        ["p=a", "b=1"],
        ["p=a--b-1"],
        ["p=-a"],
        ["p=a="],
        ["p=a"],
    ]
    lists += [["p-a=b"], ["p=" + "a" * 200], ["p=" + "a" * 201]]
    names = [name_overridden("base", overrides) for overrides in lists]
    assert len(set(names)) == len(names)
    assert all(re.fullmatch(NAME_PATTERN, name) and len(name) <= 150 for name in names)


def test_status_says_what_to_do_once_for_each_kind(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", told="fail out_of_memory CUDA out of memory")
    fake.add("c", told="exit 9")
    fake.add("d")
    main(["sweep", "recipes/toy"])
    capsys.readouterr()
    assert main(["status", "recipes/toy"]) == 0
    shown = capsys.readouterr()
    assert (
        "out_of_memory: CUDA out of memory" in shown.out
        and "lost: the training process died" in shown.out
    )
    assert shown.err.count("hint: out_of_memory: set `launch.retries.out_of_memory: 2`") == 1
    assert (
        "hint: lost: it was killed from outside" in shown.err and len(shown.err.splitlines()) == 2
    )
    assert "; `runner rerun runs/toy/c` resumes from the newest checkpoint" in shown.err
    fake.add("e")  # `rerun` would not start it
    for arguments in (["recipes/toy"], []):
        assert main(["status", *arguments]) == 0
        said = capsys.readouterr().err
        assert "; `runner sweep recipes/toy` resumes from the newest checkpoint" in said


def test_a_stray_word_is_suggested_as_the_output(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main(["export", "toy/a", "my folder"])
    assert "\n\nhint: --output 'my folder'\n" in capsys.readouterr().err


def test_the_version_is_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--version"])
    assert ended.value.code == 0
    assert capsys.readouterr().out == f"recipe-runner {runner.__version__}\n"
