"""The demo's base models are built once, whole, the same every time, and know nothing yet of the
demo's task.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import runpy
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.demo.corpus import general_exchanges
from runner.demo.models import (
    DEMO_FAMILIES,
    MANIFEST_NAME,
    build_demo_models,
    builder_digest,
    is_built,
    load_manifest,
)
from runner.demo.plans import TINY, Pretraining
from tests.conftest import ROOT
from tests.support.model_folders import make_model_folder
from tests.support.modes import list_other_modes, umask_of

REPOSITORY = ROOT
DATA_PATH = REPOSITORY / "data" / "demo.jsonl"
# The demo's own, and one more that tests of other families' formats go by.
FAMILIES = (*DEMO_FAMILIES, "mistral")
BRIEF = Pretraining(size=TINY, num_steps=40, num_warmup_steps=2)


def _rows() -> list[list[dict[str, str]]]:
    return [
        json.loads(line)["messages"] for line in DATA_PATH.read_text(encoding="utf-8").splitlines()
    ]


def _contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.fixture(scope="module")
def demo_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    output_dir = tmp_path_factory.mktemp("demo") / "models"
    with umask_of(0o027):
        build_demo_models(output_dir, families=FAMILIES, plan=BRIEF)
    return output_dir


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_models_load_and_have_learned_something(demo_dir: Path, family: str) -> None:
    model = AutoModelForCausalLM.from_pretrained(demo_dir / family)
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / family)
    assert type(model).__name__.lower() == f"{family}forcausallm"
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    manifest = load_manifest(demo_dir / family)
    assert manifest["last_loss"] < manifest["first_loss"]
    assert list_other_modes(demo_dir / family, 0o027) == {}


@pytest.mark.slow
def test_second_build_skips_and_keeps_the_files(
    demo_dir: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    weights_path = demo_dir / "llama" / "model.safetensors"
    modified_before = weights_path.stat().st_mtime_ns
    build_demo_models(demo_dir, families=FAMILIES, plan=BRIEF)
    assert weights_path.stat().st_mtime_ns == modified_before
    assert capfd.readouterr().err.count("already built") == len(FAMILIES)


@pytest.mark.slow
def test_same_plan_gives_the_same_bytes(demo_dir: Path, tmp_path: Path) -> None:
    build_demo_models(tmp_path, families=("mistral",), plan=BRIEF)
    assert _contents(tmp_path / "mistral") == _contents(demo_dir / "mistral")


@pytest.mark.slow
def test_built_means_this_builder_and_a_manifest(demo_dir: Path, tmp_path: Path) -> None:
    assert is_built(demo_dir / "llama", "llama", BRIEF)
    assert not is_built(demo_dir / "llama", "llama", Pretraining())
    assert not is_built(tmp_path, "llama", BRIEF)


@pytest.mark.slow
def test_torn_model_is_replaced(demo_dir: Path, tmp_path: Path) -> None:
    shutil.copytree(demo_dir / "llama", tmp_path / "llama")
    (tmp_path / "llama" / MANIFEST_NAME).unlink()
    (tmp_path / "llama" / "model.safetensors").write_bytes(b"torn")
    (tmp_path / ".building-llama-killed").mkdir()
    build_demo_models(tmp_path, families=("llama",), plan=BRIEF)
    assert _contents(tmp_path / "llama") == _contents(demo_dir / "llama")
    assert {path.name for path in tmp_path.iterdir()} == {".lock", "llama"}


@pytest.mark.slow
def test_two_builders_at_once_build_one_model(demo_dir: Path, tmp_path: Path) -> None:
    context = multiprocessing.get_context("spawn")
    arguments = {"families": ("gemma",), "plan": BRIEF}
    builders = [
        context.Process(target=build_demo_models, args=(tmp_path,), kwargs=arguments)
        for _ in range(2)
    ]
    for builder in builders:
        builder.start()
    for builder in builders:
        builder.join(120)
    assert [builder.exitcode for builder in builders] == [0, 0]
    assert _contents(tmp_path / "gemma") == _contents(demo_dir / "gemma")


@pytest.mark.slow
def test_kill_leaves_no_model_and_the_next_build_is_whole(demo_dir: Path, tmp_path: Path) -> None:
    builder = subprocess.Popen(
        [sys.executable, "-m", "runner", "demo-models", "--output", str(tmp_path)],
        cwd=REPOSITORY,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".building-llama-*")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    builder.send_signal(signal.SIGKILL)
    builder.wait()
    # Its children, which would end after training.
    os.killpg(builder.pid, signal.SIGKILL)
    assert not (tmp_path / "llama").exists()
    build_demo_models(tmp_path, families=("llama",), plan=BRIEF)
    assert _contents(tmp_path / "llama") == _contents(demo_dir / "llama")


@pytest.mark.slow
def test_failed_build_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="no-such-family"):
        build_demo_models(tmp_path, families=("no-such-family",), plan=BRIEF)
    assert not (tmp_path / "no-such-family").exists()


def run_verb(output_dir: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "runner", "demo-models", "--output", str(output_dir)],
        cwd=REPOSITORY,
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )


def make_broken_torch(folder: Path) -> str:
    """A search path on which nothing can import torch."""
    (folder / "torch.py").write_text("raise ImportError('no torch here')")
    return os.pathsep.join([str(folder), str(REPOSITORY)])


def test_the_verb_finds_everything_built_without_torch(tmp_path: Path) -> None:
    models_dir = tmp_path / "models"
    for family in DEMO_FAMILIES:
        make_model_folder(models_dir / family)
        manifest = {"builder_digest": builder_digest(family, Pretraining())}
        (models_dir / family / MANIFEST_NAME).write_text(json.dumps(manifest))
    done = run_verb(models_dir, PYTHONPATH=make_broken_torch(tmp_path))
    assert done.returncode == 0 and done.stderr.count("already built") == len(DEMO_FAMILIES)
    assert done.stdout.splitlines() == [str(models_dir / family) for family in DEMO_FAMILIES]


def test_a_failed_build_is_exit_code_1(tmp_path: Path) -> None:
    done = run_verb(tmp_path / "models", PYTHONPATH=make_broken_torch(tmp_path))
    assert (done.returncode, done.stdout) == (1, "") and "no torch here" in done.stderr
    assert "were not built; their errors are above" in done.stderr.splitlines()[-1]
    assert not list((tmp_path / "models").glob("[!.]*"))


def test_data_set_is_what_its_script_writes() -> None:
    script = runpy.run_path(str(REPOSITORY / "data" / "make_demo.py"))
    rows = [row["messages"] for row in script["build_rows"](script["NUM_ROWS"], script["SEED"])]
    assert rows == _rows()


def test_rows_are_unique_and_of_the_chat_schema() -> None:
    rows = _rows()
    assert all([message["role"] for message in row] == ["user", "assistant"] for row in rows)
    for position in (0, 1):
        assert len({row[position]["content"] for row in rows}) == len(rows)


def test_pretraining_never_meets_the_task() -> None:
    plan = Pretraining()
    exchanges = list(general_exchanges(plan.num_steps * plan.batch_size, seed=plan.seed))
    general = {message["content"] for messages in exchanges for message in messages}
    summaries = [summary["content"] for _, summary in _rows()]
    sentences = {sentence.rstrip(".") for summary in summaries for sentence in summary.split(". ")}
    assert not any("ummar" in text for text in general)
    assert not any(
        sentence.rstrip(".") in sentences for text in general for sentence in text.split(". ")
    )
    assert general.isdisjoint(message["content"] for row in _rows() for message in row)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_fit_the_demo_length(demo_dir: Path, family: str) -> None:
    # A smaller vocabulary than in the demo.
    tokenizer = AutoTokenizer.from_pretrained(demo_dir / family)
    lengths = [len(tokenizer.apply_chat_template(row, return_dict=False)) for row in _rows()]
    assert max(lengths) <= 256


@pytest.mark.parametrize("lost", [None, "model.safetensors", "config.json", "tokenizer.json"])
def test_a_model_that_lost_a_file_is_not_built(tmp_path: Path, lost: str | None) -> None:
    files = {"model.safetensors": "w", "config.json": "{}", "tokenizer.json": "{}"}
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    manifest = {
        "builder_digest": builder_digest("llama", BRIEF),
        "file_bytes": {name: len(text) for name, text in files.items()},
    }
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    if lost is not None:
        (tmp_path / lost).unlink()
    assert is_built(tmp_path, "llama", BRIEF) == (lost is None)
    del manifest["file_bytes"]  # as older versions wrote it
    (tmp_path / MANIFEST_NAME).write_text(json.dumps(manifest))
    assert is_built(tmp_path, "llama", BRIEF) == (lost in (None, "tokenizer.json"))
