"""The base model is scored by one run, and other runs read its scores; a problem costs the
computation, never a run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator
from accelerate.utils import TorchDynamoPlugin
from transformers import AutoModelForCausalLM

from runner.cli.main import main
from runner.data.draw import LeftOut
from runner.data.rows import Row, Samples, Split
from runner.data.tasks.base import Judgement
from runner.data.tokenizer import load_tokenizer
from runner.files import hash_file, load_json, write_json_atomic
from runner.run.base_scores import find_other_base_scores
from runner.run.entries import (
    find_not_shared,
    hold_entry,
    list_quarantined,
    note_not_shared,
)
from runner.run.lease import Lease
from runner.run.record import AskedBase, BaseSource, load_base_source, load_progress
from runner.sft.base import (
    EXACT,
    OF_BATCHES,
    OF_SUMS,
    BaseScores,
    find_difference,
    obtain_base_scores,
)
from runner.sft.context import RunContext
from runner.sft.evaluate import RowScore
from runner.sft.generation import Answer
from tests.conftest import Project
from tests.support.contexts import open_context
from tests.support.token_rows import make_row

ROWS = tuple(make_row(f"row-{number}", range(3, 9 + number), (2, 5)) for number in range(6))
ANSWERING = (
    "evaluation.generation={enabled: true, max_new_tokens: 8, num_samples: 1,"
    " during_training: true}"
)
SAMPLES = Samples(Split((), ()), Split(ROWS[:2], ()), Split(ROWS, ()), LeftOut())


def make_score(row_id: str, nll_sum: float) -> RowScore:
    return RowScore(row_id, row_id, nll_sum / 3, nll_sum / 9, 3, nll_sum, 8, 5)


def make_scores(nats: float = 0.1) -> BaseScores:
    """With sums that no short decimal names, and an answer of every kind of text."""
    answer = Answer(
        "row-0",
        'é\u2028"',
        ("a", ""),
        False,
        Judgement({"f1": 1 / 3, "exact": 1.0}, False),
        {"length": None, "share": 2 / 7},
    )
    test = [make_score(row.row_id, nats + 1 / (3 + at)) for at, row in enumerate(ROWS)]
    return BaseScores(test, [answer], [make_score(f"row-{at}", nats) for at in range(2)], [answer])


def score_again(scores: BaseScores) -> list[RowScore]:
    """Score two rows alone, which changes the last bits."""
    return [replace(one, nll_sum=one.nll_sum + 1e-9) for one in scores.test[4:]]


class FullDisk(BaseScores):
    def write(self, folder: Path) -> None:
        super().write(folder)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@dataclass
class Place:
    """A project in which runs of one model need base scores, each in its own context."""

    project: Project
    trainer: Any
    computed: list[str] = field(default_factory=list)  # names of runs

    @property
    def root(self) -> Path:
        return self.project.root / "runs" / ".base"

    @property
    def entries(self) -> list[Path]:
        return [path for path in self.root.glob("[!.]*") if path.is_dir()]

    def open(self, name: str, base: AskedBase = "shared") -> RunContext:
        context = open_context(self.project, f"run.name={name}", ANSWERING)
        paths = self.project.paths(name)
        paths.attempt(1).attempt_dir.mkdir(parents=True, exist_ok=True)
        contents = {"models/gemma": "weights"}
        return replace(context, paths=paths, attempt=paths.attempt(1), base=base, contents=contents)

    def obtain(
        self,
        name: str,
        scores: BaseScores | None = None,
        base: AskedBase = "shared",
        wait_seconds: float | None = None,
    ) -> BaseScores:
        """The scores that a run gets if it would compute `scores` itself."""
        scores = scores or make_scores()

        def compute() -> BaseScores:
            self.computed.append(name)
            return scores

        return obtain_base_scores(
            self.open(name, base),
            SAMPLES,
            self.trainer,
            compute=compute,
            score_again=lambda: score_again(scores),
            wait_seconds=wait_seconds,
        )

    def source(self, name: str) -> BaseSource:
        source = load_base_source(self.project.paths(name).attempt(1))
        assert source is not None
        return source


@pytest.fixture
def place(project: Project, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.chdir(project.root)
    project.add_model()
    recipe = project.recipe()
    trainer = SimpleNamespace(
        model=AutoModelForCausalLM.from_pretrained(recipe.model.path),
        processing_class=load_tokenizer(recipe.model),
        args=SimpleNamespace(per_device_eval_batch_size=8),
        accelerator=Accelerator(cpu=True),
    )
    return Place(project, trainer)


def test_the_second_run_takes_what_the_first_has_computed(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    first, second = place.obtain("a"), place.obtain("b")
    assert first == make_scores() == replace(second, again=[]) and place.computed == ["a"]
    assert place.source("a").is_kept and place.source("a").source == "own"
    source = place.source("b")
    assert source.source == "shared" and source.key == place.entries[0].name
    assert source.producer is not None and source.producer.run == "tests/a"
    assert "scores of the base model: computed by tests/a, attempt 1" in capsys.readouterr().out
    manifest = load_json(place.entries[0] / "manifest.json")
    assert manifest["producer"]["run"] == "tests/a" and manifest["producer"]["attempt"] == 1
    assert manifest["parts"]["as_run"]["base"] == "weights"


def test_own_neither_reads_nor_writes(place: Place) -> None:
    place.obtain("a", base="own")
    assert not place.root.exists() and place.source("a").why == "`--own-base` was given"
    place.obtain("b")
    place.obtain("c", base="own")
    assert place.computed == ["a", "b", "c"]


def test_what_accelerate_compiles_is_scored_by_each(place: Place) -> None:
    place.trainer.accelerator = SimpleNamespace(
        distributed_type=place.trainer.accelerator.distributed_type,
        state=SimpleNamespace(dynamo_plugin=TorchDynamoPlugin(backend="inductor")),
    )
    place.obtain("a")
    assert "`dynamo_config`" in str(place.source("a").why) and not place.root.exists()


def test_values_of_variables_stand_in_no_entry(
    place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TORCH_HUB_TOKEN", "hidden-value")
    for name in ("ROCBLAS_LAYER", "HIPBLASLT_X", "FLASH_ATTENTION_X", "BNB_CUDA_VERSION"):
        monkeypatch.setenv(name, "hidden-value")
    for name in ("USE_HUB_KERNELS", "LD_PRELOAD"):
        monkeypatch.setenv(name, "")
    place.obtain("a")
    text = (place.entries[0] / "manifest.json").read_text()
    variables = json.loads(text)["parts"]["as_run"]["variables"]
    assert "hidden-value" not in text and "TORCH_HUB_TOKEN" not in variables
    assert {"ROCBLAS_LAYER", "HIPBLASLT_X", "FLASH_ATTENTION_X", "BNB_CUDA_VERSION"} <= {*variables}
    assert {"USE_HUB_KERNELS", "LD_PRELOAD"} <= {*variables}
    monkeypatch.setenv("ROCBLAS_LAYER", "other")
    place.obtain("b")
    assert place.computed == ["a", "b"]


def test_another_part_is_another_entry(place: Place) -> None:
    place.obtain("a")
    place.trainer.args.per_device_eval_batch_size = 4
    place.obtain("b")
    place.trainer.model.resize_token_embeddings(900)
    place.obtain("c")
    place.trainer.processing_class.pad_token = place.trainer.processing_class.unk_token
    place.obtain("d")
    assert place.computed == ["a", "b", "c", "d"] and len(place.entries) == 4


def test_a_model_whose_content_nobody_knows_is_scored_by_each(place: Place) -> None:
    context = replace(place.open("a"), contents={})
    scores = make_scores()
    obtain_base_scores(
        context, SAMPLES, place.trainer, compute=lambda: scores, score_again=lambda: []
    )
    assert "`model.path`" in str(place.source("a").why) and place.entries == []


def test_scores_that_are_not_what_is_computed_go_into_quarantine_and_are_named(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.obtain("a")
    differing = make_scores()
    last = differing.test[5]
    differing.test[5] = replace(last, nll_sum=last.nll_sum + 1e-12)
    assert place.obtain("b", differing) == differing and place.computed == ["a", "b"]
    assert place.entries == [], "it is not replaced by the one that differs"
    source = place.source("b")
    assert source.source == "own" and not source.is_kept and source.producer is not None
    assert "test row row-5: nll_sum" in str(source.why) and "tests/a, attempt 1" in str(source.why)
    [found] = find_other_base_scores(place.root.parent)
    assert found.runs == {"tests/a", "tests/b"} and "row-5" in found.why
    capsys.readouterr()
    for verb in ("status", "report"):
        assert main([verb, "recipe.yaml"]) == 0  # its run is another one: `base`
        said = "".join(capsys.readouterr())
        is_named = "tests/a, attempt 1" in said and "tests/b, attempt 1" in said
        assert is_named == (verb == "status"), "a report covers its own runs"
    place.obtain("c")
    place.obtain("d")
    assert place.computed == ["a", "b", "c"]


def test_the_report_of_either_run_names_both(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.obtain("a")
    place.obtain("b", make_scores(0.2))
    for name in ("a", "b"):
        recipe = place.project.write_recipe(f"recipes/{name}.yaml")
        capsys.readouterr()
        for form in ("md", "json"):
            assert main(["report", str(recipe), "--format", form]) == 0
            said = capsys.readouterr().out
            assert "kept by tests/a, attempt 1 differ" in said and "tests/b, attempt 1" in said


def sign_again(entry: Path) -> None:
    manifest = load_json(entry / "manifest.json")
    manifest["files"]["scores.json"] = hash_file(entry / "scores.json")
    write_json_atomic(entry / "manifest.json", manifest)


def write_other_shape(entry: Path) -> None:
    """Files that are what the manifest says, and yet no scores."""
    (entry / "scores.json").write_text(json.dumps({"test": 3}))
    sign_again(entry)


def drop_a_row(entry: Path) -> None:
    scores = load_json(entry / "scores.json")
    (entry / "scores.json").write_text(json.dumps({**scores, "test": scores["test"][1:]}))
    sign_again(entry)


DAMAGES: dict[str, Callable[[Path], object]] = {
    "cut": lambda entry: (entry / "scores.json").write_text("{"),
    "gone": lambda entry: (entry / "answers.json").unlink(),
    "no manifest any more": lambda entry: (entry / "manifest.json").write_text("[]"),
    "other shape": write_other_shape,
    "other rows": drop_a_row,
    "nobody wrote it": lambda entry: write_json_atomic(
        entry / "manifest.json", {**load_json(entry / "manifest.json"), "producer": {}}
    ),
}


class Vanishing(tuple[Row, ...]):
    """Rows of which the third look comes after another process has moved the entry aside."""

    entry: Path
    looks = 0

    def __iter__(self) -> Iterator[Row]:
        self.looks += 1
        if self.looks == 3:
            shutil.rmtree(self.entry)
        return super().__iter__()


def test_a_damaged_entry_that_another_process_moves_first_is_told_as_such(
    place: Place, capsys: pytest.CaptureFixture[str]
) -> None:
    place.obtain("a")
    drop_a_row(place.entries[0])
    rows = Vanishing(ROWS)
    rows.entry = place.entries[0]
    obtain_base_scores(
        place.open("b"),
        replace(SAMPLES, test=Split(rows, ())),
        place.trainer,
        compute=make_scores,
        score_again=lambda: score_again(make_scores()),
    )
    said = capsys.readouterr().out
    assert "other test rows: another process has moved it aside" in said and "None" not in said


def _change(split: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """Damage to the second row of a file, signed as if it had been written like that."""

    def damage(entry: Path) -> None:
        name = "answers" if split.startswith("answers") else "scores"
        content = load_json(entry / f"{name}.json")
        change(content[split.rpartition(".")[2]][-1])
        (entry / f"{name}.json").write_text(json.dumps(content))
        manifest = load_json(entry / "manifest.json")
        manifest["files"][f"{name}.json"] = hash_file(entry / f"{name}.json")
        write_json_atomic(entry / "manifest.json", manifest)

    return damage


DAMAGES |= {
    "a sum is a text": _change("test", lambda row: row.update(nll_sum="1.0")),
    "a sum is no number": _change("test", lambda row: row.update(nll_sum=float("nan"))),
    "a sum is endless": _change("validation", lambda row: row.update(nll_sum=float("inf"))),
    "a sum is below 0": _change("validation", lambda row: row.update(nll_sum=-1.0)),
    "a part is more than the whole": _change("again", lambda row: row.update(num_tokens=0)),
    "a count is a fraction": _change("validation", lambda row: row.update(num_tokens=1.5)),
    "a count is a claim": _change("again", lambda row: row.update(num_bytes=True)),
    "a group is a number": _change("test", lambda row: row.update(group=3)),
    "an answer is no text": _change("answers.test", lambda row: row.update(prediction=3)),
    "a reference is no text": _change("answers.test", lambda row: row.update(references=[3])),
    "references are a text": _change("answers.test", lambda row: row.update(references="ab")),
    "finished is a number": _change("answers.test", lambda row: row.update(is_finished=1)),
    "readable is a text": _change("answers.test", lambda row: row.update(is_readable="no")),
    "a judgement is a text": _change("answers.test", lambda row: row.update(scores={"f1": "1"})),
    "judgements are a list": _change("answers.test", lambda row: row.update(scores=[1])),
    "an own score is endless": _change(
        "answers.validation", lambda row: row.update(own_scores={"length": float("inf")})
    ),
    "an answer to another row": _change("answers.test", lambda row: row.update(row_id="row-1")),
    "an answer of validation": _change("answers.validation", lambda row: row.update(row_id="x")),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_entry_is_put_aside_and_made_anew(place: Place, damage: str) -> None:
    place.obtain("a")
    DAMAGES[damage](place.entries[0])
    for name in ("b", "c"):
        assert replace(place.obtain(name), again=[]) == make_scores()
    assert place.computed == ["a", "b"] and place.source("b").is_kept
    [aside] = list_quarantined(place.root)
    assert aside.found_by["run"] == "tests/b" and aside.why
    # No run used the damaged entry: only the log says so, without a warning next to the runs.
    is_damaged = damage in ("cut", "gone", "no manifest any more")
    assert aside.is_damaged == is_damaged
    assert len(find_other_base_scores(place.root.parent)) == (0 if is_damaged else 1)


def test_a_full_disk_costs_the_entry_only(place: Place) -> None:
    full = FullDisk(**vars(make_scores()))
    assert place.obtain("a", full) == full
    assert "No space left" in str(place.source("a").why)
    assert [path.name for path in place.root.iterdir() if path.is_dir()] == []
    place.obtain("b")
    assert place.source("b").is_kept


def test_a_place_where_nothing_can_be_written_costs_the_entry_only(place: Place) -> None:
    place.root.parent.mkdir(exist_ok=True)
    place.root.write_text("a file")
    assert place.obtain("a") == make_scores()
    assert "cannot be read or locked" in str(place.source("a").why)


def test_a_run_waits_for_the_one_that_computes(place: Place) -> None:
    """It waits in a phase that is known to be silent, and then uses the scores."""
    place.obtain("a")
    entry = place.entries[0]
    hidden = entry.rename(entry.with_name(".hidden"))
    progress_path = place.project.paths("b").attempt(1).progress_path

    def finish() -> None:
        while not (
            (seen := load_progress(progress_path)) and seen.phase.startswith("waiting for another")
        ):
            assert not done.wait(0.01), "it has not waited"
        hidden.rename(entry)
        release.set()

    release, done = threading.Event(), threading.Event()

    def hold() -> None:
        with hold_entry(entry, lambda: False) as is_ours:
            assert is_ours
            held.set()
            release.wait(60)

    held = threading.Event()
    threads = [threading.Thread(target=hold), threading.Thread(target=finish)]
    threads[0].start()
    held.wait(60)
    threads[1].start()
    place.obtain("b")
    done.set()
    for thread in threads:
        thread.join(60)
    assert place.computed == ["a"] and place.source("b").source == "shared"


def test_waiting_for_a_lock_throws_no_dice_that_a_trainer_throws(tmp_path: Path) -> None:
    """Another process probes the lock, so it is held for an instant."""
    path = tmp_path / "lock"
    lock, dice = Lease(path), random.getstate()
    with path.open("rb") as looking:
        fcntl.flock(looking, fcntl.LOCK_SH)
        release = threading.Timer(0.2, fcntl.flock, (looking, fcntl.LOCK_UN))
        release.start()
        assert lock.try_acquire()
        release.join()
    lock.close()
    assert random.getstate() == dice


def test_and_scores_itself_when_that_takes_too_long(place: Place) -> None:
    place.obtain("a")
    entry = place.entries[0]
    entry.rename(entry.with_name(".hidden"))
    with hold_entry(entry, lambda: False):
        assert place.obtain("b", wait_seconds=0.3) == make_scores()
    assert place.computed == ["a", "b"] and "has been computing it" in str(place.source("b").why)
    assert place.entries == [], "without the lock nothing is written"


def test_what_a_model_keeps_is_not_shared(place: Place) -> None:
    def compute() -> BaseScores:
        place.trainer.model.longest_text = len(place.computed)
        place.computed.append("x")
        return make_scores()

    for name in ("a", "b"):
        scores = make_scores()
        obtain_base_scores(
            place.open(name),
            SAMPLES,
            place.trainer,
            compute=compute,
            score_again=lambda scores=scores: scores.test[5:],
        )
    assert "longest_text has changed" in str(place.source("a").why)
    assert len(place.computed) == 2 and place.entries == []


def obtain_unlike(place: Place, name: str) -> BaseScores:
    """Of a model that scores a row another way the second time."""
    scores = make_scores()
    other = replace(scores.test[5], completion_nll_sum=9.0)

    def compute() -> BaseScores:
        place.computed.append(name)
        return scores

    return obtain_base_scores(
        place.open(name), SAMPLES, place.trainer, compute=compute, score_again=lambda: [other]
    )


def test_nobody_waits_for_scores_that_cannot_be_kept(place: Place) -> None:
    """The first run records this under the key, and later ones take no lock."""
    obtain_unlike(place, "a")
    why = str(place.source("a").why)
    [lock] = place.root.glob("*.lock")
    with hold_entry(lock.with_suffix(""), lambda: False) as is_ours:
        assert is_ours
        obtain_unlike(place, "b")
    assert place.computed == ["a", "b"] and place.source("b").why == why
    find_marker(place).write_text("{")  # says nothing any more
    obtain_unlike(place, "c")
    assert find_not_shared(lock.with_suffix("")) == why, "it is written again"


def find_marker(place: Place) -> Path:
    [marker] = place.root.glob("*.not-shared")
    return marker


def test_who_waited_for_such_scores_lets_the_next_one_go_on_at_once(place: Place) -> None:
    """A run that waits while the first one finds that scores cannot be shared holds no lock."""
    obtain_unlike(place, "a")
    marker = find_marker(place)
    folder = marker.with_suffix("")
    why = find_not_shared(folder)
    assert why is not None
    marker.unlink()
    progress_path = place.project.paths("b").attempt(1).progress_path
    held = threading.Event()

    def hold() -> None:
        with hold_entry(folder, lambda: False) as is_ours:
            assert is_ours
            held.set()
            while not (
                (seen := load_progress(progress_path))
                and seen.phase.startswith("waiting for another")
            ):
                assert not done.wait(0.01), "it has not waited"
            note_not_shared(folder, why)

    done, computing = threading.Event(), []
    holder = threading.Thread(target=hold)
    holder.start()
    held.wait(60)

    def compute() -> BaseScores:
        with hold_entry(folder, lambda: False) as is_free:
            computing.append(is_free)
        return make_scores()

    obtain_base_scores(
        place.open("b"), SAMPLES, place.trainer, compute=compute, score_again=lambda: []
    )
    done.set()
    holder.join(60)
    assert computing == [True] and place.source("b").why == why


def test_what_does_not_come_out_the_same_is_not_shared(place: Place) -> None:
    scores = make_scores()
    other = replace(scores.test[5], completion_nll_sum=9.0)
    obtain_base_scores(
        place.open("a"),
        SAMPLES,
        place.trainer,
        compute=lambda: scores,
        score_again=lambda: [other],
    )
    assert "completion_nll_sum" in str(place.source("a").why) and place.entries == []


def test_scores_on_a_gpu_may_differ_by_the_order_of_their_sums() -> None:
    theirs = [make_score("b", 1.0), make_score("a", 100.0)]
    for factor, is_close in ((1.0009, True), (1.002, False)):
        ours = [make_score("a", 100.0 * factor)]
        assert (find_difference(theirs, ours, OF_SUMS) is None) == is_close
        assert find_difference(theirs, ours, EXACT) is not None
        assert find_difference(theirs, ours, OF_BATCHES) is None
    assert find_difference(theirs, [make_score("a", 110.0)], OF_BATCHES) is not None
    counted = [replace(theirs[1], num_tokens=9)]
    assert "num_tokens" in str(find_difference(theirs, counted, OF_BATCHES))
    assert find_difference([], theirs, OF_BATCHES) is not None


def test_an_entry_whose_other_rows_are_of_other_weights_is_not_taken(place: Place) -> None:
    """The few rows that are scored again agree."""
    place.obtain("a")
    path = place.entries[0] / "scores.json"
    scores = load_json(path)
    scores["test"] = [{**row, "nll_sum": row["nll_sum"] + 3} for row in scores["test"]]
    path.write_text(json.dumps(scores))
    sign_again(place.entries[0])
    place.obtain("b")
    assert place.computed == ["a", "b"] and place.source("b").producer is not None
