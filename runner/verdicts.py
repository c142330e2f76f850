"""What each checkpoint of a run is worth to a launch: what the trainer will find, told without changing anything.

The trainer decides by itself, in `sft/checkpoints`; a test holds this against it.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from runner.archives import ArchiveError, extract_archive
from runner.continuation import compare_fingerprints
from runner.evaluations import read_best_step
from runner.markers import find_damage, is_step, list_archived, list_checkpoint_dirs, list_committed, load_marker
from runner.paths import RunPaths, marker_path
from runner.recipe_sections import CheckpointsSection


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
    """What an attempt with `resume: auto` finds; `current` is its fingerprint, `divisor` its micro-batch divisor.

    Reads every byte of every checkpoint; what is only there as an archive is unpacked elsewhere for a moment.
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
            self.add(name, f"{how}, in larger micro-batches, which ran out of memory; an attempt would set it aside")
        elif comparison.differences:
            self.is_refused = True
            self.add(name, f"{how}, but of another launch: {', '.join(comparison.differences)}")
        elif marker.is_stripped:
            self.add(name, f"{how}, but without optimizer state: its weights can be used, nothing continues from it")
        elif (lost := self._find_lost_best(folder, step)) is not None:
            self.add(
                name,
                f"{how}, but its best weights, of step {lost}, are lost; an attempt would move it to quarantine",
            )
        else:
            self.start_step = step
            self.add(name, f"{how}; an attempt would go on from here", is_next=True)

    def _find_lost_best(self, folder: Path, step: int) -> int | None:
        best = read_best_step(folder, self.checkpoints)
        return best if best not in (None, step) and self._open(best or step)[0] is None else None

    def _open(self, step: int) -> tuple[Path | None, str]:
        """A verified folder with the checkpoint, and how it is there; or None, and what is wrong."""
        if step not in self._opened:
            self._opened[step] = self._verify(step)
        return self._opened[step]

    def _verify(self, step: int) -> tuple[Path | None, str]:
        checkpoint_dir, archive_path = self.paths.checkpoint_dir(step), self.paths.archive_path(step)
        damage = find_damage(checkpoint_dir, step) if checkpoint_dir.exists() else "its folder is missing"
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
