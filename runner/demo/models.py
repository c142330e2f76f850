"""Owns the folder of the demo's two base models: builds missing ones, offline, in under a minute on
two cores.

The same source gives the same bytes on the same machine. `weights` trains each model in a separate
process. This module does not import torch, so it is fast if everything is already built.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from runner.demo.plans import Pretraining
from runner.files import follow_umask
from runner.processes import die_with_parent
from runner.recipe.model_files import find_missing_model_file

DEMO_FAMILIES = ("gemma", "llama")
MANIFEST_NAME = ".demo_model.json"  # hidden: it is not part of the model's content
BUILDER_SOURCES = ("corpus.py", "families.py", "plans.py", "weights.py")


def builder_digest(family: str, plan: Pretraining) -> str:
    """A digest of everything that determines the weights: the plan and the builder's source."""
    sources = [
        Path(__file__).with_name(name).read_text(encoding="utf-8") for name in BUILDER_SOURCES
    ]
    parts = [family, json.dumps(asdict(plan), sort_keys=True), *sources]
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


def load_manifest(model_dir: Path) -> dict[str, Any]:
    """The record of a built model; empty if `model_dir` holds no complete one."""
    try:
        manifest = json.loads((model_dir / MANIFEST_NAME).read_text(encoding="utf-8"))
    except (FileNotFoundError, json.JSONDecodeError):
        return {}
    return manifest if isinstance(manifest, dict) else {}


def is_built(model_dir: Path, family: str, plan: Pretraining) -> bool:
    """True if `model_dir` holds, with all its files, the model that this builder would make."""
    manifest = load_manifest(model_dir)
    if manifest.get("builder_digest") != builder_digest(family, plan):
        return False
    # Models of older versions have no record of their files.
    is_whole = manifest.get("file_bytes") in (None, _measure_files(model_dir))
    return is_whole and find_missing_model_file(model_dir) is None


def _measure_files(model_dir: Path) -> dict[str, int]:
    """Bytes of each file of a model, by name."""
    files = (path for path in model_dir.iterdir() if not path.name.startswith("."))
    return {path.name: path.stat().st_size for path in sorted(files)}


def _build_in_child(family: str, built_dir: Path, plan: Pretraining, parent_pid: int) -> None:
    """Body of a child process: train, save, and write the manifest last."""
    die_with_parent(parent_pid)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
    from runner.demo.weights import train_base_model

    manifest: dict[str, Any] = {"builder_digest": builder_digest(family, plan), "family": family}
    manifest |= train_base_model(family, built_dir, plan)
    manifest["plan"] = asdict(plan)
    manifest["file_bytes"] = _measure_files(built_dir)
    follow_umask(built_dir)
    (built_dir / MANIFEST_NAME).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")


@contextmanager
def _only_builder(output_dir: Path) -> Iterator[None]:
    """Hold the lock of a folder of models; it is released when its holder ends, even by a kill."""
    with (output_dir / ".lock").open("w") as lock_file:
        fcntl.flock(lock_file, fcntl.LOCK_EX)
        yield


def _make_folder(parent_dir: Path, prefix: str) -> Path:
    """A new folder whose mode follows the umask; `mkdtemp` would make a private one."""
    folder = parent_dir / f"{prefix}{os.urandom(4).hex()}"
    folder.mkdir()
    return folder


def _remove_leftovers(output_dir: Path) -> None:
    """Remove leftovers of killed builders; only for the holder of the lock."""
    for pattern in (".building-*", ".outdated-*"):
        for leftover_dir in output_dir.glob(pattern):
            shutil.rmtree(leftover_dir, ignore_errors=True)


def _put_in_place(built_dir: Path, model_dir: Path) -> None:
    """Rename `built_dir` to `model_dir`, first moving aside a model of an older builder."""
    if not model_dir.exists():
        built_dir.rename(model_dir)
        return
    outdated_dir = _make_folder(model_dir.parent, ".outdated-")
    model_dir.rename(outdated_dir / model_dir.name)
    built_dir.rename(model_dir)
    shutil.rmtree(outdated_dir)


def _build(families: list[str], output_dir: Path, plan: Pretraining) -> None:
    """Train `families` in parallel, one process each, and put each in place once it is complete."""
    context = multiprocessing.get_context("spawn")
    started = time.monotonic()
    children = {}
    failed = []
    try:
        for family in families:
            built_dir = _make_folder(output_dir, f".building-{family}-")
            # A daemon: Ctrl-C before it is in `children` must not make the exit wait for it.
            child = context.Process(
                target=_build_in_child,
                args=(family, built_dir, plan, os.getpid()),
                name=family,
                daemon=True,
            )
            child.start()
            children[child.sentinel] = (child, built_dir)
        while children:
            for sentinel in wait(list(children)):
                assert isinstance(sentinel, int)
                child, built_dir = children.pop(sentinel)
                child.join()
                manifest = load_manifest(built_dir)
                if child.exitcode or not manifest:
                    failed.append(child.name)
                    continue
                _put_in_place(built_dir, output_dir / child.name)
                seconds = time.monotonic() - started
                print(
                    f"{child.name}: built, {manifest['num_parameters'] / 1e6:.1f}M parameters,"
                    f" loss {manifest['first_loss']:.2f} ->"
                    f" {manifest['last_loss']:.2f}, {seconds:.0f} s",
                    file=sys.stderr,
                    flush=True,
                )
    except BaseException:  # such as Ctrl-C
        for child, _ in children.values():
            child.kill()
            child.join()
        _remove_leftovers(output_dir)
        raise
    if failed:
        raise RuntimeError(
            f"the base models {', '.join(failed)} were not built; their errors are above"
        )


def build_demo_models(
    output_dir: Path, *, families: tuple[str, ...] = DEMO_FAMILIES, plan: Pretraining | None = None
) -> dict[str, Path]:
    """The folder of each family's base model, which is built if it is missing or outdated.

    It is safe to kill this and to call it twice at the same time: a model is built in a hidden
    folder and renamed when it is complete.

    Raises:
        RuntimeError: a child process failed; the other models are in place.
    """
    plan = plan or Pretraining()
    output_dir.mkdir(parents=True, exist_ok=True)
    model_dirs = {family: output_dir / family for family in families}
    with _only_builder(output_dir):
        _remove_leftovers(output_dir)
        missing = [family for family in families if not is_built(model_dirs[family], family, plan)]
        for family in families:
            state = "building" if family in missing else "already built in"
            print(f"{family}: {state} {model_dirs[family]}", file=sys.stderr, flush=True)
        _build(missing, output_dir, plan)
    return model_dirs
