"""Every reason for what is left out has a singular."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from runner.data.tasks import oasst1
from runner.recipe import data_files
from runner.recipe.reasons import count_reason


@pytest.mark.parametrize("module", [oasst1, data_files])
def test_one_of_each_reason_is_counted_in_the_singular(module: object) -> None:
    text = Path(str(getattr(module, "__file__", ""))).read_text()
    words = r"(?:deleted |hidden )?(?:files|links|messages|replies)"
    reasons = re.findall(rf'(?:return |\[|: Final = )"({words}(?: [^"]*)?)"', text)
    assert len(reasons) >= 4
    for reason in reasons:
        said = count_reason(1, reason)
        assert not re.match(rf"1 {words}\b", said), said
        assert count_reason(2, reason) == f"2 {reason}"
