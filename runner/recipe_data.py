"""The section `data` of a recipe: sources, splits, and the tasks that turn rows into conversations."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from runner.recipe_sections import Positive, Section, Text


class DataSource(Section):
    """A local JSON, JSONL, CSV or Parquet file (or a folder of them), or a data set id on the hub."""

    path: Text
    config_name: str | None = None
    split: Text = "train"
    revision: str | None = None


class TaskSection(Section):
    """How rows become conversations. `METRICS` are those of the texts that a model generates, larger is better."""

    METRICS: ClassVar[tuple[str, ...]] = ()


class ConversationsTask(TaskSection):
    """Rows with a list of messages in `messages` or `conversations`; role/content or from/value."""

    name: Literal["conversations"]


class PromptCompletionTask(TaskSection):
    """One user turn and one assistant turn from two columns."""

    METRICS = ("exact_match",)

    name: Literal["prompt_completion"]
    prompt_column: Text = "prompt"
    completion_column: Text = "completion"


class SummarizationTask(TaskSection):
    """A document (or dialogue) and its summary; `prompt` holds the placeholder `{document}` exactly once."""

    METRICS = ("rouge1", "rouge2", "rougeL")

    name: Literal["summarization"]
    prompt: Text
    document_column: Text = "document"
    summary_column: Text = "summary"

    @model_validator(mode="after")
    def _has_its_placeholders(self) -> Self:
        _require_placeholders(self.prompt, "document")
        return self


class Sst2Task(TaskSection):
    """SST-2 of GLUE: a sentence and its label, 0 or 1; `prompt` holds `{sentence}` exactly once."""

    METRICS = ("accuracy", "f1")

    name: Literal["sst2"]
    prompt: Text
    label_texts: tuple[Text, Text] = ("negative", "positive")  # what the model answers for the labels 0 and 1
    sentence_column: Text = "sentence"
    label_column: Text = "label"

    @model_validator(mode="after")
    def _has_its_placeholders(self) -> Self:
        _require_placeholders(self.prompt, "sentence")
        return self


class SquadV2Task(TaskSection):
    """SQuAD 2.0: context, question, and answers as `{"text": [...], "answer_start": [...]}`, empty if unanswerable."""

    METRICS = ("exact_match", "f1", "has_answer_exact_match", "has_answer_f1", "no_answer_accuracy")

    name: Literal["squad_v2"]
    prompt: Text  # holds {context} and {question} exactly once each
    no_answer_text: Text = "unanswerable"  # what the model answers where the context holds no answer

    @model_validator(mode="after")
    def _has_its_placeholders(self) -> Self:
        _require_placeholders(self.prompt, "context", "question")
        return self


class Oasst1Task(TaskSection):
    """Message trees of OpenAssistant (one row per message, or one nested tree per row) -> conversations."""

    name: Literal["oasst1"]
    languages: tuple[Text, ...] = ("en",)  # of every message of a path; empty: all
    paths: Literal["best", "all"] = "best"  # the best-ranked reply at every turn, or one conversation per leaf
    include_unreviewed: bool = False  # messages without a finished review; deleted ones are never used


class MathToolsTask(TaskSection):
    """Mathematics in several turns: a tool's output is a user turn, the answer stands in the last `\\boxed{}`."""

    METRICS = ("final_answer_accuracy",)

    name: Literal["math_tools"]


def _require_placeholders(prompt: str, *names: str) -> None:
    for name in names:
        if prompt.count(f"{{{name}}}") != 1:
            raise ValueError(f"`prompt` must hold the placeholder {{{name}}} exactly once")


AnyTask = (
    ConversationsTask | PromptCompletionTask | SummarizationTask | Sst2Task | SquadV2Task | Oasst1Task | MathToolsTask
)
Task = Annotated[AnyTask, Field(discriminator="name")]


class DataSection(Section):
    """Where the rows come from and which of them train, select and report; None counts mean all that are left."""

    train: DataSource
    validation: DataSource | None = None  # None: taken from `train`, before the training rows
    test: DataSource | None = None
    task: Task
    num_train_samples: Positive | None = None
    num_validation_samples: Positive | None = None
    num_test_samples: Positive | None = None
    seed: int  # the order of the raw rows; training rows are a prefix, so smaller counts are nested in larger ones
    max_length: Positive  # tokens
    truncation: Literal["refuse", "prompt_left", "drop"] = "refuse"

    @model_validator(mode="after")
    def _carved_splits_have_sizes(self) -> Self:
        for split in ("validation", "test"):
            if getattr(self, split) is None and getattr(self, f"num_{split}_samples") is None:
                raise ValueError(f"`num_{split}_samples` is needed when `{split}` is taken from the training rows")
        return self
