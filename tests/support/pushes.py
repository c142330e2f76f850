"""Runs that are pushed at their end, to a hub on the loopback interface, and the processes that
push them.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.files import load_json
from tests.support.fake_hub import FakeHub, Hold, fake_hub
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub for this process and all that it starts."""
    with fake_hub() as hub:
        for name, value in hub.environment().items():
            monkeypatch.setenv(name, value)
        yield hub


def add(fake: FakeLauncher, *names: str, to: str | None = None) -> None:
    """Add runs that are pushed at their end, by default each to its own repository."""
    fake.add(*names, told="complete model")
    for name in names:
        set_push(fake, name, f"hub_model_id: {to or f'lab/{name}'}, hub_push: end")


def set_push(fake: FakeLauncher, name: str, tracking: str) -> None:
    path = fake.root / "recipes" / "toy" / f"{name}.yaml"
    text = path.read_text().partition("tracking:")[0]
    path.write_text(f"{text}tracking: {{{tracking}}}\n")


def read_push(fake: FakeLauncher, name: str) -> dict[str, object] | None:
    push: dict[str, object] | None = load_json(fake.paths(name).push_path)
    return push


def complete_unpushed(fake: FakeLauncher, hub: FakeHub, name: str) -> None:
    """Complete a run whose push fails: the hub does not know the token yet."""
    token, hub.token = hub.token, "hf_another_one_for_now"
    assert main(["sweep", f"recipes/toy/{name}.yaml"]) == 1
    hub.token = token


def wait_for_push(hold: Hold) -> int:
    """A descriptor of the process that pushes, once the hub holds its request."""
    assert hold.reached.wait(PATIENCE_SECONDS), "nothing was pushed"
    [pid] = list_pushes()
    return os.pidfd_open(pid)


def list_pushes() -> list[int]:
    """Process ids of the pushes in progress."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().split(b"\0")
            is_here = os.readlink(folder / "cwd") == os.getcwd()
        except OSError:
            continue
        if b"runner.publish.push_child" in words and is_here:
            found.append(int(folder.name))
    return found
