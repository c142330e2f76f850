"""The first hour of a new user: a message names everything missing, mistyped or in the wrong place,
before anything is started or moved.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.grid.recipe_files import seal
from tests.conftest import ROOT
from tests.support.fake_launcher import FakeLauncher, fake
from tests.support.toy_grid import build_toy

__all__ = ["fake"]


@pytest.mark.parametrize("is_whole_once", [True, False])
def test_a_model_without_weights_is_refused_before_anything_is_moved(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], is_whole_once: bool
) -> None:
    fake.add("a")
    if is_whole_once:
        assert main(["sweep", "recipes/toy"]) == 0
    (fake.root / "models/toy/model.safetensors").unlink()
    before, recipe = fake.tree(), "recipes/toy/a.yaml"
    capsys.readouterr()
    for words in (
        ["sweep", "recipes/toy"],
        ["sweep", "recipes/toy", "--fresh", "--yes"],
        ["launch", recipe],
        ["launch", recipe, "--fresh"],
        ["check", recipe],
    ):
        for option in [[]] if words[0] == "check" else [["--dry-run"], []]:
            assert main([*words, *option]) == 2, words
            output = capsys.readouterr()
            assert "models/toy/model.safetensors" in output.err, words
            assert "hint: copy the whole folder again, or name another one in" in output.err
            assert "a model's folder holds config.json and model.safetensors" in output.err
            assert "--fresh" not in output.out + output.err
    assert main(["why", recipe]) == 0
    assert "missing     model.path: models/toy/model.safetensors" in capsys.readouterr().out
    assert main(["status", recipe]) == 0
    output = capsys.readouterr()
    state = "completed" if is_whole_once else "pending"
    assert f"toy/a  {state}" in output.out and "changed" not in output.out
    assert "inputs missing: models/toy/model.safetensors" in output.out
    assert fake.tree() == before


NOWHERE = "no project here: neither runner.toml nor recipe_templates/ in {} or above it"


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["status"], 0),
        (["render", "--check"], 2),
        (["render", "first"], 2),
        (["report", "first"], 2),
        (["clean"], 2),
    ],
)
def test_outside_a_project_it_says_so(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    words: list[str],
    code: int,
) -> None:
    monkeypatch.chdir(tmp_path)
    assert main(words) == code
    output = capsys.readouterr()
    assert NOWHERE.format(tmp_path) in output.err
    assert "recipes/demo" not in output.err, "a folder that is not here"
    assert output.out == ""
    (tmp_path / "runner.toml").touch()
    main(words)
    assert "no project" not in capsys.readouterr().err


def test_demo_models_below_a_project_says_where_they_are_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "runner.toml").touch()
    (tmp_path / "notes").mkdir()
    (tmp_path / "notes" / "demo_models").touch()  # so that nothing is built
    monkeypatch.chdir(tmp_path / "notes")
    assert main(["demo-models"]) == 2
    assert f"note: the models are built in {tmp_path}/notes/demo_models" in capsys.readouterr().err


@pytest.mark.parametrize("named", ["study", "study/"])
def test_a_project_folder_means_its_recipes(
    fake: FakeLauncher,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    named: str,
) -> None:
    fake.add("a")
    study = fake.root / "study"
    (study / "recipe_templates" / "models").mkdir(parents=True)
    (study / "recipe_templates" / "models" / "card.yaml").write_text("path: x\n")
    for name in ("cpu.yaml", "data.jsonl", "models"):
        (fake.root / name).rename(study / name)
    assert main(["sweep", named, "--dry-run"]) == 2
    assert "runner render\n" in capsys.readouterr().err
    (fake.root / "recipes").rename(study / "recipes")
    assert main(["sweep", named, "--dry-run"]) == 0
    assert "launch  toy/a  pending" in capsys.readouterr().out
    monkeypatch.chdir(study)
    assert main(["status", "."]) == 0
    assert "toy/a  pending" in capsys.readouterr().out
    assert main(["sweep", "."]) == 0
    assert main(["report", "recipes/toy"]) == 0
    (study / "recipes").rename(study / "elsewhere")
    capsys.readouterr()
    assert main(["status", "."]) == 0
    assert "toy/a  completed" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["toy", "recipes/toy", "recipe_templates/toy", "recipes/toy/"])
def test_a_grid_is_rendered_by_its_name_and_by_its_folders(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    name: str,
) -> None:
    root = build_toy(tmp_path)()
    monkeypatch.chdir(root)
    assert main(["render", name]) == 0
    assert "8 written, 0 unchanged in recipes/toy" in capsys.readouterr().out


@pytest.mark.parametrize("verb", [["check", "--schema-only"], ["sweep", "--dry-run"], ["launch"]])
def test_every_verb_that_reads_recipes_tells_which_were_edited(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], verb: list[str]
) -> None:
    fake.add("a")
    path = fake.root / "recipes" / "toy" / "a.yaml"
    body = path.read_text()
    path.write_text(seal("toy", body))
    assert main([*verb, "recipes/toy/a.yaml"]) == 0
    assert "edited" not in capsys.readouterr().err
    path.write_text(seal("toy", body) + "# mine\n")
    assert main([*verb, "recipes/toy/a.yaml"]) == 0
    assert "note: edited after rendering: recipes/toy/a.yaml" in capsys.readouterr().err


def test_a_template_that_changed_after_rendering_is_noted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    root = build_toy(tmp_path)()
    monkeypatch.chdir(root)
    check = ["check", "--schema-only", "recipes/toy"]
    template = root / "recipe_templates" / "toy" / "recipe.yaml.j2"
    assert main(["render", "toy"]) == 0
    text = template.read_text()
    later = time.time() + 10

    def note(content: str) -> str:
        template.write_text(content)
        os.utime(template, (later, later))
        assert main(check) == 0
        return capsys.readouterr().err

    assert note(text + "\n{# no recipe shows this #}") == ""
    changed = text.replace("training:\n", "training:\n  weight_decay: 0.25\n")
    assert changed != text
    assert "8 of 8 recipes would differ; `runner render toy` updates them" in note(changed)
    for folder in (str(root / "recipes" / "toy"), "recipes/../recipes/toy"):
        assert main([*check[:-1], folder]) == 0
        assert "8 of 8 recipes would differ" in capsys.readouterr().err, folder
    grid = root / "recipe_templates" / "toy" / "grid.yaml"
    cells = grid.read_text()
    grid.write_text(cells.replace("[60, 180]", "[60, 170]"))
    assert grid.read_text() != cells
    assert "4 recipes would be stale, 4 recipes would be new; `runner render toy --prune`" in note(
        text
    )
    grid.write_text(cells)
    assert "can no longer be rendered" in note("{{ nobody }}")
    template.unlink()  # recipes without a template are the user's own
    grid.unlink()
    assert main(check) == 0 and capsys.readouterr().err == ""


def test_rerun_counts_what_was_never_started(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add(*"abcd")
    fake.tell("a", "exit 1")
    main(["launch", "recipes/toy/a.yaml"])
    capsys.readouterr()
    assert main(["rerun", "recipes/toy", "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert "skip    3 runs were never started (`rerun` runs only those that were started)\n" in said
    assert "toy/b" not in said and said.count("never started") == 1


@pytest.mark.parametrize(
    "module", ["argparse", "runner.cli.main", "runner.cli.arguments", "runner.cli.commands"]
)
def test_a_ctrl_c_while_it_is_being_loaded_prints_no_traceback(module: str) -> None:
    code = f"""
import runpy, sys

class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            raise KeyboardInterrupt

sys.modules.pop({module!r}, None)
sys.meta_path.insert(0, Finder())
sys.argv = ["runner", "status"]
runpy.run_module("runner", run_name="__main__")
"""
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=600
    )
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped\n")


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--completion", "resolutoin"], "no such column, did you mean `resolution`?"),
        (["--prompt", "{chat.q}"], "name a top-level column, or start without --data and write a"),
        (
            ["--completion", "chat.q"],
            "name a top-level column, or start without --data and write a",
        ),
        (["--axis", "seed=1..3"], "hint: --axis seed=1,2,3\n"),
        (["--axis", "adapter.r=8,sixteen,32"], "hint: --axis adapter.r=8,32\n"),
        (["--axis", "training.packing=true"], "decided by the runner, which packs no rows"),
    ],
)
def test_what_is_mistyped_of_a_new_project_is_answered(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    said: str,
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tickets(tmp_path / "tickets.jsonl")
    given = ["--prompt", "{ticket}", "--completion", "resolution"]
    assert main(["init", "new", "--data", "tickets.jsonl", *given, *options]) == 2
    assert said in capsys.readouterr().err
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize(
    ("options", "hint"),
    [
        ([], "{text} --completion agent"),
        (["--completion", "queue"], "{text} --completion queue"),
        (["--prompt", "Sort: {text}"], "Sort: {text} --completion ANSWER"),
        (["--prompt", "Sort:", "--completion", "queue"], "Sort: {text} --completion queue"),
        (["--prompt", "{queue}", "--completion", "queue"], "{queue} --completion ANSWER"),
        (["--prompt", "{the day}: {text}", "--completion", "queue"], "the day --completion queue"),
    ],
)
def test_a_hint_keeps_the_words_of_the_user(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    options: list[str],
    hint: str,
) -> None:
    """Dates and empty columns are not guessed."""
    monkeypatch.chdir(tmp_path)
    row = "2026-01-07,07.01.2026,The kettle never arrived,,Angelika,1\n"
    Path("rows.csv").write_text("opened,the day,text,note,agent,queue\n" + row)
    assert main(["init", "new", "--data", "rows.csv", *options]) == 2
    said = capsys.readouterr().err
    assert 'agent    "Angelika"\n' in said or "would stay as it is" in said
    found = shlex.split(said.partition("--prompt ")[2] if not options else last_hint(said))
    assert " ".join(found[: found.index("--completion") + 2]) == hint


def last_hint(said: str) -> str:
    return said.rpartition("--prompt ")[2]


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["init", "new", "--promt", "{a}"], "`--promt` is not an option of `runner init`;"),
        (["init", "new", "--promt", "{a}"], "; did you mean `--prompt`?\n"),
        (["report", "first", "--hmtl=a.html"], "hint: runner report first --html=a.html\n"),
        (["init", "new", "--zzz"], "hint: `runner init --help` lists the options\n"),
    ],
)
def test_a_misspelled_option_is_answered(
    capsys: pytest.CaptureFixture[str], words: list[str], said: str
) -> None:
    assert main(words) == 2
    assert said in capsys.readouterr().err


@pytest.mark.parametrize(
    ("verb", "said"), [("swep", ", did you mean sweep?\n"), ("zzz", "'export')\n")]
)
def test_a_misspelled_verb_is_answered(
    capsys: pytest.CaptureFixture[str], verb: str, said: str
) -> None:
    with pytest.raises(SystemExit):
        main([verb, "first"])
    assert said in capsys.readouterr().err


def test_a_new_project_tells_each_column_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    write_tickets(tmp_path / "tickets.jsonl")
    given = ["--data", "tickets.jsonl", "--completion", "resolution"]
    assert main(["init", "one", *given, "--prompt", "Language {lang}: {ticket}"]) == 0
    assert "prompt_completion: lang, ticket -> resolution\n" in capsys.readouterr().out
    assert main(["init", "two", *given, "--prompt", "{ticket}"]) == 0
    assert capsys.readouterr().out.count("lang") == 1


def write_tickets(path: Path) -> None:
    rows = [
        {"lang": "en", "ticket": f"broken {n}", "resolution": f"mend {n}", "chat": {"q": "a"}}
        for n in range(40)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_what_is_nowhere_near_is_not_suggested(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("gemma_full_080")
    for named in ("recipes/toy/nothere.yaml", "toy/nothere"):
        assert main(["why", named]) == 2
        assert "did you mean" not in capsys.readouterr().err
    assert main(["why", "recipes/toy/gemma_ful_080.yaml"]) == 2
    assert "did you mean recipes/toy/gemma_full_080.yaml?" in capsys.readouterr().err
