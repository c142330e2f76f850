"""The verbs with pushes that are pending, fail, or are stopped; with real processes
and a hub on loopback.
"""

from __future__ import annotations

import json
import os
import shutil
import signal

import pytest

from runner.checkpoints.marker import build_marker, write_marker
from runner.cli.main import main
from tests.support.fake_hub import FakeHub
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher, fake, finish
from tests.support.pushes import (
    add,
    complete_unpushed,
    hub,
    list_pushes,
    read_push,
    wait_for_push,
)

__all__ = ["fake", "hub"]


def test_ctrl_c_while_runs_train_ends_the_pushes_of_earlier_runs(
    fake: FakeLauncher, hub: FakeHub
) -> None:
    add(fake, "b")
    complete_unpushed(fake, hub, "b")
    fake.add("a", told="obey too late")
    hold = hub.hold("/lfs/")
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "a"
    assert hold.reached.wait(PATIENCE_SECONDS), "the push waits for what trains"
    sweep.send_signal(signal.SIGINT)
    code, _, err = finish(sweep)
    assert code == 130 and list_pushes() == []
    assert "toy/b is completed, and its push to lab/b is pending" in err


def test_a_run_that_completes_after_ctrl_c_is_not_pushed_and_said_to_be_left(
    fake: FakeLauncher, hub: FakeHub
) -> None:
    add(fake, "a")
    fake.tell("a", "wait complete model")
    sweep = fake.start("sweep", "recipes/toy")
    assert fake.next_started()[0] == "a"
    sweep.send_signal(signal.SIGINT)
    assert sweep.stderr is not None
    while "stopping: waiting for 1 run" not in (line := sweep.stderr.readline()):
        assert line, "the sweep ended without waiting"
    fake.let_go("a")
    code, _, err = finish(sweep)
    assert code == 130 and hub.repositories == {}
    assert "toy/a is completed, and its push to lab/a is pending" in err


@pytest.mark.parametrize("is_trained_before", [False, True])
def test_a_launch_that_is_ended_while_it_pushes_has_completed_its_run(
    is_trained_before: bool, fake: FakeLauncher, hub: FakeHub
) -> None:
    """A cluster that ends a pod starts no other one for the push alone."""
    add(fake, "a")
    if is_trained_before:
        complete_unpushed(fake, hub, "a")
    hold = hub.hold("/lfs/")
    launch = fake.start("launch", "recipes/toy/a.yaml")
    wait_for_push(hold)
    launch.send_signal(signal.SIGTERM)
    code, _, err = finish(launch)
    assert code == 0 and list_pushes() == []
    assert "toy/a is completed, and its push to lab/a is pending" in err
    assert "hint: runner export runs/toy/a --push" in err


def test_the_reason_of_a_push_is_its_own(fake: FakeLauncher, hub: FakeHub) -> None:
    """It is not that of an earlier push, which `push.json` may still hold."""
    for name in ("a", "b", "c"):
        add(fake, name)
        complete_unpushed(fake, hub, name)
    lock_path, push_path = fake.paths("a").push_lock_path, fake.paths("b").push_path
    log_path = fake.paths("c").attempt(1).push_log_path
    for path in (lock_path, push_path):
        path.unlink()
        path.mkdir()
    log_path.unlink()
    os.mkfifo(log_path)
    code, _, err = finish(fake.start("sweep", "recipes/toy"))
    lines = {
        line.partition("  ")[0]: line for line in err.splitlines() if ", but not pushed" in line
    }
    assert code == 1 and set(lines) == {"toy/a", "toy/b", "toy/c"}
    assert "not pushed to lab/a: runs/toy/a/push is a folder" in lines["toy/a"]
    assert "not pushed to lab/b: runs/toy/b/push.json is a folder" in lines["toy/b"]
    assert "not pushed: runs/toy/c/attempts/1/push.txt is a pipe" in lines["toy/c"]


def test_prepare_sends_nothing(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a")
    complete_unpushed(fake, hub, "a")
    capsys.readouterr()
    assert main(["launch", "recipes/toy/a.yaml", "--prepare"]) == 0
    assert capsys.readouterr().out == "push    toy/a  to lab/a\n"
    push = read_push(fake, "a")
    assert hub.repositories == {} and push is not None and push["state"] == "failed"


def test_a_repository_that_another_run_waits_for_is_refused_with_a_way_out(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a")
    complete_unpushed(fake, hub, "a")
    add(fake, "b", to="lab/a")
    run_dir = fake.paths("a").run_dir
    capsys.readouterr()
    assert main(["sweep", "recipes/toy/b.yaml"]) == 2
    err = capsys.readouterr().err
    assert f"{run_dir} will be pushed there too; its last push failed" in err
    assert "was pushed" not in err
    way_out = f"runner export {run_dir} --push OWNER/NAME"
    assert f"`{way_out}` pushes" in err
    words = way_out.replace("OWNER/NAME", "lab/other").split()
    assert finish(fake.start(*words[1:]))[0] == 0
    assert main(["sweep", "recipes/toy/b.yaml"]) == 0
    assert set(hub.repositories) == {"lab/a", "lab/other"}
    push_path = fake.paths("a").push_path
    for state, said in (("pushed", "was pushed to lab/a"), ("pending", "will be pushed to lab/a")):
        push_path.write_text(json.dumps({"state": state, "repo_id": "lab/a", "commit": "0"}))
        fake.paths("b").push_path.unlink(missing_ok=True)
        code, _, err = finish(fake.start("export", "runs/toy/b", "--push"))
        assert code == 2 and f"{fake.paths('a').run_dir} {said}" in err
        assert "hint: runner export runs/toy/b --push OWNER/NAME" in err


def test_repair_is_refused_where_its_push_would_be(
    fake: FakeLauncher,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(fake, "a")
    complete_unpushed(fake, hub, "a")
    repair = ["launch", "recipes/toy/a.yaml", "--repair"]
    capsys.readouterr()
    assert main(repair) == 0
    captured = capsys.readouterr()
    assert "nothing to repair" in captured.out
    assert "toy/a is completed, and its push to lab/a failed: " in captured.err
    shutil.rmtree(fake.paths("a").model_dir)
    folder = fake.paths("a").run_dir / "checkpoints" / "step-2"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"weights")
    write_marker(folder, build_marker(folder, 2, {}))
    monkeypatch.delenv("HF_TOKEN")
    capsys.readouterr()
    assert main(repair) == 2
    assert "HF_TOKEN is not set" in capsys.readouterr().err
    assert fake.started() == ["a"]
    monkeypatch.setenv("HF_TOKEN", "hf_not_known_to_this_hub")
    assert main(repair) == 0
    err = capsys.readouterr().err
    assert "toy/a  repaired" in err and "its push to lab/a failed" in err
