"""The workers of one sweep: which of them a run is forked from, and how long each is kept."""

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
    """Those that have nothing to do; one that starts or forks is with its run."""

    say: Callable[[str], None]  # a line for whoever looks at the sweep
    are_wanted: bool  # else there are none, and each run starts cold
    _idle: list[Worker] = field(default_factory=list)
    _useless: set[Imports] = field(default_factory=set)  # a worker with these has failed
    _imports: dict[str, Imports | None] = field(default_factory=dict)  # by the full name of the run

    def find_key(self, run: Launch, command: LaunchCommand) -> WorkerKey | None:
        """The worker that a run is to be forked from; None where it starts cold."""
        self._imports.pop(run.full_name, None)  # files may have changed while it waited
        imports = self._find_imports(run)
        if imports is None:
            return None
        return WorkerKey(command.argv[:-3], tuple(sorted(command.environment.items())), imports)

    def _find_imports(self, run: Launch) -> Imports | None:
        # A retry shares nothing with what it may have failed of.
        if not self.are_wanted or run.retry > 0:
            return None
        if run.full_name not in self._imports:
            try:
                self._imports[run.full_name] = find_imports(run.recipe)
            except OSError:  # the run says itself what cannot be read
                self._imports[run.full_name] = None
        return self._imports[run.full_name]

    def take(self, key: WorkerKey) -> Worker | None:
        """One that has nothing to do; those that time has made useless are ended and told of."""
        for worker in [one for one in self._idle if one.key == key]:
            self._idle.remove(worker)
            if (why := worker.find_change()) is None:
                return worker
            self.say(f"a new worker starts: {why}")
            worker.end()
        return None

    def start(self, key: WorkerKey, command: LaunchCommand) -> Worker | None:
        """One that begins to import; None where it cannot be started, or one like it has failed."""
        if key.imports in self._useless:
            return None
        try:
            return Worker.start(key, command)
        except OSError as error:
            self._give_up(key, error)
            return None

    def begin(self, worker: Worker) -> bool:
        """Hear what a worker has to say after its imports; False: it is ended, and its runs start
        cold.
        """
        try:
            if worker.is_overdue(time.monotonic()):
                raise WorkerError(f"its imports have taken more than {START_SECONDS:.0f} s")
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
        self.say(f"runs start cold, as there is no worker to fork them from: {why}")

    def give_back(self, worker: Worker) -> None:
        """Keep a worker for the next run, or end it."""
        if worker.is_worn or not worker.is_alive():
            worker.end()
        else:
            self._idle.append(worker)

    def end_unneeded(self, waiting: Iterable[Launch]) -> None:
        """End those that no run of these is to be forked from."""
        needed = set(map(self._find_imports, waiting)) if self._idle else set()
        for worker in [one for one in self._idle if one.key.imports not in needed]:
            self._idle.remove(worker)
            worker.end()

    def close(self) -> None:
        """End all that have nothing to do."""
        self.end_unneeded(())
