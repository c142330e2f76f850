"""Keeps libraries out of a training process that has no use for them.

TRL imports Weights & Biases, and PEFT bitsandbytes (with torch's compiler behind it), whenever they are installed.
Together they are a fourth of the processor time that a run's imports take (`python -X importtime`).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Final

from huggingface_hub import try_to_load_from_cache

from runner.recipe import Recipe

# Every other optimizer of Transformers is taken to need bitsandbytes.
_TORCH_OPTIMIZERS: Final = (None, "adamw_torch", "adamw_torch_fused", "adafactor", "adagrad", "rmsprop", "sgd")


def find_unused_libraries(recipe: Recipe) -> list[str]:
    """Which of them the recipe has no use for."""
    is_used = {"wandb": "wandb" in recipe.tracking.report_to, "bitsandbytes": _uses_bitsandbytes(recipe)}
    return [name for name, used in is_used.items() if not used]


def hide_libraries(names: Iterable[str]) -> None:
    """Make libraries look as if they were not installed, in this process and until it ends.

    Called before the first import of TRL or PEFT; what has been imported already stays.
    """
    for name in names:
        sys.modules.setdefault(name, None)  # type: ignore[arg-type] # Python's way to say that there is none


def _uses_bitsandbytes(recipe: Recipe) -> bool:
    optimizer = recipe.training.hugging_face_arguments().get("optim")
    return (
        recipe.quantization.method != "none"
        or optimizer not in _TORCH_OPTIMIZERS
        or _may_be_quantized(recipe.model.path, recipe.model.revision)
    )


def _may_be_quantized(path: str, revision: str | None) -> bool:
    """Whether the base model's own configuration asks for quantised weights; also True where it is not here yet."""
    config_path = Path(path) / "config.json"
    if not Path(path).is_dir():
        try:
            cached = try_to_load_from_cache(path, "config.json", revision=revision)
        except ValueError:  # neither a folder nor a hub id
            return True
        config_path = Path(cached) if isinstance(cached, str) else config_path
    if not config_path.exists():
        return True
    return "quantization_config" in json.loads(config_path.read_text(encoding="utf-8"))
