"""The sections of a recipe: frozen types, each with what it accepts and the choices that exclude
each other within it.

The section `data` is in `data_section`. Owns no combination across sections; those and the parsing
are in `parse`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from datetime import date
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self, get_args

from pydantic import (
    ConfigDict,
    Field,
    SerializerFunctionWrapHandler,
    StringConstraints,
    create_model,
    field_validator,
    model_serializer,
    model_validator,
)

from runner.functions import Metric
from runner.recipe.hf_fields import (
    OWNED_LORA_FIELDS,
    OWNED_TRAINING_FIELDS,
    build_field_definitions,
)
from runner.secrets import names_secret
from runner.strict import FrozenDict, Section, Text, thaw

SCHEMA_VERSION: Final = 1
NAME_PATTERN: Final = r"^[A-Za-z0-9][A-Za-z0-9._-]{0,199}$"

# Of every task, smaller is better.
NLL_METRICS: Final = ("nll_per_completion_token", "nll_per_token")
# What every run is measured by on the test split.
LIKELIHOOD_METRICS: Final = (*NLL_METRICS, "bits_per_byte")
Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
# Which labels are trained; scores never depend on it. `full`: every token; `completion`: all
# completions; `last_completion`: the last one of each row.
Loss = Literal["full", "completion", "last_completion"]
# Which assistant turns of a conversation are completions, for training and scoring alike: all of
# them, the last one, or each in a row of its own.
Turns = Literal["all", "last", "split"]
# Arguments that `apply_chat_template` has for other things.
_TEMPLATE_ARGUMENTS: Final = frozenset(
    {
        "add_generation_prompt",
        "chat_template",
        "continue_final_message",
        "conversation",
        "documents",
        "max_length",
        "messages",
        "padding",
        "return_assistant_tokens_mask",
        "return_dict",
        "return_tensors",
        "sanitize_control_tokens",
        "strftime_now",
        "tokenize",
        "tokenizer_kwargs",
        "tools",
        "truncation",
    }
)
Scalar = str | bool | int | float | None
# What may name a metric: one of `NLL_METRICS`; where texts are generated while training, one of the
# task's `METRICS` or of `evaluation.metrics`.
MetricName = Text


class PassThrough(Section):
    """A section with fields that go to a Hugging Face config unchanged, and only when the recipe
    states them.
    """

    @model_serializer(mode="wrap")
    def _leave_out_what_is_not_stated(
        self, handler: SerializerFunctionWrapHandler
    ) -> dict[str, Any]:
        stated = type(self)._declared_fields() | self.model_fields_set
        return {name: value for name, value in handler(self).items() if name in stated}

    @classmethod
    @cache
    def _declared_fields(cls) -> frozenset[str]:
        declared: set[str] = set()
        for base in cls.__mro__:
            if not base.__name__.startswith("Generated"):
                declared |= set(getattr(base, "__annotations__", {}))
        return frozenset(declared)

    def hugging_face_arguments(self) -> dict[str, Any]:
        """What the recipe states of the generated fields, as plain JSON values."""
        dumped = self.model_dump(mode="json")
        return {
            name: value
            for name, value in dumped.items()
            if name not in type(self)._declared_fields()
        }


class DeclaredContrast(Section):
    """Two values of an axis that a grid is there to compare, by one metric, as stated before its
    runs; a difference within `margin` is none.
    """

    # `from` is no name in Python, and it is the name in files.
    model_config = ConfigDict(serialize_by_alias=True)

    axis: Text
    from_: Scalar = Field(alias="from")
    to: Scalar
    metric: Text
    margin: Annotated[float, Field(gt=0)] | None = None

    @model_validator(mode="after")
    def _compares_two_values(self) -> Self:
        if json.dumps(self.from_) == json.dumps(self.to):
            raise ValueError(f"`from` and `to` are both {json.dumps(self.to)}")
        return self


class RunSection(Section):
    """Which cell of which grid this is, and what the grid is there to compare; outside the
    digest.
    """

    grid: Name
    name: Name
    axes: FrozenDict = Field(default_factory=dict, validate_default=True)
    # The same in all recipes of a grid; the first attempt of a run records what stands here then.
    declared: tuple[DeclaredContrast, ...] = ()
    overrides: tuple[str, ...] = ()  # what the command line changed, where it did
    schema_version: Literal[1] = SCHEMA_VERSION

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return f"{self.grid}/{self.name}"


class ModelSection(Section):
    """The base model, as `from_pretrained` takes it, and how its conversations are written."""

    path: Text
    revision: str | None = None
    dtype: Dtype
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None
    ) = None
    chat_template: Text | None = None  # path of a .jinja file; None: the tokenizer's own
    # What the template takes besides the messages: `enable_thinking`, `date_string` and the like.
    chat_template_kwargs: FrozenDict = Field(default_factory=dict, validate_default=True)
    # The day on which the template's `strftime_now` stands still; None: no row may show the date.
    template_date: Text | None = None
    # A token to append to the last answer under a template that prints none there.
    end_of_turn: Text | None = None
    # auto: the tokenizer's own unless it is eos, else a reserved token, else an added one;
    # reserved: as auto, but never an added one; add: a new token; anything else: that token, added
    # where the vocabulary lacks it.
    pad_token: Text = "auto"

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_arguments(cls, value: Any) -> Any:
        taken = sorted(set(value) & _TEMPLATE_ARGUMENTS)
        if taken:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in taken)}: rows and the trainer say these, no"
                " template argument does"
            )
        try:
            json.dumps(thaw(value), allow_nan=False)
        except (TypeError, ValueError):
            raise ValueError(
                "expected plain values: texts, numbers, true, false, null, lists and mappings;"
                " quote what YAML reads as a date"
            ) from None
        return value

    @field_validator("template_date")
    @classmethod
    def _is_a_day(cls, text: str | None) -> str | None:
        if text is not None:
            try:
                is_day = date.fromisoformat(text).isoformat() == text
            except ValueError:
                is_day = False
            if not is_day:
                raise ValueError(f"expected a day such as '2026-01-31', got {text!r}")
        return text


class AdapterOff(Section):
    """Full fine-tuning."""

    method: Literal["none"]


class LoraBase(PassThrough):
    """The LoRA fields that a recipe must state."""

    method: Literal["lora"]
    r: Positive
    lora_alpha: Positive
    lora_dropout: Annotated[float, Field(ge=0, lt=1)]
    target_modules: Text | tuple[Text, ...]

    def lora_arguments(self) -> dict[str, Any]:
        """Arguments of `peft.LoraConfig`."""
        dumped = self.model_dump(mode="json")
        del dumped["method"]
        return dumped


class QuantizationOff(Section):
    """Weights as `model.dtype` says."""

    method: Literal["none"]


class FourBit(Section):
    """bitsandbytes 4-bit weights; field names of `transformers.BitsAndBytesConfig`."""

    method: Literal["4bit"]
    bnb_4bit_quant_type: Literal["nf4", "fp4"]
    bnb_4bit_use_double_quant: bool
    bnb_4bit_compute_dtype: Dtype


class EightBit(Section):
    """bitsandbytes LLM.int8() weights."""

    method: Literal["8bit"]
    llm_int8_threshold: Annotated[float, Field(ge=0)] = 6.0


class TrainingBase(PassThrough):
    """The training fields that the runner computes with; every other is a field of
    `trl.SFTConfig`.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)]  # as NumPy takes it
    global_batch_size: Positive | None = None  # sequences per optimizer step, over all processes
    gradient_accumulation_steps: Positive | None = None  # instead of `global_batch_size`
    per_device_train_batch_size: Positive
    num_train_epochs: Annotated[float, Field(gt=0)] | None = None
    max_steps: Positive | None = None  # instead of `num_train_epochs`
    bf16: bool = False
    fp16: bool = False
    gradient_checkpointing: bool
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = "group_by_length"

    @model_validator(mode="after")
    def _states_each_choice_once(self) -> Self:
        if (self.global_batch_size is None) == (self.gradient_accumulation_steps is None):
            raise ValueError(
                "state exactly one of `global_batch_size` and `gradient_accumulation_steps`"
            )
        if (self.num_train_epochs is None) == (self.max_steps is None):
            raise ValueError("state exactly one of `num_train_epochs` and `max_steps`")
        if self.bf16 and self.fp16:
            raise ValueError("`bf16` and `fp16` cannot both be true")
        return self


class GenerationOff(Section):
    """Rows are scored by their likelihood only."""

    enabled: Literal[False]


class GenerationOn(Section):
    """The base and the tuned model also answer the test prompts, greedily; the task's metrics judge
    the answers.
    """

    enabled: Literal[True]
    max_new_tokens: Positive
    num_samples: Positive | None = None  # the first rows of the split; None: all
    # Prompts that a process answers at a time; None: `per_device_eval_batch_size`.
    batch_size: Positive | None = None
    during_training: bool = False  # also on the validation split, at every evaluation


# What evaluations and reports say by these names.
_TAKEN_METRIC_NAMES: Final = frozenset(
    {
        *NLL_METRICS,
        *("bits_per_byte", "completion_nll_sum", "epoch", "generation", "grad_norm"),
        *("learning_rate", "loss", "nll_sum", "num_bytes", "num_completion_tokens"),
        *("num_rows", "num_tokens", "num_unfinished", "num_unreadable", "runtime", "split", "step"),
        "template_nll_sum",
    }
)


class EvaluationSection(Section):
    """When the validation rows are scored; step 0 and the last step always are."""

    eval_strategy: Literal["no", "steps", "epoch"]
    eval_steps: Positive | None = None
    per_device_eval_batch_size: Positive
    generation: Annotated[GenerationOff | GenerationOn, Field(discriminator="enabled")] = (
        GenerationOff(enabled=False)
    )
    metrics: tuple[Metric, ...] = ()  # of the generated answers, beside the task's own

    @model_validator(mode="after")
    def _names_each_metric_once(self) -> Self:
        names = [metric.name for metric in self.metrics]
        for name in names:
            if name in _TAKEN_METRIC_NAMES:
                raise ValueError(f"`{name}` is measured already: give your metric another name")
            if names.count(name) > 1:
                raise ValueError(f"two metrics are called `{name}`")
        return self

    @model_validator(mode="after")
    def _has_steps_exactly_for_steps(self) -> Self:
        if (self.eval_strategy == "steps") != (self.eval_steps is not None):
            raise ValueError("`eval_steps` goes with `eval_strategy: steps`, and only with it")
        return self


class EarlyStoppingOff(Section):
    """Trains to the end."""

    enabled: Literal[False]


class EarlyStoppingOn(Section):
    """Stops after `patience` evaluations in a row that do not better the best by more than
    `threshold`.
    """

    enabled: Literal[True]
    metric: MetricName
    mode: Literal["min", "max"] = "min"
    patience: Positive
    threshold: Annotated[float, Field(ge=0)] = 0.0


class RemoteStorage(Section):
    """Where committed checkpoints are copied in the background; credentials come from the
    environment.
    """

    # Any fsspec URL: file://, memory://, s3://, gs://, ...; a run gets the folder <grid>/<run name>
    # below it.
    url: Text
    # Of the fsspec file system.
    options: FrozenDict = Field(default_factory=dict, validate_default=True)
    num_retries: NotNegative = 5
    load: bool = False  # resume from the newest one there when the run directory has none

    @model_validator(mode="after")
    def _holds_no_secret(self) -> Self:
        for name in _names_at_any_depth(self.options):
            if names_secret(name):
                raise ValueError(
                    f"`options.{name}` would put a secret into the record:"
                    " set it in the environment"
                )
        return self


def _names_at_any_depth(options: Mapping[str, Any]) -> list[str]:
    names: list[str] = []
    waiting: list[Any] = [options]
    while waiting:
        value = waiting.pop()
        if isinstance(value, Mapping):
            names += value
            waiting += value.values()
        elif isinstance(value, list | tuple):
            waiting += value
    return names


class CheckpointsSection(Section):
    """When checkpoints are written and how many stay; the best by `metric` is what is exported."""

    save_strategy: Literal["no", "steps", "epoch"]
    save_steps: Positive | None = None
    save_epochs: Positive | None = None  # with `epoch`: every so many epochs; None: every epoch
    keep_latest: Positive = 1
    keep_best: Positive = 1  # besides the newest
    metric: MetricName = "nll_per_completion_token"
    mode: Literal["min", "max"] = "min"
    save_optimizer: bool = True  # False: optimizer state stays in the newest checkpoint only
    archive: Literal["none", "zip"] = "none"  # besides the folder
    remote: RemoteStorage | None = None

    @model_validator(mode="after")
    def _has_intervals_exactly_for_their_strategy(self) -> Self:
        if (self.save_strategy == "steps") != (self.save_steps is not None):
            raise ValueError("`save_steps` goes with `save_strategy: steps`, and only with it")
        if self.save_epochs is not None and self.save_strategy != "epoch":
            raise ValueError("`save_epochs` goes with `save_strategy: epoch`, and only with it")
        return self


class RetriesSection(Section):
    """How many retries in a row, with no new checkpoint between, a failed attempt gets by itself,
    by failure kind.

    What is not named here: preempted runs are taken up again without a limit, everything else fails
    at once.
    """

    transient: NotNegative = 3  # ports, lost peers, file systems, storage that cannot be reached
    # The trainer vanished without a word: perhaps killed by the system for its memory.
    lost: NotNegative = 1
    stalled: NotNegative = 1  # ended by `launch.stall_minutes`
    # Each halves the micro-batch, keeps the global batch and starts at step 0.
    out_of_memory: NotNegative = 0
    # Before the first retry; doubles, up to ten minutes.
    backoff_seconds: Annotated[float, Field(ge=0)] = 10.0


class LaunchSection(Section):
    """How processes start; outside the digest, but for what it does to the global batch."""

    accelerate_config: Text
    num_processes: Positive = 1  # over all machines
    num_machines: Positive = 1
    # None: the cores shared among the processes.
    num_cpu_threads_per_process: Positive | None = None
    # Without a sign of life (a micro-batch, a batch that is scored or answered, another phase)
    # before whoever waits for an attempt ends it; None: never.
    stall_minutes: Annotated[float, Field(gt=0)] | None = 30.0
    retries: RetriesSection = RetriesSection()
    # Of a library, since the checkpoint that is continued.
    on_version_change: Literal["warn", "refuse"] = "warn"

    @model_validator(mode="after")
    def _divides_among_machines(self) -> Self:
        if self.num_processes % self.num_machines:
            raise ValueError(
                f"`num_processes: {self.num_processes}` counts all machines and must divide by "
                f"`num_machines: {self.num_machines}`"
            )
        return self


# The trackers that Transformers knows; a test compares them with the installed library.
Tracker = Literal[
    "azure_ml",
    "clearml",
    "codecarbon",
    "comet_ml",
    "dagshub",
    "dvclive",
    "flyte",
    "kubeflow",
    "mlflow",
    "neptune",
    "swanlab",
    "tensorboard",
    "trackio",
    "wandb",
]


# As the hub takes them; a name without an owner is whatever the token's owner has.
HUB_REPOSITORY: Final = re.compile(
    r"(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    r"/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
)


class TrackingSection(Section):
    """Experiment trackers by their Transformers names, and where the tuned model may be pushed."""

    report_to: tuple[Tracker, ...] = ()
    project: str | None = None  # None: the grid's name
    run_name: str | None = None  # None: the run's own name
    tags: tuple[Text, ...] = ()
    # What Weights & Biases records of the weights.
    watch: Literal["none", "gradients", "parameters", "all"] = "none"
    log_steps: Positive = 1  # trackers get every so many steps; metrics.jsonl has all
    # What Weights & Biases gets of the model.
    log_model: Literal["none", "end", "checkpoint"] = "none"
    hub_model_id: str | None = None  # where `runner export --push` and `hub_push` send the model
    hub_private: bool = True
    # When the launch side sends the model by itself.
    hub_push: Literal["never", "end"] = "never"

    @property
    def push_to(self) -> str | None:
        """The repository that the launch side sends the model to, None for none."""
        return self.hub_model_id if self.hub_push == "end" else None

    def copy_push(self, other: TrackingSection) -> TrackingSection:
        """Another section with where and when this one pushes."""
        names = ("hub_model_id", "hub_private", "hub_push")
        return other.model_copy(update={name: getattr(self, name) for name in names})

    @model_validator(mode="after")
    def _names_a_repository(self) -> Self:
        if self.hub_push == "never":
            return self
        if self.hub_model_id is None:
            raise ValueError(
                "`hub_push: end` needs a repository of the run's own beside it, such as"
                " `hub_model_id: OWNER/NAME`; in the template of a grid"
                ' `hub_model_id: {{ ("OWNER/" ~ name) | yaml }}`'
            )
        if not HUB_REPOSITORY.fullmatch(self.hub_model_id):
            raise ValueError(
                f"`hub_model_id: {self.hub_model_id}` is no repository on the hub: expected"
                " OWNER/NAME, each of at most 96 letters, digits and . _ - that begins and ends"
                " with a letter, a digit or _, without `--`, `..` and `.git` at the end"
            )
        return self

    @field_validator("report_to", mode="before")
    @classmethod
    def _may_be_one_word(cls, value: Any) -> Any:
        """As the command lines of others take it: `wandb` is a list of one, `none` an empty one."""
        if not isinstance(value, str):
            return tuple(value) if isinstance(value, list) else value
        if value in ("wandb", "none"):
            return () if value == "none" else (value,)
        if value == "all":
            raise ValueError(
                "got the text 'all', which is what happens to be installed: name the trackers,"
                " such as [wandb, tensorboard]"
            )
        shown = f"[{value}]" if value in get_args(Tracker) else "[wandb]"
        raise ValueError(f"got the text {value!r}, expected a list such as {shown}")


if TYPE_CHECKING:  # the generated fields are typed at run time only
    Lora = LoraBase
    Training = TrainingBase
else:
    Lora = create_model(
        "GeneratedLora",
        __base__=LoraBase,
        **build_field_definitions(
            "LoraConfig", OWNED_LORA_FIELDS, exclude=frozenset(LoraBase.model_fields)
        ),
    )
    Training = create_model(
        "GeneratedTraining",
        __base__=TrainingBase,
        **build_field_definitions(
            "SFTConfig", OWNED_TRAINING_FIELDS, exclude=frozenset(TrainingBase.model_fields)
        ),
    )
