"""Names that other trainers use for the keys of a recipe, and the text to write here instead.

They are options and keys of Transformers, TRL, PEFT, Axolotl, LLaMA-Factory, Unsloth and of
scripts for one experiment. `problems` writes the error messages. A name that is a key of the schema
needs no entry, because it is found there.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from itertools import combinations
from typing import Any, Final, get_args

from pydantic import BaseModel

from runner.errors import RecipeError
from runner.recipe.hf_fields import OWNED_TRAINING_FIELDS

_LORA: Final = "adapter.method=lora"
_FULL: Final = "adapter.method=none quantization.method=none"
_4BIT: Final = "quantization.method=4bit"
_8BIT: Final = "quantization.method=8bit"
_NOT_QUANTIZED: Final = "quantization.method=none"
_FLASH: Final = "model.attn_implementation=flash_attention_2"
# `pattern of an override -> overrides that it needs too, if the recipe does not set them`.
_NEEDED: Final[Mapping[str, str]] = {
    r"quantization\.method=4bit": (
        "quantization.bnb_4bit_quant_type=nf4 quantization.bnb_4bit_use_double_quant=true"
        " quantization.bnb_4bit_compute_dtype=bfloat16"
    ),
    r"adapter\.(?!method=none)|quantization\.method=[48]bit": (
        "adapter.method=lora adapter.r=16 adapter.lora_alpha=32 adapter.lora_dropout=0.05"
        " adapter.target_modules=all-linear"
    ),
    r"model\.attn_implementation=flash": "model.dtype=bfloat16",
    r"early_stopping\.enabled=true": "early_stopping.metric=nll_per_completion_token",
    r"evaluation\.generation\.enabled=true": "evaluation.generation.max_new_tokens=64",
}

# `key` or `keys -> names`: the same value under another name. `{}` is the value if several keys
# belong together.
_SAME: Final[Mapping[str, str]] = {
    "model.path": (
        "base_model model model_id model_name model_name_or_path model_path"
        " pretrained_model_name_or_path"
    ),
    "model.revision": "model_revision revision",
    "model.dtype": "torch_dtype",
    "model.attn_implementation": "attention_implementation attn_impl",
    "adapter.r": "lora_dim lora_r lora_rank rank",
    "adapter.lora_alpha": "alpha",
    "adapter.modules_to_save": "lora_modules_to_save",
    "data.train.path": (
        "data data_file data_path dataset dataset_id dataset_name dataset_path datasets"
        " train_data train_file"
    ),
    "data.train.config_name": "dataset_config dataset_config_name",
    "data.train.split": "dataset_split dataset_train_split",
    "data.validation.path": "eval_dataset eval_file valid_file validation_file",
    "data.test.path": "test_file",
    "data.num_train_samples": "max_samples max_train_samples num_samples num_train_examples",
    "data.num_validation_samples": "max_eval_samples max_val_samples",
    "data.max_length": (
        "block_size context_length cutoff_len max_length max_seq_len max_seq_length"
        " model_max_length seq_len seq_length sequence_len"
    ),
    "training.learning_rate": "lr",
    "training.lr_scheduler_type": "lr_schedule lr_scheduler scheduler scheduler_type",
    "training.optim": "optimizer",
    "training.weight_decay": "wd",
    "training.warmup_steps": "num_warmup_steps warmup warmup_ratio",
    "training.num_train_epochs={} training.max_steps=null": (
        "epochs max_epochs n_epochs num_epochs num_train_epochs"
    ),
    "training.max_steps={} training.num_train_epochs=null": (
        "max_iters max_steps max_train_steps num_steps num_training_steps total_steps"
    ),
    "training.global_batch_size": (
        "batch_size effective_batch_size global_batch total_batch_size train_batch_size"
    ),
    "training.gradient_accumulation_steps={} training.global_batch_size=null": (
        "accumulation_steps grad_accum grad_accum_steps gradient_accumulation"
        " gradient_accumulation_steps"
    ),
    "training.per_device_train_batch_size": (
        "device_batch_size micro_batch_size mini_batch_size per_device_batch_size"
        " per_gpu_train_batch_size train_micro_batch_size_per_gpu"
    ),
    "training.max_grad_norm": "clip_grad_norm grad_clip gradient_clipping max_norm",
    "training.gradient_checkpointing": "use_gradient_checkpointing",
    "training.label_smoothing_factor": "label_smoothing",
    "training.neftune_noise_alpha": "neftune_alpha",
    "training.full_determinism": "deterministic",
    "training.seed": "random_seed random_state seed",
    "evaluation.per_device_eval_batch_size": (
        "eval_batch_size per_gpu_eval_batch_size val_batch_size"
    ),
    "evaluation.eval_strategy=steps evaluation.eval_steps={}": (
        "eval_every eval_interval eval_steps val_check_interval val_steps_freq"
    ),
    "evaluation.generation.enabled=true evaluation.generation.max_new_tokens={}": (
        "generation_max_length max_new_tokens"
    ),
    "early_stopping.enabled=true early_stopping.patience={}": "early_stopping_patience",
    "checkpoints.save_strategy=steps checkpoints.save_steps={}": (
        "save_every save_interval save_steps"
    ),
    "checkpoints.keep_latest": "keep_last_n save_total_limit",
    "checkpoints.keep_best": "keep_best_n",
    "checkpoints.save_optimizer": "save_optim",
    "checkpoints.remote.url": "remote_path",
    "launch.accelerate_config": "config_file",
    "launch.num_processes": "n_gpu n_gpus nproc_per_node num_gpus",
    "launch.num_machines": "nnodes num_nodes",
    "tracking.report_to": "report_to tracker trackers",
    "tracking.project": "project wandb_project",
    "tracking.run_name": "run_name wandb_name wandb_run_name",
    "tracking.tags": "wandb_tags",
    "tracking.watch": "wandb_watch wandb_watch_mode",
    "tracking.log_steps": "log_every log_interval logging_steps wandb_log_freq",
    "tracking.hub_model_id": "hub_repo_id repo_id",
    "tracking.hub_private": "hub_private_repo",
}
_STRATEGY: Final = "evaluation.eval_strategy"
# `names -> value -> keys`; `*` matches any other value.
_CHOICES: Final[Mapping[str, Mapping[str, str]]] = {
    "load_in_4bit use_4bit": {"true": _4BIT, "false": _NOT_QUANTIZED},
    "load_in_8bit use_8bit": {"true": _8BIT, "false": _NOT_QUANTIZED},
    "quantization": {"4bit": _4BIT, "nf4": _4BIT, "8bit": _8BIT, "none": _NOT_QUANTIZED},
    "quantization_bit": {"4": _4BIT, "8": _8BIT},
    "use_lora use_peft": {"true": _LORA, "false": _FULL},
    "qlora use_qlora": {"true": f"{_LORA} {_4BIT}", "false": _FULL},
    "adapter finetuning_type": {
        "lora": _LORA,
        "qlora": f"{_LORA} {_4BIT}",
        "full": _FULL,
        "none": _FULL,
    },
    "lora_target lora_target_modules": {
        "all": "adapter.target_modules=all-linear",
        "*": "adapter.target_modules={}",
    },
    "lora_target_linear": {"true": "adapter.target_modules=all-linear"},
    "flash_attention use_flash_attention use_flash_attention_2": {
        "true": _FLASH,
        "false": "model.attn_implementation=sdpa",
    },
    "flash_attn": {
        "fa2": _FLASH,
        "true": _FLASH,
        "sdpa": "model.attn_implementation=sdpa",
        "false": "model.attn_implementation=sdpa",
        "disabled": "model.attn_implementation=eager",
        "auto": "model.attn_implementation=null",
    },
    "mixed_precision": {
        "bf16": "training.bf16=true training.fp16=false",
        "fp16": "training.fp16=true training.bf16=false",
        "no": "training.bf16=false training.fp16=false",
        "false": "training.bf16=false training.fp16=false",
    },
    "group_by_length": {
        "true": "training.train_sampling_strategy=group_by_length",
        "false": "training.train_sampling_strategy=random",
    },
    "train_on_inputs train_on_prompt": {"true": "loss=full", "false": "loss=completion"},
    (
        "assistant_only_loss completion_only completion_only_loss mask_prompt"
        " train_on_completions_only train_on_responses_only"
    ): {"true": "loss=completion", "false": "loss=full"},
    "mask_history": {"true": "loss=last_completion", "false": "loss=completion"},
    "eval_strategy evaluation_strategy": {
        "steps": f"{_STRATEGY}=steps",
        "epoch": f"{_STRATEGY}=epoch evaluation.eval_steps=null",
        "no": f"{_STRATEGY}='no' evaluation.eval_steps=null",
        "false": f"{_STRATEGY}='no' evaluation.eval_steps=null",
    },
    "save_strategy": {
        "steps": "checkpoints.save_strategy=steps",
        "epoch": "checkpoints.save_strategy=epoch checkpoints.save_steps=null",
        "no": "checkpoints.save_strategy='no' checkpoints.save_steps=null",
        "false": "checkpoints.save_strategy='no' checkpoints.save_steps=null",
    },
    "save_only_model": {
        "true": "checkpoints.save_optimizer=false",
        "false": "checkpoints.save_optimizer=true",
    },
    "checkpoint_metric metric_for_best_model": {
        "eval_loss": "checkpoints.metric=nll_per_completion_token",
        "eval/loss": "checkpoints.metric=nll_per_completion_token",
        "loss": "checkpoints.metric=nll_per_completion_token",
        "*": "checkpoints.metric={}",
    },
    "predict_with_generate": {
        "true": "evaluation.generation.enabled=true",
        "false": "evaluation.generation.enabled=false",
    },
    "use_wandb": {"true": "tracking.report_to=wandb", "false": "tracking.report_to=none"},
    "push_to_hub": {"true": "tracking.hub_push=end", "false": "tracking.hub_push=never"},
    "model_to_wandb": {"true": "tracking.log_model=end", "false": "tracking.log_model=none"},
}
_SHARES: Final = (
    "`data.num_validation_samples` and `data.num_test_samples` are numbers of rows, not fractions"
)
_NOT_PACKED: Final = (
    "rows are never packed; `training.train_sampling_strategy=group_by_length` batches rows of"
    " similar length"
)
_COLUMNS: Final = "`data.task` defines a row and its columns"
_OWN_RUN_DIR: Final = (
    "a run is stored in runs/<grid>/<run name>; `--output-root DIR` stores all runs elsewhere"
)
_RESUMES: Final = (
    "a run resumes from its newest checkpoint automatically; `runner launch RECIPE --resume"
    " latest|best|PATH` chooses another"
)
_NO_FOREIGN_CODE: Final = "code from a model's repository never runs: leave it out"
_NOTHING: Final = "it is not needed here: leave it out"
_ONLY_SFT: Final = "every run is supervised fine-tuning of a causal model: leave it out"
# Names without a key in a recipe.
_SENTENCES: Final[Mapping[str, str]] = {
    **dict.fromkeys(("eval_ratio", "test_size", "val_set_size", "val_size"), _SHARES),
    **dict.fromkeys(
        (
            *("eval_packing", "eval_sample_packing", "pad_to_sequence_len", "packing"),
            *("padding_free", "sample_packing"),
        ),
        _NOT_PACKED,
    ),
    **dict.fromkeys(("dataset_text_field", "text_column", "text_field"), _COLUMNS),
    "template": (
        "`model.chat_template` names a .jinja file; without it the tokenizer's own template is used"
    ),
    **dict.fromkeys(
        ("deepspeed", "deepspeed_config", "ds_config"),
        "`launch.accelerate_config=accelerate_configs/zero3.yaml` (zero2, zero3_offload) is"
        " accelerate's config, which points to DeepSpeed's",
    ),
    **dict.fromkeys(("checkpoint_dir", "output_dir", "save_dir"), _OWN_RUN_DIR),
    **dict.fromkeys(("resume", "resume_from_checkpoint", "resume_option"), _RESUMES),
    "overwrite_output_dir": "`runner launch RECIPE --fresh` moves the run aside and starts again",
    "load_best_model_at_end": "the best checkpoint by `checkpoints.metric` is always exported",
    "greater_is_better": "`checkpoints.mode` must fit the metric: min for a likelihood",
    **dict.fromkeys(("hub_token", "hf_token", "token"), "export HF_TOKEN=... in the shell"),
    "trust_remote_code": _NO_FOREIGN_CODE,
    **dict.fromkeys(
        ("do_eval", "do_predict", "do_train", "overwrite_cache", "plot_loss"), _NOTHING
    ),
    **dict.fromkeys(("lora_task_type", "stage", "task_type"), _ONLY_SFT),
}
# Notes that are shown next to the key.
_NOTES: Final[Mapping[str, str]] = {
    "batch_size": "`training.per_device_train_batch_size` is the batch of one process",
    "seed": "`data.seed` draws the rows",
    "warmup_ratio": "a number below 1 is a fraction of all steps",
}
_LISTS: Final = frozenset(
    {
        *("adapter.modules_to_save", "adapter.target_modules"),
        *("tracking.report_to", "tracking.tags"),
    }
)
# Values of a list's key that stand for the whole list, not for an item.
_WHOLE: Final = frozenset({"all-linear", "none", "null", "true", "false", "wandb", "VALUE"})
_SWITCHED: Final[Mapping[str, str]] = {
    **dict.fromkeys(("0", "false", "no", "off"), "false"),
    **dict.fromkeys(("1", "on", "true", "yes"), "true"),
}


_KEYS: Final[Mapping[str, str]] = {
    name: key for key, names in _SAME.items() for name in names.split()
}
_BY_VALUE: Final[Mapping[str, Mapping[str, str]]] = {
    name: choices for names, choices in _CHOICES.items() for name in names.split()
}


@dataclass(frozen=True)
class Answer:
    """The text to write instead of a name: overrides with perhaps a note, or only a sentence."""

    overrides: tuple[str, ...]
    sentence: str | None = None
    is_refused: bool = False  # the name is known, but not its value

    def describe(self, *, is_override: bool) -> str:
        """The end of a sentence about a name that is not a key, in an override or in a file."""
        if not self.overrides:
            return f": {self.sentence}"
        if is_override:
            said = f"`{' '.join(self.overrides)}`"
        else:
            sections = {one.partition(".")[0] for one in self.overrides}
            words = [
                one
                for one in complete_blindly(self.overrides)
                if one in self.overrides or one.partition(".")[0] in sections
            ]
            said = ", ".join(f"`{one.replace('=', ': ', 1)}`" for one in words)
        return f", here it is {said}" + (f" ({self.sentence})" if self.sentence else "")


def find_answer(name: str, value: str | None, model: type[BaseModel]) -> Answer | None:
    """The keys that mean `name` with a value in a recipe; None if the name is unknown.

    A value of None is not known; `VALUE` is written in its place.
    """
    leaf = name.replace("-", "_").rpartition(".")[2]
    known = list_keys(model)
    text: str | None = None
    if name in known.get(leaf, ()):
        text = name
    elif leaf in _BY_VALUE:
        text = _choose(_BY_VALUE[leaf], value)
        if text is None:
            return Answer((), _list_choices(leaf, value), is_refused=True)
    elif leaf in _KEYS:
        text = _KEYS[leaf]
    elif leaf not in _SENTENCES and len(known.get(leaf, ())) == 1:
        text = known[leaf][0]
    if text is not None:
        given = "VALUE" if value is None else value
        note = None if text == name else _NOTES.get(leaf)
        return Answer(tuple(_fill(one, given, model) for one in text.split(" ")), note)
    if (sentence := _SENTENCES.get(leaf)) is not None:
        return Answer((), sentence)
    if leaf in OWNED_TRAINING_FIELDS:
        return Answer((), f"it is decided by {OWNED_TRAINING_FIELDS[leaf]}")
    return None


def _choose(choices: Mapping[str, str], value: str | None) -> str | None:
    """The keys for a value; None for a value that is not in the table."""
    if value is None:
        return None
    spelled = value.lower()
    switched = _SWITCHED.get(spelled, "none" if spelled == "null" else "*")
    return next((choices[one] for one in (spelled, switched, "*") if one in choices), None)


def _list_choices(leaf: str, value: str | None) -> str:
    names = list(_BY_VALUE[leaf])
    got = "" if value is None else f", got {value!r}"
    return f"of `{leaf}`, only {' and '.join(', '.join(names).rsplit(', ', 1))} are known here{got}"


# Loads a recipe with overrides; raises RecipeError if it does not accept them.
Load = Callable[[Sequence[str]], object]


def complete(overrides: Sequence[str], load: Load) -> tuple[str, ...]:
    """The overrides and those that the recipe needs in addition, without any that it has already.

    Raises:
        RecipeError: the recipe does not accept them.
    """
    groups = [words for pattern, words in _NEEDED.items() if _is_any(pattern, overrides)]
    for count in range(len(groups) + 1):
        for chosen in combinations(groups, count):
            words = _add_unstated(overrides, chosen)
            try:
                load(words)
            except RecipeError as error:
                refusal = error
                continue
            return words
    raise refusal


def complete_blindly(overrides: Sequence[str]) -> tuple[str, ...]:
    """Like `complete`, for an unknown recipe: adds everything that the named kinds may need."""
    kinds = [one for one in overrides if one.startswith("adapter.method=") or "adapter." not in one]
    return _add_unstated(
        overrides, [words for pattern, words in _NEEDED.items() if _is_any(pattern, kinds)]
    )


def _is_any(pattern: str, overrides: Sequence[str]) -> bool:
    return any(re.match(pattern, one) for one in overrides)


def _add_unstated(overrides: Sequence[str], groups: Sequence[str]) -> tuple[str, ...]:
    stated = {one.partition("=")[0] for one in overrides}
    words = [word for group in groups for word in group.split(" ")]
    return (*overrides, *(word for word in words if word.partition("=")[0] not in stated))


def fit_answer(answer: Answer, load: Load) -> Answer:
    """The answer for one recipe: overrides with those that they need, or the reason why the recipe
    refuses them.
    """
    if not answer.overrides:
        return answer
    try:
        return replace(answer, overrides=complete(answer.overrides, load))
    except RecipeError as error:
        problem = error.problems[0]
        keys = [one.partition("=")[0] for one in answer.overrides]
        key = problem.key if problem.key in keys else keys[0]
        return Answer((), f"`{key}` here, but this recipe refuses it: {problem.what}", True)


def is_switch(name: str, model: type[BaseModel]) -> bool:
    """True if `--name` without a value means true."""
    leaf = name.replace("-", "_").rpartition(".")[2]
    if leaf in _BY_VALUE:
        return "true" in _BY_VALUE[leaf]
    if leaf in _SENTENCES:
        return _SENTENCES[leaf] in (_NOT_PACKED, _NO_FOREIGN_CODE, _NOTHING)
    keys = (_KEYS[leaf],) if leaf in _KEYS else list_keys(model).get(leaf, ())
    return len(keys) == 1 and keys[0] in _list_switches(model)


def takes_many(name: str, model: type[BaseModel]) -> bool:
    """True if `--name` accepts several values."""
    answer = find_answer(name, "x", model)
    return answer is not None and any(one.partition("=")[0] in _LISTS for one in answer.overrides)


def suggest_overrides(
    overrides: Sequence[str], wrong: Sequence[str], model: type[BaseModel], load: Load
) -> str | None:
    """The overrides with the `wrong` keys replaced by our own, if the recipe accepts them; None if
    there is no such replacement.

    >>> from runner.recipe.parse import Recipe
    >>> suggest_overrides(["loss=full", "lr=1e-4"], ["lr"], Recipe, print)
    ('loss=full', 'training.learning_rate=1e-4')
    'loss=full training.learning_rate=1e-4'
    """
    words: list[str] = []
    for override in overrides:
        key, _, value = override.partition("=")
        answer = find_answer(key, value, model) if key in wrong else None
        words += answer.overrides if answer and answer.overrides else [override]
    try:
        words = list(complete(words, load))
    except RecipeError:
        return None
    return None if words == list(overrides) else join_words(words)


def join_words(words: Sequence[str]) -> str:
    """Like `shlex.join`, but a text with single quotes is put in double quotes.

    >>> print(join_words(["a b", "key='no'"]))
    'a b' "key='no'"
    """
    return " ".join(
        f'"{one}"' if re.fullmatch(r"[\w.=']+", one) and "'" in one else shlex.quote(one)
        for one in words
    )


def list_names() -> dict[str, tuple[str, ...]]:
    """Every name that has an entry, with its known values (`*`: any). A name that has a sentence
    has no values.
    """
    names = {name: ("*",) for name in _KEYS}
    return {**names, **{name: tuple(_BY_VALUE[name]) for name in _BY_VALUE}} | dict.fromkeys(
        _SENTENCES, ()
    )


def _fill(text: str, value: str, model: type[BaseModel]) -> str:
    """One override; a template without `{}` is left unchanged."""
    key, equals, template = text.partition("=")
    if equals and "{}" not in template:
        return text
    return f"{key}={_spell(key, value, model)}"


def _spell(key: str, value: str, model: type[BaseModel]) -> str:
    """A value as YAML spells it for a key: true, false and null for other trainers' words, quotes
    around a `no` that is a text, brackets around a list.
    """
    lowered = value.lower()
    kinds = [one for name, one in _walk(model, "") if name == key]
    texts = {text for one in kinds for text in _list_texts(one)}
    if lowered in _SWITCHED and any(_is_switch(one) for one in kinds):
        return _SWITCHED[lowered]
    if "no" in texts and _SWITCHED.get(lowered) == "false":
        return "'no'"
    if lowered in ("none", "null"):
        return "none" if "none" in texts or key == "tracking.report_to" else "null"
    if lowered in ("true", "false"):
        return lowered
    is_plain = re.fullmatch(r"[\w., -]+", value) and value not in _WHOLE
    if key in _LISTS and ("," in value or is_plain) and not value.startswith("["):
        return f"[{value}]"
    return value


def _list_texts(annotation: Any) -> Iterator[str]:
    for part in get_args(annotation):
        if isinstance(part, str):
            yield part
        yield from _list_texts(part)


@cache
def list_keys(model: type[BaseModel]) -> Mapping[str, Sequence[str]]:
    """`last part -> dotted keys` of every key of a recipe, except those of `run`."""
    keys: dict[str, list[str]] = {}
    for key, _ in _walk(model, ""):
        if not key.startswith("run."):
            keys.setdefault(key.rpartition(".")[2], []).append(key)
    return {leaf: list(dict.fromkeys(those)) for leaf, those in keys.items()}


@cache
def _list_switches(model: type[BaseModel]) -> frozenset[str]:
    return frozenset(key for key, annotation in _walk(model, "") if _is_switch(annotation))


def _is_switch(annotation: Any) -> bool:
    parts = getattr(annotation, "__args__", ())
    kinds = [kind for kind in parts if kind is not type(None)]
    return annotation is bool or bool(kinds and kinds[0] is bool)


def _walk(model: type[BaseModel], prefix: str) -> Iterator[tuple[str, Any]]:
    """The dotted key and annotation of everything that is not a section."""
    for name, field in model.model_fields.items():
        key = f"{prefix}{field.alias or name}"
        sections = list(_list_sections(field.annotation))
        if not sections:
            yield key, field.annotation
        for section in sections:
            yield from _walk(section, f"{key}.")


def _list_sections(annotation: Any) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for part in getattr(annotation, "__args__", ()):
        yield from _list_sections(part)
