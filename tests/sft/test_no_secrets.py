"""Canaries in the environment of real runs, one that completes and one that fails over them: none
is found anywhere.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from tests.conftest import Project

CANARIES = {
    "HF_TOKEN": "hf_" + "CanaryCanaryCanaryCanaryCanary0123",
    "WANDB_API_KEY": "canary0wandb0canary0wandb0canary0wandb00",
    "AWS_ACCESS_KEY_ID": "AKIA" + "CANARY0123456789",
    "AWS_SECRET_ACCESS_KEY": "canary/aws+canary/aws+canary/aws+canary0",
    "STORE_PASSWORD": "canary-of-the-store",
}
# A library that prints secrets, through Python and past it.
CARELESS = """
import atexit, os, sys
def tell():
    if "runner.sft" in " ".join(sys.orig_argv):
        values = [os.environ[name] for name in %r]
        print("careless", *values, flush=True)
        print("https://me:" + values[-1] + "@host", file=sys.stderr, flush=True)
        os.write(2, ("past Python " + " ".join(values) + "\\n").encode())
atexit.register(tell); tell()
"""


def find_canaries(folder: Path) -> list[str]:
    """Files below that hold a canary, with its name; archives hold their files as they are."""
    files = [path for path in folder.rglob("*") if path.is_file() and not path.is_symlink()]
    return [
        f"{path.relative_to(folder)}: {name}"
        for path in files
        for content in [path.read_bytes()]
        for name, value in CANARIES.items()
        if value.encode() in content
    ]


@pytest.mark.slow
def test_no_secret_of_the_environment_is_found_in_what_is_left(project: Project) -> None:
    project.add_model()
    careless_dir = project.root.parent / "careless"
    careless_dir.mkdir(exist_ok=True)
    (careless_dir / "sitecustomize.py").write_text(CARELESS % list(CANARIES))
    rows = (project.root / "data.jsonl").read_text()
    user = {"role": CANARIES["STORE_PASSWORD"], "content": CANARIES["HF_TOKEN"]}
    forged = {"messages": [user, {"role": "assistant", "content": "x"}]}
    environment = {
        **CANARIES,
        "PYTHONPATH": f"{careless_dir}:{os.environ.get('PYTHONPATH', '')}",
        "WANDB_MODE": "offline",
    }
    tracked = (
        "tracking.report_to=[tensorboard,wandb]",
        "training.max_steps=2",
        "training.num_train_epochs=null",
    )
    stored = (
        f"checkpoints.remote={{url: 'file://{project.root}/store'}}",
        "checkpoints.archive=zip",
    )
    done = project.cli(
        "launch", "recipe.yaml", *tracked, *stored, "--name", "completes", environment=environment
    )
    assert done.returncode == 0, done.stderr
    log = (project.paths("completes").attempt(1).log_path).read_text()
    assert "careless *** *** ***" in log and "past Python ***" in log, "the library did print it"

    (project.root / "forged.jsonl").write_text(f"{rows}{json.dumps(forged)}\n")
    overrides = ("data.train.path=forged.jsonl", "data.num_train_samples=null")
    failing = project.cli(
        "launch", "recipe.yaml", *overrides, "--name", "fails", environment=environment
    )
    assert failing.returncode not in (0, 2), failing.stderr
    (project.root / "forged.jsonl").unlink()
    printed = [done.stdout, done.stderr, failing.stdout, failing.stderr]
    for arguments in (
        ("status", "runs"),
        ("report", "runs", "--format", "json"),
        ("why", "runs/tests/fails"),
        ("export", "runs/tests/completes", "--output", "exported"),
    ):
        answer = project.cli(*arguments, environment=environment)
        printed += [answer.stdout, answer.stderr]
    assert (project.root / "exported" / "adapter_model.safetensors").exists(), printed[-1]
    assert "***" in failing.stderr
    for text in printed:
        for name, value in CANARIES.items():
            assert value not in text, name
    assert find_canaries(project.root) == []
