"""`runner doctor`: lists what this machine has and what the given recipes lack, each with the
command that fixes it.

It reads files and runs programs. It loads no model and no rows: `check` estimates memory and disk
per run.
"""

from __future__ import annotations

import contextlib
import importlib.metadata
import importlib.util
import os
import shlex
import shutil
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Literal

from runner.checkpoints.remote import open_run_folder
from runner.errors import CorruptFileError, RefusedError, RunnerError, escape_controls
from runner.launch.gpus import Gpu, list_gpus
from runner.launch.placement import derive_resources
from runner.plan.names import RECIPES_DIR
from runner.plan.pushes import PlannedPush, find_push_to, refuse_pushes
from runner.plan.select import Selected
from runner.preflight.machine import (
    Libraries,
    ask_libraries,
    ask_slurm,
    find_compiler,
    find_cuda_home,
    find_version,
    list_unmet_requirements,
)
from runner.project_folder import pasteable
from runner.recipe.contents import hint_at_missing, list_missing_files
from runner.recipe.hub import list_hub_names
from runner.recipe.identity import load_launch_settings
from runner.recipe.libraries import names_deepspeed, uses_bitsandbytes
from runner.recipe.parse import Recipe, derive_accumulation
from runner.recipe.trackers import require_trackers
from runner.text import format_bytes, format_count

Level = Literal["ok", "note", "missing"]
_INSTALL: Final = "pip install -c constraints.txt -e ."
_CUDA_TORCH: Final = "pip install --force-reinstall -c constraints-cuda.txt torch"
# Extra of this project -> the package that it installs, and its purpose.
_EXTRAS: Final = {
    "tensorboard": ("tensorboard", "tracking.report_to=[tensorboard]"),
    "wandb": ("wandb", "tracking.report_to=[wandb]"),
    "s3": ("s3fs", "checkpoints.remote.url=s3://..."),
    "gcs": ("gcsfs", "checkpoints.remote.url=gs://..."),
}
# Start of an optimizer's name -> module and package that Transformers imports for it.
_OPTIMIZERS: Final = {
    "galore_": ("galore_torch", "galore-torch"),
    "apollo_": ("apollo_torch", "apollo-torch"),
    "grokadamw": ("grokadamw", "grokadamw"),
    "schedule_free_": ("schedulefree", "schedulefree"),
    "adamw_torch_4bit": ("torchao", "torchao"),
    "adamw_torch_8bit": ("torchao", "torchao"),
}


@dataclass(frozen=True)
class Finding:
    """One line of the output; `hint` is a command or advice that fixes it."""

    level: Level
    what: str
    hint: str | None = None


@dataclass(frozen=True)
class Machine:
    """Everything that the recipes are compared with."""

    libraries: Libraries
    gpus: list[Gpu] | None  # that nvidia-smi lists; None if it does not answer
    compiler: str | None
    cuda_home: Path | None
    slurm: str | None


@dataclass
class _Lacks:
    """Things that recipes lack: each text once, with the runs concerned."""

    runs: dict[tuple[Level, str, str | None], list[Selected]] = field(default_factory=dict)

    def add(self, run: Selected, level: Level, what: str, hint: str | None) -> None:
        self.runs.setdefault((level, what, hint), []).append(run)

    def build_findings(self) -> Iterator[Finding]:
        for (level, what, hint), runs in self.runs.items():
            names = [one.full_name for one in runs]
            who = names[0] if len(names) == 1 else f"{len(names)} runs, such as {names[0]}"
            yield Finding(level, f"{what} ({who})", hint and _complete_hint(hint, runs))


def _complete_hint(hint: str, runs: Sequence[Selected]) -> str:
    """The hint with the recipe of one of the runs, ready to paste in the user's folder.

    `launch` does not accept run directories, so runs without a recipe file keep the word RECIPE.
    """
    for one in runs:
        path, is_run = one.source_path, one.source_path.is_dir()
        if is_run:
            path = RECIPES_DIR / one.recipe.run.grid / f"{one.recipe.run.name}.yaml"
        if path.is_file() or not is_run:
            hint = hint.replace("RECIPE", shlex.quote(str(path)))
            break
    return pasteable(hint) if hint.startswith("runner ") else hint


def print_doctor(runs: Sequence[Selected], output_root: Path) -> int:
    """Print the findings, the machine first. Returns 2 if anything is missing."""
    machine = Machine(
        ask_libraries(),
        list_gpus(os.environ),
        find_compiler(),
        find_cuda_home(),
        ask_slurm(),
    )
    lacks = list(find_lacks(runs, machine))
    findings = [*describe_machine(machine, output_root), *lacks]
    for one, following in zip(findings, [*findings[1:], None], strict=True):
        print(escape_controls(f"{one.level:<8}{one.what}"))
        # Consecutive lines with the same fix share one hint.
        if one.hint and (following is None or following.hint != one.hint):
            print(escape_controls(f"        hint: {one.hint}"))
    num_missing = sum(one.level == "missing" for one in findings)
    if runs and not num_missing:
        count = "the recipe" if len(runs) == 1 else f"all {len(runs)} recipes"
        print(f"\n{count} can run here; `runner check` checks the rows, memory and disk of each")
    return 2 if num_missing else 0


def describe_machine(machine: Machine, output_root: Path) -> Iterator[Finding]:
    """Yield everything that the machine has, independent of the recipes."""
    version = ".".join(map(str, sys.version_info[:3]))
    yield Finding("ok", f"Python {version}, {sys.executable}")
    try:
        for unmet in list_unmet_requirements():
            yield Finding("missing", unmet, _INSTALL)
    except importlib.metadata.PackageNotFoundError:
        what = "the runner itself is not installed, so its required packages are unknown"
        yield Finding("note", what, _INSTALL)
    yield from _describe_torch(machine)
    yield from _describe_packages(machine)
    if machine.slurm is None:
        yield Finding("note", "no Slurm here: `--engine slurm` needs `sbatch`")
    else:
        yield Finding("ok", machine.slurm)
    yield from _describe_disk(output_root)
    yield _describe_token()
    for extra, (package, purpose) in _EXTRAS.items():
        if find_version(package) is None:
            hint = f"pip install 'recipe-runner[{extra}]'"
            yield Finding("note", f"{package} is not installed; it is needed for {purpose}", hint)


def _describe_torch(machine: Machine) -> Iterator[Finding]:
    libraries = machine.libraries
    if why := libraries.failures.get("torch"):
        hint = "pip install --force-reinstall -c constraints.txt torch"
        yield Finding("missing", f"torch cannot be used: {why}", hint)
        return
    build = f"built for CUDA {libraries.cuda}" if libraries.cuda else "built for the CPU"
    yield Finding("ok", f"torch {libraries.torch}, {build}")
    for number, device in enumerate(libraries.devices):
        total, free = format_bytes(device.total_bytes), device.free_bytes
        memory = f"{total}, {'?' if free is None else format_bytes(free)} free"
        capability = ".".join(map(str, device.capability))
        what = f"GPU {number}: {device.name}, {memory}, capability {capability}"
        if free is None:
            what += (
                "; its free memory cannot be read, perhaps because other processes use all of it"
            )
        yield Finding("ok" if free is not None else "note", what)
    if libraries.devices:
        return
    if not machine.gpus:
        smi = "nvidia-smi does not answer" if machine.gpus is None else "nvidia-smi lists none"
        yield Finding("note", f"no GPU: torch sees none, and {smi}")
    elif libraries.cuda is None:
        what = (
            f"nvidia-smi lists {format_count(len(machine.gpus), 'GPU')}, but this torch is"
            " built for the CPU"
        )
        yield Finding("note", what, _CUDA_TORCH)
    elif os.environ.get("CUDA_VISIBLE_DEVICES") is not None:
        visible = os.environ["CUDA_VISIBLE_DEVICES"]
        what = f"torch sees no GPU under CUDA_VISIBLE_DEVICES={visible!r}"
        yield Finding("note", what, "unset CUDA_VISIBLE_DEVICES")
    else:
        what = (
            f"nvidia-smi lists {format_count(len(machine.gpus), 'GPU')}, torch sees"
            " none: the driver may be too"
            f" old for CUDA {libraries.cuda}"
        )
        yield Finding("note", what, "nvidia-smi  # shows the CUDA version that the driver serves")


def _describe_packages(machine: Machine) -> Iterator[Finding]:
    libraries = machine.libraries
    names = {
        "bitsandbytes": "bitsandbytes",
        "deepspeed": "DeepSpeed",
        "flash_attn": "FlashAttention",
    }
    for module, name in names.items():
        if why := libraries.failures.get(module):
            yield Finding("note", f"{name} is installed but cannot be imported: {why}")
        elif module in libraries.versions:
            yield Finding("ok", f"{name} {libraries.versions[module]}".rstrip())
        elif module == "flash_attn":
            what = (
                "FlashAttention is not installed; it is needed for"
                " model.attn_implementation=flash_attention_2"
            )
            yield Finding("note", what, "pip install flash-attn --no-build-isolation")
    if machine.compiler is None:
        what = "no C++ compiler; DeepSpeed compiles code on first use"
        yield Finding("note", what, "apt-get install g++")
    else:
        nvcc = machine.cuda_home or "none; only offload to CPU memory on a GPU machine needs it"
        yield Finding("ok", f"C++ compiler {machine.compiler}; CUDA toolkit: {nvcc}")


def _describe_disk(output_root: Path) -> Iterator[Finding]:
    places = {"runs": output_root.absolute(), "temporary files": Path(_find_temporary())}
    for what, path in places.items():
        there = next(one for one in (path, *path.parents) if one.exists())
        free = shutil.disk_usage(there).free
        yield Finding("ok", f"{format_bytes(free)} free for {what}, at {there}")


def _find_temporary() -> str:
    import tempfile

    return tempfile.gettempdir()


def _describe_token() -> Finding:
    from huggingface_hub import get_token

    if os.environ.get("HF_TOKEN", "").strip():
        return Finding("ok", "a hub token is in HF_TOKEN")
    if get_token():
        what = "a hub token is stored for downloads; pushing reads HF_TOKEN only"
        return Finding("note", what, "export HF_TOKEN=...")
    what = "no hub token: gated models cannot be loaded and nothing can be pushed"
    return Finding("note", what, "export HF_TOKEN=...")


def find_lacks(runs: Sequence[Selected], machine: Machine) -> Iterator[Finding]:
    """Yield everything that the recipes need and this machine lacks, each once with the runs
    concerned.
    """
    lacks = _Lacks()
    for run in runs:
        looks = (_need_files, _need_devices, _need_packages, _need_deepspeed, _need_others)
        for look in looks:
            for what, hint in look(run.recipe, machine):
                lacks.add(run, "missing", what, hint)
        for note in (_note_capability, _note_slow):
            for what, hint in note(run.recipe, machine):
                lacks.add(run, "note", what, hint)
    yield from sorted(lacks.build_findings(), key=lambda one: one.hint or "")
    yield from _find_refused_pushes(runs)


def _find_refused_pushes(runs: Sequence[Selected]) -> Iterator[Finding]:
    """Yield the pushes that `check`, `launch` and `sweep` would refuse."""
    planned = []
    for one in runs:
        with contextlib.suppress(CorruptFileError, OSError):  # `runner status` reports it
            if (repo_id := find_push_to(one.read_facts(), one.recipe)) is not None:
                planned.append(PlannedPush(one.full_name, one.paths, repo_id, is_due=True))
    try:
        refuse_pushes(planned, os.environ)
    except RefusedError as error:
        yield Finding("missing", error.message, error.hint)


Need = tuple[str, str | None]


def _need_files(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    for key, path in list_missing_files(recipe).items():
        yield f"{key}: {path} does not exist", hint_at_missing([path])


def _need_devices(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    config_path = Path(recipe.launch.accelerate_config)
    if not config_path.exists():
        return  # reported already
    wanted = derive_resources(recipe)
    if wanted.num_machines > 1 and machine.slurm is None:
        yield (
            f"{wanted.num_machines} machines are needed, but there is no Slurm to allocate them",
            "runner launch RECIPE --prepare  # writes the command for each machine",
        )
    devices = machine.libraries.devices
    if wanted.num_gpus > max(len(devices), 1):  # a single process can train on the CPU
        hint: str | None = f"a machine with {format_count(wanted.num_gpus, 'GPU')}"
        if machine.gpus and not devices and machine.libraries.cuda is None:
            hint = _CUDA_TORCH
        elif devices:
            hint = _suggest_fewer(recipe, len(devices), wanted.num_machines)
        gpus = "1 GPU is" if wanted.num_gpus == 1 else f"{wanted.num_gpus} GPUs are"
        yield f"{gpus} needed, torch sees {len(devices) or 'none'}", hint


def _note_slow(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    """A single process without a GPU trains on the CPU."""
    devices, config_path = machine.libraries.devices, Path(recipe.launch.accelerate_config)
    if not devices and config_path.exists() and derive_resources(recipe).num_gpus == 1:
        is_of_torch = machine.gpus and machine.libraries.cuda is None
        yield (
            "1 GPU is needed, torch sees none: the run trains on the CPU",
            (_CUDA_TORCH if is_of_torch else None),
        )


def _suggest_fewer(recipe: Recipe, num_gpus: int, num_machines: int) -> str | None:
    """The launch on as many of the GPUs as keep the global batch."""
    for count in range(num_gpus * num_machines, 0, -num_machines):
        with contextlib.suppress(RefusedError):
            derive_accumulation(recipe, count)
            return f"runner launch RECIPE --num-processes {count}  # keeps the global batch"
    return None


def _note_capability(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    """Older GPUs emulate bfloat16; `torch.cuda.is_bf16_supported`, which Transformers checks,
    returns True for them.
    """
    config_path, devices = Path(recipe.launch.accelerate_config), machine.libraries.devices
    if not devices or not config_path.exists() or not derive_resources(recipe).num_gpus:
        return
    oldest = min(devices, key=lambda device: device.capability)
    if oldest.capability < (8, 0) and (recipe.training.bf16 or recipe.model.dtype == "bfloat16"):
        capability = ".".join(map(str, oldest.capability))
        yield (
            f"bfloat16 is emulated, and slow, below capability 8.0: {oldest.name} has {capability}",
            "runner launch RECIPE model.dtype=float32 training.bf16=false training.fp16=true",
        )


def _need_packages(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    libraries = machine.libraries
    if uses_bitsandbytes(recipe) and "bitsandbytes" not in libraries.versions:
        why = libraries.failures.get("bitsandbytes", "it is not installed")
        yield f"bitsandbytes cannot be used: {why}", "pip install --force-reinstall bitsandbytes"
    attention = recipe.model.attn_implementation or ""
    if attention == "flash_attention_2" and "flash_attn" not in libraries.versions:
        why = libraries.failures.get("flash_attn", "flash-attn is not installed")
        yield (
            f"model.attn_implementation is {attention}: {why}",
            "pip install flash-attn --no-build-isolation, or model.attn_implementation=sdpa",
        )
    if (
        attention == "flash_attention_3"
        and importlib.util.find_spec("flash_attn_interface") is None
    ):
        yield (
            f"model.attn_implementation is {attention}: its package is not installed",
            "build it from the sources of FlashAttention 3, or model.attn_implementation=sdpa",
        )
    arguments = recipe.training.hugging_face_arguments()
    for start, (module, package) in _OPTIMIZERS.items():
        optimizer = str(arguments.get("optim") or "")
        if optimizer.startswith(start) and importlib.util.find_spec(module) is None:
            yield (
                f"training.optim is {optimizer}: {package} is not installed",
                f"pip install {package}",
            )
    if arguments.get("use_liger_kernel") and importlib.util.find_spec("liger_kernel") is None:
        yield "training.use_liger_kernel: liger-kernel is not installed", "pip install liger-kernel"


def _need_deepspeed(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    settings = load_launch_settings(Path(recipe.launch.accelerate_config))
    if not isinstance(settings, dict) or not names_deepspeed(settings):
        return
    if why := machine.libraries.failures.get("deepspeed"):
        yield f"DeepSpeed cannot be imported: {why}", None
    elif "deepspeed" not in machine.libraries.versions:
        yield "DeepSpeed is not installed", "pip install -c constraints.txt deepspeed"
    on_cpu, offloads = settings.get("use_cpu") is True, "'device': 'cpu'" in str(settings)
    if not (on_cpu or offloads):
        return  # nothing is compiled
    purpose = "its collectives on the CPU" if on_cpu else "its optimizer in CPU memory"
    if machine.compiler is None:
        yield f"DeepSpeed compiles {purpose}, but there is no C++ compiler", "apt-get install g++"
    if shutil.which("ninja") is None and not (Path(sys.executable).parent / "ninja").exists():
        yield f"DeepSpeed compiles {purpose}, but there is no ninja", "pip install ninja"
    if offloads and machine.libraries.devices and machine.cuda_home is None:
        yield (
            f"DeepSpeed compiles {purpose}, but there is no CUDA toolkit",
            "install the toolkit of CUDA"
            f" {machine.libraries.cuda} and set CUDA_HOME, or train without offload:"
            " launch.accelerate_config=accelerate_configs/zero3.yaml",
        )


def _need_others(recipe: Recipe, machine: Machine) -> Iterator[Need]:
    for look in (require_trackers, open_run_folder):
        try:
            look(recipe)
        except RunnerError as error:
            yield error.message, error.hint
    names = list_hub_names(recipe)
    if names and os.environ.get("HF_HUB_OFFLINE", "") not in ("", "0"):
        from huggingface_hub import scan_cache_dir
        from huggingface_hub.errors import CacheNotFound

        try:
            cached = {repo.repo_id for repo in scan_cache_dir().repos}
        except CacheNotFound:
            cached = set()
        for key, name in names.items():
            if name.name not in cached:
                what = f"{key}: {name.name} is not in the cache, and HF_HUB_OFFLINE is set"
                yield what, f"env -u HF_HUB_OFFLINE hf download {name.name}"
