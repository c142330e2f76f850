"""One attempt, top to bottom: recipe, tokenizer, rows, model, training, best weights, scores,
export, result.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from pathlib import Path
from typing import Any

from trl import SFTConfig

from runner.checkpoints.restore import choose_resume_step, require_step
from runner.data.tokenizer import load_tokenizer
from runner.errors import RefusedError
from runner.model.load import load_model
from runner.recipe.trackers import require_trackers
from runner.run.result import load_result
from runner.sft.context import RunContext
from runner.sft.phases import (
    announce_compilations,
    name_model_phase,
    name_tokenizer_phase,
)
from runner.sft.preemption import Preemption
from runner.sft.recorder import Recorder
from runner.sft.rows import load_samples
from runner.sft.startup import (
    WorldPlace,
    keep_freed_memory,
    remove_stale_build_locks,
    uses_deepspeed,
)
from runner.sft.tracking import Trackers, open_trackers
from runner.sft.trainer import RunTrainer, build_training_args


def train(run_dir: Path, place: WorldPlace, preemption: Preemption) -> None:
    """Train the run to its result, from its newest verified checkpoint if there is one.

    Raises:
        PreemptedError: the attempt was asked to stop during training; its last step is saved.
    """
    context = RunContext.open(run_dir, place, preemption)
    if context.is_repair:
        repair_model(context)
        return
    recipe, paths, phase = context.recipe, context.paths, context.phase
    trainer, trackers, resume_step = _prepare(context)
    recorder = trainer.recorder
    first_step = resume_step or 0
    what = "starting at step 0" if resume_step is None else f"resuming from step {resume_step}"
    print(what, flush=True)
    # This phase ends when the first epoch begins and enters the phase "training".
    with phase(f"restoring step {first_step}" if first_step else "preparing to train"):
        resume_dir = str(paths.checkpoint_dir(first_step)) if first_step else None
        trainer.train(resume_from_checkpoint=resume_dir)
    num_steps = trainer.state.global_step
    preemption.end_training(num_steps)  # after a stop, Transformers returns as if it had finished
    with phase("evaluating best"):
        trained = context.on_main(trainer.describe_training)
        best_step = trainer.flow.best_step(trainer.state)
        trainer.load_weights_of(best_step)
        stop_reason = trainer.flow.stop_reason(trainer.state)
        result = recorder.score_best(trainer, best_step, stop_reason, trained)
    with phase("exporting"):
        recorder.export_model(trainer, best_step)
    if context.uploader is not None:
        with phase("uploading"):
            context.uploader.finish()
    context.write_timing(num_steps - first_step, trainer.progress.tokens_per_second)
    recorder.record_result(result)
    with phase("uploading to trackers") if recipe.tracking.report_to else nullcontext():
        trackers.finish(result)  # the result is written, so an upload that hangs loses nothing
    print(f"completed at step {num_steps} by {stop_reason}, best step {best_step}", flush=True)


def repair_model(context: RunContext) -> None:
    """Write `model/` of a completed run again, from its best checkpoint; trains and scores nothing.

    Raises:
        RefusedError: there is no result, or its best checkpoint is lost.
        ExportError: the export would differ from the recorded one.
    """
    paths, phase = context.paths, context.phase
    result = load_result(paths)
    if result is None or result.files is None:
        raise RefusedError(f"{paths.result_path} records no files that could be repaired")
    args = _build_arguments(context)
    with phase(name_tokenizer_phase(context.recipe.model)):
        tokenizer = load_tokenizer(context.recipe.model)
    recorder = Recorder(context, load_samples(context, tokenizer))
    with phase("choosing a checkpoint"):
        context.on_main(partial(require_step, paths, context.recipe.checkpoints, result.best_step))
    step = result.best_step
    trainer = _build_trainer(context, recorder, args, tokenizer, Trackers(context), step)
    with phase(f"restoring step {step}"):
        trainer.train()  # makes no step, but creates what loads weights, such as DeepSpeed's engine
        trainer.load_weights_of(step)
    with phase("exporting"):
        recorder.repair_export(trainer, step, result.files)
    print(f"wrote {paths.model_dir} again from step {step}", flush=True)


def _prepare(context: RunContext) -> tuple[RunTrainer, Trackers, int | None]:
    """The trainer with rows and model, the open trackers, and the step to resume from."""
    recipe, phase = context.recipe, context.phase
    require_trackers(recipe)
    args = _build_arguments(context)
    if recipe.checkpoints.remote is not None:
        with phase("opening the remote storage"):
            context.on_main(context.open_uploader)
    with phase(name_tokenizer_phase(recipe.model)):
        tokenizer = load_tokenizer(recipe.model)
    recorder = Recorder(context, load_samples(context, tokenizer))
    with phase("choosing a checkpoint"):
        resume_step = context.on_main(partial(_choose_resume_step, context, recorder))
        recorder.record_samples(resume_step)
        if context.uploader is not None:
            context.uploader.start()
    # Before the model, which takes long to load, and before the metrics are cut.
    with phase("starting trackers") if recipe.tracking.report_to else nullcontext():
        trackers = open_trackers(context, resume_step)
    recorder.rewind(resume_step)
    trainer = _build_trainer(context, recorder, args, tokenizer, trackers, resume_step)
    return trainer, trackers, resume_step


def _build_arguments(context: RunContext) -> SFTConfig:
    phase = context.phase
    if uses_deepspeed():
        with phase("loading DeepSpeed"):
            remove_stale_build_locks()  # before the arguments, which load its first extension
            announce_compilations(phase)
    is_alone = context.num_processes == 1
    with phase("setting up" if is_alone else "waiting for the other processes"):
        # Before the model: ZeRO-3 partitions weights while they load.
        args = build_training_args(context)
    if args.use_cpu:
        keep_freed_memory()
    return args


def _build_trainer(
    context: RunContext,
    recorder: Recorder,
    args: SFTConfig,
    tokenizer: Any,
    trackers: Trackers,
    resume_step: int | None,
) -> RunTrainer:
    with context.phase(name_model_phase(context.recipe.model)):
        model = load_model(context.recipe, tokenizer, local_rank=context.place.local_rank)
    with context.phase("building the trainer"):
        trainer = RunTrainer(recorder, args, model, tokenizer, trackers)
        recorder.begin(trainer, resume_step)
    return trainer


def _choose_resume_step(context: RunContext, recorder: Recorder) -> int | None:
    remote = context.uploader.folder if context.uploader is not None else None
    return choose_resume_step(
        context.paths,
        context.recipe,
        context.fingerprint,
        context.resume,
        remote,
        divisor=context.micro_batch_divisor,
        before_resuming=recorder.require_same_samples,
        phase=context.phase,
    )
