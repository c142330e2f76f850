"""`runner check`: every recipe, and each row once per tokenizer; its statements about rows hold in
training.
"""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path

import pytest

from runner.data.rows import build_samples, describe_samples
from runner.data.tokenizer import load_tokenizer
from runner.preflight.check import build_json, format_result
from runner.preflight.survey import CheckResult, check_recipes
from runner.recipe.parse import Recipe, load_recipe
from tests.conftest import ROOT, Project


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    """The project, with one tiny model, as the current folder."""
    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    return project


def named(project: Project, name: str, *overrides: str) -> Recipe:
    return project.recipe(*overrides, f"run.name={name}")


def warnings_of(result: CheckResult) -> str:
    assert not result.errors, result.errors
    return "\n".join(result.warnings)


def test_a_grid_is_described_by_one_block_per_model(project: Project) -> None:
    project.add_model("gemma")
    for loss in ("full", "completion"):
        project.write_recipe(f"recipes/tests/{loss}.yaml", f"loss={loss}")
    done = project.cli("check", "recipes/tests")
    assert done.returncode == 0, done.stderr
    lines = [line.split() for line in done.stdout.splitlines()]
    assert [line[1] for line in lines if line[:1] == ["train"]] == ["22"], done.stdout
    for text in (
        "2 recipes are well-formed",
        "6 updates an epoch, the last of 2 rows",
        "2 recipes can be trained",
    ):
        assert text in done.stdout, text


def test_an_axis_that_changes_the_number_of_updates_is_warned_of(project: Project) -> None:
    project.add_model("gemma")
    for rows in (12, 20):
        for loss in ("full", "completion"):
            axes = f"run.axes={{rows: {rows}, loss: {loss}}}"
            changes = (axes, f"loss={loss}", f"data.num_train_samples={rows}")
            changes += ("training.num_train_epochs=4",)
            project.write_recipe(f"recipes/tests/{loss}-{rows}.yaml", *changes)
    done = project.call("check", "recipes/tests")
    assert done.returncode == 0, done.stderr
    said = "warning: `rows` 12 -> 20 changes the number of updates 12 -> 20:"
    assert done.stdout.count(said) == done.stdout.count("changes the number of updates") == 1
    assert "4 recipes can be trained, 1 warning" in done.stdout.splitlines()[-1], done.stdout


def test_one_mistake_of_many_recipes_is_said_once(project: Project) -> None:
    project.add_model("gemma")
    for seed in (1, 2):
        project.write_recipe(
            f"recipes/tests/seed-{seed}.yaml", f"training.seed={seed}", "data.max_length=8"
        )
    done = project.call("check", "recipes/tests")
    assert done.returncode == 2
    assert done.stderr.count("error: ") == 1
    assert "2 of 2 recipes cannot be trained" in done.stderr
    assert "Traceback" not in done.stderr


def test_only_the_schema(project: Project) -> None:
    project.write_recipe("recipes/tests/a.yaml", "model.path=nowhere")
    assert project.call("check", "recipes/tests", "--schema-only").returncode == 0


@pytest.mark.parametrize("truncation", ["prompt_left", "drop"])
def test_what_is_counted_is_what_training_uses(here: Project, truncation: str) -> None:
    recipes = [
        named(here, f"{loss}-{count}", f"loss={loss}", f"data.num_train_samples={count}")
        for loss in ("full", "completion")
        for count in (9, 22)
    ]
    recipes = [
        recipe.model_copy(
            update={
                "data": recipe.data.model_copy(update={"max_length": 50, "truncation": truncation})
            }
        )
        for recipe in recipes
    ]
    content = build_json(check_recipes(recipes))
    tokenizer = load_tokenizer(recipes[0].model)
    by_name = {run["run"].removeprefix("tests/"): run for run in content["runs"]}
    assert set(by_name) == {recipe.run.name for recipe in recipes}, content["errors"]
    for recipe in recipes:
        used = describe_samples(build_samples(recipe.data, tokenizer), recipe.loss)["splits"]
        for split, facts in by_name[recipe.run.name]["splits"].items():
            for key in ("num_rows", "num_truncated", "num_dropped", "num_tokens"):
                assert facts[key] == used[split][key], (split, key)
            assert facts["num_labels"][recipe.loss] == used[split]["num_labels"]
    full, completion = (
        by_name["full-22"]["splits"]["train"],
        by_name["completion-22"]["splits"]["train"],
    )
    assert full == completion, "which rows are used, cut and dropped does not depend on the loss"
    assert full["num_truncated"] + full["num_dropped"] > 0


def test_arms_that_are_the_same_experiment_are_named(here: Project) -> None:
    rows = [{"messages": [{"role": "assistant", "content": f"Number {n}."}]} for n in range(60)]
    (here.root / "bare.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (here.root / "bare.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}"
    )
    bare = ("data.train.path=bare.jsonl", "model.chat_template=bare.jinja")
    result = check_recipes(
        [
            named(here, "a"),
            named(here, "same", "checkpoints.keep_latest=5", "launch.num_processes=2"),
            named(here, "other", "training.seed=4"),
            named(here, "cut", "data.max_length=150"),  # no row is longer
            named(here, "bare-full", "loss=full", *bare),
            named(here, "bare-completion", "loss=completion", *bare),
        ]
    )
    text = warnings_of(result)
    assert "these runs are the same experiment: tests/a, tests/same, tests/cut" in text
    assert "although their losses differ: they train the same tokens: tests/bare-full" in text
    assert "tests/other" not in text


def test_too_few_rows_for_the_largest_arm_leave_the_others_alone(here: Project) -> None:
    recipes = [
        named(here, f"n{count}", f"data.num_train_samples={count}") for count in (22, 100, 5000)
    ]
    result = check_recipes(recipes)
    assert [run.recipe.run.name for run in result.runs] == ["n22", "n100"]
    ((text, names),) = result.errors.items()
    assert names == ["tests/n5000"] and "needs 5000" in text


def test_doubts_about_tokens_are_raised(here: Project) -> None:
    lines = (here.root / "data.jsonl").read_text().splitlines()
    silent = {
        "messages": [{"role": "user", "content": "Well?"}, {"role": "assistant", "content": " "}]
    }
    (here.root / "silent.jsonl").write_text("\n".join([*lines, json.dumps(silent)]))
    (here.root / "models" / "short").mkdir()
    for file in (here.root / "models" / "gemma").iterdir():
        (here.root / "models" / "short" / file.name).symlink_to(file.resolve())
    config = json.loads((here.root / "models/short/config.json").read_text())
    (here.root / "models/short/config.json").unlink()
    (here.root / "models/short/config.json").write_text(
        json.dumps(config | {"max_position_embeddings": 20})
    )
    pasted = {
        "messages": [
            {"role": "user", "content": "Say <eos>."},
            {"role": "assistant", "content": "No."},
        ]
    }
    (here.root / "pasted.jsonl").write_text("\n".join([json.dumps(pasted), *lines]))
    (here.root / "bare.jinja").write_text(
        "{% for m in messages %}{{ m.content }}{{ '<start_of_turn>' if m.role == 'assistant' }}{%"
        " endfor %}"
    )
    text = warnings_of(
        check_recipes(
            [
                named(
                    here, "pasted", "data.train.path=pasted.jsonl", "data.num_train_samples=null"
                ),
                named(here, "bare", "model.chat_template=bare.jinja"),
                named(
                    here, "silent", "data.train.path=silent.jsonl", "data.num_train_samples=null"
                ),
                named(here, "short", "model.path=models/short"),
            ]
        )
    )
    assert re.search(
        r"1 \w+ row contains text that the tokenizer reads as a special token, the first is"
        " pasted.jsonl line 1",
        text,
    )
    assert re.search(
        r"1 \w+ row has an empty answer, the first is silent.jsonl line"
        f" {len(lines) + 1}",
        text,
    )
    assert re.search(
        r"models/short: the longest row has \d+ tokens, but the model has only 20 positions", text
    )
    assert "the tokenizer begins texts with <bos>, the chat template does not" in text
    assert (
        "training ends answers with <start_of_turn>, at which the base model's own generation"
        " settings do not stop" in text
    )


def test_equal_answers_and_prompts_in_two_splits_are_warned_of(here: Project) -> None:
    def write(name: str, rows: list[tuple[str, str]]) -> None:
        lines = []
        for texts in rows:
            turns = zip(("user", "assistant"), texts, strict=True)
            messages = [{"role": role, "content": text} for role, text in turns]
            lines.append(json.dumps({"messages": messages}))
        (here.root / name).write_text("\n".join(lines))

    write("same.jsonl", [(f"Say {n}.", "Yes.") for n in range(30)])
    write("twice.jsonl", [(f"Say {n % 2}.", f"It is {n}.") for n in range(30)])
    write("sound.jsonl", [(f"Say {n}.", f"It is {n}.") for n in range(30)])
    drawn = [f"data.num_{split}_samples=4" for split in ("validation", "test")]
    drawn.append("data.num_train_samples=20")
    warnings = {
        name: warnings_of(
            check_recipes([named(here, name, f"data.train.path={name}.jsonl", *drawn)])
        )
        for name in ("same", "twice", "sound")
    }
    assert "all 20 train rows have the same answer, the first is same.jsonl" in warnings["same"]
    assert "the prompt of a train row" not in warnings["same"]
    assert "4 test rows have the prompt of a train row and another answer" in warnings["twice"]
    assert "`data.group_column`" in warnings["twice"]
    assert "same answer" not in warnings["twice"] + warnings["sound"]
    assert "the prompt of a train row" not in warnings["sound"]


def test_all_missing_files_and_models_are_one_summary(project: Project) -> None:
    project.add_model("gemma")
    for model in ("models/gemma", "owner/a-model", "./models/none"):
        for data in ("data", "missing/x", "missing/y"):
            name = f"{Path(model).name}-{Path(data).name}"
            project.write_recipe(
                f"recipes/{name}.yaml", f"model.path={model}", f"data.train.path={data}.jsonl"
            )
    done = project.call("check", "recipes", "--json")
    assert done.returncode == 2, done.stderr
    content = json.loads(done.stdout)
    assert content["num_recipes"] == 9
    assert [run["run"] for run in content["runs"]] == ["tests/gemma-data"]
    missing, hub = content["errors"]
    assert "3 files that recipes name are missing" in missing["text"] and len(missing["runs"]) == 7
    assert "missing/x.jsonl  data.train.path of 3 recipes" in missing["text"]
    assert "./models/none    model.path of 3 recipes" in missing["text"]
    assert "cannot load the tokenizer of 'owner/a-model'" in hub["text"] and len(hub["runs"]) == 3


def test_216_recipes_on_three_tokenizers_are_checked_in_one_pass(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    spec = importlib.util.spec_from_file_location("check_216", ROOT / "benchmarks" / "check_216.py")
    assert spec is not None and spec.loader is not None
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    recipes_dir = benchmark.build_project(tmp_path, num_turns=2)
    monkeypatch.chdir(tmp_path)
    result = check_recipes([load_recipe(path) for path in sorted(recipes_dir.glob("*.yaml"))])
    assert not result.errors
    [counts, accumulation] = result.warnings
    for text, axis in ((counts, "num_train_samples"), (accumulation, "gradient_accumulation")):
        assert text.startswith(f"`{axis}") and "changes the number of updates" in text
    assert len(result.runs) == 216
    assert {run.splits["train"].num_rows for run in result.runs} == {60, 120, 180}
    assert all(
        facts.num_rows == 40
        for run in result.runs
        for name, facts in run.splits.items()
        if name != "train"
    )
    lines = list(format_result(result))
    assert any(
        "60 rows at a global batch of 16: 4 updates an epoch, the last of 12 rows" in line
        for line in lines
    )
    assert len(lines) < 80, "216 recipes are summed up"


def test_any_end_of_a_turn_that_stops_nothing_is_warned_of(here: Project) -> None:
    """An example is GPT-OSS: the conversation ends in a token that stops the model, earlier turns
    do not.
    """
    rows = [
        {
            "messages": [
                {"role": role, "content": f"{role} {n} {turn}"}
                for turn in range(2)
                for role in ("user", "assistant")
            ]
        }
        for n in range(60)
    ]
    (here.root / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    end = "'<eos>' if loop.last and m.role == 'assistant' else '<start_of_turn>'"
    template = "{% for m in messages %}{{ m.content }}{{ " + end + " }}{% endfor %}"
    (here.root / "ends.jinja").write_text(template)
    rounds = ("data.train.path=rounds.jsonl", "model.chat_template=ends.jinja")
    result = check_recipes([named(here, "all", *rounds)])
    assert (
        "training ends answers with <start_of_turn>, at which the base model's own generation"
        " settings do not stop" in warnings_of(result)
    )
    assert "answers end in <start_of_turn> or <eos>" in "\n".join(format_result(result))
    last = check_recipes([named(here, "last", *rounds, "data.turns=last")])
    assert "training ends answers" not in warnings_of(last)


def test_rows_that_a_cut_makes_equal_are_counted(here: Project) -> None:
    lines = []
    for number in range(60):
        question = {"role": "user", "content": f"Number {number}. " + "Tell me this please. " * 20}
        answer = {"role": "assistant", "content": "Yes."}
        lines.append(json.dumps({"messages": [question, answer]}))
    (here.root / "long.jsonl").write_text("\n".join(lines))
    changes = ("data.train.path=long.jsonl", "data.max_length=24", "data.truncation=prompt_left")
    text = warnings_of(check_recipes([named(here, "cut", *changes)]))
    assert re.search(r"\d+ rows have the same tokens as a row of another split after being", text)
    assert "rows begin in the middle of a message, cut by `data.truncation: prompt_left`" in text


def test_a_system_text_that_a_cut_takes_is_warned_of(here: Project) -> None:
    here.add_model("llama")
    lines = []
    for number in range(60):
        question = {"role": "user", "content": f"Number {number}. " + "Tell me this please. " * 9}
        answer = {"role": "assistant", "content": f"Yes, {number}."}
        system = {"role": "system", "content": "Be brief."}
        lines.append(json.dumps({"messages": [system, question, answer, question, answer]}))
    (here.root / "ruled.jsonl").write_text("\n".join(lines))
    changes = ("model.path=models/llama", "data.train.path=ruled.jsonl", "data.max_length=220")
    cut, rounds = (
        check_recipes([named(here, truncation, *changes, f"data.truncation={truncation}")])
        for truncation in ("prompt_left", "turns_left")
    )
    assert re.search(
        r"\d+ train rows lose characters of their system message to `data.truncation: prompt_left`;"
        " `turns_left` cuts whole rounds and keeps it",
        warnings_of(cut),
    )
    assert not rounds.errors and "system text" not in warnings_of(rounds)


def test_what_the_template_does_not_look_at_is_warned_of(here: Project) -> None:
    (here.root / "thinks.jinja").write_text(
        "{% for m in messages %}<bos>{{ m.role }}: {{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if enable_thinking %}{% endif %}"
    )
    own = ("model.chat_template=thinks.jinja", "model.template_date='2026-01-31'")
    arguments = "{enable_thinking: true, enable_thinkng: false}"
    result = check_recipes([named(here, "typo", *own, f"model.chat_template_kwargs={arguments}")])
    assert not result.errors
    text = warnings_of(result)
    assert "`model.chat_template_kwargs.enable_thinkng` has no effect: the chat template" in text
    assert "`model.template_date` has no effect" in text
    assert "enable_thinking`" not in text


def test_the_groups_of_a_split_are_counted_where_rows_share_one(here: Project) -> None:
    rows = [json.loads(line) for line in Path("data.jsonl").read_text().splitlines()]
    for number, row in enumerate(rows):
        row["author"] = f"author {number // 3}"
    Path("data.jsonl").unlink()
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (plain,) = check_recipes([named(here, "plain", "data.ignore=[author]")]).runs
    assert plain.splits["train"].num_groups == plain.splits["train"].num_rows
    result = check_recipes([named(here, "grouped", "data.group_column=author")])
    (run,) = result.runs
    groups = run.splits["train"].num_groups
    assert run.splits["train"].num_rows / 3 <= groups < run.splits["train"].num_rows
    lines = [text.split() for text in format_result(result)]
    (header,) = (line for line in lines if line[:1] == ["split"])
    (train,) = (line for line in lines if line[:1] == ["train"])
    assert header[:3] == ["split", "rows", "groups"] and train[2] == str(groups)
