"""The recipe: one frozen, typed object that says everything about one run. Grids and model cards
are read here too.

Decides which sections fit together and derives a few values from them. `schema` and the files named
after sections hold the sections, `values` reads YAML, `problems` writes the error messages,
`identity` hashes. No later code sets defaults, checks a recipe again or changes it.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Final, Literal, Self, TypeVar

from pydantic import Field, ValidationError, model_validator

from runner.errors import (
    CorruptFileError,
    Problem,
    RecipeError,
    RefusedError,
    RunnerError,
    put_in_words,
)
from runner.files import read_plain
from runner.functions import UserFunction
from runner.project_folder import pasteable
from runner.recipe.data_files import name_format
from runner.recipe.data_section import DataSection
from runner.recipe.evaluation_section import (
    EarlyStoppingOff,
    EarlyStoppingOn,
    EvaluationSection,
    GenerationOn,
)
from runner.recipe.habits import Answer, find_answer, fit_answer, suggest_overrides
from runner.recipe.launch_section import CheckpointsSection, LaunchSection, TrackingSection
from runner.recipe.literals import find_inexact
from runner.recipe.problems import Fit, escape_text, find_line, list_problems
from runner.recipe.schema import (
    LIKELIHOOD_METRICS,
    NLL_METRICS,
    AdapterOff,
    EightBit,
    FourBit,
    Lora,
    Loss,
    ModelSection,
    QuantizationOff,
    RunSection,
    Training,
)
from runner.recipe.values import MAX_RECIPE_BYTES, list_typed, map_texts, read_values
from runner.strict import Section
from runner.text import format_count

_MAX_READ_BYTES: Final = 4 * MAX_RECIPE_BYTES  # the limit above counts characters


class Recipe(Section):
    """Everything about one run."""

    run: RunSection
    model: ModelSection
    adapter: Annotated[AdapterOff | Lora, Field(discriminator="method")] = Field(
        description="The weights that are trained: all of them, or a LoRA adapter."
    )
    quantization: Annotated[QuantizationOff | FourBit | EightBit, Field(discriminator="method")] = (
        Field(description="The storage of the base model's weights.")
    )
    data: DataSection
    loss: Loss = Field(
        description=(
            "The tokens that are trained on. full: every token except padding. completion: all"
            " completions. last_completion: the last completion of each row. Scores do not depend"
            " on it."
        ),
        examples=["completion"],
    )
    training: Training
    evaluation: EvaluationSection
    early_stopping: Annotated[
        EarlyStoppingOff | EarlyStoppingOn, Field(discriminator="enabled")
    ] = Field(description="The end of training before the last step.")
    checkpoints: CheckpointsSection
    launch: LaunchSection
    tracking: TrackingSection = TrackingSection()

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.quantization.method != "none" and self.adapter.method == "none":
            raise ValueError(
                "quantized weights cannot be trained:"
                " `quantization` needs `adapter: {method: lora}`"
            )
        if self.early_stopping.enabled and self.evaluation.eval_strategy == "no":
            raise ValueError("`early_stopping` needs evaluations: set `evaluation.eval_strategy`")
        self._measures_what_it_names()
        self._selects_by_what_is_measured()
        if (
            str(self.model.attn_implementation).startswith("flash")
            and self.model.dtype == "float32"
        ):
            raise ValueError(
                "FlashAttention needs `model.dtype: bfloat16` or `float16`, got float32"
            )
        if self.training.fp16 and self.model.dtype == "bfloat16":
            raise ValueError(
                "`training.fp16` cannot train bfloat16 weights:"
                " use `training.bf16` or change `model.dtype`"
            )
        try:
            derive_accumulation(self, self.launch.num_processes)
        except RefusedError as error:
            raise ValueError(error.message) from None
        return self

    def _measures_what_it_names(self) -> None:
        metrics = self.evaluation.metrics
        if metrics and not isinstance(self.evaluation.generation, GenerationOn):
            raise ValueError(
                "`evaluation.metrics` judge generated answers: set `evaluation.generation:"
                " {enabled: true, max_new_tokens: ...}`"
            )
        for metric in metrics:
            if metric.name in self.data.task.METRICS:
                raise ValueError(
                    f"`{metric.name}` is a metric of the task `{self.data.task.name}`: rename"
                    " your metric"
                )

    def _selects_by_what_is_measured(self) -> None:
        generation, task = self.evaluation.generation, self.data.task
        modes = self.metric_modes
        generated = (
            modes if isinstance(generation, GenerationOn) and generation.during_training else ()
        )
        for section in (self.checkpoints, self.early_stopping):
            if (
                not isinstance(section, CheckpointsSection | EarlyStoppingOn)
                or section.metric in NLL_METRICS
            ):
                continue
            metric = section.metric
            if metric in modes and metric not in generated:
                raise ValueError(
                    f"the metric `{metric}` is never evaluated on the validation split: set"
                    " `evaluation.generation: {enabled: true, max_new_tokens: ...,"
                    " during_training: true}`"
                )
            if metric not in generated:
                known = ", ".join([*NLL_METRICS, *modes])
                raise ValueError(
                    f"`{metric}` is not a metric of the task `{task.name}`, expected one of {known}"
                )
            if section.mode != modes[metric]:
                better = "larger" if modes[metric] == "max" else "smaller"
                raise ValueError(
                    f"`{metric}` is better when it is {better}: its `mode` must be"
                    f" `{modes[metric]}`"
                )

    @property
    def metric_modes(self) -> dict[str, Literal["min", "max"]]:
        """Every metric of generated answers with the better direction: `max` if larger is better,
        else `min`.
        """
        modes: dict[str, Literal["min", "max"]] = dict.fromkeys(self.data.task.METRICS, "max")
        return modes | {metric.name: metric.mode for metric in self.evaluation.metrics}

    @property
    def measured_metrics(self) -> tuple[str, ...]:
        """Every metric that is measured on the test split."""
        has_answers = isinstance(self.evaluation.generation, GenerationOn)
        return (*LIKELIHOOD_METRICS, *(self.metric_modes if has_answers else ()))

    def list_python_files(self) -> dict[str, str]:
        """`dotted key -> path` of the user's Python files."""
        task, files = self.data.task, {}
        if isinstance(task, UserFunction):
            files = {f"data.task.{key}": path for key, path in task.list_files().items()}
        for at, metric in enumerate(self.evaluation.metrics):
            for key, path in metric.list_files().items():
                files[f"evaluation.metrics.{at}.{key}"] = path
        return files

    def with_sources(self, sources: Mapping[str, str]) -> Self:
        """The same recipe with functions that can be called; `sources` maps the path of each of
        their files to its text.
        """
        data, evaluation = self.data, self.evaluation
        if isinstance(data.task, UserFunction):
            data = data.model_copy(update={"task": data.task.with_sources(sources)})
        metrics = tuple(metric.with_sources(sources) for metric in evaluation.metrics)
        evaluation = evaluation.model_copy(update={"metrics": metrics})
        return self.model_copy(update={"data": data, "evaluation": evaluation})

    @property
    def global_batch_size(self) -> int:
        """Sequences per optimizer step over all processes."""
        if self.training.global_batch_size is not None:
            return self.training.global_batch_size
        assert self.training.gradient_accumulation_steps is not None
        per_process = (
            self.training.per_device_train_batch_size * self.training.gradient_accumulation_steps
        )
        return per_process * self.launch.num_processes


def derive_micro_batch(recipe: Recipe, divisor: int = 1) -> int:
    """Sequences per forward pass and process; `divisor` is `Attempt.micro_batch_divisor`.

    Raises:
        RefusedError: the batch size is not divisible by `divisor`.
    """
    size, rest = divmod(recipe.training.per_device_train_batch_size, divisor)
    if rest:
        raise RefusedError(
            f"`per_device_train_batch_size: {recipe.training.per_device_train_batch_size}` cannot"
            f" be cut by {divisor}"
        )
    return size


def derive_eval_batch(recipe: Recipe, divisor: int = 1) -> int:
    """`per_device_eval_batch_size` of an attempt whose micro-batches are divided."""
    return max(1, recipe.evaluation.per_device_eval_batch_size // divisor)


def derive_answer_batch(recipe: Recipe, divisor: int = 1) -> int:
    """Prompts per process in one generation batch: `evaluation.generation.batch_size`, or the batch
    size of scoring.
    """
    generation = recipe.evaluation.generation
    stated = generation.batch_size if isinstance(generation, GenerationOn) else None
    return derive_eval_batch(recipe, divisor) if stated is None else max(1, stated // divisor)


def derive_accumulation(recipe: Recipe, num_processes: int, divisor: int = 1) -> int:
    """Micro-batches per optimizer step that keep the recipe's global batch on `num_processes`
    processes.

    Raises:
        RefusedError: the global batch is not divisible by the sequences of one pass.
    """
    per_pass = derive_micro_batch(recipe, divisor) * num_processes
    accumulation, rest = divmod(recipe.global_batch_size, per_pass)
    if rest:
        raise RefusedError(
            f"a global batch of {recipe.global_batch_size} is not divisible by"
            f" {format_count(num_processes, 'process')} x"
            f" {recipe.training.per_device_train_batch_size} sequences each",
            hint=(
                "choose a number of processes and a `training.per_device_train_batch_size` whose"
                " product divides the global batch"
            ),
        )
    return accumulation


# An override that changes one of these keys empties its section first, so `adapter.method=none`
# alone is enough.
def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file; errors in a generated recipe point to its template.

    Raises:
        RecipeError: all problems together.
        RunnerError: the file looks like rows.
    """
    hint = None
    template_path = Path("recipe_templates") / path.parent.name / "recipe.yaml.j2"
    if path.parent.parent.name == "recipes" and template_path.exists():
        hint = (
            f"recipes are generated; fix {template_path},"
            f" then run `runner render {path.parent.name}`"
        )
    try:
        return read_yaml(path, Recipe, overrides, hint=hint)
    except RecipeError:
        if not _looks_like_rows(path):
            raise
        raise RunnerError(
            f"{path} looks like rows, expected a recipe (a YAML file that names its rows)",
            hint=_suggest_init(path),
        ) from None


def _suggest_init(path: Path) -> str:
    command = "runner init study --data "
    if name_format(path) is None:
        rows = shlex.quote(str(path.with_suffix(".jsonl")))
        return f"write the rows to {rows}, one JSON object per line; then `{command}{rows}`"
    return f"{pasteable(command + shlex.quote(str(path)))}  # creates a project for these rows"


def _looks_like_rows(path: Path) -> bool:
    """True for an existing file that is named like a data file and holds no JSON recipe."""
    if not path.is_file() or (name_format(path) is None and path.suffix.lower() != ".txt"):
        return False
    try:
        content = json.loads(path.read_bytes()) if path.suffix.lower() == ".json" else None
    except (OSError, ValueError):
        return True
    return not isinstance(content, dict) or "run" not in content


def parse_recipe(
    text: str, *, where: str, overrides: Sequence[str] = (), hint: str | None = None
) -> Recipe:
    """The recipe that a YAML text and OmegaConf dotlist overrides describe.

    Raises:
        RecipeError: all problems together, with lines and dotted keys.
    """
    return parse_yaml(text, Recipe, where=where, overrides=overrides, hint=hint)


def dump_recipe(recipe: Recipe, indent: int | None = None) -> str:
    """A text that `parse_recipe` reads back as the same recipe, whatever characters it holds."""
    escaped = map_texts(escape_text, recipe.model_dump(mode="json"))
    return json.dumps(escaped, indent=indent, ensure_ascii=False)


_Model = TypeVar("_Model", bound=Section)


def read_yaml(
    path: Path, model: type[_Model], overrides: Sequence[str] = (), *, hint: str | None = None
) -> _Model:
    """The typed object that a YAML file describes, with overrides applied.

    Raises:
        RecipeError: all problems together, with lines and dotted keys.
    """
    try:
        content = read_plain(path, _MAX_READ_BYTES)
        if content is None:
            raise CorruptFileError("there is no such file")
        text = content.decode().replace("\r\n", "\n").replace("\r", "\n")
    except (CorruptFileError, OSError, UnicodeDecodeError) as error:
        what = f"cannot be read: {put_in_words(error)}"
        raise RecipeError(str(path), [Problem("(file)", what, 1)]) from None
    return parse_yaml(text, model, where=str(path), overrides=overrides, hint=hint)


def parse_yaml(
    text: str,
    model: type[_Model],
    *,
    where: str,
    overrides: Sequence[str] = (),
    hint: str | None = None,
) -> _Model:
    """Like `read_yaml`, for a text; `where` names it in errors."""

    def load(words: Sequence[str], fit: Fit = lambda answer: answer) -> _Model:
        values = read_values(text, where=where, overrides=words, hint=hint)
        container, typed = json.loads(values), list_typed(words)
        try:
            parsed = model.model_validate_json(values)
        except ValidationError as error:
            problems = list_problems(error, model, container, text, typed, fit)
            raise RecipeError(where, problems, hint=hint) from None
        inexact = list(find_inexact(parsed, container))
        if inexact:
            problems = [Problem(key, what, find_line(key, text, typed)) for key, what in inexact]
            raise RecipeError(where, problems, hint=hint)
        return parsed

    try:
        return load(overrides)
    except RecipeError as error:
        if any(problem.line is not None for problem in error.problems):
            raise
        raise _answer(error, overrides, model, load) from None


def _answer(
    error: RecipeError, overrides: Sequence[str], model: type[Section], load: Callable[..., object]
) -> RecipeError:
    """The error for overrides that are wrong, with a hint of equivalent ones that the recipe
    accepts. If there are none, each problem says why the recipe refuses the suggested key.
    """
    wrong = [problem.key for problem in error.problems]
    hint = suggest_overrides(overrides, wrong, model, load)
    others = [one for one in overrides if one.partition("=")[0] not in wrong]

    def fit(answer: Answer) -> Answer:
        return answer if hint else fit_answer(answer, lambda words: load([*others, *words]))

    try:
        load(overrides, fit)
    except RecipeError as told:
        error = told
    problems = [_answer_name(one, overrides, model, fit) for one in error.problems]
    return RecipeError(error.where, problems, hint=hint)


def _answer_name(
    problem: Problem,
    overrides: Sequence[str],
    model: type[Section],
    fit: Callable[[Answer], Answer],
) -> Problem:
    """The problem of an override; about its key if that is unknown too, and not about its value."""
    typed = list_typed(overrides).get(problem.key)
    answer = None if typed is None else find_answer(problem.key, typed, model)
    if answer is None or "in quotes" not in problem.what:
        return problem
    if answer.overrides and answer.overrides[0].startswith(f"{problem.key}="):
        return problem
    said = fit(answer).describe(is_override=True)
    return Problem(problem.key, f"unknown key{said}")
