"""What a cluster's environment variables say about the machine that an attempt got. Pure; one function per question."""

from __future__ import annotations

import os
from collections.abc import Mapping


def name_cluster_job(environment: Mapping[str, str]) -> str | None:
    """`Attempt.cluster_job`: the job that this process belongs to, None outside a cluster.

    >>> name_cluster_job({"SLURM_JOB_ID": "18", "SLURM_ARRAY_JOB_ID": "17", "SLURM_ARRAY_TASK_ID": "3"})
    'slurm 17_3'
    """
    array, task = environment.get("SLURM_ARRAY_JOB_ID"), environment.get("SLURM_ARRAY_TASK_ID")
    job = f"{array}_{task}" if array and task else environment.get("SLURM_JOB_ID")
    return f"slurm {job}" if job else None


def is_in_cluster(environment: Mapping[str, str]) -> bool:
    """Whether Slurm or an Indexed Job of Kubernetes waits for the exit code."""
    return name_cluster_job(environment) is not None or "JOB_COMPLETION_INDEX" in environment


def count_allotted_cores(environment: Mapping[str, str]) -> int:
    """Cores that this process may use: those of its Slurm job on this machine, else all that it is bound to."""
    bound = len(os.sched_getaffinity(0))
    allotted = environment.get("SLURM_CPUS_ON_NODE", "")
    return min(bound, int(allotted)) if allotted.isdecimal() and int(allotted) else bound
