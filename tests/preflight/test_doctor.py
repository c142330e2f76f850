"""`runner doctor`: the machine as it is, and recipes held against machines that are described."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from runner.cli.main import main
from runner.launch.gpus import Gpu
from runner.plan.select import Selected, run_paths
from runner.preflight.doctor import Machine, describe_machine, find_lacks
from runner.preflight.machine import Device, Libraries, find_cuda_home
from runner.project_folder import entering
from runner.recipe.parse import Recipe
from tests.conftest import ROOT, Project

VERSIONS = {"bitsandbytes": "0.50.2", "deepspeed": "0.19.8"}
PLAIN = Machine(Libraries("2.13.0+cpu", versions=VERSIONS), None, "/usr/bin/c++", None, None)
GPU_0 = Gpu(0, "GPU-a", "NVIDIA H200")
H200 = Device("NVIDIA H200", 150 << 30, 149 << 30, (9, 0))
V100 = Device("Tesla V100", 32 << 30, 31 << 30, (7, 0))


def on_gpus(*devices: Device) -> Machine:
    libraries = Libraries("2.13.0+cu130", "13.0", devices, versions=VERSIONS)
    return replace(PLAIN, libraries=libraries)


@pytest.fixture
def here(project: Project, monkeypatch: pytest.MonkeyPatch) -> Project:
    project.add_model("gemma")
    monkeypatch.chdir(project.root)
    return project


def select(recipe: Recipe) -> Selected:
    return Selected(recipe, Path("recipe.yaml"), run_paths(recipe, Path("runs")))


def lacks(recipe: Recipe, machine: Machine) -> list[tuple[str, str | None]]:
    return [(one.what, one.hint) for one in find_lacks([select(recipe)], machine)]


def test_a_machine_for_which_the_recipes_are_made_lacks_nothing(here: Project) -> None:
    gpu = "launch.accelerate_config=accelerate_configs/single_gpu.yaml"
    assert lacks(here.recipe(), PLAIN) == []
    assert lacks(here.recipe(gpu, "training.bf16=true"), on_gpus(H200)) == []


GPU = "launch.accelerate_config=accelerate_configs/single_gpu.yaml"
ZERO3 = ("launch.accelerate_config=accelerate_configs/zero3.yaml", "launch.num_processes=2")
OFFLOAD = "launch.accelerate_config=accelerate_configs/zero3_offload.yaml"
CANNOT = {
    "no GPUs": (ZERO3, PLAIN, "2 GPUs are needed, torch sees none", "a machine with 2 GPUs"),
    "too few GPUs": (ZERO3, on_gpus(H200), "2 GPUs are needed, torch sees 1", "--num-processes 1"),
    "torch for the CPU beside GPUs": (
        ZERO3,
        replace(PLAIN, gpus=[GPU_0]),
        "torch sees none",
        "pip install --force-reinstall -c constraints-cuda.txt torch",
    ),
    "no bitsandbytes": (
        ("quantization.method=8bit",),
        replace(PLAIN, libraries=Libraries("2.13.0+cpu")),
        "bitsandbytes cannot be used",
        "pip install",
    ),
    "a broken bitsandbytes": (
        ("training.optim=adamw_8bit",),
        replace(PLAIN, libraries=Libraries("2", failures={"bitsandbytes": "OSError: no libcuda"})),
        "bitsandbytes cannot be used: OSError: no libcuda",
        "pip install",
    ),
    "no FlashAttention": (
        ("model.attn_implementation=flash_attention_2", "model.dtype=bfloat16"),
        on_gpus(H200),
        "flash-attn is not installed",
        "--no-build-isolation",
    ),
    "an optimizer's package": (
        ("training.optim=grokadamw",),
        PLAIN,
        "training.optim is grokadamw: grokadamw is not installed",
        "pip install grokadamw",
    ),
    "no DeepSpeed": (
        ZERO3,
        replace(on_gpus(H200, H200), libraries=Libraries("2", "13.0", (H200, H200))),
        "DeepSpeed is not installed",
        "pip install -c constraints.txt deepspeed",
    ),
    "no compiler": (
        (OFFLOAD,),
        replace(on_gpus(H200), compiler=None, cuda_home=Path("/usr/local/cuda")),
        "there is no C++ compiler",
        "apt-get install g++",
    ),
    "no CUDA toolkit": ((OFFLOAD,), on_gpus(H200), "there is no CUDA toolkit", "CUDA_HOME"),
    "a tracker": (
        ("tracking.report_to=[neptune]",),
        PLAIN,
        "neptune, which is not installed",
        "pip install neptune",
    ),
    "remote storage": (
        ("checkpoints.remote={url: 'gs://bucket/runs'}",),
        PLAIN,
        "gs://",
        "pip install 'recipe-runner[gcs]'",
    ),
    "a file": (
        ("data.train.path=nowhere.jsonl",),
        PLAIN,
        "data.train.path: nowhere.jsonl does not exist",
        "data.train.path=FILE",
    ),
}


@pytest.mark.parametrize("case", CANNOT)
def test_a_missing_requirement_is_reported_with_its_fix(here: Project, case: str) -> None:
    changes, machine, what, fix = CANNOT[case]
    found = lacks(here.recipe(*changes), machine)
    assert len(found) == 1, found
    assert what in found[0][0] and found[0][0].endswith(")")
    assert found[0][1] is not None and fix in found[0][1]
    assert "RECIPE" not in found[0][1], "the hint names a recipe that is there"


def test_an_old_gpu_is_noted(here: Project) -> None:
    selected = select(here.recipe(GPU, "training.bf16=true"))
    (found,) = find_lacks([selected], on_gpus(V100))
    assert found.level == "note" and found.hint is not None
    assert "bfloat16 is emulated, and slow, below capability 8.0: Tesla V100 has 7.0" in found.what
    assert "runner launch recipe.yaml model.dtype=float32" in found.hint
    assert lacks(here.recipe(GPU), on_gpus(V100)) == []


def test_as_many_gpus_are_suggested_as_the_global_batch_divides_by(here: Project) -> None:
    sizes = ("training.per_device_train_batch_size=1", "training.global_batch_size=4")
    recipe = here.recipe(ZERO3[0], "launch.num_processes=4", *sizes)
    ((what, hint),) = lacks(recipe, on_gpus(H200, H200, H200))
    assert "4 GPUs are needed, torch sees 3" in what
    assert hint is not None and "--num-processes 2 " in hint


def test_of_a_run_directory_the_recipe_is_hinted_at(here: Project) -> None:
    recipe = here.recipe(*ZERO3, "run.name=a")
    paths = run_paths(recipe, Path("runs"))
    paths.run_dir.mkdir(parents=True)
    selected = Selected(recipe, paths.run_dir, paths)
    (found,) = find_lacks([selected], on_gpus(H200))
    assert found.hint is not None and found.hint.startswith("runner launch RECIPE ")
    path = Path("recipes", recipe.run.grid, "a.yaml")
    path.parent.mkdir(parents=True)
    path.touch()
    (found,) = find_lacks([selected], on_gpus(H200))
    assert found.hint is not None and found.hint.startswith(f"runner launch {path} ")
    with entering(here.root):
        (found,) = find_lacks([selected], on_gpus(H200))
    assert found.hint is not None
    assert found.hint.startswith(f"cd {here.root} && runner launch {path} ")


def test_pushes_that_launch_refuses_are_lacks(
    here: Project, monkeypatch: pytest.MonkeyPatch
) -> None:
    push = ("tracking.hub_push=end", "tracking.hub_model_id=lab/model")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    (found,) = find_lacks([select(here.recipe(*push))], PLAIN)
    assert found.level == "missing" and "HF_TOKEN is not set, and a push needs a" in found.what
    assert found.hint is not None and "set HF_TOKEN in the environment" in found.hint
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert lacks(here.recipe(*push), PLAIN) == []


def test_deepspeed_without_offload_compiles_nothing_on_gpus(here: Project) -> None:
    machine = replace(on_gpus(H200, H200), compiler=None)
    assert lacks(here.recipe(*ZERO3), machine) == []


def test_runs_that_lack_the_same_share_a_line(here: Project) -> None:
    runs = []
    for name in ("a", "b"):
        recipe = here.recipe(GPU, f"run.name={name}")
        runs.append(Selected(recipe, Path(f"{name}.yaml"), run_paths(recipe, Path("runs"))))
    (found,) = find_lacks(runs, PLAIN)
    grid = runs[0].recipe.run.grid
    said = "1 GPU is needed, torch sees none: the run trains on the CPU"
    assert (found.level, found.what) == ("note", f"{said} (2 runs, such as {grid}/a)")
    (found,) = find_lacks(runs, replace(PLAIN, gpus=[GPU_0]))
    assert found.hint == "pip install --force-reinstall -c constraints-cuda.txt torch"


def described(machine: Machine) -> str:
    return "\n".join(
        f"{one.level} {one.what} {one.hint}" for one in describe_machine(machine, Path("runs"))
    )


def test_a_machine_is_described(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)
    text = described(on_gpus(H200))
    assert "ok torch 2.13.0+cu130, built for CUDA 13.0" in text
    assert "ok GPU 0: NVIDIA H200, 150.00 GiB, 149.00 GiB free, capability 9.0" in text
    assert "note no GPU: torch sees none, and nvidia-smi does not answer" in described(PLAIN)
    busy = described(on_gpus(replace(H200, free_bytes=None)))
    assert "note GPU 0: NVIDIA H200, 150.00 GiB, ? free, capability 9.0; its free memory" in busy
    hanging = replace(PLAIN, libraries=Libraries(failures={"torch": "no answer in 180 s"}))
    assert "missing torch cannot be used: no answer in 180 s" in described(hanging)
    blind = replace(on_gpus(), gpus=[GPU_0, replace(GPU_0, index=1, uuid="GPU-b")])
    assert "nvidia-smi lists 2 GPUs, torch sees none: the driver may be too" in described(blind)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "7")
    assert "torch sees no GPU under CUDA_VISIBLE_DEVICES='7'" in described(blind)


def test_the_token_is_told_of_and_never_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_" + "a" * 34)
    assert "a hub token is in HF_TOKEN" in described(PLAIN)
    assert "hf_aaa" not in described(PLAIN)


def test_the_toolkit_is_found_as_torch_finds_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compiler = tmp_path / "cuda" / "bin" / "nvcc"
    compiler.parent.mkdir(parents=True)
    compiler.touch(mode=0o755)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    monkeypatch.setenv("CUDA_HOME", str(tmp_path / "cuda"))
    assert find_cuda_home() == tmp_path / "cuda"
    monkeypatch.setenv("CUDA_HOME", str(tmp_path))
    assert find_cuda_home() is None
    monkeypatch.delenv("CUDA_HOME")
    monkeypatch.setenv("PATH", str(compiler.parent))
    assert find_cuda_home() == tmp_path / "cuda"


def test_the_verb_asks_this_machine(project: Project) -> None:
    project.add_model("gemma")
    path = project.write_recipe("recipes/tests/plain.yaml")
    done = project.cli("doctor", path)
    assert done.returncode == 0, done.stdout + done.stderr
    version = ".".join(map(str, sys.version_info[:3]))
    assert re.search(rf"^ok +Python {version}, ", done.stdout)
    assert re.search(r"^ok +torch \d+\.\d+", done.stdout, re.MULTILINE)
    assert done.stdout.rstrip().endswith(
        "the recipe can run here; `runner check` checks the rows, memory and disk of each"
    )
    text = json.loads(path.read_text())
    text["data"]["train"]["path"] = "nowhere.jsonl"
    path.write_text(json.dumps(text))
    done = project.cli("doctor", path)
    assert done.returncode == 2
    assert "missing data.train.path: nowhere.jsonl does not exist" in done.stdout


def test_files_of_the_project_are_not_run(project: Project) -> None:
    (project.root / "bitsandbytes.py").write_text("open('ran', 'w')\n")
    assert project.cli("doctor").returncode == 0
    assert not (project.root / "ran").exists()


def test_conditions_without_recipes_are_refused(
    here: Project, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["doctor", "--where", "lr=1"]) == 2
    said = capsys.readouterr().err
    assert "no recipe is named, only --where lr=1" in said
    assert "\nhint: runner doctor recipes --where lr=1\n" in said


def test_a_runner_that_is_not_installed_is_a_note(tmp_path: Path) -> None:
    for path in Path(pytest.__file__).parents[1].iterdir():
        if not path.name.startswith("recipe_runner"):
            (tmp_path / path.name).symlink_to(path)
    (tmp_path / "runner").symlink_to(ROOT / "runner")  # a checkout may hold its egg-info
    program = """if True:
        from pathlib import Path
        from runner.preflight.doctor import Machine, describe_machine
        from runner.preflight.machine import Libraries
        machine = Machine(Libraries("2"), None, None, None, None)
        print(*describe_machine(machine, Path("runs")), sep="\\n")
    """
    done = subprocess.run(
        [sys.executable, "-S", "-c", program],
        env={**os.environ, "PYTHONPATH": str(tmp_path)},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert "level='note', what='the runner itself is not installed" in done.stdout, done.stderr


def test_a_torch_that_cannot_be_imported_is_missing(project: Project, tmp_path: Path) -> None:
    broken = tmp_path / "broken" / "torch"
    broken.mkdir(parents=True)
    (broken / "__init__.py").write_text("raise OSError('libcudart.so: cannot open')\n")
    environment = {**os.environ, "PYTHONPATH": f"{broken.parent}:{ROOT}"}
    done = project.cli("doctor", environment=environment)
    assert done.returncode == 2, done.stdout
    assert "missing torch cannot be used: OSError: libcudart.so: cannot open" in done.stdout


def test_constraints_are_those_of_cuda_without_its_libraries() -> None:
    cuda = (ROOT / "constraints-cuda.txt").read_text().splitlines()
    plain = (ROOT / "constraints.txt").read_text().splitlines()
    own = re.compile(r"cuda-|nvidia-|triton==")
    assert [line for line in cuda if not own.match(line)] == plain
    assert sum(bool(own.match(line)) for line in cuda) > 10
