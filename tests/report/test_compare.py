"""The certificate of two arms: equal, different and not recorded are three things."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from runner.report.compare import Certificate, CertificateLine, build_certificate
from runner.report.difference import compare_cells_of, compare_runs
from runner.report.rows import ReportRow
from tests.support.reports import Run, make_recipe, pending, rows_of
from tests.support.scored_runs import make_attempt, scored, scored_grid


def make_splits(name: str) -> dict[str, dict[str, Any]]:
    """Splits whose training rows are called `name`."""
    return {"train": {"ids_hash": name, "input_ids_hash": f"{name} ids", "mask_hash": f"{name} m"}}


def pair(root: Path, first: dict[str, Any], second: dict[str, Any], *keys: str) -> list[ReportRow]:
    """Two runs that differ in an axis `x`, in recipe keys, and in recorded facts."""
    runs = []
    for at, recorded in enumerate((first, second)):
        overrides = [key.replace("?", "12"[at]) for key in keys]
        recipe = make_recipe(f"r{at}", {"x": at + 1, "seed": 1}, *overrides)
        runs.append(scored(root, recipe, 1.0 + at / 10, **recorded))
    return rows_of(runs)


def find(certificate: Certificate, what: str) -> CertificateLine:
    [line] = [line for line in certificate.lines if line.what == what]
    return line


def test_equal_different_and_not_recorded_are_three_things(tmp_path: Path) -> None:
    a, b = pair(
        tmp_path,
        {"splits": make_splits("a"), "attempt": make_attempt(versions={"torch": "2.1"})},
        {"splits": make_splits("a"), "attempt": make_attempt(versions={"torch": "2.2"})},
        "training.learning_rate=0.00?",
    )
    certificate = build_certificate([a], [b])
    assert find(certificate, "training.learning_rate").describe() == (
        "training.learning_rate: 0.001 -> 0.002"
    )
    assert find(certificate, "torch").describe() == "torch: 2.1 -> 2.2"
    assert find(certificate, "train rows").status == "equal"
    assert find(certificate, "test rows").status == "equal"
    for what in ("initial trained weights", "order of the rows", "source of the runner"):
        assert find(certificate, what).status == "not recorded"
    assert {line.what for line in certificate.unexplained} == {"training.learning_rate", "torch"}


def test_one_side_that_did_not_record_is_not_equal(tmp_path: Path) -> None:
    a, b = pair(tmp_path, {"splits": make_splits("a")}, {})
    assert find(build_certificate([a], [b]), "train rows").status == "not recorded"


@pytest.mark.parametrize(
    ("axis", "key", "values"),
    [
        ("loss", "loss", ("full", "completion")),
        ("learning_rate", "training.learning_rate", (0.001, 0.002)),
        ("samples", "data.num_train_samples", (60, 180)),
        ("how_many", "data.num_train_samples", (60, 180)),
        ("base", "model.path", ("gemma", "llama")),
        ("model", "model.dtype", ("float32", "bfloat16")),
    ],
)
def test_an_axis_explains_the_keys_that_carry_its_name_or_values(
    tmp_path: Path, axis: str, key: str, values: tuple[Any, Any]
) -> None:
    runs = []
    for value in values:
        stated = f"demo_models/{value}" if key == "model.path" else value
        recipe = make_recipe(f"r_{value}", {axis: value, "seed": 1}, f"{key}={stated}")
        runs.append(scored(tmp_path, recipe, 1.0, splits=make_splits(str(value))))
    a, b = rows_of(runs)
    certificate = build_certificate([a], [b], axis)
    assert find(certificate, key).explained_by == f"the axis {axis}"
    is_of_rows = key.startswith("data.")
    line = find(certificate, "train rows")
    assert line.status == "differs" and (line.explained_by is not None) == is_of_rows


@pytest.mark.parametrize(
    ("dtype", "base", "other", "status", "told"),
    [
        ("float32", 3.0, 3.0, "equal", "scores of the base model: 3"),
        (
            "float32",
            3.0,
            3.00001,
            "close",
            "scores of the base model: 3 and 3.00001, equal within 0.01%",
        ),
        (
            "bfloat16",
            4.7372,
            4.7604,
            "close",
            "scores of the base model: 4.7372 and 4.7604, equal within 0.5%",
        ),
        ("float32", 3.0, 3.01, "differs", "scores of the base model: 3 -> 3.01"),
    ],
)
def test_base_scores_that_are_close_are_not_called_equal(
    tmp_path: Path, dtype: str, base: float, other: float, status: str, told: str
) -> None:
    keys = ("training.learning_rate=0.00?", f"model.dtype={dtype}")
    a, b = pair(tmp_path, {"base": base}, {"base": other}, *keys)
    certificate = build_certificate([a], [b], "x")
    line = find(certificate, "scores of the base model")
    assert (line.status, line.explained_by, line.describe()) == (status, None, told)
    assert (line in certificate.unexplained) == (status == "differs")


def test_updates_are_not_explained_by_a_number_of_rows(tmp_path: Path) -> None:
    runs = [
        scored(
            tmp_path,
            make_recipe(f"r{n}", {"samples": n, "seed": 1}, f"data.num_train_samples={n}"),
            1.0,
            num_steps=steps,
            splits=make_splits(str(n)),
        )
        for n, steps in ((60, 32), (180, 92))
    ]
    a, b = rows_of(runs)
    certificate = build_certificate([a], [b], "samples")
    assert [line.describe() for line in certificate.unexplained] == ["updates: 32 -> 92"]


# A key of the recipe that an axis changes, its two values, and the facts that follow from it
_ORDERS = {"order of the rows", "trained tokens"}
_TRAIN = {"train rows", "input_ids of the train rows", "label masks of the train rows"}
_HELD_OUT = {
    f"{what}{split} rows"
    for split in ("validation", "test")
    for what in ("", "input_ids of the ", "label masks of the ")
} | {"scored tokens of the test rows", "bytes of the test rows", "scores of the base model"}
_ALL_BUT_DRAWN = {
    what for what in _TRAIN | _HELD_OUT if not what.startswith(("train", "val", "te"))
}
CAUSES: dict[str, tuple[tuple[Any, Any], set[str]]] = {
    "training.learning_rate": ((0.001, 0.002), set()),
    "training.weight_decay": ((0.0, 0.1), set()),
    "training.seed": ((1, 2), {*_ORDERS, "initial trained weights"}),
    "training.global_batch_size": ((8, 16), {*_ORDERS, "updates", "length of the schedule"}),
    "training.num_train_epochs": ((1.0, 2.0), {*_ORDERS, "updates", "length of the schedule"}),
    "training.train_sampling_strategy": (("random", "group_by_length"), _ORDERS),
    "data.num_train_samples": ((60, 180), _ORDERS | _TRAIN),
    "data.seed": ((1, 2), _ORDERS | _TRAIN),
    "data.num_test_samples": ((32, 64), _ORDERS | _TRAIN | _HELD_OUT),
    "data.max_length": ((128, 256), _ORDERS | _ALL_BUT_DRAWN),
    "model.dtype": (
        ("float32", "bfloat16"),
        {"scores of the base model", "initial trained weights"},
    ),
    "loss": (
        ("full", "completion"),
        {f"label masks of the {split} rows" for split in ("train", "validation", "test")}
        | {"trained tokens"},
    ),
}


@pytest.mark.parametrize("key", CAUSES)
def test_an_axis_explains_only_what_follows_from_its_key(tmp_path: Path, key: str) -> None:
    """Everything that can differ does: only what the key changes is explained by it."""
    values, expected = CAUSES[key]
    runs = []
    for at, value in enumerate(values):
        recipe = make_recipe(f"r{at}", {"x_axis": value, "loss": "full"}, f"{key}={value}")
        splits = {
            split: {
                name: f"{split} {name} {at}" for name in ("ids_hash", "input_ids_hash", "mask_hash")
            }
            | {"num_completion_tokens": at, "num_bytes": at}
            for split in ("train", "validation", "test")
        }
        runs.append(scored(tmp_path, recipe, 1.0, base=3.0 + at, splits=splits, num_steps=24 + at))
    a, b = (
        replace(
            row,
            initial_weights_hash=str(at) * 64,
            row_order_hash=str(at) * 64,
            num_trained_tokens=at,
            schedule_steps=at,
        )
        for at, row in enumerate(rows_of(runs))
    )
    certificate = build_certificate([a], [b], "x_axis")
    facts = [line for line in certificate.select("differs") if line.section != "recipe"]
    assert {line.what for line in facts} == _TRAIN | _HELD_OUT | _ORDERS | {
        *("updates", "length of the schedule", "initial trained weights")
    }
    assert {line.what for line in facts if line.explained_by is not None} == expected


def test_machines_and_what_made_the_runs_are_compared(tmp_path: Path) -> None:
    first = {
        "hardware": {"cpu": "Xeon", "gpu": "2 x A100", "name": "secret-name"},
        "runner_version": "0.1.0",
        "runner_commit": "a" * 40,
        "runner_is_dirty": False,
        "source_hash": "3" * 64,
    }
    second = first | {
        "hardware": {"cpu": "Xeon", "gpu": "H100"},
        "num_processes": 8,
        "runner_commit": "b" * 40,
        "runner_is_dirty": True,
    }
    a, b = pair(
        tmp_path,
        {"attempt": make_attempt(**first)},
        {"attempt": make_attempt(**second, micro_batch_divisor=4)},
        "loss=full",
    )
    certificate = build_certificate([a], [b], "x")
    assert find(certificate, "CPU").describe() == "CPU: Xeon"
    assert [line.describe() for line in certificate.unexplained] == [
        "GPU: 2 x A100 -> H100",
        "number of processes: 1 -> 8",
        "divisor of micro-batches: 1 -> 4",
    ]
    # Files that are equal by hash are equal, whatever was committed
    for what in ("commit of the runner", "uncommitted changes"):
        line = find(certificate, what)
        assert line.explained_by == "the runner's source is the same"
    other = replace(b, source_hash="4" * 64)
    unexplained = {line.what for line in build_certificate([a], [other], "x").unexplained}
    assert {"source of the runner", "commit of the runner", "uncommitted changes"} < unexplained
    assert "secret-name" not in repr((a.hardware, certificate))


def test_a_fact_is_explained_in_each_pair_or_not_at_all(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"loss": ["full", "completion"]},
        lambda loss: 1.0,
        row_order_hash=lambda loss, seed: f"{seed + 3 * (loss == 'full')}" * 64,
        overrides=lambda loss, seed: [f"training.seed={5 + (loss == 'full')}"] if seed == 1 else [],
    )
    rows = rows_of(runs)
    arms = [[row for row in rows if row.axes["loss"] == loss] for loss in ("full", "completion")]
    certificate = build_certificate(*arms, "loss")
    assert find(certificate, "training.seed").explained_by == "the seeds"
    assert find(certificate, "training.seed").num_pairs == 1
    # Two pairs of one seed saw the rows in different orders, which no seed explains
    assert [line.what for line in certificate.unexplained] == ["order of the rows"]


def test_what_newer_runs_record_is_compared_by_hash(tmp_path: Path) -> None:
    a, b = pair(tmp_path, {}, {}, "loss=full")
    recorded = {
        "commits": {"model.path": "c" * 40},
        "initial_weights_hash": "1" * 64,
        "row_order_hash": "2" * 64,
        "num_updates": 46,
        "num_trained_tokens": 900,
        "schedule_steps": 46,
        "source_hash": "3" * 64,
        "runner_version": "0.1.0",
    }
    a, b = replace(a, **recorded), replace(b, **recorded)
    certificate = build_certificate([a], [b], "x")
    unrecorded = {line.what for line in certificate.select("not recorded")}
    assert unrecorded == {
        f"{what}{split} rows"
        for split in ("train", "validation")
        for what in ("", "input_ids of the ", "label masks of the ")
    } | {"label masks of the test rows", "bytes of the test rows"} | {
        "scored tokens of the test rows",
        *("commit of the runner", "uncommitted changes"),
        *("CPU", "GPU", "number of processes", "divisor of micro-batches"),
    }
    assert find(certificate, "commit of model.path").value_a == "c" * 12
    for field, what in (
        ("commits", "commit of model.path"),
        ("initial_weights_hash", "initial trained weights"),
        ("row_order_hash", "order of the rows"),
        ("schedule_steps", "length of the schedule"),
        ("num_trained_tokens", "trained tokens"),
        ("source_hash", "source of the runner"),
    ):
        other: Any = {"model.path": "d" * 40} if field == "commits" else "9" * 64
        changed = build_certificate([a], [replace(b, **{field: other})], "x")
        assert [line.what for line in changed.unexplained] == [what]
    stopped = replace(b, num_updates=20, stop_reason="early_stopping")
    [line] = [one for one in build_certificate([a], [stopped], "x").select("differs")]
    assert (line.what, line.explained_by) == ("updates", "early stopping")


def test_a_confounder_in_one_pair_of_many_is_not_explained(tmp_path: Path) -> None:
    runs = scored_grid(
        tmp_path,
        {"loss": ["full", "completion"], "num_train_samples": [60, 180]},
        lambda loss, num_train_samples: 1.0,
        overrides=lambda loss, num_train_samples, seed: (
            ["training.learning_rate=0.5"] if (loss, num_train_samples) == ("full", 60) else []
        ),
    )
    rows = rows_of(runs)
    arms = [[row for row in rows if row.axes["loss"] == loss] for loss in ("full", "completion")]
    certificate = build_certificate(*arms, "loss")
    assert len(certificate.pairs) == 6 and not certificate.unpaired
    [line] = certificate.unexplained
    assert (line.what, line.num_pairs) == ("training.learning_rate", 3)
    assert find(certificate, "loss").num_pairs == 6


def test_seeds_of_their_own_are_explained_by_the_seeds(tmp_path: Path) -> None:
    rows = rows_of(
        scored_grid(
            tmp_path,
            {"loss": ["full", "completion"]},
            lambda loss: 1.0,
            own_seeds=True,
        )
    )
    arms = [[row for row in rows if row.axes["loss"] == loss] for loss in ("full", "completion")]
    certificate = build_certificate(*arms, "loss")
    assert find(certificate, "training.seed").explained_by == "the seeds"
    assert not certificate.unexplained
    single = build_certificate(arms[0][:1], arms[1][:1], "loss")
    assert [line.what for line in single.unexplained] == ["training.seed"]


def test_a_run_without_a_partner_is_named(tmp_path: Path) -> None:
    rows = rows_of(
        scored_grid(
            tmp_path,
            {"loss": ["full", "completion"]},
            lambda loss: 1.0,
            left_out=[{"loss": "full", "seed": 2}],
        )
    )
    arms = [[row for row in rows if row.axes["loss"] == loss] for loss in ("full", "completion")]
    assert build_certificate(*arms).unpaired == ("demo/completion_s2",)


def test_runs_that_never_ran_have_a_certificate_of_their_recipes(tmp_path: Path) -> None:
    runs: list[Run] = [
        pending(tmp_path, make_recipe("a", {"x": 1})),
        pending(tmp_path, make_recipe("b", {"x": 2}, "loss=completion")),
    ]
    a, b = rows_of(runs)
    certificate = build_certificate([a], [b])
    assert [line.what for line in certificate.select("differs")] == ["loss"]
    assert "test rows" in {line.what for line in certificate.select("not recorded")}
    assert compare_runs(a, b) == []


def test_two_runs_differ_over_rows_only_and_their_cells_over_seeds(tmp_path: Path) -> None:
    rows = rows_of(
        scored_grid(
            tmp_path / "two",
            {"loss": ["full", "completion"]},
            lambda loss: 1.2 if loss == "full" else 1.0,
        )
    )
    a = next(row for row in rows if row.axes == {"loss": "full", "seed": 1})
    b = next(row for row in rows if row.axes == {"loss": "completion", "seed": 1})
    single = {one.metric.name: one for one in compare_runs(a, b)}
    over_seeds = {one.metric.name: one for one in compare_cells_of(a, b, rows)}
    nll = single["nll_per_completion_token"]
    assert nll.interval is not None and nll.interval.kind == "rows"
    assert nll.interval.estimate == pytest.approx(-0.2, abs=0.05)
    both = over_seeds["nll_per_completion_token"].interval
    assert both is not None and both.kind == "seeds and rows" and both.num_seeds == (3, 3)
    assert compare_cells_of(a, b, [a, b]) == []


def test_yes_or_no_answers_of_two_runs_are_compared_by_mcnemar(tmp_path: Path) -> None:
    runs = []
    for at, loss in enumerate(("full", "completion")):
        recipe = make_recipe(
            loss,
            {"loss": loss, "seed": 1},
            f"loss={loss}",
            "data.task={name: sst2, prompt: '{sentence}'}",
        )
        scores = {"accuracy": [float(n < 20 + 6 * at) for n in range(40)]}
        runs.append(scored(tmp_path, recipe, 3.0 + at, scores=scores))
    a, b = rows_of(runs)
    [accuracy] = [one for one in compare_runs(a, b) if one.metric.name == "accuracy"]
    assert accuracy.interval is not None
    assert accuracy.interval.p == pytest.approx(2 * 0.5**6)  # 6 gained, none lost
    assert "McNemar" in accuracy.interval.note


def test_what_cannot_be_subtracted_is_refused(tmp_path: Path) -> None:
    runs = [
        scored(tmp_path, make_recipe(f"r{n}", {"x": n, "seed": 1}), 1.0, tokens=n) for n in (10, 12)
    ]
    a, b = rows_of(runs)
    found = {one.metric.name: one for one in compare_runs(a, b)}
    assert found["nll_per_completion_token"].interval is None
    assert "480 scored tokens" in found["nll_per_completion_token"].refused
    assert found["bits_per_byte"].interval is not None


def test_a_library_that_is_missing_reads_plainly() -> None:
    line = CertificateLine("software", "cuda", "differs", "absent", "12.8", 1)
    assert line.describe() == "CUDA: none -> 12.8"
    line = CertificateLine("software", "trl", "equal", "absent", "absent", 1)
    assert line.describe() == "trl: not installed" and line.value_a == "absent"
