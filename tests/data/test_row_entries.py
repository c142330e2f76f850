"""Entries of rows: what their names depend on, and that they are the rows that are masked without
them, by however many processes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pyarrow as pa
import pytest

from runner.data import row_entries
from runner.data.draw import draw_splits
from runner.data.provenance import PACKAGES
from runner.data.row_entries import build_parts, load_entry, name_entry, pin_data, write_rows
from runner.data.rows import build_samples, describe_samples
from runner.data.shards import Task, Work, write_shards
from runner.data.tokenizer import load_tokenizer
from runner.errors import CorruptFileError, DataError
from runner.files import hash_sources, load_json, write_json_atomic
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.data_section import DataSection
from runner.recipe.parse import Recipe, parse_recipe
from runner.recipe.schema import ModelSection
from tests.conftest import RECIPE_TEXT, Project
from tests.support.installed import install_editable
from tests.support.row_files import ROWS, section
from tests.support.row_files import write_rows as write_file
from tests.test_imports import INNER, name_package


@pytest.fixture
def model(tiny_model: Callable[[str], Path]) -> ModelSection:
    return ModelSection(path=str(tiny_model("gemma")), dtype="float32")


def list_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def write_manifest(folder: Path) -> None:
    """Write the manifest as the last step of an entry."""
    write_json_atomic(folder / "manifest.json", {"files": dict.fromkeys(list_files(folder), "")})


def write_entry_of(folder: Path, data: DataSection, model: ModelSection) -> Path:
    folder.mkdir()
    write_rows(folder, draw_splits(data), Work(data, model), load_tokenizer(model))
    write_manifest(folder)
    return folder


# --- what an entry holds


@pytest.mark.parametrize(
    "changes", [{}, {"truncation": "drop", "max_length": 34}, {"turns": "split", "seed": 3}]
)
def test_an_entry_holds_the_rows_that_are_masked_without_it(
    tmp_path: Path, model: ModelSection, changes: Mapping[str, Any]
) -> None:
    rows = [{**row, "id": number, "note": "x"} for number, row in enumerate([*ROWS, ROWS[0]])]
    changes = {"ignore": ["note", "unknown"], **changes}
    data = section(write_file(tmp_path / "rows.jsonl", rows), **changes)
    tokenizer, raw = load_tokenizer(model), draw_splits(data)
    expected = build_samples(data, tokenizer, raw)
    assert dict(raw.left_out.columns["train"]) == {"id": len(rows), "note": len(rows)}
    folder = tmp_path / "entry"
    folder.mkdir()
    told: list[tuple[int, int]] = []
    write_rows(
        folder,
        raw,
        Work(data, model),
        tokenizer,
        with_columns=True,
        report=lambda *numbers: told.append(numbers),
    )
    write_manifest(folder)
    found = load_entry(folder)
    for split in ("train", "validation", "test"):
        one, other = getattr(found, split), getattr(expected, split)
        assert tuple(one.rows) == other.rows and one.dropped == other.dropped
        assert one.list_lengths() == other.list_lengths()
        columns = [{} if split == "train" else dict(row.columns) for row in other.rows]
        assert [row.columns for row in one.rows] == columns
        assert [row.where for row in one.rows] == [row.where for row in other.rows]
    for loss in ("full", "completion", "last_completion"):
        described = json.dumps(describe_samples(found, loss), sort_keys=True)
        assert described == json.dumps(describe_samples(expected, loss), sort_keys=True)
    if "truncation" in changes:
        assert expected.train.dropped, "the case is about rows that do not fit"
    assert found.left_out == expected.left_out and found.left_out.num_duplicates == 1
    assert told[0] == (0, 55) and told[-1] == (55, 55)


def test_several_processes_write_the_same_bytes(
    tmp_path: Path, model: ModelSection, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The processes are real ones; only the sizes are made small."""
    data = section(write_file(tmp_path / "rows.jsonl", ROWS))
    tokenizer, raw = load_tokenizer(model), draw_splits(data)
    monkeypatch.setattr(row_entries, "ROWS_PER_SHARD", 8)
    monkeypatch.setattr(row_entries, "_MIN_ROWS_PER_PROCESS", 20)
    told: list[tuple[int, int]] = []
    for name, num_cores in (("one", 1), ("two", 2)):
        (tmp_path / name).mkdir()
        write_rows(
            tmp_path / name,
            raw,
            Work(data, model),
            tokenizer,
            num_cores=num_cores,
            report=lambda *numbers: told.append(numbers),
        )
    one, two = list_files(tmp_path / "one"), list_files(tmp_path / "two")
    assert one == two and len(one) == 4 + 2 + 2 + 1
    assert told[-1] == (55, 55)
    write_manifest(tmp_path / "two")
    assert all(row.columns == {} for row in load_entry(tmp_path / "two").test.rows)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_the_first_row_that_cannot_be_masked_is_the_one_that_is_told(
    tmp_path: Path, model: ModelSection, num_processes: int
) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [{"role": role, "content": f"{n}"}, {"role": "assistant", "content": "a"}]}
        for n, role in enumerate([*["user"] * 30, "system", "system"])
    ]
    data = section(
        write_file(tmp_path / "rows.jsonl", rows),
        task={"name": "conversations"},
        num_train_samples=None,
        num_validation_samples=1,
        num_test_samples=1,
    )
    tokenizer, raw = load_tokenizer(model), draw_splits(data)
    with pytest.raises(DataError) as expected:
        build_samples(data, tokenizer, raw)
    tasks = [Task(tmp_path / str(at), raw.train[at : at + 4], False) for at in range(0, 30, 4)]
    outcomes = write_shards(Work(data, model), tokenizer, tasks, num_processes, lambda _: None)
    first = next(one for one in outcomes if isinstance(one, DataError))
    assert (first.message, first.hint) == (expected.value.message, expected.value.hint)


def test_what_is_refused_without_an_entry_is_refused_when_one_is_written(
    tmp_path: Path, model: ModelSection
) -> None:
    rows = [{"prompt": f"Question {n // 2}?", "completion": "Yes.", "part": n} for n in range(12)]
    path = write_file(tmp_path / "rows.jsonl", rows)
    counts = {"num_train_samples": None, "num_validation_samples": 3, "num_test_samples": 3}
    for name, changes, what in (
        ("same", {"group_column": "part"}, "become the same tokens"),
        ("long", {"ignore": ["part"], "max_length": 5, "num_test_samples": 1}, "are longer than"),
    ):
        data = section(path, **{**counts, **changes})
        tokenizer, raw = load_tokenizer(model), draw_splits(data)
        with pytest.raises(DataError, match=what) as expected:
            build_samples(data, tokenizer, raw)
        (tmp_path / name).mkdir()
        with pytest.raises(DataError) as found:
            write_rows(tmp_path / name, raw, Work(data, model), tokenizer)
        assert str(found.value) == str(expected.value)


def test_a_lost_process_is_told(tmp_path: Path, model: ModelSection) -> None:
    """Rows that another process cannot be sent, and a model that it does not find."""
    data = section(write_file(tmp_path / "rows.jsonl", ROWS))
    tokenizer, raw = load_tokenizer(model), draw_splits(data)
    tasks = [Task(tmp_path / "a", raw.train, True), Task(tmp_path / "b", raw.test, False)]
    gone = model.model_copy(update={"path": str(tmp_path / "gone")})
    with pytest.raises(OSError, match="a process that masks rows ended with exit status 1"):
        write_shards(Work(data, gone), tokenizer, tasks, 2, lambda _: None)
    tokenizer.chat_template += "{# another one #}"
    with pytest.raises(OSError, match="finds another tokenizer or libraries"):
        write_shards(Work(data, model), tokenizer, tasks, 2, lambda _: None)


@pytest.fixture
def entry(tmp_path: Path, model: ModelSection) -> Path:
    data = section(write_file(tmp_path / "rows.jsonl", ROWS))
    return write_entry_of(tmp_path / "entry", data, model)


WRONG: Final[Mapping[str, Callable[[dict[str, Any], dict[str, Any]], object]]] = {
    "no splits": lambda rows, _: rows.pop("splits"),
    "splits in a list": lambda rows, _: rows.update(splits=[]),
    "no test split": lambda rows, _: rows["splits"].pop("test"),
    "no shards": lambda rows, _: rows["splits"]["train"].pop("shards"),
    "no list of shards": lambda rows, _: rows["splits"]["train"].update(shards=7),
    "no text": lambda rows, _: rows["splits"]["train"].update(shards=[["train-00000.arrow"]]),
    "no shard": lambda rows, _: rows["splits"]["train"].update(shards=["rows.json"]),
    "no manifest": lambda _, manifest: manifest.clear(),
    "a manifest that lacks a shard": lambda _, manifest: manifest["files"].pop("test-00000.arrow"),
    "a manifest without rows.json": lambda _, manifest: manifest["files"].pop("rows.json"),
    "dropped": lambda rows, _: rows["splits"]["train"].update(dropped="abc"),
    "facts": lambda rows, _: rows["splits"]["train"].update(facts=[]),
    "facts of one loss": lambda rows, _: rows["splits"]["train"]["facts"].update(full=None),
    "left out": lambda rows, _: rows.update(left_out=None),
}


@pytest.mark.parametrize("wrong", WRONG.values(), ids=[*WRONG])
def test_an_entry_of_another_shape_is_not_read(
    entry: Path, wrong: Callable[[dict[str, Any], dict[str, Any]], object]
) -> None:
    rows, manifest = load_json(entry / "rows.json"), load_json(entry / "manifest.json")
    assert load_entry(entry).train.rows
    wrong(rows, manifest)
    write_json_atomic(entry / "rows.json", rows)
    write_json_atomic(entry / "manifest.json", manifest)
    with pytest.raises(CorruptFileError, match="cannot be read"):
        load_entry(entry)


@pytest.mark.parametrize("name", ["../train-00000.arrow", "{folder}/train-00000.arrow", "..", "."])
def test_an_entry_has_its_rows_from_nowhere_else(entry: Path, tmp_path: Path, name: str) -> None:
    """Paths elsewhere are refused even if a manifest names them, because the runner never writes
    them.
    """
    (entry / "train-00000.arrow").rename(tmp_path / "train-00000.arrow")
    name = name.format(folder=tmp_path)
    rows, manifest = load_json(entry / "rows.json"), load_json(entry / "manifest.json")
    rows["splits"]["train"]["shards"] = [name]
    manifest["files"][name] = manifest["files"]["train-00000.arrow"]
    write_json_atomic(entry / "rows.json", rows)
    write_json_atomic(entry / "manifest.json", manifest)
    with pytest.raises(CorruptFileError, match="is not listed in its manifest"):
        load_entry(entry)


def test_a_shard_of_other_columns_is_not_read(entry: Path) -> None:
    path = entry / "train-00000.arrow"
    with pa.OSFile(str(path), "wb") as file:
        batch = pa.record_batch({"input_ids": [[1, 2]]})
        with pa.ipc.new_stream(file, batch.schema) as stream:
            stream.write_batch(batch)
    with pytest.raises(CorruptFileError, match="has other columns"):
        load_entry(entry)


def test_a_folder_without_rows_is_not_read(tmp_path: Path) -> None:
    for content in (None, [], 7, "rows"):
        write_json_atomic(tmp_path / "rows.json", content)
        with pytest.raises(CorruptFileError, match="cannot be read"):
            load_entry(tmp_path)
    with pytest.raises(CorruptFileError, match="cannot be read"):
        load_entry(tmp_path / "rows.json")


# --- what its name depends on


def build_name(project: Project, *overrides: str) -> str:
    recipe = project.recipe(*overrides)
    contents = hash_contents(recipe, ContentHashes(project.root / "hashes.json"))
    parts = build_parts(recipe, load_tokenizer(recipe.model), contents)
    assert parts is not None
    return name_entry(parts)


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    monkeypatch.chdir(project.root)
    project.add_model()
    (project.root / "other.jsonl").write_text((project.root / "data.jsonl").read_text())
    return project


@pytest.mark.parametrize(
    "override",
    [
        "data.seed=8",
        "data.num_train_samples=21",
        "data.num_validation_samples=11",
        "data.num_test_samples=14",
        "data.max_length=161",
        "data.truncation=turns_left",
        "data.turns=last",
        "data.ignore=[id]",
        "data.group_column=id",
        "data.train.path=other.jsonl",
        "data.test.path=other.jsonl",
        "model.end_of_turn=<eos>",
        "model.template_date='2026-01-01'",
        "model.chat_template_kwargs={enable_thinking: true}",
        "model.chat_template=own.jinja",
        "model.pad_token=<unused1>",
        (
            "evaluation={metrics: [{name: own, mode: min, function: own.py:score}],"
            " generation: {enabled: true, max_new_tokens: 4}}"
        ),
    ],
)
def test_what_changes_rows_or_masks_makes_another_name(here: Project, override: str) -> None:
    (here.root / "own.jinja").write_text("{{ messages }}")
    (here.root / "own.py").write_text("def score(*_): return 1\n")
    assert build_name(here, override) != build_name(here)


@pytest.mark.parametrize(
    "override",
    [
        "loss=full",  # labels are made when rows are read
        "training.seed=4",
        "training.learning_rate=1e-3",
        "adapter.r=8",
        "run.name=other",
        "evaluation.eval_steps=2",
    ],
)
def test_what_leaves_rows_alone_leaves_the_name(here: Project, override: str) -> None:
    assert build_name(here, override) == build_name(here)


def test_contents_make_another_name(here: Project) -> None:
    names = [build_name(here, "data.train.path=other.jsonl")]
    with (here.root / "other.jsonl").open("a") as stream:
        stream.write('{"messages": [{"role": "user", "content": "?"}]}\n')
    names.append(build_name(here, "data.train.path=other.jsonl"))
    (here.root / "own.jinja").write_text("{{ messages }}")
    names.append(build_name(here, "model.chat_template=own.jinja"))
    (here.root / "own.jinja").write_text("{{ messages }} ")
    names.append(build_name(here, "model.chat_template=own.jinja"))
    task = "data.task={name: python, function: rows.py:build, python_files: [lib.py]}"
    for rows, lib in (("a = 1", "b = 1"), ("a = 2", "b = 1"), ("a = 2", "b = 2")):
        (here.root / "rows.py").write_text(rows)
        (here.root / "lib.py").write_text(lib)
        names.append(build_name(here, task))
    assert len({*names}) == len(names) == 7


def test_the_tokenizer_itself_makes_another_name(here: Project) -> None:
    recipe = here.recipe()
    contents = hash_contents(recipe, ContentHashes(here.root / "hashes.json"))
    names = []
    for change in (
        lambda _: None,
        lambda tokenizer: tokenizer.add_tokens(["zebra"]),
        lambda tokenizer: tokenizer.add_special_tokens({"eos_token": "<end_of_turn>"}),
        lambda tokenizer: setattr(tokenizer, "chat_template", "{{ messages }}"),
    ):
        tokenizer = load_tokenizer(recipe.model)
        change(tokenizer)
        parts = build_parts(recipe, tokenizer, contents)
        assert parts is not None
        names.append(name_entry(parts))
    assert len({*names}) == 4


def test_versions_and_sources_are_parts_of_the_name(here: Project, tmp_path: Path) -> None:
    recipe = here.recipe()
    contents = hash_contents(recipe, ContentHashes(here.root / "hashes.json"))
    parts = build_parts(recipe, load_tokenizer(recipe.model), contents)
    assert parts is not None and parts["installed"] is None
    assert {"transformers", "tokenizers", "jinja2", "pyarrow"} <= parts["versions"].keys()
    for key in parts:
        assert name_entry({**parts, key: "other"}) != name_entry(parts)
    for name in ("data/tasks", "recipe", "sft"):
        (tmp_path / "tree" / name).mkdir(parents=True)
    hashes = [hash_sources(tmp_path / "tree", PACKAGES)]
    for name in ("files.py", "data/masking.py", "data/tasks/alpaca.py", "recipe/schema.py"):
        (tmp_path / "tree" / name).write_text("")
        hashes.append(hash_sources(tmp_path / "tree", PACKAGES))
        (tmp_path / "tree" / name).write_text("pass")
        hashes.append(hash_sources(tmp_path / "tree", PACKAGES))
    assert len({*hashes}) == len(hashes)
    (tmp_path / "tree" / "sft" / "train.py").write_text("")
    assert hash_sources(tmp_path / "tree", PACKAGES) == hashes[-1]


def test_all_source_that_rows_pass_through_is_hashed() -> None:
    """Every module that `data` imports, even indirectly, is in a hashed package or at the top."""
    reached, left = {"data", "data.tasks"}, ["data", "data.tasks"]
    while left:
        package = left.pop()
        for one in INNER:
            below = name_package(one.imported)
            if name_package(one.importer) == package and below not in reached:
                reached.add(below)
                left.append(below)
    assert reached == {"root", "data.tasks", *PACKAGES}


def test_rows_that_nothing_pins_are_not_stored() -> None:
    def pin(source: Mapping[str, Any], contents: Mapping[str, str]) -> Mapping[str, str] | None:
        recipe: Recipe = parse_recipe(
            RECIPE_TEXT, where="recipe.yaml", overrides=[f"data.train={json.dumps(source)}"]
        )
        return pin_data(recipe, contents)

    commit = "0123456789" * 4
    assert pin({"path": "data.jsonl"}, {"data.jsonl": "1"}) == {"data.jsonl": "1"}
    assert pin({"path": "data.jsonl"}, {}) is None
    assert pin({"path": "owner/rows", "revision": commit}, {}) == {"owner/rows": commit}
    assert pin({"path": "owner/rows", "revision": "main"}, {}) is None
    assert pin({"path": "owner/rows"}, {}) is None


def test_a_slow_tokenizer_has_no_entry(here: Project) -> None:
    recipe = here.recipe()
    contents = hash_contents(recipe, ContentHashes(here.root / "hashes.json"))
    assert build_parts(recipe, object(), contents) is None


def test_rows_of_a_function_that_may_import_what_is_edited_in_place_are_not_pinned(
    here: Project, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task = "data.task={name: python, function: rows.py:build}"
    recipe = parse_recipe(RECIPE_TEXT, where="recipe.yaml", overrides=[task])
    contents = dict.fromkeys([*recipe.list_python_files().values(), "data.jsonl"], "1")
    pinned = pin_data(recipe, contents)
    assert pinned is not None and "rows.py" in pinned
    install_editable(tmp_path, "lab-tools")
    monkeypatch.syspath_prepend(tmp_path)
    assert pin_data(recipe, contents) is None
    plain = parse_recipe(RECIPE_TEXT, where="recipe.yaml")
    assert pin_data(plain, contents) is not None
