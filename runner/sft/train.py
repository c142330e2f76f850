"""One attempt, top to bottom: recipe, tokenizer, rows, model, training, best weights, scores,
export, result.
"""

from __future__ import annotations

import gc
from pathlib import Path

from runner.checkpoints.restore import choose_resume_step
from runner.data.rows import build_samples
from runner.data.tokenizer import load_tokenizer
from runner.model.load import load_model
from runner.recipe.trackers import require_trackers
from runner.sft.context import RunContext
from runner.sft.generation import refuse_what_cannot_be_judged
from runner.sft.preemption import Preemption
from runner.sft.recorder import Recorder
from runner.sft.startup import WorldPlace, remove_stale_build_locks
from runner.sft.tracking import open_trackers
from runner.sft.trainer import RunTrainer, build_training_args


def train(run_dir: Path, place: WorldPlace, preemption: Preemption) -> None:
    """Bring the run to its result, from its newest verified checkpoint where there is one.

    Raises:
        PreemptedError: the attempt was asked to leave while it trained; what it has is saved.
    """
    # What the imports made lives until the end. accelerate collects garbage before it prepares the
    # model, and walking through these objects took it 0.25 s.
    gc.freeze()
    context = RunContext.open(run_dir, place, preemption)
    recipe, paths = context.recipe, context.paths
    with context.phase("loading"):
        require_trackers(recipe)
        remove_stale_build_locks()  # before the arguments, which load DeepSpeed's first extension
        # Before the model: ZeRO-3 partitions weights while they load.
        args = build_training_args(context)
        context.on_main(context.open_uploader)
        tokenizer = load_tokenizer(recipe.model)
        samples = build_samples(recipe.data, tokenizer)
        refuse_what_cannot_be_judged(recipe, samples)
        recorder = Recorder(context, samples)
        remote = context.uploader.folder if context.uploader is not None else None
        resume_step = context.on_main(
            lambda: choose_resume_step(
                paths,
                recipe,
                context.fingerprint,
                context.resume,
                remote,
                divisor=context.micro_batch_divisor,
                before_resuming=recorder.require_same_samples,
            )
        )
        recorder.record_samples(resume_step)
        if context.uploader is not None:
            context.uploader.start()
        # Before the model, which takes long, and before the metrics are cut.
        trackers = open_trackers(context, resume_step)
        recorder.rewind(resume_step)
        model = load_model(recipe, tokenizer, local_rank=place.local_rank)
        trainer = RunTrainer(recorder, args, model, tokenizer, trackers)
        recorder.begin(trainer)

    first_step = resume_step or 0
    what = "starting at step 0" if resume_step is None else f"resuming from step {resume_step}"
    print(what, flush=True)
    with context.phase("training"):
        resume_dir = str(paths.checkpoint_dir(first_step)) if first_step else None
        trainer.train(resume_from_checkpoint=resume_dir)
    num_steps = trainer.state.global_step
    preemption.end_training(num_steps)  # Transformers returns as if it had finished
    with context.phase("evaluating best"):
        best_step = trainer.flow.best_step(trainer.state)
        trainer.load_weights_of(best_step)
        stop_reason = trainer.flow.stop_reason(trainer.state)
        result = recorder.score_best(trainer, best_step, stop_reason)
    with context.phase("exporting"):
        recorder.export_model(trainer, best_step)
    if context.uploader is not None:
        with context.phase("uploading"):
            context.uploader.finish()
    context.write_timing(num_steps - first_step, trainer.progress.tokens_per_second)
    recorder.record_result(result)
    trackers.finish(result)  # an upload that hangs costs nothing of the run
    print(f"completed at step {num_steps} by {stop_reason}, best step {best_step}", flush=True)
