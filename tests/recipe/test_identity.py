"""Which keys make another experiment, which only say where it runs; and content that is known by
what it holds.
"""

from __future__ import annotations

import itertools
import json
import os
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from runner.errors import DataError
from runner.recipe.identity import (
    ContentHashes,
    build_resume_fingerprint,
    derive_digest,
    diff_payloads,
    hash_contents,
    known_contents,
    list_content_paths,
)
from runner.recipe.parse import Recipe, parse_recipe
from tests.recipe.test_parse import TEXT

# Everything else is the experiment.
PLACEMENT = {
    "run.grid",
    "run.name",
    "run.axes",
    "run.overrides",
    "launch.accelerate_config",
    "launch.num_processes",
    "launch.num_machines",
    "launch.num_cpu_threads_per_process",
    "launch.retries.transient",
    "launch.retries.lost",
    "launch.retries.out_of_memory",
    "launch.retries.backoff_seconds",
    "launch.on_version_change",
    "checkpoints.keep_latest",
    "checkpoints.keep_best",
    "checkpoints.save_optimizer",
    "checkpoints.archive",
    "checkpoints.remote",
    "checkpoints.remote.url",
    "checkpoints.remote.options",
    "checkpoints.remote.num_retries",
    "checkpoints.remote.load",
    "tracking.report_to",
    "tracking.project",
    "tracking.run_name",
    "tracking.tags",
    "tracking.watch",
    "tracking.log_steps",
    "tracking.log_model",
    "tracking.hub_model_id",
    "tracking.hub_private",
    "training.per_device_train_batch_size",
    "evaluation.per_device_eval_batch_size",
}
# The global batch is either stated or follows from the accumulation; one alone cannot be changed
# away.
CANNOT_CHANGE_ALONE = {"run.schema_version", "training.gradient_accumulation_steps"}
# Each makes another kind of section, with other keys.
MAKES_A_KIND = {
    "adapter.method",
    "quantization.method",
    "data.task.name",
    "early_stopping.enabled",
    "evaluation.generation.enabled",
}

KINDS: list[tuple[str, ...]] = [
    (),
    ("adapter.method=none",),
    ("quantization.method=8bit",),
    (
        "quantization.method=4bit",
        "quantization.bnb_4bit_quant_type=nf4",
        "quantization.bnb_4bit_use_double_quant=true",
        "quantization.bnb_4bit_compute_dtype=bfloat16",
    ),
    ("data.task.name=conversations",),
    ("data.task.name=prompt_completion",),
    ("data.task.name=sst2", "data.task.prompt='{sentence}'"),
    ("data.task.name=squad_v2", "data.task.prompt='{context} {question}'"),
    ("data.task.name=oasst1",),
    ("data.task.name=math_tools",),
    ("evaluation.generation={enabled: true, max_new_tokens: 8}",),
    ("checkpoints.save_strategy=epoch", "checkpoints.save_epochs=3", "checkpoints.save_steps=null"),
    (
        "early_stopping.enabled=true",
        "early_stopping.metric=nll_per_token",
        "early_stopping.patience=2",
        "evaluation.eval_strategy=steps",
        "evaluation.eval_steps=3",
        "checkpoints.save_strategy=steps",
        "checkpoints.save_steps=3",
    ),
    ("training.max_steps=null", "training.num_train_epochs=2"),
]
# The same experiment as the first kind, with keys of its own.
PLACEMENT_KINDS: list[tuple[str, ...]] = [
    ("checkpoints.remote={url: 'memory://checkpoints'}",),
    ("launch.num_processes=2",),
]


def parse(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, where="r.yaml", overrides=overrides)


def list_keys(model: BaseModel, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted key and annotation of every key that a recipe of this kind can state."""
    for name, field in type(model).model_fields.items():
        value = getattr(model, name)
        if isinstance(value, BaseModel):
            yield from list_keys(value, f"{prefix}{name}.")
        # A library object: null is all that a recipe can say.
        elif field.annotation not in (None, type(None)):
            yield f"{prefix}{name}", field.annotation


def propose(annotation: Any) -> Iterator[Any]:
    """Values that an annotation may admit, several of each type, so that one differs from what is
    there.
    """
    origin, parts = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Literal:
        yield from parts
    elif origin is typing.Annotated:
        yield from propose(parts[0])
    elif origin in (typing.Union, types.UnionType):
        for part in parts:
            yield from propose(part)
    elif origin is tuple:
        yield from (["one"], ["two"], ["one", "two"])
        yield from ([value] for value in propose(parts[0]))
    elif origin is dict:
        yield from ({"one": 1}, {"two": [2]})
    elif origin is list:
        yield from (["one"], [2])
    elif isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield from ({"path": "one.jsonl"}, {"path": "two.jsonl"}, {"url": "memory://one"})
    else:
        yield from {
            bool: (True, False),
            int: (1, 2, 6),
            float: (0.25, 0.5),
            str: (
                "one",
                "{document} {sentence} {context} {question}",
                "nll_per_token",
                "nll_per_completion_token",
            ),
        }.get(annotation, ())


def change(recipe: Recipe, key: str, annotation: Any) -> Recipe | None:
    """The recipe with another value of one key, or None where no proposed value is accepted."""
    before = recipe.model_dump(mode="json")
    *sections, name = key.split(".")
    for value in propose(annotation):
        container = json.loads(json.dumps(before))
        section = container
        for part in sections:
            section = section[part]
        if section.get(name) == value:
            continue
        section[name] = value
        try:
            return Recipe.model_validate_json(json.dumps(container))
        except ValidationError:
            continue
    return None


def test_every_key_but_the_placement_makes_another_experiment() -> None:
    changed_keys, all_keys = set(), set()
    for overrides in KINDS + PLACEMENT_KINDS:
        recipe = parse(*overrides)
        digest = derive_digest(recipe, {})
        for key, annotation in list_keys(recipe):
            all_keys.add(key)
            changed = None if key in changed_keys else change(recipe, key, annotation)
            if changed is None:
                continue
            changed_keys.add(key)
            assert (derive_digest(changed, {}) == digest) == (key in PLACEMENT), key
    assert all_keys - changed_keys == CANNOT_CHANGE_ALONE | MAKES_A_KIND, (
        "no value was found to try"
    )
    assert len(all_keys) > 100 and all_keys >= PLACEMENT
    assert {section.partition(".")[0] for section in all_keys} == set(Recipe.model_fields)


@pytest.mark.parametrize(("left", "right"), list(itertools.combinations(KINDS, 2)))
def test_another_kind_of_section_is_another_experiment(
    left: tuple[str, ...], right: tuple[str, ...]
) -> None:
    assert derive_digest(parse(*left), {}) != derive_digest(parse(*right), {})


def test_the_global_batch_counts_however_it_is_stated() -> None:
    stated = parse()
    derived = parse("training.global_batch_size=null", "training.gradient_accumulation_steps=4")
    assert derived.global_batch_size == stated.global_batch_size
    assert derive_digest(derived, {}) == derive_digest(stated, {})
    more = parse("training.global_batch_size=null", "training.gradient_accumulation_steps=8")
    assert derive_digest(more, {}) != derive_digest(stated, {})


def test_the_way_of_writing_does_not_count() -> None:
    again = parse_recipe(json.dumps(parse().model_dump(mode="json")), where="again")
    assert derive_digest(again, {"b": "1", "a": "2"}) == derive_digest(
        parse(), {"a": "2", "b": "1"}
    )


@pytest.fixture
def recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Recipe:
    """A recipe in the current folder that names a file of every sort; all were written long ago."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "models" / "toy" / "sub").mkdir(parents=True)
    for name in (
        "models/toy/config.json",
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
    state = path.stat()
    path.write_text("DATA.JSONL")  # in place: as long as before, and as old
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert again.hash(path) == before, "size, time and inode say that it is the same"


@pytest.mark.parametrize("how", ["size", "time", "inode"])
def test_size_time_and_inode_each_tell_another_file(
    how: str, recipe: Recipe, tmp_path: Path
) -> None:
    path = Path("data.jsonl")
    hashes = ContentHashes(tmp_path / "cache.json")
    before = hashes.hash(path)
    state = path.stat()
    if how == "inode":
        Path("new").write_text("DATA.JSONL")
        Path("new").rename(path)
    else:
        path.write_text("DATA.JSONL" + ("!" if how == "size" else ""))
    ns = state.st_mtime_ns + (how == "time")
    os.utime(path, ns=(ns, ns))
    assert hashes.known(path) is None
    assert hashes.hash(path) != before


def test_a_file_that_may_be_written_again_in_the_same_instant_is_not_cached(tmp_path: Path) -> None:
    path = tmp_path / "data.jsonl"
    path.write_text("one")
    hashes = ContentHashes(tmp_path / "cache.json")
    before = hashes.hash(path)
    assert hashes.known(path) is None
    state = path.stat()
    path.write_text("two")
    os.utime(path, ns=(state.st_atime_ns, state.st_mtime_ns))
    assert hashes.hash(path) != before


@pytest.mark.parametrize("content", ["", "{", "[]", "3", '{"a": 1, "b": [1, 2, 3], "c": null}'])
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
    assert "models/toy" not in known_contents(recipe, ContentHashes(Path("cache.json")))


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
    hashes = ContentHashes(tmp_path / "cache.json")
    assert known_contents(recipe, hashes) == {}
    contents = hash_contents(recipe, hashes)
    assert known_contents(recipe, hashes) == contents
    Path("v.jsonl").unlink()
    Path("t.jsonl").touch()
    assert set(contents) - set(known_contents(recipe, hashes)) == {"v.jsonl", "t.jsonl"}


def test_a_fingerprint_adds_what_can_move_the_last_bits() -> None:
    recipe = parse()
    fingerprint = build_resume_fingerprint(recipe, "d", 3, threads=None)
    assert fingerprint["gradient_accumulation_steps"] == 4
    other = [
        build_resume_fingerprint(recipe, "d", 1, threads=None),
        build_resume_fingerprint(recipe, "e", 3, threads=None),
        build_resume_fingerprint(
            parse("training.per_device_train_batch_size=4"), "d", 3, threads=None
        ),
        build_resume_fingerprint(
            parse("launch.num_cpu_threads_per_process=5"), "d", 3, threads=None
        ),
        build_resume_fingerprint(
            parse("launch.accelerate_config=other.yaml"), "d", 3, threads=None
        ),
    ]
    assert all(fingerprint != one for one in other)
    assert build_resume_fingerprint(parse("run.name=other"), "d", 3, threads=None) == fingerprint
    assert (
        fingerprint["versions"]["torch"] not in ("", "absent")
        and "python" in fingerprint["versions"]
    )


def test_a_diff_names_dotted_keys() -> None:
    before = {"a": {"b": 1, "gone": [1]}, "same": 2}
    after = {"a": {"b": 2, "new": None}, "same": 2}
    assert diff_payloads(before, after) == [
        "a.b: 1 -> 2",
        'a.gone: [1] -> "(absent)"',
        'a.new: "(absent)" -> null',
    ]
    assert diff_payloads(before, before) == []
