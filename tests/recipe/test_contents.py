"""Files that a recipe names: identified by their content, hashed once, reported by name if they are
missing.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from runner.errors import DataError
from runner.files import hash_file, hash_json
from runner.recipe.contents import (
    ContentHashes,
    KnownContents,
    check_contents,
    hash_contents,
    hash_existing,
    known_content,
    list_changed,
    list_content_paths,
    list_contents,
    list_missing_files,
)
from runner.recipe.identity import derive_digest
from runner.recipe.parse import Recipe
from tests.recipe.test_identity import parse
from tests.support.settled import settle as settle_hashes


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe in the current folder that names a file of every sort; all were written long ago."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "toy" / "sub").mkdir(parents=True)
    for name in (
        "models/toy/config.json",
        "models/toy/model.safetensors",
        "models/toy/sub/weights.bin",
        "chat.jinja",
        "data.jsonl",
        "v.jsonl",
        "t.jsonl",
    ):
        (tmp_path / name).write_text(name)
    settle(tmp_path)
    launch_config = tmp_path / parse().launch.accelerate_config  # must be there, but is no content
    launch_config.parent.mkdir(exist_ok=True)
    launch_config.touch()
    names = (
        "model.chat_template=chat.jinja",
        "data.validation={path: v.jsonl}",
        "data.test={path: t.jsonl}",
    )
    return parse(*names)


def settle(folder: Path) -> None:
    for path in folder.rglob("*"):
        os.utime(path, (1_600_000_000, 1_600_000_000))


def digest_now(recipe: Recipe) -> str:
    return derive_digest(recipe, hash_contents(recipe, ContentHashes(Path("cache.json"))))


def test_every_file_that_a_recipe_names_is_hashed(recipe: Recipe) -> None:
    assert set(list_content_paths(recipe).values()) == {
        "models/toy",
        "chat.jinja",
        "data.jsonl",
        "v.jsonl",
        "t.jsonl",
    }
    assert set(hash_contents(recipe, ContentHashes(Path("cache.json")))) == set(
        list_content_paths(recipe).values()
    )


def test_files_that_are_not_there_are_named_at_once_and_never_looked_for_on_the_hub(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    names = (
        "model.path=demo_models/gemma",
        "data.train.path=none.jsonl",
        "launch.accelerate_config=none.yaml",
    )
    with pytest.raises(DataError) as caught:
        hash_contents(parse(*names), ContentHashes(Path("cache.json")))
    for line in (
        "model.path: demo_models/gemma",
        "data.train.path: none.jsonl",
        "launch.accelerate_config: none.yaml",
    ):
        assert f"\n  {line}" in caught.value.message
    assert caught.value.hint is not None and "runner demo-models" in caught.value.hint


@pytest.mark.parametrize(
    "name",
    [
        "models/toy/config.json",
        "models/toy/model.safetensors",
        "models/toy/sub/weights.bin",
        "chat.jinja",
        "data.jsonl",
        "v.jsonl",
        "t.jsonl",
    ],
)
def test_other_content_is_another_experiment(name: str, recipe: Recipe) -> None:
    before = digest_now(recipe)
    Path(name).write_text("other " + name)
    assert digest_now(recipe) != before


def test_a_file_more_or_less_in_a_folder_counts_and_hidden_ones_do_not(recipe: Recipe) -> None:
    before = digest_now(recipe)
    (Path("models/toy/.cache/download")).mkdir(parents=True)
    Path("models/toy/.cache/download/stamp").write_text("12:00")
    Path("models/toy/.gitattributes").write_text("x")
    assert digest_now(recipe) == before
    Path("models/toy/adapter.json").write_text("{}")
    more = digest_now(recipe)
    Path("models/toy/adapter.json").rename("models/toy/renamed.json")
    assert len({before, more, digest_now(recipe)}) == 3


def test_a_hash_follows_the_bytes_through_touching_moving_and_renaming(
    recipe: Recipe, tmp_path: Path
) -> None:
    hashes = ContentHashes(tmp_path / "cache.json")
    file, folder = hashes.hash(Path("data.jsonl")), hashes.hash(Path("models/toy"))
    Path("data.jsonl").touch()
    assert hashes.hash(Path("data.jsonl")) == file
    Path("data.jsonl").rename("moved.jsonl")
    Path("models/toy").rename("elsewhere")
    Path("linked").symlink_to("elsewhere")
    assert hashes.hash(Path("moved.jsonl")) == file
    assert hashes.hash(Path("elsewhere")) == hashes.hash(Path("linked")) == folder


def test_what_is_cached_is_not_read_again(recipe: Recipe, tmp_path: Path) -> None:
    path, cache_path = Path("data.jsonl"), tmp_path / "cache.json"
    hashes = ContentHashes(cache_path)
    assert hashes.known(path) is None
    before = hashes.hash(path)
    hashes.save()
    again = ContentHashes(cache_path)
    assert again.known(path) == before == again.known(path.absolute())
    entries = json.loads(cache_path.read_text())
    entries[str(path.absolute())][-1] = "as the cache says"
    cache_path.write_text(json.dumps(entries))
    assert ContentHashes(cache_path).hash(path) == before, "it was written too recently"
    settle_hashes(cache_path)
    assert ContentHashes(cache_path).hash(path) == "as the cache says"


@pytest.mark.parametrize("how", ["size", "mtime", "ctime", "inode"])
def test_size_times_and_inode_each_tell_another_file(
    how: str, recipe: Recipe, tmp_path: Path
) -> None:
    path = Path("data.jsonl")
    hashes = ContentHashes(tmp_path / "cache.json")
    before = hashes.hash(path)
    hashes.save()
    settle_hashes(tmp_path / "cache.json")
    hashes = ContentHashes(tmp_path / "cache.json")
    state = path.stat()
    if how == "inode":
        Path("new").write_text("DATA.JSONL")
        Path("new").rename(path)
    else:
        path.write_text("DATA.JSONL" + ("!" if how == "size" else ""))
    ns = state.st_mtime_ns + (how == "mtime")
    os.utime(path, ns=(ns, ns))
    assert hashes.known(path) is None
    assert hashes.hash(path) != before


def test_what_was_read_in_the_instant_of_its_change_is_read_again(tmp_path: Path) -> None:
    """A clock ticks every few milliseconds, or every two seconds on some file systems: a second
    change may leave the very same time stamps.
    """
    path, cache_path = tmp_path / "data.jsonl", tmp_path / "cache.json"
    path.write_text("two")
    hashes = ContentHashes(cache_path)
    rightly = hashes.hash(path)
    hashes.save()
    entries = json.loads(cache_path.read_text())
    entries[str(path)][-1] = hash_file(cache_path)  # as if it had been "one", a moment ago
    cache_path.write_text(json.dumps(entries))
    assert ContentHashes(cache_path).hash(path) == rightly


def test_a_file_of_the_future_is_not_read_each_time(tmp_path: Path) -> None:
    path, cache_path = tmp_path / "data.jsonl", tmp_path / "cache.json"
    path.write_text("two")
    os.utime(path, (4e9, 4e9))
    hashes = ContentHashes(cache_path)
    hashes.hash(path)
    hashes.save()
    assert hashes.measure_unread([path]) == 3, "it was written too recently"
    settle_hashes(cache_path)
    assert ContentHashes(cache_path).measure_unread([path]) == 0


def test_what_changed_since_it_was_hashed_is_told_and_little_is_read(
    recipe: Recipe, tmp_path: Path
) -> None:
    cache_path = tmp_path / "cache.json"
    contents = hash_contents(recipe, ContentHashes(cache_path))
    settle_hashes(cache_path)
    assert list_changed(recipe, contents, cache_path) == {}
    Path("t.jsonl").touch()
    assert list_changed(recipe, contents, cache_path) == {}, "the same bytes"
    with Path("t.jsonl").open("r+") as stream:
        stream.truncate(2**30 + 1)
    assert list_changed(recipe, contents, cache_path) == {
        "t.jsonl": "was touched, and is too large to read again now"
    }
    Path("t.jsonl").write_text("other")
    Path("v.jsonl").unlink()
    assert list_changed(recipe, contents, cache_path) == {
        "t.jsonl": "has another content",
        "v.jsonl": "is not there any more",
    }
    Path("t.jsonl").chmod(0o640)
    hash_existing(recipe, hashes := ContentHashes(cache_path))  # by another process
    hashes.save()
    assert list_changed(recipe, contents, cache_path)["t.jsonl"] == "has another content"


def test_a_file_that_was_only_touched_is_read_again_and_nothing_changed(
    recipe: Recipe, tmp_path: Path
) -> None:
    cache_path = tmp_path / "cache.json"
    before = hash_contents(recipe, ContentHashes(cache_path))
    settle_hashes(cache_path)
    Path("v.jsonl").chmod(0o600)
    os.link("t.jsonl", "another name of it")
    inputs = KnownContents(cache_path).look(recipe)
    assert (inputs.touched, inputs.unread, inputs.missing) == (("t.jsonl", "v.jsonl"), (), ())
    assert hash_contents(recipe, ContentHashes(cache_path)) == before
    assert KnownContents(cache_path).look(recipe).touched == ()


def test_entries_of_an_older_version_are_read_anew(recipe: Recipe, tmp_path: Path) -> None:
    cache_path = tmp_path / "cache.json"
    before = hash_contents(recipe, ContentHashes(cache_path))
    entries = {
        name: [size, mtime, inode, "of the older version"]
        for name, (size, mtime, _, inode, _, _) in json.loads(cache_path.read_text()).items()
    }
    cache_path.write_text(json.dumps(entries))
    inputs = KnownContents(cache_path).look(recipe)
    assert inputs.contents == {} and set(inputs.unread) == set(before)
    assert hash_contents(recipe, ContentHashes(cache_path)) == before
    assert KnownContents(cache_path).look(recipe).contents == before


def test_a_preview_keeps_nothing(recipe: Recipe, tmp_path: Path) -> None:
    cache_path = tmp_path / "cache.json"
    assert hash_contents(recipe, ContentHashes(cache_path, is_kept=False))
    assert not cache_path.exists()


def test_reading_much_is_told_once(
    recipe: Recipe, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with Path("models/toy/large.safetensors").open("wb") as stream:
        stream.truncate(2**30)  # a hole: it takes no room on the disk
    hashes = ContentHashes(tmp_path / "cache.json")
    hash_contents(recipe, hashes)
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err == "reading 1.00 GiB of models/toy to check that nothing changed ...\n"
    hashes.save()
    settle_hashes(tmp_path / "cache.json")
    hash_contents(recipe, ContentHashes(tmp_path / "cache.json"))
    assert "models/toy" not in capsys.readouterr().err, "it is not read again"


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", "3", '{"a": 1, "b": [1, 2, 3], "c": null}', '{"a": [1, "2", 3, 4, 5, 6]}'],
)
def test_a_damaged_cache_only_costs_time(content: str, recipe: Recipe, tmp_path: Path) -> None:
    cache_path = tmp_path / "cache.json"
    cache_path.write_text(content)
    hashes = ContentHashes(cache_path)
    hash_contents(recipe, hashes)
    assert ContentHashes(cache_path).known(Path("data.jsonl")) == hashes.hash(Path("data.jsonl"))


def test_two_processes_that_save_keep_each_others_hashes(recipe: Recipe, tmp_path: Path) -> None:
    first, second = ContentHashes(tmp_path / "cache.json"), ContentHashes(tmp_path / "cache.json")
    first.hash(Path("data.jsonl"))
    second.hash(Path("v.jsonl"))
    first.save()
    second.save()
    both = ContentHashes(tmp_path / "cache.json")
    assert both.known(Path("data.jsonl")) and both.known(Path("v.jsonl"))


def test_all_missing_files_are_named_at_once(recipe: Recipe) -> None:
    for name in ("data.jsonl", "v.jsonl", "chat.jinja"):
        Path(name).unlink()
    with pytest.raises(DataError) as caught:
        digest_now(recipe)
    for line in (
        "data.train.path: data.jsonl",
        "data.validation.path: v.jsonl",
        "model.chat_template: chat.jinja",
    ):
        assert line in str(caught.value)
    assert "t.jsonl" not in str(caught.value)


def test_a_file_that_cannot_be_read_is_an_error_in_words(recipe: Recipe) -> None:
    Path("models/toy/broken").symlink_to("nowhere")
    with pytest.raises(DataError, match="cannot be read"):
        digest_now(recipe)
    assert "models/toy" not in find_known(recipe, Path("cache.json"))


def find_known(recipe: Recipe, path: Path) -> dict[str, str]:
    return KnownContents(path).find(list_contents(recipe))


def digest_of(*overrides: str) -> str:
    hashes = ContentHashes(Path("cache.json"))
    recipe = parse("data.validation={path: v.jsonl}", "data.test={path: t.jsonl}", *overrides)
    return hash_contents(recipe, hashes)["rows"]


def write_rows(*names: str) -> None:
    for name in names:
        Path("rows", name).parent.mkdir(parents=True, exist_ok=True)
        Path("rows", name).write_text(name)
    settle(Path("rows"))


def test_a_folder_of_rows_that_is_read_whole_is_hashed_as_ever(recipe: Recipe) -> None:
    write_rows("a.jsonl", "b/c.csv")
    before = digest_of("data.train.path=rows")
    assert before == hash_json(
        {name: hash_file(Path("rows", name)) for name in ("a.jsonl", "b/c.csv")}
    ), "recipes that were hashed before keep their digests"
    write_rows(".ipynb_checkpoints/a.jsonl", ".notes.txt")
    assert digest_of("data.train.path=rows") == before
    write_rows("README.md")
    assert digest_of("data.train.path=rows") == hash_json(
        {name: hash_file(Path("rows", name)) for name in ("README.md", "a.jsonl", "b/c.csv")}
    ), "a completed run of such a folder stays completed"


def test_of_a_folder_with_splits_those_that_are_read_are_hashed(recipe: Recipe) -> None:
    write_rows("train.jsonl", "test.jsonl", "dev.jsonl")
    train = ("data.train.path=rows", "data.train.split=train")
    both = (*train, "data.test={path: rows, split: test}")
    before = digest_of(*train), digest_of(*both)
    assert before[0] != before[1]
    Path("rows/test.jsonl").write_text("another")
    assert digest_of(*train) == before[0] and digest_of(*both) != before[1]
    Path("rows/dev.jsonl").unlink()
    assert digest_of(*train) == before[0]


def test_a_folder_that_leaves_open_what_is_meant_is_refused_before_anything_starts(
    recipe: Recipe,
) -> None:
    write_rows("train.jsonl", "test.jsonl")
    ambiguous = parse("data.train.path=rows")
    with pytest.raises(DataError, match="does not say which split to read"):
        hash_contents(ambiguous, ContentHashes(Path("cache.json")))
    assert "rows" not in find_known(ambiguous, Path("cache.json"))
    assert "rows" not in hash_existing(ambiguous, ContentHashes(Path("cache.json")))


def test_what_a_readme_says_of_splits_is_hashed_too(recipe: Recipe) -> None:
    write_rows("a.jsonl", "b.jsonl")
    text = "---\nconfigs:\n- config_name: x\n  data_files: [{split: train, path: a.jsonl}]\n---\n"
    Path("rows/README.md").write_text(text)
    settle(Path("rows"))
    before = digest_of("data.train.path=rows")
    Path("rows/README.md").write_text(text.replace("a.jsonl", "b.jsonl"))
    assert digest_of("data.train.path=rows") != before


def test_every_one_of_several_sources_is_hashed(recipe: Recipe) -> None:
    write_rows("a.jsonl", "b.jsonl")
    several = "data.train=[{path: rows/a.jsonl, weight: 1}, {path: rows/b.jsonl, weight: 2}]"
    mixed = parse(several, "data.num_train_samples=3")
    paths = list_content_paths(mixed)
    assert paths["data.train.0.path"] == "rows/a.jsonl"
    assert paths["data.train.1.path"] == "rows/b.jsonl"
    found = hash_contents(mixed, ContentHashes(Path("cache.json")))
    assert {"rows/a.jsonl", "rows/b.jsonl"} <= set(found)


@pytest.mark.parametrize(
    ("path", "is_local"),
    [
        ("google/gemma-2-2b", False),
        ("gpt2", False),
        ("./gemma", True),
        ("/models/gemma", True),
        ("~/gemma", True),
        ("a/b/c", True),
        ("data/train.jsonl", True),
    ],
)
def test_a_hub_id_is_not_taken_for_a_missing_file(
    path: str, is_local: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert ("data.train.path" in list_content_paths(parse(f"data.train.path={path}"))) == is_local


def test_known_contents_reads_nothing(recipe: Recipe, tmp_path: Path) -> None:
    path = tmp_path / "cache.json"
    assert find_known(recipe, path) == {}
    contents = hash_contents(recipe, ContentHashes(path))
    assert find_known(recipe, path) == contents
    Path("v.jsonl").unlink()
    Path("t.jsonl").touch()
    assert set(contents) - set(find_known(recipe, path)) == {"v.jsonl", "t.jsonl"}


def test_all_ways_to_ask_for_a_folder_of_rows_give_one_hash(recipe: Recipe) -> None:
    """A launch records these hashes, and `status`, `why` and the watch compare with them."""
    write_rows("train.jsonl", "test.jsonl", "README.md", ".cache/train.jsonl")
    named = parse("data.train.path=rows", "data.train.split=train")
    hashes = ContentHashes(Path("cache.json"))
    launched = hash_contents(named, hashes)["rows"]
    assert hash_existing(named, hashes)["rows"] == launched
    assert find_known(named, Path("cache.json"))["rows"] == launched
    (content,) = [one for one in list_contents(named) if one.path == "rows"]
    assert known_content(content, hashes) == launched


@pytest.mark.parametrize(
    ("change", "lacks"),
    [
        ({"model.safetensors": None}, "model.safetensors"),
        ({"model.safetensors": None, "pytorch_model.bin": "pickled"}, "model.safetensors"),
        ({"config.json": None}, "config.json"),
        (
            {
                "model.safetensors": None,
                "model.safetensors.index.json": '{"weight_map": {"a": "1.safetensors", "b": "2"}}',
                "1.safetensors": "1",
            },
            "2",
        ),
    ],
)
def test_a_models_folder_without_all_its_files_is_refused_and_compared_with_nothing(
    recipe: Recipe, change: dict[str, str | None], lacks: str
) -> None:
    hash_contents(recipe, ContentHashes(Path("cache.json")))
    for name, text in change.items():
        path = Path("models/toy") / name
        path.unlink() if text is None else path.write_text(text)
    assert list_missing_files(recipe) == {"model.path": f"models/toy/{lacks}"}
    with pytest.raises(DataError, match=f"model.path: models/toy/{lacks}") as caught:
        check_contents(recipe)
    assert "pickles" in (caught.value.hint or "") or lacks == "2"
    inputs = KnownContents(Path("cache.json")).look(recipe)
    assert inputs.missing == (f"models/toy/{lacks}",)
    assert "models/toy" not in {*inputs.contents, *inputs.touched, *inputs.unread}
    assert "models/toy" not in hash_existing(recipe, ContentHashes(Path("cache.json")))


@pytest.mark.parametrize(
    "files",
    [
        {"adapter_config.json": "{}"},  # its base model is elsewhere
        {"config.json": '{"transformers_weights": "own.safetensors"}', "own.safetensors": ""},
        {"config.json": "{}", "model.safetensors.index.json": "no JSON"},  # the loader says so
    ],
)
def test_what_a_models_folder_may_hold_instead_is_not_refused(
    recipe: Recipe, files: dict[str, str]
) -> None:
    for path in Path("models/toy").glob("*.*"):
        path.unlink()
    for name, text in files.items():
        (Path("models/toy") / name).write_text(text)
    assert list_missing_files(recipe) == {}
