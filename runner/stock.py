"""The files that come with the runner: stock grids, model cards, chat templates, launch configs, sweeps, data samples.

Owns where they are. They stand at the top of the source tree and nowhere else; a wheel holds them in `runner/stock`.
"""

from __future__ import annotations

from collections.abc import Mapping
from importlib.resources import files
from pathlib import Path
from typing import Final

from runner.errors import RunnerError
from runner.grid import list_grids, suggest

SHARED_FOLDERS: Final = ("accelerate_configs", "ds_configs")
TEMPLATES: Final = "recipe_templates"


def find_package_dir() -> Path:
    """The folder of the package, which holds the starter grid."""
    return Path(str(files("runner")))


def find_stock_dir() -> Path:
    """The folder with `recipe_templates` and the others: inside an installed package, around it in a source tree."""
    package_dir = find_package_dir()
    for folder in (package_dir / "stock", package_dir.parent):
        if (folder / TEMPLATES).is_dir():
            return folder
    raise RunnerError(f"the stock files are missing beside {package_dir}", hint="pip install --force-reinstall .")


def list_stock_grids(stock_dir: Path) -> Mapping[str, str]:
    """Every stock grid and the comment that opens its grid file."""
    titles: dict[str, str] = {}
    for grid in list_grids(stock_dir / TEMPLATES):
        first_line = (stock_dir / TEMPLATES / grid / "grid.yaml").read_text().partition("\n")[0]
        titles[grid] = first_line.lstrip("# ") if first_line.startswith("#") else ""
    return titles


def require_stock_grid(stock_dir: Path, grid: str) -> None:
    """Raises RunnerError, with all that there are, for a name that is no stock grid."""
    titles = list_stock_grids(stock_dir)
    if grid not in titles:
        width = max(map(len, titles))
        listed = "\n".join(f"  {name:<{width}}  {title}" for name, title in titles.items())
        raise RunnerError(f"there is no stock grid {grid!r}{suggest(grid, list(titles))}\n\n{listed}")
