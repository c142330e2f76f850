"""A YAML-recipe-driven runner of supervised fine-tuning experiments.

In Python: `load_recipe`, `load_runs` and `build_report`, which are described in `runner.api`. They
are imported when they are first used, so that importing the package costs nothing.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from runner.api import build_report, load_recipe, load_runs

__version__ = "0.1.0"
__all__ = ["build_report", "load_recipe", "load_runs"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module("runner.api"), name)


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
