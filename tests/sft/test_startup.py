"""A rank's place is read from the environment once, and nowhere else; freed memory is kept."""

from __future__ import annotations

import subprocess
import sys
import textwrap

import pytest

from runner.sft.startup import WorldPlace
from tests.conftest import ROOT

VARIABLES = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE")


def test_each_variable_has_its_field_and_a_lone_process_needs_none() -> None:
    environment = dict(zip(VARIABLES, ("5", "1", "8", "4"), strict=True))
    place = WorldPlace.read(environment)
    assert place == WorldPlace(rank=5, local_rank=1, world_size=8, local_world_size=4)
    assert WorldPlace.read({}) == WorldPlace(0, 0, 1, 1)
    with pytest.raises(ValueError, match="first"):
        WorldPlace.read({"RANK": "first"})


@pytest.mark.parametrize("variable", VARIABLES)
def test_no_other_module_names_the_variables(variable: str) -> None:
    sources = sorted((ROOT / "runner").rglob("*.py"))
    found = [str(path.relative_to(ROOT)) for path in sources if f'"{variable}"' in path.read_text()]
    assert found == ["runner/sft/startup.py"]


def test_freed_memory_is_used_again_without_the_kernel() -> None:
    """Pages that the kernel maps for ten allocations, one after the other, of 64 MiB each."""
    code = """
        import resource
        from runner.sft.startup import keep_freed_memory

        def count_faults():
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            for _ in range(10):
                b"x" * 2**26
            return resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before

        given_back = count_faults()
        keep_freed_memory()
        print(given_back, count_faults())
    """
    argv = [sys.executable, "-c", textwrap.dedent(code)]
    shown = subprocess.run(argv, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    given_back, kept = map(int, shown.split())
    assert kept < given_back / 5
