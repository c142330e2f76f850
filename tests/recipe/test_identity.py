"""Some keys make another experiment, others only decide where it runs."""

from __future__ import annotations

import itertools
import json
import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from pydantic import BaseModel, ValidationError

from runner.files import hash_json
from runner.recipe.identity import (
    _BEHAVIOUR_BEFORE,
    RULES,
    build_digest_payload,
    build_resume_fingerprint,
    derive_digest,
    diff_payloads,
    leave_out,
)
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.paths import RunPaths
from runner.run.record import load_stored_recipe
from tests.recipe.test_parse import TEXT

# Everything else is the experiment.
PLACEMENT = {
    "run.grid",
    "run.name",
    "run.axes",
    "run.overrides",
    "run.declared",
    "launch.accelerate_config",
    "launch.num_processes",
    "launch.num_machines",
    "launch.num_cpu_threads_per_process",
    "launch.retries.transient",
    "launch.retries.lost",
    "launch.retries.stalled",
    "launch.retries.out_of_memory",
    "launch.retries.backoff_seconds",
    "launch.on_version_change",
    "launch.stall_minutes",
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
    "tracking.hub_push",
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
    ("data.task.name=alpaca",),
    ("data.task.name=oasst1",),
    ("data.task.name=math_tools",),
    ("data.task.name=python", "data.task.function='rows.py:build'"),
    ("evaluation.generation={enabled: true, max_new_tokens: 8}",),
    (
        "evaluation.generation={enabled: true, max_new_tokens: 8}",
        "evaluation.metrics=[{name: short, function: 'scores.py:score', mode: max}]",
    ),
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
# The same experiment as the first kind, with other keys.
PLACEMENT_KINDS: list[tuple[str, ...]] = [
    ("checkpoints.remote={url: 'memory://checkpoints'}",),
    ("launch.num_processes=2",),
    ("tracking.hub_model_id=lab/model",),
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
    """Values that an annotation may admit, several of each type, so that one differs from the
    present value.
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
        yield {"name": "one", "function": "one.py:score", "mode": "min"}
        yield {"axis": "loss", "from": "one", "to": "two", "metric": "f1", "margin": None}
    else:
        yield from {
            bool: (True, False),
            int: (1, 2, 6),
            float: (0.25, 0.5),
            str: (
                "one",
                "2026-01-01",
                "one.py",
                "one.py:build",
                "{document} {sentence} {context} {question}",
                "nll_per_token",
                "nll_per_completion_token",
                "momentum=0.9",
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


MISSING = object()


def find(section: Any, name: str) -> Any:
    """The value of a dotted key, or MISSING."""
    for part in name.split("."):
        if not isinstance(section, dict) or part not in section:
            return MISSING
        section = section[part]
    return section


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


def test_a_key_that_was_added_enters_the_digest_only_with_another_value() -> None:
    """Otherwise earlier runs would be other experiments. The test above shows for every key that
    other values enter.
    """
    left_out, recipes = set(), [parse(*overrides) for overrides in KINDS]
    for recipe in recipes:
        dumped, payload = recipe.model_dump(mode="json"), build_digest_payload(recipe)
        for name, value in _BEHAVIOUR_BEFORE.items():
            if find(dumped, name) == value:
                assert find(payload, name) is MISSING, name
                left_out.add(name)
    assert left_out == set(_BEHAVIOUR_BEFORE), "a key's default is its earlier value"


def test_keys_are_left_out_where_they_have_the_value_of_before() -> None:
    before: dict[str, Any] = {"data.turns": "all", "model.kwargs": {}, "python": []}
    before["data.train.weight"] = None
    old: dict[str, Any] = {"model": {"path": "a"}, "loss": "full"}
    old["data"] = {"train": {"path": "b"}, "test": None}
    new: dict[str, Any] = {
        "model": {"path": "a", "kwargs": {}},
        "data": {"train": {"path": "b", "weight": None}, "test": None, "turns": "all"},
        "loss": "full",
        "python": [],
    }
    assert leave_out(new, before) == leave_out(old, before) == old
    for key, value in {
        "turns": "split",
        "train": [{"path": "b"}],
        "test": {"weight": None},
    }.items():
        other = {**new, "data": {**new["data"], key: value}}
        assert leave_out(other, before) == {**old, "data": {**old["data"], key: value}}
    assert leave_out({"turns": "all"}, before) == {"turns": "all"}, "the same name elsewhere"


def test_an_older_recipe_json_is_read_and_hashed_by_the_same_table(tmp_path: Path) -> None:
    """It lacks the keys that were added since, and `rules`."""
    recipe = parse()
    content = recipe.model_dump(mode="json")
    for name, value in _BEHAVIOUR_BEFORE.items():
        *sections, last = name.split(".")
        section = content
        for part in sections:
            section = section.get(part) or {}
        if section.get(last, MISSING) == value:
            del section[last]
    paths = RunPaths(tmp_path)
    digest = derive_digest(recipe, {"data.jsonl": "1"}, rules=1)
    stated = {"recipe": content, "recipe_digest": digest, "contents": {"data.jsonl": "1"}}
    paths.recipe_path.write_text(json.dumps(stated))
    stored = load_stored_recipe(paths)
    assert stored is not None and (stored.recipe, stored.rules) == (recipe, 1)
    assert stored.find_other_digest() == []
    assert stored.current_digest == derive_digest(recipe, {"data.jsonl": "1"}) != digest


def test_the_rules_of_rows_and_masks_are_part_of_the_digest_from_2_on() -> None:
    recipe, contents = parse(), {"data.jsonl": "1"}
    without = hash_json({"recipe": build_digest_payload(recipe), "contents": contents})
    assert derive_digest(recipe, contents, rules=1) == without
    digests = {derive_digest(recipe, contents, rules) for rules in (1, 2, 3)}
    assert len(digests) == 3 and derive_digest(recipe, contents) in digests
    assert derive_digest(recipe, contents, RULES) == derive_digest(recipe, contents)


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


def test_a_fingerprint_holds_the_batch_of_answers_where_it_is_stated() -> None:
    """Checkpoints that were written before there was the key do not have it."""

    def fingerprint(batch: str, divisor: int) -> dict[str, Any]:
        generation = f"{{enabled: true, max_new_tokens: 8, batch_size: {batch}}}"
        recipe = parse(
            f"evaluation.generation={generation}",
            "training.per_device_train_batch_size=2",
            "training.global_batch_size=4",
            "launch.num_processes=1",
        )
        return build_resume_fingerprint(recipe, "d", 1, divisor, threads=None)

    assert "generation_batch_size" not in fingerprint("null", 1)
    assert fingerprint("6", 1)["generation_batch_size"] == 6
    assert fingerprint("6", 2)["generation_batch_size"] == 3, "smaller where memory ran out"
    assert fingerprint("1", 2)["generation_batch_size"] == 1


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
