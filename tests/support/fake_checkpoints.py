"""Checkpoints as Transformers and DeepSpeed write them, without any training; shared by several
tests.
"""

from __future__ import annotations

import itertools
import json
import os
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from runner.checkpoints.commit import commit_checkpoint
from runner.checkpoints.restore import choose_resume_step
from runner.launch.run_files import prepare_run
from runner.recipe.contents import ContentHashes, hash_contents
from runner.recipe.identity import build_resume_fingerprint, derive_digest
from runner.recipe.launch_section import CheckpointsSection
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.facts import read_facts
from runner.run.paths import RunPaths
from runner.run.record import Attempt, RunRecord, write_record
from tests.conftest import RECIPE_TEXT

DIGEST: Final = "d" * 64
FINGERPRINT: Final[dict[str, Any]] = {
    "recipe_digest": DIGEST,
    "num_processes": 2,
    "versions": {"torch": "2.13"},
}
# The limit is so high that no checkpoint is deleted.
_RECIPE: Final = parse_recipe(
    RECIPE_TEXT, where="recipe.yaml", overrides=("checkpoints.keep_latest=9",)
)
STATE_FILES: Final = ("global_step1/deep/rank_1.pt", "optimizer.pt", "rng_state_0.pth")


def make_paths(root: Path) -> RunPaths:
    """An empty run directory."""
    paths = RunPaths(root / "run")
    paths.checkpoints_dir.mkdir(parents=True)
    return paths


def make_limits(**keys: Any) -> CheckpointsSection:
    """The recipe's section, `save_steps: 4`."""
    return CheckpointsSection.model_validate({"save_strategy": "steps", "save_steps": 4, **keys})


def write(paths: RunPaths, step: int, values: Mapping[int, float] | None = None) -> Path:
    """Write the files of a checkpoint that all ranks have saved; `values`: step -> evaluation."""
    saved_dir = paths.checkpoints_dir / f"checkpoint-{step}"
    history = [
        {"step": at, "eval_nll_per_completion_token": value} for at, value in (values or {}).items()
    ]
    files = {
        "model.safetensors": bytes(range(256)) * step,
        "training_args.bin": b"a pickle with the hub token",
        "trainer_state.json": json.dumps({"log_history": history}).encode(),
        **{name: f"{name} of step {step}".encode() for name in STATE_FILES},
    }
    for name, content in files.items():
        path = saved_dir / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    return saved_dir


def commit(paths: RunPaths, *steps: int, values: Mapping[int, float] | None = None) -> None:
    """Committed checkpoints; each knows the evaluations up to its step."""
    for step in steps:
        known = {at: value for at, value in (values or {}).items() if at <= step}
        commit_checkpoint(write(paths, step, known), paths, step, FINGERPRINT)


def commit_under(paths: RunPaths, step: int, fingerprint: Mapping[str, Any]) -> None:
    """A committed checkpoint that was written under the given fingerprint."""
    commit_checkpoint(write(paths, step), paths, step, fingerprint)


def interrupt(recipe: Recipe, paths: RunPaths, step: int = 4, **changed: Any) -> RunPaths:
    """A run that was killed after it had committed a checkpoint; `changed` differs in its
    fingerprint.
    """
    contents = hash_contents(recipe, ContentHashes(Path("cache.json")))
    prepare_run(recipe, contents, read_facts(paths))
    paths.checkpoints_dir.mkdir(exist_ok=True)
    fingerprint = build_resume_fingerprint(
        recipe, derive_digest(recipe, contents), recipe.launch.num_processes, threads="1"
    )
    commit_under(paths, step, {**fingerprint, **changed})
    attempt = Attempt(
        number=1,
        started_at_utc="2026-01-01T00:00:00+00:00",
        command=("accelerate",),
        environment={},
        num_processes=recipe.launch.num_processes,
        host="here",
    )
    paths.attempt(1).attempt_dir.mkdir(parents=True, exist_ok=True)
    paths.attempt(1).log_path.write_text("")
    write_record(paths, RunRecord(attempts=(attempt,)))
    return paths


def resume(paths: RunPaths, **changed: Any) -> int | None:
    """The step from which an attempt resumes; `changed` differs in its fingerprint."""
    return choose_resume_step(paths, _RECIPE, {**FINGERPRINT, **changed}, "auto")


def quarantined(paths: RunPaths) -> list[str]:
    """Names of everything that was moved aside."""
    return (
        sorted(path.name for path in paths.quarantine_dir.iterdir())
        if paths.quarantine_dir.exists()
        else []
    )


def listing(folder: Path) -> list[str]:
    """Every name in a folder, including hidden ones."""
    return sorted(path.name for path in folder.iterdir())


def flip_bit(path: Path) -> None:
    """Flip one bit, which changes no size."""
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 0x10
    path.write_bytes(content)


def _changes_a_file(event: str, arguments: tuple[Any, ...], root: Path) -> bool:
    """True for an audit event that changes a file below `root`; Python raises it beforehand."""
    # `shutil.rmtree`, relative to an open folder
    if event in ("os.remove", "os.rmdir") and arguments[1] != -1:
        return True
    if not arguments or not str(arguments[0]).startswith(str(root)):
        return False
    if event == "open":
        return bool(set(arguments[1] or "") & set("wax")) or bool(
            arguments[2] & (os.O_WRONLY | os.O_RDWR)
        )
    return event in ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.link")


def dies_at(root: Path, number: int, work: Callable[[], None]) -> bool:
    """True if a forked child dies before its n-th change below `root`, as in a power cut: no
    `finally` runs.
    """
    pid = os.fork()
    if pid == 0:
        changes = itertools.count(1)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if _changes_a_file(event, arguments, root) and next(changes) == number:
                os._exit(9)

        try:
            sys.addaudithook(hook)
            work()
            os._exit(0)
        except BaseException:
            os._exit(1)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, 9), "the work itself failed"
    return code == 9
