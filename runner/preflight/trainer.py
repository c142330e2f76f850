"""Builds a trainer for each distinct set of training arguments, on the CPU and around a model of a
few hundred weights.

This finds what the libraries refuse before a run loads its model. Owns the substitutes for settings
that depend on the device, and the search for the recipe key that causes an error.
"""

from __future__ import annotations

import copy
import inspect
import json
import logging
import math
import tempfile
import warnings
from collections.abc import Collection, Iterator, Mapping, MutableMapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Final

from runner.errors import RefusedError, RunnerError
from runner.model.size import load_config
from runner.preflight.survey import CheckResult
from runner.recipe.identity import load_launch_settings
from runner.recipe.parse import Recipe
from runner.recipe.schedule import derive_schedule
from runner.sft.arguments import build_config, list_arguments
from runner.text import format_count

Arguments = Mapping[str, Any]

# Used if the rows cannot be read, which is a separate error.
_SOME_ROWS: Final = 1000
# They cause no errors, and may differ for each run of a grid.
_OF_ONE_RUN: Final = ("output_dir", "run_name", "project", "seed", "metric_for_best_model")
# Settings that need the device, and their substitutes.
_WITHOUT_DEVICE: Final[Arguments] = {
    "bf16": False,
    "fp16": False,
    "tf32": None,
    "activation_offloading": False,
}
# Settings that need the real model (see `_check_router` and the unchecked ones), or that would
# change this process.
_ALWAYS: Final[Arguments] = {
    "router_aux_loss_coef": None,
    "full_determinism": False,
}
# Settings that take effect only when the real model is trained.
_NOT_UNTIL_TRAINING: Final = (
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "use_liger_kernel",
)
_ALL_MODULES: Final = "all-linear"
# Argument -> the argument without which it is not read.
_READ_ONLY_WITH: Final = {
    "gradient_checkpointing_kwargs": "gradient_checkpointing",
    "liger_kernel_config": "use_liger_kernel",
}
# Arguments that some optimizers ignore, and another value of each.
_OF_SOME_OPTIMIZERS: Final[Arguments] = {
    "adam_beta1": 0.125,
    "adam_beta2": 0.125,
    "adam_epsilon": 0.125,
    "optim_target_modules": "another",
}
# They accept no `lr_scheduler_kwargs`; Transformers drops those silently.
_PLAIN_SCHEDULES: Final = ("constant", "constant_with_warmup")
_MAX_SAMPLED_UPDATES: Final = 200


@dataclass(frozen=True)
class _Failure:
    """An error, and how many parts of the trainer had been built before it."""

    stage: int
    error: Exception

    @property
    def key(self) -> tuple[int, str]:
        """Equal for failures that read the same."""
        return self.stage, str(self.error)


@dataclass(frozen=True)
class _Findings:
    errors: tuple[RunnerError, ...]
    doubts: tuple[str, ...]


def check_trainers(recipes: Sequence[Recipe], result: CheckResult) -> None:
    """Add to `result` the arguments that no trainer can be built from, those without effect, and
    those that cannot be checked here.
    """
    schedules = {run.name: run.schedule for run in result.runs}
    findings: dict[str, _Findings] = {}
    known: dict[tuple[int, str], dict[str, Any]] = {}
    with tempfile.TemporaryDirectory() as folder, _silence():
        for recipe in recipes:
            name = recipe.run.full_name
            schedule = schedules.get(name) or derive_schedule(
                recipe, recipe.data.num_train_samples or _SOME_ROWS
            )
            arguments, unchecked = replace_arguments(recipe, Path(folder))
            for text in unchecked:
                result.leave_unchecked(text, name)
            shared = {key: value for key, value in arguments.items() if key not in _OF_ONE_RUN}
            key = json.dumps([shared, schedule.num_updates])
            if key not in findings:
                stated = _list_stated(recipe)
                errors = tuple(_find_errors(arguments, stated, schedule.num_updates, known))
                doubts = () if errors else tuple(_find_doubts(arguments, stated))
                findings[key] = _Findings(errors, doubts)
            for error in findings[key].errors:
                result.fail(error, name)
            for doubt in findings[key].doubts:
                result.warn(doubt, name)
            _check_router(recipe, result)


def replace_arguments(recipe: Recipe, output_dir: Path) -> tuple[dict[str, Any], list[str]]:
    """The arguments of the recipe's trainer, adapted to a CPU and a small model, and a description
    of everything that they do not check.
    """
    path = recipe.launch.accelerate_config
    settings = load_launch_settings(Path(path))
    settings = settings if isinstance(settings, dict) else {}
    uses_cpu = bool(settings.get("use_cpu"))
    arguments = list_arguments(
        recipe, output_dir, num_processes=recipe.launch.num_processes, uses_cpu=True
    )
    unchecked = []
    for name, value in {} if uses_cpu else _WITHOUT_DEVICE.items():
        if arguments.get(name):
            unchecked.append(f"`training.{name}`")
            arguments[name] = value
    arguments |= {name: value for name, value in _ALWAYS.items() if name in arguments}
    if arguments.get("optim_target_modules"):
        unchecked.append("which modules `training.optim_target_modules` finds")
        arguments["optim_target_modules"] = _ALL_MODULES
    for name in _NOT_UNTIL_TRAINING:
        if arguments.get(name):
            unchecked.append(f"`training.{name}`")
    kind = str(settings.get("distributed_type", "NO"))
    if kind in ("DEEPSPEED", "FSDP"):
        unchecked.append(f"{'DeepSpeed' if kind == 'DEEPSPEED' else kind} of {path}")
    return arguments, unchecked


def _list_stated(recipe: Recipe) -> list[str]:
    """The arguments that the recipe itself states."""
    own = [name for name in ("bf16", "fp16") if getattr(recipe.training, name)]
    return [*recipe.training.hugging_face_arguments(), *own]


def _check_router(recipe: Recipe, result: CheckResult) -> None:
    """Refuse a weight of the router's loss for a model without a router, as TRL does."""
    coefficient = recipe.training.hugging_face_arguments().get("router_aux_loss_coef")
    facts = result.tokenizers.get(recipe.model.model_dump_json())
    if not coefficient or facts is None:
        return
    try:
        config = load_config(recipe, facts.tokenizer)
    except RunnerError:  # reported when the model is measured
        return
    if not hasattr(config.get_text_config(), "output_router_logits"):
        problem = f"{recipe.model.path} has no router: it is not a mixture of experts"
        shown = _show("router_aux_loss_coef", coefficient)
        result.fail(RefusedError(f"{shown}: {problem}"), recipe.run.full_name)


def _find_errors(
    arguments: Arguments,
    stated: Sequence[str],
    num_updates: int,
    known: dict[tuple[int, str], dict[str, Any]],
) -> Iterator[RunnerError]:
    """Yield one error per mistake: the cause of each is left out before the next search.

    `known` keeps the causes of each failure, since runs that differ elsewhere share mistakes.
    """
    while (failure := _try_to_build(arguments, num_updates)) is not None:
        causes = known.get(failure.key)
        if causes is None or any(arguments.get(name) != causes[name] for name in causes):
            found = _find_causes(arguments, stated, num_updates, failure)
            known[failure.key] = causes = {name: arguments[name] for name in found}
        yield _word_failure(arguments, causes, failure.error)
        if not causes:
            return
        for name in causes:
            arguments = _leave_out(arguments, name)
        stated = [name for name in stated if name not in causes]


def _find_causes(
    arguments: Arguments, stated: Sequence[str], num_updates: int, failure: _Failure
) -> list[str]:
    """The stated arguments without which the trainer gets furthest."""
    reached: dict[str, float] = {}
    for name in stated:
        other = _try_to_build(_leave_out(arguments, name), num_updates)
        if other is None:
            reached[name] = math.inf
        elif other.key != failure.key:
            reached[name] = other.stage
    furthest = max(reached.values(), default=0)
    return [name for name in stated if reached.get(name) == furthest]


def _leave_out(arguments: Arguments, name: str) -> dict[str, Any]:
    without = {key: value for key, value in arguments.items() if key != name}
    # TRL's default of one depends on the other.
    return without | {name: False} if name in ("bf16", "fp16") else without


def _word_failure(arguments: Arguments, causes: Collection[str], error: Exception) -> RunnerError:
    reason = str(error).strip() or type(error).__name__
    if isinstance(error, KeyError):
        reason = f"{error.args[0]!r} is not known"
    places = " with ".join(_show(name, arguments[name]) for name in causes) or "`training`"
    hint = None
    if {"lr_scheduler_type", "lr_scheduler_kwargs"} & set(causes):
        hint = _describe_schedule_arguments(str(arguments.get("lr_scheduler_type", "linear")))
    return RefusedError(f"{places}: the trainer would not start: {reason}", hint=hint)


def _show(name: str, value: Any) -> str:
    text = value if isinstance(value, str) else json.dumps(value)
    return f"`training.{name}: {text if len(text) <= 80 else text[:77] + '...'}`"


def _describe_schedule_arguments(kind: str) -> str:
    from transformers.optimization import TYPE_TO_SCHEDULER_FUNCTION
    from transformers.trainer_utils import SchedulerType

    ours = {"optimizer", "num_warmup_steps", "num_training_steps", "last_epoch"}
    function = TYPE_TO_SCHEDULER_FUNCTION[SchedulerType(kind)]
    parameters = [
        parameter
        for parameter in inspect.signature(function).parameters.values()
        if parameter.name not in ours
    ]
    if kind in _PLAIN_SCHEDULES or not parameters:
        return f"`{kind}` takes no `lr_scheduler_kwargs`"
    names = ", ".join(
        f"{one.name} (needed)" if one.default is inspect.Parameter.empty else one.name
        for one in parameters
    )
    return f"`lr_scheduler_kwargs` of `{kind}` are {names}"


def _try_to_build(arguments: Arguments, num_updates: int) -> _Failure | None:
    """Build the trainer up to its first batch; return its failure, or None."""
    stage = 0
    try:
        config = build_config(copy.deepcopy(dict(arguments)))  # the libraries change mappings
        stage = 1
        trainer = _build_trainer(config)
        _require_liger(config)
        stage = 2
        _require_that_arguments_are_read(config)
        trainer.create_optimizer()
        stage = 3
        trainer.create_scheduler(num_training_steps=num_updates)
        _require_usable_rates(trainer.lr_scheduler, num_updates)
        stage = 4
        trainer.get_train_dataloader()
        if config.gradient_checkpointing and config.gradient_checkpointing_kwargs:
            _take_checkpointed_step(trainer)
    except Exception as error:  # the libraries raise all kinds of exceptions
        return _Failure(stage, error)
    return None


@cache
def _build_surroundings() -> tuple[Any, Any, Any]:
    """A data set of one row, its collator and its tokenizer."""
    from datasets import Dataset
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from transformers import PreTrainedTokenizerFast
    from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

    words = Tokenizer(WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, pad_token="b", eos_token="a")
    dataset = Dataset.from_dict({"input_ids": [[0, 1]], "labels": [[0, 1]]})
    return dataset, DataCollatorForLanguageModeling(pad_token_id=1), tokenizer


def _build_trainer(config: Any) -> Any:
    """TRL's trainer around a small model, as `sft.trainer` builds it around a large one."""
    from transformers import LlamaConfig, LlamaForCausalLM
    from trl import SFTTrainer

    dataset, collator, tokenizer = _build_surroundings()
    sizes = {"vocab_size": 4, "hidden_size": 4, "intermediate_size": 4, "num_hidden_layers": 1}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=1, num_key_value_heads=1))
    return SFTTrainer(
        model=model,
        args=config,
        train_dataset=dataset,
        data_collator=collator,
        processing_class=tokenizer,
    )


def _require_liger(config: Any) -> None:
    from transformers.utils import is_liger_kernel_available

    if config.use_liger_kernel and not is_liger_kernel_available():
        raise ImportError("the package liger-kernel is not installed: `pip install liger-kernel`")


class _ReadArguments(MutableMapping[str, str]):
    """Arguments that record which names are read."""

    def __init__(self, values: Mapping[str, str]) -> None:
        self._values = dict(values)
        self.asked: dict[str, None] = {}

    def __getitem__(self, name: str) -> str:
        self.asked[name] = None
        return self._values[name]

    def __contains__(self, name: object) -> bool:
        self.asked[str(name)] = None
        return name in self._values

    def __setitem__(self, name: str, value: str) -> None:
        self._values[name] = value

    def __delitem__(self, name: str) -> None:
        del self._values[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)


def _require_that_arguments_are_read(config: Any) -> None:
    """Refuse arguments of an optimizer or a schedule that Transformers would drop.

    Raises:
        ValueError: one is dropped.
    """
    from transformers.trainer_optimizer import (
        _OPTIMIZER_HANDLERS,
        OptimizerContext,
        _parse_optim_args,
    )

    stated = _parse_optim_args(config.optim_args)
    if stated:
        read = _ReadArguments(stated)
        adam = {"betas": (config.adam_beta1, config.adam_beta2), "eps": config.adam_epsilon}
        context = OptimizerContext(
            config, _small_module(), {"lr": config.learning_rate}, adam, read
        )
        _OPTIMIZER_HANDLERS[config.optim](context)
        unread = [name for name in stated if name not in read.asked]
        if unread:
            known = ", ".join(read.asked) or "no arguments"
            raise ValueError(
                f"`{config.optim.value}` does not read {', '.join(unread)}: it reads {known}"
            )
    kind = config.lr_scheduler_type.value
    if config.lr_scheduler_kwargs and kind in _PLAIN_SCHEDULES:
        raise ValueError(f"`{kind}` would ignore them")


def _small_module() -> Any:
    import torch

    return torch.nn.Sequential(torch.nn.Linear(2, 2))


def _require_usable_rates(scheduler: Any, num_updates: int) -> None:
    """Raises: ValueError, or an error of the schedule itself, if a learning rate is not a number of
    at least 0.
    """
    functions = getattr(scheduler, "lr_lambdas", ())
    count = min(num_updates, _MAX_SAMPLED_UPDATES)
    for function in functions:
        for number in range(count + 1):
            update = number * num_updates // max(1, count)
            factor = function(update)
            if not isinstance(factor, int | float) or not 0 <= factor < math.inf:
                raise ValueError(
                    f"after {update} of {format_count(num_updates, 'update')} the learning rate"
                    f" would be {factor} times the stated one"
                )


def _take_checkpointed_step(trainer: Any) -> None:
    """Run a forward and a backward pass, which read `gradient_checkpointing_kwargs`."""
    import torch

    model = trainer.model
    model.gradient_checkpointing_enable(
        gradient_checkpointing_kwargs=trainer.args.gradient_checkpointing_kwargs
    )
    model.train()
    ids = torch.tensor([[0, 1]])
    model(input_ids=ids, labels=ids).loss.backward()


def _find_doubts(arguments: Arguments, stated: Sequence[str]) -> Iterator[str]:
    """Yield a warning for each argument that the trainer accepts and ignores."""
    for name, needed in _READ_ONLY_WITH.items():
        if arguments.get(name) and not arguments.get(needed):
            yield f"`training.{name}` has no effect without `{needed}: true`"
    config = build_config(arguments)
    for name, other in _OF_SOME_OPTIMIZERS.items():
        if name in stated and arguments[name] is not None:
            changed = copy.copy(config)
            setattr(changed, name, other)
            if _describe_optimizer(config) == _describe_optimizer(changed):
                yield f"`training.{name}` has no effect under `optim: {config.optim.value}`"


def _describe_optimizer(config: Any) -> str:
    from transformers import Trainer

    try:
        return str(Trainer.get_optimizer_cls_and_kwargs(config, _small_module()))
    except Exception as error:  # the other value may be invalid
        return repr(error)


@contextmanager
def _silence() -> Iterator[None]:
    """Silence the libraries: their messages about these trainers do not concern a run. Restores the
    verbosity of Transformers, which `SFTTrainer` changes.
    """
    from transformers.utils import logging as library

    verbosity, disabled = library.get_verbosity(), logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(disabled)
        library.set_verbosity(verbosity)
