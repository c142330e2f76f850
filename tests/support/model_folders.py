"""Folders of models as far as those look at them who load none."""

from __future__ import annotations

from pathlib import Path


def make_model_folder(folder: Path) -> None:
    """The names of the files without which no model is loaded."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}\n")
    (folder / "model.safetensors").touch()
