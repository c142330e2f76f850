"""The engines that write a file: runs that another machine finds, and a file with
nothing else in it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from runner.engines.manifests import build_label, check_output_root, check_runs
from runner.errors import RefusedError
from tests.conftest import ROOT
from tests.support.fake_launcher import FakeLauncher, fake, finish
from tests.support.submissions import DEMO, make_pending

__all__ = ["fake"]

KUBERNETES = (
    "--engine",
    "kubernetes",
    "--dry-run",
    "--image",
    "some/image",
    "--storage",
    "my-claim",
)


@pytest.fixture(autouse=True)
def project_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


@pytest.mark.parametrize("path", ["/elsewhere/runs", "../runs", "a/../../runs"])
def test_what_is_outside_the_project_folder_is_refused(path: str) -> None:
    with pytest.raises(
        RefusedError, match="outside the project folder, which is all that other machines see"
    ):
        check_output_root(Path(path))
    with pytest.raises(RefusedError, match="outside the project folder"):
        check_runs(make_pending(str(ROOT / DEMO)))
    check_output_root(Path("runs/more"))


def test_a_run_directory_and_a_run_on_several_machines_are_refused(fake: FakeLauncher) -> None:
    fake.add("one", "two", num_processes=2)
    assert finish(fake.start("launch", "recipes/toy/one.yaml"))[0] == 0
    with pytest.raises(RefusedError, match="runs/toy/one is a run directory"):
        check_runs(make_pending("runs/toy/one"))
    path = fake.root / "recipes" / "toy" / "two.yaml"
    path.write_text(
        path.read_text().replace("num_processes: 2", "num_processes: 2\n  num_machines: 2")
    )
    with pytest.raises(RefusedError, match="toy/two needs 2 machines"):
        check_runs(make_pending("recipes/toy/two.yaml"))


def test_labels_are_what_dns_has() -> None:
    assert [build_label(text, 5) for text in ("Ab_c.d", "---", "a---", "0123456", "ab.c.d")] == [
        *("ab-c", "runs", "a", "01234", "ab-c"),
    ]


def test_stdout_is_the_file_and_holds_what_a_sweep_would_launch(fake: FakeLauncher) -> None:
    fake.add("done", "failed", "new")
    fake.tell("failed", "fail configuration no")
    for name in ("done", "failed"):
        finish(fake.start("launch", f"recipes/toy/{name}.yaml"))
    before = fake.tree()
    code, stdout, stderr = finish(fake.start("sweep", "recipes/toy", *KUBERNETES))
    assert code == 0 and fake.tree() == before
    (job,) = yaml.safe_load_all(stdout)
    assert job["spec"]["template"]["spec"]["containers"][0]["command"][-1] == "recipes/toy/new.yaml"
    assert job["spec"]["completions"] == 1
    assert (
        "skip    toy/done" in stderr
        and "skip    toy/failed" in stderr
        and "launch  toy/new" in stderr
    )
    _, again, _ = finish(fake.start("sweep", "recipes/toy", *KUBERNETES, "--retry-failed"))
    assert yaml.safe_load(again)["spec"]["completions"] == 2
    code, stdout, stderr = finish(
        fake.start("sweep", "recipes/toy", "--where", "size=4", *KUBERNETES)
    )
    assert (code, stdout) == (0, "") and "nothing to launch" in stderr


def test_a_task_that_sweeps_is_told_to_start_cold_and_a_job_starts_cold_anyway(
    fake: FakeLauncher,
) -> None:
    fake.add("one")
    skypilot = ("--engine", "skypilot", "--dry-run", "--image", "i", "--storage", "s3://bucket")
    written = {
        (engine, *asked): finish(fake.start("sweep", "recipes/toy", *options, *asked))
        for engine, options in (("skypilot", skypilot), ("kubernetes", KUBERNETES))
        for asked in ((), ("--cold",))
    }
    assert [code for code, *_ in written.values()] == [0] * 4
    tasks = [yaml.safe_load(written["skypilot", *asked][1]) for asked in ((), ("--cold",))]
    warm, cold = (task.pop("run") for task in tasks)
    assert cold.split() == [*warm.split(), "--cold"] and tasks[0] == tasks[1]
    assert written["kubernetes", "--cold"] == written[("kubernetes",)]


def test_what_is_submitted_is_told_to_score_the_base_itself(fake: FakeLauncher) -> None:
    fake.add("one")
    skypilot = ("--engine", "skypilot", "--dry-run", "--image", "i", "--storage", "s3://bucket")
    for options in (skypilot, KUBERNETES):
        plain, own = (
            finish(fake.start("sweep", "recipes/toy", *options, *asked))[1]
            for asked in ((), ("--own-base",))
        )
        assert own.replace(" --own-base", "") == plain != own


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ("--engine", "kubernetes"),
            "`--engine kubernetes` starts nothing; with `--dry-run` it prints a file",
        ),
        (
            ("--engine", "skypilot", "--image", "i", "--storage", "s"),
            "`--engine skypilot` starts nothing",
        ),
        (
            ("--engine", "kubernetes", "--dry-run", "--storage", "s"),
            "needs `--image`: a container image",
        ),
        (
            ("--engine", "kubernetes", "--dry-run", "--image", "i"),
            "needs `--storage`: the claim of the volume",
        ),
        (("--engine", "skypilot", "--dry-run", "--image", "i"), "needs `--storage`: the bucket"),
        ((*KUBERNETES, "--gpus", "0"), "`--gpus` names GPUs of this machine"),
    ],
)
def test_what_a_file_cannot_be_made_of_is_told(
    fake: FakeLauncher, options: tuple[str, ...], message: str
) -> None:
    fake.add("one")
    before = fake.tree()
    code, stdout, stderr = finish(fake.start("sweep", "recipes/toy", *options))
    assert (code, stdout) == (2, "") and message in stderr
    assert fake.tree() == before
