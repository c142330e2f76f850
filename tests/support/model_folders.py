"""Folders of models with the files that code checks without loading a model."""

from __future__ import annotations

from pathlib import Path


def make_model_folder(folder: Path) -> None:
    """Make empty files under the names without which no model is loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}\n")
    (folder / "model.safetensors").touch()
