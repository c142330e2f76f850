"""`key=value` and bare names on the command line of each verb."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from runner.cli.main import main
from runner.files import load_json
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]

LR = "training.learning_rate=1e-4"
VARIANT = "a--training.learning_rate-1e-4"


def test_a_sweep_makes_a_variant_of_each_recipe(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "bb")
    assert main(["sweep", "recipes/toy", LR, "--where", "size=1.0"]) == 0
    assert fake.started() == [VARIANT]
    stored = load_json(fake.paths(VARIANT).recipe_path)["recipe"]
    assert stored["run"]["overrides"] == [LR] and stored["training"]["learning_rate"] == 1e-4
    capsys.readouterr()
    assert main(["launch", "recipes/toy/a.yaml", LR]) == 0
    assert "toy/" + VARIANT in capsys.readouterr().out and fake.started() == [VARIANT]
    assert main(["rerun", "toy", LR]) == 0
    assert main(["sweep", LR, "--dry-run", "toy"]) == 0
    shown = capsys.readouterr().out
    assert f"skip    toy/{VARIANT}  completed" in shown
    assert "launch  toy/bb--training.learning_rate-1e-4  pending" in shown
    assert fake.started() == [VARIANT]


def test_a_list_is_what_launch_takes(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    assert main(["sweep", "toy", "--list", LR, "tracking.run_name=a b.jinja"]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"recipes/toy/{name}.yaml {LR} 'tracking.run_name=a b.jinja'" for name in "ab"
    ]


def test_an_override_that_changes_nothing_is_told_and_makes_no_other_run(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    assert main(["launch", "recipes/toy/a.yaml", "loss=full"]) == 0
    assert "note: loss=full changes nothing in recipes/toy/a.yaml" in capsys.readouterr().err
    assert fake.started() == ["a"]
    assert main(["sweep", "toy", "loss=full", LR]) == 0
    said = capsys.readouterr().err
    assert "note: loss=full changes nothing in 2 of 2 recipes, such as recipes/toy/a.yaml" in said
    assert fake.started() == ["a", VARIANT, "b--training.learning_rate-1e-4"]
    assert main(["launch", "a", "loss=full", "--name", "mine"]) == 0
    assert "note" not in capsys.readouterr().err and fake.paths("mine").result_path.exists()


def test_one_experiment_is_one_run_however_it_is_spelled(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b")
    assert main(["sweep", "toy", LR, "data.seed=2"]) == 0
    names = [f"{one}--training.learning_rate-1e-4--data.seed-2" for one in "ab"]
    assert fake.started() == names
    note = "in another spelling, and likewise 1 more"
    for other in (["data.seed=2", LR], ["training.learning_rate=0.0001", "data.seed=2"]):
        capsys.readouterr()
        assert main(["sweep", "toy", *other]) == 0
        assert f"note: `{' '.join(other)}` is the run toy/{names[0]}, {note}" in (
            capsys.readouterr().err
        )
        assert main(["launch", "a", *other]) == 0
    capsys.readouterr()
    assert main(["sweep", "toy", LR, "data.seed=2"]) == 0
    assert fake.started() == names and "spelling" not in capsys.readouterr().err
    micro_batches = [f"training.per_device_train_batch_size={one}" for one in (2, 4)]
    for one in micro_batches:  # the same experiment, and meant to be two runs
        assert main(["launch", "a", LR, one]) == 0
    assert len(fake.started()) == 4, "a micro-batch is no spelling"
    fake.paths(names[0]).recipe_path.write_text("{")
    assert main(["launch", "a", "training.learning_rate=0.0001", "data.seed=2"]) == 0
    assert len(fake.started()) == 5, "an unreadable run matches nothing"
    assert main(["sweep", "toy", LR, "training.learning_rate=2e-4"]) == 2
    assert "training.learning_rate is given twice" in capsys.readouterr().err


def test_overrides_have_to_fit_the_recipes_that_are_selected(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "bb", "ccc")
    other = fake.root / "recipes/toy/bb.yaml"
    other.write_text(other.read_text().replace("max_steps: 2", "num_train_epochs: 1"))
    steps = "training.max_steps=1"  # in addition to epochs, one too many
    assert main(["sweep", "toy", steps, "--where", "size=1,3", "--list"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "recipes/toy/a.yaml",
        "recipes/toy/ccc.yaml",
    ]
    assert main(["sweep", "toy", steps, "--list"]) == 2
    assert "recipes/toy/bb.yaml" in capsys.readouterr().err
    assert main(["sweep", "toy", steps, "--where", "size=9"]) == 2
    assert "has no value '9'" in capsys.readouterr().err


def test_changed_variants_are_told_with_their_overrides(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "b", "c", "d")
    assert main(["sweep", "toy", LR]) == 0
    for path in (fake.root / "recipes" / "toy").glob("*.yaml"):
        path.write_text(path.read_text().replace("max_steps: 2", "max_steps: 3"))
    capsys.readouterr()
    assert main(["sweep", "toy", LR]) == 1
    shown = capsys.readouterr().out
    assert f"runner sweep toy {LR} --fresh" in shown
    assert "`runner status runs/toy` names all" in shown


def test_a_rerun_can_be_previewed(fake: FakeLauncher, capsys: pytest.CaptureFixture[str]) -> None:
    fake.add("a")
    fake.add("bad", told="exit 9\nthen complete")
    assert main(["sweep", "toy"]) == 1
    before, started = fake.tree(), fake.started()
    capsys.readouterr()
    assert main(["rerun", "toy", "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "skip    toy/a  completed" in shown and "launch  toy/bad" in shown
    assert "accelerate launch" in shown
    assert fake.tree() == before and fake.started() == started


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["status", "toy", LR],
            "`status` takes no overrides such as 'training.learning_rate=1e-4'",
        ),
        (["stop", LR, "toy"], "hint: runner stop toy  # variants are included"),
        (["report", "toy", LR], "hint: runner report toy  #"),
        (["power", "toy", LR, "--effect", "1"], "`power` takes no overrides"),
        (["sweep", LR], f"hint: runner sweep recipes/toy {LR}"),
        (["sweep", "runs/toy/a", LR], "runs/toy/a is a run directory: overrides such as"),
        (["masks", "a", "loss"], "'loss' is not an override of the form key=value"),
        (["why", "runs/toy/a", LR], "is a run directory: overrides and `--name` need a recipe"),
        (["launch", "runs/toy/a"], "hint: runner launch recipes/toy/a.yaml"),
        (["launch", "toy/gone"], "hint: runner sweep runs/toy/gone  # uses the recipe that"),
        (["launch", "toy"], "recipes/toy is a folder\n\nhint: runner sweep recipes/toy"),
        (["launch", "nothing"], "no recipe, run or grid is named 'nothing'"),
        (["chat", "new"], "recipes/toy/new.yaml has no run yet: runs/toy/new does not exist"),
        (["export", "new", "--output", "x"], "hint: runner launch recipes/toy/new.yaml"),
    ],
)
def test_what_does_not_go_together_is_2_and_words(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    fake.add("a", "gone")
    assert main(["sweep", "recipes/toy"]) == 0
    (fake.root / "recipes" / "toy" / "gone.yaml").unlink()
    fake.add("new")
    capsys.readouterr()
    before = fake.tree()
    assert main(arguments) == 2
    assert words in capsys.readouterr().err and fake.tree() == before


def test_a_name_goes_with_every_verb(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", "bb")
    for name in ("a", "toy/a"):
        assert main(["check", "--schema-only", name, LR]) == 0
        assert capsys.readouterr().out == "1 recipe is well-formed\n"
        assert main(["launch", name, "--dry-run"]) == 0
        assert "accelerate launch" in capsys.readouterr().out
        assert main(["sweep", name, "--list"]) == 0
        assert capsys.readouterr().out == "recipes/toy/a.yaml\n"
        assert main(["masks", name]) == 2
        assert "data.jsonl line 1" in capsys.readouterr().err, "found, and its row is none"
    assert main(["sweep", "a"]) == main(["launch", "a", LR]) == 0
    capsys.readouterr()
    for name in ("a", "toy/a"):
        assert main(["status", name]) == 0
        assert capsys.readouterr().out.startswith("toy/a  completed")
        assert main(["why", name]) == main(["logs", name]) == main(["stop", name]) == 0
        assert capsys.readouterr().out.startswith("toy/a  runs/toy/a\n")
        for verb in (["chat", name, "--prompt", "x"], ["export", name, "--output", "out"]):
            assert main(verb) == 2
            assert "runs/toy/a" in capsys.readouterr().err, "found, and it has no weights"
    assert main(["status", "toy"]) == 0
    assert [line.split()[0] for line in capsys.readouterr().out.splitlines()] == [
        "toy/a",
        "toy/bb",
        f"toy/{VARIANT}",
    ], "recipes, and the run directories of variants"
    assert main(["report", "toy"]) == 0
    told = capsys.readouterr().out
    assert VARIANT in told and "3 runs, 1 pending, 2 completed" in told, (
        "runs that have not begun count"
    )
    assert main(["launch", "a", "data.seed=2"]) == 0
    capsys.readouterr()
    main(["report", "toy"])
    told = " ".join(capsys.readouterr().out.split())
    assert "2 runs were made with overrides, so they are in no cell or effect" in told
    assert "`runner compare A B`" in told


def test_a_name_of_two_grids_is_listed_by_every_verb(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    other = fake.root / "recipes" / "other" / "a.yaml"
    other.parent.mkdir()
    other.write_text((fake.root / "recipes/toy/a.yaml").read_text().replace("toy,", "other,"))
    for verb in (
        *(["check", "a"], ["launch", "a"], ["sweep", "a"], ["rerun", "a"], ["masks", "a"]),
        *(["status", "a"], ["why", "a"], ["logs", "a"], ["stop", "a"], ["report", "a"]),
        *(["power", "a", "--effect", "1"], ["compare", "a", "a"], ["chat", "a"]),
        ["export", "a", "--output", "x"],
    ):
        assert main(verb) == 2
        said = capsys.readouterr().err
        assert (
            "'a' is the name of 2 runs or grids: recipes/other/a.yaml, recipes/toy/a.yaml" in said
        )
        assert "hint: name one of them: recipes/other/a.yaml" in said


def test_engines_that_write_a_file_give_overrides_to_the_other_machine(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    words = ["sweep", "toy", LR, "tracking.run_name=a b", "--dry-run", "--image", "x"]
    assert main([*words, "--storage", "claim", "--engine", "kubernetes"]) == 0
    pod = yaml.safe_load(capsys.readouterr().out)["spec"]["template"]["spec"]
    script = pod["containers"][0]["command"][2]
    assert f"exec runner launch \"$1\" {LR} 'tracking.run_name=a b' --output-root" in script
    assert main([*words, "--storage", "s3://b/runs", "--engine", "skypilot"]) == 0
    shown = capsys.readouterr().out
    assert f"  recipes/toy/a.yaml \\\n    {LR} \\\n    'tracking.run_name=a b' \\\n" in shown


def test_what_is_submitted_holds_the_overrides(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("a")
    bin_dir = fake.home / "slurm"
    bin_dir.mkdir()
    for name, said in (("squeue", ""), ("scontrol", ""), ("sbatch", "17")):
        (bin_dir / name).write_text(f"#!/bin/sh\necho {said}\n" if said else "#!/bin/sh\n")
        (bin_dir / name).chmod(0o755)
    monkeypatch.setenv("PATH", f"{bin_dir}:{os.environ['PATH']}")
    assert main(["sweep", "toy", LR, "--engine", "slurm"]) == 0
    assert "submitted 1 run as slurm 17" in capsys.readouterr().out
    [submitted] = Path("runs/.slurm").glob("*/recipes/toy/*.json")
    assert submitted.name == f"{VARIANT}.json"
    assert main(["launch", str(submitted)]) == 0
    assert fake.started() == [VARIANT]
    assert main(["sweep", "toy", LR]) == 0 and fake.started() == [VARIANT]


def test_the_command_line_itself(fake: FakeLauncher) -> None:
    fake.add("a")
    done = subprocess.run(
        [sys.executable, "-m", "runner", "launch", "a", "--learning_rate", "1e-4"],
        cwd=fake.root, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 2 and done.stdout == ""
    assert done.stderr.endswith(f"\nhint: runner launch a {LR}\n")
    assert not Path("runs").exists()


LONG = "x" * 300


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["sweep", "toy", f"data.train.path={LONG}"], "file name too long"),
        (["check", "toy", "--system_prompt", LONG], "is not an option of `runner check`"),
        (["sweep", LONG], "no recipe, run or grid is named"),
        (["sweep", "toy", "learning-rate=1e-4"], "hint: training.learning_rate=1e-4\n"),
        (
            ["sweep", "toy", "eval_strategy=no"],
            "hint: \"evaluation.eval_strategy='no'\" evaluation",
        ),
        (["launch", "a", "--r", "8"], "hint: runner launch a adapter.r=8 adapter.method=lora"),
        (
            ["sweep", "toy", "--lora_target_modules", "q_proj", "v_proj"],
            "target_modules=[q_proj,v_",
        ),
        (["sweep", "--report_to", "tensorboard", "wandb", "toy"], "report_to=[tensorboard,wandb]"),
        (["sweep", "toy", "--load_in_8bit"], "quantization.method=8bit adapter.method=lora"),
        (["launch", "a", "--nnodes", "2"], "refuses it: `num_processes: 1` counts all machines"),
        (["why", "a", "--max_steps", "-1"], "refuses it: got -1"),
        (["sweep", "nothing"], "the grid is toy;"),
        (["status", "toy", "--where", "sizes=1"], "did you mean `--where size=...`?"),
    ],
)
def test_words_of_others_get_an_answer_that_can_be_pasted(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], arguments: list[str], words: str
) -> None:
    fake.add("a")
    try:
        code: object = main(arguments)
    except SystemExit as error:  # argparse
        code = error.code
    said = capsys.readouterr().err
    assert code == 2 and words in said and "Traceback" not in said and fake.events() == []
    is_bare = any(one in said for one in ("refuses it", "too long"))
    assert is_bare != ("hint:" in said)


def test_a_glob_of_files_with_an_equals_sign_is_no_override(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    Path("x=y.yaml").write_text(Path("recipes/toy/a.yaml").read_text())
    assert main(["sweep", "--list", "x=*.yaml"]) == 0
    assert capsys.readouterr().out == "x=y.yaml\n"


def write_axes(fake: FakeLauncher, name: str, axes: str, seed: int) -> None:
    fake.add(name)
    path = fake.root / "recipes" / "toy" / f"{name}.yaml"
    text = path.read_text().replace("seed: 1, global", f"seed: {seed}, global")
    path.write_text(text.replace(f"axes: {{size: {len(name)}}}", f"axes: {{{axes}}}"))
    assert f"{{{axes}}}" in path.read_text()


def test_overrides_that_make_two_cells_equal_are_refused(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    write_axes(fake, "a", "repetition: 1", 1)
    write_axes(fake, "b", "repetition: 2", 2)
    assert main(["sweep", "toy", "training.seed=5"]) == 2
    said = capsys.readouterr().err
    assert "makes recipes/toy/a.yaml and recipes/toy/b.yaml the same experiment" in said
    assert main(["sweep", "a", "training.seed=5"]) == 0
