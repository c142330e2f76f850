"""Libraries that a recipe has no use for, and that its training process therefore never imports."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from runner.recipe.identity import load_launch_settings
from runner.recipe.parse import Recipe
from runner.recipe.schema import Lora

# Every other optimizer of Transformers is taken to need bitsandbytes.
_TORCH_OPTIMIZERS: Final = (
    None,
    "adamw_torch",
    "adamw_torch_fused",
    "adafactor",
    "adagrad",
    "rmsprop",
    "sgd",
)


def find_unused_libraries(recipe: Recipe, *, uses_deepspeed: bool = False) -> list[str]:
    """The libraries of these five that the recipe has no use for. `uses_deepspeed` is what the
    launcher says: a command typed by hand may name another config than the recipe.

    TRL imports Weights & Biases, and PEFT bitsandbytes (with torch's compiler behind it), whenever
    they are installed. Together they are a fourth of the processor time that a run's imports take
    (`python -X importtime`). accelerate imports DeepSpeed to ask if a model is one of its engines,
    0.14 s in every run, and Transformers SciPy for the losses of object detection, 0.2 to 0.3 s.
    Functions of the user's run in processes of their own, from which nothing is hidden.
    """
    deepspeed = uses_deepspeed or _may_use_deepspeed(recipe)
    bitsandbytes = uses_bitsandbytes(recipe)
    # Each tracker may log figures or statistics: what it takes for that is its own affair.
    has_trackers = bool(recipe.tracking.report_to)
    is_used = {
        "wandb": "wandb" in recipe.tracking.report_to,
        "bitsandbytes": bitsandbytes,
        "deepspeed": deepspeed,
        # bitsandbytes and DeepSpeed import it in some functions, PEFT for LoftQ.
        "scipy": has_trackers or bitsandbytes or deepspeed or _uses_loftq(recipe),
        "matplotlib": has_trackers,
    }
    return [name for name, used in is_used.items() if not used]


def hide_libraries(names: Iterable[str]) -> None:
    """Make libraries look as if they were not installed, in this process and until it ends.

    Called before the first import of Transformers, TRL or PEFT: what has been imported already
    stays, and Transformers looks for SciPy once.
    """
    for name in names:
        # Python's way to say that there is none.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def uses_bitsandbytes(recipe: Recipe) -> bool:
    """True where a run imports bitsandbytes: for its optimizer or for quantised weights."""
    optimizer = recipe.training.hugging_face_arguments().get("optim")
    return (
        recipe.quantization.method != "none"
        or optimizer not in _TORCH_OPTIMIZERS
        or _may_be_quantized(recipe.model.path, recipe.model.revision)
    )


def _uses_loftq(recipe: Recipe) -> bool:
    """Whether the adapter's first weights are made by LoftQ, which needs SciPy."""
    adapter = recipe.adapter
    return (
        isinstance(adapter, Lora) and adapter.lora_arguments().get("init_lora_weights") == "loftq"
    )


def _may_use_deepspeed(recipe: Recipe) -> bool:
    """Whether the launch asks for DeepSpeed; also True where its config cannot be read."""
    settings = load_launch_settings(Path(recipe.launch.accelerate_config))
    return not isinstance(settings, dict) or names_deepspeed(settings)


def names_deepspeed(settings: Mapping[str, Any]) -> bool:
    """True where an accelerate config asks for DeepSpeed."""
    is_named = str(settings.get("distributed_type")).upper() == "DEEPSPEED"
    return is_named or "deepspeed_config" in settings


def _may_be_quantized(path: str, revision: str | None) -> bool:
    """Whether the base model's own configuration asks for quantised weights; also True where it is
    not here yet, or cannot be read.
    """
    config_path = Path(path) / "config.json"
    if not Path(path).is_dir():
        from huggingface_hub import (
            try_to_load_from_cache,  # here: `sweep` needs it for hub ids only
        )

        try:
            cached = try_to_load_from_cache(path, "config.json", revision=revision)
        except ValueError:  # neither a folder nor a hub id
            return True
        config_path = Path(cached) if isinstance(cached, str) else config_path
    try:
        config = json.loads(config_path.read_bytes())
    # What is wrong with it is said when the model is loaded.
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or "quantization_config" in config
