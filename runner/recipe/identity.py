"""Two hashes for two questions: is this the same experiment, and can a run resume from this
checkpoint bit for bit?

`recipe_digest` covers everything that changes the experiment, including the contents of data, base
model and chat template, and nothing that only decides where it runs. `resume_fingerprint` adds
world size, micro-batch, threads and library versions.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Final

import yaml

from runner.errors import CorruptFileError
from runner.files import hash_json, load_json
from runner.recipe.evaluation_section import GenerationOn
from runner.recipe.parse import (
    Recipe,
    derive_accumulation,
    derive_answer_batch,
    derive_eval_batch,
    derive_micro_batch,
)

# Sections that only decide where a run runs, how it is tracked or how its global batch is split.
_PLACEMENT_SECTIONS: Final = frozenset({"run", "launch", "tracking"})
_PLACEMENT_KEYS: Final = {
    "training": frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"}),
    "evaluation": frozenset({"per_device_eval_batch_size"}),
    # How long and where checkpoints are kept. The best one always stays, so no result depends on
    # these keys.
    "checkpoints": frozenset({"keep_latest", "keep_best", "save_optimizer", "archive", "remote"}),
}
# Keys that were added after recipes were first hashed, by dotted name, with the value that keeps
# the earlier behavior. A key with this value is left out of the digest, so that older runs keep
# their digests. An added section is listed by its own name, with all its keys.
_BEHAVIOUR_BEFORE: Final[Mapping[str, Any]] = {
    "data.group_column": None,
    "data.ignore": [],
    "data.task.prompt": None,
    "data.task.system": None,
    "data.turns": "all",
    "evaluation.generation.batch_size": None,
    "evaluation.metrics": [],
    "model.chat_template_kwargs": {},
    "model.template_date": None,
    "model.end_of_turn": None,
}
# The version of the rules by which rows are drawn, rendered and masked. Raise it when the same
# recipe produces other rows, tokens or labels than before. A `recipe.json` without a version was
# written under 1.
RULES: Final = 2
# Keys of an accelerate config that only decide where processes start and how they connect.
_PLACEMENT_SETTINGS: Final = frozenset(
    {
        "compute_environment",
        "debug",
        "deepspeed_exclusion_filter",
        "deepspeed_hostfile",
        "deepspeed_inclusion_filter",
        "deepspeed_multinode_launcher",
        "enable_cpu_affinity",
        "gpu_ids",
        "machine_rank",
        "main_process_ip",
        "main_process_port",
        "main_training_function",
        "num_machines",  # the fingerprint holds the recipe's number
        "num_processes",
        "rdzv_backend",
        "same_network",
    }
)
LIBRARIES: Final = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
)


def build_digest_payload(recipe: Recipe) -> dict[str, Any]:
    """The part of a recipe that changes the experiment."""
    dumped = recipe.model_dump(mode="json")
    payload = {
        section: value for section, value in dumped.items() if section not in _PLACEMENT_SECTIONS
    }
    for section, keys in _PLACEMENT_KEYS.items():
        payload[section] = {
            key: value for key, value in payload[section].items() if key not in keys
        }
    payload["training"]["global_batch_size"] = recipe.global_batch_size
    return leave_out(payload, _BEHAVIOUR_BEFORE)


def leave_out(payload: Mapping[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """The payload without the keys that have the given values, by dotted name.

    >>> leave_out({"data": {"path": "a", "turns": "all"}}, {"data.turns": "all", "data.tools": {}})
    {'data': {'path': 'a'}}
    """
    below: dict[str, dict[str, Any]] = {}
    for key, given in values.items():
        name, dot, rest = key.partition(".")
        if dot:
            below.setdefault(name, {})[rest] = given
    kept = {}
    for name, value in payload.items():
        if name in values and value == values[name]:
            continue
        is_searched = name in below and isinstance(value, Mapping)
        kept[name] = leave_out(value, below[name]) if is_searched else value
    return kept


def derive_digest(recipe: Recipe, contents: Mapping[str, str], rules: int = RULES) -> str:
    """`recipe_digest`: equal for two recipes exactly if they are the same experiment.

    `rules` is the version under which the rows were or will be drawn; digests of version 1 leave it
    out.
    """
    stated = {"recipe": build_digest_payload(recipe), "contents": dict(contents)}
    return hash_json(stated if rules == 1 else {**stated, "rules": rules})


def list_library_versions() -> dict[str, str]:
    """The versions of Python and of the libraries that can change a loss, as first read by this
    process.
    """
    return dict(_read_library_versions())


def forget_versions() -> None:
    """Clear the cached versions: a sweep lasts for weeks, and an upgrade takes effect at the next
    attempt.
    """
    _read_library_versions.cache_clear()


@cache
def _read_library_versions() -> dict[str, str]:
    versions = {"python": python_version()}
    for name in LIBRARIES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            versions[name] = "absent"
    return versions


def build_resume_fingerprint(
    recipe: Recipe, recipe_digest: str, num_processes: int, divisor: int = 1, *, threads: str | None
) -> dict[str, Any]:
    """The values that must be equal to resume from a checkpoint bit for bit.

    `divisor` is `Attempt.micro_batch_divisor`; `threads` is OMP_NUM_THREADS of a training process,
    None while it is not known.
    """
    stated = recipe.launch.num_cpu_threads_per_process
    threads = threads if threads is not None or stated is None else str(stated)
    generation = recipe.evaluation.generation
    has_own_batch = isinstance(generation, GenerationOn) and generation.batch_size is not None
    return {
        "recipe_digest": recipe_digest,
        "num_processes": num_processes,
        "num_machines": recipe.launch.num_machines,
        "per_device_train_batch_size": derive_micro_batch(recipe, divisor),
        # It changes the last bits of a score.
        "per_device_eval_batch_size": derive_eval_batch(recipe, divisor),
        # Only if it is stated: older checkpoints do not have it.
        **(
            {"generation_batch_size": derive_answer_batch(recipe, divisor)} if has_own_batch else {}
        ),
        "gradient_accumulation_steps": derive_accumulation(recipe, num_processes, divisor),
        "accelerate_config": load_launch_settings(Path(recipe.launch.accelerate_config)),
        "num_cpu_threads_per_process": stated,
        # The recipe decides if these may differ. If it sets no threads, OMP_NUM_THREADS depends on
        # the free cores.
        "versions": (
            list_library_versions() | ({} if threads is None else {"OMP_NUM_THREADS": threads})
        ),
    }


def load_launch_settings(path: Path) -> Any:
    """The training settings of an accelerate config and of the DeepSpeed file that it names; a text
    in place of a file that does not exist.

    Its file name and the keys that place processes are left out: neither can change a loss.
    """
    try:
        settings = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return f"{path} is not there"
    # For example an impossible date, or endlessly nested mappings.
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        return f"{path} cannot be read: {error}"
    if not isinstance(settings, dict):
        return settings
    kept = {key: value for key, value in settings.items() if key not in _PLACEMENT_SETTINGS}
    deepspeed = kept.get("deepspeed_config")
    if isinstance(deepspeed, dict):
        kept["deepspeed_config"] = {
            key: value for key, value in deepspeed.items() if key not in _PLACEMENT_SETTINGS
        }
        if (name := deepspeed.get("deepspeed_config_file")) is not None:
            kept["deepspeed_config"]["deepspeed_config_file"] = _load_deepspeed_settings(Path(name))
    return kept


def _load_deepspeed_settings(path: Path) -> Any:
    try:
        settings = load_json(path)
    except (CorruptFileError, OSError) as error:
        return f"{path} cannot be read: {error}"
    return f"{path} is not there" if settings is None else settings


def diff_payloads(before: Any, after: Any, prefix: str = "") -> list[str]:
    """One line per dotted key that differs.

    >>> diff_payloads({"loss": "full", "a": {"b": 1}}, {"loss": "completion", "a": {"b": 1}})
    ['loss: "full" -> "completion"']
    """
    if before == after:  # checked first, because most runs match their recipes
        return []
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        keys = list(dict.fromkeys([*before, *after]))
        absent = "(absent)"
        return [
            line
            for key in keys
            for line in diff_payloads(
                before.get(key, absent), after.get(key, absent), f"{prefix}{key}."
            )
        ]
    return [f"{prefix.removesuffix('.')}: {json.dumps(before)} -> {json.dumps(after)}"]
