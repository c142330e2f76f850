"""`trl.SFTTrainer` with our order of rows, our evaluation and our checkpoints; everything else is
TRL's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any, Final

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerControl
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from runner.checkpoints.commit import carry_run_files, commit_checkpoint, give_back_on_full_disk
from runner.checkpoints.marker import is_intact, load_marker
from runner.checkpoints.retention import apply_retention
from runner.data.masking import IGNORE_INDEX
from runner.data.rows import Samples
from runner.errors import DivergedError
from runner.files import write_jsonl_atomic
from runner.model.load import build_lora_config, keep_adapters_in_float32
from runner.model.memory import require_room, require_room_for_checkpoint
from runner.model.weights import load_gathered_weights, sort_adapter_config
from runner.recipe.parse import derive_accumulation, derive_eval_batch, derive_micro_batch
from runner.recipe.schema import GenerationOn
from runner.run.paths import marker_path
from runner.run.record import GenerationScore, SplitScore
from runner.secrets import scrub_json
from runner.sft.callbacks import FlowCallback, PreemptionCallback, ProgressCallback
from runner.sft.context import RunContext
from runner.sft.evaluate import RowScore, score_rows, sum_scores
from runner.sft.generation import Answer, generate_answers, score_answers, write_answers
from runner.sft.order import EpochSampler
from runner.sft.tracking import Trackers

# The main process hashes, archives and fetches checkpoints while the others wait; Transformers'
# default is 1800.
_COLLECTIVE_TIMEOUT_SECONDS: Final = 3 * 3600


def build_training_args(context: RunContext) -> SFTConfig:
    """The effective arguments of the trainer; what the runner does itself is switched off."""
    recipe, training = context.recipe, context.recipe.training
    uses_cpu = context.uses_cpu()
    args = SFTConfig(
        **training.hugging_face_arguments(),
        output_dir=str(context.paths.checkpoints_dir),
        seed=training.seed,
        per_device_train_batch_size=derive_micro_batch(recipe, context.micro_batch_divisor),
        gradient_accumulation_steps=derive_accumulation(
            recipe, context.num_processes, context.micro_batch_divisor
        ),
        num_train_epochs=training.num_train_epochs or 1.0,
        max_steps=training.max_steps or -1,
        bf16=training.bf16,
        fp16=training.fp16,
        gradient_checkpointing=training.gradient_checkpointing,
        per_device_eval_batch_size=derive_eval_batch(recipe, context.micro_batch_divisor),
        metric_for_best_model=recipe.checkpoints.metric,
        greater_is_better=recipe.checkpoints.mode == "max",
        use_cpu=uses_cpu,
        dataloader_pin_memory=not uses_cpu,
        eval_strategy="no",
        save_strategy="no",
        logging_strategy="steps",
        logging_steps=1,
        logging_nan_inf_filter=False,
        disable_tqdm=True,
        ddp_timeout=_COLLECTIVE_TIMEOUT_SECONDS,
        report_to="none",  # `tracking` starts the trackers
        run_name=recipe.tracking.run_name or recipe.run.name,
        project=recipe.tracking.project or recipe.run.grid,
        max_length=None,
        dataset_kwargs={"skip_prepare_dataset": True},
    )
    args.report_to = []  # Kubeflow's adds itself where its environment is set
    return args


def build_train_dataset(
    samples: Samples, context: RunContext, pad_token_id: int
) -> tuple[Dataset, int]:
    """The tokenised training rows, and how many rows without labels stand behind them.

    Those fill up the last batch of several processes, which accelerate would otherwise fill with
    copies of real rows.
    """
    rows = samples.train.rows
    per_pass = (
        derive_micro_batch(context.recipe, context.micro_batch_divisor) * context.num_processes
    )
    num_padding = -len(rows) % per_pass if context.num_processes > 1 else 0
    columns = {
        "input_ids": [list(row.input_ids) for row in rows] + [[pad_token_id] * 2] * num_padding,
        "labels": [row.labels(context.recipe.loss) for row in rows]
        + [[IGNORE_INDEX] * 2] * num_padding,
    }
    return Dataset.from_dict(columns), num_padding


def describe_trained_parameters(model: torch.nn.Module) -> dict[str, tuple[int, ...]]:
    """Names and shapes of the parameters that are trained, whole also where ZeRO-3 has partitioned
    them.
    """
    return {
        name: tuple(getattr(parameter, "ds_shape", parameter.shape))
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
    }


class RunTrainer(SFTTrainer):  # type: ignore[misc]
    """The trainer of one run."""

    control: TrainerControl

    def __init__(
        self,
        context: RunContext,
        args: SFTConfig,
        model: Any,
        tokenizer: Any,
        samples: Samples,
        trackers: Trackers,
    ) -> None:
        self.context = context
        self.samples = samples
        self.flow = FlowCallback(context.recipe)
        self.progress = ProgressCallback(context)
        self._validated: tuple[int, SplitScore] | None = None
        dataset, num_padding = build_train_dataset(samples, context, tokenizer.pad_token_id)
        self._sampler = EpochSampler(
            [len(row.input_ids) for row in samples.train.rows],
            global_batch_size=context.recipe.global_batch_size,
            seed=context.recipe.training.seed,
            strategy=context.recipe.training.train_sampling_strategy,
            num_padding=num_padding,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            processing_class=tokenizer,
            peft_config=build_lora_config(context.recipe),
            callbacks=[self.flow, PreemptionCallback(context), self.progress, trackers],
        )
        self.remove_callback(PrinterCallback)
        # Else PEFT asks the hub whether the vocabulary has grown.
        if context.recipe.adapter.method != "none":
            self.model.save_pretrained = partial(
                self.model.save_pretrained, save_embedding_layers=False
            )
        if context.recipe.quantization.method != "none":
            keep_adapters_in_float32(self.model)
        self.trained_shapes = describe_trained_parameters(self.model)

    def require_room(self) -> None:
        """Raises: OSError (ENOSPC) where the run's checkpoints and its export would not fit on the
        disk.
        """
        trained = [(name, one) for name, one in self.model.named_parameters() if one.requires_grad]
        context = self.context
        require_room(
            context.recipe,
            context.paths,
            trained,
            len(self.samples.train.rows),
            context.num_processes,
        )

    def is_finished(self) -> bool:
        """Whether the restored state needs no further step."""
        return self.state.global_step >= self.state.max_steps or self.flow.is_stopped_early(
            self.state
        )

    def score(self, split: str) -> tuple[SplitScore, list[RowScore]]:
        """Score the model as it is now on `validation` or `test`; a score that is not finite is a
        divergence.
        """
        with self.compute_loss_context_manager():
            rows = score_rows(
                self.model_wrapped,
                getattr(self.samples, split).rows,
                batch_size=self.args.per_device_eval_batch_size,
                pad_token_id=self.processing_class.pad_token_id,
                accelerator=self.accelerator,
            )
        score = sum_scores(rows)
        if not math.isfinite(score.nll_sum):
            raise DivergedError(f"the {split} score at step {self.state.global_step} is not finite")
        return score, rows

    def score_validation_of(self, step: int) -> SplitScore:
        """The validation score of a step whose weights are loaded; the last evaluation is not
        computed once more.
        """
        known_step, score = self._validated or (None, None)
        return score if score is not None and known_step == step else self.score("validation")[0]

    def answer(self, split: str) -> list[Answer]:
        """The judged answers of the model as it is now to the first rows of a split; none where
        generation is off.
        """
        generation = self.context.recipe.evaluation.generation
        if not isinstance(generation, GenerationOn):
            return []
        with self.context.phase("generating"), self.compute_loss_context_manager():
            return generate_answers(
                self.model_wrapped,
                getattr(self.samples, split).rows[: generation.num_samples],
                task=self.context.recipe.data.task,
                tokenizer=self.processing_class,
                max_new_tokens=generation.max_new_tokens,
                batch_size=self.args.per_device_eval_batch_size,
                accelerator=self.accelerator,
            )

    def record_score(
        self, split: str, score: SplitScore, generation: GenerationScore | None = None
    ) -> dict[str, float]:
        """Write one evaluation row of `metrics.jsonl`; what comes back are its metrics."""
        metrics = {
            "nll_per_completion_token": score.nll_per_completion_token,
            "nll_per_token": score.nll_per_token,
            **(generation.metrics if generation else {}),
        }
        row = {"step": self.state.global_step, "split": split, **metrics, **score.model_dump()}
        if generation:
            row["generation"] = generation.model_dump(exclude={"metrics"})
        self.context.append_metrics(row)
        return metrics

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation split, in place of Transformers' evaluation, which averages over
        batches.
        """
        recipe = self.context.recipe
        with self.context.phase("evaluating"):
            score, _rows = self.score("validation")
        self._validated = (self.state.global_step, score)
        generation = None
        if (
            isinstance(recipe.evaluation.generation, GenerationOn)
            and recipe.evaluation.generation.during_training
        ):
            generation = score_answers(recipe.data.task, self.answer("validation"))
        recorded = self.record_score("validation", score, generation)
        metrics = {f"eval_{name}": value for name, value in recorded.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step in `metrics.jsonl` before it goes to the trackers."""
        if "loss" in logs:
            if not math.isfinite(logs["loss"]):
                raise DivergedError(
                    f"the loss of step {self.state.global_step} is {logs['loss']}",
                    hint="lower `training.learning_rate`, or train in a wider dtype",
                )
            row: dict[str, Any] = {"step": self.state.global_step, "epoch": self.state.epoch}
            for key in ("loss", "grad_norm", "learning_rate"):
                value = logs.get(key)
                row[key] = value if value is not None and math.isfinite(value) else None
            self.context.append_metrics(row)
        super().log(logs, start_time)

    def _get_train_sampler(self, *_: Any, **__: Any) -> EpochSampler:
        return self._sampler

    def _run_epoch(self, **arguments: Any) -> None:
        if self.state.global_step == 0:
            self._score_base()
        if self.is_finished():
            self.control.should_training_stop = True
            return
        # TRL counts from zero in each process, which would stand in the log history of a resumed
        # run.
        counts = [row["num_tokens"] for row in self.state.log_history if "num_tokens" in row]
        self._total_train_tokens = int(counts[-1]) if counts else 0
        self._sampler.epoch = arguments["epoch"]
        self.context.preemption.begin_training()
        super()._run_epoch(**arguments)

    def _score_base(self) -> None:
        """Step 0: the base model under the same code, on both splits."""
        with self.context.phase("evaluating base"):
            score, rows = self.score("test")
            self.record_score("test", score, None)
            if self.context.is_main:
                write_jsonl_atomic(
                    self.context.paths.eval_rows_path,
                    [{"model": "base", **row.as_json()} for row in rows],
                )
        if answers := self.answer("test"):
            self.context.on_main(
                lambda: write_answers(self.context.paths.predictions_path, {"base": answers})
            )
        self.evaluate()

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Transformers write, wait for all ranks, then commit; TRL's model card is left out."""
        paths, step = self.context.paths, self.state.global_step
        if marker_path(paths.checkpoint_dir(step)).exists():
            return
        with self.context.phase("saving"):
            self._refuse_weights_that_are_not_finite()
            saved_dir = Path(self.args.output_dir) / f"checkpoint-{step}"
            if self.context.is_main:
                require_room_for_checkpoint(self.context.recipe, paths, step)
            with give_back_on_full_disk(
                saved_dir, paths.checkpoint_dir(step), is_main=self.context.is_main
            ):
                Trainer._save_checkpoint(self, model, trial)
                self.accelerator.wait_for_everyone()
                if self.context.is_main:
                    sort_adapter_config(saved_dir)
                    carry_run_files(paths, saved_dir)
                    commit_checkpoint(saved_dir, paths, step, self.context.fingerprint)
            if self.context.is_main:
                evaluations = self.flow.evaluations(self.state)
                apply_retention(
                    paths, self.context.recipe.checkpoints, evaluations, self.context.recipe_digest
                )
                if self.context.uploader is not None:
                    self.context.uploader.offer(step)
            self.accelerator.wait_for_everyone()

    def _refuse_weights_that_are_not_finite(self) -> None:
        """A loss is known one step before the update that follows from it, so a finite loss does
        not vouch for it.
        """
        local = (
            getattr(weight, "ds_tensor", weight)
            for weight in self.model.parameters()
            if weight.requires_grad
        )
        if not all(gather_object([all(bool(torch.isfinite(weight).all()) for weight in local)])):
            raise DivergedError(
                f"the weights after step {self.state.global_step} are not finite",
                hint="lower `training.learning_rate`, or train in a wider dtype",
            )

    def load_weights_of(self, step: int) -> None:
        """Put the weights of a committed checkpoint into the model, as Transformers does for the
        best one.

        Raises:
            OSError: the checkpoint was damaged since; another attempt will see that before it
                trains.
        """
        if step == self.state.global_step:
            return
        checkpoint_dir = self.context.paths.checkpoint_dir(step)
        if not self.context.on_main(lambda: is_intact(checkpoint_dir)):
            raise OSError(
                f"{checkpoint_dir} holds other files than were committed; launch again to mend it"
            )
        if self.is_deepspeed_enabled and load_marker(checkpoint_dir).is_stripped:
            load_gathered_weights(self.model, checkpoint_dir)
            return
        self.state.best_model_checkpoint = str(checkpoint_dir)
        self._load_best_model()

    def effective_arguments(self) -> Mapping[str, Any]:
        """Every field of the training arguments, without secrets."""
        values = {
            key: value for key, value in self.args.to_dict().items() if not key.endswith("_token")
        }
        return dict(scrub_json(values))
