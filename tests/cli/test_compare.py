"""`runner compare` and the options of `runner report`, from arguments to exit codes."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.files import load_json
from runner.recipe.parse import dump_recipe
from runner.run.paths import RunPaths
from tests.support.reports import make_recipe, pending
from tests.support.scored_runs import make_attempt, make_seed_recipe, scored, scored_grid
from tests.support.whole_runs import record

TRUTH = {"full": 1.2, "completion": 1.0}
BOTH_LOSSES = ["compare", "loss=full", "loss=completion", "--grid", "demo"]


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the runs of one grid: two losses x three seeds."""
    monkeypatch.chdir(tmp_path)
    scored_grid(Path("runs"), {"loss": ["full", "completion"]}, lambda loss: TRUTH[loss])
    return tmp_path


@pytest.mark.parametrize(
    "arms",
    [
        ("demo/full_s1", "demo/completion_s1"),
        ("full_s1", "completion_s1"),
        ("runs/demo/full_s1", "runs/demo/completion_s1/"),
        ("full_s1", "completion_s1", "--grid", "demo"),
    ],
)
def test_two_runs(project: Path, capsys: pytest.CaptureFixture[str], arms: tuple[str, ...]) -> None:
    assert main(["compare", *arms]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# A: demo/full_s1; B: demo/completion_s1\n")
    assert (
        "| loss " in shown and "| completion |" in shown and "## What was not recorded, so" in shown
    )
    assert "rows only: about these trained models" in shown
    assert "For the recipes, with all their seeds:" in shown and "| seeds and rows |" in shown
    assert max(map(len, shown.splitlines())) <= 120


def test_an_axis_that_explains_all_returns_0(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "full_s1", "completion_s1", "--axis", "loss"]) == 0
    assert "Every difference is explained by the axis loss." in capsys.readouterr().out


@pytest.mark.parametrize("seeds", [(1, 2), (1,)])
def test_seeds_of_their_own_explain_two_runs_of_cells_with_several(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    seeds: tuple[int, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    axes = {"loss": ["full", "completion"]}
    scored_grid(Path("runs"), axes, lambda loss: TRUTH[loss], seeds=seeds, own_seeds=True)
    arms = ["compare", "demo/full_s1", "demo/completion_s1", "--axis", "loss"]
    has_several = len(seeds) > 1
    assert main(arms) == (0 if has_several else 1)
    shown = capsys.readouterr().out
    assert ("seeds of their own" in shown) == has_several
    assert ("does not explain** training.seed" in shown) != has_several
    if has_several:  # another number is another seed, even if it is derived
        assert main([*arms[:2], "completion_s2", "--axis", "loss"]) == 1
    assert main([*BOTH_LOSSES, "--axis", "loss"]) == (0 if has_several else 1)


def test_what_the_axis_does_not_explain_returns_1(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("odd", {"loss": "completion", "seed": 4}, "loss=completion")
    scored(Path("runs"), recipe, 1.0, num_steps=99, attempt=make_attempt(versions={"torch": "9"}))
    assert main(["compare", "full_s1", "odd", "--axis", "loss"]) == 1
    assert "**the axis loss does not explain** updates." in capsys.readouterr().out
    assert main(["compare", "full_s1", "odd"]) == 0


def test_another_machine_returns_1_and_is_listed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, loss, gpu, base in (("old", "full", "A100", 3.0), ("new", "completion", "H200", 3.1)):
        keys = [f"loss={loss}", "model.dtype=bfloat16"]
        recipe = make_recipe(name, {"loss": loss, "seed": 5}, *keys)
        made = make_attempt(hardware={"cpu": "Xeon", "gpu": gpu}, host="node-17")
        scored(Path("runs"), recipe, 1.0, base=3.0 + (base - 3) / 10, attempt=made)
    assert main(["compare", "old", "new", "--axis", "loss"]) == 1
    shown = " ".join(capsys.readouterr().out.split())
    assert "**the axis loss does not explain** GPU." in shown and "| A100 | H200 |" in shown
    close = shown.partition("## What is equal up to rounding")[2].partition("##")[0]
    assert "scores of the base model: 3 and 3.01, equal within 0.5%" in close
    assert "scores of the base model" not in shown.partition("## What is equal ")[0]
    assert "node-17" not in shown
    assert main(["compare", "old", "new", "--json"]) == 0
    lines = {line["what"]: line for line in json.loads(capsys.readouterr().out)["certificate"]}
    assert lines["scores of the base model"]["status"] == "close"
    assert lines["scores of the base model"]["within"] == "0.5%"
    assert lines["uncommitted changes"]["status"] == "not recorded"


def test_two_values_of_an_axis(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["compare", "loss=full", "loss=completion", "--grid", "demo", "--axis", "loss"]
    assert main(arguments) == 0
    shown = capsys.readouterr().out
    assert "3 pairs of runs, equal in all other axes" in shown
    assert "### loss: full -> completion" in shown and "| all | " in " ".join(shown.split())
    assert "3 x 40" in shown
    assert main([*arguments, "--json"]) == 0
    parsed: dict[str, Any] = json.loads(capsys.readouterr().out)
    assert len(parsed["pairs"]) == 3 and parsed["unexplained"] == []
    [effects] = parsed["effects"]
    assert effects["cells"][0]["estimate"] == pytest.approx(-0.2, abs=0.05)


def test_two_values_with_one_seed_are_rows_only(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    scored_grid(
        Path("runs"),
        {"loss": ["full", "completion"], "num_train_samples": [60, 180]},
        lambda loss, num_train_samples: TRUTH[loss],
        seeds=(1,),
    )
    assert main(["compare", "loss=full", "loss=completion", "--grid", "demo"]) == 0
    shown = capsys.readouterr().out
    assert "no verdict on the recipe" in shown and "1 x 40" in shown
    # One more condition names one run on each side
    arms = ["loss=full,num_train_samples=60", "loss=completion,num_train_samples=60"]
    assert main(["compare", *arms, "--grid", "runs/demo"]) == 0
    assert "## Differences (B - A)" in capsys.readouterr().out


def test_json_of_two_runs(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["compare", "full_s1", "completion_s1", "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    statuses = {line["what"]: line["status"] for line in parsed["certificate"]}
    assert statuses["loss"] == "differs" and statuses["test rows"] == "equal"
    assert statuses["order of the rows"] == "not recorded"
    assert {one["kind"] for one in parsed["rows_only"]} == {"rows"}
    assert {one["kind"] for one in parsed["over_seeds"]} == {"seeds and rows"}
    assert main(["compare", "full_s1", "completion_s1", "--json", "--rows-fixed"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert {one["kind"] for one in parsed["over_seeds"]} == {"seeds"}


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (["loss=full", "loss=completion"], "no grid is named", "--grid GRID"),
        (
            ["loss=full", "loss=completion", "--grid", "dem"],
            "no recipe, run or grid is named 'dem'",
            "did you mean demo?",
        ),
        (["loss=full", "loss=none", "--grid", "demo"], "no value 'none'", "completion, full"),
        (["size=1", "size=2", "--grid", "demo"], "axis 'size'", "the axes are loss, seed"),
        (["full_s1", "full_s9"], "no recipe, run or grid is named 'full_s9'", "runner status"),
        (["full_s1", "full_s1"], "share demo/full_s1", "two different runs"),
        (["runs/demo", "full_s1"], "names 6 runs, expected one", "axis=value"),
        (["full_s1", "completion_s1", "--axis", "size"], "no axis 'size'", "axes are loss, seed"),
        (
            ["full_s1", "full_s2", "--axis", "loss"],
            "do not differ in the axis 'loss'",
            "two values",
        ),
        (["full_s1", "completion_s1\x1b[2J"], "completion_s1\\x1b[2J", "runner status"),
    ],
)
def test_wrong_usage_returns_2(
    project: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    message: str,
    hint: str,
) -> None:
    assert main(["compare", *arguments]) == 2
    said = capsys.readouterr().err
    assert message in said and hint in said.partition("hint:")[2]


def test_a_name_of_two_grids_is_not_guessed(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    scored(Path("runs"), make_recipe("full_s1", {"loss": "full"}, grid="other"), 1.0)
    assert main(["compare", "full_s1", "completion_s1"]) == 2
    said = capsys.readouterr().err
    assert "name of 2 runs or grids: runs/demo/full_s1, runs/other/full_s1" in said
    assert main(["compare", "full_s1", "completion_s1", "--grid", "demo"]) == 0


def test_a_recipe_that_was_changed_since_it_ran_is_refused(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = make_recipe("full_s1", {"loss": "full", "seed": 1}, "training.learning_rate=0.5")
    path = Path("recipes/demo/full_s1.yaml")
    path.parent.mkdir(parents=True)
    path.write_text(dump_recipe(recipe))
    assert main(["compare", str(path), "completion_s1"]) == 2
    said = capsys.readouterr().err
    assert "recipes/demo/full_s1.yaml was changed since it ran" in said
    assert "name the run directory: runs/demo/full_s1" in said
    assert main(["report", "recipes/demo"]) == 0
    said = capsys.readouterr().err
    assert "1 run is changed: its directory holds another experiment" in said
    assert "hint: runner report runs/demo\n" in said


def test_recipes_that_have_not_run_are_compared_by_their_keys(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, loss in (("a", "full"), ("b", "completion")):
        recipe = make_recipe(name, {"loss": loss}, f"loss={loss}", grid="new")
        path = Path(f"recipes/new/{name}.yaml")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(dump_recipe(recipe))
    assert main(["compare", "new/a", "recipes/new/b.yaml", "--axis", "loss"]) == 1
    shown = capsys.readouterr().out
    assert "Every difference in the recipes (nothing else was read) is explained by" in shown
    assert "new/a is absent (runs/new/a does not exist)" in shown
    assert "certifies 0 pairs of 1: it compares recipes" in shown
    assert "demo" not in shown and "## Differences" not in shown and "test rows" in shown


CUT = "eval_rows.jsonl has 900 bytes, "


@pytest.fixture
def damaged(project: Path) -> Path:
    """The project, with `completion_s2` cut after it recorded its files."""
    run_dir = Path("runs/demo/completion_s2")
    record(RunPaths(run_dir))
    os.truncate(run_dir / "eval_rows.jsonl", 900)
    return run_dir


def test_a_damaged_run_is_named_and_not_certified(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([*BOTH_LOSSES, "--axis", "loss"]) == 1
    shown, said = capsys.readouterr()
    text = " ".join(shown.split())
    assert f"- demo/completion_s2 is damaged ({CUT}" in text
    assert "none of its facts were read So this certifies 2 pairs of 3." in text
    assert "Every difference in what was read is explained by the axis loss." in text
    assert f"warning: demo/completion_s2 is damaged ({CUT}" in said
    assert main(BOTH_LOSSES) == 0
    assert CUT in capsys.readouterr().err
    assert main([*BOTH_LOSSES, "--json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert (len(parsed["pairs"]), parsed["num_read"]) == (3, 2)
    lines = {line["what"]: line for line in parsed["certificate"]}
    assert (lines["test rows"]["status"], lines["test rows"]["num_pairs"]) == ("equal", 2)
    [one] = parsed["not_read"]
    assert (one["name"], one["state"]) == ("demo/completion_s2", "damaged") and CUT in one["why"]


def test_two_runs_of_which_one_was_not_read_return_1(
    damaged: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["compare", "full_s2", "completion_s2"]) == 1
    shown, said = capsys.readouterr()
    assert "certifies 0 pairs of 1" in shown and CUT in said and "## Differences" not in shown
    assert main(["compare", "full_s1", "completion_s1"]) == 0, "another pair is whole"


def _write_recipe_of(run_dir: Path) -> Path:
    recipe = load_json(run_dir / "recipe.json")["recipe"]
    path = Path("recipes") / run_dir.parent.name / f"{run_dir.name}.yaml"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(recipe))
    return path


def test_an_absent_run_is_named(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run_dir = Path("runs/demo/completion_s2")
    path = _write_recipe_of(run_dir)
    shutil.rmtree(run_dir)
    what = f"demo/completion_s2 is absent ({run_dir} does not exist): none of its facts were read"
    for arms in (["full_s2", "completion_s2"], ["full_s2", str(path)]):
        assert main(["compare", *arms]) == 1
        assert what in capsys.readouterr().err
    _write_recipe_of(Path("runs/demo/full_s2"))
    assert main([*BOTH_LOSSES, "--axis", "loss"]) == 1
    shown, said = capsys.readouterr()
    assert f"warning: {what}" in said and "certifies 2 pairs of 3" in shown


def test_runs_that_cannot_be_read_or_have_not_ended_are_named(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Path("runs/demo/full_s1/recipe.json").write_text("{")
    Path("runs/demo/full_s2/result.json").unlink()
    Path("runs/demo/full_s3/samples.json").write_text("{")
    assert main([*BOTH_LOSSES, "--axis", "loss"]) == 1
    shown, said = capsys.readouterr()
    assert said.count("demo/full_s1 is unreadable (") == 1 and "recipe.json" in said
    assert "demo/full_s2 is pending (never started)" in said
    assert "demo/full_s3 is unreadable (" in said and "samples.json" in said
    text = " ".join(shown.split())
    assert "certifies 0 pairs of 2: it compares recipes, and demo/full_s1 is in no pair." in text
    # Its recipe says which arm it is of
    _write_recipe_of(Path("runs/demo/full_s2"))
    recipe = make_seed_recipe({"loss": "full"}, 1)
    Path("recipes/demo/full_s1.yaml").write_text(dump_recipe(recipe))
    assert main([*BOTH_LOSSES, "--axis", "loss"]) == 1
    shown, said = capsys.readouterr()
    assert said.count("demo/full_s1 is unreadable (") == 1
    assert "certifies 0 pairs of 3: it compares recipes." in shown


def test_report_takes_metrics_and_fixed_rows(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["report", "runs/demo", "--metric", "nll_per_token", "--format", "json"]) == 0
    parsed = json.loads(capsys.readouterr().out)
    assert [metric["name"] for metric in parsed["metrics"]] == ["nll_per_token"]
    assert main(["report", "runs/demo", "--rows-fixed"]) == 0
    assert "these rows only" in capsys.readouterr().out
    assert main(["report", "runs/demo", "--metric", "bleu"]) == 2
    said = capsys.readouterr().err
    assert "no run has the metric 'bleu'" in said and "nll_per_token" in said.partition("hint:")[2]


def test_tex_from_the_command_line(project: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pending(Path("runs"), make_recipe("p_1", {"loss": "full", "seed": 9}))
    assert main(["report", "runs", "--format", "tex"]) == 0
    shown = capsys.readouterr().out
    assert shown.count("\\toprule") == 2 and "\\pm" in shown and "full\\_" not in shown


def test_runs_of_one_name_in_two_places_are_two_runs(
    project: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copytree("runs", "old/runs")
    arms = ["runs/demo/full_s1", "old/runs/demo/full_s1"]
    assert main(["compare", *arms]) == 0
    shown = capsys.readouterr().out
    assert shown.startswith("# A: demo/full_s1; B: demo/full_s1\n")
    assert "Nothing that was recorded." in shown
    Path("link").symlink_to("runs")
    assert main(["compare", arms[0], "link/demo/full_s1"]) == 2
    assert "A and B share demo/full_s1; a run cannot be compared" in capsys.readouterr().err
