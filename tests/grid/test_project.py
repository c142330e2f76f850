"""`runner init`: the project works immediately, fits the given rows and models, and is complete or
absent.
"""

from __future__ import annotations

import json
import os
import shlex
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest

from runner.cli.main import main
from runner.data.draw import RawSplits, draw_splits
from runner.grid.spec import list_grids
from runner.recipe.parse import Recipe, load_recipe
from tests.conftest import ROOT, run_cli
from tests.support.model_folders import make_model_folder
from tests.support.moving_hub import moving_hub
from tests.test_imports import HEAVY, list_loaded

GRIDS = list_grids(ROOT / "recipe_templates")
CHAT = [{"role": "user", "content": "one"}, {"role": "assistant", "content": "two"}]


def write_rows(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_model(folder: Path, config: Mapping[str, Any], **files: str) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def load_rendered() -> list[Recipe]:
    return [load_recipe(path) for path in sorted(Path("recipes", "first").glob("*.yaml"))]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_printed_commands_work(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any
) -> None:
    assert main(["init", "my study"]) == 0
    message = capsys.readouterr().out
    commands = [
        shlex.split(line.partition("#")[0]) for line in message.partition("next:\n")[2].splitlines()
    ]
    assert commands[:2] == [["cd", "my study"], ["runner", "demo-models"]]
    monkeypatch.chdir("my study")
    verbs = [command[1:] for command in commands[2:]]
    assert [verb[0] for verb in verbs] == ["render", "check", "sweep", "sweep", "report"]
    assert main(verbs[0]) == main(["render", "--check"]) == 0
    assert main([*verbs[1], "--schema-only"]) == main(verbs[4]) == 0
    capsys.readouterr()
    assert main(verbs[2]) == 2  # as the sweep itself, until the models are built
    assert "hint: runner demo-models" in capsys.readouterr().err
    recipes = load_rendered()
    assert len(recipes) == 12 and {recipe.loss for recipe in recipes} == {"full", "completion"}
    # The compared arms differ in nothing else: neither the number of updates nor a shared seed.
    assert {recipe.training.max_steps for recipe in recipes} == {120}
    assert {recipe.run.axes["seed"] for recipe in recipes} == {1, 2, 3}
    assert len({recipe.training.seed for recipe in recipes}) == 12
    assert {recipe.data.seed for recipe in recipes} == {42}
    [declared] = {recipe.run.declared for recipe in recipes}
    assert [(one.axis, one.from_, one.to) for one in declared] == [("loss", "full", "completion")]
    for recipe in recipes:
        assert (
            Path(recipe.launch.accelerate_config).is_file()
            and Path(recipe.data.train.path).is_file()
        )
        assert len(draw_splits(recipe.data).train) == recipe.data.num_train_samples
    readme = Path("README.md").read_text()
    assert all(" ".join(command) in readme for command in commands[1:]) and readme.startswith(
        "# my study\n"
    )
    script, readme_file = (Path(name).stat().st_mode for name in ("sweeps/first.sh", "README.md"))
    assert script & 0o777 == readme_file & 0o777 | (readme_file & 0o444) >> 2
    assert "/runs/" in Path(".gitignore").read_text()
    for path in {Path(recipe.model.path) for recipe in recipes}:  # for a preview that is all
        make_model_folder(path)
    done = subprocess.run(
        ["sweeps/first.sh", "--dry-run"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0 and done.stdout.count("accelerate launch") == 12, done.stderr


@pytest.mark.parametrize("grid", GRIDS)
def test_a_stock_grid_gives_the_same_recipes(
    grid: str, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "copy", "--from", grid]) == 0
    message = capsys.readouterr().out
    os.chdir("copy")
    assert main(["render"]) == 0
    committed = sorted((ROOT / "recipes" / grid).glob("*.yaml"))
    assert [path.name for path in committed] == sorted(
        path.name for path in Path("recipes", grid).iterdir()
    )
    assert all(
        path.read_bytes() == Path("recipes", grid, path.name).read_bytes() for path in committed
    )
    assert list_grids(Path("recipe_templates")) == [grid]
    assert list(Path("data").rglob("*.json*")), "rows to try it with"
    # 7 divides no number of values
    for recipe in map(load_recipe, sorted(Path("recipes", grid).iterdir())[::7]):
        for source in (recipe.data.train, recipe.data.validation, recipe.data.test):
            if source is not None and source.path.startswith("data/"):
                assert Path(source.path).exists() == (ROOT / source.path).exists()
                assert Path(source.path).exists() or "put yours there" in message
        assert recipe.model.chat_template is None or Path(recipe.model.chat_template).is_file()
        assert Path(recipe.launch.accelerate_config).is_file()


@pytest.mark.parametrize(
    ("row", "task", "unread"),
    [
        ({"messages": CHAT, "source": "x"}, {"name": "conversations"}, "source"),
        (
            {"conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
            {},
            None,
        ),
        (
            {"prompt": "a", "completion": "b"},
            {"prompt_column": "prompt", "completion_column": "completion"},
            None,
        ),
        ({"prompt": CHAT[:1], "completion": CHAT[1:]}, {"name": "conversations"}, None),
        (
            {"instruction": "a", "input": "c", "output": "b"},
            {"name": "alpaca"},
            None,
        ),
        (
            {"context": "c", "question": "a", "answer": "b"},
            {"prompt": "{context}\n\n{question}", "completion_column": "answer"},
            None,
        ),
        (
            {"system_prompt": "c", "question": "a", "response": "b"},
            {"system": "{system_prompt}", "completion_column": "response"},
            None,
        ),
        (
            {"question": "a", "answer": "b", "difficulty": 3},
            {"prompt_column": "question"},
            "difficulty",
        ),
        ({"question": "a", "answer": "b"}, {"prompt_column": "question"}, None),
        ({"sentence": "a", "label": 1}, {"name": "sst2"}, None),
        (
            {
                "id": "7",
                "context": "a",
                "question": "b",
                "answers": {"text": [], "answer_start": []},
            },
            {"name": "squad_v2"},
            None,
        ),
        (
            {"dialogue": "a", "summary": "b"},
            {"name": "summarization", "document_column": "dialogue"},
            None,
        ),
    ],
)
def test_the_task_is_read_off_the_columns(
    row: dict[str, Any],
    task: dict[str, str],
    unread: str | None,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [
        json.loads(json.dumps(row).replace('"a"', f'"a{n}"').replace('"one"', f'"one {n}"'))
        for n in range(30)
    ]
    data_path = write_rows(place / "my rows!.jsonl", [*rows, rows[0]])
    assert main(["init", "study", "--data", str(data_path)]) == 0
    message = capsys.readouterr().out
    assert "data/my-rows.jsonl: 30 different rows" in message
    assert unread is None or message.count(f"`{unread}`") == 1
    os.chdir("study")
    assert main(["render"]) == 0
    for recipe in load_rendered():
        assert task.items() <= recipe.data.task.model_dump().items()
        splits = draw_splits(recipe.data)
        assert (len(splits.test), len(splits.validation)) == (5, 5) and len(splits.train) in (5, 20)


def pairs(name: str, count: int) -> list[dict[str, Any]]:
    return [{"prompt": f"{name} {number}?", "completion": "x"} for number in range(count)]


def draw_rendered() -> list[RawSplits]:
    """The rows of each rendered recipe, in the project that is the current folder."""
    assert main(["render"]) == 0
    return [draw_splits(recipe.data) for recipe in load_rendered()]


def test_a_folder_with_splits_gives_each_its_source(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "my rows" / "data").mkdir(parents=True)
    for name, count in (("train-00000-of-00002", 9), ("train-00001-of-00002", 7), ("test", 3)):
        write_rows(place / "my rows" / "data" / f"{name}.jsonl", pairs(name, count))
    for name in (".cache/train.jsonl", "data/._train.jsonl", "README.md"):
        (place / "my rows" / name).parent.mkdir(exist_ok=True)
        (place / "my rows" / name).write_text("{")
    assert main(["init", "study", "--data", "my rows"]) == 0
    message = capsys.readouterr().out
    assert "data/my-rows: 16 different rows" in message
    assert "left out of data/my-rows: train: 2 hidden files (.cache/train.jsonl, " in message
    assert "2 for validation, 3 for test, 3 or 14 to train on; from separate files: test" in message
    os.chdir("study")
    copied = sorted(str(path.relative_to("data")) for path in Path("data").rglob("*.*"))
    assert copied == [
        f"my-rows/data/{name}.jsonl"
        for name in ("test", "train-00000-of-00002", "train-00001-of-00002")
    ]
    for splits in draw_rendered():
        assert len(splits.test) == 3 and len(splits.validation) == 2
        assert all("/test.jsonl" in row.where for row in splits.test)
        assert not [row for row in (*splits.train, *splits.validation) if "test" in row.where]
    template = Path("recipe_templates/first/recipe.yaml.j2").read_text()
    for line in (
        '  train:\n    path: "data/my-rows"\n    split: "train"\n  validation: null # taken',
        '  test:\n    path: "data/my-rows"\n    split: "test"\n',
    ):
        assert line in template


@pytest.mark.parametrize("names", [("a", "b"), ("train", "dev", "test"), ("my-train", "x_test")])
def test_several_files_become_one_folder(names: Sequence[str], place: Path) -> None:
    arguments = []
    for name in names:
        write_rows(place / f"{name}.jsonl", pairs(name, 12))
        arguments += ["--data", f"{name}.jsonl"]
    assert main(["init", "study", *arguments]) == 0
    os.chdir("study")
    assert sorted(path.stem for path in Path("data/rows").iterdir()) == sorted(names)
    *_, splits = draw_rendered()
    where = {
        split: {Path(row.where.split()[0]).stem for row in getattr(splits, split)}
        for split in ("train", "validation", "test")
    }
    if names == ("a", "b"):
        assert where["train"] == {"a", "b"} and len(splits.train) == 24 - 8
    else:
        assert where["train"] == {names[0]} and where["test"] == {names[-1]}
        assert where["validation"] == {names[1] if len(names) == 3 else names[0]}


def test_a_folder_without_splits_is_copied_and_read_whole(place: Path) -> None:
    for name in ("a", "b/c"):
        (place / "rows" / name).parent.mkdir(parents=True, exist_ok=True)
        write_rows(place / "rows" / f"{name}.jsonl", pairs(name, 12))
    assert main(["init", "rows/study", "--data", "rows"]) == 0
    os.chdir("rows/study")
    assert Path("data/rows/b/c.jsonl").is_file()
    assert {len(splits.train) for splits in draw_rendered()} == {4, 16}
    assert (
        "split"
        not in Path("recipe_templates/first/recipe.yaml.j2").read_text().partition("task:")[0]
    )


def test_a_data_set_of_the_hub_is_named_by_its_splits(place: Path) -> None:
    def file(name: str) -> bytes:
        return "".join(json.dumps(row) + "\n" for row in pairs(name, 12)).encode()

    names = ("train-00000-of-00001", "test-00000-of-00001")
    files = {f"data/{name}.jsonl": file(name) for name in names}
    with moving_hub() as hub:
        hub.commit("datasets", "own/rows", "c" * 40, files)
        environment = hub.environment(place / "cache")
        done = run_cli(["init", "study", "--data", "own/rows"], place, environment=environment)
        assert done.returncode == 0, done.stderr
        for words in (
            "own/rows: 12 different rows, read as prompt_completion",
            "2 for validation, 12 for test, 2 or 10 to train on; from separate files: test",
            "rows come from the hub: own/rows",
        ):
            assert words in done.stdout
        assert not (place / "study" / "data").exists() or not list((place / "study/data").iterdir())
        other = run_cli(["init", "other", "--data", "own/none"], place, environment=environment)
    assert other.returncode == 2 and "the data set 'own/none' cannot be looked up" in other.stderr
    template = (place / "study/recipe_templates/first/recipe.yaml.j2").read_text()
    assert '  test:\n    path: "own/rows"\n    split: "test"\n' in template


def test_a_name_on_the_hub_without_a_network_is_an_error_in_words(place: Path) -> None:
    done = run_cli(["init", "study", "--data", "own/rows"], place)
    assert done.returncode == 2 and not (place / "study").exists()
    assert "`--data own/rows` is not a file or folder here, and the data set" in done.stderr
    assert "cannot be looked up on the hub" in done.stderr
    assert "hint: check the path or the id, and the network; or start without" in done.stderr


def test_columns_that_may_mean_something_are_the_users_to_leave_out(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`init` lets the recipe ignore what no format gives a meaning, and says so; the rest it
    refuses.
    """
    rows = [
        {"messages": [{**CHAT[0], "toxic": n}, {**CHAT[1], "content": f"{n}"}], "language": "en"}
        for n in range(30)
    ]
    assert main(["init", "study", "--data", str(write_rows(place / "a.jsonl", rows))]) == 0
    said = capsys.readouterr().out
    assert said.count("`language`") == 1 and said.count("`messages.toxic`") == 1
    assert "`data.ignore` in the recipe lists the ones" in said
    template = (place / "study" / "recipe_templates" / "first" / "recipe.yaml.j2").read_text()
    assert '  ignore: ["language", "messages.toxic"] # these' in template
    rows[7]["weight"] = 0
    assert main(["init", "other", "--data", str(write_rows(place / "b.jsonl", rows))]) == 2
    message = capsys.readouterr().err
    assert "b.jsonl line 8: the column `weight`" in message and "data.ignore" in message


@pytest.mark.parametrize("num_rows", [4, 5, 9, 1400])
def test_any_number_of_rows_is_split(num_rows: int, place: Path) -> None:
    write_rows(
        place / "rows.jsonl", [{"prompt": str(n), "completion": "x"} for n in range(num_rows)]
    )
    assert main(["init", "study", "--data", "rows.jsonl"]) == 0
    os.chdir("study")
    assert main(["render"]) == 0
    counts = {len(draw_splits(recipe.data).train) for recipe in load_rendered()}
    assert (
        max(counts) == min(1000, num_rows - 2 * max(1, min(100, num_rows // 6)))
        and len(counts) == 2
    )


def test_models_become_cards(place: Path) -> None:
    plain = write_model(place / "models" / "My model", {"torch_dtype": "float16"})
    chatty = write_model(
        place / "chatty", {"dtype": "float32"}, tokenizer_config__json='{"chat_template": "x"}'
    )
    models = [
        "--model",
        "models/My model",
        "--model",
        str(chatty),
        "--model",
        "acme/Small-1b",
        "--model",
        "phi-2",
    ]
    assert main(["init", "study", *models]) == 0
    os.chdir("study")
    assert main(["render"]) == 0
    found = {recipe.run.axes["model"]: recipe.model for recipe in load_rendered()}
    assert list(found) == sorted(found) and set(found) == {
        "My-model",
        "chatty",
        "Small-1b",
        "phi-2",
    }
    assert (
        Path(found["My-model"].path).samefile(plain)
        and not Path(found["My-model"].path).is_absolute()
    )
    human = "recipe_templates/chat/human_assistant.jinja"
    assert (found["My-model"].dtype, found["My-model"].chat_template) == ("float16", human)
    assert (found["chatty"].path, found["chatty"].dtype) == (str(chatty), "float32")
    assert found["chatty"].chat_template is None
    assert (found["Small-1b"].path, found["Small-1b"].dtype) == ("acme/Small-1b", "bfloat16")
    assert (found["phi-2"].path, found["phi-2"].pad_token) == ("microsoft/phi-2", "<|pad|>")


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--from", "demp"], "there is no stock grid 'demp', did you mean `demo`?\n\n  demo "),
        (["--from", "../demo"], "there is no stock grid '../demo'"),
        (["--from", "demo", "--data", "rows.jsonl"], "--data goes with the starter grid"),
        (["--from", "demo", "--model", "m"], "--model goes with the starter grid"),
        (["--data", "none.jsonl"], "`--data none.jsonl` does not exist"),
        (["--data", "."], ". holds no rows"),
        (["--data", "a/b/c"], "`--data a/b/c` does not exist, and it is not a hub id"),
        (["--data", "few.jsonl", "--data", "tests"], "`--data tests` is a folder; several --d"),
        (["--data", "few.jsonl", "--data", "none"], "`--data none` does not exist; several"),
        (["--data", "few.jsonl", "--data", "few.jsonl"], "would both be called few.jsonl"),
        (["--data", "few.jsonl", "--data", "odd.jsonl"], "odd.jsonl line 1: the column `prompt`"),
        (["--data", "few.jsonl", "--data", "tests/test.jsonl"], "none of a split called train"),
        (["--data", "tests/train.csv", "--data", "odd.jsonl"], "of odd.jsonl contains none"),
        (["--data", "tests/test.jsonl", "--data", "tests/x.y"], "the split test, but none of"),
        (["--data", "tests/x.y", "--data", "tests/empty.z"], "these files hold no .jsonl, .json"),
        (["--data", "rows.txt"], "cannot tell the format"),
        (["--data", "torn.jsonl"], "torn.jsonl line 3: is not JSON"),
        (["--data", "empty.jsonl"], "holds no rows"),
        (["--data", "few.jsonl"], "few.jsonl holds 3 different rows, but training"),
        (["--data", "odd.jsonl"], "cannot tell the task from the columns: left, right"),
        (["--data", "odd.jsonl"], "columns: left, right\n\n  left   1\n  right  2\n"),
        (["--data", "few.jsonl", "--prompt", "{prompt}"], "`--completion` is missing: --prompt"),
        (["--data", "few.jsonl", "--completion", "completion"], "`--prompt` is missing"),
        (
            ["--data", "few.jsonl", "--prompt", "{prom}", "--completion", "completion"],
            "there is no column `prom`, did you mean {prompt}?",
        ),
        (
            ["--data", "few.jsonl", "--prompt", "solve", "--completion", "completion"],
            "holds no column in braces",
        ),
        (
            ["--data", "few.jsonl", "--prompt", "prompt", "--completion", "x"],
            "the rows have no such column",
        ),
        (["--from", "demo", "--prompt", "{a}"], "--prompt goes with the starter grid"),
        (["--model", "./none"], "`--model ./none` does not exist"),
        (["--model", "."], "has no config.json"),
        (["--model", "a b"], "it is not a hub id"),
        (["--model", "x/same", "--model", "y/same"], "two of the models would be called 'same'"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_what_is_refused_leaves_nothing(
    arguments: list[str], words: str, exists: bool, place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    row = {"prompt": "a", "completion": "b"}
    write_rows(place / "few.jsonl", [row, row, row | {"prompt": "c"}, row | {"prompt": "d"}])
    write_rows(place / "odd.jsonl", [{"left": 1, "right": 2}])
    (place / "tests").mkdir()
    write_rows(place / "tests" / "test.jsonl", [row])
    for name in ("x.y", "empty.z", "train.csv"):
        (place / "tests" / name).touch()
    for name, text in {
        "rows.txt": "a",
        "torn.jsonl": f"{json.dumps(row)}\n\n{{",
        "empty.jsonl": "",
    }.items():
        (place / name).write_text(text)
    if exists:
        (place / "study").mkdir()
    before = sorted(place.rglob("*"))
    assert main(["init", "study" if exists else "new/study", *arguments]) == 2
    assert words in capsys.readouterr().err
    assert sorted(place.rglob("*")) == before


def test_a_folder_in_use_is_refused_and_named(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (place / "study").mkdir()
    (place / "study" / ".git").mkdir()
    (place / "file").touch()
    for target, words in (
        ("study", "it contains .git"),
        ("file", "file is a file"),
        ("file/x", "file exists"),
    ):
        assert main(["init", target]) == 2
        assert words in capsys.readouterr().err
    assert sorted(place.rglob("*")) == [place / "file", place / "study", place / "study" / ".git"]


def test_an_empty_folder_is_filled_where_it_stands(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    inode = place.stat().st_ino
    assert main(["init", "."]) == 0
    assert "  cd " not in capsys.readouterr().out
    assert place.stat().st_ino == inode and main(["render", "first"]) == 0
    assert not [path for path in place.iterdir() if ".init-" in path.name]


@pytest.mark.parametrize("exists", [False, True])
def test_a_full_disk_leaves_nothing(exists: bool, place: Path) -> None:
    """A limit on file sizes replaces the full disk: the data sample is larger, and comes late."""
    if exists:
        (place / "study").mkdir()
    before = sorted(place.rglob("*"))
    done = subprocess.run(
        ["bash", "-c", "ulimit -f 64; exec python -m runner init study"],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2 and "error: " in done.stderr and ": file too large" in done.stderr
    assert sorted(place.rglob("*")) == before


def test_init_does_not_import_torch(place: Path) -> None:
    assert (
        not list_loaded("from runner.cli.main import main; main(['init', 'study'])", place) & HEAVY
    )
    assert (place / "study" / "README.md").exists()


def test_sizes_that_are_null_are_refused(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for values in ("null", "80,null"):
        assert main(["init", "new", "--axis", f"samples={values}"]) == 2
        said = capsys.readouterr().err
        assert "`--axis samples=...`: got null, expected numbers of rows" in said
        assert "\nhint: --axis samples=80,320\n" in said
        assert not Path("new").exists()


def test_an_empty_text_is_given_too(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["init", "new", "--from", "demo", "--prompt", ""]) == 2
    assert "--prompt goes with the starter grid" in capsys.readouterr().err


def test_a_file_is_not_said_to_come_from_the_hub(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["init", "new", "--axis", "data.train.path=data/a.jsonl,b.jsonl,lab/rows"]) == 0
    said = capsys.readouterr().out
    assert "put yours there: data/a.jsonl, b.jsonl\n" in said
    assert "rows come from the hub: lab/rows\n" in said


def test_different_and_duplicate_rows_add_up(
    place: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A column that the recipe ignores makes no row different."""
    rows = [{"ticket": n, "prompt": f"Q{n % 8}", "completion": "A"} for n in range(20)]
    write_rows(place / "rows.jsonl", rows)
    assert main(["init", "study", "--data", "rows.jsonl"]) == 0
    said = capsys.readouterr().out
    assert "8 different rows" in said and "12 duplicate rows" in said


def test_the_demo_models_are_known_by_name(place: Path) -> None:
    for number, model in enumerate(("demo-llama", "demo_models/llama", "demo-gemma")):
        assert main(["init", f"study{number}", "--model", model]) == 0
        readme = Path(f"study{number}", "README.md").read_text()
        assert "runner demo-models" in readme and "from the hub" not in readme
        [card] = Path(f"study{number}", "recipe_templates", "models").glob("demo-*.yaml")
        assert card.stem == f"demo-{model[-5:]}" and f"demo_models/{model[-5:]}" in card.read_text()


@pytest.mark.parametrize(
    ("chat", "model", "words"),
    [
        (
            [{"role": "system", "content": "short"}, *CHAT],
            "demo-llama",
            "8 rows with a system turn,",
        ),
        (CHAT[1:] + CHAT, "demo-llama", "8 rows with turns that do not alternate between user and"),
        (CHAT, "demo-gemma", None),
    ],
)
def test_the_demo_model_accepts_the_turns_of_the_rows(
    chat: list[dict[str, str]],
    model: str,
    words: str | None,
    place: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    rows = [{"messages": [*chat, {**CHAT[0], "content": f"{n}"}, CHAT[1]]} for n in range(8)]
    write_rows(place / "rows.jsonl", rows)
    assert main(["init", "study", "--data", "rows.jsonl"]) == 0
    said = capsys.readouterr().out
    assert f"model {model}: demo_models/" in said
    assert words in said if words else "demo-gemma would refuse" not in said
    assert main(["init", "asked", "--data", "rows.jsonl", "--model", "demo-gemma"]) == 0
    assert ("demo-gemma refuses 8 rows" in capsys.readouterr().out) == bool(words)
