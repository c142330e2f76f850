"""Files of arithmetic rows, and the data sections that read them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from runner.recipe.data_section import DataSection

ROWS = [
    {"prompt": f"What is {a} plus {b}?", "completion": f"It is {a + b}."}
    for a in range(8)
    for b in range(10)
]


def section(path: Path, **changes: Any) -> DataSection:
    """A data section with 80 arithmetic rows: 30 for training, 10 for validation, 15 for test."""
    content: dict[str, Any] = {
        "train": {"path": str(path)},
        "task": {"name": "prompt_completion"},
        "num_train_samples": 30,
        "num_validation_samples": 10,
        "num_test_samples": 15,
        "seed": 7,
        "max_length": 128,
    }
    return DataSection.model_validate_json(json.dumps(content | changes))


def write_rows(path: Path, rows: Sequence[Mapping[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
