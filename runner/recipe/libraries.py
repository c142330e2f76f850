"""Finds the libraries that a recipe does not use; its training process then never imports them."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, Final

from runner.recipe.identity import load_launch_settings
from runner.recipe.parse import Recipe
from runner.recipe.schema import Lora

# Every other optimizer of Transformers is assumed to need bitsandbytes.
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
    """The libraries of these five that the recipe does not use. `uses_deepspeed` comes from the
    launcher, because a command typed by hand may name another config than the recipe.

    TRL imports Weights & Biases, and PEFT imports bitsandbytes (which imports torch's compiler),
    whenever they are installed. Together they take a quarter of the processor time of a run's
    imports (`python -X importtime`). accelerate imports DeepSpeed to check if a model is one of its
    engines (0.14 s in every run). Transformers imports SciPy for the losses of object detection
    (0.2 to 0.3 s). The user's functions run in separate processes, from which nothing is hidden.
    """
    deepspeed = uses_deepspeed or _may_use_deepspeed(recipe)
    bitsandbytes = uses_bitsandbytes(recipe)
    # Any tracker may log figures or statistics, and import libraries for that.
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
    """Make libraries look as if they were not installed, in this process until it ends.

    Call it before the first import of Transformers, TRL or PEFT: modules that are already imported
    stay, and Transformers looks for SciPy only once.
    """
    for name in names:
        # None makes an import of this name fail.
        sys.modules.setdefault(name, None)  # type: ignore[arg-type]


def uses_bitsandbytes(recipe: Recipe) -> bool:
    """True if a run imports bitsandbytes, for its optimizer or for quantized weights."""
    optimizer = recipe.training.hugging_face_arguments().get("optim")
    return (
        recipe.quantization.method != "none"
        or optimizer not in _TORCH_OPTIMIZERS
        or _may_be_quantized(recipe.model.path, recipe.model.revision)
    )


def _uses_loftq(recipe: Recipe) -> bool:
    """True if LoftQ, which needs SciPy, initializes the adapter's weights."""
    adapter = recipe.adapter
    return (
        isinstance(adapter, Lora) and adapter.lora_arguments().get("init_lora_weights") == "loftq"
    )


def _may_use_deepspeed(recipe: Recipe) -> bool:
    """True if the launch uses DeepSpeed, or if its config cannot be read."""
    settings = load_launch_settings(Path(recipe.launch.accelerate_config))
    return not isinstance(settings, dict) or names_deepspeed(settings)


def names_deepspeed(settings: Mapping[str, Any]) -> bool:
    """True if an accelerate config selects DeepSpeed."""
    is_named = str(settings.get("distributed_type")).upper() == "DEEPSPEED"
    return is_named or "deepspeed_config" in settings


def _may_be_quantized(path: str, revision: str | None) -> bool:
    """True if the base model's own configuration states quantized weights, or if it is not on this
    machine yet or cannot be read.
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
    # Loading the model reports the error.
    except (OSError, ValueError, RecursionError):
        return True
    return not isinstance(config, dict) or "quantization_config" in config
