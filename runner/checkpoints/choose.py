"""May a checkpoint be continued bit for bit under a launch? Told from its marker, before anything
is started.

The trainer asks the same once more, of the processes and libraries that it really has. Owns no
checksum: whether a checkpoint is whole is the trainer's to find out, and `why`'s.

What each checkpoint of a run is worth to a launch: what the trainer will find, told without
changing anything.

The trainer decides by itself, in `sft/checkpoints`; a test holds this against it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from runner.checkpoints.archive import ArchiveError, extract_archive, load_archived_marker
from runner.checkpoints.marker import (
    Marker,
    find_damage,
    is_step,
    list_archived,
    list_checkpoint_dirs,
    list_committed,
    load_marker,
    read_best_step,
)
from runner.errors import CorruptFileError, RefusedError
from runner.recipe.identity import build_resume_fingerprint, diff_payloads
from runner.recipe.parse import Recipe
from runner.recipe.schema import CheckpointsSection
from runner.run.paths import RunPaths, marker_path

LAUNCH_AS_BEFORE: Final = (
    "launch as before, or start over with `--fresh`, which moves the old run aside"
)
# Follow from the recipe's global batch, the number of processes and `Attempt.micro_batch_divisor`.
_MICRO_BATCH: Final = frozenset(
    {"per_device_train_batch_size", "per_device_eval_batch_size", "gradient_accumulation_steps"}
)


@dataclass(frozen=True)
class Comparison:
    """What a checkpoint was written under, held against a launch."""

    step: int
    differences: tuple[str, ...]  # one line per dotted key; any of them forbids to continue
    # Allowed or not, as the recipe's `launch.on_version_change` says.
    version_changes: tuple[str, ...]

    @property
    def is_only_cut_otherwise(self) -> bool:
        """Whether the same global batch is cut into other micro-batches by as many processes, and
        nothing else.
        """
        return bool(self.differences) and _keys_of(self.differences) <= _MICRO_BATCH


def compare_fingerprints(marker: Marker, current: Mapping[str, Any]) -> Comparison:
    """A checkpoint's marker against `build_resume_fingerprint`; what `current` does not know is not
    compared.
    """
    stored, versions = marker.fingerprint, current["versions"]
    stored_versions = stored.get("versions", {})
    return Comparison(
        marker.step,
        tuple(diff_payloads(_without_versions(stored), _without_versions(current))),
        tuple(
            diff_payloads(
                {name: stored_versions.get(name, "(absent)") for name in versions},
                versions,
                "versions.",
            )
        ),
    )


def refuse_other_fingerprint(marker: Marker, current: Mapping[str, Any], hint: str) -> None:
    """Raises: RefusedError where a checkpoint is of another experiment or launch; versions are left
    to others.
    """
    if differences := compare_fingerprints(marker, current).differences:
        raise RefusedError(describe_obstacles(marker.step, differences), hint=hint)


def refuse_or_warn_of_versions(marker: Marker, current: Mapping[str, Any], recipe: Recipe) -> None:
    """Say in the log that libraries changed since the checkpoint.

    Raises:
        RefusedError: they did, and the recipe forbids it.
    """
    changes = compare_fingerprints(marker, current).version_changes
    if changes and recipe.launch.on_version_change == "refuse":
        raise RefusedError(describe_obstacles(marker.step, changes), hint=suggest_ways_out(changes))
    for line in changes:
        print(
            "warning: resuming under another version, the result may differ in the last bits:"
            f" {line}",
            flush=True,
        )


def look_ahead(
    paths: RunPaths,
    recipe: Recipe,
    recipe_digest: str,
    num_processes: int,
    *,
    divisor: int = 1,
    threads: str | None = None,
    resume: str = "auto",
) -> Comparison | None:
    """What an attempt would go on from, held against its launch; None where it starts at step 0 or
    nobody can tell yet.

    `divisor` is `Attempt.micro_batch_divisor` of that attempt, `threads` its OMP_NUM_THREADS (None:
    not known yet), `resume` its `Attempt.resume`. Reads one marker and no weights.
    """
    marker = _find_marker(paths, resume)
    if marker is None:
        return None
    current = build_resume_fingerprint(
        recipe, recipe_digest, num_processes, divisor, threads=threads
    )
    comparison = compare_fingerprints(marker, current)
    # After running out of memory, a run starts at step 0 in smaller micro-batches: that much is
    # meant.
    is_meant = divisor > 1 and resume in ("auto", "none") and comparison.is_only_cut_otherwise
    return None if is_meant else comparison


def list_obstacles(comparison: Comparison, recipe: Recipe) -> tuple[str, ...]:
    """What forbids to go on from the checkpoint, one line per dotted key."""
    is_strict = recipe.launch.on_version_change == "refuse"
    return comparison.differences + (comparison.version_changes if is_strict else ())


def refuse_to_continue(comparison: Comparison | None, recipe: Recipe) -> None:
    """Raises: RefusedError where `look_ahead` found what forbids the launch."""
    if comparison is not None and (obstacles := list_obstacles(comparison, recipe)):
        raise RefusedError(
            describe_obstacles(comparison.step, obstacles), hint=suggest_ways_out(obstacles)
        )


def describe_obstacles(step: int | None, obstacles: tuple[str, ...]) -> str:
    """Why a checkpoint is not continued."""
    shown = "\n".join(f"  {line}" for line in obstacles)
    return (
        f"the checkpoint of step {step} cannot be continued exactly, something changed"
        f" since:\n{shown}"
    )


def suggest_ways_out(obstacles: tuple[str, ...], command: str = "runner launch RECIPE") -> str:
    """What to do instead: the launch as before where a flag can say it, and a start from scratch.

    >>> print(suggest_ways_out(("num_processes: 2 -> 1",), "runner launch r.yaml"))
    runner launch r.yaml --num-processes 2  # as before
          runner launch r.yaml --fresh  # moves the old run aside and starts anew
    """
    keys, ways = _keys_of(obstacles), []
    others = {key for key in keys if not key.startswith("versions.")}
    if "num_processes" in others and others <= {"num_processes", *_MICRO_BATCH}:
        before = next(line for line in obstacles if line.startswith("num_processes: "))
        ways.append(f"{command} --num-processes {before.split()[1]}  # as before")
    elif others:
        ways.append("change back what is named above")
    if keys > others:
        ways.append(
            "install the versions named above again, or set `launch.on_version_change: warn` in the"
            " recipe"
        )
    return "\n      ".join([*ways, f"{command} --fresh  # moves the old run aside and starts anew"])


def _find_marker(paths: RunPaths, resume: str) -> Marker | None:
    """The marker of what would be continued if it is whole; None for remote storage, which is not
    asked here.
    """
    if resume == "none" or "://" in resume:
        return None
    if resume not in ("auto", "latest", "best"):
        return _load_either(Path(resume))
    for step in sorted({*list_committed(paths), *list_archived(paths)}, reverse=True):
        for path in (paths.checkpoint_dir(step), paths.archive_path(step)):
            if (marker := _load_either(path)) is not None and marker.step == step:
                return marker
    return None


def _load_either(path: Path) -> Marker | None:
    """The marker of a folder or an archive, None for one that cannot be read: the trainer says what
    is wrong.
    """
    try:
        return load_marker(path) if path.is_dir() else load_archived_marker(path)
    except (CorruptFileError, OSError):
        return None


def _without_versions(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fingerprint.items() if key != "versions"}


def _keys_of(lines: tuple[str, ...]) -> set[str]:
    return {line.partition(":")[0] for line in lines}


@dataclass(frozen=True)
class Verdict:
    """One checkpoint: whether an attempt would go on from it, and why or why not."""

    name: str
    is_next: bool
    what: str


@dataclass(frozen=True)
class Outlook:
    """Where the next attempt starts; the newest checkpoint comes first."""

    start_step: int | None  # None: at step 0, or nowhere when it is refused
    is_refused: bool
    verdicts: tuple[Verdict, ...]


def judge_checkpoints(
    paths: RunPaths, checkpoints: CheckpointsSection, current: Mapping[str, Any], divisor: int
) -> Outlook:
    """What an attempt with `resume: auto` finds; `current` is its fingerprint, `divisor` its
    micro-batch divisor.

    Reads every byte of every checkpoint; what is only there as an archive is unpacked elsewhere for
    a moment.
    """
    with tempfile.TemporaryDirectory(prefix="runner-why-") as scratch:
        judge = _Judge(paths, checkpoints, current, divisor, Path(scratch))
        committed, archived = list_committed(paths), list_archived(paths)
        for step in sorted({*committed, *archived}, reverse=True):
            judge.look_at(step)
    for folder in list_checkpoint_dirs(paths):
        if not (is_step(folder.name) and marker_path(folder).exists()):
            judge.add(folder.name, "never finished: an attempt would move it to quarantine")
    return Outlook(judge.start_step, judge.is_refused, tuple(judge.verdicts))


@dataclass
class _Judge:
    paths: RunPaths
    checkpoints: CheckpointsSection
    current: Mapping[str, Any]
    divisor: int
    scratch_dir: Path
    start_step: int | None = None
    is_refused: bool = False
    verdicts: list[Verdict] = field(default_factory=list)
    _opened: dict[int, tuple[Path | None, str]] = field(default_factory=dict)

    def add(self, name: str, what: str, *, is_next: bool = False) -> None:
        self.verdicts.append(Verdict(name, is_next, what))

    def look_at(self, step: int) -> None:
        """The same questions in the same order as `find_resume_step` asks them."""
        name = self.paths.checkpoint_dir(step).name
        folder, how = self._open(step)
        if self.start_step is not None or self.is_refused:
            self.add(name, f"{how if folder else f'damaged: {how}'}; older than what decides")
            return
        if folder is None:
            self.add(name, f"damaged: {how}; an attempt would move it to quarantine")
            return
        marker = load_marker(folder)
        comparison = compare_fingerprints(marker, self.current)
        if comparison.differences and self.divisor > 1 and comparison.is_only_cut_otherwise:
            self.add(
                name,
                f"{how}, in larger micro-batches, which ran out of memory; an attempt would set it"
                " aside",
            )
        elif comparison.differences:
            self.is_refused = True
            self.add(name, f"{how}, but of another launch: {', '.join(comparison.differences)}")
        elif marker.is_stripped:
            self.add(
                name,
                f"{how}, but without optimizer state: its weights can be used, nothing continues"
                " from it",
            )
        elif (lost := self._find_lost_best(folder, step)) is not None:
            self.add(
                name,
                f"{how}, but its best weights, of step {lost}, are lost; an attempt would move it"
                " to quarantine",
            )
        else:
            self.start_step = step
            self.add(name, f"{how}; an attempt would go on from here", is_next=True)

    def _find_lost_best(self, folder: Path, step: int) -> int | None:
        best = read_best_step(folder, self.checkpoints)
        return best if best not in (None, step) and self._open(best or step)[0] is None else None

    def _open(self, step: int) -> tuple[Path | None, str]:
        """A verified folder with the checkpoint, and how it is there; or None, and what is
        wrong.
        """
        if step not in self._opened:
            self._opened[step] = self._verify(step)
        return self._opened[step]

    def _verify(self, step: int) -> tuple[Path | None, str]:
        checkpoint_dir, archive_path = (
            self.paths.checkpoint_dir(step),
            self.paths.archive_path(step),
        )
        damage = (
            find_damage(checkpoint_dir, step)
            if checkpoint_dir.exists()
            else "its folder is missing"
        )
        if damage is None:
            return checkpoint_dir, "whole"
        if not archive_path.exists():
            return None, damage
        target_dir = self.scratch_dir / checkpoint_dir.name
        try:
            if extract_archive(archive_path, target_dir).step == step:
                return target_dir, f"damaged ({damage}), but whole in {archive_path.name}"
            return None, f"{damage}, and {archive_path.name} holds the checkpoint of another step"
        except ArchiveError as error:
            return None, f"{damage}, and {error.message}"
