"""The software and hardware that run an attempt: the runner's source and commit, the libraries, the
machine.

Everything is read from files, without torch. The slow parts (hashing the source, calling git or
`nvidia-smi`) run once per process, and again only if files have changed: a sweep may last for
weeks, and a checkout may be edited meanwhile.
"""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Final

import runner
from runner.files import hash_sources, look_at
from runner.recipe.identity import list_library_versions

# In addition to those that decide on a checkpoint: they read rows, tokenize and write weights.
_MORE_LIBRARIES: Final = ("tokenizers", "datasets", "numpy", "safetensors")
_ROOT: Final = Path(runner.__file__).parent
_PROC: Final = Path("/proc")
_CUDA: Final = re.compile(r"^(?:cuda|hip)\b[^=]*= '([^']+)'", re.MULTILINE)
_DRIVER: Final = re.compile(r"Kernel Module\b.*?\s(\d+(?:\.\d+)+)\s")
_ASKING_SECONDS: Final = 20.0


@dataclass(frozen=True)
class Provenance:
    """The fields that `Attempt` records under the same names."""

    runner_version: str
    runner_commit: str | None
    runner_is_dirty: bool | None
    source_hash: str
    versions: dict[str, str]
    hardware: dict[str, str]


def read_provenance() -> Provenance:
    """The current provenance."""
    state = tuple((str(path), look_at(path)) for path in sorted(_ROOT.rglob("*.py")))
    commit, is_dirty = _read_commit(state)
    driver, gpus = _find_gpus()
    versions = {
        **list_library_versions(),
        **{name: _read_version(name) for name in _MORE_LIBRARIES},
        "cuda": _read_cuda_version(),
        "driver": driver,
    }
    return Provenance(
        runner_version=runner.__version__,
        runner_commit=commit,
        runner_is_dirty=is_dirty,
        source_hash=_hash_source(state),
        versions=versions,
        hardware={"cpu": _find_cpu(), "gpu": gpus},
    )


@lru_cache(maxsize=1)
def _hash_source(_state: object) -> str:
    return hash_sources(_ROOT, ("*",))


def _read_version(name: str) -> str:
    try:
        return version(name)
    except PackageNotFoundError:
        return "absent"


def _read_commit(source_state: object) -> tuple[str | None, bool | None]:
    """The commit, and true if the runner's files differ from it; None outside a git checkout."""
    git_dir = _find_git_dir()
    if git_dir is None:
        return None, None
    # A commit, a checkout and `git add` each change one of these.
    marks = tuple(look_at(git_dir / name) for name in ("HEAD", "logs/HEAD", "index"))
    return _ask_for_commit((source_state, marks))


@cache
def _find_git_dir() -> Path | None:
    """The git folder of the checkout that tracks the runner; None if the runner is only installed
    inside another project's checkout.
    """
    if _ask_git("ls-files", "--error-unmatch", "--", "__init__.py") is None:
        return None
    found = _ask_git("rev-parse", "--absolute-git-dir")
    return None if found is None else Path(found)


@lru_cache(maxsize=1)
def _ask_for_commit(_state: object) -> tuple[str | None, bool | None]:
    commit = _ask_git("rev-parse", "--verify", "HEAD")
    changes = _ask_git("status", "--porcelain", "--", ".")
    if commit is None or changes is None:
        return None, None
    return commit, bool(changes)


def _ask_git(*arguments: str) -> str | None:
    """The output of git for the runner's folder; None if git fails or is missing."""
    try:
        done = subprocess.run(
            ["git", "--no-optional-locks", "-C", str(_ROOT), *arguments],
            capture_output=True,
            text=True,
            timeout=_ASKING_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


@cache
def _read_cuda_version() -> str:
    """The version of CUDA (or ROCm) that torch was built for, from torch's `version.py`."""
    try:
        spec = find_spec("torch")
        origin = None if spec is None else spec.origin
        text = "" if origin is None else (Path(origin).parent / "version.py").read_text()
    except (OSError, ValueError):
        return "unknown"
    found = _CUDA.search(text)
    return "absent" if found is None else found[1]


@cache
def _find_cpu() -> str:
    """The processor of this machine; cached, because `/proc/cpuinfo` has a page per core."""
    return read_cpu(_PROC)


def read_cpu(proc: Path) -> str:
    """The model of the processor, as the kernel names it.

    >>> read_cpu(Path("nowhere")) == platform.machine()
    True
    """
    try:
        lines = (proc / "cpuinfo").read_text(errors="replace").splitlines()
    except OSError:
        lines = []
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, "") or platform.machine()


@cache
def _find_gpus() -> tuple[str, str]:
    """The driver's version and a description of the GPUs of this machine."""
    driver, names = read_gpus(_PROC)
    if driver is None or not names:
        driver, names = _ask_nvidia_smi() or (driver, names)
    return driver or "absent", describe_gpus(names)


def read_gpus(proc: Path) -> tuple[str | None, list[str]]:
    """The version of NVIDIA's driver, None if there is none, and the name of each GPU, from the
    driver's files.
    """
    folder = proc / "driver" / "nvidia"
    try:
        found = _DRIVER.search((folder / "version").read_text(errors="replace"))
    except OSError:
        return None, []
    names = []
    for path in sorted(folder.glob("gpus/*/information")):
        try:
            lines = path.read_text(errors="replace").splitlines()
        except OSError:  # a GPU of another container
            continue
        names += [line.partition(":")[2].strip() for line in lines if line.startswith("Model:")]
    return None if found is None else found[1], names


def _ask_nvidia_smi() -> tuple[str, list[str]] | None:
    """The same from `nvidia-smi`, for containers that do not show these files."""
    if shutil.which("nvidia-smi") is None:
        return None
    try:
        done = subprocess.run(
            ["nvidia-smi", "--query-gpu=driver_version,name", "--format=csv,noheader"],
            capture_output=True,
            text=True,
            timeout=_ASKING_SECONDS,
            check=False,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    rows = [line.split(", ", 1) for line in done.stdout.splitlines() if ", " in line]
    if done.returncode != 0 or not rows:
        return None
    return rows[0][0], [name for _, name in rows]


def describe_gpus(names: Iterable[str]) -> str:
    """The GPUs as recorded, with counts.

    >>> describe_gpus(["NVIDIA H200", "NVIDIA H200"]), describe_gpus([])
    ('2 x NVIDIA H200', 'none')
    """
    counted = Counter(names)
    return ", ".join(f"{number} x {name}" for name, number in sorted(counted.items())) or "none"


def read_git_state() -> tuple[str | None, bool | None]:
    """The commit, and true if the work tree differs from it; None outside a git checkout."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False
        )
        status = subprocess.run(
            ["git", "status", "--porcelain"], capture_output=True, text=True, check=False
        )
    except FileNotFoundError:
        return None, None
    if commit.returncode != 0:
        return None, None
    return commit.stdout.strip(), bool(status.stdout.strip())
