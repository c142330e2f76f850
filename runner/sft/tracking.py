"""Experiment trackers: sends them metrics, lets one tracked run span all attempts, and keeps their
errors from stopping training.

TensorBoard and Weights & Biases are driven here, because Transformers' callbacks would start a new
run with every attempt, and upload other weights than those that the runner commits and exports.
Every other tracker gets Transformers' own callback. Only the main process has trackers. The id of a
Weights & Biases run is stored in `tracking.json`, so the run spans all attempts.
"""

from __future__ import annotations

import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.integrations import integration_utils

from runner.errors import RunnerError
from runner.files import load_json, load_jsonl, write_json_atomic
from runner.run.result import TrainResult
from runner.sft.context import RunContext

MAX_FAILURES_IN_A_ROW: Final = 3


def describe_run(context: RunContext) -> dict[str, Any]:
    """The configuration of a run for trackers: its recipe, which holds no secrets, and its
    identity.
    """
    recipe = context.recipe.model_dump(mode="json")
    run = recipe.pop("run")
    return {
        **recipe,
        "grid": run["grid"],
        "axes": run["axes"],
        "recipe_digest": context.recipe_digest,
    }


def rewrite_names(logs: Mapping[str, Any]) -> dict[str, float]:
    """The numbers of a log under the names that Transformers gives them: `train/loss`,
    `eval/nll_per_token`.
    """
    numbers = {name: value for name, value in logs.items() if isinstance(value, int | float)}
    return dict(integration_utils.rewrite_logs(numbers))


class TensorBoardRun(TrainerCallback):  # type: ignore[misc]
    """Event files in `tensorboard/`; an attempt that resumes hides what was written after its
    checkpoint.
    """

    def __init__(self, context: RunContext, resume_step: int | None) -> None:
        from torch.utils.tensorboard import SummaryWriter

        first_step = 0 if resume_step is None else resume_step + 1
        self._writer = SummaryWriter(str(context.paths.tensorboard_dir), purge_step=first_step)
        if resume_step is None:
            lines = "".join(
                f"    {line}\n" for line in context.recipe.model_dump_json(indent=2).splitlines()
            )
            self._writer.add_text("recipe", lines, 0)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Any,
        **_: Any,
    ) -> None:
        """Write and flush immediately, so a killed run loses nothing."""
        for name, value in rewrite_names(logs).items():
            self._writer.add_scalar(name, value, state.global_step)
        self._writer.flush()

    def on_train_end(self, *_: Any, **__: Any) -> None:
        """Close the event file."""
        self._writer.close()


class Trackers(TrainerCallback):  # type: ignore[misc]
    """All trackers of a run. Their errors become warnings, and training continues.

    Trackers get every `tracking.log_steps`-th step and every evaluation. Transformers' closing
    summary is left out, because it describes an attempt and not the run.
    """

    def __init__(self, context: RunContext) -> None:
        self._context = context
        self._trackers: dict[str, TrainerCallback] = {}
        self._num_failures: dict[str, int] = {}

    def open(self, resume_step: int | None) -> None:
        """Start every tracker that the recipe names; call it before `metrics.jsonl` is cut back to
        `resume_step`.

        Raises:
            RunnerError: a tracker is not installed or refuses its configuration.
        """
        for name in dict.fromkeys(self._context.recipe.tracking.report_to):
            try:
                self._trackers[name] = self._build(name, resume_step)
            except RunnerError:
                raise
            except (ImportError, RuntimeError, ValueError) as error:
                raise RunnerError(f"the tracker {name} cannot be used: {error}") from error
            except Exception as error:  # a network or disk problem
                self._warn(name, "start", error)

    def _build(self, name: str, resume_step: int | None) -> TrainerCallback:
        if name == "tensorboard":
            return TensorBoardRun(self._context, resume_step)
        if name == "wandb":
            return WandbRun(self._context)
        return integration_utils.INTEGRATION_TO_CALLBACK[name]()

    def _notify(self, name: str, event: str, *args: Any, **kwargs: Any) -> None:
        if (tracker := self._trackers.get(name)) is None:
            return
        try:
            getattr(tracker, event)(*args, **kwargs)
            self._num_failures[name] = 0
        except Exception as error:
            self._warn(name, event, error)

    def _notify_all(self, event: str, *args: Any, **kwargs: Any) -> None:
        for name in list(self._trackers):
            self._notify(name, event, *args, **kwargs)

    def _warn(self, name: str, event: str, error: Exception) -> None:
        count = self._num_failures[name] = self._num_failures.get(name, 0) + 1
        is_given_up = event == "start" or count >= MAX_FAILURES_IN_A_ROW
        fate = "training continues without it" if is_given_up else "training continues"
        what = f"{type(error).__name__}: {error}"
        print(f"warning: the tracker {name} failed at {event}, {fate}: {what}", flush=True)
        if is_given_up:
            self._trackers.pop(name, None)

    def on_init_end(self, *args: Any, **kwargs: Any) -> None:
        """Forward the event."""
        self._notify_all("on_init_end", *args, **kwargs)

    def on_train_begin(self, *args: Any, **kwargs: Any) -> None:
        """Forward the event."""
        self._notify_all("on_train_begin", *args, **kwargs)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Any = None,
        **kwargs: Any,
    ) -> None:
        """Forward the steps that the recipe selects, and every evaluation."""
        if "loss" in logs:
            logged = (
                dict(logs)
                if state.global_step % self._context.recipe.tracking.log_steps == 0
                else {}
            )
        else:
            logged = {name: value for name, value in logs.items() if name.startswith("eval_")}
        if logged:
            self._notify_all("on_log", args, state, control, logs=logged, **kwargs)

    def on_evaluate(self, *args: Any, **kwargs: Any) -> None:
        """Forward the event."""
        self._notify_all("on_evaluate", *args, **kwargs)

    def on_save(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **_: Any
    ) -> None:
        """Report the checkpoint to Weights & Biases only: other trackers would look for it in
        Transformers' folder.
        """
        self._notify("wandb", "log_checkpoint", state.global_step)

    def on_train_end(self, *args: Any, **kwargs: Any) -> None:
        """Forward the event."""
        self._notify_all("on_train_end", *args, **kwargs)

    def finish(self, result: TrainResult) -> None:
        """Send the result and the exported model, and close the trackers that are still open."""
        self._notify("wandb", "finish", result)


def open_trackers(context: RunContext, resume_step: int | None) -> Trackers:
    """The trackers of the run, open on the main process and none elsewhere."""
    trackers = Trackers(context)
    context.on_main(lambda: trackers.open(resume_step))
    return trackers


def read_sent_steps(context: RunContext) -> dict[str, int]:
    """The last step in `metrics.jsonl`, which trackers have received, for `loss` and `eval` each;
    -1 for none.
    """
    rows = load_jsonl(context.paths.metrics_path)
    last = {"loss": -1, "eval": -1}
    for row in rows:
        kind = "loss" if "loss" in row else "eval"
        if kind == "loss" or row.get("split") == "validation":
            last[kind] = max(last[kind], row["step"])
    return last


def load_tracking(path: Path) -> dict[str, Any]:
    """Load `tracking.json`: for each tracker, the facts that must survive an attempt."""
    return dict(load_json(path) or {})


def write_tracking(path: Path, tracker: str, facts: Mapping[str, Any]) -> None:
    """Put a tracker's facts into `tracking.json`."""
    write_json_atomic(path, {**load_tracking(path), tracker: dict(facts)})


# Seconds to wait for uploads at the end (the result is written by then, and files that were not
# uploaded stay in `wandb/`), and seconds between two writes of the run's file (data since the last
# write is lost if the process is killed). Older versions have neither setting.
_SETTINGS: Final = {"finish_timeout": 600.0, "x_transaction_log_flush_interval": 1.0}


class WandbRun(TrainerCallback):  # type: ignore[misc]
    """Sends each step and each evaluation once.

    Data sent to Weights & Biases cannot be retracted, so steps that an attempt repeats after its
    checkpoint are not sent again. On the CPU the repeated values are identical to the bit;
    elsewhere the first values stay. Data of the last second before a kill may be missing.
    """

    def __init__(self, context: RunContext) -> None:
        self._context, self._tracking = context, context.recipe.tracking
        paths = context.paths
        known = load_tracking(paths.tracking_path).get("wandb")
        # A tracker that was added between two attempts gets all earlier rows now.
        self._sent = {"loss": -1, "eval": -1}
        if known:
            now = read_sent_steps(context)
            self._sent = {kind: max(known["sent_steps"][kind], now[kind]) for kind in now}
        facts = known or {"run_id": secrets.token_hex(4)}
        # Otherwise, files to be uploaded are collected in the home directory.
        os.environ.setdefault("WANDB_DATA_DIR", str(paths.run_dir.resolve() / "wandb"))
        self._run = self._start(facts["run_id"])
        write_tracking(paths.tracking_path, "wandb", {**facts, "sent_steps": self._sent})

    def _start(self, run_id: str) -> Any:
        import wandb  # here, because it is optional and takes a second to import
        from wandb.errors import AuthenticationError, UsageError

        recipe = self._context.recipe
        try:
            run = wandb.init(
                project=self._tracking.project or recipe.run.grid,
                name=self._tracking.run_name or recipe.run.name,
                id=run_id,
                resume="allow",
                tags=list(self._tracking.tags),
                config=describe_run(self._context),
                allow_val_change=True,  # attempts may run on different machines
                dir=str(self._context.paths.run_dir),
                settings=wandb.Settings(
                    console="off",  # the attempt's log.txt has the output
                    **{
                        name: value
                        for name, value in _SETTINGS.items()
                        if name in wandb.Settings.model_fields
                    },
                ),
            )
        except (AuthenticationError, UsageError) as error:
            raise RunnerError(
                f"Weights & Biases refuses to start: {error}",
                hint=(
                    "run `wandb login`, set WANDB_API_KEY or WANDB_MODE=offline,"
                    " or launch with tracking.report_to=[]"
                ),
            ) from error
        run.define_metric("train/global_step")
        run.define_metric("*", step_metric="train/global_step", step_sync=True)
        return run

    def on_train_begin(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        model: Any,
        **_: Any,
    ) -> None:
        """Watch the trainer's weights, if the recipe requests it."""
        if self._tracking.watch != "none":
            self._run.watch(model, log=self._tracking.watch, log_freq=self._tracking.log_steps)

    def on_train_end(self, *_: Any, model: Any = None, **__: Any) -> None:
        """Stop watching: the scoring that follows is not training."""
        if self._tracking.watch != "none":
            self._run.unwatch(model)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        *,
        logs: Any,
        **_: Any,
    ) -> None:
        """Send one row of the run's history."""
        if state.global_step > self._sent["loss" if "loss" in logs else "eval"]:
            self._run.log({**rewrite_names(logs), "train/global_step": state.global_step})

    def log_checkpoint(self, step: int) -> None:
        """Upload a committed checkpoint if the recipe requests it."""
        if self._tracking.log_model == "checkpoint":
            self._log_model(
                self._context.paths.checkpoint_dir(step), [f"step-{step}"], {"step": step}
            )

    def finish(self, result: TrainResult) -> None:
        """Upload the exported model if the recipe requests it, record the result, and wait for the
        uploads.
        """
        scores = {
            f"{split}/{model}_{name}": getattr(score, name)
            for model, split_scores in (("base", result.base), ("tuned", result.tuned))
            for split, score in split_scores.items()
            for name in ("nll_per_completion_token", "nll_per_token")
        }
        for model, answers in result.generation.items():
            scores |= {f"test/{model}_{name}": value for name, value in answers.metrics.items()}
        self._run.summary.update(
            {**scores, "best_step": result.best_step, "stop_reason": result.stop_reason}
        )
        if self._tracking.log_model != "none":
            metadata = {"step": result.best_step, result.metric: result.best_metric}
            self._log_model(self._context.paths.model_dir, ["best"], metadata)
        self._run.finish()

    def _log_model(self, folder: Path, aliases: list[str], metadata: dict[str, Any]) -> None:
        import wandb

        artifact = wandb.Artifact(
            f"model-{self._context.recipe.run.name}", type="model", metadata=metadata
        )
        # Copied now: the folder may be pruned before it is uploaded.
        artifact.add_dir(str(folder))
        self._run.log_artifact(artifact, aliases=aliases)
