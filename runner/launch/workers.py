"""The workers of one sweep: picks the one to fork a run from, and ends those no longer needed."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

from runner.launch.command import LaunchCommand
from runner.launch.worker import (
    START_SECONDS,
    Imports,
    Worker,
    WorkerError,
    WorkerKey,
    find_imports,
)
from runner.plan.decide import Launch


@dataclass
class Workers:
    """The idle workers; the pool keeps a worker that starts or has forked with its run."""

    say: Callable[[str], None]  # prints a line for the user
    are_wanted: bool  # if false, there are none, and each run starts cold
    _idle: list[Worker] = field(default_factory=list)
    _useless: set[Imports] = field(default_factory=set)  # workers with these have failed
    _imports: dict[str, Imports | None] = field(default_factory=dict)  # by the full name of the run

    def find_key(self, run: Launch, command: LaunchCommand) -> WorkerKey | None:
        """The key of the worker to fork a run from; None if the run starts cold."""
        self._imports.pop(run.full_name, None)  # files may have changed while it waited
        imports = self._find_imports(run)
        if imports is None:
            return None
        return WorkerKey(command.argv[:-3], tuple(sorted(command.environment.items())), imports)

    def _find_imports(self, run: Launch) -> Imports | None:
        # A retry starts cold, because the worker may have caused the failure.
        if not self.are_wanted or run.retry > 0:
            return None
        if run.full_name not in self._imports:
            try:
                self._imports[run.full_name] = find_imports(run.recipe)
            except OSError:  # the run itself reports the unreadable file
                self._imports[run.full_name] = None
        return self._imports[run.full_name]

    def take(self, key: WorkerKey) -> Worker | None:
        """An idle worker, or None; outdated ones are ended, with a line for the user."""
        for worker in [one for one in self._idle if one.key == key]:
            self._idle.remove(worker)
            if (why := worker.find_change()) is None:
                return worker
            self.say(f"a new worker starts: {why}")
            worker.end()
        return None

    def start(self, key: WorkerKey, command: LaunchCommand) -> Worker | None:
        """A worker that starts its imports; None if it cannot be started or one like it failed."""
        if key.imports in self._useless:
            return None
        try:
            return Worker.start(key, command)
        except OSError as error:
            self._give_up(key, error)
            return None

    def begin(self, worker: Worker) -> bool:
        """Receive a worker's message after its imports. False: it was ended, and its run starts
        cold.
        """
        try:
            if worker.is_overdue(time.monotonic()):
                raise WorkerError(f"its imports took more than {START_SECONDS:.0f} s")
            worker.begin()
        except WorkerError as error:
            self._give_up(worker.key, error)
            worker.end()
            return False
        if (why := worker.find_change()) is not None:
            self.say(f"the next run gets a new worker: {why}")
            worker.end()
            return False
        return True

    def _give_up(self, key: WorkerKey, why: Exception) -> None:
        self._useless.add(key.imports)
        self.say(f"runs start cold, because no worker can fork them: {why}")

    def release(self, worker: Worker) -> None:
        """Keep a worker for the next run, or end it."""
        if worker.is_worn or not worker.is_alive():
            worker.end()
        else:
            self._idle.append(worker)

    def end_unneeded(self, waiting: Iterable[Launch]) -> None:
        """End the idle workers that none of these runs needs."""
        needed = set(map(self._find_imports, waiting)) if self._idle else set()
        for worker in [one for one in self._idle if one.key.imports not in needed]:
            self._idle.remove(worker)
            worker.end()

    def close(self) -> None:
        """End all idle workers."""
        self.end_unneeded(())
