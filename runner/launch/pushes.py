"""Pushes of completed runs to the hub, as child processes of a sweep: which are under way, and how
they ended. The child is `publish.push_child`.
"""

from __future__ import annotations

import os
import selectors
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Final

from runner.errors import CorruptFileError
from runner.plan.pushes import find_push_to
from runner.plan.select import Selected
from runner.processes import die_with_parent
from runner.run.facts import read_facts
from runner.run.manifest import measure_model
from runner.run.record import load_push

MAX_AT_A_TIME: Final = 2  # uploads share one network
# What a push may take: a hub that never answers keeps no sweep waiting.
_PATIENCE_SECONDS: Final = 600.0
_BYTES_PER_SECOND: Final = 1e6


@dataclass
class RunningPush:
    """A push under way."""

    selected: Selected
    repo_id: str
    process: subprocess.Popen[bytes]

    def describe_end(self) -> str:
        """How it ended, as the child recorded it, once its process has ended."""
        status = self.process.wait()
        try:
            record = load_push(self.selected.paths)
        except (CorruptFileError, OSError):
            record = None
        if record is not None and record.state == "pushed":
            return f"pushed to {record.repo_id}, commit {record.commit}"
        if record is not None and record.state == "failed":
            return f"completed, but not pushed to {self.repo_id}: {record.failure}"
        if status == 0:
            return f"is being pushed to {self.repo_id} by another process"
        return f"completed, but not pushed to {self.repo_id}: the push ended by {_name(status)}"


def _name(status: int) -> str:
    return f"the signal {-status}" if status < 0 else f"exit status {status}"


def start_push(selected: Selected) -> RunningPush | None:
    """The push of a completed run, started; None where it has none to make.

    Raises:
        CorruptFileError, OSError: the run cannot be read, or the process not be started.
    """
    paths = selected.paths
    facts = read_facts(paths)
    repo_id = find_push_to(facts, selected.recipe)
    if repo_id is None or facts.result is None or not facts.attempts:
        return None
    seconds = _PATIENCE_SECONDS + measure_model(facts.result.files or {}) / _BYTES_PER_SECOND
    log_path = paths.attempt(facts.attempts[-1].number).push_log_path
    with log_path.open("ab") as log:
        process = subprocess.Popen(
            # -P: what is in the working directory is not found by accident.
            [sys.executable, "-P", "-m", "runner.publish.push_child", paths.run_dir, str(seconds)],
            env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"},
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=log,
            start_new_session=True,  # Ctrl-C is ours to act upon
            preexec_fn=partial(die_with_parent, os.getpid()),
        )
    return RunningPush(selected, repo_id, process)


def push_now(selected: Selected) -> str | None:
    """Push a completed run and wait for it; how that ended, None where it has none to make."""
    push = start_push(selected)
    if push is None:
        return None
    try:
        push.process.wait()
    except BaseException:  # Ctrl-C: it stays pending
        push.process.kill()
        raise
    return push.describe_end()


@dataclass
class Pushes:
    """The pushes of a sweep, a few at a time and in the order in which their runs were
    completed.
    """

    say: Callable[[str, str], None]  # name of a run, and what became of it
    selector: selectors.BaseSelector
    waiting: list[Selected] = field(default_factory=list)
    active: dict[int, RunningPush] = field(default_factory=dict)  # by pidfd
    was_ended: bool = False  # before all were done

    def has_work(self) -> bool:
        """True while a push is under way, or still has to be made."""
        return bool(self.waiting or self.active)

    def add(self, selected: Selected) -> None:
        """Push a run that has just been completed, where its recipe asks for that."""
        self.waiting.append(selected)
        self._start_next()

    def finish(self, pidfd: int) -> None:
        """Say how a push ended, and start the next one."""
        push = self._take(pidfd)
        self.say(push.selected.full_name, push.describe_end())
        self._start_next()

    def end(self) -> None:
        """End all of them now: they stay pending."""
        self.was_ended = self.was_ended or self.has_work()
        self.waiting = []
        for pidfd in list(self.active):
            push = self._take(pidfd)
            push.process.kill()
            push.process.wait()

    def describe(self) -> dict[str, str]:
        """What is under way, by the name of the run."""
        return {
            push.selected.full_name: f"is pushed to {push.repo_id}" for push in self.active.values()
        }

    def _take(self, pidfd: int) -> RunningPush:
        self.selector.unregister(pidfd)
        os.close(pidfd)
        return self.active.pop(pidfd)

    def _start_next(self) -> None:
        while self.waiting and len(self.active) < MAX_AT_A_TIME:
            selected = self.waiting.pop(0)
            try:
                push = start_push(selected)
            except (CorruptFileError, OSError) as error:  # a failed push never fails a run
                self.say(selected.full_name, f"completed, but not pushed: {error}")
                continue
            if push is not None:
                pidfd = os.pidfd_open(push.process.pid)
                self.active[pidfd] = push
                self.selector.register(pidfd, selectors.EVENT_READ, data=push)
