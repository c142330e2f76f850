"""The records in a run directory, typed: recipe, attempts, failures, progress. No intent, no guess.

`run.json` holds the attempts and is written by `launch.run_files`. `plan.status` derives what the
records mean now.
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
# Kinds that happen again when nothing changes: a rerun would only burn device time.
DETERMINISTIC_KINDS: Final[frozenset[FailureKind]] = frozenset(
    {"configuration", "data", "diverged"}
)

# Of several ranks of one attempt, the first of these knows why. Preempted: the launcher ends the
# other ranks by TERM when one has failed, which they take for a request to leave.
_MOST_TELLING: Final[tuple[FailureKind, ...]] = (
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


# How `runner launch` tells a cluster engine why its run ended without a result.
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
    """Why an attempt ended without a result, as the trainer saw it."""

    kind: FailureKind
    message: Shown
    has_lost_peer: bool = False  # what a rank sees when another one has gone: that one knows why
    log_tail: tuple[Shown, ...] = ()  # the last lines of the attempt's log, without secrets


class StopRequest(Fact):
    """`stop`: asks one attempt to checkpoint at the end of its step and to leave; any shell may
    write it.
    """

    attempt: int  # a request to an earlier attempt means nothing to a later one
    why: str
    # The sweep that runs it was itself asked to leave: another one may continue the run at once.
    is_of_its_sweep: bool = False


# shared: the base model is scored once under an output root; own: by each run for itself
AskedBase = Literal["shared", "own"]


class Attempt(Fact):
    """One `accelerate launch` of a run. An attempt without an end was killed together with its
    launcher.
    """

    number: int
    # warm: forked by a worker of the sweep, which comes to what `command` would have started
    started: Literal["cold", "warm"] = "cold"
    started_at_utc: Moment
    ended_at_utc: Moment | None = None
    command: tuple[str, ...]
    environment: dict[str, str]
    num_processes: int
    host: str
    # Consecutive automatic retries so far; 0 if a user started this attempt.
    retry: int = 0
    # What `per_device_*_batch_size` are divided by, after running out of memory.
    micro_batch_divisor: int = Field(default=1, ge=1)
    # The cluster engine's name for what runs this attempt, such as `slurm 17_3`
    cluster_job: str | None = None
    # auto, none (not from remote storage either), latest, best, or a folder, archive or URL
    resume: str = "auto"
    base: AskedBase = "own"  # as attempts did that say nothing of it
    # Trains nothing: writes `model/` of a completed run again, from its best checkpoint.
    is_repair: bool = False
    devices: str | None = None  # CUDA_VISIBLE_DEVICES, None where none was set
    # Runs of its sweep that may share each of the devices at a time (`--per-gpu`).
    runs_per_gpu: int = Field(default=1, ge=1)
    # Of the project; the commit and state of the runner's own files
    # where they lie in a git checkout. Older attempts do not say which runner made them.
    git_commit: str | None = None
    git_is_dirty: bool | None = None
    runner_version: Shown | None = None
    runner_commit: Shown | None = None
    runner_is_dirty: bool | None = None
    source_hash: Shown | None = None  # over the Python files of the runner, wherever they lie
    versions: dict[str, str] = Field(default_factory=dict)
    hardware: dict[str, Shown] = Field(default_factory=dict)  # of the launcher's machine: cpu, gpu
    exit_status: int | None = None
    failure: Failure | None = None

    def measure_seconds(self, until_utc: str | None = None) -> float | None:
        """By the clock, from the start to the end, or to `until_utc` where it has none; None where
        neither is there, or comes before the start: the clock was set back meanwhile.
        """
        end = self.ended_at_utc or until_utc
        if end is None:
            return None
        began, ended = map(datetime.datetime.fromisoformat, (self.started_at_utc, end))
        seconds = (ended - began).total_seconds()
        return seconds if seconds >= 0 else None

    @property
    def is_end_before_start(self) -> bool:
        """True where what is recorded cannot be: nobody knows how long the attempt took."""
        return self.ended_at_utc is not None and self.measure_seconds() is None


class BaseProducer(Fact):
    """The attempt that computed scores of the base model."""

    run: Shown  # grid and name
    attempt: int


class BaseSource(Fact):
    """`base.json` of an attempt: where the scores of the base model came from at step 0."""

    source: AskedBase  # own: computed by this attempt
    key: Shown | None = None  # of the entry
    producer: BaseProducer | None = None  # of what was found, also where it was not taken
    is_kept: bool = False  # for other runs
    why: Shown | None = None  # neither taken from another run nor kept

    def describe(self) -> str:
        """For people: the log and `runner why`.

        >>> BaseSource(source="own", is_kept=True).describe()
        'computed here, and kept for others'
        """
        if self.source == "shared" and self.producer is not None:
            return (
                f"computed by {self.producer.run}, attempt {self.producer.attempt};"
                " rows that were scored again here agree"
            )
        return (
            "computed here, and kept for others" if self.is_kept else f"computed here: {self.why}"
        )


class RunRecord(Fact):
    """`run.json`."""

    attempts: tuple[Attempt, ...] = ()

    @field_validator("attempts")
    @classmethod
    def _ascend(cls, attempts: tuple[Attempt, ...]) -> tuple[Attempt, ...]:
        numbers = [attempt.number for attempt in attempts]
        if numbers != sorted({number for number in numbers if number > 0}):
            raise ValueError("the numbers of the attempts do not ascend from 1")
        return attempts


def list_trained(attempts: Iterable[Attempt]) -> list[Attempt]:
    """The attempts that are part of the training: all but repairs, which may run much later, under
    other versions and on other machines.
    """
    return [attempt for attempt in attempts if not attempt.is_repair]


Commit = Annotated[str, StringConstraints(pattern="^[0-9a-f]{40}$")]

# In a difference, where a dotted key would be.
RULES_KEY: Final = "rules of rows and masks"


class StoredRecipe(Fact):
    """`recipe.json`: the resolved recipe and what its digest was made of."""

    recipe: Recipe
    recipe_digest: str
    contents: dict[str, str]  # relative path -> SHA-256
    rules: Annotated[int, Field(ge=1)] = 1  # `identity.RULES` of the runner that wrote it
    # Dotted key -> commit on the hub that its name stood for when the run was made; not in the
    # digest. What is missing was not recorded.
    commits: dict[Shown, Commit] = Field(default_factory=dict)
    # The folder that its paths are relative to: the way up from the run directory, or the absolute
    # path where that is elsewhere. Older runs do not say.
    project: Shown | None = None

    @property
    def pinned(self) -> Recipe:
        """The recipe as every attempt loads it: each name on the hub at its recorded commit."""
        return pin(self.recipe, self.commits)

    def state_as_before(self, recipe: Recipe) -> Recipe:
        """A recipe of today, with this one's revisions where it states their commits."""
        return state_as_before(recipe, self.recipe, self.commits)

    @property
    def digest_today(self) -> str:
        """The digest of the same recipe and contents under today's rules."""
        is_of_today = self.rules == RULES
        return self.recipe_digest if is_of_today else derive_digest(self.recipe, self.contents)

    def find_other_rules(self) -> list[str]:
        """The line that says so where this version of the runner draws or masks other rows."""
        if self.rules == RULES:
            return []
        return [
            f"{RULES_KEY}: {self.rules} -> {RULES}"
            f" (only a runner of rules {self.rules} can continue it)"
        ]

    def find_other_digest(self) -> list[str]:
        """The line that says so where the recorded digest is not that of what is recorded with it:
        a key cannot be named then.
        """
        derived = derive_digest(self.recipe, self.contents, self.rules)
        if derived == self.recipe_digest:
            return []
        return [
            f"recipe_digest: {self.recipe_digest[:12]} -> {derived[:12]}, and no key differs:"
            " recipe.json was changed by hand, or another version of the runner wrote it"
        ]


class Progress(Fact):
    """`progress.json`: where the trainer stands; drawn by `sweep` and `status`, never decided
    upon.
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
# First words of phases that wait for a compiler, a network or another process: no sign of life
# comes from there, and none is missed for a while.
_SILENT_PHASES: Final = ("compiling", "downloading", "uploading", "waiting")


def is_silent_phase(phase: str) -> bool:
    """Whether no sign of life is to be expected during a phase.

    >>> is_silent_phase("compiling DeepSpeed's extension"), is_silent_phase("training")
    (True, False)
    """
    return phase.startswith(_SILENT_PHASES)


def describe_phase(
    phase: str, began_at_utc: str | None, at_utc: str, silent_seconds: float | None = None
) -> str:
    """A phase for people, with how long it has lasted: steps tell that of training.

    `silent_seconds` since the last sign of life are told instead where one is missed.

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
    except (TypeError, ValueError):  # a record that somebody else wrote
        return phase
    return phase if seconds < _LONG_PHASE_SECONDS else f"{phase}, {format_seconds(seconds)}"


class SubmissionRecord(Fact):
    """`submission.json`: which run is which task of an array. Without a job, the submission may
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
    """Replace `run.json`; only the holder of the lease may."""
    write_json_atomic(paths.record_path, record.model_dump(mode="json"))


def load_failure(files: AttemptPaths) -> Failure | None:
    """What the trainer wrote about the failure of an attempt, or None; the most telling of what its
    ranks wrote.

    Which one was written first does not count: a rank may see another one go before that one has
    said why.
    """
    found = [load_fact(path, Failure) for path in files.list_failure_paths()]
    return min(
        (failure for failure in found if failure is not None),
        key=lambda failure: (failure.has_lost_peer, _MOST_TELLING.index(failure.kind)),
        default=None,
    )


def load_base_source(files: AttemptPaths) -> BaseSource | None:
    """Where an attempt has its scores of the base model from; None where it has not come so far,
    and for a file that cannot be read.
    """
    try:
        return load_fact(files.base_path, BaseSource)
    except (CorruptFileError, OSError):
        return None


def load_stop_request(paths: RunPaths) -> StopRequest | None:
    """What somebody asked the running attempt for; None also for a file that cannot be read."""
    try:
        return load_fact(paths.stop_path, StopRequest)
    except (CorruptFileError, OSError):
        return None


def load_progress(path: Path) -> Progress | None:
    """Where an attempt stands; None before its first step, and for a file that a power loss cut
    off.
    """
    try:
        return load_fact(path, Progress)
    except CorruptFileError:
        return None


class PushRecord(Fact):
    """`push.json`: the last push to the hub that was asked for."""

    state: Literal["pending", "pushed", "failed"]
    repo_id: Shown
    # Of the names and contents of what is sent; None: it was not looked at.
    files_sha256: Annotated[str, Field(pattern="^[0-9a-f]{64}$")] | None = None
    commit: Shown | None = None  # that holds the files, once they are pushed
    failure: Shown | None = None  # without secrets


def load_push(paths: RunPaths) -> PushRecord | None:
    """The last push that was asked for; None where there was none."""
    return load_fact(paths.push_path, PushRecord)


def write_push(paths: RunPaths, record: PushRecord) -> None:
    """Replace `push.json`; only the holder of the lock beside it may."""
    write_json_atomic(paths.push_path, record.model_dump(mode="json"))


# By number, a backspace, a form feed, a carriage return.
_SPELLED_CONTROL: Final = re.compile(r"\\[ubfr]")


def load_stored_recipe(paths: RunPaths) -> StoredRecipe | None:
    """The recipe that the run directory was made for, or None while there is none.

    It is shown in terminals as others are, and may come from somebody who has not read it with
    `parse_recipe`.
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
            f"{paths.recipe_path} holds the character {character}, which no recipe may"
        )
    return stored


def _is_surely_shown(content: bytes) -> bool:
    """True where no text in a JSON file holds a control character: none is there, and none is
    spelled by an escape.
    """
    text = content.decode(errors="surrogateescape")
    return CONTROLS.search(text) is None and _SPELLED_CONTROL.search(text) is None
