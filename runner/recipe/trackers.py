"""The packages that each experiment tracker needs. Imports none of them."""

from __future__ import annotations

import importlib.util
from typing import Final

from runner.errors import RunnerError
from runner.recipe.parse import Recipe

# `tracker -> (modules, one of which must be installed; packages to install)`
PACKAGES: Final[dict[str, tuple[tuple[str, ...], str]]] = {
    "azure_ml": (("azureml",), "azureml-core"),
    "clearml": (("clearml",), "clearml"),
    "codecarbon": (("codecarbon",), "codecarbon"),
    "comet_ml": (("comet_ml",), "comet-ml"),
    "dagshub": (("dagshub",), "dagshub mlflow"),
    "dvclive": (("dvclive",), "dvclive"),
    "flyte": (("flytekit",), "flytekit"),
    "kubeflow": ((), ""),  # needs its environment, no package
    "mlflow": (("mlflow",), "mlflow"),
    "neptune": (("neptune",), "neptune"),
    "swanlab": (("swanlab",), "swanlab"),
    "tensorboard": (("tensorboard", "tensorboardX"), "'recipe-runner[tensorboard]'"),
    "trackio": (("trackio",), "trackio"),
    "wandb": (("wandb",), "'recipe-runner[wandb]'"),
}


def require_trackers(recipe: Recipe) -> None:
    """Check that every tracker of the recipe is installed.

    Raises:
        RunnerError: one is missing; the hint has the command that installs it.
    """
    for name in recipe.tracking.report_to:
        modules, package = PACKAGES[name]
        if modules and not any(importlib.util.find_spec(module) for module in modules):
            raise RunnerError(
                f"`tracking.report_to` names {name}, which is not installed",
                hint=f"pip install {package}, or launch with tracking.report_to=[]",
            )
