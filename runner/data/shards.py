"""Masks rows that were drawn and writes them in shards, by several processes where cores are free.

The processes are programs of their own, not forks: nothing of the trainer's libraries and devices
is in them. They are told in pickles, over a socket of which both ends are ours.
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

_SIGN_SECONDS: Final = 0.5  # between two words of how far a process is


@dataclass(frozen=True)
class Work:
    """How rows are to be masked."""

    data: DataSection
    model: ModelSection


@dataclass(frozen=True)
class Task:
    """Rows to mask, and the file for those which fit; `with_columns` for metrics of the project."""

    path: Path
    rows: Sequence[RawRow]
    with_columns: bool


@dataclass(frozen=True)
class Shard:
    """What has become of the rows of a task: as `MaskedRows`, with the rows in a file."""

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
            DataError: a row cannot be masked, or not be stored.
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
    """What came of each task, in order; of those behind one that failed, perhaps nothing. `report`
    is called with the number of rows that were masked so far, several times a second.

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
    """What must be the same in every process: the tokenizer's files, our own and those of libraries
    may have changed since this one has read them.
    """
    return hash_json([hash_tokenizer(tokenizer), PROVENANCE])


def _lighten(task: Task) -> Task:
    """The task without what nobody will store."""
    if task.with_columns:
        return task
    return replace(task, rows=[replace(row, columns={}) for row in task.rows])


class _Child:
    """One process: it says what it masks with, then, of each task, numbers of rows that it
    has masked since its last words, and in the end a `Shard` or an error.
    """

    def __init__(self, work: Work) -> None:
        own = str(Path(__file__).resolve().parent.parent.parent)
        found = os.environ.get("PYTHONPATH")
        # One core each, and none of the devices.
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
        """Raises: OSError, where it has ended, or where a row is made of something that no other
        process can be sent.
        """
        try:
            self.connection.send(message)
        except (pickle.PicklingError, TypeError, AttributeError) as error:
            raise OSError(f"a row cannot be sent to another process: {error}") from None

    def receive(self) -> Any:
        """Its next words. Raises: OSError, where it has ended, for want of memory perhaps."""
        try:
            return self.connection.recv()
        except (EOFError, ConnectionError):
            status = self._process.wait()
            raise OSError(f"a process that masks rows ended with exit status {status}") from None


def serve(connection: Connection) -> None:
    """In the child: do tasks until the parent has no more."""
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
    """Says at times how many rows there were since the last words."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        self._num_rows, self._said_at = 0, time.monotonic()

    def count(self) -> None:
        """One more row."""
        self._num_rows += 1
        if time.monotonic() - self._said_at > _SIGN_SECONDS:
            self.say()

    def say(self) -> None:
        """Say it now."""
        self._connection.send(self._num_rows)
        self._num_rows, self._said_at = 0, time.monotonic()
