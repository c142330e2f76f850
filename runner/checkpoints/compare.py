"""Compares a checkpoint's marker with a launch: can it be resumed bit for bit?

Owns the wording of differences and remedies. `choose` decides which checkpoint is compared.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Final

from runner.checkpoints.marker import Marker
from runner.errors import RefusedError
from runner.recipe.identity import diff_payloads

LAUNCH_AS_BEFORE: Final = (
    "launch as before, or start over with `--fresh`, which moves the old run aside"
)
# The commits at which hub names were loaded, by dotted key. Not part of `build_resume_fingerprint`:
# they are unknown when looking ahead, and older checkpoints do not record them.
COMMITS: Final = "commits"
_SAME_COMMITS: Final = (
    "copy the checkpoint's folder or ZIP file here, and launch with `--resume PATH` (and `--fresh`"
    " if the run has other checkpoints): that loads the commits recorded in the checkpoint"
)
# Derived from the recipe's global batch, the number of processes and `Attempt.micro_batch_divisor`.
_MICRO_BATCH: Final = frozenset(
    {
        "per_device_train_batch_size",
        "per_device_eval_batch_size",
        "generation_batch_size",
        "gradient_accumulation_steps",
    }
)


class UnusableError(RefusedError):
    """A checkpoint of this run that no attempt can resume from; an older one may still be
    usable.
    """


class OtherMicroBatchError(RefusedError):
    """A checkpoint of this run with a different micro-batch."""


@dataclass(frozen=True)
class Comparison:
    """The fingerprint of a checkpoint compared with that of a launch."""

    step: int
    differences: tuple[str, ...]  # one line per dotted key; any of them prevents resuming
    # Allowed or not, depending on the recipe's `launch.on_version_change`.
    version_changes: tuple[str, ...]


def compare_fingerprints(marker: Marker, current: Mapping[str, Any]) -> Comparison:
    """Compare a checkpoint's marker with `build_resume_fingerprint`; keys missing in `current` are
    not compared.
    """
    stored, versions = marker.fingerprint, current["versions"]
    stored_versions = stored.get("versions", {})
    return Comparison(
        marker.step,
        (
            *diff_payloads(_without_versions(stored), _without_versions(current)),
            *_find_other_commits(stored, current),
        ),
        tuple(
            diff_payloads(
                {name: stored_versions.get(name, "(absent)") for name in versions},
                versions,
                "versions.",
            )
        ),
    )


def _find_other_commits(stored: Mapping[str, Any], current: Mapping[str, Any]) -> list[str]:
    """One line for each name that the checkpoint was trained on at a commit that this launch does
    not load. Names that the checkpoint does not record are not compared, nor is any name if the
    commits of the launch are unknown.
    """
    before, now = stored.get(COMMITS) or {}, current.get(COMMITS)
    if now is None:
        return []
    now = {key: now.get(key, "(not recorded)") for key in before}
    return diff_payloads(before, now, f"{COMMITS}.")


def refuse_other_fingerprint(marker: Marker, current: Mapping[str, Any], hint: str) -> None:
    """Raises: RefusedError if a checkpoint belongs to a different experiment or launch; versions
    are checked elsewhere.
    """
    if differences := compare_fingerprints(marker, current).differences:
        are_commits = all(line.startswith(f"{COMMITS}.") for line in differences)
        hint = _SAME_COMMITS if are_commits else hint
        raise RefusedError(describe_obstacles(marker.step, differences), hint=hint)


def has_other_micro_batch(marker: Marker, fingerprint: Mapping[str, Any]) -> bool:
    """True if a checkpoint was written with another number of sequences per process and forward
    pass.
    """
    key = "per_device_train_batch_size"
    return marker.fingerprint.get(key) != fingerprint.get(key)


def require_resumable(marker: Marker, fingerprint: Mapping[str, Any], hint: str) -> None:
    """Raises: RefusedError if a launch cannot resume a checkpoint, for any reason."""
    try:
        refuse_other_fingerprint(marker, fingerprint, hint)
    except RefusedError as error:
        kind = OtherMicroBatchError if has_other_micro_batch(marker, fingerprint) else RefusedError
        raise kind(error.message, hint=error.hint) from None
    if marker.is_stripped:
        raise UnusableError(
            f"the checkpoint of step {marker.step} was stripped"
            " of its optimizer state and cannot be resumed",
            hint="with `checkpoints.save_optimizer: true` every checkpoint can be resumed",
        )


def describe_obstacles(step: int | None, obstacles: tuple[str, ...]) -> str:
    """The reason why a checkpoint is not resumed."""
    shown = "\n".join(f"  {line}" for line in obstacles)
    return (
        f"the checkpoint of step {step} cannot be resumed exactly,"
        f" because these changed since:\n{shown}"
    )


def suggest_alternatives(obstacles: tuple[str, ...], command: str = "runner launch RECIPE") -> str:
    """The remedies: the same launch as before if a flag can express it, and a start from step 0.

    >>> print(suggest_alternatives(("num_processes: 2 -> 1",), "runner launch r.yaml"))
    runner launch r.yaml --num-processes 2  # as before
          runner launch r.yaml --fresh  # moves the old run aside and starts from step 0
    """
    keys, ways = _keys_of(obstacles), []
    others = {key for key in keys if not key.startswith("versions.")}
    if "num_processes" in others and others <= {"num_processes", *_MICRO_BATCH}:
        before = next(line for line in obstacles if line.startswith("num_processes: "))
        ways.append(f"{command} --num-processes {before.split()[1]}  # as before")
    elif others and all(key.startswith(f"{COMMITS}.") for key in others):
        ways.append(_SAME_COMMITS)
    elif others:
        ways.append("change the keys named above back")
    if keys > others:
        ways.append(
            "install the versions named above again,"
            " or set `launch.on_version_change: warn` in the recipe"
        )
    return "\n      ".join(
        [*ways, f"{command} --fresh  # moves the old run aside and starts from step 0"]
    )


def _without_versions(fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    apart = ("versions", COMMITS)
    return {key: value for key, value in fingerprint.items() if key not in apart}


def _keys_of(lines: tuple[str, ...]) -> set[str]:
    return {line.partition(":")[0] for line in lines}
