"""The launch command of a recipe, exactly; `UPDATE_GOLDEN=1` rewrites
`golden/launch_commands.txt`.
"""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.errors import RefusedError
from runner.launch.command import LaunchCommand, Machines, Placement, build_launch_command
from runner.recipe.parse import Recipe, load_recipe, parse_recipe
from tests.conftest import ROOT
from tests.recipe.test_parse import TEXT

GOLDEN = ROOT / "tests" / "golden" / "launch_commands.txt"
TOOLS_DIR = str(Path(sys.executable).parent)

MULTI_GPU = ("launch.accelerate_config=accelerate_configs/multi_gpu.yaml",)
ZERO3 = (
    "launch.accelerate_config=accelerate_configs/zero3.yaml",
    "launch.num_cpu_threads_per_process=4",
)
SUMMARIES = "recipes/summaries/gemma-2-9b-it_task-1_auto_060_completion_acc16.yaml"
MATH = "recipes/math_tools/gemma-7b-it_lr5e-6.yaml"
COMMANDS: list[tuple[str, tuple[str, ...], Placement]] = [
    ("recipes/demo/gemma_060_completion_seed1.yaml", (), Placement(1, None, 2)),
    (SUMMARIES, (), Placement(1, ("0",), 8)),
    (SUMMARIES, (), Placement(1, ("GPU-6f0c",), 1)),
    (SUMMARIES, MULTI_GPU, Placement(2, ("2", "5"), 64)),
    (SUMMARIES, ZERO3, Placement(4, None, 64)),
    (MATH, (), Placement(8, None, 64)),
    (MATH, ("launch.num_processes=4",), Placement(4, ("0", "1", "2", "3"), 64)),
    (MATH, ("launch.num_machines=2",), Placement(8, None, 64, Machines(2, "node7", 40123))),
    (
        MATH,
        ("launch.num_machines=2",),
        Placement(8, None, 64, Machines(2, "FIRST_MACHINE", 29500, rank=1)),
    ),
]


def parse(*overrides: str) -> Recipe:
    return parse_recipe(TEXT, where="r.yaml", overrides=overrides)


def build(recipe: Recipe, run_dir: Path, placement: Placement) -> LaunchCommand:
    return build_launch_command(recipe, run_dir, placement, path=f"{TOOLS_DIR}:/usr/bin")


def test_commands_of_committed_recipes() -> None:
    blocks = []
    for name, overrides, placement in COMMANDS:
        recipe = load_recipe(ROOT / name, overrides)
        command = build(recipe, Path("runs") / recipe.run.grid / recipe.run.name, placement)
        shown = "\n".join(
            [f"# {' '.join([name, *overrides])}", f"# {placement}", command.as_shell({}), ""]
        )
        blocks.append(
            shown.replace(f"{TOOLS_DIR}:", "TOOLS_DIR:").replace(sys.executable, "PYTHON")
        )
    text = "\n".join(blocks)
    if os.environ.get("UPDATE_GOLDEN"):
        GOLDEN.write_text(text)
    assert GOLDEN.read_text() == text, "UPDATE_GOLDEN=1 rewrites it"


def test_the_experiment_is_not_on_the_command_line() -> None:
    """Each setting has one owner: the command is the same for every experiment."""
    command = build(parse(), Path("runs/toy/base"), Placement(3))
    changes = [
        "training.learning_rate=9",
        "training.bf16=true",
        "training.global_batch_size=48",
        "training.per_device_train_batch_size=4",
        "training.gradient_checkpointing=true",
        "training.max_grad_norm=0.5",
        "training.seed=5",
        "model.dtype=bfloat16",
        "model.path=other",
        "loss=completion",
        "adapter.method=none",
    ]
    for change in changes:
        assert build(parse(change), Path("runs/toy/base"), Placement(3)) == command, change
    words = " ".join([*command.argv, *command.environment]).lower()
    for word in (
        "batch",
        "precision",
        "bf16",
        "fp16",
        "learning",
        "accumulation",
        "clip",
        "zero",
        "seed",
        "mixed",
    ):
        assert word not in words


def test_what_only_says_where_is_on_the_command_line() -> None:
    run_dir = Path("runs/toy/base")
    command = build(parse(), run_dir, Placement(3, ("4", "5", "6"), 12))
    assert command.argv[:2] == ("accelerate", "launch") and command.argv[-3:] == (
        "-m",
        "runner.sft",
        "runs/toy/base",
    )
    assert command.argv[command.argv.index("--num_processes") + 1] == "3"
    assert command.argv[command.argv.index("--config_file") + 1] == "cpu.yaml"
    assert command.environment["CUDA_VISIBLE_DEVICES"] == "4,5,6"
    assert command.environment["OMP_NUM_THREADS"] == "4"
    assert "CUDA_VISIBLE_DEVICES" not in build(parse(), run_dir, Placement(3)).environment
    assert build(parse(), run_dir, Placement(3, None, 1)).environment["OMP_NUM_THREADS"] == "1"
    own = build(parse("launch.num_cpu_threads_per_process=7"), run_dir, Placement(3, None, 64))
    assert own.environment["OMP_NUM_THREADS"] == "7"


def test_processes_that_cannot_keep_the_global_batch_are_refused() -> None:
    with pytest.raises(RefusedError, match="a global batch of 24 is not divisible by 5 processes"):
        build(parse(), Path("runs/toy/base"), Placement(5))


def test_processes_that_do_not_divide_among_the_machines_are_refused() -> None:
    with pytest.raises(RefusedError, match="3 processes do not divide among 2 machines"):
        build(parse(), Path("runs/toy/base"), Placement(3, None, 64, Machines(2, "node7", 40123)))


def test_the_tools_of_this_python_are_found_without_activating_it() -> None:
    recipe, run_dir = parse(), Path("runs/toy/base")
    without = build_launch_command(recipe, run_dir, Placement(3), path="/usr/bin:/bin")
    assert without.environment["PATH"] == f"{TOOLS_DIR}:/usr/bin:/bin"
    assert (
        "PATH"
        not in build_launch_command(
            recipe, run_dir, Placement(3), path=f"/bin:{TOOLS_DIR}"
        ).environment
    )


@settings(deadline=None, max_examples=25)
@given(
    name=st.text(
        st.characters(exclude_characters="\0", exclude_categories=["Cs"]), min_size=1, max_size=30
    )
)
def test_a_command_survives_being_pasted_whatever_the_names(name: str) -> None:
    command = build(parse(), Path("runs") / name, Placement(3, (name,)))
    assert shlex.split(command.as_shell({}))[-len(command.argv) :] == list(command.argv)


@pytest.mark.parametrize(
    "name",
    ["a b", "$(touch pwned)", "`touch pwned`", "a'b\"c", "; touch pwned #", "*", "a\nb", "-x"],
)
def test_a_shell_reads_a_hostile_name_as_a_name(name: str, tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "accelerate"
    tool.parent.mkdir()
    tool.write_text('#!/bin/bash\nprintf "%s\\0" "$CUDA_VISIBLE_DEVICES" "${@: -1}"\n')
    tool.chmod(0o755)
    line = build(parse(), Path(name), Placement(3, (name,))).as_shell({})
    shell = subprocess.run(
        ["bash", "-c", line],
        cwd=tmp_path,
        env={"PATH": f"{tool.parent}:/usr/bin:/bin"},
        capture_output=True,
        text=True,
        check=True,
    )
    assert shell.stdout.split("\0")[:2] == [name, name]
    assert not (tmp_path / "pwned").exists()


# Two that are removed for special reasons, and two that stay although they look similar.
SURROUNDINGS = {
    "WORLD_SIZE": "2",
    "PET_NNODES": "2",
    "SLURM_PROCID": "1",
    "SLURM_JOB_ID": "17",
    "ACCELERATE_MIXED_PRECISION": "bf16",
    "ACCELERATE_LOG_LEVEL": "debug",
    "MY_RANK": "3",
    "OMP_NUM_THREADS": "64",
}


def test_what_other_launchers_left_is_removed_from_the_environment() -> None:
    command = build(parse(), Path("runs/toy/base"), Placement(3))
    assert command.list_removed(SURROUNDINGS) == [
        "ACCELERATE_MIXED_PRECISION",
        "PET_NNODES",
        "SLURM_PROCID",
        "WORLD_SIZE",
    ]
    assert command.derive_environment(SURROUNDINGS) == {
        "SLURM_JOB_ID": "17",
        "MY_RANK": "3",
        **command.environment,
    }
    assert command.environment["ACCELERATE_LOG_LEVEL"] == "info"


@pytest.mark.parametrize("rank", [None, 1])
def test_machines_keep_what_slurm_tells_each_of_them(rank: int | None) -> None:
    machines = Machines(3, "node7", 40123, rank)
    command = build(parse(), Path("runs/toy/base"), Placement(3, None, 64, machines))
    names = ["ACCELERATE_MIXED_PRECISION", "PET_NNODES", "WORLD_SIZE"]
    assert command.list_removed(SURROUNDINGS) == names


@pytest.mark.parametrize(
    "name",
    [
        *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
        *("ROLE_RANK", "ROLE_NAME", "NODE_RANK", "MASTER_ADDR", "MASTER_PORT"),
        *("TORCHELASTIC_RUN_ID", "ACCELERATE_USE_FSDP", "FSDP_VERSION", "PMI_SIZE"),
        *("OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_SIZE", "MPI_LOCALRANKID", "MPI_LOCALNRANKS"),
        *("SLURM_LOCALID", "SLURM_NTASKS"),
    ],
)
def test_each_of_them_is_known(name: str) -> None:
    command = build(parse(), Path("runs/toy/base"), Placement(3))
    assert command.list_removed({name: "1", f"X{name}": "1"}) == [name]


def test_a_pasted_line_starts_with_the_same_environment(tmp_path: Path) -> None:
    tool = tmp_path / "bin" / "accelerate"
    tool.parent.mkdir()
    tool.write_text("#!/bin/bash\nenv -0\n")
    tool.chmod(0o755)
    surroundings = {**SURROUNDINGS, "PATH": f"{tool.parent}:/usr/bin:/bin"}
    command = build(parse(), Path("runs/toy/base"), Placement(3, ("a b'$(c)",)))
    shell = subprocess.run(
        ["bash", "--norc", "-c", command.as_shell(surroundings)],
        env=surroundings,
        capture_output=True,
        text=True,
        check=True,
    )
    found = dict(entry.split("=", 1) for entry in shell.stdout.split("\0") if entry)
    found["PATH"] = command.environment.get("PATH", found["PATH"])
    of_bash = {"_", "PWD", "SHLVL", "OLDPWD"}
    expected = command.derive_environment(surroundings)
    assert {name: value for name, value in found.items() if name not in of_bash} == {
        name: value for name, value in expected.items() if name not in of_bash
    }
