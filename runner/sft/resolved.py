"""`resolved_training_args.json`: every field of the training arguments with the effective value in
this attempt, and facts that the fields do not contain.

The order of rows and DeepSpeed's configuration do not come from the arguments, so the fields with
these names are filled in here.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from transformers import Trainer

from runner.secrets import scrub_json
from runner.sft.base_key import describe_device
from runner.sft.context import RunContext


def describe_arguments(context: RunContext, trainer: Trainer) -> dict[str, Any]:
    """The content of the file, without secrets. Call it once training has begun: the schedule is
    then known, and DeepSpeed has replaced every `auto`.
    """
    args, accelerator, recipe = trainer.args, trainer.accelerator, context.recipe
    fields = {key: value for key, value in args.to_dict().items() if not key.endswith("_token")}
    deepspeed = getattr(accelerator, "deepspeed_config", None)
    strategy = recipe.training.train_sampling_strategy
    # A constant schedule ignores `warmup_steps`.
    is_constant = args.lr_scheduler_type == "constant"
    num_warmup_steps = 0 if is_constant else args.get_warmup_steps(trainer.state.max_steps)
    trained = [weight for weight in trainer.model.parameters() if weight.requires_grad]
    resolved = {
        "device": describe_device(accelerator.device),
        "distributed_type": accelerator.distributed_type.value,
        "num_processes": accelerator.num_processes,
        "mixed_precision": accelerator.mixed_precision,
        "trained_dtypes": sorted({str(weight.dtype).removeprefix("torch.") for weight in trained}),
        "global_batch_size": recipe.global_batch_size,
        "per_device_train_batch_size": args.per_device_train_batch_size,
        "gradient_accumulation_steps": args.gradient_accumulation_steps,
        "per_device_eval_batch_size": args.per_device_eval_batch_size,
        "train_sampling_strategy": strategy,
        "schedule_steps": trainer.state.max_steps,
        "num_warmup_steps": num_warmup_steps,
    }
    found = {
        **fields,
        "train_sampling_strategy": strategy,
        "deepspeed": deepspeed,
        "resolved": resolved,
    }
    plain: dict[str, Any] = json.loads(json.dumps(_name_infinities(found), default=str))
    return dict(scrub_json(plain))


def _name_infinities(value: Any) -> Any:
    """A value in which texts replace the numbers that JSON cannot write. For example,
    Accelerate turns off DeepSpeed's printing with an infinite number of steps.
    """
    if isinstance(value, Mapping):
        return {name: _name_infinities(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_name_infinities(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value
