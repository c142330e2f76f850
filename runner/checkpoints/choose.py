"""The checkpoint that a launch resumes from: one decision for all callers.

`choose` decides and changes nothing. `runner why` prints its verdicts, a launch uses it to refuse
before anything starts, the training process carries out its moves, and export and chat use its
weights. `commit` moves and restores checkpoints, `restore` imports them from elsewhere.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Literal

from runner.checkpoints.archive import ArchiveError, extract_archive, load_archived_marker
from runner.checkpoints.compare import (
    COMMITS,
    LAUNCH_AS_BEFORE,
    Comparison,
    compare_fingerprints,
    describe_obstacles,
    has_other_micro_batch,
    require_resumable,
    suggest_alternatives,
)
from runner.checkpoints.marker import (
    Marker,
    find_damage,
    list_archived,
    list_committed,
    list_unfinished,
    load_marker,
    read_best_step,
)
from runner.errors import CorruptFileError, RefusedError
from runner.recipe.identity import build_resume_fingerprint
from runner.recipe.launch_section import CheckpointsSection
from runner.recipe.parse import Recipe
from runner.run.paths import STEP_PREFIX, RunPaths

Wanted = Literal["auto", "latest", "best"]

_WOULD_MOVE: Final = "an attempt would move it to quarantine"
WAS_BEING_WRITTEN: Final = "it was still being written when its attempt died"
_TRY_AUTO: Final = (
    "launch without `--resume`: damaged checkpoints are moved aside,"
    " and the newest verified one is used"
)


@dataclass(frozen=True)
class Kept:
    """One step's checkpoint as it is on disk: a committed folder, an archive, or both."""

    has_folder: bool
    has_archive: bool
    # Of the folder, otherwise of the archive; of another step if both have wrong names. None:
    # neither can be read.
    marker: Marker | None


@dataclass(frozen=True)
class Inventory:
    """The checkpoints of a run, unverified."""

    paths: RunPaths
    kept: dict[int, Kept] = field(default_factory=dict)  # by step, oldest first
    unfinished: tuple[str, ...] = ()  # folders that were never committed


@dataclass(frozen=True)
class Policy:
    """The inputs of a choice other than the checkpoints and the launch."""

    verification: Verification | None = None  # None: every readable marker is trusted
    # Set aside checkpoints in other micro-batches, and start at step 0 if necessary.
    has_run_out_of_memory: bool = False
    refuses_other_versions: bool = False  # otherwise they are a warning
    judges_all: bool = False  # also verify checkpoints older than the deciding one
    nothing_follows: str | None = None  # for the verdicts: why no attempt follows; None: one does


def build_policy(
    recipe: Recipe,
    resume: str,
    divisor: int,
    verification: Verification | None = None,
    *,
    judges_all: bool = False,
    nothing_follows: str | None = None,
) -> Policy:
    """The policy of an attempt with this `Attempt.resume` and `Attempt.micro_batch_divisor`."""
    return Policy(
        verification,
        has_run_out_of_memory=divisor > 1 and resume in ("auto", "none"),
        refuses_other_versions=recipe.launch.on_version_change == "refuse",
        judges_all=judges_all,
        nothing_follows=nothing_follows,
    )


@dataclass(frozen=True)
class Move:
    """A folder or archive to move to quarantine."""

    name: str
    why: str


@dataclass(frozen=True)
class Restore:
    """A folder to restore from its archive."""

    step: int
    unpacked_dir: Path


@dataclass(frozen=True)
class Verdict:
    """The verdict on one checkpoint: whether an attempt would resume from it, and the reason."""

    name: str
    is_next: bool
    what: str


@dataclass(frozen=True)
class Choice:
    """The checkpoint to resume from, and the consequences."""

    step: int | None = None  # None: start from step 0, unless that is refused
    weights_dir: Path | None = None  # verified, if only weights were wanted
    moves: tuple[Move | Restore, ...] = ()  # in order; made before a refusal is raised
    refusal: RefusedError | None = None
    obstacles: tuple[str, ...] = ()  # differences that prevent resuming, one line per dotted key
    version_warnings: tuple[str, ...] = ()  # version differences that do not prevent it
    decisive_step: int | None = None  # of the checkpoint that is resumed or refused
    newest_step: int | None = None  # of the verified ones, even if no attempt can resume from it
    verdicts: tuple[Verdict, ...] = ()  # if all are judged; newest checkpoint first


def choose(
    inventory: Inventory, wanted: Wanted, fingerprint: Mapping[str, Any] | None, policy: Policy
) -> Choice:
    """The newest verified checkpoint that a launch with this fingerprint may resume from.

    If the `latest` or the `best` one is wanted, a damaged one is refused instead of skipped.
    Without a fingerprint only weights are wanted: nothing is compared, and damaged checkpoints are
    skipped. Nothing is changed, and no more is verified than the answer needs.
    """
    draft = _Draft(inventory, policy.verification, policy.nothing_follows)
    for name in inventory.unfinished:
        draft.moves.append(Move(name, WAS_BEING_WRITTEN))
    if fingerprint is None:
        return _choose_weights(draft, wanted)
    if policy.has_run_out_of_memory:
        _leave_other_micro_batches(draft, fingerprint)
    if wanted != "auto":
        try:
            _rewind(draft, wanted, fingerprint)
        except RefusedError as error:
            return Choice(moves=tuple(draft.moves), refusal=error)
    found = _find_decisive(draft, fingerprint)
    moves = tuple(draft.moves)
    step = found.step if found is not None and not found.differences else None
    verdicts = _judge_all(draft, step) if policy.judges_all else ()
    if found is None:
        return Choice(moves=moves, newest_step=draft.newest_step, verdicts=verdicts)
    return replace(
        _allow_or_refuse(found, policy),
        step=step,
        moves=moves,
        newest_step=draft.newest_step,
        verdicts=verdicts,
    )


def _allow_or_refuse(found: Comparison, policy: Policy) -> Choice:
    """The part of a choice that follows from the launch that wrote the deciding checkpoint."""
    changes = found.version_changes
    obstacles = found.differences + (changes if policy.refuses_other_versions else ())
    if not obstacles:
        return Choice(decisive_step=found.step, version_warnings=changes)
    message = describe_obstacles(found.step, obstacles)
    refusal = RefusedError(message, hint=suggest_alternatives(obstacles))
    return Choice(decisive_step=found.step, obstacles=obstacles, refusal=refusal)


def _leave_other_micro_batches(draft: _Draft, fingerprint: Mapping[str, Any]) -> None:
    """Set aside checkpoints written in other micro-batches: resuming them is not bit-identical."""
    for step, kept in draft.inventory.kept.items():
        if kept.marker is not None and has_other_micro_batch(kept.marker, fingerprint):
            draft.set_aside(
                step, "it was written in larger micro-batches, before the run ran out of memory"
            )
            follows = draft.foretell("an attempt would set it aside")
            draft.reasons[step] = f", in larger micro-batches, which ran out of memory{follows}"


def _rewind(draft: _Draft, wanted: Wanted, fingerprint: Mapping[str, Any]) -> None:
    """Set aside every checkpoint newer than the requested one.

    Raises:
        RefusedError: there is none, it does not verify, or no attempt can resume from it.
    """
    steps = draft.list_left()
    if not steps:
        raise RefusedError(
            f"{draft.inventory.paths.checkpoints_dir} holds no checkpoint",
            hint="launch without `--resume`",
        )
    step = steps[0]
    opened = best_opened = draft.require(step)
    best = draft.read_best_step(opened)
    if best is not None and best != step:
        best_opened = draft.require(best)
    if wanted == "best":
        if best is None:
            raise RefusedError(f"nothing was evaluated up to step {step}", hint="--resume latest")
        step, opened = best, best_opened
    require_resumable(opened.marker, fingerprint, LAUNCH_AS_BEFORE)
    for newer in reversed(steps):
        if newer > step:
            draft.set_aside(newer, describe_rewind(step))


def _find_decisive(draft: _Draft, fingerprint: Mapping[str, Any]) -> Comparison | None:
    """The newest checkpoint that is either resumed or refused for its differences; None to start
    from step 0.

    The final export needs the best weights so far, so a checkpoint is usable only if the one that
    holds them also verifies. A stripped checkpoint can only serve as that other one.
    """
    stripped: list[int] = []
    found = None
    for step in draft.list_left():
        opened = draft.open(step)
        if opened is None:
            draft.reasons[step] = draft.foretell(_WOULD_MOVE)
            continue
        if draft.newest_step is None:
            draft.newest_step = step
        comparison = compare_fingerprints(opened.marker, fingerprint)
        if comparison.differences:
            draft.reasons[step] = (
                f", but from a different launch: {', '.join(comparison.differences)}"
            )
            return comparison
        if opened.marker.is_stripped:
            stripped.append(step)
            draft.reasons[step] = (
                ", but without optimizer state: its weights can be used, but it cannot be resumed"
            )
            continue
        best = draft.read_best_step(opened)
        if best is None or best == step or draft.open(best) is not None:
            found = comparison
            follows = draft.nothing_follows or "an attempt would resume from here"
            draft.reasons[step] = f"; {follows}"
            break
        draft.set_aside(step, f"the best weights so far, of step {best}, are lost")
        draft.reasons[step] = (
            f", but its best weights, of step {best}, are lost{draft.foretell(_WOULD_MOVE)}"
        )
    for step in stripped:
        draft.set_aside(
            step, "it was stripped of its optimizer state, and nothing newer can be resumed"
        )
    return found


def _choose_weights(draft: _Draft, wanted: Wanted) -> Choice:
    """The newest verified checkpoint, or its best one; an older one if that is lost."""
    for step in draft.list_left():
        found, opened = step, draft.open(step)
        if opened is not None and wanted == "best":
            best = draft.read_best_step(opened)
            if best is not None and best != step:
                found, opened = best, draft.open(best)
        if opened is not None:
            return Choice(step=found, weights_dir=opened.folder, moves=tuple(draft.moves))
    return Choice(moves=tuple(draft.moves))


def _judge_all(draft: _Draft, next_step: int | None) -> tuple[Verdict, ...]:
    verdicts: list[Verdict] = []
    for step in reversed(draft.inventory.kept):
        seen = draft.look(step)
        what = seen.how + draft.reasons.get(step, "; older than the deciding checkpoint")
        if seen.opened is None:
            is_moved = step in draft.reasons
            end = (
                draft.foretell(_WOULD_MOVE) if is_moved else "; older than the deciding checkpoint"
            )
            what = f"damaged: {seen.how}{end}"
        name = draft.inventory.paths.checkpoint_dir(step).name
        verdicts.append(Verdict(name, step == next_step, what))
    for name in draft.inventory.unfinished:
        what = f"never finished{draft.foretell(_WOULD_MOVE)}"
        verdicts.append(Verdict(name, False, what))
    return tuple(verdicts)


@dataclass(frozen=True)
class Opened:
    """A checkpoint that counts as intact."""

    marker: Marker
    folder: Path | None  # with its verified files; None if only the marker was read


@dataclass(frozen=True)
class Verification:
    """Reads every byte of the requested checkpoints, and unpacks archives elsewhere."""

    paths: RunPaths
    checkpoints: CheckpointsSection
    scratch_dir: Path
    prefix: str = ""  # of the names in `scratch_dir`

    def open_folder(self, step: int) -> Opened:
        """The folder of a step.

        Raises:
            CorruptFileError: with the first damage found.
        """
        folder = self.paths.checkpoint_dir(step)
        damage = find_damage(folder, step)
        if damage is not None:
            raise CorruptFileError(damage)
        return Opened(load_marker(folder), folder)

    def unpack(self, step: int) -> Opened | None:
        """The unpacked archive of a step; None if it holds the checkpoint of another step.

        Raises:
            ArchiveError: it is damaged.
        """
        folder = self.unpacked_dir(step)
        marker = extract_archive(self.paths.archive_path(step), folder)
        if marker.step == step:
            return Opened(marker, folder)
        shutil.rmtree(folder)
        return None

    def unpacked_dir(self, step: int) -> Path:
        """The folder into which the archive of a step is unpacked."""
        return self.scratch_dir / f"{self.prefix}{STEP_PREFIX}{step}"

    def read_best_step(self, opened: Opened) -> int | None:
        """The step of the best weights recorded in a checkpoint; None before any evaluation."""
        return read_best_step(opened.folder, self.checkpoints) if opened.folder else None


@dataclass(frozen=True)
class _Seen:
    """One checkpoint after verification."""

    opened: Opened | None  # None: no intact copy is left
    how: str  # "intact", or the problem with it
    moves: tuple[Move | Restore, ...]  # so that an intact folder, or nothing, has its name


@dataclass
class _Draft:
    """A choice in progress: the verified checkpoints, the moves so far, and the reasons."""

    inventory: Inventory
    verification: Verification | None
    nothing_follows: str | None = None  # see `Policy`
    moves: list[Move | Restore] = field(default_factory=list)
    reasons: dict[int, str] = field(default_factory=dict)  # by step, for the verdicts
    newest_step: int | None = None
    _seen: dict[int, _Seen] = field(default_factory=dict)
    _opened: set[int] = field(default_factory=set)
    _gone: set[int] = field(default_factory=set)

    def foretell(self, what: str) -> str:
        """The end of a verdict that says what an attempt does; empty if none follows."""
        return f"; {what}" if self.nothing_follows is None else ""

    def list_left(self) -> list[int]:
        """The steps that were not set aside, newest first."""
        return [step for step in reversed(self.inventory.kept) if step not in self._gone]

    def open(self, step: int) -> Opened | None:
        """An intact checkpoint, restored if necessary; a damaged one is moved aside."""
        if step in self._gone:
            return None
        seen = self.look(step)
        if step not in self._opened:
            self._opened.add(step)
            self.moves += seen.moves
        return seen.opened

    def require(self, step: int) -> Opened:
        """An intact checkpoint.

        Raises:
            RefusedError: its folder is damaged, or it is lost; a damaged folder stays where it is.
        """
        folder, kept = self.inventory.paths.checkpoint_dir(step), self.inventory.kept.get(step)
        if kept is not None and kept.has_folder:
            opened = self._open_folder(step)
            if isinstance(opened, str):
                raise RefusedError(
                    f"{folder} does not verify: its files do not match its marker",
                    hint=_TRY_AUTO,
                )
            self._seen[step] = _Seen(opened, "intact", ())
        restored = self.open(step)
        if restored is None:
            raise RefusedError(f"{folder} is lost", hint=_TRY_AUTO)
        return restored

    def set_aside(self, step: int, why: str) -> None:
        """Move a checkpoint and its archive out of the way."""
        kept, paths = self.inventory.kept[step], self.inventory.paths
        if kept.has_archive:
            self.moves.append(Move(paths.archive_path(step).name, why))
        if kept.has_folder or step in self._opened:  # there, or restored
            self.moves.append(Move(paths.checkpoint_dir(step).name, why))
        self._gone.add(step)

    def read_best_step(self, opened: Opened) -> int | None:
        """The step of the best weights recorded in a checkpoint; None without verification."""
        return self.verification.read_best_step(opened) if self.verification else None

    def look(self, step: int) -> _Seen:
        """One checkpoint, verified once."""
        if step not in self._seen:
            self._seen[step] = self._verify(step)
        return self._seen[step]

    def _verify(self, step: int) -> _Seen:
        """The folder, otherwise the archive."""
        kept, paths = self.inventory.kept.get(step), self.inventory.paths
        if kept is None:
            return _Seen(None, "its folder is missing", ())
        folder = self._open_folder(step)
        if isinstance(folder, Opened):
            return _Seen(folder, "intact", ())
        moves: list[Move | Restore] = []
        if kept.has_folder:
            why = f"its files differ from those committed: {folder}"
            moves.append(Move(paths.checkpoint_dir(step).name, why))
        if self.verification is None or not kept.has_archive:
            return _Seen(None, folder, tuple(moves))
        archive_name = paths.archive_path(step).name
        try:
            unpacked = self.verification.unpack(step)
        except ArchiveError as error:
            moves.append(Move(archive_name, error.message))
            return _Seen(None, f"{folder}, and {error.message}", tuple(moves))
        if unpacked is None:
            what = "holds the checkpoint of another step"
            moves.append(Move(archive_name, f"it {what}"))
            return _Seen(None, f"{folder}, and {archive_name} {what}", tuple(moves))
        moves.append(Restore(step, self.verification.unpacked_dir(step)))
        return _Seen(unpacked, f"damaged ({folder}), but intact in {archive_name}", tuple(moves))

    def _open_folder(self, step: int) -> Opened | str:
        """The folder of a step, or the problem with it."""
        kept, name = self.inventory.kept[step], self.inventory.paths.checkpoint_dir(step).name
        if self.verification is None:
            if kept.marker is None or kept.marker.step != step:
                return "its marker cannot be read"
            return Opened(kept.marker, None)
        if not kept.has_folder and name not in self.inventory.unfinished:
            return "its folder is missing"
        try:
            return self.verification.open_folder(step)
        except CorruptFileError as error:
            return error.message


def read_inventory(paths: RunPaths) -> Inventory:
    """The contents of the run's `checkpoints/`; reads only markers."""
    committed, archived = set(list_committed(paths)), set(list_archived(paths))
    kept = {
        step: Kept(step in committed, step in archived, _read_marker_of(paths, step))
        for step in sorted(committed | archived)
    }
    return Inventory(paths, kept, tuple(folder.name for folder in list_unfinished(paths)))


def _read_marker_of(paths: RunPaths, step: int) -> Marker | None:
    found = None
    for path in (paths.checkpoint_dir(step), paths.archive_path(step)):
        marker = _read_marker(path)
        if marker is not None and marker.step == step:
            return marker
        found = found or marker
    return found


def _read_marker(path: Path) -> Marker | None:
    """The marker of a folder or an archive; None if it cannot be read."""
    try:
        return load_marker(path) if path.is_dir() else load_archived_marker(path)
    except (CorruptFileError, OSError):
        return None


def find_commits(paths: RunPaths, resume: str, recipe_digest: str) -> Mapping[str, Any] | None:
    """The hub commits recorded in the checkpoint that an attempt would resume from: the newest of
    the run's own, otherwise the one at the path `resume`. None if there is no checkpoint of this
    recipe, or if an older version wrote it.
    """
    own = [kept.marker for kept in read_inventory(paths).kept.values()]
    is_path = resume not in ("auto", "none", "latest", "best") and "://" not in resume
    marker = own[-1] if own else _read_marker(Path(resume)) if is_path else None
    if marker is None or marker.fingerprint.get("recipe_digest") != recipe_digest:
        return None
    stated: Mapping[str, Any] | None = marker.fingerprint.get(COMMITS)
    return stated


def describe_rewind(step: int) -> str:
    """The reason to set aside checkpoints newer than the requested one."""
    return f"the run resumes from step {step}"


def look_ahead(
    inventory: Inventory,
    recipe: Recipe,
    recipe_digest: str,
    num_processes: int,
    *,
    divisor: int = 1,
    threads: str | None = None,
    resume: str = "auto",
) -> Choice:
    """The choice of an attempt, judged by markers only; empty if it cannot be known yet.

    `divisor` is `Attempt.micro_batch_divisor` of that attempt, `threads` its OMP_NUM_THREADS (None:
    not known yet), `resume` its `Attempt.resume`. Of checkpoints, reads only the marker of
    a path to resume from.
    """
    is_named = resume not in ("auto", "latest", "best")
    if resume == "none" or "://" in resume:  # remote storage is not queried here
        return Choice()
    if not is_named and all(kept.marker is None for kept in inventory.kept.values()):
        return Choice()
    current = build_resume_fingerprint(
        recipe, recipe_digest, num_processes, divisor, threads=threads
    )
    policy = build_policy(recipe, resume, divisor)
    if is_named:
        # The training process finds any other problem with a path.
        marker = _read_marker(Path(resume))
        if marker is None:
            return Choice()
        found = compare_fingerprints(marker, current)
        return replace(_allow_or_refuse(found, policy), newest_step=found.step)
    # The training process verifies the latest or the best one.
    return choose(inventory, "auto", current, policy)
