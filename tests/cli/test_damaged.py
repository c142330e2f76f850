"""The output of every verb for a completed run whose files are not as they were recorded."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from runner import load_runs
from runner.cli.main import main
from runner.files import load_json, write_json_atomic
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.identity import RULES, build_resume_fingerprint, derive_digest
from runner.recipe.parse import load_recipe
from runner.run.paths import RunPaths, content_cache_path
from tests.conftest import RECIPE_TEXT, ROOT
from tests.support.fake_checkpoints import commit_under
from tests.support.model_folders import make_model_folder
from tests.support.settled import settle
from tests.support.whole_runs import BY_BYTES, BY_SIZE, FILES, add_files

RUNS = Path("runs")
DAMAGES = BY_SIZE | BY_BYTES
WEIGHTS = "model/adapter_model.safetensors"
SCORE = {
    "num_rows": 2,
    "num_completion_tokens": 20,
    "num_tokens": 30,
    "num_bytes": 40,
    "completion_nll_sum": 10.0,
    "nll_sum": 20.0,
}
Say = Callable[..., tuple[int, str, str]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three completed runs: `hurt` and `whole` with manifests, `old` without one."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(ROOT / "accelerate_configs", "accelerate_configs")
    Path("data.jsonl").write_text("{}\n")
    make_model_folder(Path("models/gemma"))
    Path("recipes").mkdir()
    for name in ("hurt", "old", "whole"):
        text = RECIPE_TEXT.replace("name: base", f"name: {name}")
        Path(f"recipes/{name}.yaml").write_text(text.replace("model: gemma", f"model: {name}"))
        complete(name)
    settle(content_cache_path(RUNS))  # otherwise hashes of new files are kept again
    add_files(paths_of("hurt"))
    add_files(paths_of("whole"))
    return tmp_path


def paths_of(name: str) -> RunPaths:
    return RunPaths(RUNS / "tests" / name)


def complete(name: str) -> None:
    recipe = load_recipe(Path(f"recipes/{name}.yaml"))
    contents = hash_contents(recipe, ContentHashes(content_cache_path(RUNS)))
    digest, paths = derive_digest(recipe, contents), paths_of(name)
    stored = {"recipe": recipe.model_dump(mode="json"), "recipe_digest": digest, "rules": RULES}
    write_json_atomic(paths.recipe_path, stored | {"contents": contents})
    attempt = {
        "number": 1,
        "started_at_utc": "2026-01-01T00:00:00+00:00",
        "ended_at_utc": "2026-01-01T00:01:00+00:00",
        "command": ["accelerate"],
        "environment": {},
        "num_processes": 1,
        "host": "here",
    }
    write_json_atomic(paths.record_path, {"attempts": [attempt]})
    splits = {"validation": SCORE, "test": SCORE}
    result = {
        "recipe_digest": digest,
        "outcome": "completed",
        "stop_reason": "max_steps",
        "num_steps": 12,
        "best_step": 8,
        "best_metric": 0.5,
        "metric": "nll_per_completion_token",
        "num_train_rows": 22,
        "base": splits,
        "tuned": splits,
    }
    write_json_atomic(paths.result_path, result)


@pytest.fixture
def say(folder: Path, capsys: pytest.CaptureFixture[str]) -> Say:
    """Run `runner ARGUMENTS`; the exit code and the output."""

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(arguments)
        return code, *capsys.readouterr()

    return run


def hurt(name: str, damage: str) -> None:
    DAMAGES[damage](paths_of("hurt").run_dir / name)


def read_states(say: Say) -> dict[str, str]:
    _, output, _ = say("status", "--json", "recipes")
    return {row["name"]: row["state"] for row in json.loads(output)}


def test_whole_runs_are_completed_to_every_verb(say: Say) -> None:
    assert set(read_states(say).values()) == {"completed"}
    assert say("sweep", "recipes")[0] == 0 and say("status", "recipes")[0] == 0
    _, output, _ = say("why", "recipes/whole.yaml")
    assert f"every byte of {len(FILES) + 1} files matches its record" in output
    code, output, errors = say("report", "--verify", "recipes")
    assert code == 0 and "tests/old cannot be verified" in errors and "hurt" not in errors
    code, output, _ = say("launch", "recipes/whole.yaml", "--repair")
    assert code == 0 and "nothing to repair" in output


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", BY_SIZE)
def test_a_file_of_another_size_is_damage_to_every_verb(say: Say, name: str, damage: str) -> None:
    hurt(name, damage)
    before = {path: path.read_bytes() for path in RUNS.rglob("*") if path.is_file()}
    is_of_model = name.startswith("model/")
    way = "--repair" if is_of_model else "restore the files from a copy of the run"
    assert read_states(say) == {"hurt": "damaged", "old": "completed", "whole": "completed"}
    code, output, errors = say("status", "recipes")
    assert code == 1 and "damaged          12/12" in output and name in output
    assert "hint: damaged: " in errors and way in errors
    for verb in ("sweep", "rerun"):
        code, output, errors = say(verb, "recipes")
        assert code == 1 and f"refuse  tests/hurt  damaged: {name} " in output
        assert output.count("skip ") == 2
        *_, what, hint, counts = errors.splitlines()
        assert counts == "3 runs: 2 completed, 1 damaged"
        assert what.startswith(f"tests/hurt is damaged: {name} ") and way in hint
    code, output, errors = say("launch", "recipes/hurt.yaml")
    assert code == 2 and f"runs/tests/hurt is damaged:\n  {name} " in errors and way in errors
    code, output, errors = say("launch", "recipes/hurt.yaml", "--repair")
    what = "the best checkpoint, of step 8, no longer exists" if is_of_model else "has damage that"
    assert code == 2 and what in errors
    for verb in (("report",), ("report", "--verify")):
        code, output, errors = say(*verb, "recipes", "--format", "csv")
        (line,) = [line for line in output.splitlines() if "hurt" in line]
        assert code == 1 and "damaged" in line and "0.5" not in line
        assert f"tests/hurt is damaged: {name} " in errors
    code, output, errors = say("why", "recipes/hurt.yaml")
    assert f"state       damaged: {name} " in output and "next        refuse: damaged" in output
    cached = content_cache_path(RUNS)
    after = {path: path.read_bytes() for path in RUNS.rglob("*") if path.is_file()}
    assert {key: one for key, one in after.items() if key in before and key != cached} == {
        key: one for key, one in before.items() if key != cached
    }, "nothing is trained, nothing is moved"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", BY_BYTES)
def test_other_bytes_are_seen_by_what_reads_them(say: Say, name: str, damage: str) -> None:
    hurt(name, damage)
    assert read_states(say)["hurt"] == "completed", "sizes are all that it looks at"
    code, output, _ = say("why", "recipes/hurt.yaml")
    assert f"state       damaged: {name} does not match its recorded checksum" in output
    skipped = "skip: completed: stopped by max_steps (only file sizes are checked)"
    for verb in ("next", "sweep", "rerun", "launch"):
        assert f"  {verb:<11} {skipped}\n" in output
    for verb in ("sweep", "rerun", "launch"):
        assert say(verb, "recipes/hurt.yaml")[0] == 0, "as it says"
    _, output, _ = say("why", "--json", "recipes/hurt.yaml")
    found = json.loads(output)
    assert (found["next"], found["status"]["state"]) == ("skip", "damaged")
    code, output, errors = say("report", "--verify", "recipes", "--format", "csv")
    (line,) = [line for line in output.splitlines() if "hurt" in line]
    assert code == 1 and "damaged" in line and "0.5" not in line
    assert f"tests/hurt is damaged: {name} does not match its recorded checksum" in errors
    code, _, errors = say("launch", "recipes/hurt.yaml", "--repair")
    assert (code == 2 and name in errors) or "the best checkpoint" in errors


def test_the_verdict_of_a_checkpoint_agrees_with_the_state(say: Say) -> None:
    recipe, paths = load_recipe(Path("recipes/hurt.yaml")), paths_of("hurt")
    digest = derive_digest(recipe, hash_contents(recipe, ContentHashes(Path("cache.json"))))
    count = recipe.launch.num_processes
    commit_under(paths, 4, build_resume_fingerprint(recipe, digest, count, threads="1"))
    nothing = "step-4  intact; nothing would be started: the run is"
    assert f"{nothing} completed\n" in say("why", "recipes/hurt.yaml")[1]
    hurt("samples.json", "bit flipped")
    output = say("why", "recipes/hurt.yaml")[1]
    assert f"{nothing} damaged, but a launch checks only file sizes\n" in output


def read_tree() -> dict[Path, bytes]:
    # A link that another test makes to a shared file changes its ctime: it is hashed again.
    kept = (path for path in RUNS.rglob("*") if path.name != ".content_hashes.json")
    return {path: path.read_bytes() for path in kept if path.is_file()}


def test_a_preview_of_a_launch_decides_as_the_launch_does(say: Say) -> None:
    whole, hurt_one = ("launch", "recipes/whole.yaml"), ("launch", "recipes/hurt.yaml")
    code, output, _ = say(*whole, "--dry-run")
    assert (code, say(*whole)[0]) == (0, 0)
    assert output == "tests/whole  completed: stopped by max_steps: nothing would be started\n"
    hurt("eval_rows.jsonl", "cut")
    before = read_tree()
    preview = say(*hurt_one, "--dry-run")
    assert preview == say(*hurt_one) and preview[:2] == (2, "")
    assert "is damaged:\n  eval_rows.jsonl has" in preview[2]
    assert say(*hurt_one, "training.seed=4", "--dry-run")[0] == 0, "a run of another name"
    path = Path("recipes/whole.yaml")
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    preview = say(*whole, "--dry-run")
    assert preview == say(*whole) and preview[:2] == (2, "")
    assert "training.seed: 3 -> 4" in preview[2]
    code, output, errors = say(*whole, "--fresh", "--dry-run")
    assert code == 0 and "accelerate launch" in output
    assert "runs/tests/whole would be moved aside first" in errors
    assert read_tree() == before, "nothing is touched"


def test_a_preview_reads_what_was_changed_since_it_was_read(say: Say) -> None:
    Path("data.jsonl").write_text('{"other": 1}\n')
    preview = say("launch", "recipes/whole.yaml", "--dry-run")
    assert preview[:2] == (2, "") and "content of data.jsonl" in preview[2]


@pytest.mark.parametrize("damage", DAMAGES)
def test_why_promises_no_repair_that_is_refused(say: Say, damage: str) -> None:
    hurt(WEIGHTS, damage)
    output = say("why", "recipes/hurt.yaml")[1]
    assert "put step-8 or step-8.zip back" in output and "--repair" not in output
    assert say("launch", "recipes/hurt.yaml", "--repair")[0] == 2


@pytest.mark.parametrize("damage", DAMAGES)
def test_export_and_chat_refuse_what_is_damaged(say: Say, damage: str) -> None:
    hurt(WEIGHTS, damage)
    for verb in (("export", "--output", "out"), ("chat", "--prompt", "Hello")):
        code, output, errors = say(verb[0], "runs/tests/hurt", *verb[1:])
        assert (code, output) == (2, "") and f"is damaged: {WEIGHTS} " in errors
        assert "--repair" in errors and "--checkpoint best" in errors
    assert not Path("out").exists()


def test_a_model_that_was_removed_is_no_damage(say: Say) -> None:
    shutil.rmtree(paths_of("hurt").model_dir)
    assert set(read_states(say).values()) == {"completed"}
    code, output, _ = say("status", "recipes")
    (line,) = [line for line in output.splitlines() if "hurt" in line]
    assert code == 0 and line.endswith("stopped by max_steps; model removed")
    assert say("sweep", "recipes")[0] == 0
    assert say("launch", "recipes/hurt.yaml")[0] == 0, "skipped"
    code, output, _ = say("report", "--verify", "recipes", "--format", "csv")
    (line,) = [line for line in output.splitlines() if "hurt" in line]
    assert code == 0 and "0.5" in line
    output = say("why", "recipes/hurt.yaml")[1]
    assert "model removed" in output and "step 8, no longer exists" in output
    assert "put step-8 or step-8.zip back" in output and "--repair" not in output
    code, _, errors = say("export", "runs/tests/hurt", "--output", "out")
    assert code == 2 and "model was removed" in errors and "--checkpoint best" in errors
    code, _, errors = say("launch", "recipes/hurt.yaml", "--repair")
    assert code == 2 and "step 8, no longer exists" in errors


def test_a_file_that_is_not_of_the_run_is_to_be_moved(say: Say) -> None:
    (paths_of("hurt").model_dir / "README.md").write_text("# A model\n")
    assert say("report", "--verify", "recipes")[0] == 0
    (paths_of("hurt").model_dir / "pytorch_model.bin").touch()
    code, _, errors = say("report", "--verify", "recipes")
    assert code == 1 and "hint: move model/pytorch_model.bin elsewhere\n" in errors
    hurt(WEIGHTS, "zeroed")
    code, _, errors = say("report", "--verify", "recipes")
    assert code == 1 and "pytorch_model.bin elsewhere; then `runner launch RECIPE" in errors


def test_an_older_run_is_completed_and_cannot_be_verified(say: Say) -> None:
    assert "cannot be verified" in say("why", "recipes/old.yaml")[1]
    assert "cannot be verified" in say("report", "--verify", "recipes")[2]
    code, _, errors = say("launch", "recipes/old.yaml", "--repair")
    assert code == 2 and "cannot be verified" in errors and "--checkpoint best" in errors


def test_a_result_that_its_rows_contradict_is_damaged(say: Say) -> None:
    paths = paths_of("old")
    result = load_json(paths.result_path)
    add_files(paths)
    result["tuned"]["test"] = SCORE | {"completion_nll_sum": 9.0}
    write_json_atomic(paths.result_path, result)  # no manifest: only the rows show it
    code, output, errors = say("report", "--verify", "recipes", "--format", "csv")
    assert (
        code == 1
        and "tests/old is damaged: result.json does not match the sums of eval_rows.jsonl" in errors
    )
    assert "tuned: completion_nll_sum is 9.0 in result.json" in errors
    assert "damaged" in next(line for line in output.splitlines() if "old" in line)
    assert "completion_nll_sum" in say("why", "recipes/old.yaml")[1]


def test_a_result_that_was_edited_is_damaged(say: Say) -> None:
    paths = paths_of("hurt")
    result = load_json(paths.result_path)
    result["tuned"]["test"]["completion_nll_sum"] = 10.5
    content = paths.result_path.read_text()
    write_json_atomic(paths.result_path, result)
    assert len(content) == len(paths.result_path.read_text()), "sizes say nothing"
    for verb in (("report",), ("report", "--verify")):
        code, output, errors = say(*verb, "recipes", "--format", "csv")
        (line,) = [line for line in output.splitlines() if "hurt" in line]
        assert code == 1 and "damaged" in line and "0.52" not in line
        assert "tests/hurt is damaged: result.json was changed after it was written" in errors
    _, output, _ = say("compare", "runs/tests/hurt", "runs/tests/whole")
    assert "0.52" not in output
    code, _, errors = say("launch", "recipes/hurt.yaml", "--repair")
    assert code == 2 and "has damage that `--repair` cannot fix:\n  result.json" in errors


@pytest.mark.parametrize("damage", ["another axis", "another rate", "missing", "longer"])
def test_a_recipe_that_was_edited_is_damaged(say: Say, damage: str) -> None:
    path = paths_of("hurt").recipe_path
    text = path.read_text()
    if damage == "missing":
        path.unlink()
    elif damage == "longer":
        path.write_text(text.replace('"seed": 3', '"seed": 33'))
    elif damage == "another rate":  # of the digest
        path.write_text(text.replace('"seed": 3', '"seed": 4'))
    else:  # outside the digest
        path.write_text(text.replace('"hurt"', '"HURT"'))
    assert damage == "missing" or path.read_text() != text
    if damage in ("missing", "longer"):
        assert read_states(say)["hurt"] == "damaged", "sizes say so"
        code, output, _ = say("sweep", "recipes")
        assert code == 1 and "refuse  tests/hurt  damaged: recipe.json " in output
    what = {"missing": "is missing", "longer": "has"}.get(damage, "does not match its")
    for verb in (("report",), ("report", "--verify")):
        code, output, errors = say(*verb, "recipes", "--format", "csv")
        (line,) = [line for line in output.splitlines() if "hurt" in line]
        assert code == 1 and "damaged" in line and "0.5" not in line
        assert f"tests/hurt is damaged: recipe.json {what}" in errors
        if damage != "missing":  # nothing says then that it is a run directory
            code, output, errors = say(*verb, "runs/tests/hurt", "--format", "csv")
            assert code == 1 and "0.5" not in output and "is damaged: recipe.json" in errors
    assert f"recipe.json {what}" in say("why", "recipes/hurt.yaml")[1]
    code, _, errors = say("launch", "recipes/hurt.yaml", "--repair")
    assert code == 2 and "recipe.json" in errors and "restore the files" in errors
    if damage != "missing":
        code, _, errors = say("export", "runs/tests/hurt", "--output", "out")
        assert code == 2 and "is damaged: recipe.json " in errors


def test_a_repair_goes_with_no_other_way_to_start(say: Say) -> None:
    for option in (("--fresh",), ("--prepare",), ("--resume", "best")):
        code, _, errors = say("launch", "recipes/hurt.yaml", "--repair", *option)
        assert code == 2 and "cannot be combined with" in errors


@pytest.mark.parametrize("exit_status", [0, None])
def test_a_result_that_is_lost_is_damage_and_trains_nothing(
    say: Say, exit_status: int | None
) -> None:
    paths = paths_of("hurt")
    record = load_json(paths.record_path)
    record["attempts"][0]["exit_status"] = exit_status
    killed = record["attempts"][0] | {"number": 2, "ended_at_utc": None}
    write_json_atomic(paths.record_path, {"attempts": [*record["attempts"], killed]})
    paths.result_path.unlink()
    before = {path: path.read_bytes() for path in paths.run_dir.rglob("*") if path.is_file()}
    assert read_states(say)["hurt"] == "damaged"
    for verb in ("sweep", "rerun"):
        code, output, errors = say(verb, "recipes")
        assert code == 1 and "refuse  tests/hurt  damaged: result.json is missing" in output
        assert "restore the files from a copy of the run" in errors and "--fresh" in errors
    for option in ((), ("--prepare",), ("--resume", "latest"), ("--repair",)):
        code, output, errors = say("launch", "recipes/hurt.yaml", *option)
        assert code == 2 and "result.json is missing" in errors, option
        assert "restore the files from a copy of the run" in errors and "Traceback" not in errors
    assert "damaged: result.json is missing" in say("why", "recipes/hurt.yaml")[1]
    for verb in (("report",), ("report", "--verify")):
        code, output, errors = say(*verb, "recipes", "--format", "csv")
        assert code == 1 and "tests/hurt is damaged: result.json is missing" in errors
    code, _, errors = say("export", "runs/tests/hurt", "--output", "out")
    assert code == 2 and "is damaged: result.json is missing" in errors
    after = {path: path.read_bytes() for path in paths.run_dir.rglob("*") if path.is_file()}
    assert {**after, **before} == after and load_json(paths.record_path)["attempts"][1] == killed


def forget_end(name: str) -> None:
    """Restore the run from before training wrote the result and its launcher the end."""
    paths = paths_of(name)
    paths.result_path.unlink()
    (attempt,) = load_json(paths.record_path)["attempts"]
    write_json_atomic(paths.record_path, {"attempts": [attempt | {"ended_at_utc": None}]})


def test_what_is_not_completed_has_no_model_to_repair(say: Say) -> None:
    forget_end("hurt")
    code, _, errors = say("launch", "recipes/hurt.yaml", "--repair")
    assert code == 2 and "only a completed run has a model to repair" in errors


def test_a_changed_run_is_not_repaired(say: Say) -> None:
    hurt(WEIGHTS, "cut")
    path = Path("recipes/hurt.yaml")
    path.write_text(path.read_text().replace("seed: 3", "seed: 4"))
    code, _, errors = say("launch", "recipes/hurt.yaml", "--repair")
    assert code == 2 and "training.seed: 3 -> 4" in errors


def lose(name: str, content: str | None) -> None:
    """Remove a run's recipe.json, or cut it off, and remove the recipe that could say it."""
    path = paths_of(name).recipe_path
    path.unlink()
    if content is not None:
        path.write_text(content)
    Path(f"recipes/{name}.yaml").unlink()


@pytest.mark.parametrize(
    ("verb", "code"),
    [
        (["status", "runs"], 1),
        (["status"], 1),
        (["status", "runs/tests", "--json"], 1),
        (["status", "runs/tests/hurt"], 1),
        (["status", "runs/tests/hurt", "runs/tests/whole"], 1),
        (["status", "hurt"], 1),
        (["report", "runs"], 1),
        (["power", "runs/tests", "--effect", "0.1"], 2),
        (["check", "runs/tests", "--schema-only"], 1),
        (["doctor", "runs/tests"], 1),
        (["stop", "runs/tests"], 1),
        (["logs", "runs/tests"], 2),
        (["sweep", "runs/tests", "--dry-run"], 1),
        (["rerun", "runs/tests", "--dry-run"], 1),
        (["why", "runs/tests/hurt"], 2),
        (["stop", "runs/tests/hurt"], 2),
        (["launch", "runs/tests/hurt"], 2),
        (["compare", "runs/tests/hurt", "runs/tests/whole"], 2),
    ],
)
def test_a_run_without_a_readable_recipe_is_named(
    verb: list[str], code: int, folder: Path, say: Say
) -> None:
    """No verb leaves it out in silence, and those that read several runs read the others."""
    lose("hurt", None)
    returned, out, err = say(*verb)
    assert "tests/hurt" in out + err and "Traceback" not in err
    assert returned == code, err
    if verb[0] != "launch":  # which names what it needs
        assert "recipe.json is missing" in out + err
    if verb in (["status"], ["status", "runs"], ["report", "runs"]):
        assert "whole" in out


@pytest.mark.parametrize("content", [None, "{"])
def test_a_stop_reaches_the_other_runs_and_python_warns(
    content: str | None, folder: Path, say: Say
) -> None:
    lose("hurt", content)
    code, _, err = say("stop", "runs/tests")
    assert code == 1 and "warning: tests/hurt is unreadable" in err
    assert "2 runs are not running" in err
    with pytest.warns(UserWarning, match="tests/hurt is unreadable and left out"):
        found = load_runs(["runs/tests"])
    assert sorted(run.recipe.run.name for run in found) == ["old", "whole"]


def test_folders_that_are_no_runs_are_still_none(folder: Path, say: Say) -> None:
    """One file with such a name does not make a folder a run."""
    lose("hurt", None)
    paths_of("hurt").record_path.unlink()
    shutil.rmtree(paths_of("hurt").attempts_dir, ignore_errors=True)
    assert "hurt" not in "".join(map(str, say("status", "runs")))
