"""The GPUs of this machine, as `nvidia-smi` lists them, and those that `--gpus` names.

Names are those of `nvidia-smi`: its numbers, `GPU-<UUID>` and `MIG-<UUID>`. CUDA stops reading the
list at an unknown name, and silently trains on fewer GPUs or on the CPU. So all names are checked
before anything starts. Does not import torch.
"""

from __future__ import annotations

import importlib.metadata
import re
import shutil
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Final

from runner.errors import RunnerError

# If the driver does not stay loaded, it probes each GPU again, which takes a second or two each.
_ANSWER_SECONDS: Final = 60.0

# `GPU 0: NVIDIA A100-SXM4-80GB (UUID: GPU-...)`, and indented below it, if it is divided,
# `  MIG 1g.10gb     Device  0: (UUID: MIG-...)`; drivers before R470 print `MIG-GPU-<UUID>/1/0`.
_GPU_LINE: Final = re.compile(r"GPU (\d+): (.*) \(UUID: (GPU-[^\s)]+)\)")
_MIG_LINE: Final = re.compile(r"MIG (\S+)\s+Device\s+\d+: \(UUID: (MIG-[^\s)]+)\)")
_NUMBER: Final = re.compile(r"[0-9]{1,9}")
_NAME: Final = re.compile(r"[0-9]{1,9}|(GPU|MIG)-[0-9A-Za-z/-]+")


@dataclass(frozen=True)
class MigDevice:
    """A part of a divided GPU (Multi-Instance GPU), with its own memory."""

    uuid: str
    profile: str  # such as 1g.10gb

    @property
    def memory_mib(self) -> int | None:
        """An upper bound of its memory, from its profile's name; the driver uses a little of it.

        >>> MigDevice("MIG-1", "1c.3g.40gb+me").memory_mib
        40960
        """
        gigabytes = re.search(r"\.(\d+)gb", self.profile)
        return 1024 * int(gigabytes[1]) if gigabytes else None


@dataclass(frozen=True)
class Gpu:
    """One GPU; if it is divided, CUDA uses its parts."""

    index: int
    uuid: str
    name: str
    migs: tuple[MigDevice, ...] = ()
    memory_mib: int | None = None  # None: not requested, or not known


@dataclass(frozen=True)
class NamedGpu:
    """A whole GPU, or a part of one, for a run."""

    name: str  # as in `CUDA_VISIBLE_DEVICES`
    memory_mib: int | None = None  # None: not known


def word_cpu_build(torch_version: str | None) -> str | None:
    """A warning about a torch that uses no GPU; None for any other, and if there is no torch.

    >>> word_cpu_build("2.13.0+cu128") is None
    True
    """
    if torch_version is None or not torch_version.endswith("+cpu"):
        return None
    return f"this torch ({torch_version}) is built for the CPU: the runs will train on the CPU"


def warn_of_cpu_build() -> None:
    """Warn on stderr of a torch that would silently train on the CPU, without importing it."""
    try:
        version = importlib.metadata.version("torch")
    except importlib.metadata.PackageNotFoundError:
        return
    if (warning := word_cpu_build(version)) is not None:
        print(f"warning: {warning}", file=sys.stderr)


def list_gpus(
    environment: Mapping[str, str],
    *,
    with_memory: bool = False,
    answer_seconds: float = _ANSWER_SECONDS,
) -> list[Gpu] | None:
    """The GPUs of this machine; None if there is no `nvidia-smi`, or it does not answer."""
    said = _ask(environment, answer_seconds, "-L")
    if said is None:
        return None
    gpus = parse_list(said)
    if gpus and with_memory:
        query = ("--query-gpu=uuid,memory.total", "--format=csv,noheader,nounits")
        memory = _parse_memory(_ask(environment, answer_seconds, *query) or "")
        gpus = [replace(gpu, memory_mib=memory.get(gpu.uuid)) for gpu in gpus]
    return gpus


def parse_list(text: str) -> list[Gpu] | None:
    """The GPUs in the output of `nvidia-smi -L`; None for any other text.

    >>> parse_list("GPU 0: NVIDIA H200 (UUID: GPU-1)")
    [Gpu(index=0, uuid='GPU-1', name='NVIDIA H200', migs=(), memory_mib=None)]
    >>> parse_list("No devices found.")
    []
    """
    gpus: list[Gpu] = []
    for line in map(str.strip, text.splitlines()):
        if gpu := _GPU_LINE.fullmatch(line):
            gpus.append(Gpu(int(gpu[1]), gpu[3], gpu[2]))
        elif gpus and (mig := _MIG_LINE.fullmatch(line)):
            part = MigDevice(mig[2], mig[1])
            gpus[-1] = replace(gpus[-1], migs=(*gpus[-1].migs, part))
    return gpus if gpus or re.search(r"\bno devices\b", text, re.IGNORECASE) else None


def _parse_memory(text: str) -> dict[str, int]:
    """MiB by UUID; unknown sizes (`[N/A]`) are left out."""
    memory = {}
    for line in text.splitlines():
        uuid, _, size = line.partition(",")
        if _NUMBER.fullmatch(size.strip()):
            memory[uuid.strip()] = int(size)
    return memory


def _ask(environment: Mapping[str, str], answer_seconds: float, *arguments: str) -> str | None:
    """The output of `nvidia-smi`; None if it is missing, fails or hangs."""
    tool = shutil.which("nvidia-smi", path=environment.get("PATH", ""))
    if tool is None:
        return None
    try:
        done = subprocess.run(
            [tool, *arguments],
            env=dict(environment),
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            errors="replace",
            check=False,
            timeout=answer_seconds,
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    # Without a GPU it may exit with a special status.
    is_answer = done.returncode == 0 or parse_list(done.stdout) == []
    return done.stdout if is_answer else None


def split_names(text: str) -> list[str]:
    """The names in `--gpus`. Raises: RunnerError for an empty name or one that occurs twice."""
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise RunnerError(f"`--gpus {text}` has an empty name", hint="--gpus 0,1")
    names = [str(int(name)) if _NUMBER.fullmatch(name) else name for name in names]
    _refuse_twice(text, names)
    return names


def choose_gpus(
    text: str | None, environment: Mapping[str, str], *, with_memory: bool = False
) -> tuple[NamedGpu, ...]:
    """The GPUs in `--gpus`, or all that an outer `CUDA_VISIBLE_DEVICES` shows. Prints a note if
    the names cannot be compared with the GPUs of this machine.

    Raises:
        RunnerError: a name is unknown, hidden by an outer `CUDA_VISIBLE_DEVICES`, or names a GPU a
            second time.
    """
    names = None if text is None else split_names(text)
    visible = environment.get("CUDA_VISIBLE_DEVICES")
    gpus = list_gpus(environment, with_memory=with_memory)
    if gpus is not None:
        return _choose_listed(text, names, gpus, visible)
    if names is None:
        raise RunnerError(
            "`nvidia-smi` does not answer here, so the GPUs of this machine are unknown",
            hint="name them: --gpus 0,1",
        )
    for name in names:
        if not _NAME.fullmatch(name):
            raise RunnerError(
                f"`--gpus {text}`: {name!r} is not the name of a GPU, expected a number,"
                " `GPU-<UUID>` or `MIG-<UUID>`",
                hint="--gpus 0,1",
            )
    _refuse_hidden_by_text(text or "", names, visible)
    print(
        f"note: nvidia-smi does not answer here, so `--gpus {text}` is used unchecked",
        file=sys.stderr,
    )
    return tuple(NamedGpu(name) for name in names)


def _choose_listed(
    text: str | None, names: Sequence[str] | None, gpus: Sequence[Gpu], visible: str | None
) -> tuple[NamedGpu, ...]:
    shown = _list_usable(gpus, visible)
    if not gpus:
        raise RunnerError("`nvidia-smi` lists no GPU here", hint="leave out --gpus and --per-gpu")
    if not shown:
        raise RunnerError(
            f"`CUDA_VISIBLE_DEVICES={visible}` is set here, which hides every GPU",
            hint="unset CUDA_VISIBLE_DEVICES",
        )
    usable = {one.uuid: _name(one) for one in shown}
    if names is None:
        return tuple(usable.values())
    hint = f"--gpus {','.join(one.name for one in usable.values())}"
    chosen: list[NamedGpu] = []
    for name in names:
        found = _find(name, gpus)
        if len(found) != 1:
            what = "there is no such GPU here" if not found else "the beginning of several UUIDs"
            raise RunnerError(
                f"`--gpus {text}`: {name}: {what}; nvidia-smi lists\n{_tabulate(gpus)}", hint=hint
            )
        if isinstance(found[0], Gpu) and found[0].migs:
            parts = ",".join(part.uuid for part in found[0].migs)
            raise RunnerError(
                f"`--gpus {text}`: GPU {name} is divided, so CUDA would use only one of its parts",
                hint=f"--gpus {parts}",
            )
        if found[0].uuid not in usable:
            raise RunnerError(
                f"`--gpus {text}`: `CUDA_VISIBLE_DEVICES={visible}` is set here and hides"
                f" {name}, which may belong to someone else",
                hint=hint,
            )
        chosen.append(replace(usable[found[0].uuid], name=found[0].uuid))
    indices = {gpu.uuid: str(gpu.index) for gpu in gpus}
    _refuse_twice(text or "", [indices.get(one.name, one.name) for one in chosen])
    # All names must be of one kind: CUDA does not mix numbers and UUIDs in one list.
    if all(map(_NUMBER.fullmatch, names)):
        return tuple(replace(one, name=indices[one.name]) for one in chosen)
    return tuple(chosen)


def _list_usable(gpus: Sequence[Gpu], visible: str | None) -> list[Gpu | MigDevice]:
    """The GPUs that `CUDA_VISIBLE_DEVICES` shows; a divided GPU is replaced by its parts."""
    shown: set[str] | None = None
    if visible is not None:
        shown = set()
        for name in map(str.strip, visible.split(",")):
            found = _find(name, gpus)
            if len(found) != 1:  # CUDA reads no further
                break
            shown.add(found[0].uuid)
    usable: list[Gpu | MigDevice] = []
    for gpu in gpus:
        for one in gpu.migs or (gpu,):
            if shown is None or one.uuid in shown or gpu.uuid in shown:
                usable.append(one)
    return usable


def _find(name: str, gpus: Iterable[Gpu]) -> list[Gpu | MigDevice]:
    """The GPUs that one name means to CUDA: the beginning of a GPU's UUID is enough."""
    if _NUMBER.fullmatch(name):
        return [gpu for gpu in gpus if gpu.index == int(name)]
    if name.startswith("MIG-"):
        return [part for gpu in gpus for part in gpu.migs if part.uuid == name]
    return [gpu for gpu in gpus if name.startswith("GPU-") and gpu.uuid.startswith(name)]


def _name(one: Gpu | MigDevice) -> NamedGpu:
    return NamedGpu(str(one.index) if isinstance(one, Gpu) else one.uuid, one.memory_mib)


def _tabulate(gpus: Sequence[Gpu]) -> str:
    lines = []
    for gpu in gpus:
        lines.append(f"  {gpu.index}  {gpu.uuid}  {gpu.name}")
        lines += [f"     {part.uuid}  MIG {part.profile}" for part in gpu.migs]
    return "\n".join(lines)


def _refuse_twice(text: str, names: Sequence[str]) -> None:
    once = list(dict.fromkeys(names))
    if len(once) < len(names):
        most = max(names.count(name) for name in once)
        raise RunnerError(
            f"`--gpus {text}` names one GPU twice; each run gets its own GPUs",
            hint=f"--gpus {','.join(once)} --per-gpu {most}  # several runs on one GPU",
        )


def _refuse_hidden_by_text(text: str, names: Sequence[str], visible: str | None) -> None:
    """Refuse hidden names by the text alone; a number and a UUID cannot be compared."""
    if visible is None:
        return
    shown: list[str] = []
    for name in map(str.strip, visible.split(",")):
        if not _NAME.fullmatch(name):  # CUDA reads no further
            break
        shown.append(str(int(name)) if _NUMBER.fullmatch(name) else name)
    kinds = {name[:4] if "-" in name else "number" for name in shown}
    for name in names:
        is_number = "-" not in name
        is_shown = name in shown or (
            not is_number and any(one.startswith(name) or name.startswith(one) for one in shown)
        )
        is_comparable = not shown or ("number" if is_number else name[:4]) in kinds
        if is_comparable and not is_shown:
            raise RunnerError(
                f"`--gpus {text}`: `CUDA_VISIBLE_DEVICES={visible}` is set here and hides"
                f" {name}, which may belong to someone else",
                hint=f"--gpus {','.join(shown)}" if shown else "unset CUDA_VISIBLE_DEVICES",
            )
