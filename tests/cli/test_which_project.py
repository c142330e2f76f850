"""The project that a command is about: by its paths, by what runs and submissions record, and by
the current folder.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.files import load_json
from runner.run.paths import RunPaths
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.studies import elsewhere, other, said, say_from_root, study

__all__ = ["elsewhere", "fake", "other", "said", "study"]
SLURM: dict[str, str] = {
    "sbatch": "echo 17",
    "squeue": "true",
    "scontrol": "echo MaxArraySize = 8",
}


def test_without_a_path_the_project_is_found_upward_from_here(
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    commands = (["status"], ["clean", "--dry-run"], ["why", "a"], ["compare", "a", "toy/bb"])
    expected = [said(*command) for command in commands]
    assert "toy/a " in expected[0][1] and expected[0][2] == ""
    monkeypatch.chdir(study.root / "sub")
    for command, (code, out, err) in zip(commands, expected, strict=True):
        found = said(*command)
        assert (found[0], say_from_root(study.root, found[1])) == (code, out)
        assert say_from_root(study.root, found[2]) == err


def test_a_project_that_was_moved_or_copied_is_its_own(
    study: FakeLauncher,
    tmp_path_factory: pytest.TempPathFactory,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    copy = tmp_path_factory.mktemp("copies") / "copy"
    shutil.copytree(study.root, copy, ignore=shutil.ignore_patterns("fake"))
    (copy / "data.jsonl").write_text("{}\n{}\n")
    monkeypatch.chdir("/")
    code, out, err = said("status", copy / "runs" / "toy" / "a")
    assert code == 0 and f"note: the project is {copy};" in err and "completed" in out

    # One run alone, in a folder that is no project: where the user is, is as good as any.
    alone = copy.parent / "runs" / "some" / "a"
    shutil.copytree(copy / "runs" / "toy" / "a", alone)
    monkeypatch.chdir(study.root)
    assert said("status", alone)[2] == ""


def test_a_recorded_project_that_is_gone_is_told(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = study.root / "recipes" / "toy" / "a.yaml"
    assert said("launch", recipe, "--output-root", elsewhere / "out")[0] == 0
    moved = study.root.with_name("moved")
    study.root.rename(moved)
    monkeypatch.chdir(moved)
    run_dir = elsewhere / "out" / "toy" / "a"
    code, out, err = said("status", run_dir)
    assert code == 0 and "completed" in out
    assert err == f"note: {run_dir} records the project {study.root}, which does not exist\n"
    # It is the same run, and nothing of it is damaged.
    code, out, _ = said("launch", "recipes/toy/a.yaml", "--output-root", elsewhere / "out")
    assert code == 0 and "completed" in out
    moved.rename(study.root)


def test_paths_of_two_projects_are_refused(
    study: FakeLauncher,
    tmp_path_factory: pytest.TempPathFactory,
    said: Callable[..., tuple[int, str, str]],
) -> None:
    other = tmp_path_factory.mktemp("other")
    shutil.copytree(study.root, other, ignore=shutil.ignore_patterns("fake"), dirs_exist_ok=True)
    code, out, err = said("status", "recipes/toy", other / "recipes" / "toy")
    assert (code, out) == (2, "")
    assert err == (
        "error: these paths belong to 2 projects:\n"
        f"  {study.root}: recipes/toy\n"
        f"  {other}: {other}/recipes/toy\n"
        "\nhint: one command for each project\n"
        "      runner status recipes/toy\n"
        f"      runner status {other}/recipes/toy\n"
    )
    recipes = [
        f"{root}/recipes/toy/{name}.yaml" for root, name in ((study.root, "a"), (other, "bb"))
    ]
    assert said("compare", *recipes)[0] == 2
    hint = f"runner report {study.root}/runs {other}/runs  # run directories of several projects"
    assert hint in said("report", "recipes/toy", other / "recipes" / "toy")[2]
    empty = tmp_path_factory.mktemp("empty")
    code, _, err = said("report", empty)
    assert code == 2 and "nor run directories (folders with a recipe.json)" in err
    # Started runs are compared by their records.
    code, out, _ = said("report", "runs/toy", other / "runs" / "toy" / "a")
    assert code == 0 and out != ""


def test_the_nearest_project_upward_from_a_recipe_is_its_own(
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
) -> None:
    inner = study.root / "sub" / "inner"
    (inner / "recipe_templates").mkdir(parents=True)
    shutil.copytree(study.root / "recipes", inner / "recipes")
    code, out, err = said("status", inner / "recipes" / "toy")
    assert code == 0 and f"note: the project is {inner};" in err
    assert "completed" not in out, "the run of that name is another project's"


def test_a_link_is_in_the_project_where_it_is(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    shared = elsewhere / "shared.yaml"
    (study.root / "recipes" / "toy" / "a.yaml").rename(shared)
    (study.root / "recipes" / "toy" / "a.yaml").symlink_to(shared)
    (elsewhere / "link").symlink_to(study.root)
    expected = said("status", "recipes/toy")
    monkeypatch.chdir(elsewhere)
    assert said("status", study.root / "recipes" / "toy")[:2] == expected[:2]
    code, out, _ = said("launch", "link/recipes/toy/bb.yaml", "--dry-run")
    assert code == 0 and out.startswith(f"cd {elsewhere}/link && ")
    # The project under another name is the current folder: nothing is said in other words.
    monkeypatch.chdir(study.root)
    assert said("status", elsewhere / "link" / "recipes" / "toy") == expected


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"slots = 2\n[runs]\nx = 1\n", "runner.toml: slots, runs: runner.toml has no settings"),
        (b"slots 2\n", "runner.toml is not TOML: "),
        (b"\xff\n", "runner.toml is not TOML: "),
        (b"a=" + b"[" * 30_000, "runner.toml is not TOML: it is nested too deeply"),
        (b"#" * 70_000, "runner.toml has more than 65536 bytes"),
    ],
)
def test_settings_that_nobody_reads_are_refused(
    content: bytes,
    words: str,
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (study.root / "runner.toml").write_bytes(content)
    for folder in (study.root, study.root / "sub"):
        monkeypatch.chdir(folder)
        code, out, err = said("status")
        assert (code, out) == (2, "") and words in err and "Traceback" not in err


def test_a_folder_that_is_gone_is_said_in_words(
    study: FakeLauncher,
    elsewhere: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    gone = elsewhere / "gone"
    gone.mkdir()
    monkeypatch.chdir(gone)
    gone.rmdir()
    assert main(["status", str(study.root / "recipes")]) == 2
    assert capsys.readouterr().err == (
        "error: the current folder is gone\n\nhint: cd to a folder that exists\n"
    )


def test_what_init_makes_is_a_project_from_everywhere(
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(elsewhere)
    (elsewhere / "runner.toml").touch()
    (elsewhere / "sub").mkdir()
    monkeypatch.chdir(elsewhere / "sub")
    # `init` is about no project: its folder is relative to where the user is.
    assert said("init", "new")[0] == 0
    new = elsewhere / "sub" / "new"
    assert "no settings yet" in (new / "runner.toml").read_text()
    monkeypatch.chdir(new / "recipe_templates" / "first")
    code, out, err = said("render")
    assert code == 0 and (new / "recipes" / "first").is_dir(), out + err
    assert said("render", "--check")[0] == 0


def test_what_slurm_executes_is_in_the_project_that_submitted_it(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for name, line in SLURM.items():
        (study.home / name).write_text(f"#!/bin/sh\n{line}\n")
        (study.home / name).chmod(0o755)
    monkeypatch.chdir(elsewhere)
    recipe = study.root / "recipes" / "toy" / "bb.yaml"
    code, _, err = said("sweep", recipe, "--engine", "slurm", "--output-root", "out")
    assert code == 0, err
    (submission,) = (elsewhere / "out" / ".slurm").glob("*/submission.json")
    assert load_json(submission)["project"] == str(study.root)
    assert f"\ncd -- {study.root} || exit\n" in submission.with_name("job.sh").read_text()
    submitted = submission.parent / "recipes" / "toy" / "bb.json"
    monkeypatch.chdir("/")
    code, out, err = said("launch", submitted, "--dry-run", "--output-root", elsewhere / "out")
    assert code == 0 and out.startswith(f"cd {study.root} && "), err


def test_an_older_run_directory_does_not_say_its_project(
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = study.paths("a").recipe_path
    content = load_json(path)
    monkeypatch.chdir("/")
    for value in (None, 7, "", "\0", "no/such/folder", ["/"], "/x" * 5000, "/\x1b[2J\ud800"):
        path.write_text(json.dumps({**content, "project": value} if value else content))
        err = said("status", study.paths("a").run_dir)[2]
        assert f"note: the project is {study.root};" in err, value
        assert "\x1b" not in err and "Traceback" not in err


def test_links_in_a_circle_are_no_traceback(
    study: FakeLauncher, said: Callable[..., tuple[int, str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    (study.root / "sub" / "loop").symlink_to("loop")
    monkeypatch.chdir(study.root / "sub")
    for path in ("loop", "../sub/loop", "loop/../x", "../sub/loop/../x.yaml"):
        code, _, err = said("status", path)
        assert code == 2 and err.count("error: ") == 1, path


def test_a_name_of_this_project_beside_a_path_of_another_is_refused(
    study: FakeLauncher,
    other: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    path = os.path.relpath(other / "recipes" / "toy", study.root)
    options = ("loss=completion", "--where", "size=1", "--dry-run", "--output-root", "my runs")
    for folder, words in ((study.root, path), (study.root / "sub", f"../{path}")):
        monkeypatch.chdir(folder)
        for named in ("toy", "recipes/t?y", "none"):
            code, out, err = said("sweep", named, words, *options)
            assert (code, out) == (2, "") and "error: these paths belong to 2 projects:\n" in err
            said_options = "loss=completion --where size=1 --dry-run --output-root 'my runs'"
            first = f"'{named}'" if "?" in named else named
            assert f"\n      runner sweep {first} {said_options}\n" in err
            assert err.endswith(f"\n      runner sweep {words} {said_options}\n")
    # Arms are looked up in the grid that is named.
    monkeypatch.chdir(study.root)
    err = said("compare", "size=1", "size=2", "--grid", path)[2]
    assert f"note: the project is {other};" in err and "2 projects" not in err


def test_an_empty_folder_hides_neither_the_project_nor_a_name(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = said("status", "toy")
    (study.root / "sub" / "toy").mkdir()
    monkeypatch.chdir(study.root / "sub")
    assert said("status", "toy")[:2] == expected[:2]
    (elsewhere / "toy").mkdir()
    monkeypatch.chdir(elsewhere)
    code, out, err = said("status", "toy", "--output-root", study.root / "runs")
    assert f"note: the project is {study.root};" in err and (code, out) == expected[:2]


def test_a_run_directory_leads_into_no_folder_that_it_names(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    downloaded = elsewhere / "downloaded" / "toy" / "a"
    shutil.copytree(study.root / "runs" / "toy" / "a", downloaded)
    monkeypatch.chdir("/")

    def record(project: Path) -> str:
        path = RunPaths(downloaded).recipe_path
        path.write_text(json.dumps({**load_json(path), "project": str(project)}))
        return said("status", downloaded)[2]

    plain = elsewhere / "plain\x1b[2J"
    (plain / "models").mkdir(parents=True)
    (plain / "data.jsonl").touch()
    err = record(plain)
    assert "the project is" not in err and "\x1b" not in err
    assert err.startswith(f"note: {downloaded} records the project {elsewhere}/plain")
    assert err.partition("\n")[0].endswith(", which is not entered")
    assert f"note: the project is {study.root};" in record(study.root)
    # A run in another project is that one's, unless the user is in the one that is recorded.
    (elsewhere / "runner.toml").touch()
    err = record(study.root)
    assert "which is not entered" in err and f"note: the project is {elsewhere};" in err
    monkeypatch.chdir(study.root)
    assert said("status", downloaded)[2] == ""
