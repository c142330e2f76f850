"""Loads the whole tensors of a checkpoint into a model that DeepSpeed may have partitioned."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file

from runner.sft.export import exported_name


def load_gathered_weights(model: torch.nn.Module, checkpoint_dir: Path) -> None:
    """Put the whole tensors of a checkpoint into a model of DeepSpeed, whose own files were stripped from it.

    Transformers only loads those. The optimizer's copy of the weights is left as it is: nothing is trained afterwards.
    """
    from deepspeed.runtime.zero import GatheredParameters

    tensors: dict[str, torch.Tensor] = {}
    for path in sorted(checkpoint_dir.glob("*.safetensors")):
        tensors |= load_file(path)
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            is_partitioned = hasattr(parameter, "ds_id")
            with torch.no_grad(), GatheredParameters([parameter], modifier_rank=0):
                if not is_partitioned or torch.distributed.get_rank() == 0:
                    parameter.copy_(tensors[exported_name(name)])
