"""A place to launch from, shared by all tests: tiny models, a data file, launch configs, one recipe
to vary.

Nothing here imports torch before a test asks for a model.
"""

from __future__ import annotations

import fcntl
import json
import os
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import chdir, contextmanager, redirect_stderr, redirect_stdout, suppress
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any, Final
from unittest.mock import patch

import pytest
from hypothesis import HealthCheck, settings

from runner.cli.main import main
from runner.recipe.parse import Recipe, parse_recipe
from runner.run.paths import RunPaths

# The same examples in every run; `pytest --hypothesis-profile=default` looks at others.
# No limits on time: an example that takes 0.2 s on a busy machine is no failure.
settings.register_profile(
    "repeatable", derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
# New ones each time, and how to repeat what fails: `make fuzz`.
settings.register_profile(
    "fuzz", print_blob=True, deadline=None, suppress_health_check=[HealthCheck.too_slow]
)
settings.load_profile("repeatable")

# A background job of a script starts with some signals ignored, and so would its children,
# too.
for _number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1):
    if signal.getsignal(_number) == signal.SIG_IGN:
        signal.signal(
            _number, signal.default_int_handler if _number == signal.SIGINT else signal.SIG_DFL
        )

ROOT: Final = Path(__file__).resolve().parent.parent
RUNNER: Final = Path(sys.executable).parent / "runner"
NUM_DATA_ROWS: Final = 240

RECIPE_TEXT: Final = """\
run: {grid: tests, name: base, axes: {model: gemma, loss: completion}, schema_version: 1}
model: {path: models/gemma, dtype: float32, attn_implementation: eager}
adapter: {method: lora, r: 4, lora_alpha: 8, lora_dropout: 0.0, target_modules: all-linear}
quantization: {method: none}
data:
  train: {path: data.jsonl}
  task: {name: conversations}
  num_train_samples: 22
  num_validation_samples: 12
  num_test_samples: 15
  seed: 7
  max_length: 160
loss: completion
training:
  seed: 3
  global_batch_size: 4
  per_device_train_batch_size: 2
  num_train_epochs: 2
  learning_rate: 1e-2
  lr_scheduler_type: linear
  max_grad_norm: 1.0
  gradient_checkpointing: false
evaluation: {eval_strategy: steps, eval_steps: 4, per_device_eval_batch_size: 8}
early_stopping: {enabled: false}
checkpoints: {save_strategy: steps, save_steps: 4, keep_latest: 2}
launch:
  accelerate_config: accelerate_configs/cpu.yaml
  num_processes: 1
  num_cpu_threads_per_process: 1
  retries: {transient: 0, lost: 0}
"""


def run_cli(
    arguments: Sequence[str | Path], cwd: Path, *, environment: Mapping[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    """The real console script in its own process; the caller checks the exit code."""
    return subprocess.run(
        [str(RUNNER), *map(str, arguments)],
        cwd=cwd,
        env=build_environment(environment),
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )


def build_environment(extra: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment: no hub, and one thread, because two on busy cores can be ten
    times slower.
    """
    return {**os.environ, "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", **(extra or {})}


@dataclass(frozen=True)
class Project:
    """A folder to start `runner` from: launch configs, `data.jsonl` and `recipe.yaml`; models on
    demand.
    """

    root: Path
    _tiny_model: Callable[[str], Path]

    @property
    def recipe_path(self) -> Path:
        """The recipe that the tests vary by overrides."""
        return self.root / "recipe.yaml"

    def recipe(self, *overrides: str) -> Recipe:
        """The recipe under overrides, as the launch side parses it."""
        return parse_recipe(
            self.recipe_path.read_text(), where=str(self.recipe_path), overrides=overrides
        )

    def write_recipe(self, path: str, *overrides: str) -> Path:
        """The recipe with overrides as a separate recipe, named after its file."""
        merged = self.recipe(*overrides, f"run.name={Path(path).stem}").model_dump(mode="json")
        target = self.root / path
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(merged, indent=1))
        return target

    def add_model(self, family: str = "gemma") -> Path:
        """`models/<family>`, the tiny model of that family."""
        link = self.root / "models" / family
        if not link.exists():
            link.parent.mkdir(exist_ok=True)
            with suppress(FileExistsError):  # another worker of pytest-xdist was faster
                link.symlink_to(self._tiny_model(family))
        return link

    def paths(self, name: str) -> RunPaths:
        """The files of a run of the recipe's grid."""
        return RunPaths(self.root / "runs" / "tests" / name)

    def cli(
        self, *arguments: str | Path, environment: Mapping[str, str] | None = None
    ) -> subprocess.CompletedProcess[str]:
        """`runner ARGUMENTS`, started here."""
        return run_cli(arguments, self.root, environment=environment)

    def call(self, *arguments: str | Path) -> subprocess.CompletedProcess[str]:
        """The same in this process. `runner check` imports torch, which takes a new process
        seconds.
        """
        import huggingface_hub.constants  # reads the variable once, outside of this call

        words, out, err = [str(one) for one in arguments], StringIO(), StringIO()
        is_hidden = sys.modules.get("wandb", self) is None
        try:
            with (
                chdir(self.root),
                patch.dict(os.environ, {"HF_HUB_OFFLINE": "1"}),
                patch.object(huggingface_hub.constants, "HF_HUB_OFFLINE", True),
                warnings.catch_warnings(),
                redirect_stdout(out),
                redirect_stderr(err),
            ):
                code = main(words)
        finally:
            # `check` hides it until its process ends.
            if not is_hidden and sys.modules.get("wandb", self) is None:
                del sys.modules["wandb"]
        return subprocess.CompletedProcess(words, code, out.getvalue(), err.getvalue())


def make_project(root: Path, data_path: Path, tiny_model: Callable[[str], Path]) -> Project:
    """Fill a folder with links to the launch configs and the data, and a copy of the recipe."""
    for name in ("accelerate_configs", "ds_configs"):
        (root / name).symlink_to(ROOT / name)
    (root / "data.jsonl").symlink_to(data_path)
    (root / "recipe.yaml").write_text(RECIPE_TEXT)
    return Project(root, tiny_model)


@contextmanager
def shared_folder(tmp_path_factory: pytest.TempPathFactory, name: str) -> Iterator[Path]:
    """A folder that is the same for all workers of pytest-xdist; only one of them at a time is in
    here.
    """
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / name
    folder.mkdir(exist_ok=True)
    with folder.with_suffix(".lock").open("a") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`family -> folder` with a random model of that family; each is built once per session, when
    first asked for.
    """

    def build(family: str) -> Path:
        from runner.demo.weights import build_tiny_model

        with shared_folder(tmp_path_factory, "tiny_models") as models_dir:
            model_dir = models_dir / family
            return model_dir if model_dir.exists() else build_tiny_model(family, model_dir)

    return build


@pytest.fixture(scope="session")
def data_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A JSONL file of short conversations of different lengths, none of them twice."""
    from runner.demo.corpus import general_exchanges

    rows: dict[str, dict[str, Any]] = {}
    for messages in general_exchanges(2 * NUM_DATA_ROWS, seed=11):
        rows.setdefault(json.dumps(messages), {"messages": messages})
    path = tmp_path_factory.mktemp("data") / "data.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in list(rows.values())[:NUM_DATA_ROWS]))
    return path


@pytest.fixture
def project(tmp_path: Path, data_path: Path, tiny_model: Callable[[str], Path]) -> Project:
    """A fresh folder to launch from."""
    return make_project(tmp_path, data_path, tiny_model)


@pytest.fixture(scope="session")
def workplace(
    tmp_path_factory: pytest.TempPathFactory, data_path: Path, tiny_model: Callable[[str], Path]
) -> Project:
    """One folder for the whole session: finished runs in it serve many tests, each under its own
    name.
    """
    with shared_folder(tmp_path_factory, "workplace") as root:
        if (root / "recipe.yaml").exists():
            return Project(root, tiny_model)
        return make_project(root, data_path, tiny_model)


@pytest.fixture(scope="session")
def finished(tmp_path_factory: pytest.TempPathFactory, workplace: Project) -> Project:
    """The workplace with every run of `RUNS` completed, uninterrupted."""
    from tests.support.training_runs import sweep_runs

    with shared_folder(tmp_path_factory, "finished") as folder:
        if not (folder / "done").exists():
            sweep_runs(workplace)
            (folder / "done").touch()
    return workplace
