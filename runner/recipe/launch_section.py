"""The sections of a recipe about everything around the training: `checkpoints`, `launch` and
`tracking`.

Their docstrings and descriptions are written for users, as in `schema`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Final, Literal, Self, get_args

from pydantic import Field, field_validator, model_validator

from runner.recipe.schema import MetricName, NotNegative, Positive
from runner.secrets import names_secret
from runner.strict import FrozenDict, Section, Text


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
            "For a training process that ended without a message; perhaps the system killed it"
            " for its memory."
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
        description="Trackers by their Transformers names. `wandb` and `none` need no list.",
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
        """Another section with this one's repository and time of pushing."""
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
