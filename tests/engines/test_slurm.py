"""Batch scripts: exactly what is submitted, and what one does with signals and exit codes; no Slurm
is needed.

`UPDATE_GOLDEN=1` rewrites `golden/slurm_job.sh`.
"""

from __future__ import annotations

import os
import signal
import subprocess
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.engines.slurm import (
    SlurmOptions,
    build_script,
    check_options,
    divide_into_arrays,
    hold_submissions,
)
from runner.errors import RefusedError
from runner.launch.placement import Resources, count_allotted_cores
from runner.recipe.parse import Recipe, load_recipe
from runner.run.paths import SubmissionPaths, submission_lock_path, submissions_dir
from tests.conftest import ROOT
from tests.support.fake_launcher import PATIENCE_SECONDS, FakeLauncher, fake

__all__ = ["fake"]

GOLDEN = ROOT / "tests" / "golden" / "slurm_job.sh"
HOSTILE = "a 'b' \"c\" $(touch hacked) `touch hacked` %j \\x;&|é"
OPTIONS = SlurmOptions(
    Path("runs"),
    num_slots=2,
    time_limit="2:00:00",
    stop_before_seconds=300,
    extra=("--partition=long", '--comment=it\'s "mine" \\ here', "--exclusive"),
)

# Stands for `python -P -m runner launch RECIPE --output-root=DIR`: notes its words, and ends as it
# is told when it is signalled, or at once.
PYTHON = """\
#!/bin/bash
printf '%s\\n' "$PWD" "$@" > "$NOTES/words"
for one in USR1 TERM; do
  trap "echo $one >> '$NOTES/signals'; [ $one != \\"$END_AT\\" ] || exit $CODE" $one
done
echo > "$NOTES/started"
[ -n "$END_AT" ] || exit $CODE
while :; do read -t 0.05 <> "$NOTES/never"; done
"""
SCONTROL = """\
#!/bin/bash
echo "$@" >> "$NOTES/scontrol"
"""


def build(root: Path, *names: str, project: Path | None = None) -> str:
    return build_script(
        names,
        Resources(num_machines=1, num_gpus=2, num_cores=8),
        OPTIONS,
        python=str(root / "python"),
        project_dir=project or root,
        submission=SubmissionPaths(root / "runs" / ".slurm" / "20260101T000000-0a1b2c3d"),
    )


def test_the_script_of_a_grid() -> None:
    root = Path("/home/me/my 'study'")
    text = build(
        root, "demo/gemma_060_full_seed1", "demo/gemma_180_full_seed1", "demo/llama_060_full_seed1"
    )
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text, "UPDATE_GOLDEN=1 rewrites it"


def test_its_tasks_are_told_to_score_the_base_themselves(tmp_path: Path) -> None:
    plain, own = (
        build_script(
            ["toy/a"],
            Resources(num_machines=1, num_gpus=0, num_cores=1),
            replace(OPTIONS, owns_base=owns_base),
            python="python",
            project_dir=tmp_path,
            submission=SubmissionPaths(tmp_path),
        )
        for owns_base in (False, True)
    )
    assert own.replace(" --own-base", "") == plain != own


class Job:
    """One task of a script, executed by bash, with a scripted `runner`."""

    def __init__(self, root: Path, *, code: int, end_at: str = "") -> None:
        self.notes = root / "notes"
        project = root / HOSTILE
        for folder in (self.notes, project, root / "bin"):
            folder.mkdir()
        os.mkfifo(self.notes / "started")
        os.mkfifo(self.notes / "never")
        for path, text in ((root / "python", PYTHON), (root / "bin" / "scontrol", SCONTROL)):
            path.write_text(text)
            path.chmod(0o755)
        script = root / "job.sh"
        script.write_text(build(root, "toy/a", "toy/b", project=project))
        self.process = subprocess.Popen(
            ["bash", str(script)],
            cwd=root,
            env={
                **os.environ,
                "PATH": f"{root / 'bin'}:{os.environ['PATH']}",
                "NOTES": str(self.notes),
                "CODE": str(code),
                "END_AT": end_at,
                "SLURM_ARRAY_JOB_ID": "17",
                "SLURM_ARRAY_TASK_ID": "1",
            },
            stdin=subprocess.DEVNULL,
        )
        assert (self.notes / "started").read_text() == "\n"

    def send(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def wait(self) -> int:
        return self.process.wait(PATIENCE_SECONDS)

    def read(self, name: str) -> list[str]:
        path = self.notes / name
        return path.read_text().splitlines() if path.exists() else []


@pytest.mark.parametrize("code", [0, 1, 2, 10, 13, 14, 137])
def test_a_task_executes_its_run_and_ends_with_its_code(code: int, tmp_path: Path) -> None:
    job = Job(tmp_path, code=code)
    assert job.wait() == code
    recipe = (
        tmp_path / "runs" / ".slurm" / "20260101T000000-0a1b2c3d" / "recipes" / "toy" / "b.json"
    )
    words = ["-P", "-m", "runner", "launch", str(recipe), "--output-root=runs"]
    assert job.read("words") == [str(tmp_path / HOSTILE), *words]
    assert job.read("scontrol") == [] and not list(tmp_path.rglob("hacked"))


@pytest.mark.parametrize(
    ("code", "requeues"),
    [(13, True), (138, True), (137, True), (0, False), (1, False), (14, False)],
)
def test_a_task_that_was_asked_to_leave_is_queued_again_only_if_it_left(
    code: int, requeues: bool, tmp_path: Path
) -> None:
    job = Job(tmp_path, code=code, end_at="USR1")
    job.send(signal.SIGUSR1)
    assert job.wait() == (0 if requeues else code)
    assert job.read("signals") == ["USR1"]
    assert job.read("scontrol") == (["requeue 17_1"] if requeues else [])


def test_scancel_never_queues_again(tmp_path: Path) -> None:
    job = Job(tmp_path, code=13, end_at="TERM")
    job.send(signal.SIGTERM)  # Slurm sends it to all processes, not to the script alone
    os.kill(find_child(job.process.pid), signal.SIGTERM)
    # Bash 5.2 loses the code of what ends while a trap interrupts its `wait`
    assert job.wait() in (13, 255)
    assert job.read("signals") == ["TERM"] and job.read("scontrol") == []


def test_scancel_after_the_warning_does_not_queue_again_either(tmp_path: Path) -> None:
    job = Job(tmp_path, code=13, end_at="TERM")
    job.send(signal.SIGUSR1)
    while job.read("signals") != ["USR1"]:
        os.sched_yield()
    # A second warning must not reach the run, where it would mean: stop immediately.
    job.send(signal.SIGUSR1)
    job.send(signal.SIGTERM)
    os.kill(find_child(job.process.pid), signal.SIGTERM)
    # Bash 5.2 loses the code of what ends while a trap interrupts its `wait`
    assert job.wait() in (13, 255)
    assert job.read("signals") == ["USR1", "TERM"] and job.read("scontrol") == []


def find_child(pid: int) -> int:
    return int(Path(f"/proc/{pid}/task/{pid}/children").read_text().split()[0])


@pytest.fixture
def in_project(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)  # the launch configs are named from there


def recipe(*overrides: str) -> Recipe:
    return load_recipe(ROOT / "recipes/math_tools/gemma-7b-it_lr5e-6.yaml", overrides)


def test_one_array_per_kind_of_machine_none_too_large(in_project: None) -> None:
    runs = [recipe(f"launch.num_processes={number}") for number in (8, 4, 8, 8)]
    groups = divide_into_arrays(runs, 2)
    assert [(resources.num_gpus, len(group)) for resources, group in groups] == [
        (8, 2),
        (8, 1),
        (4, 1),
    ]
    assert groups[0][1] == [runs[0], runs[2]] and groups[1][1] == [runs[3]]


@pytest.mark.parametrize(
    "option",
    [
        "--array=0-3",
        "--arr=0-3",
        "--signal=TERM",
        "--no-requeue",
        "--wrap=x",
        "--output=x",
        "-a0",
        "qos=x",
        "--",
        "--a\nb",
    ],
)
def test_options_that_would_lose_runs_are_refused(option: str) -> None:
    with pytest.raises(RefusedError):
        check_options(replace(OPTIONS, extra=(option,)))


def test_a_time_limit_that_leaves_no_time_is_refused() -> None:
    with pytest.raises(RefusedError, match="120 s before that"):
        check_options(SlurmOptions(Path("runs"), time_limit="2"))
    for limit in ("3", "2:01", "1-0", "0:02:01", "UNLIMITED"):
        check_options(SlurmOptions(Path("runs"), time_limit=limit))


def test_options_of_the_site_are_taken() -> None:
    extra = ("--partition=a,b", "--account=x", "--gres=gpu:a100:4", "--exclusive")
    check_options(SlurmOptions(Path("runs"), extra=extra))


def test_paths_that_slurm_cannot_hold_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RefusedError, match="line break"):
        build(tmp_path, "toy/a", project=tmp_path / "a\nb")
    for letter in "%\\":
        with pytest.raises(RefusedError, match="backslash"):
            build(tmp_path / f"a{letter}b", "toy/a")


def add_silent_slurm(fake: FakeLauncher) -> None:
    """Slurm's programs, without a controller that answers them."""
    failing = "#!/bin/sh\necho 'slurm_load_jobs error: Unable to contact controller' >&2; exit 1\n"
    for name, text in (
        ("squeue", failing),
        ("sbatch", f"#!/bin/sh\ntouch {fake.home}/submitted\n"),
    ):
        (fake.home / name).write_text(text)
        (fake.home / name).chmod(0o755)


def test_a_dry_run_prints_the_script_and_touches_nothing(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    add_silent_slurm(fake)
    fake.add("a", "b")
    before = fake.tree()
    assert main(["sweep", "recipes/toy", "--engine", "slurm", "--slots", "1", "--dry-run"]) == 0
    output = capsys.readouterr()
    assert output.out.startswith("#!/bin/bash\n") and "#SBATCH --array=0-1%1\n" in output.out
    assert "gres" not in output.out, "the launch config asks for the CPU"
    assert "runs that Slurm has already queued" in output.err and "launch  toy/a" in output.err
    assert fake.tree() == before


def test_a_slurm_that_does_not_answer_is_told_and_nothing_is_submitted(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    add_silent_slurm(fake)
    fake.add("a")
    assert main(["sweep", "recipes/toy", "--engine", "slurm"]) == 2
    assert (
        "squeue failed: slurm_load_jobs error: Unable to contact controller"
        in capsys.readouterr().err
    )
    assert not (fake.home / "submitted").exists() and os.listdir(
        submissions_dir(fake.root / "runs")
    ) == ["lock"]


def test_only_one_sweep_submits_at_a_time(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    fake.add("a")
    with hold_submissions(fake.root / "runs"):
        assert main(["sweep", "recipes/toy", "--engine", "slurm"]) == 2
    assert "another sweep is submitting" in capsys.readouterr().err
    assert submission_lock_path(fake.root / "runs").exists()


def test_the_lock_is_held_from_the_queue_to_the_last_submission(
    fake: FakeLauncher, capsys: pytest.CaptureFixture[str]
) -> None:
    lock = submission_lock_path(fake.root / "runs")
    for name in ("squeue", "scontrol", "sbatch"):
        look = f"flock --nonblock '{lock}' true && state=free || state=held"
        note = f"echo {name} $state >> '{fake.home}/looks'"
        answer = f"[ {name} = sbatch ] && echo 17; [ {name} != scontrol ] || echo MaxArraySize = 2"
        (fake.home / name).write_text(f"#!/bin/bash\n{look}\n{note}\n{answer}\ntrue\n")
        (fake.home / name).chmod(0o755)
    fake.add("a", "b", "c")
    assert main(["sweep", "recipes/toy", "--engine", "slurm"]) == 0
    looks = (fake.home / "looks").read_text().splitlines()
    assert looks == ["squeue held", "scontrol held", "sbatch held", "sbatch held"]
    output = capsys.readouterr().out
    assert output.count("launch  toy/") == 3 and output.count("as slurm 17") == 2
    subprocess.run(["flock", "--nonblock", str(lock), "true"], check=True)


@pytest.mark.parametrize(
    "words", [["--gpus", "0,1"], ["--fail-fast"], ["--slurm-option=--array=1"]]
)
def test_what_is_not_for_slurm_is_refused(words: list[str], fake: FakeLauncher) -> None:
    fake.add("a")
    assert main(["sweep", "recipes/toy", "--engine", "slurm", *words]) == 2
    assert not submissions_dir(fake.root / "runs").exists()


def test_a_job_has_the_cores_that_slurm_gave_it() -> None:
    all_of_them = len(os.sched_getaffinity(0))
    assert count_allotted_cores({"SLURM_CPUS_ON_NODE": "1"}) == 1
    assert (
        count_allotted_cores({"SLURM_CPUS_ON_NODE": "10000"})
        == count_allotted_cores({})
        == all_of_them
    )
