"""GPUs by name: what `nvidia-smi` lists, and which names CUDA would understand."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from runner.errors import RunnerError
from runner.launch.gpus import (
    Gpu,
    MigDevice,
    NamedGpu,
    choose_gpus,
    list_gpus,
    split_names,
    word_cpu_build,
)
from tests.support.fake_nvidia_smi import (
    GPU_0,
    GPU_1,
    GPU_2,
    LISTED,
    MIG_0,
    MIG_1,
    add_nvidia_smi,
    write_script,
)

A100 = "NVIDIA A100-SXM4-80GB"
MEMORY = (f"{GPU_0}, 81920", f"{GPU_1}, [N/A]", f"{GPU_2}, 81920")


@pytest.fixture
def bin_dir(tmp_path: Path) -> Path:
    """A folder that is first on the PATH of `surroundings`, empty as yet."""
    folder = tmp_path / "bin"
    folder.mkdir()
    return folder


def surroundings(bin_dir: Path, visible: str | None = None) -> dict[str, str]:
    outer = {} if visible is None else {"CUDA_VISIBLE_DEVICES": visible}
    return {"PATH": f"{bin_dir}:{os.environ['PATH']}", **outer}


def choose(bin_dir: Path, text: str | None, visible: str | None = None) -> list[str]:
    return [gpu.name for gpu in choose_gpus(text, surroundings(bin_dir, visible))]


def refuse(bin_dir: Path, text: str | None, visible: str | None = None) -> RunnerError:
    with pytest.raises(RunnerError) as caught:
        choose(bin_dir, text, visible)
    assert caught.value.hint is not None
    return caught.value


def test_what_nvidia_smi_lists(bin_dir: Path) -> None:
    add_nvidia_smi(bin_dir, LISTED, memory=MEMORY)
    parts = (MigDevice(MIG_0, "3g.40gb"), MigDevice(MIG_1, "1g.10gb+me"))
    listed = [Gpu(0, GPU_0, A100), Gpu(1, GPU_1, A100), Gpu(2, GPU_2, A100, parts)]
    assert list_gpus(surroundings(bin_dir)) == listed
    with_memory = list_gpus(surroundings(bin_dir), with_memory=True)
    assert with_memory is not None
    assert [gpu.memory_mib for gpu in with_memory] == [81920, None, 81920]
    assert [part.memory_mib for part in with_memory[2].migs] == [40960, 10240]


@pytest.mark.parametrize(
    "script",
    [
        None,
        "#!/bin/bash\necho 'NVIDIA-SMI has failed because it could not communicate'; exit 9\n",
        "#!/bin/bash\necho 'some other tool'\n",
        "#!/bin/bash\nexec sleep 1000\n",
        "#!/no/such/interpreter\n",
    ],
)
def test_no_answer_is_none(bin_dir: Path, script: str | None) -> None:
    environment = {"PATH": f"{bin_dir}:/usr/bin:/bin"}
    if script is not None:
        write_script(bin_dir, script)
    assert list_gpus(environment, answer_seconds=0.5) is None


@pytest.mark.parametrize("status", [0, 6])
def test_no_gpu_is_an_answer(bin_dir: Path, status: int) -> None:
    add_nvidia_smi(bin_dir, "No devices were found\n", status=status)
    assert list_gpus(surroundings(bin_dir)) == []
    assert "lists no GPU" in refuse(bin_dir, "0").message


@pytest.mark.parametrize(
    ("text", "names"),
    [
        ("0,1", ["0", "1"]),
        (" 1 , 00", ["1", "0"]),
        ("GPU-1f0c0d2e-1", [GPU_1]),  # as CUDA reads it: enough of it to be unique
        (f"{GPU_0},1", [GPU_0, GPU_1]),  # CUDA mixes no numbers and UUIDs
        (f"{MIG_1},{MIG_0}", [MIG_1, MIG_0]),
        (f"0,{MIG_0}", [GPU_0, MIG_0]),
        (None, ["0", "1", MIG_0, MIG_1]),
    ],
)
def test_names_of_what_there_is(
    bin_dir: Path, text: str | None, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    add_nvidia_smi(bin_dir, LISTED)
    assert choose(bin_dir, text) == names
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("0,3", "`--gpus 0,3`: 3: there is no such GPU here; nvidia-smi lists"),
        ("cuda:0", "cuda:0: there is no such GPU here"),
        ("-1", "-1: there is no such GPU here"),
        ("9" * 5000, "there is no such GPU here"),
        ("gpu-1f0c0d2e-1", "there is no such GPU here"),
        ("GPU-1f0c0d2e", "the beginning of several UUIDs"),
        (MIG_0[:12], "there is no such GPU here"),
    ],
)
def test_a_name_of_what_there_is_not_is_told_with_all_that_there_is(
    bin_dir: Path, text: str, words: str
) -> None:
    add_nvidia_smi(bin_dir, LISTED)
    error = refuse(bin_dir, text)
    assert words in error.message
    assert f"\n  0  {GPU_0}  {A100}\n" in error.message
    assert f"\n     {MIG_0}  MIG 3g.40gb\n" in error.message
    assert error.hint == f"--gpus 0,1,{MIG_0},{MIG_1}"


def test_a_divided_gpu_is_named_by_its_parts(bin_dir: Path) -> None:
    add_nvidia_smi(bin_dir, LISTED)
    for name in ("2", GPU_2):
        error = refuse(bin_dir, f"0,{name}")
        assert f"GPU {name} is divided" in error.message
        assert error.hint == f"--gpus {MIG_0},{MIG_1}"


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("0,0", "--gpus 0 --per-gpu 2"),
        ("0,1,0,1,00", "--gpus 0,1 --per-gpu 3"),
        (f"0,{GPU_0}", "--gpus 0 --per-gpu 2"),
        (f"{GPU_1},{GPU_1[:16]}", "--gpus 1 --per-gpu 2"),
        (f"{MIG_0},{MIG_0}", f"--gpus {MIG_0} --per-gpu 2"),
    ],
)
def test_one_gpu_twice(bin_dir: Path, text: str, hint: str) -> None:
    add_nvidia_smi(bin_dir, LISTED)
    error = refuse(bin_dir, text)
    assert "names one GPU twice" in error.message
    assert (error.hint or "").partition("  #")[0] == hint


@pytest.mark.parametrize("text", ["", "0,", " ", ",1"])
def test_a_name_is_not_empty(text: str) -> None:
    with pytest.raises(RunnerError, match="has an empty name"):
        split_names(text)


def test_an_outer_choice_of_gpus_holds(bin_dir: Path) -> None:
    add_nvidia_smi(bin_dir, LISTED)
    assert choose(bin_dir, "1", visible="1,2") == ["1"]
    assert choose(bin_dir, GPU_1, visible="1") == [GPU_1]
    assert choose(bin_dir, "1", visible=GPU_1[:16]) == ["1"]
    assert choose(bin_dir, MIG_1, visible="2") == [MIG_1], "a part of a visible GPU"
    assert choose(bin_dir, None, visible="1,2") == ["1", MIG_0, MIG_1]
    error = refuse(bin_dir, "0", visible="1,2")
    assert "`CUDA_VISIBLE_DEVICES=1,2` is set here and hides 0" in error.message
    assert error.hint == f"--gpus 1,{MIG_0},{MIG_1}"
    # CUDA reads up to the first name that it does not know.
    assert refuse(bin_dir, "1", visible="0,7,1").hint == "--gpus 0"
    for nothing in ("", "-1", "NoDevFiles"):
        assert "hides every GPU" in refuse(bin_dir, "0", visible=nothing).message


def test_without_an_answer_names_pass_with_a_note(
    bin_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write_script(bin_dir, "#!/bin/bash\nexit 9\n")
    for text in ("0,1", "GPU-1f0c", f"{MIG_0},{MIG_1}"):
        assert choose_gpus(text, surroundings(bin_dir)) == tuple(
            NamedGpu(name) for name in text.split(",")
        )
        note = f"note: nvidia-smi does not answer here, so `--gpus {text}` is used unchecked\n"
        assert capsys.readouterr().err == note
    for text in ("cuda:0", "-1", "all", "0;1", "GPU-", "GPU-0 1"):
        assert "is not the name of a GPU" in refuse(bin_dir, text).message
    assert "name them: --gpus 0,1" in str(refuse(bin_dir, None))


def test_without_an_answer_an_outer_choice_holds_as_far_as_names_tell(bin_dir: Path) -> None:
    write_script(bin_dir, "#!/bin/bash\nexit 9\n")
    assert choose(bin_dir, "3", visible="2,3") == ["3"]
    assert choose(bin_dir, "0", visible=GPU_1) == ["0"], "it is unknown"
    assert choose(bin_dir, GPU_1[:9], visible=GPU_1) == [GPU_1[:9]]
    assert refuse(bin_dir, "0", visible="2,3").hint == "--gpus 2,3"
    assert refuse(bin_dir, MIG_0, visible=MIG_1).hint == f"--gpus {MIG_1}"
    for nothing in ("", "-1", "NoDevFiles"):
        assert "and hides 0" in refuse(bin_dir, "0", visible=nothing).message


def test_a_torch_for_the_cpu_is_told() -> None:
    assert word_cpu_build("2.13.0+cpu") == (
        "this torch (2.13.0+cpu) is built for the CPU: the runs will train on the CPU"
    )
    assert [word_cpu_build(version) for version in (None, "2.13.0", "2.13.0+cu128")] == [None] * 3
