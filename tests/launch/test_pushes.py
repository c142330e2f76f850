"""Pushes as part of runs, to a hub on loopback: sent once a run is completed, refused before
anything starts, pending after a kill at any point, and never a reason for a run to fail.
"""

from __future__ import annotations

import json
import os
import selectors
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.files import load_json
from runner.launch.pushes import Pushes, RunningPush
from runner.plan.select import select_recipes
from runner.run.lease import is_leased
from tests.support.fake_hub import FakeHub, Repository
from tests.support.fake_launcher import (
    PATIENCE_SECONDS,
    FakeLauncher,
    fake,
    finish,
    wait_until_dead,
)
from tests.support.pushes import (
    add,
    complete_unpushed,
    hub,
    list_pushes,
    read_push,
    set_push,
    wait_for_push,
)

__all__ = ["fake", "hub"]


def read_notes(capsys: pytest.CaptureFixture[str]) -> str:
    capsys.readouterr()
    assert main(["status", "recipes/toy"]) == 0
    return capsys.readouterr().out


def assert_is_pushed(fake: FakeLauncher, hub: FakeHub, name: str) -> None:
    repository = hub.repositories[f"lab/{name}"]
    model_dir = fake.paths(name).model_dir
    files = {path.name: path.read_bytes() for path in model_dir.iterdir()}
    assert {**repository.files, "README.md": b""} == {**files, "README.md": b""}
    assert len(repository.messages) == 1 and repository.is_private
    assert repository.files["README.md"].startswith(b"---\n")
    push = read_push(fake, name)
    assert push is not None
    assert (push["state"], push["repo_id"]) == ("pushed", f"lab/{name}")
    assert (push["commit"], push["failure"]) == (repository.head, None)


def test_a_sweep_pushes_each_run_in_one_private_commit(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a", "b", "c")
    assert main(["sweep", "recipes/toy", "--slots", "2"]) == 0
    err = capsys.readouterr().err
    for name in ("a", "b", "c"):
        assert_is_pushed(fake, hub, name)
        assert f"toy/{name}  pushed to lab/{name}, commit {1:040x}" in err
        assert "pushed: " in fake.paths(name).attempt(1).push_log_path.read_text()
    everything = b"".join(content for _, content in fake.tree().values())
    assert hub.token.encode() not in everything and hub.token not in err
    assert "push" not in read_notes(capsys)
    assert main(["sweep", "recipes/toy"]) == 0
    assert "skip    toy/a  completed" in capsys.readouterr().out
    assert all(len(one.messages) == 1 for one in hub.repositories.values())


def test_nothing_is_pushed_unasked(fake: FakeLauncher, hub: FakeHub) -> None:
    fake.add("a", told="complete model")
    set_push(fake, "a", "hub_model_id: lab/a")
    assert main(["sweep", "recipes/toy"]) == 0
    assert hub.repositories == {} and not fake.paths("a").push_path.exists()


def test_a_push_imports_no_torch(fake: FakeLauncher, hub: FakeHub) -> None:
    add(fake, "a")
    complete_unpushed(fake, hub, "a")
    program = (
        "import sys; from pathlib import Path; from runner.publish.push import push_run\n"
        "push_run(Path('runs/toy/a'))\n"
        "print({'torch', 'transformers', 'peft', 'datasets'} & {*sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.stdout == "set()\n", done.stderr
    assert_is_pushed(fake, hub, "a")


@pytest.mark.parametrize(
    "again",
    [
        ["sweep", "recipes/toy"],
        ["rerun", "recipes/toy"],
        ["launch", "recipes/toy/a.yaml"],
        ["export", "runs/toy/a", "--push"],
    ],
)
def test_a_failed_push_fails_no_run_and_is_sent_again(
    again: list[str],
    fake: FakeLauncher,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(fake, "a")
    monkeypatch.setenv("HF_TOKEN", "hf_not_known_to_this_hub")
    assert main(["sweep", "recipes/toy"]) == 1
    err = capsys.readouterr().err
    assert "[1/1] toy/a  completed" in err
    assert "toy/a is completed, and its push to lab/a failed: lab/a did not accept it" in err
    assert "401" in err and "hint: runner export runs/toy/a --push" in err
    assert "hf_not_known" not in err + json.dumps(read_push(fake, "a"))
    assert fake.attempts("a")[0]["failure"] is None
    out = read_notes(capsys)
    assert "completed" in out and "push to lab/a failed: lab/a did not accept it: " in out
    if again[0] != "export":
        capsys.readouterr()
        assert main([*again, "--dry-run"] if again[0] != "rerun" else ["status"]) == 0
        if again[0] != "rerun":
            assert "push    toy/a  to lab/a" in capsys.readouterr().out
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (export(fake, *again[1:])[0] if again[0] == "export" else main(again)) == 0
    assert_is_pushed(fake, hub, "a")
    assert "push" not in read_notes(capsys)
    assert fake.started() == ["a"], "nothing was trained again"


def test_a_launch_whose_push_fails_has_not_failed(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """A cluster would start it again."""
    add(fake, "a")
    hub.repositories["lab/a"] = Repository(is_private=False)
    assert main(["launch", "recipes/toy/a.yaml"]) == 0
    err = capsys.readouterr().err
    assert "lab/a is public, but `tracking.hub_private` is true: nothing was pushed" in err
    assert hub.repositories["lab/a"].files == {}
    set_push(fake, "a", "hub_model_id: lab/a, hub_push: end, hub_private: false")
    assert main(["launch", "recipes/toy/a.yaml"]) == 0  # its first attempt recorded another word
    assert hub.repositories["lab/a"].files == {}


def export(fake: FakeLauncher, *arguments: str) -> tuple[int, str, str]:
    """`runner export` in its own process, because the hub's address is read at an import."""
    return finish(fake.start("export", *arguments))


KILLED_AT = {
    "before the repository is made": ("/api/repos/create", False),
    "while the weights are sent": ("/lfs/", False),
    "before the commit": ("/commit/", False),
    "after the commit, before its answer": ("/commit/", True),
}


@pytest.mark.parametrize(
    ("verb", "moment"),
    [*(("sweep", moment) for moment in KILLED_AT), ("launch", "before the commit")],
)
def test_a_kill_at_any_moment_leaves_one_commit_in_the_end(
    verb: str, moment: str, fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a")
    path, is_after = KILLED_AT[moment]
    hold = hub.hold(path, is_after=is_after)
    command = (verb, "recipes/toy/a.yaml")
    process = fake.start(*command)
    pidfd = wait_for_push(hold)
    assert not is_leased(fake.paths("a").lease_path)
    process.kill()
    wait_until_dead(pidfd)
    finish(process)
    hub.let_go()
    push = read_push(fake, "a")
    assert push is not None and (push["state"], push["commit"]) == ("pending", None)
    assert "push to lab/a is pending" in read_notes(capsys)
    assert main([verb, "recipes/toy/a.yaml"]) == 0
    assert_is_pushed(fake, hub, "a")
    assert fake.started() == ["a"]


def test_a_run_without_push_json_is_pending(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    """Killed between the end of the run and the start of its push; so is what cannot be read."""
    add(fake, "a")
    assert main(["sweep", "recipes/toy"]) == 0
    for damage in (None, "{", "[]", '{"state": "pushed"}', '{"state": 3, "repo_id": "lab/a"}'):
        if damage is None:
            fake.paths("a").push_path.unlink()
        else:
            fake.paths("a").push_path.write_text(damage)
        assert "push to lab/a is pending" in read_notes(capsys)
    assert main(["sweep", "recipes/toy"]) == 0
    assert_is_pushed(fake, hub, "a")


PENDING = """\
stopped by SIGINT
toy/a is completed, and its push to lab/a is pending
  hint: runner export runs/toy/a --push"""


def test_ctrl_c_ends_a_push_and_leaves_it_pending(fake: FakeLauncher, hub: FakeHub) -> None:
    add(fake, "a")
    hold = hub.hold("/lfs/")
    sweep = fake.start("sweep", "recipes/toy")
    pidfd = wait_for_push(hold)
    sweep.send_signal(signal.SIGINT)
    wait_until_dead(pidfd)
    code, _, err = finish(sweep)
    assert code == 130 and "Traceback" not in err and PENDING in err
    push = read_push(fake, "a")
    assert push is not None and push["state"] == "pending"
    # And one that a sweep sends of a run that was completed before.
    sweep = fake.start("sweep", "recipes/toy")
    hold = hub.hold("/commit/")
    hub.holds[0].go.set()
    del hub.holds[0]
    pidfd = wait_for_push(hold)
    sweep.send_signal(signal.SIGINT)
    wait_until_dead(pidfd)
    code, _, err = finish(sweep)
    assert code == 130 and "nothing to launch" not in err and PENDING in err
    hub.let_go()
    assert main(["sweep", "recipes/toy"]) == 0
    assert_is_pushed(fake, hub, "a")


def test_other_runs_go_on_while_one_is_pushed(fake: FakeLauncher, hub: FakeHub) -> None:
    add(fake, "a", "b", "c", "d")
    hold = hub.hold("/api/repos/create")
    sweep = fake.start("sweep", "recipes/toy")
    assert hold.reached.wait(PATIENCE_SECONDS)
    assert sweep.stderr is not None
    for line in sweep.stderr:
        if "[4/4] toy/d  completed" in line:
            break
    assert fake.started() == ["a", "b", "c", "d"]
    assert len(list_pushes()) <= 2, "uploads share one network"
    hub.let_go()
    assert finish(sweep)[0] == 0, "the sweep waits for them"
    for name in "abcd":
        assert_is_pushed(fake, hub, name)


def test_two_sweeps_push_once(fake: FakeLauncher, hub: FakeHub) -> None:
    add(fake, "a")
    hold = hub.hold("/commit/")
    first = fake.start("sweep", "recipes/toy")
    assert hold.reached.wait(PATIENCE_SECONDS)
    code, _, err = finish(fake.start("launch", "recipes/toy/a.yaml"))
    assert code == 0 and "toy/a  is being pushed to lab/a by another process" in err
    assert "toy/a is completed and is being pushed to lab/a by" in err and "pending" not in err
    second = fake.start("sweep", "recipes/toy")
    assert second.stderr is not None
    assert "toy/a  waiting for its push to lab/a by another" in second.stderr.readline()
    hub.let_go()
    assert [finish(one)[0] for one in (first, second)] == [0, 0]
    assert_is_pushed(fake, hub, "a")


def test_a_hub_that_never_answers_keeps_nobody_waiting(
    fake: FakeLauncher, hub: FakeHub, monkeypatch: pytest.MonkeyPatch
) -> None:
    add(fake, "a")
    complete_unpushed(fake, hub, "a")
    hold = hub.hold("/lfs/")
    child = [sys.executable, "-m", "runner.publish.push_child", "runs/toy/a", "4"]
    done = subprocess.run(child, capture_output=True, text=True, timeout=PATIENCE_SECONDS)
    assert hold.reached.is_set() and done.returncode == 1
    assert done.stderr.endswith("error: the hub did not accept it within 4 s\n")
    push = read_push(fake, "a")
    assert push is not None
    assert (push["state"], push["failure"]) == ("failed", "the hub did not accept it within 4 s")


def test_a_run_that_was_moved_aside_leaves_the_new_one_alone(
    fake: FakeLauncher, hub: FakeHub
) -> None:
    add(fake, "a")
    hold = hub.hold("/commit/")
    sweep = fake.start("sweep", "recipes/toy")
    pidfd = wait_for_push(hold)
    fake.tell("a", "hang")
    launch = fake.start("launch", "recipes/toy/a.yaml", "--fresh")
    fake.next_started()
    hub.let_go()
    wait_until_dead(pidfd)
    assert finish(sweep)[0] == 0
    assert not fake.paths("a").push_path.exists()
    launch.kill()
    finish(launch)


def test_the_first_attempt_records_whether_a_run_is_pushed(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="committed exit 3\nthen complete model")
    set_push(fake, "a", "hub_model_id: lab/first")
    assert main(["sweep", "recipes/toy"]) == 1
    set_push(fake, "a", "hub_model_id: lab/a, hub_push: end")
    capsys.readouterr()
    assert main(["sweep", "recipes/toy"]) == 0
    said = (
        "note: toy/a: its first attempt recorded `hub_push: never`, which still applies; the recipe"
        " now says `hub_push: end`, lab/a"
    )
    assert said in capsys.readouterr().err
    stored = load_json(fake.paths("a").recipe_path)["recipe"]["tracking"]
    assert (stored["hub_push"], stored["hub_model_id"]) == ("never", "lab/first")
    assert hub.repositories == {} and "push" not in read_notes(capsys)
    code, out, err = export(fake, "runs/toy/a", "--push", "lab/a")
    assert (code, out) == (0, f"{hub.url}/lab/a/commit/{1:040x}\n"), err
    assert_is_pushed(fake, hub, "a")


def test_a_push_by_hand_elsewhere_takes_the_place_of_one_that_fails(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a", to="lab/public")
    hub.repositories["lab/public"] = Repository(is_private=False)
    assert main(["sweep", "recipes/toy"]) == 1
    hub.repositories["lab/no"] = Repository(is_private=False)
    assert export(fake, "runs/toy/a", "--push", "lab/no")[0] == 2
    push = read_push(fake, "a")
    assert push is not None and push["repo_id"] == "lab/public"
    assert export(fake, "runs/toy/a", "--push", "lab/a")[0] == 0
    assert_is_pushed(fake, hub, "a")
    assert "push" not in read_notes(capsys)


def test_only_what_the_run_recorded_is_pushed(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="complete model")
    assert main(["sweep", "recipes/toy"]) == 0
    model_dir = fake.paths("a").model_dir
    (model_dir / "notes.txt").write_text("mine")
    assert export(fake, "runs/toy/a", "--push", "lab/a")[0] == 0
    names = {"config.json", "model.safetensors", "tokenizer.json", "README.md"}
    assert hub.repositories["lab/a"].files.keys() == names
    (model_dir / "extra.safetensors").write_bytes(b"weights of somebody else")
    (model_dir / "config.json").write_text("[]")
    capsys.readouterr()
    assert main(["export", "runs/toy/a", "--push", "lab/b"]) == 2
    assert "runs/toy/a is damaged: model/config.json does not match its" in capsys.readouterr().err
    shutil.rmtree(model_dir)
    assert main(["export", "runs/toy/a", "--push", "lab/b"]) == 2
    assert "lab/b" not in hub.repositories


def test_export_wants_a_folder_for_anything_but_the_model_as_it_is(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="complete model")
    assert main(["sweep", "recipes/toy"]) == 0
    for more in ([], ["--push", "lab/a", "--merge"], ["--push", "lab/a", "--checkpoint", "best"]):
        capsys.readouterr()
        assert main(["export", "runs/toy/a", *more]) == 2
        assert "hint: runner export runs/toy/a --output exports/NAME" in capsys.readouterr().err
    assert main(["export", "runs/toy/a", "--push"]) == 2
    assert "has no `tracking.hub_model_id`" in capsys.readouterr().err
    assert main(["export", "runs/toy/none", "--push"]) == 2
    assert "no recipe, run or grid is named 'runs/toy/none'" in capsys.readouterr().err
    assert hub.repositories == {} and not Path("runs/toy/none").exists()


KUBERNETES = [
    *("sweep", "recipes/toy", "--engine", "kubernetes", "--image", "i", "--storage", "s"),
    "--dry-run",
]
STARTERS = [
    ["check", "recipes/toy"],
    ["sweep", "recipes/toy"],
    ["sweep", "recipes/toy", "--dry-run"],
    [
        *[
            "sweep",
            "recipes/toy",
            "--engine",
            "kubernetes",
            "--image",
            "i",
            "--storage",
            "s",
            "--dry-run",
        ]
    ],
    ["launch", "recipes/toy/a.yaml"],
    ["launch", "recipes/toy/a.yaml", "--dry-run"],
]


@pytest.mark.parametrize("command", STARTERS, ids=" ".join)
def test_a_placeholder_owner_is_refused_before_anything_starts(
    command: list[str], fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a", to="OWNER/model")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "toy/a: `OWNER` in `hub_model_id: OWNER/model` is a placeholder" in err
    assert "hub_model_id: {{" in err and "tracking.hub_model_id=OWNER/NAME" in err
    assert fake.events() == [] and not fake.paths("a").run_dir.exists()


@pytest.mark.parametrize("command", STARTERS, ids=" ".join)
def test_a_missing_token_is_refused_before_anything_starts(
    command: list[str],
    fake: FakeLauncher,
    hub: FakeHub,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    add(fake, "a")
    monkeypatch.delenv("HF_TOKEN")
    code = main(command)
    err = capsys.readouterr().err
    if "kubernetes" in command:  # its jobs have a separate environment
        assert "HF_TOKEN" not in err
        return
    assert code == 2
    assert "HF_TOKEN is not set" in err and "set HF_TOKEN in the environment" in err
    assert fake.events() == [] and not fake.paths("a").run_dir.exists()


@pytest.mark.parametrize("command", STARTERS[:4], ids=" ".join)
def test_two_runs_with_one_repository_are_refused_before_anything_starts(
    command: list[str], fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a", to="lab/one")
    add(fake, "b", to="Lab/One")  # the hub does not distinguish them
    add(fake, "c")
    assert main(command) == 2
    err = capsys.readouterr().err
    assert "toy/a and toy/b share one `hub_model_id`, lab/one: each push would delete" in err
    assert "toy/c" not in err.partition("error:")[2] and fake.events() == []


def test_a_repository_that_holds_another_run_is_refused(
    fake: FakeLauncher, hub: FakeHub, capsys: pytest.CaptureFixture[str]
) -> None:
    add(fake, "a")
    assert main(["sweep", "recipes/toy"]) == 0
    add(fake, "b", to="lab/a")
    variant = ["launch", "recipes/toy/a.yaml", "training.max_steps=3"]
    for command in (["sweep", "recipes/toy/b.yaml"], variant):
        capsys.readouterr()
        assert main(command) == 2
        err = capsys.readouterr().err
        assert "would delete the weights in lab/a: " in err and "runs/toy/a was pushed there" in err
    assert fake.started() == ["a"]
    fake.tell("variant", "complete model")
    assert main([*variant, "tracking.hub_model_id=lab/variant", "--name", "variant"]) == 0
    assert set(hub.repositories) == {"lab/a", "lab/variant"}


@pytest.mark.parametrize(
    ("tracking", "said"),
    [
        ("hub_push: end", "`hub_push: end` needs a repository of the run's own, such as"),
        (
            "hub_push: end, hub_model_id: model",
            "`hub_model_id: model` is not a repository on the hub",
        ),
        ("hub_push: end, hub_model_id: lab/a--b", "without `--`, `..` and `.git` at the end"),
        ("hub_push: end, hub_model_id: lab/a.git", "is not a repository on the hub"),
        ("hub_push: always, hub_model_id: lab/a", "got the text 'always', expected never or end"),
    ],
)
def test_a_recipe_says_where_its_model_goes(
    tracking: str, said: str, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    set_push(fake, "a", tracking)
    assert main(["sweep", "recipes/toy"]) == 2
    assert said in capsys.readouterr().err
    assert fake.events() == []


def test_a_push_that_does_not_end_by_itself_is_killed(fake: FakeLauncher) -> None:
    """A signal is not heard inside of native code."""
    fake.add("a")
    [selected] = select_recipes(["recipes/toy"], Path("runs"))
    deaf = subprocess.Popen(
        [sys.executable, "-IS", "-c", "import signal\nwhile True: signal.pause()"]
    )
    said: list[str] = []
    with selectors.DefaultSelector() as selector:
        pushes = Pushes(said.append, lambda name, end: said.append(f"{name} {end}"), selector)
        pidfd = os.pidfd_open(deaf.pid)
        pushes.active[pidfd] = RunningPush(selected, "lab/a", deaf, Path("push.txt"), 0, 600, 700.0)
        selector.register(pidfd, selectors.EVENT_READ)
        pushes.look(699.0)
        assert deaf.poll() is None
        pushes.look(700.0)
        wait_until_dead(pidfd)
        pushes.finish(pidfd)
    assert said == [
        "toy/a completed, but not pushed to lab/a: the hub did not accept it within 600 s, so the"
        " push was killed"
    ]
