"""`trl.SFTTrainer` with our order of rows, our evaluation and our checkpoints; everything else is
TRL's.

The hooks call `recorder`, which does the run's bookkeeping.
"""

from __future__ import annotations

from collections import Counter
from functools import partial
from typing import Any

from datasets import Dataset
from transformers import PrinterCallback, Trainer, TrainerControl
from trl import SFTConfig, SFTTrainer
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from runner.checkpoints.marker import load_marker
from runner.data.masking import IGNORE_INDEX
from runner.data.rows import Samples
from runner.data.stored_rows import StoredRows
from runner.model.load import build_lora_config, keep_adapters_in_float32
from runner.model.weights import load_gathered_weights
from runner.recipe.parse import derive_micro_batch
from runner.sft.arguments import build_config, list_arguments
from runner.sft.callbacks import FlowCallback, PreemptionCallback, ProgressCallback
from runner.sft.context import RunContext
from runner.sft.order import EpochSampler, hash_order
from runner.sft.recorder import Recorder
from runner.sft.tracking import Trackers


def build_training_args(context: RunContext) -> SFTConfig:
    """The effective arguments of the trainer."""
    arguments = list_arguments(
        context.recipe,
        context.paths.checkpoints_dir,
        num_processes=context.num_processes,
        divisor=context.micro_batch_divisor,
        uses_cpu=context.uses_cpu(),
    )
    return build_config(arguments)


def build_train_dataset(
    samples: Samples, context: RunContext, pad_token_id: int
) -> tuple[Dataset, int]:
    """The tokenized training rows, followed by padding rows without labels, and the number of
    padding rows.

    If there are several processes, padding rows fill up the last batch, which accelerate would
    otherwise fill with copies of real rows.
    """
    rows, loss = samples.train.rows, context.recipe.loss
    per_pass = (
        derive_micro_batch(context.recipe, context.micro_batch_divisor) * context.num_processes
    )
    num_padding = -len(rows) % per_pass if context.num_processes > 1 else 0
    padding = [[pad_token_id] * 2] * num_padding
    if isinstance(rows, StoredRows):
        return rows.build_dataset(loss, padding), num_padding
    columns = {
        "input_ids": [list(row.input_ids) for row in rows] + padding,
        "labels": [row.labels(loss) for row in rows] + [[IGNORE_INDEX] * 2] * num_padding,
    }
    return Dataset.from_dict(columns), num_padding


class RunTrainer(SFTTrainer):  # type: ignore[misc]
    """The trainer of one run."""

    control: TrainerControl

    def __init__(
        self, recorder: Recorder, args: SFTConfig, model: Any, tokenizer: Any, trackers: Trackers
    ) -> None:
        self.recorder, self.context = recorder, recorder.context
        self.flow = FlowCallback(self.context.recipe)
        self.progress = ProgressCallback(self.context)
        self._flops_per_token: int | None = None
        recipe, samples = self.context.recipe, recorder.samples
        dataset, num_padding = build_train_dataset(samples, self.context, tokenizer.pad_token_id)
        # Only one process drops rows; with several, the last batch is filled up.
        drops_last = args.dataloader_drop_last and self.context.num_processes == 1
        self._num_dropped = (
            len(samples.train.rows) % args.per_device_train_batch_size if drops_last else 0
        )
        self._sampler = EpochSampler(
            samples.train.list_lengths(),
            global_batch_size=recipe.global_batch_size,
            seed=recipe.training.seed,
            strategy=recipe.training.train_sampling_strategy,
            num_padding=num_padding,
        )
        super().__init__(
            model=model,
            args=args,
            train_dataset=dataset,
            data_collator=DataCollatorForLanguageModeling(pad_token_id=tokenizer.pad_token_id),
            processing_class=tokenizer,
            peft_config=build_lora_config(recipe),
            callbacks=[self.flow, PreemptionCallback(self.context), self.progress, trackers],
        )
        self.remove_callback(PrinterCallback)
        # Otherwise PEFT queries the hub to see whether the vocabulary has grown.
        if recipe.adapter.method != "none":
            self.model.save_pretrained = partial(
                self.model.save_pretrained, save_embedding_layers=False
            )
        if recipe.quantization.method != "none":
            keep_adapters_in_float32(self.model)

    def is_finished(self) -> bool:
        """True if the restored state needs no further step."""
        return self.state.global_step >= self.state.max_steps or self.flow.is_stopped_early(
            self.state
        )

    def describe_training(self) -> dict[str, Any]:
        """The fields of `result.json` about the training itself; call it before other weights than
        the last are loaded.

        Rows are not counted during training. Their number follows from the sampler and the steps,
        so a kill cannot lose or double any.
        """
        train, loss = self.recorder.samples.train, self.context.recipe.loss
        batches = list(self._sampler.list_batches(self.state.global_step, self._num_dropped))
        times = Counter(row for batch in batches for row in batch)
        return {
            "row_order_hash": hash_order(batches, train.list_ids()),
            "num_updates": self._count_updates(),
            "num_trained_tokens": sum(
                number * train.rows[row].count_labels(loss) for row, number in times.items()
            ),
            "schedule_steps": self.state.max_steps,
        }

    def _count_updates(self) -> int:
        """The number of steps that changed the weights; the loss scaling of float16 skips some.
        DeepSpeed counts them; otherwise the schedule does, because a skipped step does not advance
        it.
        """
        if self.is_deepspeed_enabled:
            return int(self.model_wrapped.global_steps - self.model_wrapped.skipped_steps)
        return int(self.lr_scheduler.last_epoch)

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Train one micro-batch, after a sign of life."""
        self.context.sign_of_life()
        return super().training_step(*args, **kwargs)

    def floating_point_ops(self, inputs: dict[str, Any]) -> int:
        """Count as Transformers does, but count the parameters once, not in each micro-batch."""
        num_tokens = int(inputs["input_ids"].numel())
        if self._flops_per_token is None or self.is_deepspeed_enabled:  # it partitions parameters
            self._flops_per_token = super().floating_point_ops(inputs) // num_tokens
        return self._flops_per_token * num_tokens

    def evaluate(self, *_: Any, **__: Any) -> dict[str, float]:
        """Score the validation split, in place of Transformers' evaluation, which averages over
        batches.
        """
        recorded = self.recorder.record_validation(self)
        metrics = {f"eval_{name}": value for name, value in recorded.items()}
        self.log(dict(metrics))
        self.control = self.callback_handler.on_evaluate(
            self.args, self.state, self.control, metrics
        )
        return metrics

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Record a step in `metrics.jsonl` before it goes to the trackers."""
        if "loss" in logs:
            self.recorder.record_step(self.state, logs)
        super().log(logs, start_time)

    def _get_train_sampler(self, *_: Any, **__: Any) -> EpochSampler:
        return self._sampler

    def _run_epoch(self, **arguments: Any) -> None:
        if self.context.is_repair:  # a repair only needs a model to load weights into
            self.control.should_training_stop = True
            return
        self.recorder.record_arguments(self)
        self.context.enter_phase("training")
        if self.state.global_step == 0:
            self.recorder.record_base(self)
            self.evaluate()
        if self.is_finished():
            self.control.should_training_stop = True
            return
        # TRL counts from zero in each process; a resumed run would log those counts.
        counts = [row["num_tokens"] for row in self.state.log_history if "num_tokens" in row]
        self._total_train_tokens = int(counts[-1]) if counts else 0
        self._sampler.epoch = arguments["epoch"]
        self.context.preemption.begin_training()
        super()._run_epoch(**arguments)

    def _save_checkpoint(self, model: Any, trial: Any) -> None:
        """Let Transformers write and the recorder commit; TRL's model card is left out."""
        write = partial(Trainer._save_checkpoint, self, model, trial)
        self.recorder.save_checkpoint(self, write)

    def load_weights_of(self, step: int) -> None:
        """Load the weights of a committed checkpoint into the model, as Transformers does for the
        best one.

        Raises:
            OSError: the checkpoint was damaged later.
        """
        if step == self.state.global_step:
            return
        checkpoint_dir = self.recorder.require_intact(step)
        if self.is_deepspeed_enabled and load_marker(checkpoint_dir).is_stripped:
            load_gathered_weights(self.model, checkpoint_dir)
            return
        self.state.best_model_checkpoint = str(checkpoint_dir)
        self._load_best_model()
