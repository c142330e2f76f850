"""`runner check` on common layouts of data files: which are read, reported or refused."""

from __future__ import annotations

import gzip
import json
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

import pytest

from tests.conftest import RECIPE_TEXT, ROOT, Project, make_project

CASES: Final = ROOT / "tests" / "data" / "cases"
CHAT: Final = {
    "messages": [{"role": "user", "content": "Hi?"}, {"role": "assistant", "content": "Hello."}]
}
# The `data` section but for what all share; the folders of the cases lie in the project.
GOOD: Final = {
    "hidden": "train: {path: hidden_files}\n  num_train_samples: 4",
    "split": (
        "train: {path: split_files, split: train}\n"
        "  validation: {path: split_files, split: valid}\n"
        "  test: {path: split_files, split: test}\n"
        "  num_train_samples: null"
    ),
    "hub": (
        "train: {path: hub_layout, split: train}\n"
        "  test: {path: hub_layout, split: test}\n"
        "  num_train_samples: 11"
    ),
    "lines": "train: {path: json_lines_named_json.json, split: train}\n  num_train_samples: 3",
    "key": "train: {path: data_key.json}\n  num_train_samples: 3",
    "union": "train: {path: nulls_of_a_union.jsonl}\n  num_train_samples: 4",
    "mixed": (
        "train: [{path: split_files, split: train, num_samples: 4},"
        " {path: hub_layout, split: train, num_samples: 8}]\n"
        "  validation: {path: split_files, split: validation}\n"
        "  test: {path: split_files, split: test}\n"
        "  num_train_samples: 6"
    ),
}
# Files that cannot be read, and the error for each.
DAMAGED: Final[Mapping[str, tuple[bytes, str]]] = {
    "latin.jsonl": ('{"a": "wörd"}'.encode("latin-1"), "is not UTF-8 text"),
    "torn.jsonl": (b'{"messages": [', "line 1: is not JSON"),
    "deep.jsonl": (b"[" * 100_000, "is nested too deeply"),
    "half.jsonl": (rb'{"messages": "\ud800"}', "is one half of a character"),
    "number.json": (b"7", "expected a JSON list of rows"),
    "fields.csv": (b"prompt,completion\na\n", "row 1 (line 2): has 1 fields, but the header has 2"),
    "columns.csv": (b"prompt,prompt\na,b\n", "two columns are called 'prompt'"),
    "semicolons.csv": (b"prompt;completion\na;b\n", "the header has semicolons between its names"),
    "table.parquet": (b"nope", "cannot be read as Parquet"),
    "table.arrow": (b"nope", "cannot be read as Arrow"),
    "rows.txt": (b"a", "cannot tell the format"),
    "bomb.jsonl.gz": (gzip.compress(b" " * 2**24) * 17, "unpacks to more than 200 times its size"),
}
BAD: Final[Mapping[str, tuple[str, tuple[str, ...]]]] = {
    "split unstated": (
        "train: {path: split_files}",
        (
            "data.train: the folder",
            "train (1 file), validation (1 file), test (1 file)",
            "hint: write `split: train`",
        ),
    ),
    "hub unstated": (
        "train: {path: hub_layout}",
        ("hub_layout holds train (2 files), test (1 file)", "hint: write `split: train`"),
    ),
    "no such split": (
        "train: {path: hub_layout, split: validation}",
        ("and no split 'validation'", "or `split: test`"),
    ),
    "a split of a file": (
        "train: {path: data_key.json, split: test}",
        ("`split: test` chooses among the files of a folder", "data_key.json is one file"),
    ),
    "a config of a file": (
        "train: {path: data_key.json, config_name: main}",
        ("`config_name: main`", "hint: leave it out"),
    ),
    "a revision of a folder": (
        "train: {path: hub_layout, split: train, revision: main}",
        ("`revision: main` is a commit of a data set on the hub", "write `revision: null`"),
    ),
    "a key twice": (
        "train: {path: twice.jsonl}",
        ("twice.jsonl line 2: the key `content` appears twice in one object",),
    ),
    "several lists": (
        "train: {path: lists.json}",
        ("lists.json: expected a JSON list of rows", "several lists: a, b"),
    ),
    "one text under two keys": (
        "train: {path: one.jsonl}\n  test: {path: other.jsonl}",
        ("one.jsonl line 1 (train) and other.jsonl line 1 (test)",),
    ),
    "packed and damaged": ("train: {path: torn.jsonl.gz}", ("torn.jsonl.gz: cannot be unpacked",)),
    "no such part": (
        "train: {path: parts, config_name: mian, split: train}",
        ("`config_name: mian` is a folder inside a local data set", "did you mean `main`?"),
    ),
    "a part out of the folder": (
        "train: {path: parts, config_name: ../parts}",
        ("'../parts' leads out of the folder",),
    ),
    "parts unstated": (
        "train: {path: listed, split: train}",
        (
            "README.md names 2 parts of this data set",
            "hint: write `config_name: a`; its parts are a",
        ),
    ),
    "a readme that cannot be followed": (
        "train: {path: misled}",
        ("misled/README.md: one of its `configs` has no `config_name`",),
    ),
    "two splits in a name": (
        "train: {path: both, split: train}",
        ("both/train_test.jsonl: its name contains two splits, train and test",),
    ),
    "a folder without rows": (
        "train: {path: empty}",
        ("the folder empty holds no .jsonl", "1 file that holds no rows: notes.txt"),
    ),
    "no split in any name": (
        "train: {path: parts/other, split: test}",
        ("has no files for `split: test`: no name in it contains a split",),
    ),
    "a saved folder that is damaged": (
        "train: {path: saved}",
        ("saved: cannot be read as a data set that `save_to_disk` has written",),
    ),
    **{
        f"{number} damaged": (f"train: {{path: {name}}}", (name, words))
        for number, (name, (_, words)) in enumerate(DAMAGED.items())
    },
    "a source that runs out": (
        "train: [{path: split_files, split: train, weight: 1},"
        " {path: hub_layout, split: train, weight: 1}]\n  num_train_samples: 24",
        ("split_files has 4 rows, its share of 24 is 12", "request 8 rows"),
    ),
}


@pytest.fixture(scope="module")
def sources(
    tmp_path_factory: pytest.TempPathFactory, data_path: Path, tiny_model: Callable[[str], Path]
) -> Project:
    """A project with the cases, and one recipe for each `data` section."""
    project = make_project(tmp_path_factory.mktemp("sources"), data_path, tiny_model)
    project.add_model("gemma")
    shutil.copytree(CASES, project.root, dirs_exist_ok=True)
    message = '{"role": "user", "content": "a", "content": "b"}'
    (project.root / "twice.jsonl").write_text(f'{json.dumps(CHAT)}\n{{"messages": [{message}]}}')
    (project.root / "lists.json").write_text('{"a": [{}], "b": [{}]}')
    others = (
        {"messages": [{**CHAT["messages"][0], "content": text}, CHAT["messages"][1]]}
        for text in "ab"
    )
    (project.root / "one.jsonl").write_text("\n".join(map(json.dumps, [CHAT, *others])))
    (project.root / "other.jsonl").write_text(json.dumps({**CHAT, "tools": []}))
    (project.root / "torn.jsonl.gz").write_bytes(b"\x1f\x8b nope")
    for name, (content, _) in DAMAGED.items():
        (project.root / name).write_bytes(content)
    row, configs = json.dumps(CHAT), "- {config_name: a, data_files: x}\n- {config_name: b}"
    for name, text in {
        "parts/main/train.jsonl": row,
        "parts/other/rows.jsonl": row,
        "listed/README.md": f"---\nconfigs:\n{configs}\n---\n",
        "misled/README.md": "---\nconfigs:\n- {data_files: x}\n---\n",
        "both/train_test.jsonl": row,
        "empty/notes.txt": "",
        "saved/state.json": '{"_data_files": [{"filename": "data.arrow"}]}',
        "saved/dataset_info.json": "{}",
        "saved/data.arrow": "nope",
    }.items():
        (project.root / name).parent.mkdir(parents=True, exist_ok=True)
        (project.root / name).write_text(text)
    bad = {name: section for name, (section, _) in BAD.items()}
    for folder, sections in (("good", GOOD), ("bad", bad)):
        for name, section in sections.items():
            write_recipe(project, f"recipes/{folder}/{name.replace(' ', '-')}.yaml", section)
    return project


def write_recipe(project: Project, path: str, section: str) -> None:
    """A recipe whose `data` is this; one row each selects and reports where it says no other."""
    has_own = [f"{split}:" in section for split in ("validation", "test")]
    counts = [
        f"  num_{split}_samples: {'null' if own else 1}\n"
        for split, own in zip(("validation", "test"), has_own, strict=True)
    ]
    start, end = RECIPE_TEXT.split("  train: {path: data.jsonl}\n")
    end = "".join(line for line in end.splitlines(keepends=True) if "_samples:" not in line)
    target = project.root / path
    target.parent.mkdir(parents=True, exist_ok=True)
    text = f"{start}  {section}\n{''.join(counts)}{end}"
    target.write_text(text.replace("name: base", f"name: {target.stem}"))


@pytest.fixture(scope="module")
def good(sources: Project) -> Mapping[str, Any]:
    """Output of `check --json` for the recipes that can be trained."""
    done = sources.call("check", "recipes/good", "--json")
    assert done.returncode == 0, done.stdout + done.stderr
    content: Mapping[str, Any] = json.loads(done.stdout)
    return content


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("hidden", (4, 1, 1)),
        ("split", (6, 6, 6)),
        ("hub", (11, 1, 6)),
        ("lines", (3, 1, 1)),
        ("key", (3, 1, 1)),
        ("union", (4, 1, 1)),
        ("mixed", (6, 6, 6)),
    ],
)
def test_the_rows_of_a_layout_are_read(
    good: Mapping[str, Any], name: str, counts: tuple[int, ...]
) -> None:
    (run,) = [run for run in good["runs"] if run["run"] == f"tests/{name}"]
    splits = ("train", "validation", "test")
    assert tuple(run["splits"][split]["num_rows"] for split in splits) == counts


def test_what_has_no_effect_is_a_note_and_no_warning(good: Mapping[str, Any]) -> None:
    (note,) = good["notes"]
    assert note["runs"] == ["tests/lines"]
    assert note["text"] == (
        "`split: train` has no effect: json_lines_named_json.json is one file: all of its rows are"
        " read"
    )
    assert not [one for one in good["warnings"] if "no effect" in one["text"]]


def test_what_was_skipped_is_told(sources: Project) -> None:
    done = sources.call("check", "recipes/good")
    names = ".ipynb_checkpoints/train-checkpoint.jsonl, __MACOSX/._train.jsonl"
    assert f"  left out: train: 2 hidden files ({names}), not read\n" in done.stdout
    assert "\nnote: `split: train` has no effect" in done.stdout
    assert "  split_files, hub_layout\n" in done.stdout, "where rows of several sources come from"


def test_samples_json_counts_what_was_skipped(
    sources: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    from runner.data.rows import build_samples, describe_samples
    from runner.data.tokenizer import load_tokenizer
    from runner.recipe.parse import load_recipe

    monkeypatch.chdir(sources.root)
    recipe = load_recipe(Path("recipes/good/hidden.yaml"))
    samples = build_samples(recipe.data, load_tokenizer(recipe.model))
    (counted,) = describe_samples(samples, "full")["skipped_files"]["train"].items()
    assert counted[0].startswith("hidden files (.ipynb_checkpoints/") and counted[1] == 2


@pytest.fixture(scope="module")
def refused(sources: Project) -> Mapping[str, str]:
    """Run -> what `check --json` refuses it for."""
    done = sources.call("check", "recipes/bad", "--json")
    assert done.returncode == 2 and "Traceback" not in done.stderr
    errors = json.loads(done.stdout)["errors"]
    return {name: one["text"] for one in errors for name in one["runs"]}


@pytest.mark.parametrize("name", BAD)
def test_a_source_that_is_not_clear_is_refused(refused: Mapping[str, str], name: str) -> None:
    text = refused[f"tests/{name.replace(' ', '-')}"]
    for words in BAD[name][1]:
        assert words in text, text


@pytest.mark.parametrize("name", ["split unstated", "a revision of a folder"])
def test_a_launch_refuses_it_before_it_starts(sources: Project, name: str) -> None:
    done = sources.cli("launch", f"recipes/bad/{name.replace(' ', '-')}.yaml")
    assert done.returncode == 2 and BAD[name][1][0] in done.stderr
    assert not (sources.root / "runs" / "tests").exists()
