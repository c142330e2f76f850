"""The marker that makes a checkpoint folder count, and the evaluations recorded in a checkpoint.

Owns how a marker is written, read and compared with the files that it states, and how a run's
checkpoints are listed. Does not decide which of them is used (`choose`) or deleted (`retention`).
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Annotated, Any, Final, Literal

from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
)

from runner.errors import CorruptFileError
from runner.files import (
    MAX_ROWS_BYTES,
    fsync_dir,
    hash_file,
    hash_json,
    load_json,
    write_json_atomic,
)
from runner.recipe.launch_section import CheckpointsSection
from runner.run.paths import STEP_PREFIX, RunPaths, marker_path
from runner.text import format_count

Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]


class FileEntry(BaseModel):
    """Size and content of one file."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    num_bytes: Annotated[int, Field(ge=0)]
    sha256: Sha256


class Marker(BaseModel):
    """`COMMITTED.json`, without the checksum of the marker itself."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)

    step: Annotated[int, Field(ge=0)]
    fingerprint: dict[str, Any]
    files: dict[str, FileEntry]
    # The files that were removed: a stripped checkpoint still holds weights, but no attempt can
    # resume from it.
    stripped_files: list[str] = Field(default_factory=list)

    @field_validator("files", "stripped_files")
    @classmethod
    def _names_stay_inside(cls, names: Any) -> Any:
        for name in names:
            if not is_inner_name(name):
                raise ValueError(f"the file name {name!r} is outside the checkpoint folder")
        return names

    @property
    def is_stripped(self) -> bool:
        """True if optimizer, scheduler and random states have been removed."""
        return bool(self.stripped_files)


def is_inner_name(name: str) -> bool:
    """True if a name is relative, in its shortest form, and stays below the folder it is joined to.

    >>> names = ("a/b.pt", "/a", "a/../b", "a//b", "", "a\\\\b", "COMMITTED.json")
    >>> [is_inner_name(name) for name in names]
    [True, False, False, False, False, False, False]
    """
    path = PurePosixPath(name)
    return (
        name == str(path)
        and name.isprintable()
        and name not in (".", marker_path(Path()).name)
        and len(name) <= 200
        and not path.is_absolute()
        and ".." not in path.parts
        and not any(character in name for character in "\\:")
    )


def write_marker(checkpoint_dir: Path, marker: Marker) -> None:
    """Make the folder count, or replace its marker: completely or not at all, even after a power
    loss.
    """
    content = marker.model_dump(mode="json")
    write_json_atomic(marker_path(checkpoint_dir), content | {"marker_sha256": hash_json(content)})


def load_marker(checkpoint_dir: Path) -> Marker:
    """The marker of a folder.

    Raises:
        CorruptFileError: there is none, or it was changed after it was written.
    """
    path = marker_path(checkpoint_dir)
    return parse_marker(load_json(path), str(path))


def parse_marker(content: Any, where: str) -> Marker:
    """A marker from untrusted parsed JSON.

    Raises:
        CorruptFileError: it is not a marker, or was changed after it was written.
    """
    try:
        stated = dict(content)
        if stated.pop("marker_sha256", None) != hash_json(stated):
            raise CorruptFileError(f"{where} was changed: its checksum does not match")
        return Marker.model_validate(stated)
    except ValidationError as error:
        first = error.errors()[0]
        raise CorruptFileError(f"{where} is not a checkpoint's marker: {first['msg']}") from None
    except (TypeError, ValueError, RecursionError) as error:
        if isinstance(error, CorruptFileError):
            raise
        raise CorruptFileError(f"{where} is not a checkpoint's marker: {error}") from None


def is_intact(checkpoint_dir: Path, step: int | None = None) -> bool:
    """True if the marker is unchanged and every file has the size and checksum that it states."""
    return find_damage(checkpoint_dir, step) is None


def find_damage(checkpoint_dir: Path, step: int | None = None) -> str | None:
    """The problem with the first file that differs from what was committed; None if all are intact.
    Reads every byte.
    """
    try:
        marker = load_marker(checkpoint_dir)
    except CorruptFileError as error:
        return error.message
    if step not in (None, marker.step):  # the folder was copied or renamed
        return f"it is the checkpoint of step {marker.step}"
    for name, stated in marker.files.items():
        path = checkpoint_dir / name
        if not path.is_file():
            return f"{name} is missing"
        if (num_bytes := path.stat().st_size) != stated.num_bytes:
            found = format_count(num_bytes, "byte")
            return f"{name} has {found}, {stated.num_bytes} were committed"
        if hash_file(path) != stated.sha256:
            return f"{name} does not match its committed checksum"
    return None


def build_marker(folder: Path, step: int, fingerprint: Mapping[str, Any]) -> Marker:
    """The marker of a folder as it is now; reads every byte."""
    files = {
        path.relative_to(folder).as_posix(): FileEntry(
            num_bytes=path.stat().st_size, sha256=hash_file(path)
        )
        for path in list_files(folder)
    }
    return Marker(step=step, fingerprint=dict(fingerprint), files=files)


def list_files(folder: Path) -> list[Path]:
    """Every file below a folder, in order."""
    return sorted(path for path in folder.rglob("*") if path.is_file())


def sync_folder(folder: Path) -> None:
    """Make every file below `folder`, and its name, durable against a power loss."""
    for path in list_files(folder):
        with path.open("rb") as stream:
            os.fsync(stream.fileno())
    for path in (folder, *folder.rglob("*")):
        if path.is_dir():
            fsync_dir(path)


def list_committed(paths: RunPaths) -> list[int]:
    """Steps whose checkpoint has a marker, oldest first; contents are not verified."""
    return sorted(
        int(folder.name.removeprefix(STEP_PREFIX))
        for folder in list_checkpoint_dirs(paths)
        if is_step(folder.name) and marker_path(folder).exists()
    )


def list_archived(paths: RunPaths) -> list[int]:
    """Steps that have a ZIP archive, oldest first; contents are not verified."""
    stems = [path.stem for path in paths.checkpoints_dir.glob(f"{STEP_PREFIX}*.zip")]
    return sorted(int(stem.removeprefix(STEP_PREFIX)) for stem in stems if is_step(stem))


def list_checkpoint_dirs(paths: RunPaths) -> list[Path]:
    """Our folders: committed ones, and those that Transformers was writing when it was killed."""
    if not paths.checkpoints_dir.is_dir():
        return []
    return [
        folder
        for folder in paths.checkpoints_dir.iterdir()
        if folder.is_dir() and folder.name.startswith((STEP_PREFIX, "checkpoint-"))
    ]


def list_unfinished(paths: RunPaths) -> list[Path]:
    """Our folders that do not count: without a marker, or still under Transformers' name."""
    return [
        folder
        for folder in list_checkpoint_dirs(paths)
        if not (is_step(folder.name) and marker_path(folder).exists())
    ]


def is_step(name: str) -> bool:
    """True if a name is `step-N`, as we write it."""
    number = name.removeprefix(STEP_PREFIX)
    return name.startswith(STEP_PREFIX) and number.isdecimal() and number == str(int(number))


LogHistory = Sequence[Mapping[str, Any]]
# Same as in `transformers.trainer`, which takes seconds to import.
TRAINER_STATE_NAME: Final = "trainer_state.json"


def list_evaluations(history: LogHistory, metric: str) -> list[tuple[int, float]]:
    """`(step, value)` of every evaluation of trained weights; step 0 (the base model) is left out.

    >>> history = [{"step": 0, "eval_m": 9.0}, {"step": 5, "loss": 1.0}, {"step": 5, "eval_m": 2.0}]
    >>> list_evaluations(history, "m")
    [(5, 2.0)]
    """
    key = f"eval_{metric}"
    return [
        (int(row["step"]), float(row[key])) for row in history if key in row and row["step"] > 0
    ]


def rank_steps(evaluations: Sequence[tuple[int, float]], mode: Literal["min", "max"]) -> list[int]:
    """The evaluated steps, best first; ties go to the earlier step.

    >>> rank_steps([(5, 2.0), (10, 1.0), (15, 1.0)], "min")
    [10, 15, 5]
    """
    sign = 1 if mode == "min" else -1
    return [step for step, value in sorted(evaluations, key=lambda pair: (sign * pair[1], pair[0]))]


def find_best_step(
    evaluations: Sequence[tuple[int, float]], mode: Literal["min", "max"]
) -> int | None:
    """The step of the best value, the earliest among equals; None if nothing was evaluated.

    >>> find_best_step([(5, 2.0), (10, 1.0), (15, 1.0)], "min")
    10
    """
    return next(iter(rank_steps(evaluations, mode)), None)


def read_evaluations(
    checkpoint_dir: Path, checkpoints: CheckpointsSection
) -> list[tuple[int, float]]:
    """The evaluations by the metric of `checkpoints` up to a checkpoint's step, as recorded in the
    checkpoint.
    """
    state = load_json(checkpoint_dir / TRAINER_STATE_NAME, MAX_ROWS_BYTES)
    return list_evaluations(state["log_history"], checkpoints.metric)


def read_best_step(checkpoint_dir: Path, checkpoints: CheckpointsSection) -> int | None:
    """The best step recorded in the checkpoint; None before the first evaluation."""
    return find_best_step(read_evaluations(checkpoint_dir, checkpoints), checkpoints.mode)
