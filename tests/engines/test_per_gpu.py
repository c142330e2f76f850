"""`--gpus` and `--per-gpu` of sweeps: the GPU of each run, and refusals before anything starts, in
dry runs and real ones.
"""

from __future__ import annotations

import os
import re
from collections import Counter

import pytest

from runner.cli.main import main
from runner.launch.command import Placement
from runner.launch.placement import Devices
from runner.run.record import Attempt
from tests.conftest import Project
from tests.support.fake_launcher import FakeLauncher, fake, finish, wait_until_dead
from tests.support.fake_nvidia_smi import GPU_0, GPU_1, LISTED, MIG_0, MIG_1, TWO, add_nvidia_smi

__all__ = ["fake"]
SWEEP = ("sweep", "recipes/toy")
ON_GPU = "launch.accelerate_config=accelerate_configs/single_gpu.yaml"


def refuse_both(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], *options: str, verb: str = "sweep"
) -> str:
    """The errors of a sweep that starts nothing; its dry run says the same."""
    told = []
    for dry_run in (["--dry-run"], []) if verb == "sweep" else ([],):
        assert main([verb, "recipes/toy", *options, *dry_run]) == 2
        told.append(capsys.readouterr().err)
        assert not (fake.root / "runs" / "toy").exists() and fake.events() == []
    assert len(set(told)) == 1
    return told[0]


def test_a_gpu_that_there_is_not_starts_nothing(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    add_nvidia_smi(fake.home, TWO)
    said = refuse_both(fake, capsys, "--gpus", "0,2")
    assert "error: `--gpus 0,2`: 2: there is no such GPU here; nvidia-smi lists\n" in said
    assert f"  1  {GPU_1}  NVIDIA A100-SXM4-80GB\n" in said
    assert "hint: --gpus 0,1\n" in said
    assert main(["sweep", "recipes/toy", "--gpus", "0,1"]) == 0


def test_names_that_nobody_can_compare_pass_with_a_note(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    add_nvidia_smi(fake.home, "", status=9)
    assert "'cuda:0' is not the name of a GPU" in refuse_both(fake, capsys, "--gpus", "cuda:0")
    note = "note: nvidia-smi does not answer here, so `--gpus 3` is used unchecked\n"
    for dry_run in (["--dry-run"], []):
        assert main([*SWEEP, "--gpus", "3", *dry_run]) == 0
        assert note in capsys.readouterr().err
    assert fake.attempts("a")[0]["devices"] == "3"


def test_what_an_outer_choice_hides_is_refused(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.add("a", "b", "c")
    add_nvidia_smi(fake.home, LISTED)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"1,{MIG_0}")
    said = refuse_both(fake, capsys, "--gpus", "0")
    assert f"`CUDA_VISIBLE_DEVICES=1,{MIG_0}` is set here and hides 0" in said
    assert f"hint: --gpus 1,{MIG_0}\n" in said
    assert main([*SWEEP, "--per-gpu", "1"]) == 0
    assert {fake.attempts(name)[0]["devices"] for name in "abc"} == {"1", MIG_0}


def test_one_gpu_twice_is_told_of_places(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    add_nvidia_smi(fake.home, TWO)
    assert "hint: --gpus 0 --per-gpu 2 " in refuse_both(fake, capsys, "--gpus", "0,0")
    assert "hint: --gpus 0 --per-gpu 2 " in refuse_both(fake, capsys, "--gpus", f"0,{GPU_0[:14]}")


def test_several_runs_share_each_gpu(fake: FakeLauncher) -> None:
    names = list("abcdefgh")
    fake.add(*names, told="wait")
    add_nvidia_smi(fake.home, TWO)
    sweep = fake.start(*SWEEP, "--gpus", "0,1", "--per-gpu", "3")
    begun = [fake.next_started()[0] for _ in range(6)]
    devices = {name: fake.attempts(name)[0]["devices"] for name in begun}
    assert sorted(begun) == names[:6] and Counter(devices.values()) == {"0": 3, "1": 3}
    ended = next(name for name in begun if devices[name] == "1")
    fake.let_go(ended)
    assert fake.next_started()[0] == "g"
    assert fake.attempts("g")[0]["devices"] == "1"
    for name in [*begun, "g", "h"]:
        if name != ended:
            fake.let_go(name)
    code, _, stderr = finish(sweep)
    assert code == 0, stderr
    attempts = [fake.attempts(name)[0] for name in names]
    assert {one["runs_per_gpu"] for one in attempts} == {3}
    assert {one["started"] for one in attempts} == {"warm"}
    for event in fake.events():
        recorded = fake.attempts(event["name"])[0]
        assert event["environment"]["CUDA_VISIBLE_DEVICES"] == recorded["devices"]
        assert event["environment"]["CUDA_DEVICE_ORDER"] == "PCI_BUS_ID"


def test_a_worker_of_one_gpu_forks_no_run_of_another(fake: FakeLauncher) -> None:
    fake.add("a", "b", "d", told="wait")
    fake.add("c", told="wait", num_processes=2)
    sweep = fake.start(*SWEEP, "--gpus", "0,1")
    pids = dict([fake.next_started(), fake.next_started()])
    pidfd = os.pidfd_open(pids["b"])
    # The worker of GPU 1 is the first that has nothing to do, and that of GPU 0 the second.
    fake.let_go("b")
    wait_until_dead(pidfd)
    os.close(pidfd)
    fake.let_go("a")
    for name in ("c", "d"):
        assert fake.next_started()[0] == name
        fake.let_go(name)
    code, _, stderr = finish(sweep)
    assert code == 0, stderr
    assert [fake.attempts(name)[0]["started"] for name in "abcd"] == [
        "warm",
        "warm",
        "cold",
        "warm",
    ]
    assert [fake.attempts(name)[0]["devices"] for name in "abcd"] == ["0", "1", "0,1", "0"]
    assert len(fake.workers()) == 2
    [seen] = {e["environment"]["CUDA_VISIBLE_DEVICES"] for e in fake.events() if e["name"] == "d"}
    assert seen == "0"


def test_runs_of_two_processes_take_a_place_on_two_gpus(fake: FakeLauncher) -> None:
    fake.add("a", "b", "c", num_processes=2, told="wait")
    sweep = fake.start(*SWEEP, "--gpus", "3,5", "--per-gpu", "2")
    assert {fake.next_started()[0], fake.next_started()[0]} == {"a", "b"}
    for name in "abc":
        fake.let_go(name)
    assert finish(sweep)[0] == 0
    assert [fake.attempts(name)[0]["devices"] for name in "abc"] == ["3,5"] * 3


def test_more_processes_than_gpus_never_fit(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", num_processes=2)
    said = refuse_both(fake, capsys, "--gpus", "0", "--per-gpu", "4")
    assert "toy/a needs 2 GPUs, one per process; the sweep has 1" in said


def test_places_on_gpus() -> None:
    devices = Devices(6, ["0", "1"], per_gpu=3)
    share = max(1, (os.cpu_count() or 1) // 6)

    def place(count: int, *gpus: str) -> Placement:
        return Placement(count, gpus, share * count, runs_per_gpu=3)

    one, both = devices.take(1), devices.take(2)
    assert one == place(1, "0") and both == place(2, "0", "1")
    assert [devices.take(1), devices.take(1)] == [place(1, "1"), place(1, "0")]
    assert devices.take(2) is None, "one place, on one GPU"
    last = devices.take(1)
    assert last == place(1, "1") and devices.take(1) is None
    devices.release(one)
    assert devices.take(2) is None and devices.take(1) == one


def test_all_gpus_that_there_are(fake: FakeLauncher) -> None:
    fake.add(*"abcdefgh")
    add_nvidia_smi(fake.home, LISTED)
    assert main([*SWEEP, "--per-gpu", "2"]) == 0
    devices = [fake.attempts(name)[0]["devices"] for name in "abcdefgh"]
    assert set(devices) <= {"0", "1", MIG_0, MIG_1} and len(set(devices)) > 1


def test_gpus_that_nobody_lists_have_to_be_named(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="fail transient x\nthen complete")
    add_nvidia_smi(fake.home, "", status=9)
    for verb in ("sweep", "rerun"):
        said = refuse_both(fake, capsys, "--per-gpu", "2", verb=verb)
        assert "the GPUs of this machine are unknown" in said
        assert "hint: name them: --gpus 0,1\n" in said
    assert main([*SWEEP, "--gpus", "0", "--per-gpu", "2"]) == 1
    assert main(["rerun", "recipes/toy", "--gpus", "0", "--per-gpu", "2"]) == 0
    assert [one["runs_per_gpu"] for one in fake.attempts("a")] == [2, 2]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--slots", "2"), "leave out one of them\n\nhint: --per-gpu 2"),
        (("--engine", "slurm"), "`--per-gpu` is for the local engine"),
        (
            ("--engine", "kubernetes", "--image", "i", "--storage", "s", "--dry-run"),
            "`--per-gpu` is for the local engine",
        ),
    ],
)
def test_places_are_of_this_machine(
    options: tuple[str, ...], words: str, fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    assert main([*SWEEP, "--per-gpu", "2", *options]) == 2
    assert words in capsys.readouterr().err
    assert not (fake.root / "runs").exists()


@pytest.mark.parametrize("count", ["0", "-1", "two", "1.5"])
def test_a_number_of_places_is_a_number(count: str, fake: FakeLauncher) -> None:
    fake.add("a")
    with pytest.raises(SystemExit) as caught:
        main([*SWEEP, "--gpus", "0", "--per-gpu", count])
    assert caught.value.code == 2


def test_the_preview_shows_where_runs_go(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add(*"abcde")
    add_nvidia_smi(fake.home, TWO)
    before = fake.tree()
    assert main([*SWEEP, "--gpus", "0,1", "--per-gpu", "2", "--dry-run"]) == 0
    out = capsys.readouterr().out
    assert re.findall(r"CUDA_VISIBLE_DEVICES=(\S+)", out) == ["0", "1", "0", "1", "0"]
    assert fake.tree() == before
    assert main([*SWEEP, "--dry-run"]) == 0
    assert "CUDA_VISIBLE_DEVICES" not in capsys.readouterr().out


def test_out_of_memory_beside_others_is_told(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a", told="fail out_of_memory CUDA out of memory")
    told = "up to 3 runs at a time shared the memory of GPU 0; `--per-gpu 2` leaves more for each"
    assert main([*SWEEP, "--gpus", "0", "--per-gpu", "3"]) == 1
    assert f"CUDA out of memory\n{told}\n" in capsys.readouterr().err
    assert fake.attempts("a")[0]["failure"]["message"] == f"CUDA out of memory\n{told}"
    assert main([*SWEEP, "--gpus", "0"]) == 1
    assert "shared the memory" not in capsys.readouterr().err


def test_older_records_shared_nothing(fake: FakeLauncher) -> None:
    fake.add("a")
    assert main([*SWEEP]) == 0
    [attempt] = fake.attempts("a")
    assert attempt.pop("runs_per_gpu") == 1
    assert Attempt.model_validate(attempt).runs_per_gpu == 1


def test_runs_that_together_need_more_than_a_gpu_has_are_refused(project: Project) -> None:
    project.add_model("gemma")
    for number in range(3):
        project.write_recipe(f"recipes/tests/r{number}.yaml", ON_GPU, f"training.seed={number}")
    larger = ("training.global_batch_size=16", "training.per_device_train_batch_size=16")
    project.write_recipe("recipes/tests/largest.yaml", ON_GPU, *larger)
    project.write_recipe("recipes/tests/unknown.yaml", ON_GPU, "model.path=models/none")
    project.write_recipe("recipes/tests/cpu.yaml")
    bin_dir = project.root / "bin"
    bin_dir.mkdir()
    path = {"PATH": f"{bin_dir}:{os.environ['PATH']}"}

    def sweep(*options: str, recipes: str = "recipes/tests") -> tuple[int, str]:
        done = project.cli("sweep", recipes, "--gpus", "0,1", *options, environment=path)
        assert "Traceback" not in done.stderr, done.stderr
        return done.returncode, done.stderr

    # CUDA's own 0.8 GiB a run, and little else.
    add_nvidia_smi(bin_dir, TWO, memory=(f"{GPU_0}, 2200", f"{GPU_1}, [N/A]"))
    code, said = sweep("--per-gpu", "4")
    assert code == 2
    assert "error: `--per-gpu 4`: the largest runs that may share a GPU need an estimated" in said
    assert ", but GPU 0 has 2.15 GiB:\n" in said and "hint: --per-gpu 2\n" in said
    shown = re.findall(r"^  [\d.]+ [MG]iB  tests/(\w+)$", said, re.MULTILINE)
    assert shown[0] == "largest" and sorted(shown[1:]) == ["r0", "r1", "r2"]
    assert "note: the memory of GPU 1 is unknown, so `--per-gpu 4` is used unchecked\n" in said
    assert "note: the memory need of tests/unknown is not estimated, so `--per-gpu 4`" in said
    assert not (project.root / "runs" / "tests").exists()
    code, said = sweep("--per-gpu", "2", "--dry-run")
    assert code == 0 and "note: the 2 largest runs need an estimated" in said
    assert "of the 2.15 GiB of GPU 0 (`runner check`" in said
    code, said = sweep("--per-gpu", "9", "--dry-run", recipes="recipes/tests/cpu.yaml")
    assert code == 0 and "GiB" not in said, "nothing of it uses a GPU"
