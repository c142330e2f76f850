"""The sections of a recipe: frozen types with the values that each key accepts, and the choices
that exclude each other within a section.

Docstrings of sections and descriptions of fields are the texts of `runner recipe` and of the JSON
Schema (`keys`, `json_schema`): they are written for users. This file holds the shared types and the
sections of the run, the model and the training. The others are in `data_section`,
`evaluation_section` and `launch_section`. Combinations across sections, and the parsing, are in
`parse`.
"""

from __future__ import annotations

import json
from datetime import date
from functools import cache
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, Self

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

from runner.recipe.hf_fields import (
    OWNED_LORA_FIELDS,
    OWNED_TRAINING_FIELDS,
    build_field_definitions,
)
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
        """The generated fields that the recipe states, as plain JSON values."""
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
        """The arguments of `peft.LoraConfig`."""
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
