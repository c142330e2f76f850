"""Names of the phases before training, as shown in `progress.json`.

The first word is the kind of phase: the launch side allows `compiling`, `downloading`, `uploading`
and `waiting` more silent time than others.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import constants, try_to_load_from_cache

from runner.checkpoints.restore import Phase
from runner.recipe.data_files import name_format
from runner.recipe.data_section import DataSection, DataSource
from runner.recipe.hub import find_prepared, is_commit
from runner.recipe.schema import ModelSection
from runner.sft.startup import uses_deepspeed

_WEIGHTS: tuple[str, ...] = ("model.safetensors", "model.safetensors.index.json")


def name_tokenizer_phase(model: ModelSection) -> str:
    """The phase of loading the tokenizer, or downloading it if the hub's cache lacks its files."""
    is_here = _is_local(model) or _find_cached(model, "tokenizer_config.json") is not None
    return "loading the tokenizer" if is_here else f"downloading the tokenizer of {model.path}"


def name_model_phase(model: ModelSection) -> str:
    """The phase of loading the weights, or downloading them if the hub's cache lacks a file."""
    is_here = _is_local(model) or _has_weights(model)
    return "loading the model" if is_here else f"downloading {model.path}"


def _is_local(model: ModelSection) -> bool:
    return Path(model.path).is_dir() or constants.HF_HUB_OFFLINE


def _has_weights(model: ModelSection) -> bool:
    whole, index = (_find_cached(model, name) for name in _WEIGHTS)
    if whole is not None or index is None:
        return whole is not None
    files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    return all(_find_cached(model, file) is not None for file in files)


def _find_cached(model: ModelSection, file: str) -> Path | None:
    try:
        found = try_to_load_from_cache(model.path, file, revision=model.revision)
    except ValueError:  # not a hub id
        return None
    return Path(found) if isinstance(found, str) else None


def name_rows_phase(data: DataSection) -> str:
    """The phase of reading rows, or downloading the hub's data sets that are not cached here."""
    sources = [*data.train_sources, data.validation, data.test]
    missing = [
        source.path
        for source in sources
        if source is not None
        and not Path(source.path).exists()
        and name_format(Path(source.path)) is None
        and not _is_data_set_cached(source)
    ]
    if not missing or constants.HF_HUB_OFFLINE:
        return "reading rows"
    return f"downloading {', '.join(dict.fromkeys(missing))}"


def _is_data_set_cached(source: DataSource) -> bool:
    if is_commit(source.revision):
        return bool(find_prepared(source.path, source.revision))
    from datasets import config
    from datasets.naming import camelcase_to_snakecase

    *owner, own = source.path.split("/")
    folder = "___".join([*owner, camelcase_to_snakecase(own)])
    return (Path(config.HF_DATASETS_CACHE) / folder).is_dir()


def announce_compilations(phase: Phase) -> None:
    """From now on, show each extension that DeepSpeed compiles, or waits for, as a separate phase.

    DeepSpeed compiles an extension when it first needs it: the first one while the processes
    connect, the optimizer's as training begins. It has no hook for this, so its `jit_load` is
    wrapped here.
    """
    if not uses_deepspeed():
        return
    from deepspeed.ops.op_builder.builder import OpBuilder

    load = OpBuilder.jit_load

    def load_in_phase(builder: Any, *arguments: Any, **keywords: Any) -> Any:
        name = name_compilation(builder.name)
        if name is None:
            return load(builder, *arguments, **keywords)
        with phase(name):
            return load(builder, *arguments, **keywords)

    OpBuilder.jit_load = load_in_phase


def name_compilation(extension: str) -> str | None:
    """The phase in which DeepSpeed loads an extension; None if it is already built."""
    from torch.utils.cpp_extension import _get_build_directory

    folder = Path(_get_build_directory(extension, verbose=False))
    if (folder / "lock").exists():
        return f"waiting for another process that compiles in {folder}"
    if any(_list_built(folder, extension)):
        return None
    return f"compiling DeepSpeed's extension {extension}"


def _list_built(folder: Path, extension: str) -> Iterator[Path]:
    return folder.glob(f"{extension}*.so")  # torch adds a version number if one has changed
