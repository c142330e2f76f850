"""The run's bookkeeping in the training process: its scores, metrics, answers, checkpoints, export
and result.

The recorder decides what the run keeps and when; `trainer` calls it from TRL's hooks. Only the main
process writes files, but every rank must call the same methods in the same order, because most of
them wait for the other ranks.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any, Final

import torch
from accelerate.utils import gather_object
from transformers import Trainer, TrainerState

from runner.checkpoints.commit import (
    carry_run_files,
    commit_checkpoint,
    delete_on_full_disk,
    restore_run_files,
)
from runner.checkpoints.marker import is_intact, list_evaluations, sync_folder
from runner.checkpoints.retention import apply_retention
from runner.data.rows import Row, Samples, Split, describe_samples
from runner.errors import CorruptFileError, DataError, DivergedError
from runner.files import (
    MAX_ROWS_BYTES,
    append_jsonl,
    follow_umask,
    fsync_dir,
    load_json,
    load_jsonl,
    write_json_atomic,
    write_jsonl_atomic,
)
from runner.model.memory import require_room, require_room_for_checkpoint, require_space
from runner.model.weights import (
    ExportError,
    add_to_adapter,
    collect_resized_embeddings,
    drop_loading_options,
    hash_trained,
    sort_adapter_config,
    verify_export,
    verify_same_weights,
    verify_score,
)
from runner.recipe.evaluation_section import GenerationOn
from runner.recipe.identity import list_library_versions
from runner.recipe.parse import derive_answer_batch
from runner.run.manifest import (
    FileRecord,
    Manifest,
    find_other_export,
    list_summed_files,
    measure_model,
    record_files,
    record_model,
    restore_model_files,
    sign_result,
)
from runner.run.paths import RunPaths, marker_path
from runner.run.record import list_trained, load_record
from runner.run.result import GenerationScore, SplitScore, StopReason, TrainResult, load_result
from runner.run.scores import find_score_contradictions
from runner.sft.base import NUM_ROWS_SCORED_AGAIN, BaseScores, obtain_base_scores
from runner.sft.context import RunContext
from runner.sft.evaluate import DIVERGED_HINT, RowScore, refuse_impossible, score_rows, sum_scores
from runner.sft.generation import (
    Answer,
    generate_answers,
    load_answers,
    refuse_unjudged,
    score_answers,
    write_answers,
)
from runner.sft.resolved import describe_arguments


class Recorder:
    """Scores the model of one run and writes what the run keeps."""

    def __init__(self, context: RunContext, samples: Samples) -> None:
        self.context, self.samples = context, samples
        # The step of the newest validation score, and the score.
        self._validated: tuple[int, SplitScore] | None = None
        self._base: BaseScores | None = None  # until its validation score is recorded
        self._trained_shapes: dict[str, tuple[int, ...]] = {}
        self._model_files: dict[str, FileRecord] = {}  # of the export, once it is written
        self._initial_weights_hash: str | None = None  # until step 0 is recorded
        self._has_recorded_arguments = False

    def require_same_samples(self) -> None:
        """Compare the rows with `samples.json` before resuming; only the main process does.

        Raises:
            DataError: the checkpoint was trained on other rows, tokens or labels than are drawn
                now, or the file is unreadable.
        """
        path = self.context.paths.samples_path
        try:
            before = load_json(path, MAX_ROWS_BYTES)
        except CorruptFileError as error:
            raise DataError(
                f"{error.message}: it is unknown on which rows the checkpoint was trained",
                hint="`runner launch RECIPE --fresh` moves the run aside and starts from step 0",
            ) from None
        if before is None:
            print(f"warning: there is no {path}: the rows are assumed unchanged", flush=True)
            return
        now = describe_samples(self.samples, self.context.recipe.loss)
        if differences := find_sample_differences(before, now):
            shown = "\n".join(f"  {line}" for line in differences)
            raise DataError(
                f"the rows differ from {path}, on which the checkpoint was trained:\n{shown}",
                hint=(
                    "something outside the recipe has changed, such as a library or a data set on"
                    " the hub: restore it, or start from step 0 with `runner launch RECIPE --fresh`"
                ),
            )

    def record_samples(self, resume_step: int | None = None) -> None:
        """Write `samples.json`, unless the run resumes and the file exists."""
        path = self.context.paths.samples_path
        if self.context.is_main and (resume_step is None or not path.exists()):
            write_json_atomic(path, describe_samples(self.samples, self.context.recipe.loss))

    def rewind(self, resume_step: int | None) -> None:
        """Keep the rows of `metrics.jsonl` up to the step to resume from; without one, none."""
        if not self.context.is_main:
            return
        paths, rows = self.context.paths, []
        if resume_step is not None:
            restore_run_files(paths, resume_step)
            rows = [row for row in load_jsonl(paths.metrics_path) if row["step"] <= resume_step]
        write_jsonl_atomic(paths.metrics_path, rows)

    def begin(self, trainer: Trainer, resume_step: int | None) -> None:
        """Note the trained parameters, and their hash if the run starts at step 0.

        Raises:
            OSError: (ENOSPC) the run's checkpoints and its export would not fit on the disk; in a
                repair, which writes no checkpoint, the export alone.
        """
        context = self.context
        parameters = trainer.model.named_parameters()
        trained = [(name, one) for name, one in parameters if one.requires_grad]
        # ZeRO-3 leaves an empty tensor where it has partitioned a parameter.
        self._trained_shapes = {
            name: tuple(getattr(one, "ds_shape", one.shape)) for name, one in trained
        }
        if context.is_main and context.is_repair:
            result = load_result(context.paths)
            num_bytes = measure_model((result.files if result is not None else None) or {})
            require_space(context.paths.run_dir, num_bytes, "the export")
        elif context.is_main:
            num_rows = len(self.samples.train.rows)
            require_room(context.recipe, context.paths, trained, num_rows, context.num_processes)
        if resume_step is None:
            self._initial_weights_hash = hash_trained(
                trainer.model, is_main=context.is_main, sign_of_life=context.sign_of_life
            )

    def record_arguments(self, trainer: Trainer) -> None:
        """Write the effective training arguments, once training has begun."""
        if self.context.is_main and not self._has_recorded_arguments:
            content = describe_arguments(self.context, trainer)
            write_json_atomic(self.context.attempt.training_args_path, content)
            self._has_recorded_arguments = True

    def record_base(self, trainer: Trainer) -> None:
        """Record the scores and answers of the base model at step 0. They are computed by the code
        that scores the tuned model, here or in another run that computes the same. The row of the
        test split also holds the hash of the initial weights, and every checkpoint carries it.
        """
        context, state = self.context, trainer.state
        base = obtain_base_scores(
            context,
            self.samples,
            trainer,
            compute=partial(self._compute_base, trainer),
            score_again=partial(self._score_again, trainer),
        )
        start = {"initial_weights_hash": self._initial_weights_hash}
        self._append_score(state, "test", sum_scores(base.test), more=start)
        if context.is_main:
            base_rows = [{"model": "base", **row.as_json()} for row in base.test]
            write_jsonl_atomic(context.paths.eval_rows_path, base_rows)
        if answers := base.test_answers:
            context.on_main(
                lambda: write_answers(context.paths.predictions_path, {"base": answers})
            )
        self._base = base

    def _compute_base(self, trainer: Trainer) -> BaseScores:
        with self.context.phase("evaluating base"):
            _, test = self.score(trainer, "test")
        test_answers = self.answer(trainer, "test")
        with self.context.phase("evaluating"):
            _, validation = self.score(trainer, "validation")
        answers = self.answer(trainer, "validation") if self._answers_while_training() else []
        return BaseScores(test, test_answers, validation, answers)

    def _score_again(self, trainer: Trainer) -> list[RowScore]:
        """The scores of a few of the shortest test rows, in batches without other rows."""
        with self.context.phase("evaluating base"):
            return self._score_rows(trainer, self.list_rows_scored_again())

    def list_rows_scored_again(self) -> list[Row]:
        """The shortest test rows; no other rows are built."""
        lengths = self.samples.test.list_lengths()
        shortest = sorted(range(len(lengths)), key=lengths.__getitem__)
        return [self.samples.test.rows[at] for at in shortest[:NUM_ROWS_SCORED_AGAIN]]

    def _answers_while_training(self) -> bool:
        settings = self.context.recipe.evaluation.generation
        return isinstance(settings, GenerationOn) and settings.during_training

    def record_validation(self, trainer: Trainer) -> dict[str, float]:
        """Score the validation split and write its row; returns the metrics of the row. At step 0
        the scores come from `record_base`.
        """
        recipe, answers = self.context.recipe, []
        base, self._base = self._base, None
        if base is not None:
            score, answers = sum_scores(base.validation), base.validation_answers
        else:
            with self.context.phase("evaluating"):
                score, _ = self.score(trainer, "validation")
            if self._answers_while_training():
                answers = self.answer(trainer, "validation")
        self._validated = (trainer.state.global_step, score)
        generation = None
        if self._answers_while_training():
            generation = score_answers(recipe.data.task, answers)
            refuse_unjudged(recipe, generation, trainer.state.global_step)
        return self._append_score(trainer.state, "validation", score, generation)

    def record_step(self, state: TrainerState, logs: Mapping[str, float]) -> None:
        """Write the row of a training step.

        Raises:
            DivergedError: the loss is not finite.
        """
        if not math.isfinite(logs["loss"]):
            raise DivergedError(
                f"the loss of step {state.global_step} is {logs['loss']}", hint=DIVERGED_HINT
            )
        row: dict[str, Any] = {"step": state.global_step, "epoch": state.epoch}
        for key in ("loss", "grad_norm", "learning_rate"):
            value = logs.get(key)
            row[key] = value if value is not None and math.isfinite(value) else None
        self._append_metrics(row)

    def save_checkpoint(self, trainer: Trainer, write: Callable[[], None]) -> None:
        """Save this step's checkpoint with `write`, commit it once all ranks have written, prune
        older checkpoints and offer this one for upload.
        """
        context, paths, step = self.context, self.context.paths, trainer.state.global_step
        if marker_path(paths.checkpoint_dir(step)).exists():
            return
        with context.phase("saving"):
            _refuse_weights_that_are_not_finite(trainer)
            saved_dir = Path(trainer.args.output_dir) / f"checkpoint-{step}"
            if context.is_main:
                require_room_for_checkpoint(context.recipe, paths, step)
            with delete_on_full_disk(
                saved_dir, paths.checkpoint_dir(step), is_main=context.is_main
            ):
                write()
                trainer.accelerator.wait_for_everyone()
                if context.is_main:
                    sort_adapter_config(saved_dir)
                    carry_run_files(paths, saved_dir)
                    commit_checkpoint(saved_dir, paths, step, context.fingerprint)
            if context.is_main:
                checkpoints = context.recipe.checkpoints
                evaluations = list_evaluations(trainer.state.log_history, checkpoints.metric)
                apply_retention(paths, checkpoints, evaluations, context.recipe_digest)
                if context.uploader is not None:
                    context.uploader.offer(step)
            trainer.accelerator.wait_for_everyone()

    def require_intact(self, step: int) -> Path:
        """The folder of a committed checkpoint.

        Raises:
            OSError: it was damaged later; the next attempt detects that before it trains.
        """
        checkpoint_dir = self.context.paths.checkpoint_dir(step)
        if not self.context.on_main(lambda: is_intact(checkpoint_dir)):
            raise OSError(
                f"{checkpoint_dir} differs from the files that were committed; launch again to fix"
                " it"
            )
        return checkpoint_dir

    def score_best(
        self,
        trainer: Trainer,
        best_step: int,
        stop_reason: StopReason,
        trained: Mapping[str, Any],
    ) -> TrainResult:
        """Score the weights in memory, those of `best_step`, on both splits; the base's scores were
        recorded at step 0. `trained` is `RunTrainer.describe_training`.

        Raises:
            CorruptFileError: the scores of the rows do not add up to the recorded sums.
        """
        context, metric = self.context, self.context.recipe.checkpoints.metric
        # If the last evaluation was at this step, it is not computed again.
        if self._validated is not None and self._validated[0] == best_step:
            validation = self._validated[1]
        else:
            validation, _ = self.score(trainer, "validation")
        context.on_main(
            lambda: verify_score(validation, load_jsonl(context.paths.metrics_path), best_step)
        )
        test, test_rows = self.score(trainer, "test")
        base = context.on_main(self._load_base_scores)
        if context.is_main:
            self._record_tuned_rows(test_rows)
        answers = self.answer(trainer, "test")
        generation = context.on_main(lambda: self._record_answers(answers))
        result = TrainResult(
            recipe_digest=context.recipe_digest,
            outcome="completed",
            stop_reason=stop_reason,
            num_steps=trainer.state.global_step,
            best_step=best_step,
            best_metric=dict(list_evaluations(trainer.state.log_history, metric))[best_step],
            metric=metric,
            num_train_rows=len(self.samples.train.rows),
            base={split: SplitScore.model_validate(score) for split, score in base.items()},
            tuned={"validation": validation, "test": test},
            generation=generation,
            # Missing if an older version of the runner started the run.
            initial_weights_hash=base["test"].get("initial_weights_hash"),
            **trained,
        )
        context.on_main(lambda: self._require_agreement(result))
        return result

    def _require_agreement(self, result: TrainResult) -> None:
        path = self.context.paths.eval_rows_path
        if lines := find_score_contradictions(result, load_jsonl(path)):
            shown = "\n".join(f"  {line}" for line in lines)
            raise CorruptFileError(
                f"the result differs from what {path} adds up to:\n{shown}",
                hint="`runner launch RECIPE --fresh` moves the run aside and starts from step 0",
            )

    def export_model(self, trainer: Trainer, best_step: int) -> None:
        """Write the weights in memory, those of `best_step`, to `model/`. They are saved next to
        it, checked, then renamed.
        """
        paths = self.context.paths
        if self.context.is_main:  # left by an attempt killed before its result
            shutil.rmtree(paths.model_dir, ignore_errors=True)
        self._write_export(trainer, best_step)
        if self.context.is_main:
            paths.model_partial_dir.rename(paths.model_dir)
            fsync_dir(paths.run_dir)
            # Now, while the files that were just checked are still in the page cache.
            self._model_files = record_model(paths.model_dir)

    def repair_export(self, trainer: Trainer, best_step: int, manifest: Manifest) -> None:
        """Write the weights in memory, those of `best_step`, next to `model/`. If they match the
        recorded export, move the files that `model/` lacks, or has damaged, into place.

        Raises:
            ExportError: a file that `model/` needs would differ; `model/` stays as it is.
        """
        self._write_export(trainer, best_step)
        if not self.context.is_main:
            return
        paths = self.context.paths
        if differences := find_other_export(paths, manifest):
            shutil.rmtree(paths.model_partial_dir, ignore_errors=True)
            shown = "\n".join(f"  {line}" for line in differences)
            raise ExportError(
                f"the export of step {best_step} is not the one that was recorded, so"
                f" {paths.model_dir} is left unchanged:\n{shown}",
                hint=_suggest_versions(paths),
            )
        restore_model_files(paths, manifest)

    def _write_export(self, trainer: Trainer, best_step: int) -> None:
        """Save the weights in memory next to `model/`, and check the files."""
        context, partial_dir = self.context, self.context.paths.model_partial_dir
        if context.is_main:  # left by an attempt that was killed
            shutil.rmtree(partial_dir, ignore_errors=True)
        trainer.accelerator.wait_for_everyone()
        # Transformers switches the cache off for training, and would save that setting.
        trainer.model.config.use_cache = True
        trainer.save_model(str(partial_dir))
        embeddings = {}
        if context.recipe.adapter.method != "none":
            embeddings = collect_resized_embeddings(trainer.model, context.recipe.model)
        trainer.accelerator.wait_for_everyone()
        context.preemption.needs_peers = False  # the other ranks end now
        if context.is_main:
            # A pickle that can hold the hub token, and PEFT's empty model card.
            for name in ("training_args.bin", "README.md"):
                (partial_dir / name).unlink(missing_ok=True)
            trainer.processing_class.save_pretrained(partial_dir)
            trainer.model.generation_config.save_pretrained(partial_dir)
            drop_loading_options(partial_dir)
            sort_adapter_config(partial_dir)
            add_to_adapter(partial_dir, embeddings)
            shapes = {name: tuple(tensor.shape) for name, tensor in embeddings.items()}
            verify_export(partial_dir, self._trained_shapes | shapes)
            verify_same_weights(partial_dir, context.paths.checkpoint_dir(best_step))
            follow_umask(partial_dir)
            sync_folder(partial_dir)

    def record_result(self, result: TrainResult) -> None:
        """Write `result.json`, the last file of a run, which completes it. It lists the checksums
        of `model/`, of the recipe and of the files that it sums up.
        """
        if self.context.is_main:
            paths = self.context.paths
            summed_up = record_files(list_summed_files(paths), paths.run_dir)
            result = result.model_copy(update={"files": self._model_files | summed_up})
            write_json_atomic(paths.result_path, sign_result(result.model_dump(mode="json")))

    def score(self, trainer: Trainer, split: str) -> tuple[SplitScore, list[RowScore]]:
        """The score of `validation` or `test`, and of each of its rows.

        Raises:
            DivergedError: the score of a row is not finite.
            RunnerError: it is impossible for another reason.
        """
        rows = self._score_rows(trainer, self._split(split).rows)
        refuse_impossible(rows, split, trainer.state.global_step)
        return sum_scores(rows), rows

    def _score_rows(self, trainer: Trainer, rows: Sequence[Row]) -> list[RowScore]:
        with trainer.compute_loss_context_manager():
            return score_rows(
                trainer.model_wrapped,
                rows,
                batch_size=trainer.args.per_device_eval_batch_size,
                pad_token_id=trainer.processing_class.pad_token_id,
                accelerator=trainer.accelerator,
                sign_of_life=self.context.sign_of_life,
            )

    def answer(self, trainer: Trainer, split: str) -> list[Answer]:
        """The judged answers to the first rows of a split; empty if generation is off."""
        recipe = self.context.recipe
        generation = recipe.evaluation.generation
        if not isinstance(generation, GenerationOn):
            return []
        with self.context.phase("generating"), trainer.compute_loss_context_manager():
            return generate_answers(
                trainer.model_wrapped,
                self._split(split).rows[: generation.num_samples],
                task=recipe.data.task,
                metrics=recipe.evaluation.metrics,
                tokenizer=trainer.processing_class,
                max_new_tokens=generation.max_new_tokens,
                batch_size=derive_answer_batch(recipe, self.context.micro_batch_divisor),
                accelerator=trainer.accelerator,
                sign_of_life=self.context.sign_of_life,
            )

    def _split(self, name: str) -> Split:
        split: Split = getattr(self.samples, name)
        return split

    def _append_score(
        self,
        state: TrainerState,
        split: str,
        score: SplitScore,
        generation: GenerationScore | None = None,
        more: Mapping[str, Any] = MappingProxyType({}),
    ) -> dict[str, float]:
        """Write one evaluation row of `metrics.jsonl`, with `more` in it; returns its metrics."""
        metrics = {
            "nll_per_completion_token": score.nll_per_completion_token,
            "nll_per_token": score.nll_per_token,
            **(generation.metrics if generation else {}),
        }
        row = {"step": state.global_step, "split": split, **metrics, **score.model_dump(), **more}
        if generation:
            row["generation"] = generation.model_dump(exclude={"metrics"})
        self._append_metrics(row)
        return metrics

    def _append_metrics(self, row: Mapping[str, Any]) -> None:
        if self.context.is_main:
            append_jsonl(self.context.paths.metrics_path, row)

    def _load_base_scores(self) -> dict[str, dict[str, Any]]:
        rows = load_jsonl(self.context.paths.metrics_path)
        return {row["split"]: row for row in rows if row["step"] == 0 and "split" in row}

    def _record_tuned_rows(self, test_rows: list[RowScore]) -> None:
        """Write the tuned model's rows after the base's."""
        path = self.context.paths.eval_rows_path
        base_rows = [row for row in load_jsonl(path) if row["model"] == "base"]
        tuned_rows = [{"model": "tuned", **row.as_json()} for row in test_rows]
        write_jsonl_atomic(path, [*base_rows, *tuned_rows])

    def _record_answers(self, answers: list[Answer]) -> dict[str, GenerationScore]:
        """Write the tuned model's answers after the base's, and score both."""
        if not answers:
            return {}
        path = self.context.paths.predictions_path
        by_model = {"base": load_answers(path, "base"), "tuned": answers}
        write_answers(path, by_model)
        task = self.context.recipe.data.task
        return {model: score_answers(task, found) for model, found in by_model.items() if found}


# Compared for each split of `samples.json`: the rows, their tokens, the tokens with labels, and the
# number of bytes, by which scores in bits are divided.
_COMPARED: Final = ("ids", "input_ids_hash", "mask_hash", "num_bytes")


def find_sample_differences(before: Any, now: Mapping[str, Any]) -> list[str]:
    """One line for each split whose rows, tokens or labels differ from those of another
    `samples.json`.

    >>> split = {"ids": ["a"], "input_ids_hash": "1", "mask_hash": "2"}
    >>> other = split | {"mask_hash": "3"}
    >>> find_sample_differences({"splits": {"test": split}}, {"splits": {"test": other}})
    ['test: differs in mask_hash']
    """
    recorded = before.get("splits") if isinstance(before, Mapping) else None
    lines = []
    for split, facts in now["splits"].items():
        known = recorded.get(split) if isinstance(recorded, Mapping) else None
        if not isinstance(known, Mapping):
            lines.append(f"{split}: not recorded")
            continue
        other = [key for key in _COMPARED if known.get(key) != facts.get(key)]
        if other:
            lines.append(f"{split}: differs in {', '.join(other)}")
    return lines


def _suggest_versions(paths: RunPaths) -> str:
    """A hint with the library versions that differ from those under which the run was completed;
    other versions can write another export.
    """
    trained = list_trained(load_record(paths).attempts)
    before, now = trained[-1].versions if trained else {}, list_library_versions()
    other = [
        f"{name} {before[name]} (now {version})"
        for name, version in sorted(now.items())
        if before.get(name, version) != version
    ]
    if other:
        return f"repair it with the versions that completed it: {', '.join(other)}"
    return "restore model/ from a copy of the run"


def _refuse_weights_that_are_not_finite(trainer: Trainer) -> None:
    """Check weights too: the loss is computed before the update, so a finite loss does not prove
    finite weights.
    """
    are_finite = True
    for weight in trainer.model.parameters():
        if weight.requires_grad:
            local = getattr(weight, "ds_tensor", weight)  # under ZeRO-3, this rank's part
            are_finite = are_finite and bool(torch.isfinite(local).all())
    if not all(gather_object([are_finite])):
        raise DivergedError(
            f"the weights after step {trainer.state.global_step} are not finite",
            hint=DIVERGED_HINT,
        )
