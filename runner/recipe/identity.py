"""Two hashes for two questions: is this the same experiment, and may this checkpoint be continued
bit for bit?

`recipe_digest` covers everything that changes the experiment, data and base model and chat template
by content, and nothing that only says where it runs. `resume_fingerprint` adds world size,
micro-batch, threads and library versions.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterable, Mapping
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any, Final

import yaml

from runner.errors import CorruptFileError, DataError
from runner.files import hash_file, hash_json, load_json, write_json_atomic
from runner.recipe.parse import Recipe, derive_accumulation, derive_eval_batch, derive_micro_batch

# What only says where a run runs, how it is drawn or how its global batch is cut.
_PLACEMENT_SECTIONS: Final = frozenset({"run", "launch", "tracking"})
_PLACEMENT_KEYS: Final = {
    "training": frozenset({"per_device_train_batch_size", "gradient_accumulation_steps"}),
    "evaluation": frozenset({"per_device_eval_batch_size"}),
    # How long checkpoints are kept, and where: the best one always stays, so nothing that is
    # computed depends on it.
    "checkpoints": frozenset({"keep_latest", "keep_best", "save_optimizer", "archive", "remote"}),
}
# Of an accelerate config: where processes start and how they find each other.
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
        "num_machines",  # the fingerprint has those that the recipe states
        "num_processes",
        "rdzv_backend",
        "same_network",
    }
)
_DEMO_MODELS: Final = (
    # Built by `runner demo-models`; never to be asked of the hub, where such a name is free.
    "demo_models/"
)
# A file that was written this recently may be written again under the same modification time.
_SETTLED_AFTER_NANOSECONDS: Final = 2_000_000_000
LIBRARIES: Final = (
    "torch",
    "transformers",
    "trl",
    "peft",
    "accelerate",
    "bitsandbytes",
    "deepspeed",
)


class ContentHashes:
    """SHA-256 of files and folders, cached by size, mtime and inode in one JSON file."""

    def __init__(self, cache_path: Path) -> None:
        self._cache_path = cache_path
        self._cache = _load_cache(cache_path)
        self._is_changed = False

    def known(self, path: Path) -> str | None:
        """The hash if it is cached for the file as it is now; nothing is read."""
        if path.is_dir():
            parts = {str(file.relative_to(path)): self.known(file) for file in _files_in(path)}
            return None if None in parts.values() else hash_json(parts)
        try:
            state = path.stat()
        except OSError:
            return None
        entry = self._cache.get(str(path.resolve()))
        return (
            entry[3]
            if entry and entry[:3] == [state.st_size, state.st_mtime_ns, state.st_ino]
            else None
        )

    def hash(self, path: Path) -> str:
        """The hash of a file's bytes, or of a folder's relative names and their bytes."""
        if path.is_dir():
            return hash_json(
                {str(file.relative_to(path)): self.hash(file) for file in _files_in(path)}
            )
        if (known := self.known(path)) is not None:
            return known
        state, digest = path.stat(), hash_file(path)
        if time.time_ns() - state.st_mtime_ns > _SETTLED_AFTER_NANOSECONDS:
            self._cache[str(path.resolve())] = [
                state.st_size,
                state.st_mtime_ns,
                state.st_ino,
                digest,
            ]
            self._is_changed = True
        return digest

    def save(self) -> None:
        """Write the cache; a cache that is lost or overwritten by another process only costs
        time.
        """
        if self._is_changed:
            # A full disk stops those runs that need it, not every command.
            with contextlib.suppress(OSError):
                write_json_atomic(
                    self._cache_path, {**_load_cache(self._cache_path), **self._cache}
                )
            self._is_changed = False


def _load_cache(path: Path) -> dict[str, list[Any]]:
    try:
        cache = load_json(path)
    except (CorruptFileError, OSError):
        return {}
    entries = cache.items() if isinstance(cache, dict) else ()
    return {name: entry for name, entry in entries if isinstance(entry, list) and len(entry) == 4}


def _files_in(folder: Path) -> list[Path]:
    """Its files at any depth, without hidden ones and hidden folders: downloads keep time stamps
    there.
    """
    files = (path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir())
    # A hidden part shows as a dot at the start, or behind a slash.
    return [folder / file for file in sorted(files) if "/." not in f"/{file.as_posix()}"]


def list_content_paths(recipe: Recipe) -> dict[str, str]:
    """`dotted key -> relative path` of what the recipe names by path; hub ids name themselves by
    revision.
    """
    named = {
        "model.path": recipe.model.path,
        "model.chat_template": recipe.model.chat_template,
        "data.train.path": recipe.data.train.path,
        "data.validation.path": recipe.data.validation and recipe.data.validation.path,
        "data.test.path": recipe.data.test and recipe.data.test.path,
    }
    return {
        key: path
        for key, path in named.items()
        if path and (Path(path).exists() or _is_surely_local(key, path))
    }


def _is_surely_local(key: str, path: str) -> bool:
    """A hub id is `name` or `owner/name`; anything else is a path, whether or not it is there."""
    has_file_suffix = Path(path).suffix in (".json", ".jsonl", ".csv", ".parquet", ".jinja")
    if path.startswith(_DEMO_MODELS):
        return True
    return (
        key == "model.chat_template"
        or has_file_suffix
        or path.startswith((".", "/", "~"))
        or path.count("/") > 1
    )


def list_missing_files(recipe: Recipe) -> dict[str, str]:
    """`dotted key -> path` of what the recipe names by path and is not there, content or not."""
    named = {
        **list_content_paths(recipe),
        "launch.accelerate_config": recipe.launch.accelerate_config,
    }
    return {key: path for key, path in named.items() if not Path(path).exists()}


def hint_at_missing(paths: Iterable[str]) -> str:
    """How files come to be there that a recipe names."""
    if any(path.startswith(_DEMO_MODELS) for path in paths):
        return "runner demo-models  # builds the demo's models"
    return (
        "paths are relative to the folder where `runner` is started; replace them in the recipe"
        " template, or for one launch with an override such as data.train.path=FILE"
    )


def hash_contents(recipe: Recipe, hashes: ContentHashes) -> dict[str, str]:
    """`relative path -> SHA-256` of everything that the recipe names by path.

    Raises:
        DataError: a file is missing (all missing ones are named) or cannot be read.
    """
    if missing := list_missing_files(recipe):
        raise DataError(
            f"recipe {recipe.run.name} names files that are not there:\n"
            + "\n".join(f"  {key}: {path}" for key, path in missing.items()),
            hint=hint_at_missing(missing.values()),
        )
    paths = list_content_paths(recipe)
    try:
        contents = {path: hashes.hash(Path(path)) for path in sorted(set(paths.values()))}
    except OSError as error:
        raise DataError(
            f"recipe {recipe.run.name} names a file that cannot be read: {error}"
        ) from None
    hashes.save()
    return contents


def known_contents(recipe: Recipe, hashes: ContentHashes) -> dict[str, str]:
    """As `hash_contents`, for what is cached and still there; reads no file."""
    known = {
        path: hashes.known(Path(path))
        for path in list_content_paths(recipe).values()
        if Path(path).exists()
    }
    return {path: digest for path, digest in known.items() if digest is not None}


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
    return payload


def derive_digest(recipe: Recipe, contents: Mapping[str, str]) -> str:
    """`recipe_digest`: equal for two recipes exactly when they are the same experiment."""
    return hash_json({"recipe": build_digest_payload(recipe), "contents": dict(contents)})


def list_library_versions() -> dict[str, str]:
    """Versions of Python and of the libraries that can move a loss."""
    return dict(_read_library_versions())


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
    """What must be equal for a checkpoint to be continued bit for bit.

    `divisor` is `Attempt.micro_batch_divisor`; `threads` is OMP_NUM_THREADS of a trainer, None
    while nobody knows it.
    """
    stated = recipe.launch.num_cpu_threads_per_process
    threads = threads if threads is not None or stated is None else str(stated)
    return {
        "recipe_digest": recipe_digest,
        "num_processes": num_processes,
        "num_machines": recipe.launch.num_machines,
        "per_device_train_batch_size": derive_micro_batch(recipe, divisor),
        # Moves the last bits of a score.
        "per_device_eval_batch_size": derive_eval_batch(recipe, divisor),
        "gradient_accumulation_steps": derive_accumulation(recipe, num_processes, divisor),
        "accelerate_config": load_launch_settings(Path(recipe.launch.accelerate_config)),
        "num_cpu_threads_per_process": stated,
        # Differences here are allowed or not, as the recipe says: without threads in it they follow
        # the free cores.
        "versions": (
            list_library_versions() | ({} if threads is None else {"OMP_NUM_THREADS": threads})
        ),
    }


def load_launch_settings(path: Path) -> Any:
    """What an accelerate config and the DeepSpeed file that it names say of the training; a text if
    one is not there.

    Its own name and where processes start are left out: neither can move a loss.
    """
    try:
        settings = yaml.safe_load(path.read_bytes())
    except FileNotFoundError:
        return f"{path} is not there"
    except (OSError, yaml.YAMLError) as error:
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
    if before == after:
        return []
    return [f"{prefix.removesuffix('.')}: {json.dumps(before)} -> {json.dumps(after)}"]
