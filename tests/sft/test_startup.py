"""A rank's place is read from the environment once, and nowhere else."""

from __future__ import annotations

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
