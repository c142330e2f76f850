"""Masks drawn rows and writes them in shards, with several processes if cores are free.

The processes are separate programs, not forks, so they hold none of the training process's
libraries and devices. They get pickles over a socket; both ends of it belong to the runner.
"""

from __future__ import annotations

import os
import pickle
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any, Final, Self

from runner.data.draw import RawRow
from runner.data.masking import ConversationMasker
from runner.data.provenance import PROVENANCE
from runner.data.rows import Origin, mask_rows
from runner.data.tokenizer import hash_tokenizer, load_tokenizer
from runner.errors import DataError
from runner.files import hash_json
from runner.recipe.data_section import DataSection
from runner.recipe.schema import ModelSection

_SIGN_SECONDS: Final = 0.5  # between two progress messages of a process


@dataclass(frozen=True)
class Work:
    """The settings for masking rows."""

    data: DataSection
    model: ModelSection


@dataclass(frozen=True)
class Task:
    """Rows to mask, and the file for those that fit; `with_columns` for metrics of the project."""

    path: Path
    rows: Sequence[RawRow]
    with_columns: bool


@dataclass(frozen=True)
class Shard:
    """The outcome of a task: the same as `MaskedRows`, with the rows in a file."""

    num_rows: int
    origins: list[Origin]
    too_long: list[tuple[int, int]]


class ShardWriter:
    """Masks rows and writes them, under one tokenizer."""

    def __init__(self, work: Work, tokenizer: Any) -> None:
        self._work = work
        self._masker = ConversationMasker(tokenizer)
        self._bos_token_id: int | None = tokenizer.bos_token_id

    def write(self, task: Task, sign_of_life: Callable[[], None]) -> Shard:
        """Write one shard; `sign_of_life` is called before each row.

        Raises:
            DataError: a row cannot be masked or stored.
            OSError: the shard cannot be written.
        """
        from runner.data.stored_rows import write_shard

        data = self._work.data
        masked = mask_rows(task.rows, data, self._masker, self._bos_token_id, sign_of_life)
        write_shard(task.path, masked.rows, with_columns=task.with_columns)
        return Shard(len(masked.rows), masked.origins, masked.too_long)


Outcome = Shard | DataError


def write_shards(
    work: Work,
    tokenizer: Any,
    tasks: Sequence[Task],
    num_processes: int,
    report: Callable[[int], None],
) -> list[Outcome]:
    """Write the shards. Return the outcome of each task, in order; tasks after one that failed may
    have none. `report` is called with the number of rows masked so far, several times a second.

    Raises:
        OSError: a shard cannot be written, or a process was lost.
    """
    if num_processes == 1:
        return list(_write_here(ShardWriter(work, tokenizer), tasks, report))
    return _write_in_children(work, _identify(tokenizer), tasks, num_processes, report)


def _write_here(
    writer: ShardWriter, tasks: Sequence[Task], report: Callable[[int], None]
) -> Iterator[Outcome]:
    num_done = -1

    def count() -> None:
        nonlocal num_done
        num_done += 1
        report(num_done)

    for task in tasks:
        try:
            yield writer.write(task, count)
        except DataError as error:
            yield error
            return


def _write_in_children(
    work: Work,
    identity: str,
    tasks: Sequence[Task],
    num_processes: int,
    report: Callable[[int], None],
) -> list[Outcome]:
    outcomes: dict[int, Outcome] = {}
    num_done, next_task, has_failed = 0, 0, False
    with ExitStack() as stack:
        children = [stack.enter_context(_Child(work)) for _ in range(num_processes)]
        busy: dict[Connection, tuple[_Child, int | None]] = {
            child.connection: (child, None) for child in children
        }
        while busy:
            for connection in wait([*busy]):
                assert isinstance(connection, Connection)
                child, number = busy[connection]
                said = child.receive()
                if isinstance(said, int):
                    num_done += said
                    report(num_done)
                    continue
                if number is not None:
                    if isinstance(said, OSError):
                        raise said
                    outcomes[number] = said
                    has_failed |= isinstance(said, DataError)
                elif said != identity:
                    raise OSError("a process that masks rows finds another tokenizer or libraries")
                if has_failed or next_task == len(tasks):
                    del busy[connection]
                    continue
                child.send(_lighten(tasks[next_task]))
                busy[connection] = (child, next_task)
                next_task += 1
    return [outcomes[number] for number in sorted(outcomes)]


def _identify(tokenizer: Any) -> str:
    """A hash that must be the same in every process: the files of the tokenizer, the runner or
    libraries may have changed since this process read them.
    """
    return hash_json([hash_tokenizer(tokenizer), PROVENANCE])


def _lighten(task: Task) -> Task:
    """The task without columns that will not be stored."""
    if task.with_columns:
        return task
    return replace(task, rows=[replace(row, columns={}) for row in task.rows])


class _Child:
    """One process. It first sends a hash of its tokenizer and libraries. For each task, it sends
    the numbers of rows masked since its last message, and finally a `Shard` or an error.
    """

    def __init__(self, work: Work) -> None:
        own = str(Path(__file__).resolve().parent.parent.parent)
        found = os.environ.get("PYTHONPATH")
        # One core each, and no devices.
        alone = {"OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
        path = {"PYTHONPATH": os.pathsep.join(filter(None, [found, own]))}
        ours, theirs = socket.socketpair()
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-m", "runner.data.mask_child", str(os.getpid())],
            env={**os.environ, **alone, **path},
            stdin=theirs.fileno(),
            start_new_session=True,
        )
        theirs.close()
        self.connection: Connection = Connection(ours.detach())
        self.send((work.data.model_dump_json(), work.model.model_dump_json()))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.kill()
        self._process.wait()
        self.connection.close()

    def send(self, message: Any) -> None:
        """Raises: OSError, if the process has ended, or a row holds something that cannot be sent
        to another process.
        """
        try:
            self.connection.send(message)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise OSError(f"a row cannot be sent to another process: {error}") from None

    def receive(self) -> Any:
        """Its next message. Raises: OSError, if it has ended, perhaps because memory ran out."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            status = self._process.wait()
            raise OSError(f"a process that masks rows ended with exit status {status}") from None


def serve(connection: Connection) -> None:
    """In the child: work on tasks until the parent has no more."""
    data, model = connection.recv()
    work = Work(DataSection.model_validate_json(data), ModelSection.model_validate_json(model))
    tokenizer = load_tokenizer(work.model)
    connection.send(_identify(tokenizer))
    writer, counter = ShardWriter(work, tokenizer), _Counter(connection)
    while True:
        try:
            task: Task = connection.recv()
        except EOFError:
            return
        try:
            outcome: Outcome | OSError = writer.write(task, counter.count)
        except (DataError, OSError) as error:
            outcome = error
        counter.say()
        connection.send(outcome)


class _Counter:
    """Sends the number of rows since the last message from time to time."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._num_rows, self._said_at = 0, time.monotonic()

    def count(self) -> None:
        """Count one more row."""
        self._num_rows += 1
        if time.monotonic() - self._said_at > _SIGN_SECONDS:
            self.say()

    def say(self) -> None:
        """Send the number now."""
        self._connection.send(self._num_rows)
        self._num_rows, self._said_at = 0, time.monotonic()
