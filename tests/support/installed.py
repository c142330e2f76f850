"""Folders that look like installed packages on Python's path."""

from __future__ import annotations

import json
from pathlib import Path


def install_editable(folder: Path, name: str, *, is_editable: bool = True) -> None:
    """Write the files that an installer writes next to an editable package."""
    info = folder / f"{name.replace('-', '_')}-1.0.dist-info"
    info.mkdir(exist_ok=True)
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    origin = {"url": f"file:///src/{name}", "dir_info": {"editable": is_editable}}
    (info / "direct_url.json").write_text(json.dumps(origin))
