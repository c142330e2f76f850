"""One Weights & Biases run per run of ours, across attempts: its id is kept in `tracking.json`."""

from __future__ import annotations

import os
import secrets
from pathlib import Path
from typing import Any, Final

import wandb
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from wandb.errors import AuthenticationError, UsageError

from runner.errors import RunnerError
from runner.record import TrainResult
from runner.sft.context import RunContext
from runner.sft.tracking import describe_run, load_tracking, read_sent_steps, rewrite_names, write_tracking

# Seconds to wait for uploads in the end (the result is written by then, and what is not uploaded stays in `wandb/`),
# and between two writes of the run's file: what came since is lost when the process is killed. Older versions have
# neither.
_SETTINGS: Final = {"finish_timeout": 600.0, "x_transaction_log_flush_interval": 1.0}


class WandbRun(TrainerCallback):  # type: ignore[misc]
    """Sends each step and each evaluation once.

    Weights & Biases cannot take back what it was sent, so the steps that an attempt repeats after its checkpoint are
    left out: on the CPU they are the same to the bit, elsewhere the first telling stays. What it was told in the last
    second before a kill may be missing there.
    """

    def __init__(self, context: RunContext) -> None:
        self._context, self._tracking = context, context.recipe.tracking
        paths = context.paths
        known = load_tracking(paths.tracking_path).get("wandb")
        # What a tracker that was added between two attempts was not told, it is told now.
        self._sent = {"loss": -1, "eval": -1}
        if known:
            now = read_sent_steps(context)
            self._sent = {kind: max(known["sent_steps"][kind], now[kind]) for kind in now}
        facts = known or {"run_id": secrets.token_hex(4)}
        # Without it, files to be uploaded are collected in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(paths.run_dir.resolve() / "wandb"))
        self._run = self._start(facts["run_id"])
        write_tracking(paths.tracking_path, "wandb", {**facts, "sent_steps": self._sent})

    def _start(self, run_id: str) -> Any:
        recipe = self._context.recipe
        try:
            run = wandb.init(
                project=self._tracking.project or recipe.run.grid,
                name=self._tracking.run_name or recipe.run.name,
                id=run_id,
                resume="allow",
                tags=list(self._tracking.tags),
                config=describe_run(self._context),
                allow_val_change=True,  # where it runs may differ between attempts
                dir=str(self._context.paths.run_dir),
                settings=wandb.Settings(
                    console="off",  # the attempt's log.txt holds what is printed
                    **{name: value for name, value in _SETTINGS.items() if name in wandb.Settings.model_fields},
                ),
            )
        except (AuthenticationError, UsageError) as error:
            raise RunnerError(
                f"Weights & Biases refuses to start: {error}",
                hint="run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline, or launch with tracking.report_to=[]",
            ) from error
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return run

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, model: Any, **_: Any
    ) -> None:
        """Watch the weights that the trainer was given."""
        if self._tracking.watch != "none":
            self._run.watch(model, log=self._tracking.watch, log_freq=self._tracking.log_steps)

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        """The scoring that follows is not training."""
        if self._tracking.watch != "none":
            self._run.unwatch(model)

    def on_log(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, *, logs: Any, **_: Any
    ) -> None:
        """One row of the run's history."""
        if state.global_step > self._sent["loss" if "loss" in logs else "eval"]:
            self._run.log({**rewrite_names(logs), "train/global_step": state.global_step})

    def log_checkpoint(self, step: int) -> None:
        """Upload a committed checkpoint where the recipe asks for it."""
        if self._tracking.log_model == "checkpoint":
            self._log_model(self._context.paths.checkpoint_dir(step), [f"step-{step}"], {"step": step})

    def finish(self, result: TrainResult) -> None:
        """Upload the exported model where the recipe asks for it, record the result, and wait for the uploads."""
        scores = {
            f"{split}/{model}_{name}": getattr(score, name)
            for model, split_scores in (("base", result.base), ("tuned", result.tuned))
            for split, score in split_scores.items()
            for name in ("nll_per_completion_token", "nll_per_token")
        }
        for model, answers in result.generation.items():
            scores |= {f"test/{model}_{name}": value for name, value in answers.metrics.items()}
        self._run.summary.update({**scores, "best_step": result.best_step, "stop_reason": result.stop_reason})
        if self._tracking.log_model != "none":
            metadata = {"step": result.best_step, result.metric: result.best_metric}
            self._log_model(self._context.paths.model_dir, ["best"], metadata)
        self._run.finish()

    def _log_model(self, folder: Path, aliases: list[str], metadata: dict[str, Any]) -> None:
        artifact = wandb.Artifact(f"model-{self._context.recipe.run.name}", type="model", metadata=metadata)
        artifact.add_dir(str(folder))  # copied at once: the folder may be pruned before it is uploaded
        self._run.log_artifact(artifact, aliases=aliases)
