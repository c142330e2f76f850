"""One attempt, top to bottom: recipe, tokenizer, rows, model, training, best weights, scores,
export, result.
"""

from __future__ import annotations

import json
import shutil
import time
from pathlib import Path
from typing import Any

from runner.checkpoints.marker import list_evaluations, sync_folder
from runner.checkpoints.restore import choose_resume_step
from runner.data.rows import build_samples, describe_samples
from runner.data.tokenizer import load_tokenizer
from runner.files import fsync_dir, load_jsonl, write_json_atomic, write_jsonl_atomic
from runner.model.load import load_model
from runner.model.weights import (
    add_to_adapter,
    collect_resized_embeddings,
    sort_adapter_config,
    verify_export,
    verify_same_weights,
    verify_score,
)
from runner.recipe.trackers import require_trackers
from runner.run.record import GenerationScore, SplitScore, TrainResult
from runner.sft.context import RunContext
from runner.sft.generation import (
    Answer,
    load_answers,
    refuse_what_cannot_be_judged,
    score_answers,
    write_answers,
)
from runner.sft.preemption import Preemption
from runner.sft.startup import WorldPlace, remove_stale_build_locks
from runner.sft.tracking import open_trackers
from runner.sft.trainer import RunTrainer, build_training_args


def train(run_dir: Path, place: WorldPlace, preemption: Preemption) -> None:
    """Bring the run to its result, from its newest verified checkpoint where there is one.

    Raises:
        PreemptedError: the attempt was asked to leave while it trained; what it has is saved.
    """
    context = RunContext.open(run_dir, place, preemption)
    recipe, paths = context.recipe, context.paths
    started = time.perf_counter()
    with context.phase("loading"):
        require_trackers(recipe)
        remove_stale_build_locks()  # before the arguments, which load DeepSpeed's first extension
        # Before the model: ZeRO-3 partitions weights while they load.
        args = build_training_args(context)
        context.on_main(context.open_uploader)
        tokenizer = load_tokenizer(recipe.model)
        samples = build_samples(recipe.data, tokenizer)
        refuse_what_cannot_be_judged(recipe, samples)
        if context.is_main:
            write_json_atomic(paths.samples_path, describe_samples(samples, recipe.loss))
        remote = context.uploader.folder if context.uploader is not None else None
        resume_step = context.on_main(
            lambda: choose_resume_step(
                paths,
                recipe,
                context.fingerprint,
                context.resume,
                remote,
                has_run_out_of_memory=context.micro_batch_divisor > 1,
            )
        )
        if context.uploader is not None:
            context.uploader.start()
        # Before the model, which takes long, and the cut.
        trackers = open_trackers(context, resume_step)
        context.truncate_metrics(resume_step)
        model = load_model(recipe, tokenizer, local_rank=place.local_rank)
        trainer = RunTrainer(context, args, model, tokenizer, samples, trackers)
        if context.is_main:
            trainer.require_room()
            text = json.dumps(trainer.effective_arguments(), default=str)
            write_json_atomic(context.attempt.training_args_path, json.loads(text))

    first_step = resume_step or 0
    print(
        f"resuming from step {resume_step}" if resume_step is not None else "starting at step 0",
        flush=True,
    )
    with context.phase("training"):
        trainer.train(
            resume_from_checkpoint=str(paths.checkpoint_dir(first_step)) if first_step else None
        )
    num_steps = trainer.state.global_step
    preemption.end_training(num_steps)  # Transformers returns as if it had finished
    with context.phase("evaluating best"):
        result = score_best(context, trainer)
    with context.phase("exporting"):
        export_model(context, trainer, tokenizer, result.best_step, preemption)
    if context.uploader is not None:
        with context.phase("uploading"):
            context.uploader.finish()
    seconds = time.perf_counter() - started
    context.write_timing(
        {
            "num_steps": num_steps - first_step,
            "total_seconds": round(seconds, 3),
            "tokens_per_second": round(trainer.progress.tokens_per_second, 1),
        }
    )
    if context.is_main:
        write_json_atomic(paths.result_path, result.model_dump(mode="json"))
    trackers.finish(result)  # an upload that hangs costs nothing of the run
    print(
        f"completed at step {num_steps} by {result.stop_reason}, best step {result.best_step}",
        flush=True,
    )


def score_best(context: RunContext, trainer: RunTrainer) -> TrainResult:
    """Load the best weights and score them on both splits; the base's scores were recorded at step
    0.
    """
    recipe, state = context.recipe, trainer.state
    best_step = trainer.flow.best_step(state)
    assert best_step is not None, "the last step is always evaluated"
    num_steps = state.global_step
    is_stopped_early = trainer.flow.is_stopped_early(state) and num_steps < state.max_steps
    limit = "max_steps" if recipe.training.max_steps is not None else "num_train_epochs"
    trainer.load_weights_of(best_step)
    validation = trainer.score_validation_of(best_step)
    context.on_main(
        lambda: verify_score(validation, load_jsonl(context.paths.metrics_path), best_step)
    )
    test, test_rows = trainer.score("test")
    base = context.on_main(lambda: _load_base_scores(context))
    if context.is_main:
        base_rows = [
            row for row in load_jsonl(context.paths.eval_rows_path) if row["model"] == "base"
        ]
        tuned_rows = [{"model": "tuned", **row.as_json()} for row in test_rows]
        write_jsonl_atomic(context.paths.eval_rows_path, [*base_rows, *tuned_rows])
    answers = trainer.answer("test")
    generation = context.on_main(lambda: _record_answers(context, answers))
    return TrainResult(
        recipe_digest=context.recipe_digest,
        outcome="completed",
        stop_reason="early_stopping" if is_stopped_early else limit,
        num_steps=num_steps,
        best_step=best_step,
        best_metric=dict(list_evaluations(state.log_history, recipe.checkpoints.metric))[best_step],
        metric=recipe.checkpoints.metric,
        num_train_rows=len(trainer.samples.train.rows),
        base={split: SplitScore.model_validate(score) for split, score in base.items()},
        tuned={"validation": validation, "test": test},
        generation=generation,
    )


def _load_base_scores(context: RunContext) -> dict[str, dict[str, Any]]:
    rows = load_jsonl(context.paths.metrics_path)
    return {row["split"]: row for row in rows if row["step"] == 0 and "split" in row}


def _record_answers(context: RunContext, answers: list[Answer]) -> dict[str, GenerationScore]:
    """Put the tuned model's answers behind the base's, and score both."""
    if not answers:
        return {}
    path = context.paths.predictions_path
    by_model = {"base": load_answers(path, "base"), "tuned": answers}
    write_answers(path, by_model)
    return {
        model: score_answers(context.recipe.data.task, found)
        for model, found in by_model.items()
        if found
    }


def export_model(
    context: RunContext, trainer: RunTrainer, tokenizer: Any, best_step: int, preemption: Preemption
) -> None:
    """Write the weights in memory, those of `best_step`, to `model/`: saved beside it, checked,
    then renamed.
    """
    partial_dir, model_dir = context.paths.model_partial_dir, context.paths.model_dir
    if context.is_main:
        for leftover in (partial_dir, model_dir):  # of an attempt that was killed before its result
            shutil.rmtree(leftover, ignore_errors=True)
    trainer.accelerator.wait_for_everyone()
    # Switched off by Transformers for the training, and saved like that.
    trainer.model.config.use_cache = True
    trainer.save_model(str(partial_dir))
    is_adapter = context.recipe.adapter.method != "none"
    embeddings = (
        collect_resized_embeddings(trainer.model, context.recipe.model) if is_adapter else {}
    )
    trainer.accelerator.wait_for_everyone()
    preemption.needs_peers = False  # the others end now
    if context.is_main:
        # a pickle that can hold the hub token, and PEFT's empty model card
        for name in ("training_args.bin", "README.md"):
            (partial_dir / name).unlink(missing_ok=True)
        tokenizer.save_pretrained(partial_dir)
        trainer.model.generation_config.save_pretrained(partial_dir)
        sort_adapter_config(partial_dir)
        add_to_adapter(partial_dir, embeddings)
        shapes = {name: tuple(tensor.shape) for name, tensor in embeddings.items()}
        verify_export(partial_dir, trainer.trained_shapes | shapes)
        verify_same_weights(partial_dir, context.paths.checkpoint_dir(best_step))
        sync_folder(partial_dir)
        partial_dir.rename(model_dir)
        fsync_dir(model_dir.parent)
