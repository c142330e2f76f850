"""Pushes a tuned model to the hub, without torch: the files, the repository, the token, the wording
of refusals, and `push.json`.

A push is one commit. Pushing the same files again creates none, so if a process is killed at any
moment, the next one simply sends everything again.
"""

from __future__ import annotations

import hashlib
import os
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from types import FrameType
from typing import Final

from runner.errors import RefusedError, RunnerError
from runner.files import hash_file, hash_json
from runner.plan.pushes import (
    TOKEN_HINT,
    OtherPush,
    find_placeholder,
    find_pushed_by_others,
    suggest_elsewhere,
)
from runner.publish.card import build_model_card, load_versions
from runner.publish.tuned import TunedRun, open_tuned_run
from runner.recipe.parse import Recipe
from runner.run.lease import Lease
from runner.run.manifest import is_of_model, list_model_files
from runner.run.paths import RunPaths
from runner.run.record import PushRecord, load_push, load_stored_recipe, write_push
from runner.run.result import TrainResult, load_result
from runner.secrets import scrub

# Files that a push deletes from the repository unless it replaces them: an adapter must not be next
# to other weights.
_WEIGHT_FILES: Final = (
    "*.safetensors",
    "*.safetensors.index.json",
    "adapter_config.json",
    "config.json",
)
_CARD: Final = "README.md"
_MAX_FAILURE: Final = 500  # characters kept of a failure: a hub may answer with a whole page

# The files to send: names in the repository, with the path or the content of each.
Files = Mapping[str, Path | bytes]


class PushError(RunnerError):
    """The hub did not accept the model; the files to send are unchanged."""


class PushedElsewhereError(RunnerError):
    """Another process is pushing this run, or has moved it aside."""


@dataclass(frozen=True)
class HubTarget:
    """A repository on the hub and the token that may write to it; the token is never shown."""

    repo_id: str
    is_private: bool
    token: str

    def __repr__(self) -> str:
        return f"HubTarget({self.repo_id})"

    @classmethod
    def of(cls, recipe: Recipe, repo_id: str = "") -> HubTarget:
        """The repository, by default the recipe's own. Raises: RefusedError, without a repository
        or a token, or for an owner that is a placeholder.
        """
        repo_id = repo_id or recipe.tracking.hub_model_id or ""
        token = os.environ.get("HF_TOKEN", "").strip()
        if not repo_id:
            raise RefusedError(
                f"the recipe of {recipe.run.name} has no `tracking.hub_model_id`, so there is"
                " nowhere to push to",
                hint="name the repository: --push OWNER/NAME",
            )
        if (owner := find_placeholder(repo_id)) is not None:
            raise RefusedError(
                f"`{owner}` in {repo_id} is a placeholder",
                hint="name the repository, with your own name or organization: --push OWNER/NAME",
            )
        if not token:
            raise RefusedError(
                f"pushing to {repo_id} needs a token with write access", hint=TOKEN_HINT
            )
        return cls(repo_id, recipe.tracking.hub_private, token)


@dataclass(frozen=True)
class Commit:
    """A commit on the hub that holds the pushed files."""

    oid: str
    url: str


def push_files(files: Files, target: HubTarget, message: str) -> Commit:
    """Push the files. Return the commit that holds them and no other weights; the repository's
    newest one if it already holds them.

    Raises:
        PushError: the hub refuses, cannot be reached, or has a public repository under a name that
            should be private.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api = HfApi(token=target.token)
    with _as_push_errors(target):
        api.create_repo(target.repo_id, private=target.is_private, exist_ok=True)
        if target.is_private and not api.repo_info(target.repo_id).private:
            raise PushError(
                f"{target.repo_id} is public, but `tracking.hub_private` is true:"
                " nothing was pushed",
                hint="make the repository private, or set `tracking.hub_private: false`",
            )
        there = api.list_repo_files(target.repo_id)
        old = [name for name in there if any(fnmatch(name, one) for one in _WEIGHT_FILES)]
        commit = api.create_commit(
            target.repo_id,
            [
                *(CommitOperationDelete(name) for name in old if name not in files),
                *(CommitOperationAdd(name, content) for name, content in files.items()),
            ],
            commit_message=message,
        )
    return Commit(str(commit.oid), str(commit.commit_url))


@contextmanager
def _as_push_errors(target: HubTarget) -> Iterator[None]:
    """Errors of the hub as `PushError`, with the token masked if they contain it."""
    from huggingface_hub.errors import HFValidationError, OfflineModeIsEnabled

    # From the HTTP library behind the hub's calls, which may change some day.
    from huggingface_hub.errors import HTTPError as HttpError  # type: ignore[attr-defined]

    try:
        yield
    except (HttpError, HFValidationError, OfflineModeIsEnabled, ValueError, OSError) as error:
        text = scrub(" ".join(str(error).split()).replace(target.token, "***"))
        raise PushError(f"{target.repo_id} did not accept it: {text}") from None


def list_folder(folder: Path) -> dict[str, Path | bytes]:
    """Every file of an exported folder, in the form to send."""
    return {path.relative_to(folder).as_posix(): path for path in list_model_files(folder)}


def describe_commit(run: TunedRun) -> str:
    """The commit message for the model of a run."""
    return f"{run.recipe.run.full_name}, recipe {run.stored.recipe_digest[:12]}"


def push_run(run_dir: Path, repo_id: str = "", *, limit_seconds: float | None = None) -> Commit:
    """Push `model/` of a completed run unchanged, with a model card, after every byte was compared
    with the run's records. An empty `repo_id` means the recipe's own repository. After
    `limit_seconds` the process ends, even if it is still waiting for the hub.

    The outcome of the run's own push is recorded in `push.json`; after a kill it stays pending.

    Raises:
        PushedElsewhereError: another process is pushing it.
        RefusedError: the run has nothing to push, or no repository is named.
        PushError: the hub did not accept it.
    """
    paths = RunPaths(run_dir)
    if not paths.recipe_path.exists():
        raise RefusedError(
            f"{run_dir} is not a run directory",
            hint="give one such as runs/demo/gemma_060_full_seed1",
        )
    with open_pushes(paths) as pushes:
        if limit_seconds is not None:
            _end_after(limit_seconds, pushes)
        try:
            return _push_locked(run_dir, repo_id, pushes)
        except (RunnerError, OSError) as error:
            reason = error.message if isinstance(error, RunnerError) else str(error)
            pushes.record_failure(repo_id, reason)
            raise


def _end_after(seconds: float, pushes: Pushes) -> None:
    """End this process after that time: threads that wait for the hub would keep it alive."""

    def give_up(number: int, frame: FrameType | None) -> None:
        reason = f"the hub did not accept it within {seconds:.0f} s"
        print(f"error: {reason}", file=sys.stderr, flush=True)
        pushes.record_failure("", reason)
        os._exit(1)

    signal.signal(signal.SIGALRM, give_up)
    signal.setitimer(signal.ITIMER_REAL, seconds)


def _push_locked(run_dir: Path, repo_id: str, pushes: Pushes) -> Commit:
    with open_tuned_run(run_dir, None) as run:
        target = HubTarget.of(run.recipe, repo_id)
        if not repo_id and (others := find_pushed_by_others(run.paths, target.repo_id)):
            raise _refuse_shared(run_dir, target, others[0])
        files = collect_files(run)
        sha256 = hash_files(files)
        pushes.record_pending(target.repo_id, sha256)
        print(f"pushing to {target.repo_id}", file=sys.stderr, flush=True)
        commit = push_files(files, target, describe_commit(run))
        pushes.record_pushed(target.repo_id, sha256, commit)
        return commit


def _refuse_shared(run_dir: Path, target: HubTarget, other: OtherPush) -> RefusedError:
    hint = f"runner export {run_dir} --push OWNER/NAME"
    if other.is_there:
        return RefusedError(
            f"{other.run_dir} was pushed to {target.repo_id}, and its weights would be deleted",
            hint=hint,
        )
    return RefusedError(
        f"{other.run_dir} will be pushed to {target.repo_id} too, and each push would delete"
        " the other's weights",
        hint=f"{hint}  # or {suggest_elsewhere(other.run_dir)}",
    )


def collect_files(run: TunedRun) -> dict[str, Path | bytes]:
    """The files of `model/` listed in a run's result, and the model card. If there is no such list,
    all existing files.
    """
    result = load_result(run.paths)
    manifest = (result.files or {}) if result is not None else {}
    names = [name for name in manifest if is_of_model(name)]
    paths = [run.paths.run_dir / name for name in names] or list_model_files(run.weights_dir)
    files: dict[str, Path | bytes] = {
        path.relative_to(run.weights_dir).as_posix(): path for path in paths
    }
    return files | {_CARD: _build_card(run, result)}


def _build_card(run: TunedRun, result: TrainResult | None) -> bytes:
    card = build_model_card(
        run,
        is_adapter=run.recipe.adapter.method == "lora",
        result=result,
        versions=load_versions(run.paths),
    )
    return card.encode()


def hash_files(files: Files) -> str:
    """SHA-256 of the names and contents of the files to send."""
    hashes = {
        name: hashlib.sha256(content).hexdigest()
        if isinstance(content, bytes)
        else hash_file(content)
        for name, content in files.items()
    }
    return hash_json(hashes)


@dataclass(frozen=True)
class Pushes:
    """`push.json` of a run, whose lock this process holds.

    It describes the run's own push, as requested by its recipe. A manual push to another repository
    is recorded only once it has succeeded, and then replaces a pending or failed push.
    """

    paths: RunPaths
    lock: Lease
    own_id: str | None  # the repository that the recipe of the first attempt names

    def record_pending(self, repo_id: str, sha256: str) -> None:
        """Record the push before anything is sent."""
        if repo_id == self.own_id:
            self._write(PushRecord(state="pending", repo_id=repo_id, files_sha256=sha256))

    def record_pushed(self, repo_id: str, sha256: str, commit: Commit) -> None:
        """Once a commit holds the files."""
        before = load_push(self.paths)
        if before is None or before.state != "pushed" or before.repo_id == repo_id:
            self._write(
                PushRecord(state="pushed", repo_id=repo_id, files_sha256=sha256, commit=commit.oid)
            )

    def record_failure(self, repo_id: str, reason: str) -> None:
        """Record why the run's own push failed; an earlier successful push stays recorded."""
        if self.own_id is None or repo_id not in ("", self.own_id):
            return
        before = load_push(self.paths)
        if before is None or before.state != "pushed":
            text = scrub(" ".join(reason.split()))[:_MAX_FAILURE]
            sha256 = None if before is None else before.files_sha256
            self._write(
                PushRecord(state="failed", repo_id=self.own_id, files_sha256=sha256, failure=text)
            )

    def _write(self, record: PushRecord) -> None:
        if not self.lock.try_acquire():  # the directory was moved aside: another run may be there
            raise PushedElsewhereError(
                f"{self.paths.run_dir} was moved aside while it was being pushed"
            )
        write_push(self.paths, record)


@contextmanager
def open_pushes(paths: RunPaths) -> Iterator[Pushes]:
    """The pushes of a run, locked. Raises: PushedElsewhereError, while another process holds the
    lock.
    """
    lock = Lease(paths.push_lock_path)
    try:
        if not lock.try_acquire():
            raise PushedElsewhereError(f"another process is pushing {paths.run_dir}")
        stored = load_stored_recipe(paths)
        yield Pushes(paths, lock, None if stored is None else stored.recipe.tracking.push_to)
    finally:
        lock.close()
