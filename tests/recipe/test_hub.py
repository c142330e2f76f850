"""Names on the hub that a recipe loads, and recipes at the commits that these names point to."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from runner.recipe.hub import (
    CommitFinder,
    HubName,
    find_prepared,
    list_hub_names,
    pin,
    state_as_before,
)
from runner.recipe.identity import build_digest_payload
from tests.recipe.test_identity import parse
from tests.support.moving_hub import moving_hub

A, B = "a" * 40, "b" * 40
MODEL = "model.path=org/tiny"
SOURCES = "[{path: org/rows, num_samples: 2}, {path: here.jsonl, num_samples: 3}]"


def test_a_name_is_what_no_file_is_called(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    recipe = parse(MODEL, "model.revision=v1", "data.train={path: org/rows, split: all}")
    assert list_hub_names(recipe) == {
        "model.path": HubName("model", "org/tiny", "v1"),
        "data.train.path": HubName("dataset", "org/rows"),
    }
    (tmp_path / "org" / "tiny").mkdir(parents=True)
    assert list(list_hub_names(recipe)) == ["data.train.path"]
    local = parse("model.path=./org/none", "data.train={path: rows.jsonl}")
    assert list_hub_names(local) == {}
    several = parse("model.path=/models/one", "data.test={path: org/test}")
    assert list(list_hub_names(several)) == ["data.test.path"]


def test_a_pinned_recipe_differs_in_its_revisions_only() -> None:
    recipe = parse(MODEL, "data.train={path: org/rows, split: all}", "data.test={path: t.jsonl}")
    pinned = pin(recipe, {"model.path": A, "data.train.path": B})
    assert (pinned.model.revision, pinned.data.sources["train"].revision) == (A, B)
    assert (
        pinned.data.sources["train"].states_split and not pinned.data.sources["test"].states_split
    )
    assert pinned.data.sources["test"].revision is None
    back = {"model.path": None, "data.train.path": None}
    assert state_as_before(pinned, recipe, {"model.path": A, "data.train.path": B}) == recipe
    assert state_as_before(pinned, recipe, dict.fromkeys(back, "c" * 40)) == pinned
    assert pin(recipe, {}) is recipe


def test_each_of_several_sources_is_pinned() -> None:
    recipe = parse(f"data.train={SOURCES}", "data.num_train_samples=5")
    pinned = pin(recipe, {"data.train.0.path": A})
    assert [source.revision for source in pinned.data.train_sources] == [A, None]
    assert pinned.data.train_shares == recipe.data.train_shares == (2, 3)


def test_the_digest_is_of_the_recipe_as_it_was_written() -> None:
    """A stated commit is a part of the experiment, a recorded one is not."""
    recipe = parse(MODEL)
    stated = parse(MODEL, f"model.revision={A}")
    assert build_digest_payload(recipe) != build_digest_payload(stated)
    assert build_digest_payload(pin(recipe, {"model.path": A})) == build_digest_payload(stated)


def test_a_stated_commit_is_asked_of_nobody() -> None:
    assert CommitFinder().find(HubName("model", "org/none", A)) == A


def test_rows_that_datasets_prepared_are_found_by_commit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path))
    from datasets.naming import camelcase_to_snakecase

    for name in ("org/Some-RowsOf2", "squad_v2", "org/SQuADRows"):
        *owner, own = name.split("/")
        folder = tmp_path / "___".join([*owner, camelcase_to_snakecase(own)])
        whole, unfinished = folder / "plain" / "0.0.0" / A, folder / "other" / "0.0.0" / A
        for path in (whole, unfinished, folder / "plain" / "0.0.0" / f"{A}.incomplete"):
            path.mkdir(parents=True)
        (whole / "dataset_info.json").touch()
        assert find_prepared(name, A) == [whole]
        assert find_prepared(name, B) == []


# Rows at commits, one after the other; what cannot be loaded is an error in words.
LOAD = """
import json, os, sys
from runner.data.sources import load_rows
from runner.errors import DataError
from runner.recipe.data_section import DataSource
for keys in json.loads(sys.argv[1]):
    try:
        print(json.dumps([row for _, row in load_rows(DataSource(path="org/Rows", **keys))]))
    except DataError as error:
        print(json.dumps(error.message))
"""


def test_rows_are_those_of_their_commit_and_of_no_other_one(tmp_path: Path) -> None:
    """If the hub does not answer, `datasets` loads its newest rows, of any commit."""
    configs = [
        {"config_name": "few", "data_files": "few.jsonl"},
        {"config_name": "all", "data_files": "all.jsonl", "default": True},
    ]

    def files(word: str) -> dict[str, bytes]:
        card = f"---\nconfigs: {json.dumps(configs)}\n---\n"
        return {
            "README.md": card.encode(),
            "few.jsonl": f'{{"q": "few {word}"}}\n'.encode(),
            "all.jsonl": f'{{"q": "all {word}"}}\n'.encode(),
        }

    def load(*keys: dict[str, str], **environment: str) -> list[object]:
        done = subprocess.run(
            [sys.executable, "-c", LOAD, json.dumps(keys)],
            env={**os.environ, **hub.environment(tmp_path / "cache"), **environment},
            capture_output=True,
            text=True,
            check=True,
        )
        return [json.loads(line) for line in done.stdout.splitlines()]

    few = {"config_name": "few"}
    with moving_hub() as hub:
        hub.commit("datasets", "org/Rows", A, files("A"))
        hub.commit("datasets", "org/Rows", B, files("B"))
        loaded = load({"revision": A, **few}, {"revision": A}, {"revision": B, **few})
        assert loaded == [[{"q": "few A"}], [{"q": "all A"}], [{"q": "few B"}]]
        hub.take_requests()
        assert load({"revision": A}, {"revision": A, **few}) == [[{"q": "all A"}], [{"q": "few A"}]]
        assert hub.take_requests() == []
        loaded = load({"revision": A}, {"revision": "c" * 40}, HF_HUB_OFFLINE="1")
        assert loaded[0] == [{"q": "all A"}] and hub.take_requests() == []
        assert f"the commit {'c' * 40} is not in the cache" in str(loaded[1])
        (gone,) = load({"revision": "c" * 40})
        assert "cannot load the data set 'org/Rows'" in str(gone) and "exist" in str(gone)


FETCH = """
import sys
from runner.recipe.hub import fetch_model
print(fetch_model("org/tiny", sys.argv[1], with_weights=True))
"""


def test_a_cached_commit_is_loaded_after_the_hub_has_dropped_it(tmp_path: Path) -> None:
    """Also where nothing lists what belongs to it, as in a cache that another tool filled."""

    def fetch() -> str:
        done = subprocess.run(
            [sys.executable, "-c", FETCH, A],
            env={**os.environ, **hub.environment(tmp_path / "cache")},
            capture_output=True,
            text=True,
            check=True,
        )
        return done.stdout.strip()

    with moving_hub() as hub:
        files = {"config.json": b"{}", "model.safetensors": b"w", "tokenizer.json": b"{}"}
        hub.commit("models", "org/tiny", A, files)
        assert fetch() == "True"
        for folder in (tmp_path / "cache").rglob("trees"):
            shutil.rmtree(folder)
        hub.commit("models", "org/tiny", B, files)
        del hub.repositories["models", "org/tiny"].commits[A]
        assert fetch() == "True"
        (weights,) = (tmp_path / "cache").rglob(f"{A}/model.safetensors")
        weights.unlink()
        assert fetch() == "False"
