"""Indexed Jobs: accepted by Kubernetes' own schemas, each index starts its run, and each ending has
its consequence.
"""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import kubernetes_validate
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from runner.engines.kubernetes import _escape, build_jobs_file
from runner.engines.manifests import PendingRun
from runner.run.record import EXIT_CODES
from tests.conftest import ROOT
from tests.support.submissions import (
    DEMO,
    DEMO_2,
    EIGHT_GPUS,
    OPTIONS,
    compare_with_golden,
    make_pending,
)

OLDEST, NEWEST = "1.29", kubernetes_validate.latest_version()


@pytest.fixture(autouse=True)
def project_folder(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(ROOT)


def build(runs: Sequence[PendingRun], **changes: Any) -> list[dict[str, Any]]:
    return list(yaml.safe_load_all(build_jobs_file(runs, replace(OPTIONS, **changes))))


def test_files_of_committed_recipes() -> None:
    mixed = make_pending(DEMO, EIGHT_GPUS, DEMO_2)
    text = build_jobs_file(mixed, replace(OPTIONS, num_slots=2))
    compare_with_golden([text], "kubernetes_jobs.yaml")


@pytest.mark.parametrize("version", [OLDEST, NEWEST])
def test_kubernetes_own_schema_accepts_the_jobs(version: str) -> None:
    jobs = build(make_pending(DEMO, EIGHT_GPUS), num_slots=1, fail_fast=True)
    assert len(jobs) == 2
    for job in jobs:
        kubernetes_validate.validate(job, version, strict=True)
    jobs[0]["spec"]["podFailurePolicy"]["rules"][0]["action"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(jobs[0], version, strict=True)
    jobs[1]["spec"]["backoffLimitPerIndexes"] = 3
    with pytest.raises(kubernetes_validate.ValidationError):
        kubernetes_validate.validate(jobs[1], version, strict=True)


def test_the_api_server_s_further_rules_are_met() -> None:
    """Checks that are in no schema: Kubernetes' `pkg/apis/batch/validation`, which is not available
    without a cluster.
    """
    for job in build(make_pending(DEMO, EIGHT_GPUS), fail_fast=True):
        spec = job["spec"]
        pod = spec["template"]["spec"]
        assert spec["completionMode"] == "Indexed" and pod["restartPolicy"] == "Never"
        assert spec["podReplacementPolicy"] == "Failed", (
            "the only one allowed with a failure policy"
        )
        assert (
            0 <= spec["maxFailedIndexes"] <= spec["completions"]
            and spec["backoffLimitPerIndex"] >= 0
        )
        name = job["metadata"]["name"]
        assert re.fullmatch(r"[a-z0-9]([-a-z0-9]*[a-z0-9])?", name) and len(f"{name}-99999") <= 63
        for rule in spec["podFailurePolicy"]["rules"]:
            assert len(rule.keys() & {"onExitCodes", "onPodConditions"}) == 1
            if "onExitCodes" in rule:
                values = rule["onExitCodes"]["values"]
                assert values == sorted(set(values)) and 0 not in values and 0 < len(values) < 255
                assert rule["onExitCodes"]["containerName"] == pod["containers"][0]["name"]
        mounts = {mount["name"] for mount in pod["containers"][0]["volumeMounts"]}
        assert mounts == {volume["name"] for volume in pod["volumes"]}


def find_action(job: dict[str, Any], exit_code: int, *conditions: str) -> str:
    """The action of Kubernetes for a failed pod: the first rule that fits, otherwise the failure
    is counted.
    """
    for rule in job["spec"]["podFailurePolicy"]["rules"]:
        is_code = exit_code in rule.get("onExitCodes", {}).get("values", [])
        if is_code or any(one["type"] in conditions for one in rule.get("onPodConditions", [])):
            return str(rule["action"])
    return "Count"


def test_each_way_to_fail_has_its_consequence() -> None:
    (job,) = build(make_pending(DEMO))
    assert {kind: find_action(job, code) for kind, code in EXIT_CODES.items()} == {
        "configuration": "FailIndex",
        "data": "FailIndex",
        "out_of_memory": "FailIndex",
        "diverged": "FailIndex",
        "preempted": "Ignore",
        "transient": "Count",
        "lost": "Count",
        "stalled": "Count",
        "crashed": "FailIndex",
    }
    assert find_action(job, 2) == "FailIndex", "wrong usage, or a wrong recipe"
    assert find_action(job, 137) == find_action(job, 127) == "Count"
    for code in (1, 13, 14, 137, 143):
        assert find_action(job, code, "DisruptionTarget") == "Ignore"
    for code in (2, 10, 11, 12):
        assert find_action(job, code, "DisruptionTarget") == "FailIndex", (
            "the trainer was sure before"
        )


def test_runs_that_want_other_machines_get_a_job_of_their_own() -> None:
    on_cpu, on_gpus = build(make_pending(DEMO, EIGHT_GPUS, DEMO_2), num_slots=2)
    pods = [job["spec"]["template"]["spec"]["containers"][0] for job in (on_cpu, on_gpus)]
    assert [pod["command"][4:] for pod in pods] == [[DEMO, DEMO_2], [EIGHT_GPUS]]
    assert [pod["resources"] for pod in pods] == [
        {"requests": {"cpu": 1}},
        {"limits": {"nvidia.com/gpu": 8}},
    ]
    assert [
        (job["spec"]["completions"], job["spec"]["parallelism"]) for job in (on_cpu, on_gpus)
    ] == [(2, 2), (1, 1)]
    assert on_cpu["metadata"]["name"] != on_gpus["metadata"]["name"]
    assert "maxFailedIndexes" not in on_cpu["spec"], "one failed run does not end the others"


def test_a_job_is_named_alike_until_an_attempt_begins() -> None:
    names = [
        build(make_pending(DEMO, num_attempts=num_attempts), image=image)[0]["metadata"]["name"]
        for num_attempts, image in ((0, "one"), (0, "another"), (1, "one"))
    ]
    assert names[0] == names[1] != names[2]


def expand(word: str) -> str:
    """A word of `command` as the kubelet expands it if no variable is set: `$$` is `$`,
    `$(NAME)` stays.
    """
    return re.sub(
        r"\$\$|\$\([^)]*\)", lambda found: "$" if found.group() == "$$" else "EXPANDED", word
    )


@given(st.text(st.sampled_from("$()ab/ '\n")))
def test_a_path_reaches_the_container_as_it_is(path: str) -> None:
    assert expand(_escape(path)) == path


def test_each_index_starts_its_run_whatever_its_path(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ["$(HOME)", "a b$$c'd\"", "-x", "`touch pwned`;touch pwned"]
    text = (ROOT / DEMO).read_text()
    (tmp_path / "accelerate_configs").symlink_to(ROOT / "accelerate_configs")
    for number, name in enumerate(names):
        (tmp_path / f"{name}.yaml").write_text(
            text.replace("gemma_060_full_seed1", f"run{number}", 1)
        )
    monkeypatch.chdir(tmp_path)
    tool = tmp_path / "bin" / "runner"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\nprintf '%s\\n' \"$@\"\n")
    tool.chmod(0o755)
    runs = make_pending(*(f"./{name}.yaml" for name in names))
    (job,) = build(runs, output_root=Path("my $(RUNS)"))
    command = [expand(word) for word in job["spec"]["template"]["spec"]["containers"][0]["command"]]
    for index, name in enumerate(names):
        environment = {
            "PATH": f"{tool.parent}:{os.environ['PATH']}",
            "JOB_COMPLETION_INDEX": str(index),
        }
        done = subprocess.run(
            command, env=environment, cwd=tmp_path, capture_output=True, text=True, check=True
        )
        recipe = f"./{name}.yaml" if name.startswith("-") else f"{name}.yaml"
        assert done.stdout.splitlines() == ["launch", recipe, "--output-root", "my $(RUNS)"]
    assert not (tmp_path / "pwned").exists()
