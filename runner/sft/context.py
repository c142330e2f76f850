"""One run as this process sees it: its recipe, its files, the rank of the process and the current
phase.
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

import yaml
from accelerate import PartialState
from accelerate.utils import broadcast_object_list

from runner.checkpoints.compare import COMMITS
from runner.checkpoints.remote import Uploader, open_run_folder
from runner.errors import RefusedError, RunnerError
from runner.files import write_json_atomic, write_json_unsynced
from runner.recipe.identity import build_resume_fingerprint
from runner.recipe.parse import Recipe
from runner.run.allowed_code import load_code, suggest_allowing
from runner.run.paths import AttemptPaths, RunPaths, find_output_root
from runner.run.record import (
    AskedBase,
    Progress,
    list_trained,
    load_progress,
    load_record,
    load_stored_recipe,
    now_utc,
)
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace
from runner.text import format_count

Result = TypeVar("Result")


@dataclass
class RunContext:
    """One run in one process. Only the main process writes; every rank reads the same recipe."""

    recipe: Recipe  # `StoredRecipe.pinned`
    recipe_digest: str
    paths: RunPaths
    attempt: AttemptPaths
    place: WorldPlace
    resume: str  # `Attempt.resume`
    micro_batch_divisor: int  # `Attempt.micro_batch_divisor`
    preemption: Preemption
    contents: Mapping[str, str] = field(default_factory=dict)  # `StoredRecipe.contents`
    base: AskedBase = "shared"  # `Attempt.base`
    is_repair: bool = False  # `Attempt.is_repair`
    commits: Mapping[str, str] = field(default_factory=dict)  # `StoredRecipe.commits`
    uploader: Uploader | None = None  # on the main process, if the recipe names remote storage
    _opened_at: float = field(default_factory=time.perf_counter)
    _phase_seconds: dict[str, float] = field(default_factory=dict)
    _phase: str | None = None
    _phase_began: float = 0.0
    _progress: Progress = field(default_factory=lambda: Progress(phase="starting"))
    _last_progress_at: float = 0.0
    _last_sign_at: float = 0.0

    @classmethod
    def open(cls, run_dir: Path, place: WorldPlace, preemption: Preemption) -> RunContext:
        """Read the recipe, and check it against its digest and the number of processes that were
        actually started.

        Raises:
            RefusedError: the run directory is incomplete, or the launch does not match it.
        """
        paths = RunPaths(run_dir)
        stored, record = load_stored_recipe(paths), load_record(paths)
        if stored is None or not record.attempts:
            raise RefusedError(
                f"{run_dir} is not a run directory: it needs recipe.json and run.json",
                hint=(
                    "create the run with `runner launch RECIPE`"
                    " (add `--prepare` to start it by hand)"
                ),
            )
        attempt = record.attempts[-1]
        # Rows do not matter to a repair: `model/` ends up as it was recorded, or is left alone.
        differences = [] if attempt.is_repair else stored.find_other_rules()
        if differences := differences + stored.find_other_digest():
            shown = "\n".join(f"  {line}" for line in differences)
            raise RefusedError(
                f"{paths.recipe_path} differs from what this version of the runner would train:"
                f"\n{shown}",
                hint="start the run with `runner launch`, which lists the alternatives",
            )
        output_root = find_output_root(run_dir)
        allow = suggest_allowing([str(run_dir)], output_root)
        recipe = load_code(stored.pinned, output_root, allow, stored.contents)
        if place.world_size != attempt.num_processes:
            raise RefusedError(
                f"this attempt has {format_count(place.world_size, 'process')},"
                f" expected {attempt.num_processes}",
                hint=(
                    f"check that {recipe.launch.accelerate_config} starts several processes; "
                    "accelerate_configs/cpu.yaml and single_gpu.yaml start one"
                ),
            )
        context = cls(
            recipe,
            stored.recipe_digest,
            paths,
            paths.attempt(attempt.number),
            place,
            attempt.resume,
            attempt.micro_batch_divisor,
            preemption,
            stored.contents,
            attempt.base,
            attempt.is_repair,
            stored.commits,
        )
        if attempt.is_repair:  # keep showing the step and the loss of the training
            trained = [paths.attempt(one.number) for one in list_trained(record.attempts)]
            before = load_progress(trained[-1].progress_path) if trained else None
            context._progress = before or context._progress
        return context

    @property
    def num_processes(self) -> int:
        """Number of processes of the attempt, on all machines."""
        return self.place.world_size

    @property
    def is_main(self) -> bool:
        """True in the one process that writes."""
        return self.place.rank == 0

    @property
    def fingerprint(self) -> dict[str, Any]:
        """The facts that must be equal for a run to resume from a checkpoint."""
        fingerprint = build_resume_fingerprint(
            self.recipe,
            self.recipe_digest,
            self.num_processes,
            self.micro_batch_divisor,
            threads=os.environ.get("OMP_NUM_THREADS", "unset"),
        )
        return {**fingerprint, COMMITS: dict(self.commits)}

    def open_uploader(self) -> None:
        """Open the remote storage if the recipe names one; only the main process does.

        Raises:
            RefusedError: its protocol is unknown, or the package behind it is not installed.
        """
        folder, remote = open_run_folder(self.recipe), self.recipe.checkpoints.remote
        if folder is not None and remote is not None:
            self.uploader = Uploader(folder, remote, self.recipe_digest, self.paths, self.attempt)

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Show a phase in `progress.json`, and add its seconds to `timing.json`, without those of
        nested phases.
        """
        outer = self._phase
        self.enter_phase(name)
        try:
            yield
        finally:
            if outer is None:
                self._count_phase()
                self._phase = None
            else:
                with contextlib.suppress(OSError):  # an error raised inside says more
                    self.enter_phase(outer)

    def enter_phase(self, name: str) -> None:
        """Enter a phase as `phase` does, until the outer one ends or another one is entered."""
        if name == self._phase:
            return
        self._count_phase()
        self._phase, self._phase_began = name, time.perf_counter()
        begun = {"phase": name, "phase_began_at_utc": now_utc()}
        self.report_progress(self._progress.model_copy(update=begun), is_forced=True)

    def show_in_phase(self, detail: str) -> None:
        """Show the progress of the phase; also a sign of life."""
        shown = f"{self._phase}, {detail}"
        self.report_progress(self._progress.model_copy(update={"phase": shown}))

    def _count_phase(self) -> None:
        if self._phase is not None:
            seconds = time.perf_counter() - self._phase_began
            self._phase_seconds[self._phase] = self._phase_seconds.get(self._phase, 0.0) + seconds

    def report_progress(self, progress: Progress, *, is_forced: bool = False) -> None:
        """Write `progress.json`, at most five times a second."""
        began = {"phase_began_at_utc": self._progress.phase_began_at_utc}
        if progress.phase_began_at_utc is None:
            progress = progress.model_copy(update=began)
        self._progress, now = progress, time.monotonic()
        if self.is_main and (is_forced or now - self._last_progress_at > 0.2):
            self._last_progress_at = now
            write_json_unsynced(self.attempt.progress_path, progress.model_dump())

    def sign_of_life(self) -> None:
        """Touch `progress.json`, at most once a second, to show that this attempt is working.
        The work itself calls this, because a thread would continue while the work hangs.
        """
        now = time.monotonic()
        if self.is_main and now - self._last_sign_at > 1.0:
            self._last_sign_at = now
            with contextlib.suppress(OSError):  # the file may be gone, to make room on a full disk
                os.utime(self.attempt.progress_path)

    def write_timing(self, num_steps: int, tokens_per_second: float) -> None:
        """Write `timing.json`: the seconds of this attempt and of its phases, and its speed."""
        if self.is_main:
            seconds = {name: round(value, 3) for name, value in self._phase_seconds.items()}
            timing = {
                "phase_seconds": seconds,
                "num_steps": num_steps,
                "total_seconds": round(time.perf_counter() - self._opened_at, 3),
                "tokens_per_second": round(tokens_per_second, 1),
            }
            write_json_atomic(self.attempt.timing_path, timing)

    def on_main(self, function: Callable[[], Result]) -> Result:
        """Call `function` on the main process; every rank returns its result, or raises its
        error.
        """
        outcome: list[Any] = [None, None]
        if self.is_main:
            try:
                outcome[0] = function()
            except RunnerError as error:
                outcome[1] = error
        if self.num_processes > 1:
            PartialState().wait_for_everyone()
            broadcast_object_list(outcome, from_process=0)
        if outcome[1] is not None:
            raise outcome[1]
        result: Result = outcome[0]
        return result

    def uses_cpu(self) -> bool:
        """True if the accelerate config selects the CPU, or there is no GPU. The ranks read the
        config because accelerate does not pass this setting on.
        """
        import torch

        config = yaml.safe_load(Path(self.recipe.launch.accelerate_config).read_text())
        return bool(config.get("use_cpu")) or not torch.cuda.is_available()
