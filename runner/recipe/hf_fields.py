"""The fields of `trl.SFTConfig` and `peft.LoraConfig` as pydantic field definitions, read from a
generated table.

Owns which of them a recipe may state, and what a recipe states instead of those that the runner
sets itself.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, Any, Final, Literal

from pydantic import AfterValidator, Field, ValidationInfo

from runner.strict import FrozenDict, FrozenList, is_stored

_TYPES: Final[dict[str, Any]] = {
    "bool": bool,
    "int": int,
    "float": float,
    "str": str,
    "dict": FrozenDict,
    "list": FrozenList,
    "null": None,
}

# Fields of SFTConfig that a recipe never states in `training`, with the place where the choice is
# made instead.
OWNED_TRAINING_FIELDS: Final[dict[str, str]] = {
    **dict.fromkeys(
        ("output_dir", "resume_from_checkpoint", "do_train", "do_eval", "do_predict"),
        "the run directory",
    ),
    **dict.fromkeys(("max_length", "truncation_mode"), "`data.max_length` and `data.truncation`"),
    **dict.fromkeys(("completion_only_loss", "assistant_only_loss"), "`loss`"),
    **dict.fromkeys(("eval_strategy", "eval_steps", "per_device_eval_batch_size"), "`evaluation`"),
    **dict.fromkeys(
        (
            "eval_on_start",
            "eval_delay",
            "prediction_loss_only",
            "eval_do_concat_batches",
            "eval_use_gather_object",
            "eval_accumulation_steps",
            "include_for_metrics",
            "batch_eval_metrics",
            "bf16_full_eval",
            "fp16_full_eval",
        ),
        "the runner's own evaluation (see `evaluation`)",
    ),
    **dict.fromkeys(
        (
            "save_strategy",
            "save_steps",
            "save_total_limit",
            "save_only_model",
            "load_best_model_at_end",
            "metric_for_best_model",
            "greater_is_better",
            "save_on_each_node",
            "enable_jit_checkpoint",
        ),
        "`checkpoints`",
    ),
    **dict.fromkeys(
        (
            "report_to",
            "run_name",
            "project",
            "disable_tqdm",
            "hub_token",
            "hub_private_repo",
            "hub_model_id",
            "hub_strategy",
            "hub_always_push",
            "hub_revision",
            "trackio_space_id",
            "log_on_each_node",
            "trackio_bucket_id",
            "trackio_static_space_id",
        ),
        "`tracking`",
    ),
    "push_to_hub": "`tracking.hub_push`",
    **dict.fromkeys(
        ("use_cpu", "local_rank", "ddp_backend", "deepspeed", "fsdp", "fsdp_config"), "`launch`"
    ),
    **dict.fromkeys(("accelerator_config", "parallelism_config"), "`launch.accelerate_config`"),
    "ddp_timeout": "the runner, whose main process may take long over a checkpoint",
    **dict.fromkeys(("data_seed",), "`training.seed`, which also orders the batches"),
    **dict.fromkeys(("model_init_kwargs", "trust_remote_code", "use_cache"), "`model`"),
    **dict.fromkeys(
        ("chat_template_path", "eos_token", "pad_token"),
        "`model.chat_template` and `model.pad_token`",
    ),
    **dict.fromkeys(
        (
            "dataset_text_field",
            "dataset_kwargs",
            "dataset_num_proc",
            "shuffle_dataset",
            "remove_unused_columns",
            "label_names",
            "length_column_name",
            "pad_to_multiple_of",
        ),
        "the runner's own data set (see `data`)",
    ),
    **dict.fromkeys(
        ("packing", "packing_strategy", "padding_free", "eval_packing"),
        "the runner, which packs no rows: each is a sequence of its own",
    ),
    **dict.fromkeys(
        ("ignore_data_skip", "restore_callback_states_from_checkpoint", "logging_nan_inf_filter"),
        "the runner, which resumes exactly and stops at the first non-finite loss",
    ),
    **dict.fromkeys(
        ("logging_strategy", "logging_steps", "logging_first_step"),
        "the runner, which records every step",
    ),
    **dict.fromkeys(
        ("activation_checkpointing", "activation_checkpointing_kwargs"),
        "`training.gradient_checkpointing` and its kwargs",
    ),
    "auto_find_batch_size": (
        "`training.per_device_train_batch_size`: a batch that shrinks by itself changes the run"
    ),
    "average_tokens_across_devices": (
        "the runner: the loss is always averaged over the tokens of the global batch"
    ),
    "include_num_input_tokens_seen": "the runner, which counts tokens itself",
}

# Fields of LoraConfig that belong to PEFT's own bookkeeping or to inference.
OWNED_LORA_FIELDS: Final[dict[str, str]] = dict.fromkeys(
    (
        "task_type",
        "peft_type",
        "auto_mapping",
        "peft_version",
        "base_model_name_or_path",
        "revision",
        "inference_mode",
        "megatron_config",
        "megatron_core",
        "runtime_config",
    ),
    "the runner",
)

# Choices that the libraries know by no type: they look at the text when training starts.
_TEXT_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "loss_type": ("nll", "dft", "chunked_nll"),
    **dict.fromkeys(
        ("log_level", "log_level_replica"),
        ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    ),
}
_NEEDS_EVALUATION: Final = (
    "follows the scores of Transformers' own evaluation, in place of which the runner has its own"
)
_STATE_IS_LOST: Final = (
    "updates weights during the backward pass: its state would be in no checkpoint, so that an"
    " interrupted run could not be continued, and gradients are not clipped"
)
_NEEDS_SWITCHING: Final = (
    "scores and saves other weights than it trains, which the runner's evaluation does not switch"
    " to"
)
# Values that the libraries accept and that cannot work under our trainer, with the reason.
REFUSED_VALUES: Final[dict[str, dict[str, str]]] = {
    "lr_scheduler_type": dict.fromkeys(("reduce_lr_on_plateau", "greedy"), _NEEDS_EVALUATION),
    "optim": {
        **dict.fromkeys(
            (
                "galore_adamw_layerwise",
                "galore_adamw_8bit_layerwise",
                "galore_adafactor_layerwise",
                "apollo_adamw_layerwise",
                "lomo",
                "adalomo",
            ),
            _STATE_IS_LOST,
        ),
        **dict.fromkeys(
            ("schedule_free_radam", "schedule_free_adamw", "schedule_free_sgd"), _NEEDS_SWITCHING
        ),
    },
}
_OPTIM_ARGS: Final = re.compile(r"\s*[A-Za-z_]\w*\s*=[^,=]+(,\s*[A-Za-z_]\w*\s*=[^,=]+)*")


def load_table(config: Literal["SFTConfig", "LoraConfig"]) -> dict[str, dict[str, list[str]]]:
    """`name -> {types, choices}` as generated from the pinned libraries."""
    table: dict[str, dict[str, dict[str, list[str]]]] = json.loads(
        Path(__file__).with_suffix(".json").read_text()
    )
    return table[config]


def build_field_definitions(
    config: Literal["SFTConfig", "LoraConfig"], owned: Mapping[str, str], *, exclude: frozenset[str]
) -> dict[str, Any]:
    """Definitions for `pydantic.create_model`: optional fields of the right type, without the
    `owned` ones.

    `exclude` names the fields that the model declares by itself.
    """
    definitions: dict[str, Any] = {}
    for name, field in load_table(config).items():
        if name in owned or name in exclude:
            continue
        choices = field["choices"] or _TEXT_CHOICES.get(name)
        kinds = [
            Literal[tuple(choices)] if kind == "str" and choices else _TYPES[kind]
            for kind in field["types"]
        ]
        accepted = reduce(or_, kinds) if len(kinds) > 1 else kinds[0]
        definitions[name] = (
            Annotated[accepted, AfterValidator(partial(_refuse_value, name))],
            Field(default=None),
        )
    return definitions


def _refuse_value(name: str, value: Any, info: ValidationInfo) -> Any:
    """The value, where it can work under our trainer. Raises: ValueError."""
    if is_stored(info):
        return value
    reasons = REFUSED_VALUES.get(name, {})
    if isinstance(value, str) and value in reasons:
        raise ValueError(f"`{value}` cannot be used here: it {reasons[value]}")
    if name == "optim_args" and value is not None and not _OPTIM_ARGS.fullmatch(value):
        raise ValueError(f"got the text {value!r}, expected `name=value, name=value`")
    return value
