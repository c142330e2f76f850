"""The fields of `trl.SFTConfig` and `peft.LoraConfig` as pydantic field definitions, read from a
generated table.

Owns the list of fields that the runner sets itself, each with the key that a recipe states
instead.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from functools import cache, partial, reduce
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

# Fields of SFTConfig that a recipe cannot state in `training`, and the place of the choice.
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
        "the runner, which packs no rows: each row is its own sequence",
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
        "`training.per_device_train_batch_size`: a batch that shrinks automatically changes the run"
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

# Choices that are in no annotation: the libraries check the text when training starts.
_TEXT_CHOICES: Final[dict[str, tuple[str, ...]]] = {
    "loss_type": ("nll", "dft", "chunked_nll"),
    **dict.fromkeys(
        ("log_level", "log_level_replica"),
        ("detail", "debug", "info", "warning", "error", "critical", "passive"),
    ),
}
_NEEDS_EVALUATION: Final = (
    "follows the scores of Transformers' own evaluation, which the runner replaces"
)
_STATE_IS_LOST: Final = (
    "updates weights during the backward pass: no checkpoint would hold its state, so an"
    " interrupted run could not resume, and gradients are not clipped"
)
_NEEDS_SWITCHING: Final = (
    "scores and saves other weights than it trains, and the runner's evaluation does not switch"
    " to them"
)
# Values that the libraries accept and that cannot work in training, with the reason.
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


# The numbers that lists and mappings of a field hold; annotations do not say it in the tables.
_WHOLE: Final = ((int,), "whole numbers")
_NUMBERS_WITHIN: Final[dict[str, tuple[tuple[type, ...], str]]] = {
    "rank_pattern": _WHOLE,
    "alpha_pattern": ((int, float), "numbers"),
    "layers_to_transform": _WHOLE,
    "trainable_token_indices": _WHOLE,
    "alora_invocation_tokens": _WHOLE,
    "layer_replication": _WHOLE,
}

# Values for `runner recipe KEY`, if the default is not a good example.
_EXAMPLES: Final[dict[str, Any]] = {
    "learning_rate": 2e-4,
    "lr_scheduler_type": "cosine",
    "lr_scheduler_kwargs": {"num_cycles": 2},
    "warmup_steps": 0.03,
    "optim": "paged_adamw_8bit",
    "optim_args": "rank=64, scale=0.1",
    "optim_target_modules": ["attn", "mlp"],
    "weight_decay": 0.1,
    "max_grad_norm": 0.5,
    "label_smoothing_factor": 0.1,
    "tf32": True,
    "gradient_checkpointing_kwargs": {"use_reentrant": False},
    "torch_compile_backend": "inductor",
    "torch_compile_mode": "reduce-overhead",
    "liger_kernel_config": {"rope": True},
    "neftune_noise_alpha": 5.0,
    "torch_empty_cache_steps": 100,
    "dataloader_num_workers": 2,
    "dataloader_prefetch_factor": 4,
    "dataloader_multiprocessing_context": "spawn",
    "ddp_find_unused_parameters": False,
    "ddp_bucket_cap_mb": 50,
    "ddp_broadcast_buffers": False,
    "ddp_static_graph": True,
    "debug": "underflow_overflow",
    "router_aux_loss_coef": 0.001,
    "exclude_modules": ["lm_head"],
    "use_rslora": True,
    "modules_to_save": ["embed_tokens", "lm_head"],
    "init_lora_weights": "pissa",
    "layers_to_transform": [0, 1, 2],
    "layers_pattern": "layers",
    "rank_pattern": {"q_proj": 32},
    "alpha_pattern": {"q_proj": 64},
    "trainable_token_indices": [0, 1],
    "loftq_config": {"loftq_bits": 4},
    "use_dora": True,
    "velora_config": {"num_groups": 32},
    "alora_invocation_tokens": [1, 2],
    "layer_replication": [[0, 4], [2, 5]],
    "target_parameters": ["feed_forward.experts.gate_up_proj"],
}
# Additions to the libraries' help: the training process changes these defaults.
_NOTES: Final[dict[str, str]] = {
    "dataloader_pin_memory": "The runner's default is false if the run trains on CPU.",
}

Config = Literal["SFTConfig", "LoraConfig"]


@cache
def _load_tables() -> dict[str, dict[str, dict[str, Any]]]:
    tables: dict[str, dict[str, dict[str, Any]]] = json.loads(
        Path(__file__).with_suffix(".json").read_text()
    )
    return tables


def load_table(config: Config) -> dict[str, dict[str, Any]]:
    """`name -> {types, choices, default, help}` as generated from the pinned libraries."""
    return _load_tables()[config]


def build_field_definitions(
    config: Config, owned: Mapping[str, str], *, exclude: frozenset[str]
) -> dict[str, Any]:
    """Definitions for `pydantic.create_model`: optional fields of the right type with the
    library's help, without the `owned` ones.

    `exclude` names the fields that the model declares itself.
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
            Field(
                default=None,  # a field that is not stated is not passed on
                description=" ".join(filter(None, (field["help"], _NOTES.get(name)))),
                examples=[_EXAMPLES[name]] if name in _EXAMPLES else None,
            ),
        )
    return definitions


def _refuse_value(name: str, value: Any, info: ValidationInfo) -> Any:
    """The value. Raises: ValueError, if it cannot work in training."""
    if is_stored(info):
        return value
    reasons = REFUSED_VALUES.get(name, {})
    if isinstance(value, str) and value in reasons:
        raise ValueError(f"`{value}` cannot be used here: it {reasons[value]}")
    if name == "optim_args" and value is not None and not _OPTIM_ARGS.fullmatch(value):
        raise ValueError(f"got the text {value!r}, expected `name=value, name=value`")
    if name in _NUMBERS_WITHIN:
        kinds, expected = _NUMBERS_WITHIN[name]
        for number in _list_leaves(value):
            if type(number) not in kinds:
                raise ValueError(f"got {json.dumps(number)} in it, expected {expected}")
    return value


def _list_leaves(value: Any) -> Iterator[Any]:
    """All values within mappings and lists."""
    if isinstance(value, Mapping):
        value = tuple(value.values())
    if isinstance(value, tuple | list):
        for item in value:
            yield from _list_leaves(item)
    elif value is not None:
        yield value
