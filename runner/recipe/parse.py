"""The recipe: one frozen, typed object that says everything about one run. Also the project's only
YAML reader, for recipes, grids and model cards.

Decides which sections fit together and derives a few values from them. `schema` holds the sections,
`problems` writes the error messages, `identity` hashes. No later code sets defaults, checks a
recipe again or changes it.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, Literal, Self, TypeVar

import yaml
from omegaconf import DictConfig, OmegaConf
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
from runner.recipe.habits import Answer, find_answer, fit_answer, suggest_overrides
from runner.recipe.problems import (
    SAFE_LOADER,
    Fit,
    describe_error,
    escape_missing,
    escape_text,
    find_hazards,
    find_unusable_values,
    list_problems,
    read_escapes,
)
from runner.recipe.scalars import find_changed_scalars
from runner.recipe.schema import (
    LIKELIHOOD_METRICS,
    NLL_METRICS,
    AdapterOff,
    CheckpointsSection,
    EarlyStoppingOff,
    EarlyStoppingOn,
    EightBit,
    EvaluationSection,
    FourBit,
    GenerationOn,
    LaunchSection,
    Lora,
    Loss,
    ModelSection,
    QuantizationOff,
    RunSection,
    TrackingSection,
    Training,
)
from runner.strict import Section
from runner.text import format_count

MAX_RECIPE_BYTES: Final = 1_000_000
_MAX_READ_BYTES: Final = 4 * MAX_RECIPE_BYTES  # the limit above counts characters
_MAX_VALUES: Final = 10_000


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
    def _combines_only_what_works(self) -> Self:
        if self.quantization.method != "none" and self.adapter.method == "none":
            raise ValueError(
                "quantised weights cannot be trained:"
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
_KIND_KEYS: Final = (
    "adapter.method",
    "quantization.method",
    "early_stopping.enabled",
    "evaluation.generation.enabled",
    "data.task.name",
)


def load_recipe(path: Path, overrides: Sequence[str] = ()) -> Recipe:
    """The recipe in a file; errors in a generated recipe point to its template.

    Raises:
        RecipeError: all problems at once.
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
        RecipeError: all problems at once, with lines and dotted keys.
    """
    return parse_yaml(text, Recipe, where=where, overrides=overrides, hint=hint)


def dump_recipe(recipe: Recipe, indent: int | None = None) -> str:
    """A text that `parse_recipe` reads back as the same recipe, whatever characters it holds."""
    escaped = _map_texts(escape_text, recipe.model_dump(mode="json"))
    return json.dumps(escaped, indent=indent, ensure_ascii=False)


_Model = TypeVar("_Model", bound=Section)


def read_yaml(
    path: Path, model: type[_Model], overrides: Sequence[str] = (), *, hint: str | None = None
) -> _Model:
    """The typed object that a YAML file describes, with overrides applied.

    Raises:
        RecipeError: all problems at once, with lines and dotted keys.
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
    """As `read_yaml`, for a text; `where` names it in errors."""

    def load(words: Sequence[str], fit: Fit = lambda answer: answer) -> _Model:
        values = read_values(text, where=where, overrides=words, hint=hint)
        try:
            return model.model_validate_json(values)
        except ValidationError as error:
            typed = _list_typed(words)
            problems = list_problems(error, model, json.loads(values), text, typed, fit)
            raise RecipeError(where, problems, hint=hint) from None

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
    typed = _list_typed(overrides).get(problem.key)
    answer = None if typed is None else find_answer(problem.key, typed, model)
    if answer is None or "in quotes" not in problem.what:
        return problem
    if answer.overrides and answer.overrides[0].startswith(f"{problem.key}="):
        return problem
    said = fit(answer).describe(is_override=True)
    return Problem(problem.key, f"unknown key{said}")


def read_values(
    text: str, *, where: str, overrides: Sequence[str] = (), hint: str | None = None
) -> str:
    """The plain values of a YAML text with overrides applied, as JSON, not yet validated.

    Raises:
        RecipeError: the text cannot be read, or holds something that no recipe may.
    """
    if len(text) > MAX_RECIPE_BYTES:
        raise RecipeError(where, [Problem("(file)", f"longer than {MAX_RECIPE_BYTES:,} bytes", 1)])
    if problems := find_hazards(text, overrides):
        raise RecipeError(where, problems, hint=hint)
    overridden = frozenset(_list_typed(overrides))
    container, problems = _load(text, overrides, overridden)
    problems = problems or find_unusable_values(container, text, overridden)
    if problems:
        raise RecipeError(where, problems, hint=hint)
    return json.dumps(_map_texts(read_escapes, container))


def _list_typed(overrides: Sequence[str]) -> dict[str, str]:
    """`key -> value`, as typed."""
    parts = [override.partition("=") for override in overrides]
    return {key: value for key, _, value in parts}


# YAML's type for each plain text. The recipes of a grid hold the same few texts, and matching each
# one again takes a third of the time of reading them.
_KNOWN_TAGS: Final[dict[str, str]] = {}
_MAX_KNOWN_TAGS: Final = 10_000
_TAG: Final = "tag:yaml.org,2002:"
_TEXT: Final = f"{_TAG}str"


class _Loader(SAFE_LOADER):  # type: ignore[misc]
    """YAML 1.1 as OmegaConf reads it: `1e-5` is a number, a date is a text."""

    def resolve(self, kind: Any, value: Any, implicit: Any) -> Any:
        """As in PyYAML, with a cache."""
        if kind is not yaml.ScalarNode or not implicit[0]:
            return super().resolve(kind, value, implicit)
        tag = _KNOWN_TAGS.get(value)
        if tag is None:
            tag = super().resolve(kind, value, implicit)
            if len(_KNOWN_TAGS) < _MAX_KNOWN_TAGS:
                _KNOWN_TAGS[value] = tag
        return tag


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"[-+]?[0-9]+(_[0-9]+)*(\.[0-9_]*)?[eE][-+]?[0-9]+$"),
    list("-+0123456789"),
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", _Loader.construct_yaml_str)


def _read_plainly(text: str) -> tuple[Any, list[Problem]]:
    """The value of a text, or a problem for each plain value that YAML would change.

    Raises:
        yaml.YAMLError: the text is not YAML, repeats a key, or grows too large through aliases.
    """
    loader = _Loader(text)
    try:
        node = loader.get_single_node()
        if node is None:
            return None, []
        _count_values(node, {})
        problems = find_changed_scalars(node, loader.construct_object)
        return (None, problems) if problems else (_construct(node, loader), [])
    finally:
        loader.dispose()


def _construct(node: yaml.Node, loader: _Loader) -> Any:
    """As `construct_document`, in a third of the time. PyYAML still reads everything but plain
    mappings, lists and texts.
    """
    kind = node.tag.removeprefix(_TAG)
    if isinstance(node, yaml.ScalarNode) and kind == "str":
        return node.value
    if isinstance(node, yaml.SequenceNode) and kind == "seq":
        return [_construct(item, loader) for item in node.value]
    if (
        isinstance(node, yaml.MappingNode)
        and kind == "map"
        and all(isinstance(key, yaml.ScalarNode) and key.tag == _TEXT for key, _ in node.value)
    ):
        return {key.value: _construct(value, loader) for key, value in node.value}
    return loader.construct_object(node, deep=True)


def _count_values(node: yaml.Node, counts: dict[int, int]) -> int:
    """The number of values at and below a node, each counted as often as aliases repeat it.

    `counts` maps the `id` of a counted node to its number, and of a node in progress to 0.
    """
    if id(node) in counts:
        if not counts[id(node)]:
            raise _refuse("an alias is inside the value that it repeats", node)
        return counts[id(node)]
    counts[id(node)], total = 0, 1
    if isinstance(node, yaml.MappingNode):
        names: set[tuple[str, str]] = set()
        for key, value in node.value:
            total += _count_values(key, counts) + _count_values(value, counts)
            if isinstance(key, yaml.ScalarNode) and key.tag != "tag:yaml.org,2002:merge":
                if (key.tag, key.value) in names:
                    raise _refuse(f"found duplicate key {key.value}", key)
                names.add((key.tag, key.value))
    elif isinstance(node, yaml.SequenceNode):
        total += sum(_count_values(item, counts) for item in node.value)
    if total > _MAX_VALUES:
        raise _refuse(f"holds more than {_MAX_VALUES:,} values, aliases expanded", node)
    counts[id(node)] = total
    return total


def _refuse(what: str, node: yaml.Node) -> yaml.YAMLError:
    return yaml.constructor.ConstructorError(None, None, what, node.start_mark)


def _load(
    text: str, overrides: Sequence[str], overridden: frozenset[str]
) -> tuple[Any, list[Problem]]:
    """The text with overrides applied, as plain dicts and lists, or the problems that prevent
    that.
    """
    is_in_text = True
    try:
        container, problems = _read_plainly(text)
        problems += _find_changed_overrides(overrides)
        if problems:
            return None, problems
        container = {} if container is None else container
        if type(container) is not dict:
            return None, [Problem("(file)", "must be a mapping of sections", 1)]
        if overrides:
            is_in_text = False
            changes = OmegaConf.from_dotlist(list(overrides))
            if problems := _refuse_parts_of_lists(container, overridden):
                return None, problems
            merged = _merge_overrides(OmegaConf.create(container), changes, overridden)
            container = OmegaConf.to_container(merged, resolve=False, throw_on_missing=True)
            container = _map_texts(escape_missing, container)  # OmegaConf removed the backslash
        return container, []
    # OmegaConf raises AssertionError, IndexError and others in addition to its own errors.
    except Exception as error:
        return None, [describe_error(error, text, overridden, is_in_text=is_in_text)]


def _find_changed_overrides(overrides: Sequence[str]) -> list[Problem]:
    """The problems that `_read_plainly` finds in the values of overrides. OmegaConf reports those
    that are not YAML.
    """
    problems: list[Problem] = []
    for override in overrides:
        key, _, text = override.partition("=")
        try:
            found = _read_plainly(text)[1]
        except (yaml.YAMLError, ValueError):
            continue
        for one in found:
            place = f"{key}.{one.key}" if one.key else key
            problems.append(Problem(place, one.what))
    return problems


def _map_texts(function: Callable[[str], Any], value: Any) -> Any:
    """A value with each of its texts replaced, except keys."""
    if isinstance(value, str):
        return function(value)
    if isinstance(value, dict):
        return {key: _map_texts(function, item) for key, item in value.items()}
    if isinstance(value, list):
        return [_map_texts(function, item) for item in value]
    return value


# Keys that hold one section or a list of several.
_ONE_OR_MANY_KEYS: Final = ("data.train",)


def _refuse_parts_of_lists(container: Any, overridden: frozenset[str]) -> list[Problem]:
    """A problem for each override inside a list of sections: it does not say which section."""
    problems = []
    for key in _ONE_OR_MANY_KEYS:
        value = container
        for name in key.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        parts = sorted(name for name in overridden if name.startswith((f"{key}.", f"{key}[")))
        if isinstance(value, list) and parts and key not in overridden:
            problems += [
                Problem(name, f"`{key}` is a list here: override the whole list, {key}=[...]")
                for name in parts
            ]
    return problems


def _merge_overrides(
    config: DictConfig, overrides: DictConfig, overridden: frozenset[str]
) -> DictConfig:
    for key in _ONE_OR_MANY_KEYS:
        before, after = OmegaConf.select(config, key), OmegaConf.select(overrides, key)
        # OmegaConf cannot merge one section with a list of several.
        if key in overridden and OmegaConf.is_list(before) != OmegaConf.is_list(after):
            OmegaConf.update(config, key, after, merge=False)
    for key in _KIND_KEYS:
        kind = OmegaConf.select(overrides, key)
        if kind is not None and kind != OmegaConf.select(config, key):
            OmegaConf.update(config, key.rpartition(".")[0], {}, merge=False)
    merged = OmegaConf.merge(config, overrides)
    assert isinstance(merged, DictConfig)
    return merged
