"""Makes an export reproducible, reads it again and checks it: every trained tensor is there, whole and finite."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Final

import torch
from safetensors import safe_open

from runner.errors import RunnerError
from runner.fsio import load_json, write_json_atomic


class ExportError(RunnerError):
    """An export that would not load or would load something else."""


# PEFT keeps these as sets and writes them in an order that differs from process to process.
_SETS: Final = ("target_modules", "modules_to_save", "exclude_modules")


def sort_adapter_config(model_dir: Path) -> None:
    """Write the sets of `adapter_config.json` in order, so that equal runs export equal bytes."""
    path = model_dir / "adapter_config.json"
    content = load_json(path)
    if content is not None:
        is_set = {name: isinstance(content.get(name), list) for name in _SETS}
        write_json_atomic(path, content | {name: sorted(content[name]) for name in _SETS if is_set[name]})


def exported_name(parameter_name: str) -> str:
    """The name under which PEFT or Transformers saves a parameter.

    >>> exported_name("base_model.model.lm_head.modules_to_save.default.weight")
    'base_model.model.lm_head.weight'
    """
    return parameter_name.replace(".modules_to_save.default", "").replace(".default", "")


def verify_export(model_dir: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the safetensors files of `model_dir` against `expected`, trained parameter names and their shapes.

    Raises:
        ExportError: a tensor is missing, empty, of another shape or not finite.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ExportError(f"{path}: the exported tensor {name} is not finite")
    for name, shape in expected.items():
        saved = shapes.get(exported_name(name))
        if saved != shape:
            raise ExportError(
                f"{model_dir}: {exported_name(name)} should have the shape {shape}, the export has {saved or 'nothing'}"
            )
