"""The typed records in a run directory: recipe, attempts, failures, progress. No intentions, no
guesses.

`run.json` holds the attempts and is written by `launch.run_files`. `plan.status` derives the
current status from the records.
"""

from __future__ import annotations

import datetime
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Annotated, Final, Literal

from pydantic import (
    Field,
    StringConstraints,
    field_validator,
)

from runner.errors import CONTROLS, CorruptFileError
from runner.files import read_plain, write_json_atomic
from runner.recipe.hub import pin, state_as_before
from runner.recipe.identity import RULES, derive_digest
from runner.recipe.parse import Recipe
from runner.run.fact import Fact, Moment, Shown, load_fact, parse_fact
from runner.run.paths import AttemptPaths, RunPaths
from runner.strict import list_texts
from runner.text import format_seconds

FailureKind = Literal[
    "configuration",
    "data",
    "out_of_memory",
    "diverged",
    "preempted",
    "transient",
    "crashed",
    "lost",
    "stalled",
]
# Kinds that recur if nothing changes: a rerun would only waste device time.
DETERMINISTIC_KINDS: Final[frozenset[FailureKind]] = frozenset(
    {"configuration", "data", "diverged"}
)

# Among several ranks of one attempt, the first kind in this list knows the cause. Preempted: when
# one rank has failed, the launcher ends the others with TERM, which they understand as a request to
# stop.
_MOST_INFORMATIVE: Final[tuple[FailureKind, ...]] = (
    "diverged",
    "data",
    "configuration",
    "out_of_memory",
    "transient",
    "crashed",
    "preempted",
    "stalled",
    "lost",
)


# Exit codes by which `runner launch` reports to a cluster engine why its run ended without a
# result.
EXIT_CODES: Final[Mapping[FailureKind, int]] = {
    "configuration": 10,
    "data": 10,
    "out_of_memory": 11,
    "diverged": 12,
    "preempted": 13,
    "transient": 14,
    "lost": 14,
    "stalled": 14,
    "crashed": 1,
}


class Failure(Fact):
    """The reason why an attempt ended without a result, as the training process saw it."""

    kind: FailureKind
    message: Shown
    has_lost_peer: bool = False  # another rank had gone: that one knows the cause
    log_tail: tuple[Shown, ...] = ()  # the last lines of the attempt's log, without secrets


class StopRequest(Fact):
    """`stop`: a request to one attempt to save a checkpoint at the end of its step and stop; any
    shell may write it.
    """

    attempt: int  # later attempts ignore it
    why: str
    # The sweep that runs it was itself asked to stop: another sweep may resume the run
    # immediately.
    is_of_its_sweep: bool = False


# shared: the base model is scored once under an output root; own: each run scores it
AskedBase = Literal["shared", "own"]


class Attempt(Fact):
    """One `accelerate launch` of a run. An attempt without an end was killed together with its
    launcher.
    """

    number: int
    # warm: forked by a worker of the sweep, with the same outcome as starting `command`
    started: Literal["cold", "warm"] = "cold"
    started_at_utc: Moment
    ended_at_utc: Moment | None = None
    command: tuple[str, ...]
    environment: dict[str, str]
    num_processes: int
    host: str
    # Consecutive automatic retries so far; 0 if a user started this attempt.
    retry: int = 0
    # Divisor of `per_device_*_batch_size` after running out of memory.
    micro_batch_divisor: int = Field(default=1, ge=1)
    # The cluster engine's name for the job of this attempt, such as `slurm 17_3`
    cluster_job: str | None = None
    # auto, none (not from remote storage either), latest, best, or a folder, archive or URL
    resume: str = "auto"
    base: AskedBase = "own"  # the behavior of older attempts, which do not record it
    # Trains nothing: writes `model/` of a completed run again, from its best checkpoint.
    is_repair: bool = False
    devices: str | None = None  # CUDA_VISIBLE_DEVICES, None if it was not set
    # Number of runs of its sweep that may share a device at a time (`--per-gpu`).
    runs_per_gpu: int = Field(default=1, ge=1)
    # Of the project; then the commit and state of the runner's own files if they are in a git
    # checkout. Older attempts do not record which runner started them.
    git_commit: str | None = None
    git_is_dirty: bool | None = None
    runner_version: Shown | None = None
    runner_commit: Shown | None = None
    runner_is_dirty: bool | None = None
    source_hash: Shown | None = None  # over the runner's Python files, wherever they are
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Shown] = Field(default_factory=dict)  # of the launcher's machine: cpu, gpu
    exit_status: int | None = None
    failure: Failure | None = None

    def measure_seconds(self, until_utc: str | None = None) -> float | None:
        """Wall-clock seconds from the start to the end, or to `until_utc` if there is no end. None
        if neither is known, or if it comes before the start because the clock was set back.
        """
        end = self.ended_at_utc or until_utc
        if end is None:
            return None
        began, ended = map(datetime.datetime.fromisoformat, (self.started_at_utc, end))
        seconds = (ended - began).total_seconds()
        return seconds if seconds >= 0 else None

    @property
    def is_end_before_start(self) -> bool:
        """True if the recorded times are impossible, so the attempt's duration is unknown."""
        return self.ended_at_utc is not None and self.measure_seconds() is None


class BaseProducer(Fact):
    """The attempt that computed base scores."""

    run: Shown  # grid and name
    attempt: int


class BaseSource(Fact):
    """`base.json` of an attempt: the source of the base scores at step 0."""

    source: AskedBase  # own: computed by this attempt
    key: Shown | None = None  # of the entry
    producer: BaseProducer | None = None  # of the scores that were found, used or not
    is_kept: bool = False  # for other runs
    why: Shown | None = None  # why they were neither reused from another run nor kept

    def describe(self) -> str:
        """A phrase for the log and `runner why`.

        >>> BaseSource(source="own", is_kept=True).describe()
        'computed here and kept for others'
        """
        if self.source == "shared" and self.producer is not None:
            return (
                f"computed by {self.producer.run}, attempt {self.producer.attempt};"
                " rows scored again here agree"
            )
        return "computed here and kept for others" if self.is_kept else f"computed here: {self.why}"


class RunRecord(Fact):
    """`run.json`."""

    attempts: tuple[Attempt, ...] = ()

    @field_validator("attempts")
    @classmethod
    def _ascend(cls, attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
        numbers = [attempt.number for attempt in attempts]
        if numbers != sorted({number for number in numbers if number > 0}):
            raise ValueError("the attempt numbers do not ascend from 1")
        return attempts


def list_trained(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The attempts that are part of the training: all except repairs, which may run much later,
    under other versions and on other machines.
    """
    return [attempt for attempt in attempts if not attempt.is_repair]


Commit = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]

# Takes the place of a dotted key in a difference.
RULES_KEY: Final = "rules of rows and masks"


class StoredRecipe(Fact):
    """`recipe.json`: the resolved recipe and the inputs of its digest."""

    recipe: Recipe
    recipe_digest: str
    contents: dict[str, str]  # relative path -> SHA-256
    rules: Annotated[int, Field(ge=1)] = 1  # `identity.RULES` of the runner that wrote it
    # Dotted key -> commit on the hub that its name referred to when the run was made; not in the
    # digest. A missing key was not recorded.
    commits: dict[Shown, Commit] = Field(default_factory=dict)
    # The folder that its paths are relative to: the way up from the run directory, or the absolute
    # path if it is elsewhere. Older runs do not record it.
    project: Shown | None = None

    @property
    def pinned(self) -> Recipe:
        """The recipe as every attempt loads it: each name on the hub at its recorded commit."""
        return pin(self.recipe, self.commits)

    def state_as_before(self, recipe: Recipe) -> Recipe:
        """A current recipe, with this one's revisions where it states their commits."""
        return state_as_before(recipe, self.recipe, self.commits)

    @property
    def current_digest(self) -> str:
        """The digest of the same recipe and contents under today's rules."""
        is_current = self.rules == RULES
        return self.recipe_digest if is_current else derive_digest(self.recipe, self.contents)

    def find_other_rules(self) -> list[str]:
        """The line to report if this version of the runner draws or masks rows differently."""
        if self.rules == RULES:
            return []
        return [
            f"{RULES_KEY}: {self.rules} -> {RULES}"
            f" (only a runner with rules {self.rules} can resume it)"
        ]

    def find_other_digest(self) -> list[str]:
        """The line to report if the recorded digest does not match the records next to it; no key
        can be named then.
        """
        derived = derive_digest(self.recipe, self.contents, self.rules)
        if derived == self.recipe_digest:
            return []
        return [
            f"recipe_digest: {self.recipe_digest[:12]} -> {derived[:12]}, but no key differs:"
            " recipe.json was changed by hand, or another version of the runner wrote it"
        ]


class Progress(Fact):
    """`progress.json`: the training process's progress; shown by `sweep` and `status`, never used
    for decisions.
    """

    phase: Shown
    phase_began_at_utc: Shown | None = None  # absent in older records
    step: int = 0
    max_steps: int | None = None
    loss: float | None = None
    tokens_per_second: float | None = None  # of the last step
    # By the clock, since this attempt began to train; evaluations count.
    seconds_per_step: float | None = None


_LONG_PHASE_SECONDS: Final = 5.0  # shorter ones come and go
_LONG_SILENCE_SECONDS: Final = 60.0
# First words of phases that wait for a compiler, a network or another process: they give no sign of
# life, and none is expected for a while.
_SILENT_PHASES: Final = ("compiling", "downloading", "uploading", "waiting")


def is_silent_phase(phase: str) -> bool:
    """True if no sign of life is expected during a phase.

    >>> is_silent_phase("compiling DeepSpeed's extension"), is_silent_phase("training")
    (True, False)
    """
    return phase.startswith(_SILENT_PHASES)


def describe_phase(
    phase: str, began_at_utc: str | None, at_utc: str, silent_seconds: float | None = None
) -> str:
    """A description of a phase, with its duration; the training phase has steps instead.

    If a sign of life is overdue, the `silent_seconds` since the last one are shown instead.

    >>> describe_phase("saving", "2026-01-01T00:00:00+00:00", "2026-01-01T00:00:40+00:00")
    'saving, 40 s'
    >>> describe_phase("training", None, "2026-01-01T00:00:40+00:00", 240)
    'training, no progress for 4 min'
    """
    is_missed = silent_seconds is not None and silent_seconds >= _LONG_SILENCE_SECONDS
    if silent_seconds is not None and is_missed and not is_silent_phase(phase):
        return f"{phase}, no progress for {format_seconds(silent_seconds)}"
    if phase == "training" or began_at_utc is None:
        return phase
    try:
        began, now = map(datetime.datetime.fromisoformat, (began_at_utc, at_utc))
        seconds = (now - began).total_seconds()
    except (TypeError, ValueError):  # a record from another source
        return phase
    return phase if seconds < _LONG_PHASE_SECONDS else f"{phase}, {format_seconds(seconds)}"


class SubmissionRecord(Fact):
    """`submission.json`: the run of each task of an array. If it has no job, the submission may
    have been killed.
    """

    submitted_at_utc: str
    runs: tuple[str, ...]  # grid and run name, by array index
    job: str | None = None
    project: str | None = None  # as in `recipe.json`, from the folder of the submission


def now_utc() -> str:
    """ISO 8601, whole seconds, UTC."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def load_record(paths: RunPaths) -> RunRecord:
    """The attempts so far."""
    return load_fact(paths.record_path, RunRecord) or RunRecord()


def write_record(paths: RunPaths, record: RunRecord) -> None:
    """Replace `run.json`; only for the holder of the lease."""
    write_json_atomic(paths.record_path, record.model_dump(mode="json"))


def load_failure(files: AttemptPaths) -> Failure | None:
    """The failure that the ranks of an attempt recorded, or None; the most informative one.

    The order of writing does not count: a rank may see another one disappear before that one has
    recorded its reason.
    """
    found = [load_fact(path, Failure) for path in files.list_failure_paths()]
    return min(
        (failure for failure in found if failure is not None),
        key=lambda failure: (failure.has_lost_peer, _MOST_INFORMATIVE.index(failure.kind)),
        default=None,
    )


def load_base_source(files: AttemptPaths) -> BaseSource | None:
    """The source of an attempt's base scores; None if the attempt did not get that far, or if the
    file cannot be read.
    """
    try:
        return load_fact(files.base_path, BaseSource)
    except (CorruptFileError, OSError):
        return None


def load_stop_request(paths: RunPaths) -> StopRequest | None:
    """The request to the running attempt; None also if the file cannot be read."""
    try:
        return load_fact(paths.stop_path, StopRequest)
    except (CorruptFileError, OSError):
        return None


def load_progress(path: Path) -> Progress | None:
    """An attempt's progress; None before its first step, or if a power loss cut off the file."""
    try:
        return load_fact(path, Progress)
    except CorruptFileError:
        return None


class PushRecord(Fact):
    """`push.json`: the last requested push to the hub."""

    state: Literal["pending", "pushed", "failed"]
    repo_id: Shown
    # Of the names and contents of the files sent; None: not computed.
    files_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    commit: Shown | None = None  # that holds the files, once they are pushed
    failure: Shown | None = None  # without secrets


def load_push(paths: RunPaths) -> PushRecord | None:
    """The last requested push; None if there was none."""
    return load_fact(paths.push_path, PushRecord)


def write_push(paths: RunPaths, record: PushRecord) -> None:
    """Replace `push.json`; only for the holder of the lock next to it."""
    write_json_atomic(paths.push_path, record.model_dump(mode="json"))


# Escapes: by number, a backspace, a form feed, a carriage return.
_SPELLED_CONTROL: Final = re.compile(r"\\[ubfr]")


def load_stored_recipe(paths: RunPaths) -> StoredRecipe | None:
    """The recipe that the run directory was made for, or None if there is none.

    It is shown in terminals like any other recipe, and may come from a source that did not read it
    with `parse_recipe`.
    """
    content = read_plain(paths.recipe_path)
    if content is None:
        return None
    stored = parse_fact(content, paths.recipe_path, StoredRecipe)
    if _is_surely_shown(content):
        return stored
    texts = list_texts(stored.recipe.model_dump(mode="json"))
    if control := CONTROLS.search("\n".join(texts)):
        character = ascii(control[0])[1:-1]
        raise CorruptFileError(
            f"{paths.recipe_path} contains the character {character}, which recipes may not contain"
        )
    return stored


def _is_surely_shown(content: bytes) -> bool:
    """True if no text in a JSON file contains a control character, either directly or as an
    escape.
    """
    text = content.decode(errors="surrogateescape")
    return CONTROLS.search(text) is None and _SPELLED_CONTROL.search(text) is None
