"""A worker that fails says nothing about those that live."""

from __future__ import annotations

from runner.launch.command import LaunchCommand
from runner.launch.worker import Imports, WorkerKey
from runner.launch.workers import Workers
from tests.support.fake_launcher import FakeLauncher, fake

__all__ = ["fake"]


def test_a_worker_that_lives_goes_on_when_another_one_has_failed(fake: FakeLauncher) -> None:
    said: list[str] = []
    workers = Workers(said.append, are_wanted=True)
    key, command = WorkerKey(("accelerate", "launch"), (), Imports("", ())), LaunchCommand((), {})
    living = workers.start(key, command)
    assert living is not None and workers.begin(living)
    try:
        fake.tell("worker", "exit")
        failing = workers.start(key, command)
        assert failing is not None and not workers.begin(failing)
        assert len(said) == 1 and "the worker has ended" in said[0]
        assert workers.start(key, command) is None, "a third one would fail too"
        workers.give_back(living)
        assert workers.take(key) is living and len(said) == 1
    finally:
        living.end()
