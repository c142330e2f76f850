"""Pushing a folder to a hub on the loopback interface: uploads, refusals, and no token in any
output.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from runner.errors import RefusedError
from runner.publish.push import HubTarget
from tests.conftest import Project, build_environment
from tests.support.fake_hub import FakeHub, Repository, fake_hub

# The endpoint is read when huggingface_hub is imported, so each push has its own process.
_PUSH = """\
import os, sys
from pathlib import Path
from runner.publish.push import HubTarget, list_folder, push_files
target = HubTarget("lab/model", sys.argv[2] == "private", os.environ["HF_TOKEN"])
print(repr(target), push_files(list_folder(Path(sys.argv[1])), target, "tests/base, recipe 0123"))
"""


@pytest.fixture
def hub() -> Iterator[FakeHub]:
    with fake_hub() as hub:
        yield hub


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "export").mkdir()
    for name in ("README.md", "adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "export" / name).write_text(f"content of {name}")
    return tmp_path / "export"


def push(
    hub: FakeHub,
    folder: Path,
    visibility: str = "private",
    token: str | None = None,
    **environment: str,
) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(
        [sys.executable, "-c", _PUSH, str(folder), visibility],
        env=build_environment({**hub.environment(token), **environment}),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (token or hub.token) not in done.stdout + done.stderr
    return done


def test_a_push_is_one_private_commit(hub: FakeHub, folder: Path) -> None:
    done = push(hub, folder)
    assert done.returncode == 0, done.stderr
    assert f"{hub.url}/lab/model/commit/" in done.stdout
    repository = hub.repositories["lab/model"]
    assert push(hub, folder).stdout == done.stdout  # the same files again make no commit
    assert repository.is_private and repository.messages == ["tests/base, recipe 0123"]
    assert repository.files == {path.name: path.read_bytes() for path in folder.iterdir()}


def test_other_weights_do_not_stay_beside_new_ones(hub: FakeHub, folder: Path) -> None:
    old = {
        "model-00001-of-00002.safetensors": b"",
        "config.json": b"",
        "README.md": b"",
        "notes.md": b"mine",
    }
    hub.repositories["lab/model"] = Repository(is_private=True, files=dict(old))
    assert push(hub, folder).returncode == 0
    assert hub.repositories["lab/model"].files.keys() == {
        path.name for path in folder.iterdir()
    } | {"notes.md"}


def test_a_public_repository_is_not_taken_for_a_private_one(hub: FakeHub, folder: Path) -> None:
    hub.repositories["lab/model"] = Repository(is_private=False)
    done = push(hub, folder)
    assert "PushError: lab/model is public, but `tracking.hub_private` is true" in done.stderr
    assert hub.repositories["lab/model"].files == {}
    assert push(hub, folder, "public").returncode == 0


def test_a_refusal_of_the_hub_is_told_without_the_token(hub: FakeHub, folder: Path) -> None:
    done = push(hub, folder, token="hf_wrong")
    assert "PushError" in done.stderr and "401" in done.stderr
    assert hub.repositories == {}


def test_a_hub_that_is_not_there_or_not_allowed(hub: FakeHub, folder: Path) -> None:
    assert "PushError" in push(hub, folder, HF_HUB_OFFLINE="1").stderr
    assert "PushError" in push(hub, folder, HF_ENDPOINT="http://127.0.0.1:9").stderr


def test_a_push_needs_a_repository_and_a_token(
    project: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_x")
    with pytest.raises(RefusedError, match=r"no `tracking.hub_model_id`"):
        HubTarget.of(project.recipe())
    recipe = project.recipe("tracking.hub_model_id=lab/own", "tracking.hub_private=false")
    assert HubTarget.of(recipe) == HubTarget("lab/own", is_private=False, token="hf_x")
    assert HubTarget.of(recipe, "lab/other").repo_id == "lab/other"
    monkeypatch.setenv("HF_TOKEN", " ")
    with pytest.raises(RefusedError, match="needs a token"):
        HubTarget.of(recipe)
