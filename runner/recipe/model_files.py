"""Finds missing files in a model's folder, by their names only."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Final

from runner.errors import CorruptFileError
from runner.files import load_json

CONFIG_NAME: Final = "config.json"
WEIGHTS_NAME: Final = "model.safetensors"
INDEX_NAME: Final = "model.safetensors.index.json"
# PEFT loads the base model that this file names.
_ADAPTER_NAME: Final = "adapter_config.json"
_MAX_INDEX_BYTES: Final = 64 << 20


def find_missing_model_file(folder: Path) -> Path | None:
    """The first file that `from_pretrained` would miss in a folder, None if it has them all.

    Weights are one `model.safetensors`, or the shards that its index names; pickles are never
    loaded. Reads at most the index and `config.json`.
    """
    if not folder.is_dir() or os.path.exists(folder / _ADAPTER_NAME):
        return None
    for name in (CONFIG_NAME, *_list_weights(folder)):
        if not os.path.exists(folder / name):
            return folder / name
    return None


def _list_weights(folder: Path) -> list[str]:
    if os.path.exists(folder / WEIGHTS_NAME):
        return [WEIGHTS_NAME]
    if os.path.exists(folder / INDEX_NAME):
        return _list_shards(folder / INDEX_NAME)
    stated = _load(folder / CONFIG_NAME).get("transformers_weights")
    return [stated if isinstance(stated, str) else WEIGHTS_NAME]


def _list_shards(index: Path) -> list[str]:
    """The shards that an index names; empty if it names none, which loading the model reports."""
    shards = _load(index).get("weight_map")
    names = shards.values() if isinstance(shards, dict) else ()
    return sorted({name for name in names if isinstance(name, str)})


def _load(path: Path) -> dict[str, object]:
    try:
        content = load_json(path, _MAX_INDEX_BYTES)
    except (CorruptFileError, OSError):
        return {}
    return content if isinstance(content, dict) else {}
