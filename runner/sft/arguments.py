"""The arguments of `trl.SFTConfig` that follow from a recipe; anything that the runner does itself
is switched off.

The trainer builds its configuration from them, and the preflight builds the same one before a run.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from trl import SFTConfig

from runner.recipe.parse import Recipe, derive_accumulation, derive_eval_batch, derive_micro_batch

# The main process hashes, archives and fetches checkpoints while the others wait, which can exceed
# Transformers' default of 1800.
_COLLECTIVE_TIMEOUT_SECONDS: Final = 3 * 3600


def list_arguments(
    recipe: Recipe, output_dir: Path, *, num_processes: int, divisor: int = 1, uses_cpu: bool
) -> dict[str, Any]:
    """Every argument by name; `divisor` is `Attempt.micro_batch_divisor`."""
    training = recipe.training
    return {
        "dataloader_pin_memory": not uses_cpu,  # a recipe may override it
        **training.hugging_face_arguments(),
        "output_dir": str(output_dir),
        "seed": training.seed,
        "per_device_train_batch_size": derive_micro_batch(recipe, divisor),
        "gradient_accumulation_steps": derive_accumulation(recipe, num_processes, divisor),
        "num_train_epochs": training.num_train_epochs or 1.0,
        "max_steps": training.max_steps or -1,
        "bf16": training.bf16,
        "fp16": training.fp16,
        "gradient_checkpointing": training.gradient_checkpointing,
        "per_device_eval_batch_size": derive_eval_batch(recipe, divisor),
        "metric_for_best_model": recipe.checkpoints.metric,
        "greater_is_better": recipe.checkpoints.mode == "max",
        "use_cpu": uses_cpu,
        "eval_strategy": "no",
        "save_strategy": "no",
        "logging_strategy": "steps",
        "logging_steps": 1,
        "logging_nan_inf_filter": False,
        "disable_tqdm": True,
        "ddp_timeout": _COLLECTIVE_TIMEOUT_SECONDS,
        "report_to": "none",  # `tracking` starts the trackers
        "run_name": recipe.tracking.run_name or recipe.run.name,
        "project": recipe.tracking.project or recipe.run.grid,
        "max_length": None,
        "dataset_kwargs": {"skip_prepare_dataset": True},
    }


def build_config(arguments: Mapping[str, Any]) -> SFTConfig:
    """The configuration of a trainer, from `list_arguments`."""
    config = SFTConfig(**arguments)
    config.report_to = []  # Kubeflow's tracker adds itself if its environment is set
    return config
