"""Facts of this machine and of the installed packages, as `runner doctor` shows them.

Also a program: `python -m runner.preflight.machine` imports the heavy packages and prints the
result as JSON. They are imported in a separate process, because a driver that hangs or a package
that crashes must not stop the verb.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

_IMPORT_SECONDS: Final = 180.0  # enough for a cold disk; a hanging driver never answers
_ANSWER: Final = "runner-machine "  # prefix of the answer line: packages print lines too
# Imported only where they are installed; each compiles or loads code that can fail on its own.
_TRIED: Final = ("bitsandbytes", "deepspeed", "flash_attn")


@dataclass(frozen=True)
class Device:
    """A GPU as torch sees it."""

    name: str
    total_bytes: int
    free_bytes: int | None  # None if it cannot be read, for example on a busy GPU
    capability: tuple[int, int]


@dataclass(frozen=True)
class Libraries:
    """The libraries and devices that a training process would find."""

    torch: str | None = None  # its version
    cuda: str | None = None  # that torch was built for; None for a CPU build
    devices: tuple[Device, ...] = ()
    failures: dict[str, str] = field(default_factory=dict)  # package -> why it cannot be imported
    versions: dict[str, str] = field(default_factory=dict)  # of the packages that were imported


def ask_libraries() -> Libraries:
    """Import torch and the packages with native code in a child process; return what it found."""
    # -P: files of the current folder must not be imported as packages.
    command = [sys.executable, "-P", "-m", "runner.preflight.machine"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_IMPORT_SECONDS)
    except subprocess.TimeoutExpired:
        why = f"no answer in {_IMPORT_SECONDS:.0f} s: a driver may hang"
        return Libraries(failures={"torch": why})
    answers = [line for line in done.stdout.splitlines() if line.startswith(_ANSWER)]
    if not answers:
        last = done.stderr.strip().splitlines()[-1:] or [f"it ended with {done.returncode}"]
        return Libraries(failures={"torch": last[0]})
    found = json.loads(answers[-1].removeprefix(_ANSWER))
    devices = tuple(
        Device(one["name"], one["total_bytes"], one["free_bytes"], tuple(one["capability"]))
        for one in found.pop("devices")
    )
    return Libraries(**found, devices=devices)


def find_version(package: str) -> str | None:
    """The version of an installed package; None if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def list_unmet_requirements() -> list[str]:
    """The required packages that are missing or have another version.

    Raises:
        PackageNotFoundError: this project is not installed, so its requirements are unknown.
    """
    from packaging.requirements import Requirement

    unmet = []
    for text in importlib.metadata.requires("recipe-runner") or []:
        requirement = Requirement(text)
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        version = find_version(requirement.name)
        if version is None:
            unmet.append(f"{requirement.name} is not installed")
        elif version not in requirement.specifier:
            unmet.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    return unmet


def find_compiler() -> str | None:
    """The C++ compiler that DeepSpeed would use; None if there is none."""
    return shutil.which(os.environ.get("CXX") or "c++") or shutil.which("g++")


def find_cuda_home() -> Path | None:
    """The folder of the CUDA toolkit with its compiler, found as torch finds it."""
    named = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    nvcc = shutil.which("nvcc")
    home = Path(named) if named else Path(nvcc).parents[1] if nvcc else Path("/usr/local/cuda")
    return home if (home / "bin" / "nvcc").exists() else None


def ask_slurm() -> str | None:
    """Slurm's version; None if jobs cannot be submitted from here."""
    if shutil.which("sbatch") is None:
        return None
    try:
        done = subprocess.run(["sbatch", "--version"], capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() or None


def main() -> None:
    """Print the answer of `ask_libraries`."""
    found: dict[str, Any] = {"torch": None, "cuda": None, "devices": []}
    failures: dict[str, str] = {}
    versions: dict[str, str] = {}
    try:
        import torch

        found |= {"torch": torch.__version__, "cuda": torch.version.cuda or torch.version.hip}
        found["devices"] = [_describe_device(number) for number in range(torch.cuda.device_count())]
    except Exception as error:
        failures["torch"] = _describe(error)
    for name in _TRIED:
        if importlib.util.find_spec(name) is None:
            continue
        try:
            module = importlib.import_module(name)
        except Exception as error:
            failures[name] = _describe(error)
        else:
            versions[name] = str(getattr(module, "__version__", ""))
    print(_ANSWER + json.dumps(found | {"failures": failures, "versions": versions}))


def _describe_device(number: int) -> dict[str, Any]:
    import torch

    properties = torch.cuda.get_device_properties(number)
    try:
        free = torch.cuda.mem_get_info(number)[0]
    except RuntimeError:  # this needs a context on the GPU, which may have no memory left
        free = None
    return {
        "name": properties.name,
        "total_bytes": properties.total_memory,
        "free_bytes": free,
        "capability": (properties.major, properties.minor),
    }


def _describe(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}")[:300]


if __name__ == "__main__":
    main()
