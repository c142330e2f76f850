"""A command works in the project of its arguments, no matter where it is started: it reads the same
files, writes to the same runs, and prints commands that can be pasted in the user's folder.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner.files import load_json
from runner.run.paths import RunPaths
from tests.conftest import Project
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.studies import elsewhere, paste, said, say_from_root, study

__all__ = ["elsewhere", "fake", "said", "study"]


COMMANDS = (
    ("status", "{}recipes/toy"),
    ("status", "{}runs/toy", "--json"),
    ("status", "{}runs/toy/a"),
    ("status", "{}recipes/t*/[ab]*.yaml"),
    ("why", "{}recipes/toy/a.yaml"),
    ("why", "{}runs/toy/a"),
    ("why", "{}recipes/toy/bb.yaml", "loss=completion"),
    ("check", "--schema-only", "{}recipes"),
    ("report", "{}runs/toy"),
    ("compare", "{}runs/toy/a", "{}recipes/toy/bb.yaml"),
    ("compare", "size=1", "size=2", "--grid", "{}recipes/toy"),
    ("power", "{}recipes/toy", "--effect", "0.1"),
    ("logs", "{}runs/toy/a"),
    ("logs", "{}recipes/toy/bb.yaml"),
    ("stop", "{}recipes/toy"),
    ("sweep", "{}recipes/toy", "--dry-run"),
    ("sweep", "{}recipes/toy", "--dry-run", "--engine", "slurm"),
    ("launch", "{}recipes/toy/bb.yaml", "--dry-run"),
    ("launch", "{}recipes/toy/a.yaml"),
    ("launch", "{}recipes/toy"),
    ("launch", "{}recipes/toy/none.yaml"),
    ("launch", "{}recipes/toy/a.yaml", "loss=x"),
    ("export", "{}runs/toy/a", "--output", "/nowhere/model"),
    ("chat", "{}runs/toy/bb", "--prompt", "hello"),
    ("masks", "{}recipes/toy/bb.yaml", "data.train.path=none.jsonl"),
)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_a_command_says_the_same_wherever_it_is_started(
    command: tuple[str, ...],
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def give(prefix: str) -> list[str]:
        return [word.format(prefix) for word in command]

    root = study.root
    expected = said(*give(""))
    before = study.tree()
    for folder, prefix in (
        (root / "sub", "../"),
        (root / "sub", f"{root}/"),
        (elsewhere, f"{root}/"),
        (elsewhere, f"{os.path.relpath(root, elsewhere)}/"),
        (Path("/"), f"{root}/"),
    ):
        monkeypatch.chdir(folder)
        code, out, err = said(*give(prefix))
        # A submission has the time and a random word in its name.
        cut = out.find("submission=") if "slurm" in command else len(out) + 1
        assert (code, say_from_root(root, out)[:cut], say_from_root(root, err)) == (
            expected[0],
            expected[1][:cut],
            expected[2],
        )
        assert f"note: the project is {root}; paths are relative to it\n" in err
    assert study.tree() == before
    assert sorted(path.name for path in elsewhere.iterdir()) == ["cpu.yaml", "data.jsonl"]


def test_what_is_no_path_here_is_one_of_the_project(
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = said("status", "recipes/toy")
    monkeypatch.chdir(study.root / "sub")
    assert said("status", "recipes/toy")[:2] == expected[:2]
    # A path that exists here has precedence over the project's.
    (study.root / "sub" / "recipes" / "toy").mkdir(parents=True)
    code, _, err = said("status", "recipes/toy")
    assert code == 2 and "no recipe, run or grid is named 'sub/recipes/toy'" in err


def test_rows_are_those_of_the_project(
    project: Project,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    project.add_model()
    (project.root / "runner.toml").touch()
    monkeypatch.chdir(project.root)
    masks = said("masks", "recipe.yaml", "--rows", "1")
    check = said("check", "recipe.yaml")
    assert masks[0] == check[0] == 0, masks[2] + check[2]
    monkeypatch.chdir(elsewhere)
    assert said("masks", project.recipe_path, "--rows", "1")[:2] == masks[:2]
    assert said("check", project.recipe_path)[:2] == check[:2]


def test_a_launch_from_elsewhere_is_that_of_the_project(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    study.add("c", "dd")
    root = study.root
    assert said("launch", "recipes/toy/c.yaml")[0] == 0
    monkeypatch.chdir(elsewhere)
    assert said("sweep", root / "recipes" / "toy" / "dd.yaml")[0] == 0
    stored = [load_json(study.paths(name).recipe_path) for name in ("c", "dd")]
    assert [one["project"] for one in stored] == ["../../..", "../../.."]
    assert stored[0]["contents"] == stored[1]["contents"]
    assert "data.jsonl" in stored[0]["contents"]
    attempts = [study.attempts(name)[0] for name in ("c", "dd")]
    commands = [" ".join(one["command"]).replace("toy/c", "toy/dd") for one in attempts]
    assert commands[0] == commands[1] and commands[0].endswith("-m runner.sft runs/toy/dd")
    assert not (elsewhere / "runs").exists()
    monkeypatch.chdir(root)
    assert "completed" in said("launch", "recipes/toy/dd.yaml")[1]


def test_a_printed_command_can_be_pasted_where_the_user_is(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = study.root
    recipe = root / "recipes" / "toy" / "bb.yaml"
    monkeypatch.chdir(elsewhere)
    _, out, _ = said("launch", recipe, "--prepare")
    assert out.startswith(f"cd {root} && ")
    paste(out, study)
    assert study.paths("bb").result_path.exists()

    recipe.write_text(recipe.read_text().replace("loss: full", "loss: completion"))
    code, _, err = said("launch", recipe)
    hint = f"cd {root} && runner launch recipes/toy/bb.yaml --fresh"
    assert code == 2 and f"\nhint: {hint}  # " in err
    assert f"\n          {hint.replace('launch', 'sweep')}  # " in said("sweep", recipe)[1]
    paste(hint, study)
    assert load_json(study.paths("bb").recipe_path)["recipe"]["loss"] == "completion"

    _, _, err = said("logs", root / "recipes" / "toy" / "bb.yaml", "--attempt", "7")
    study.add("ccc")
    code, _, err = said("logs", root / "recipes" / "toy" / "ccc.yaml")
    assert f"hint: cd {root} && runner launch recipes/toy/ccc.yaml  # starts it" in err


def test_what_the_user_names_to_be_written_or_loaded_is_relative_to_where_he_is(
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    sub = study.root / "sub"
    monkeypatch.chdir(sub)
    (sub / "step-4.zip").touch()
    assert said("launch", "../recipes/toy/bb.yaml", "--resume", "step-4.zip")[0] == 0
    assert study.attempts("bb")[0]["resume"] == str(sub / "step-4.zip")
    study.add("c")
    assert said("launch", "../recipes/toy/c.yaml", "--resume", "latest")[0] == 0
    assert study.attempts("c")[0]["resume"] == "latest"
    assert said("report", "../runs/toy", "--html", "page.html")[0] == 0
    page = (sub / "page.html").read_text()
    # A page goes to others: it says that its commands are for the folder of the project.
    assert "\nrunner report runs/toy " in page and str(study.root) not in page


@pytest.mark.parametrize("is_inside", [True, False])
def test_an_output_root_is_relative_to_where_the_user_is(
    is_inside: bool,
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    folder = study.root / "sub" if is_inside else elsewhere
    recipe = study.root / "recipes" / "toy" / "a.yaml"
    monkeypatch.chdir(folder)
    assert said("launch", recipe, "--output-root", "out")[0] == 0
    run_dir = folder / "out" / "toy" / "a"
    stored = load_json(RunPaths(run_dir).recipe_path)
    assert stored["project"] == ("../../../.." if is_inside else str(study.root))
    assert "completed" in said("status", "--output-root", "out", recipe)[1]

    # The record counts, where nothing upward from the run is a project.
    monkeypatch.chdir("/")
    for path in (run_dir, run_dir.parent, f"{folder}/out/t*"):
        code, out, err = said("status", path)
        assert code == 0 and "completed" in out and f"note: the project is {study.root};" in err
    assert f"note: the project is {study.root};" in said("status", "--output-root", folder)[2] or (
        not is_inside
    )
    (study.root / "data.jsonl").write_text("{}\n{}\n")
    os.utime(study.root / "data.jsonl", (1, 1))
    assert "data.jsonl" in said("why", run_dir)[1]
    changed = f"cd {study.root} && runner launch recipes/toy/a.yaml --output-root "
    _, _, err = said("launch", recipe, "--output-root", folder / "out")
    where = "sub/out" if is_inside else str(folder / "out")
    assert f"hint: {changed}{where} --fresh" in err


def test_folders_with_the_characters_of_patterns(
    study: FakeLauncher,
    tmp_path_factory: pytest.TempPathFactory,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = tmp_path_factory.mktemp("odd") / "a [b] 'c' *"
    shutil.copytree(study.root, root, ignore=shutil.ignore_patterns("fake"))
    monkeypatch.chdir(root)
    expected = said("status", "recipes/toy")
    (root / "[d]").mkdir()
    monkeypatch.chdir(root / "[d]")
    for path in ("../recipes/toy", "../recipes/t*", "../recipes/toy/*.yaml"):
        assert said("status", path)[:2] == expected[:2]
    assert said("launch", "../recipes/toy/bb.yaml", "--dry-run")[1].startswith("cd '")


def test_a_missing_file_that_is_where_the_user_is(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    (elsewhere / "mine.jsonl").write_text("{}\n")
    monkeypatch.chdir(elsewhere)
    recipe = study.root / "recipes" / "toy" / "bb.yaml"
    code, _, err = said("launch", recipe, "data.train.path=mine.jsonl")
    assert code == 2 and "data.train.path: mine.jsonl" in err
    assert (
        f"hint: mine.jsonl is in {elsewhere}, but paths are relative to the project, {study.root}:"
        f" write the full path, {elsewhere}/mine.jsonl\n" in err
    )
    code, _, err = said("launch", recipe, "data.train.path=none.jsonl")
    assert code == 2 and "hint: paths are relative to the project; correct them" in err


def test_what_check_suggests_can_be_pasted(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    recipe = study.root / "recipes" / "toy" / "bb.yaml"
    text = recipe.read_text()
    monkeypatch.chdir(elsewhere)
    recipe.write_text(text.replace("models/toy", "demo_models/toy"))
    _, out, err = said("check", recipe)
    assert f"cd {study.root} && runner demo-models" in out + err
    task = "{name: python, function: 'rows.py:build'}"
    recipe.write_text(text.replace("{name: conversations}", task))
    (study.root / "rows.py").write_text("def build(row):\n    return row\n")
    allow = f"cd {study.root} && runner check --allow-code recipes/toy/bb.yaml"
    for verb in ("check", "launch"):
        _, out, err = said(verb, recipe)
        assert allow in out + err, verb
    assert (out + err).count(f"cd {study.root}") == 1


def test_a_file_for_other_machines_is_the_same_wherever_it_is_written(
    study: FakeLauncher,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    options = ("--dry-run", "--image", "i:1", "--storage", "claim")
    for engine in ("kubernetes", "skypilot"):
        words = ("--engine", engine, *options)
        monkeypatch.chdir(study.root)
        expected = said("sweep", "recipes/toy", *words)
        assert expected[0] == 0 and "recipes/toy/bb.yaml" in expected[1], expected[2]
        monkeypatch.chdir(study.root / "sub")
        code, out, _ = said("sweep", "../recipes/toy", *words)
        # SkyPilot takes its folder from where it is started.
        assert (code, out.replace(f"workdir: {study.root}\n", "workdir: .\n")) == expected[:2]
        assert (str(study.root) in out) == (engine == "skypilot")


def test_what_is_printed_elsewhere_can_be_pasted_there(
    study: FakeLauncher,
    elsewhere: Path,
    said: Callable[..., tuple[int, str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    root = study.root
    monkeypatch.chdir(elsewhere)
    paths = [f"{root}/recipes/toy/{name}.yaml" for name in ("a", "bb")]
    assert said("sweep", f"{root}/recipes/toy", "--list")[1].split() == paths
    monkeypatch.chdir(root / "sub")
    assert f"`cd {root} && runner sweep recipes/toy` starts them" in said("status")[1]

    paths_a = study.paths("a")
    recipe = paths_a.recipe_path.read_bytes()
    paths_a.recipe_path.write_text("{")
    err = said("status")[2]
    fresh = f"`cd {root} && runner launch recipes/toy/a.yaml --fresh` moves the run aside"
    assert f"hint: unreadable: {fresh}" in err
    paths_a.recipe_path.write_bytes(recipe)

    # Runs are moved aside under their lease.
    paths_a.lease_path.unlink()
    paths_a.lease_path.mkdir()
    mv = f"mv {paths_a.lease_path.relative_to(root)} {paths_a.lease_path.relative_to(root)}.aside"
    for verb in (("launch", "a"), ("status", "a"), ("launch", "a", "--fresh")):
        err = said(*verb)[2]
        assert f"move it away: cd {root} && {mv}\n" in err and "--fresh" not in err, verb


def test_paths_with_blanks_are_quoted_in_hints(
    study: FakeLauncher, said: Callable[..., tuple[int, str, str]]
) -> None:
    folder = study.root / "my recipes"
    folder.mkdir()
    assert "\nhint: runner sweep 'my recipes'\n" in said("launch", "my recipes")[2]
    shutil.copy(study.root / "recipes" / "toy" / "bb.yaml", folder)
    err = said("chat", "my recipes/bb.yaml", "--prompt", "hello")[2]
    assert "\nhint: runner launch 'my recipes/bb.yaml'\n" in err


def test_a_folder_called_like_a_recipe_is_said_to_be_one(
    study: FakeLauncher, said: Callable[..., tuple[int, str, str]]
) -> None:
    (study.root / "recipes" / "toy" / "zz.yaml").mkdir()
    for command in (("check", "--schema-only"), ("status",), ("sweep", "--dry-run")):
        code, _, err = said(*command, "recipes/toy")
        assert code == 2 and "recipes/toy/zz.yaml is a folder, and should be a file" in err
