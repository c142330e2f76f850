"""`runner logs` prints and follows the output of an attempt; `runner stop` asks runs to stop.

The bytes of a log go to stdout unchanged, including colors and progress bars, as with `cat`; the
run that they belong to goes to stderr. A stop request reaches a run on any machine, however it was
started.
"""

from __future__ import annotations

import contextlib
import os
import shlex
import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import BinaryIO, Final

from runner.errors import CorruptFileError, RunnerError, escape_controls, put_in_words
from runner.files import open_plain
from runner.launch.run_files import request_stop
from runner.plan.decide import foresee_retry
from runner.plan.select import Selected, UnreadableRun, require_any, select_recipes
from runner.plan.status import describe_running
from runner.processes import find_commands
from runner.run.facts import RunFacts, read_facts
from runner.run.lease import is_leased
from runner.secrets import scrub
from runner.text import format_count

_LOOK_SECONDS: Final = 0.25  # between two checks of a growing log
_MAX_LISTED: Final = 5


def print_log(run: str, output_root: Path, number: int | None, *, follow: bool) -> int:
    """Print the log of one attempt, the last one by default.

    With `follow`, keep printing new output and the attempts after it, until the run is done or will
    not be retried automatically.

    Raises:
        RunnerError: there is no such run, attempt or log, or several runs and not exactly one of
            them running.
    """
    unreadable: list[UnreadableRun] = []
    found = select_recipes([run], output_root, unreadable=unreadable, prefer="run")
    require_any(found, unreadable)
    for lost in unreadable:
        why = escape_controls(f"{lost.full_name} is unreadable: {lost.why}")
        print(f"warning: {why}", file=sys.stderr)
    selected = find_run(found)
    facts = selected.read_facts()
    if not facts.attempts:
        raise RunnerError(
            f"{selected.full_name} has no attempt yet",
            hint=f"runner launch {selected.source_path}  # starts it",
        )
    numbers = [attempt.number for attempt in facts.attempts]
    number = number or numbers[-1]
    if number not in numbers:
        raise RunnerError(
            f"{selected.full_name} has {format_count(len(numbers), 'attempt')};"
            f" there is no attempt {number}"
        )
    if follow:
        try:
            _follow(selected, facts, number)
        except KeyboardInterrupt:
            print(file=sys.stderr)
        return 0
    if not selected.paths.attempt(number).log_path.exists():
        raise RunnerError(
            f"attempt {number} of {selected.full_name} has no log:"
            " `runner` itself did not start it",
            hint=f"runner why {shlex.quote(str(selected.paths.run_dir))}",
        )
    _Log(selected.paths.attempt(number).log_path).print_on()
    return 0


def find_run(selected: list[Selected]) -> Selected:
    """The only run, or the only running one.

    Raises:
        RunnerError: it is not clear which one is meant.
    """
    if len(selected) == 1:
        return selected[0]
    running = [one for one in selected if is_leased(one.paths.lease_path)]
    if len(running) == 1:
        return running[0]
    begun = [one for one in selected if one.paths.record_path.exists()]
    if not begun:
        raise RunnerError(
            f"none of these {len(selected)} runs has an attempt yet", hint="runner status"
        )
    shown = [f"runner logs {shlex.quote(str(one.paths.run_dir))}" for one in running or begun]
    if len(shown) > _MAX_LISTED:
        shown[_MAX_LISTED:] = [f"... and {len(shown) - _MAX_LISTED} more"]
    raise RunnerError(
        f"{len(selected)} runs match and {len(running) or 'none'} of them are running; name one",
        hint="\n      ".join(shown),
    )


def _follow(selected: Selected, facts: RunFacts, number: int) -> None:
    paths, is_printed = selected.paths, False
    log = _Log(paths.attempt(number).log_path)
    while True:
        # In this order: the last output was written before the lease was released or the next
        # attempt began.
        facts = read_facts(paths, facts.found)
        log.print_on()
        later = [attempt.number for attempt in facts.attempts if attempt.number > number]
        if later:
            number, is_printed = later[0], False
            log = _Log(paths.attempt(number).log_path)
            continue
        if not facts.is_leased:
            retry = foresee_retry(selected.recipe, facts.attempts)
            if retry is None or facts.has_result:
                _say(_describe_end(facts))
                return
            if not is_printed:
                _say(
                    f"{_describe_end(facts)}; {retry.why}, if its sweep is still running;"
                    " Ctrl-C quits"
                )
            is_printed = True
        time.sleep(_LOOK_SECONDS)


class _Log:
    """A log that may not exist yet; it stays open, because a finished one may be replaced by a copy
    with secrets masked.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._stream: BinaryIO | None = None
        _say(str(path))

    def print_on(self) -> None:
        """Print the output since the last call."""
        if self._stream is None:
            with contextlib.suppress(FileNotFoundError):
                self._stream = os.fdopen(open_plain(self._path), "rb")
        if self._stream is not None:
            shutil.copyfileobj(self._stream, sys.stdout.buffer)
            sys.stdout.buffer.flush()


def _describe_end(facts: RunFacts) -> str:
    attempt = facts.attempts[-1]
    if facts.has_result:
        return "the run is completed"
    try:
        failure = facts.failure
    except (CorruptFileError, OSError) as error:
        return (
            f"attempt {attempt.number} ended, but its reason cannot be read: {put_in_words(error)}"
        )
    if failure is None:
        return f"attempt {attempt.number} was killed together with its launcher"
    first_line = failure.message.partition("\n")[0]
    return f"attempt {attempt.number} ended, {failure.kind}: {first_line}"


def _say(text: str) -> None:
    print(f"==> {text} <==", file=sys.stderr, flush=True)


def stop_runs(selected: Sequence[Selected]) -> int:
    """Ask every running attempt of the selected runs to stop.

    Returns 1 if one could not be asked because it is starting or finishing, or if nothing could be
    asked and a process of this machine may be about to start runs.
    """
    asked: list[bool] = []
    idle: list[tuple[Selected, RunFacts]] = []
    for one in selected:
        facts = one.read_facts()
        if facts.is_leased:
            asked.append(_ask(one, facts))
        else:
            idle.append((one, facts))
    # Changed files are read again: a sweep may have resumed a run while the others were being
    # asked.
    held_back = [_hold_back(one, read_facts(one.paths, facts.found)) for one, facts in idle]
    num_idle = len(idle) - sum(held_back)
    starters: dict[int, str] = {}
    if num_idle:
        what = "run is not running" if num_idle == 1 else "runs are not running"
        line = f"{num_idle} {what}" if asked else f"nothing to stop: {num_idle} {what}"
        if any(not facts.has_result for _, facts in idle):
            starters = find_commands(_STARTERS)
            line += _describe_starters(starters)
        print(escape_controls(scrub(line)), file=sys.stderr)
    is_any_reached = bool(asked) or any(held_back)
    return 0 if all(asked) and (is_any_reached or not starters) else 1


_STARTERS: Final = ("sweep", "rerun", "launch")


def _describe_starters(commands: Mapping[int, str]) -> str:
    """The end of the sentence about runs that are not running: what may still start them."""
    if not commands:
        return (
            "; a sweep elsewhere that is only about to start runs is not asked: press Ctrl-C in"
            " its terminal to stop it"
        )
    lines = [
        f"\nwarning: process {pid} may start them, and is not asked: {command}"
        f"\nhint: kill {pid}  # like Ctrl-C: starts nothing more, asks its running attempts to stop"
        for pid, command in commands.items()
    ]
    return "".join(lines)


def _hold_back(one: Selected, facts: RunFacts) -> bool:
    """True if the run's sweep would retry it, if that sweep is still alive; it will now leave the
    run alone.
    """
    if foresee_retry(one.recipe, facts.attempts) is None or facts.has_result:
        return False
    request_stop(one.paths, facts.attempts[-1].number, "asked by `runner stop`")
    print(f"{one.full_name}  is not running; its sweep, if still running, will not retry it")
    return True


def _ask(one: Selected, facts: RunFacts) -> bool:
    last = facts.last
    if last is None or last.ended_at_utc is not None:
        print(
            f"{one.full_name}  is starting or finishing; run `runner stop` again in a few seconds"
        )
        return False
    progress = facts.progress
    request_stop(one.paths, last.number, "asked by `runner stop`")
    step = (
        ""
        if progress is None or progress.max_steps is None
        else f", step {progress.step}/{progress.max_steps}"
    )
    where = "starting" if progress is None else describe_running(facts, facts.read_at_utc) + step
    print(
        f"{one.full_name}  asked attempt {last.number} to checkpoint"
        f" and stop ({where}, on {last.host})"
    )
    return True
