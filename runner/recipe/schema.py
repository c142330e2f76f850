"""The sections of a recipe: frozen types with the values that each key accepts, and the choices
that exclude each other within a section.

Docstrings of sections and descriptions of fields are the texts of `runner recipe` and of the JSON
Schema (`keys`, `json_schema`): they are written for users. The section `data` is in `data_section`.
Combinations across sections, and the parsing, are in `parse`.
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

# Of every task; smaller is better.
NLL_METRICS: Final = ("nll_per_completion_token", "nll_per_token")
# The metrics of every run on the test split.
LIKELIHOOD_METRICS: Final = (*NLL_METRICS, "bits_per_byte")
Dtype = Literal["float32", "bfloat16", "float16"]
Name = Annotated[str, StringConstraints(pattern=NAME_PATTERN)]
Positive = Annotated[int, Field(gt=0)]
NotNegative = Annotated[int, Field(ge=0)]
Loss = Literal["full", "completion", "last_completion"]
Turns = Literal["all", "last", "split"]
# Arguments that `apply_chat_template` reserves for other purposes.
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
# One of `NLL_METRICS`; if texts are generated during training, also one of the task's `METRICS` or
# of `evaluation.metrics`.
MetricName = Text


class PassThrough(Section):
    """A section with fields that go to a Hugging Face config unchanged, and only if the recipe
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
        """Return the generated fields that the recipe states, as plain JSON values."""
        dumped = self.model_dump(mode="json")
        return {
            name: value
            for name, value in dumped.items()
            if name not in type(self)._declared_fields()
        }


class DeclaredContrast(Section):
    """A comparison that the grid declares before its first run: two values of an axis, by one
    metric.
    """

    # `from` is a keyword of Python, so the field has another name than the key.
    model_config = ConfigDict(serialize_by_alias=True)

    axis: Text = Field(description="The axis of the grid.", examples=["loss"])
    from_: Scalar = Field(alias="from", description="The value to compare from.", examples=["full"])
    to: Scalar = Field(description="The value to compare to.", examples=["completion"])
    metric: Text = Field(
        description="A metric of the runs' test split.", examples=["nll_per_completion_token"]
    )
    margin: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description=(
            "A difference within this margin counts as none, in the metric's unit. null: no"
            " statement about equality."
        ),
        examples=[0.02],
    )

    @model_validator(mode="after")
    def _compares_two_values(self) -> Self:
        if json.dumps(self.from_) == json.dumps(self.to):
            raise ValueError(f"`from` and `to` are both {json.dumps(self.to)}")
        return self


class RunSection(Section):
    """The grid and the cell that this recipe belongs to. Outside the digest."""

    grid: Name = Field(
        description="The grid's name; the run directory is runs/GRID/NAME.", examples=["my_grid"]
    )
    name: Name = Field(description="The run's name within its grid.", examples=["lr1e-4_seed1"])
    axes: FrozenDict = Field(
        default_factory=dict,
        validate_default=True,
        json_schema_extra={"default": {}},
        description=(
            "The cell's value on each axis of the grid. `--where`, `status` and `report` read"
            " these, never the names of files."
        ),
        examples=[{"loss": "completion", "seed": 1}],
    )
    declared: tuple[DeclaredContrast, ...] = Field(
        default=(),
        description=(
            "The comparisons that the grid declares, the same in all its recipes. The first"
            " attempt of a run records them; later changes do not count."
        ),
    )
    overrides: tuple[str, ...] = Field(
        default=(),
        description="The overrides of the command line; the runner fills this in.",
        examples=[["training.learning_rate=1e-4"]],
    )
    schema_version: Literal[1] = Field(
        default=SCHEMA_VERSION, description="The version of this list of keys."
    )

    @property
    def full_name(self) -> str:
        """`<grid>/<run name>`."""
        return f"{self.grid}/{self.name}"


class ModelSection(Section):
    """The base model, and the form of its conversations."""

    path: Text = Field(
        description="A folder, or a model id on the hub, for `from_pretrained`.",
        examples=["google/gemma-2-2b-it"],
    )
    revision: str | None = Field(
        default=None,
        description=(
            "A branch, tag or commit of the hub repository. null: the main branch, whose commit"
            " is recorded."
        ),
        examples=["main"],
    )
    dtype: Dtype = Field(description="The data type of the weights.", examples=["bfloat16"])
    attn_implementation: (
        Literal["eager", "sdpa", "flash_attention_2", "flash_attention_3"] | None
    ) = Field(
        default=None,
        description=(
            "The attention implementation. null: Transformers chooses. FlashAttention needs"
            " `dtype: bfloat16` or `float16`."
        ),
        examples=["sdpa"],
    )
    chat_template: Text | None = Field(
        default=None,
        description="The path of a .jinja file. null: the tokenizer's own template.",
        examples=["recipe_templates/chat/human_assistant.jinja"],
    )
    chat_template_kwargs: FrozenDict = Field(
        default_factory=dict,
        validate_default=True,
        json_schema_extra={"default": {}},
        description="Arguments of the chat template in addition to the messages.",
        examples=[{"enable_thinking": False}],
    )
    template_date: Text | None = Field(
        default=None,
        description=(
            "The day (YYYY-MM-DD) that the template's `strftime_now` returns. null: a row that"
            " shows the date is refused."
        ),
        examples=["2026-01-31"],
    )
    end_of_turn: Text | None = Field(
        default=None,
        description=(
            "A token to append to the last answer if the template prints none there. null: append"
            " nothing."
        ),
        examples=["<|im_end|>"],
    )
    pad_token: Text = Field(
        default="auto",
        description=(
            "The padding token. auto: the tokenizer's own unless it is the end-of-text token, else"
            " a reserved token, else a new one. reserved: like auto, but never a new token. add: a"
            " new token. Any other text: that token, added if the vocabulary lacks it."
        ),
        examples=["auto", "<|pad|>"],
    )

    @field_validator("chat_template_kwargs")
    @classmethod
    def _are_arguments(cls, value: Any) -> Any:
        taken = sorted(set(value) & _TEMPLATE_ARGUMENTS)
        if taken:
            raise ValueError(
                f"{', '.join(f'`{name}`' for name in taken)}: rows and the trainer set these,"
                " template arguments cannot"
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
    """Full fine-tuning: all weights are trained."""

    method: Literal["none"]


class LoraBase(PassThrough):
    """A LoRA adapter is trained; the base model's weights stay as they are."""

    method: Literal["lora"]
    r: Positive = Field(description="The rank of the adapter's matrices.", examples=[16])
    lora_alpha: Positive = Field(
        description="The adapter's output is scaled by `lora_alpha / r`.", examples=[32]
    )
    lora_dropout: Annotated[float, Field(ge=0, lt=1)] = Field(
        description="The dropout probability of the adapter's input.", examples=[0.05]
    )
    target_modules: Text | tuple[Text, ...] = Field(
        description=(
            "The modules that get an adapter: a list of names, a regular expression, or"
            " `all-linear` for every linear layer except the output layer."
        ),
        examples=["all-linear", ["q_proj", "v_proj"]],
    )

    def lora_arguments(self) -> dict[str, Any]:
        """Return the arguments of `peft.LoraConfig`."""
        dumped = self.model_dump(mode="json")
        del dumped["method"]
        return dumped


class QuantizationOff(Section):
    """No quantization: weights have the type `model.dtype`."""

    method: Literal["none"]


class FourBit(Section):
    """The base model has bitsandbytes 4-bit weights (QLoRA). Needs `adapter.method: lora`. The keys
    are fields of `transformers.BitsAndBytesConfig`.
    """

    method: Literal["4bit"]
    bnb_4bit_quant_type: Literal["nf4", "fp4"] = Field(
        description="The 4-bit data type: NormalFloat (nf4) or 4-bit float (fp4)."
    )
    bnb_4bit_use_double_quant: bool = Field(
        description="Quantize the quantization constants too, which saves about 0.4 bit a weight.",
        examples=[True],
    )
    bnb_4bit_compute_dtype: Dtype = Field(
        description="The data type of computations with the weights.", examples=["bfloat16"]
    )


class EightBit(Section):
    """The base model has bitsandbytes LLM.int8() weights. Needs `adapter.method: lora`."""

    method: Literal["8bit"]
    llm_int8_threshold: Annotated[float, Field(ge=0)] = Field(
        default=6.0,
        description=(
            "Input features with a value above this are outliers, computed in 16 bits instead of 8."
        ),
    )


class TrainingBase(PassThrough):
    """The optimization. In addition to these keys, `training` accepts the fields of
    `trl.SFTConfig` that the runner does not set itself.
    """

    seed: Annotated[int, Field(ge=0, lt=2**32)] = Field(
        description=(
            "The random seed of training: adapter initialization, dropout, order of batches."
            " `data.seed` draws the rows."
        ),
        examples=[42],
    )
    global_batch_size: Positive | None = Field(
        default=None,
        description=(
            "Sequences per optimizer step over all processes; gradient accumulation is derived."
            " null: per_device_train_batch_size x gradient_accumulation_steps x"
            " launch.num_processes. State exactly one of this and `gradient_accumulation_steps`."
        ),
        examples=[16],
    )
    gradient_accumulation_steps: Positive | None = Field(
        default=None,
        description=(
            "Micro-batches per optimizer step and process. null: derived from `global_batch_size`,"
            " per_device_train_batch_size and the number of processes. State exactly one of this"
            " and `global_batch_size`."
        ),
        examples=[4],
    )
    per_device_train_batch_size: Positive = Field(
        description="Sequences per micro-batch (one forward and backward pass of one process).",
        examples=[4],
    )
    num_train_epochs: Annotated[float, Field(gt=0)] | None = Field(
        default=None,
        description=(
            "Passes over the training rows. null: derived from `max_steps`. State exactly one of"
            " this and `max_steps`."
        ),
        examples=[3],
    )
    max_steps: Positive | None = Field(
        default=None,
        description=(
            "Optimizer steps. null: derived from `num_train_epochs`. State exactly one of this and"
            " `num_train_epochs`."
        ),
        examples=[200],
    )
    bf16: bool = Field(
        default=False,
        description="Mixed precision in bfloat16. Not together with `fp16`.",
        examples=[True],
    )
    fp16: bool = Field(
        default=False,
        description=(
            "Mixed precision in float16 with loss scaling. Not together with `bf16`, and not with"
            " `model.dtype: bfloat16`."
        ),
        examples=[True],
    )
    gradient_checkpointing: bool = Field(
        description=(
            "Compute activations again in the backward pass instead of storing them: less memory,"
            " slower steps."
        ),
        examples=[True],
    )
    train_sampling_strategy: Literal["random", "sequential", "group_by_length"] = Field(
        default="group_by_length",
        description=(
            "The order of rows. random: shuffled in every epoch. sequential: as drawn."
            " group_by_length: shuffled, but rows of similar length share a batch, which needs"
            " less padding."
        ),
    )

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
    """Rows are scored by likelihood only."""

    enabled: Literal[False]


class GenerationOn(Section):
    """The base model and the tuned model also answer the test prompts, greedily. The task's metrics
    judge the answers.
    """

    enabled: Literal[True]
    max_new_tokens: Positive = Field(
        description="The maximum length of an answer in tokens.", examples=[64]
    )
    num_samples: Positive | None = Field(
        default=None,
        description="Answer only the first so many rows of the split. null: all rows.",
        examples=[200],
    )
    batch_size: Positive | None = Field(
        default=None,
        description=(
            "Prompts that a process answers at the same time. null:"
            " `evaluation.per_device_eval_batch_size`."
        ),
        examples=[32],
    )
    during_training: bool = Field(
        default=False,
        description=(
            "Also answer the validation prompts at every evaluation; checkpoints and early stopping"
            " can then use the task's metrics."
        ),
        examples=[True],
    )


# Names that evaluations and reports already use.
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
    """The times at which the validation rows are scored, and the generated answers."""

    eval_strategy: Literal["no", "steps", "epoch"] = Field(
        description=(
            "steps: every `eval_steps` steps. epoch: after every epoch. 'no' (in quotes; YAML reads"
            " a plain no as false): neither. Step 0 and the last step are always evaluated."
        ),
        examples=["epoch"],
    )
    eval_steps: Positive | None = Field(
        default=None,
        description=(
            "Optimizer steps between evaluations. Required with `eval_strategy: steps`; null with"
            " the others."
        ),
        examples=[50],
    )
    per_device_eval_batch_size: Positive = Field(
        description="Rows that a process scores at the same time.", examples=[8]
    )
    generation: Annotated[GenerationOff | GenerationOn, Field(discriminator="enabled")] = Field(
        default=GenerationOff(enabled=False),
        description="Answers that the models generate.",
        examples=[{"enabled": True, "max_new_tokens": 64}],
    )
    metrics: tuple[Metric, ...] = Field(
        default=(),
        description=(
            "Your own metrics of the generated answers, in addition to the task's. Needs"
            " `generation.enabled: true`."
        ),
    )

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
    """Training continues to the last step."""

    enabled: Literal[False]


class EarlyStoppingOn(Section):
    """Training stops after `patience` evaluations in a row without an improvement by more than
    `threshold`.
    """

    enabled: Literal[True]
    metric: MetricName = Field(
        description=(
            "The metric on the validation split: nll_per_completion_token or nll_per_token; with"
            " `evaluation.generation.during_training: true` also a metric of the task or of"
            " `evaluation.metrics`."
        ),
        examples=["nll_per_completion_token"],
    )
    mode: Literal["min", "max"] = Field(
        default="min",
        description=(
            "min: smaller is better, for likelihoods. max: larger is better, for the tasks'"
            " metrics."
        ),
    )
    patience: Positive = Field(
        description="Evaluations in a row without an improvement.", examples=[3]
    )
    threshold: Annotated[float, Field(ge=0)] = Field(
        default=0.0,
        description="An improvement must be larger than this, in the metric's unit.",
        examples=[0.001],
    )


class RemoteStorage(Section):
    """The place to which committed checkpoints are copied in the background. Credentials come from
    the environment.
    """

    url: Text = Field(
        description=(
            "An fsspec URL: file://, s3://, gs:// and so on. A run uses the folder GRID/NAME below"
            " it."
        ),
        examples=["s3://my-bucket/runs"],
    )
    options: FrozenDict = Field(
        default_factory=dict,
        validate_default=True,
        json_schema_extra={"default": {}},
        description="Arguments of the fsspec file system; secrets are refused.",
        examples=[{"endpoint_url": "https://s3.example.org"}],
    )
    num_retries: NotNegative = Field(default=5, description="Retries of each upload.")
    load: bool = Field(
        default=False,
        description=(
            "If the run directory has no checkpoint, resume from the newest one in the remote"
            " storage."
        ),
        examples=[True],
    )

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
    """The times at which checkpoints are written, and the number that is kept. The best one by
    `metric` is exported.
    """

    save_strategy: Literal["no", "steps", "epoch"] = Field(
        description=(
            "steps: every `save_steps` steps. epoch: after every `save_epochs` epochs. 'no' (in"
            " quotes; YAML reads a plain no as false): neither. An evaluated step that is among the"
            " `keep_best` best, and the last step, are always saved."
        ),
        examples=["epoch"],
    )
    save_steps: Positive | None = Field(
        default=None,
        description=(
            "Optimizer steps between checkpoints. Required with `save_strategy: steps`; null with"
            " the others."
        ),
        examples=[50],
    )
    save_epochs: Positive | None = Field(
        default=None,
        description=(
            "Epochs between checkpoints, only with `save_strategy: epoch`. null: after every epoch."
        ),
        examples=[2],
    )
    keep_latest: Positive = Field(default=1, description="The number of newest checkpoints kept.")
    keep_best: Positive = Field(
        default=1,
        description="The number of best checkpoints kept, in addition to the newest ones.",
    )
    metric: MetricName = Field(
        default="nll_per_completion_token",
        description=(
            "The metric on the validation split that decides which checkpoint is best:"
            " nll_per_completion_token or nll_per_token; with"
            " `evaluation.generation.during_training: true` also a metric of the task or of"
            " `evaluation.metrics`."
        ),
    )
    mode: Literal["min", "max"] = Field(
        default="min",
        description=(
            "min: smaller is better, for likelihoods. max: larger is better, for the tasks'"
            " metrics."
        ),
    )
    save_optimizer: bool = Field(
        default=True,
        description="false: only the newest checkpoint keeps its optimizer state.",
        examples=[False],
    )
    archive: Literal["none", "zip"] = Field(
        default="none", description="zip: also write each checkpoint as an archive."
    )
    remote: RemoteStorage | None = Field(
        default=None,
        description="A place for copies of the checkpoints. null: none.",
        examples=[{"url": "s3://my-bucket/runs"}],
    )

    @model_validator(mode="after")
    def _has_intervals_exactly_for_their_strategy(self) -> Self:
        if (self.save_strategy == "steps") != (self.save_steps is not None):
            raise ValueError("`save_steps` goes with `save_strategy: steps`, and only with it")
        if self.save_epochs is not None and self.save_strategy != "epoch":
            raise ValueError("`save_epochs` goes with `save_strategy: epoch`, and only with it")
        return self


class RetriesSection(Section):
    """The maximum number of automatic retries in a row without a new checkpoint between them, by
    failure kind.

    Preempted runs resume without a limit. Failures of all other kinds are not retried.
    """

    transient: NotNegative = Field(
        default=3,
        description="For ports, lost peers, file systems, and storage that cannot be reached.",
    )
    lost: NotNegative = Field(
        default=1,
        description=(
            "For a trainer that ended without a message; perhaps the system killed it for its"
            " memory."
        ),
    )
    stalled: NotNegative = Field(
        default=1, description="For attempts that `launch.stall_minutes` ended."
    )
    out_of_memory: NotNegative = Field(
        default=0,
        description=(
            "For GPU memory: each retry halves the micro-batch, keeps the global batch and starts"
            " at step 0."
        ),
        examples=[2],
    )
    backoff_seconds: Annotated[float, Field(ge=0)] = Field(
        default=10.0,
        description="Seconds before the first retry; doubled for each next one, up to 600.",
    )


class LaunchSection(Section):
    """The way in which the processes start. Outside the digest, except for the effect on the global
    batch.
    """

    accelerate_config: Text = Field(
        description="The path of accelerate's config, which may name DeepSpeed's.",
        examples=["accelerate_configs/single_gpu.yaml"],
    )
    num_processes: Positive = Field(
        default=1,
        description=(
            "Processes over all machines, usually one for each GPU. Must divide by `num_machines`."
        ),
        examples=[4],
    )
    num_machines: Positive = Field(default=1, description="Machines that share one run.")
    num_cpu_threads_per_process: Positive | None = Field(
        default=None,
        description="CPU threads of each process. null: the cores divided among the processes.",
        examples=[8],
    )
    stall_minutes: Annotated[float, Field(gt=0)] | None = Field(
        default=30.0,
        description=(
            "End an attempt after so many minutes without progress (a micro-batch, a scored or"
            " answered batch, a new phase). null: never."
        ),
    )
    retries: RetriesSection = Field(
        default=RetriesSection(), description="Automatic retries by failure kind."
    )
    on_version_change: Literal["warn", "refuse"] = Field(
        default="warn",
        description="The reaction if a library's version differs from that of the checkpoint.",
    )

    @model_validator(mode="after")
    def _divides_among_machines(self) -> Self:
        if self.num_processes % self.num_machines:
            raise ValueError(
                f"`num_processes: {self.num_processes}` counts all machines and must divide by "
                f"`num_machines: {self.num_machines}`"
            )
        return self


# The trackers of Transformers; a test compares them with the installed library.
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


# The form that the hub accepts; a name without an owner depends on the token.
HUB_REPOSITORY: Final = re.compile(
    r"(?!.*(?:--|\.\.))(?!.*\.git$)[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
    r"/[A-Za-z0-9_](?:[A-Za-z0-9._-]{0,94}[A-Za-z0-9_])?"
)


class TrackingSection(Section):
    """Experiment trackers, and the hub repository for the tuned model. Outside the digest."""

    report_to: tuple[Tracker, ...] = Field(
        default=(),
        description="Trackers by their Transformers names. `wandb` and `none` may stand alone.",
        examples=[["wandb", "tensorboard"]],
    )
    project: str | None = Field(
        default=None,
        description="The project's name in the trackers. null: the grid's name.",
        examples=["summaries"],
    )
    run_name: str | None = Field(
        default=None,
        description="The run's name in the trackers. null: the run's own name.",
        examples=["first-try"],
    )
    tags: tuple[Text, ...] = Field(
        default=(), description="Tags of the run in Weights & Biases.", examples=[["pilot"]]
    )
    watch: Literal["none", "gradients", "parameters", "all"] = Field(
        default="none",
        description=(
            "Histograms of gradients, weights or both in Weights & Biases, every `log_steps`"
            " micro-batches."
        ),
    )
    log_steps: Positive = Field(
        default=1,
        description=(
            "Optimizer steps between losses sent to trackers, which get every evaluation."
            " metrics.jsonl has every step."
        ),
        examples=[10],
    )
    log_model: Literal["none", "end", "checkpoint"] = Field(
        default="none",
        description=(
            "The models that Weights & Biases stores. end: the tuned model, when the run is"
            " completed. checkpoint: also every committed checkpoint."
        ),
    )
    hub_model_id: str | None = Field(
        default=None,
        description=(
            "The hub repository (OWNER/NAME) to which `runner export --push` and `hub_push` send"
            " the tuned model. null: none."
        ),
        examples=["my-name/my-model"],
    )
    hub_private: bool = Field(default=True, description="Create the repository as a private one.")
    hub_push: Literal["never", "end"] = Field(
        default="never",
        description=(
            "end: send the tuned model to the hub once the run is completed. Needs `hub_model_id`."
        ),
    )

    @property
    def push_to(self) -> str | None:
        """The repository to which the launch side sends the model; None for none."""
        return self.hub_model_id if self.hub_push == "end" else None

    def copy_push(self, other: TrackingSection) -> TrackingSection:
        """Return another section with this one's repository and time of pushing."""
        names = ("hub_model_id", "hub_private", "hub_push")
        return other.model_copy(update={name: getattr(self, name) for name in names})

    @model_validator(mode="after")
    def _names_a_repository(self) -> Self:
        if self.hub_push == "never":
            return self
        if self.hub_model_id is None:
            raise ValueError(
                "`hub_push: end` needs a repository of the run's own, such as"
                " `hub_model_id: OWNER/NAME`; in the template of a grid"
                ' `hub_model_id: {{ ("OWNER/" ~ name) | yaml }}`'
            )
        if not HUB_REPOSITORY.fullmatch(self.hub_model_id):
            raise ValueError(
                f"`hub_model_id: {self.hub_model_id}` is not a repository on the hub: expected"
                " OWNER/NAME, each of at most 96 letters, digits and . _ - that begins and ends"
                " with a letter, a digit or _, without `--`, `..` and `.git` at the end"
            )
        return self

    @field_validator(
        "report_to",
        mode="before",
        json_schema_input_type=tuple[Tracker, ...] | Literal["wandb", "none"],
    )
    @classmethod
    def _may_be_one_word(cls, value: Any) -> Any:
        """Accept the words of other command lines: `wandb` for a list of one, `none` for none."""
        if not isinstance(value, str):
            return tuple(value) if isinstance(value, list) else value
        if value in ("wandb", "none"):
            return () if value == "none" else (value,)
        if value == "all":
            raise ValueError(
                "got the text 'all', which depends on what is installed: name the trackers,"
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
        __doc__=LoraBase.__doc__,
        **build_field_definitions(
            "LoraConfig", OWNED_LORA_FIELDS, exclude=frozenset(LoraBase.model_fields)
        ),
    )
    Training = create_model(
        "GeneratedTraining",
        __base__=TrainingBase,
        __doc__=TrainingBase.__doc__,
        **build_field_definitions(
            "SFTConfig", OWNED_TRAINING_FIELDS, exclude=frozenset(TrainingBase.model_fields)
        ),
    )
    # `pickle` finds a class by this name.
    Lora.__qualname__, Training.__qualname__ = "Lora", "Training"
