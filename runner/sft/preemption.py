"""Stops an attempt on request: on TERM, INT or USR1 to any rank, or on the stop file.

During training, all ranks agree at the end of a step, write a checkpoint, and exit together. At any
other time (loading, base scores, final scores, export, uploads) the next attempt would repeat all
work anyway, so a rank exits immediately, even while its main thread is inside a library.
Imports neither torch nor transformers, because it listens before they are loaded.
"""

from __future__ import annotations

import os
import select
import signal
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any, Final

from runner.errors import PreemptedError
from runner.processes import has_lost_sibling
from runner.run.paths import RunPaths
from runner.run.record import Failure, load_stop_request
from runner.sft.startup import WorldPlace

SIGNALS: Final = (signal.SIGTERM, signal.SIGINT, signal.SIGUSR1)
_LOOK_MILLISECONDS: Final = 500  # between two checks for the stop file and for lost ranks


class Preemption:
    """Knows whether this rank was asked to stop, and whether it is training."""

    def __init__(self, paths: RunPaths, attempt: int, place: WorldPlace) -> None:
        self._paths, self._attempt, self._place = paths, attempt, place
        self._lock = threading.Lock()
        self._asked_by: str | None = None  # this rank
        self._agreed_on: str | None = None  # all ranks
        self._is_training = False
        self._is_ignored = False
        # False once the other ranks may have finished before this one.
        self.needs_peers = place.world_size > 1

    def listen(self, record: Callable[[Failure], None]) -> None:
        """Start listening; `record` writes a failure right before the process ends."""
        readable, writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        for number in SIGNALS:
            if signal.getsignal(number) != signal.SIG_IGN:
                signal.signal(number, _stay)
        signal.set_wakeup_fd(writable, warn_on_full_buffer=False)
        os.register_at_fork(after_in_child=_stop_listening)
        threading.Thread(
            target=self._watch, args=(readable, record), name="preemption", daemon=True
        ).start()

    def begin_training(self) -> None:
        """From now on, finish the current step before stopping."""
        with self._lock:
            self._is_training = True

    def end_training(self, step: int) -> None:
        """Stop if the ranks agreed to, or if a request came just before training finished without
        it; the next attempt then computes the scores.

        Raises:
            PreemptedError: the attempt is over.
        """
        with self._lock:
            self._is_training = False
            why = self._agreed_on or self._asked_by
        if why is not None:
            raise PreemptedError(f"{why}: stopped at step {step}, which is saved")

    def agree(self, device: Any) -> bool:
        """True on every rank if the attempt ends here; all ranks must call this at the same
        point.
        """
        if self._agreed_on is None:
            self._agreed_on = (
                self._asked_by
                if self._place.world_size == 1
                else _agree_on_first(self._asked_by, device)
            )
        return self._agreed_on is not None

    def ignore(self) -> None:
        """Ignore requests from now on: the process exits for another reason, and records it."""
        with self._lock:
            self._is_ignored = True

    def has_lost_peer(self) -> bool:
        """True if another rank on this machine is gone. The launcher then sends TERM to the rest,
        which looks like a request to stop.
        """
        return self.needs_peers and has_lost_sibling(self._place.local_world_size)

    def _watch(self, readable: int, record: Callable[[Failure], None]) -> None:
        poll = select.poll()
        poll.register(readable, select.POLLIN)
        while True:
            if poll.poll(_LOOK_MILLISECONDS):
                names = [
                    signal.Signals(number).name
                    for number in os.read(readable, 64)
                    if number in SIGNALS
                ]
                if names and self._asked_by is None:
                    self._asked_by = f"{names[0]} on rank {self._place.rank}"
            elif self._asked_by is None and self._place.rank == 0:
                request = load_stop_request(self._paths)
                if request is not None and request.attempt == self._attempt:
                    self._asked_by = request.why
            if self._asked_by is not None and self._agreed_on is None:
                self._exit_if_idle(self._asked_by, record)

    def _exit_if_idle(self, why: str, record: Callable[[Failure], None]) -> None:
        with self._lock:  # held to the end, so training cannot begin
            if self._agreed_on is not None or self._is_ignored:
                return
            if self.has_lost_peer():  # even during training, because a collective may never end
                _leave(
                    record,
                    Failure(
                        kind="lost",
                        message="another rank vanished without a word",
                        has_lost_peer=True,
                    ),
                )
            if not self._is_training:
                # The main thread may hold the lock of a stream.
                os.write(2, f"stopping: {why}\n".encode())
                message = f"{why}: stopped outside training, so there was nothing to save"
                _leave(record, Failure(kind="preempted", message=message))


def _leave(record: Callable[[Failure], None], failure: Failure) -> None:
    """End the process, even if the reason cannot be written: an error would otherwise end the
    watching thread, and nothing would react to signals.
    """
    try:
        record(failure)
    finally:
        os._exit(1)


def _agree_on_first(asked_by: str | None, device: Any) -> str | None:
    """The source of the request to the lowest rank that got one; None if no rank did."""
    import torch
    from accelerate.utils import broadcast_object_list, gather

    flags = gather(torch.tensor([asked_by is not None], dtype=torch.int32, device=device)).tolist()
    if not any(flags):
        return None
    shared = [asked_by]
    broadcast_object_list(shared, from_process=flags.index(1))
    return shared[0]


def _stay(number: int, frame: FrameType | None) -> None:
    """Do nothing: the watching thread reads the signal from its pipe."""


def _stop_listening() -> None:
    """Restore default signals in a forked child, such as a data loader's worker. A signal to the
    child is not meant for the training process.
    """
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)
    signal.set_wakeup_fd(-1)
