"""Run directories from untrusted sources: for any content, the verbs print clear errors and write
nothing elsewhere.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import RECIPE_TEXT
from tests.test_fuzz import Place, make_run, place

__all__ = ["place"]

VERBS = (
    ("status", "runs"),
    ("status", "case.yaml", "--json"),
    ("report", "runs"),
    ("report", "runs", "--format", "json"),
    ("report", "runs", "--format", "csv"),
    ("power", "runs", "--effect", "0.1"),
    ("why", "case.yaml"),
    ("sweep", "case.yaml", "--dry-run"),
    ("launch", "case.yaml", "--prepare"),
)
Damage = Callable[[Path], Any]
INTERRUPTED: Damage = lambda run: (run / "result.json").unlink()  # noqa: E731


def put(name: str, dotted: str, value: Any) -> Damage:
    """Another value in a record."""

    def damage(run: Path) -> None:
        content = json.loads((run / name).read_text())
        *parents, last = [int(part) if part.isdecimal() else part for part in dotted.split(".")]
        inside = content
        for part in parents:
            inside = inside[part]
        inside[last] = value
        (run / name).write_text(json.dumps(content))

    return damage


def write(name: str, content: str | bytes) -> Damage:
    def damage(run: Path) -> None:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content if isinstance(content, bytes) else content.encode())

    return damage


def replace_by_folder(name: str) -> Damage:
    def damage(run: Path) -> None:
        (run / name).unlink(missing_ok=True)
        (run / name).mkdir()

    return damage


def replace_by_link(name: str) -> Damage:
    """A link to a folder or file outside of the project."""

    def damage(run: Path) -> None:
        path = run / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
        path.symlink_to("/tmp" if "." not in name else "/etc/hostname")

    return damage


ESCAPES = "\x1b[2J\x1b]0;title\x07"
ATTEMPT = "attempts.0"
DAMAGE: dict[str, tuple[Damage, ...]] = {
    "nothing": (),
    "scores of nothing": (
        put("result.json", "tuned.test.num_completion_tokens", 0),
        put("result.json", "base.test.num_tokens", 0),
        put("result.json", "tuned.test.num_bytes", 0),
    ),
    "scores without end": (put("result.json", "tuned.test.nll_sum", float("nan")),),
    "scores beyond numbers": (
        put("result.json", "tuned.test.nll_sum", 1e308),
        put("result.json", "tuned.test.num_completion_tokens", 10**400),
    ),
    "no scores": (put("result.json", "tuned", {}), put("result.json", "base", {})),
    "metrics nobody knows": (
        put("result.json", "generation", {ESCAPES: {"metrics": {ESCAPES: 1.0}}}),
    ),
    "a metric of escapes": (put("result.json", "metric", ESCAPES),),
    "no date": (INTERRUPTED, put("run.json", f"{ATTEMPT}.ended_at_utc", "yesterday")),
    "a date without a zone": (
        INTERRUPTED,
        put("run.json", f"{ATTEMPT}.started_at_utc", "2026-01-01T00:00:00"),
    ),
    "an attempt below zero": (INTERRUPTED, put("run.json", f"{ATTEMPT}.number", -5)),
    "an attempt of another size": (INTERRUPTED, put("run.json", f"{ATTEMPT}.number", 10**30)),
    "no divisor": (INTERRUPTED, put("run.json", f"{ATTEMPT}.micro_batch_divisor", 0)),
    "no processes": (INTERRUPTED, put("run.json", f"{ATTEMPT}.num_processes", 0)),
    "a failure of escapes": (
        INTERRUPTED,
        put(
            "run.json",
            f"{ATTEMPT}.failure",
            {"kind": "crashed", "message": ESCAPES, "log_tail": [ESCAPES]},
        ),
    ),
    "progress of escapes": (INTERRUPTED, put("attempts/1/progress.json", "phase", ESCAPES)),
    "progress without end": (
        INTERRUPTED,
        put("attempts/1/progress.json", "loss", float("inf")),
        put("attempts/1/progress.json", "max_steps", 10**400),
    ),
    "metrics that are no rows": (INTERRUPTED, write("metrics.jsonl", "[1]\n5\n")),
    "scores that are no rows": (write("eval_rows.jsonl", "[1]\n5\n"),),
    "scores too deep": (write("eval_rows.jsonl", "[" * 100_000 + "\n"),),
    "samples that are a list": (write("samples.json", "[1]"),),
    "samples of escapes": (put("samples.json", "splits", {"test": {"ids_hash": ESCAPES}}),),
    "uploads of escapes": (
        INTERRUPTED,
        write(f"checkpoints/.uploads/step-{ESCAPES}.zip", ""),
        write(
            "attempts/1/uploads.jsonl", json.dumps({"outcome": "failed", "message": ESCAPES}) + "\n"
        ),
    ),
    "uploads that are no rows": (
        INTERRUPTED,
        write("checkpoints/.uploads/step-1.zip", ""),
        write("attempts/1/uploads.jsonl", "[1]\n"),
    ),
    "a marker that is a list": (INTERRUPTED, write("checkpoints/step-4/COMMITTED.json", "[[]]")),
    "a marker that leads out": (
        INTERRUPTED,
        write(
            "checkpoints/step-4/COMMITTED.json",
            '{"step": 4, "files": {"../../../../x": {"num_bytes": 1, "sha256": "x"}}}',
        ),
    ),
    "a step of other digits": (INTERRUPTED, write("checkpoints/step-\u0664/COMMITTED.json", "{}")),
    "a step without end": (
        INTERRUPTED,
        write(f"checkpoints/step-{'9' * 200}/COMMITTED.json", "{}"),
    ),
    "quarantine of escapes": (INTERRUPTED, write(f"quarantine/{ESCAPES}/x", "")),
    "a record that is a folder": (INTERRUPTED, replace_by_folder("run.json")),
    "a result that is a folder": (replace_by_folder("result.json"),),
    "a lease that is a folder": (INTERRUPTED, replace_by_folder("lease")),
    "a recipe that is no text": (write("recipe.json", b"\xff\xfe"),),
    "a recipe too deep": (write("recipe.json", "[" * 100_000),),
    "a key of escapes": (put("recipe.json", "contents", {ESCAPES: None}),),
    "a recipe of escapes": (put("recipe.json", "recipe.run.axes", {"a": ESCAPES}),),
    "axes that look like a table": (
        put("recipe.json", "recipe.run.axes", {"a|b": "x|y\nz", "=1+1": "=cmd()"}),
    ),
    "a stop request of noise": (INTERRUPTED, write("stop", "[" * 100_000)),
    "a link for a result": (replace_by_link("result.json"),),
    "a link for a log": (INTERRUPTED, replace_by_link("metrics.jsonl")),
    "a link for attempts": (INTERRUPTED, replace_by_link("attempts")),
    "a link for checkpoints": (INTERRUPTED, replace_by_link("checkpoints")),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_a_hostile_run_directory_is_answered_in_words(place: Place, name: str) -> None:
    run = make_run(place)
    place.write("case.yaml", RECIPE_TEXT)
    for damage in DAMAGE[name]:
        damage(run)
    for arguments in VERBS:
        place.run(*arguments)


@pytest.mark.parametrize(
    ("key", "value", "said"),
    [
        ("tuned.test.nll_sum", -1.0, "-1.0: a sum of negative log-likelihoods must be finite"),
        ("base.test.completion_nll_sum", float("nan"), "nan: a sum of negative log-likelihoods"),
        ("tuned.test.num_completion_tokens", 10**6, "1000000, more than the"),
        ("tuned.test.num_rows", 0, "greater than or equal to 1"),
        ("best_metric", float("inf"), "inf: a score must be a finite number"),
        ("best_step", 10**6, "best_step is 1000000, after the last of"),
        ("num_trained_tokens", -5, "greater than or equal to 0"),
        ("initial_weights_hash", "x", "String should match pattern"),
    ],
)
def test_a_score_that_cannot_be_is_named_with_its_file_and_key(
    place: Place, key: str, value: Any, said: str
) -> None:
    run = make_run(place)
    place.write("case.yaml", RECIPE_TEXT)
    put("result.json", key, value)(run)
    for arguments in (("status", "runs"), ("why", "case.yaml")):
        printed = place.run(*arguments)
        assert "result.json cannot be read: " in printed and said in printed
    assert "1 unreadable" in place.run("report", "runs")


def test_a_run_directory_that_is_a_link_is_not_written_to(place: Place) -> None:
    run, outside = make_run(place), place.root.parent / "outside" / "theirs"
    place.write("case.yaml", RECIPE_TEXT)
    shutil.rmtree(run)
    outside.mkdir()
    run.symlink_to(outside)
    for arguments in VERBS:
        printed = place.run(*arguments)
    assert "is a link to" in printed and list(outside.iterdir()) == []
    outside.rmdir()


@pytest.mark.parametrize("part", ["attempts", "checkpoints", "metrics.jsonl"])
def test_a_part_of_a_run_that_is_a_link_is_not_written_through(place: Place, part: str) -> None:
    run = make_run(place)
    place.write("case.yaml", RECIPE_TEXT)
    INTERRUPTED(run)
    replace_by_link(part)(run)
    assert f"{part} is a link to" in place.run("launch", "case.yaml", "--prepare")
