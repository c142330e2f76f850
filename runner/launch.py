"""Pure: a recipe, a run directory and a placement become the exact command and environment of one attempt."""

from __future__ import annotations

import shlex
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from runner.recipe import Recipe, derive_accumulation

# Output that is seen at once, and no thread pool of the tokenizers beside the trainer's own threads.
_ALWAYS: Final = {"ACCELERATE_LOG_LEVEL": "info", "PYTHONUNBUFFERED": "1", "TOKENIZERS_PARALLELISM": "false"}


@dataclass(frozen=True)
class Placement:
    """Where one attempt runs: nothing of it changes the experiment."""

    num_processes: int
    devices: tuple[str, ...] | None = None  # of CUDA_VISIBLE_DEVICES; None leaves the variable alone
    num_cores: int = 1  # cores this attempt may use


@dataclass(frozen=True)
class LaunchCommand:
    """What is executed: `argv`, and the variables that are set on top of the environment."""

    argv: tuple[str, ...]
    environment: Mapping[str, str]

    def as_shell(self) -> str:
        """One line that can be pasted into a shell."""
        variables = [f"{name}={shlex.quote(value)}" for name, value in sorted(self.environment.items())]
        return " ".join([*variables, shlex.join(self.argv)])


def build_launch_command(recipe: Recipe, run_dir: Path, placement: Placement, *, path: str) -> LaunchCommand:
    """The `accelerate launch` of one attempt. `path` is the PATH to extend, so that this Python's tools are found.

    Raises:
        RefusedError: the global batch cannot be kept on that many processes.
    """
    derive_accumulation(recipe, placement.num_processes)
    argv = [
        *("accelerate", "launch"),
        *("--config_file", recipe.launch.accelerate_config),
        *("--num_processes", str(placement.num_processes)),
        *("--main_process_port", "0"),
        *("-m", "runner.sft", str(run_dir)),
    ]
    threads = recipe.launch.num_cpu_threads_per_process or max(1, placement.num_cores // placement.num_processes)
    environment = {**_ALWAYS, "OMP_NUM_THREADS": str(threads)}
    tools_dir = str(Path(sys.executable).parent)
    if tools_dir not in path.split(":"):  # `.venv/bin/runner` was called without activating; DeepSpeed needs ninja too
        environment["PATH"] = f"{tools_dir}:{path}"
    if placement.devices is not None:
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(placement.devices)
    return LaunchCommand(tuple(argv), environment)
