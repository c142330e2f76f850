"""The signals by which a person or a cluster asks `runner launch` and `runner sweep` to stop."""

from __future__ import annotations

import os
import signal
from types import FrameType
from typing import Any


class StopSignals:
    """Notes Ctrl-C, TERM, HUP and USR1 and makes `fileno` readable, so that no line of a sweep is ever interrupted."""

    def __init__(self) -> None:
        self.received: list[int] = []
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> StopSignals:
        self._readable, self._writable = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._previous_wakeup = signal.set_wakeup_fd(self._writable, warn_on_full_buffer=False)
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
            if signal.getsignal(number) != signal.SIG_IGN:  # `nohup`, or a background process of a script
                self._previous[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._previous_wakeup)
        os.close(self._readable)
        os.close(self._writable)

    def fileno(self) -> int:
        """Readable when a signal has come since `drain`."""
        return self._readable

    def drain(self) -> None:
        """Not readable until the next signal."""
        os.read(self._readable, 4096)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received.append(number)
