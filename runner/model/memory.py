"""Estimates the device memory and the disk space that a run needs, without running anything.

Memory: weights, adapter, gradients and optimizer states are exact, activations kept by autograd are
traced (`size`), and the rest is assumed (`ASSUMPTIONS`; docs/preflight.md explains all three).
Disk: the checkpoints that are kept, the one being written, and the export. `runner check` estimates
a whole grid; the training process checks the disk before it trains and before each checkpoint.
"""

from __future__ import annotations

import errno
import json
import math
import shutil
from collections.abc import Iterable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any, Final

import torch
import yaml

from runner.checkpoints.marker import list_committed, load_marker
from runner.errors import CorruptFileError
from runner.model.size import ActivationCurve, ModelSize, TrainedTensor
from runner.recipe.evaluation_section import GenerationOn
from runner.recipe.parse import Recipe
from runner.recipe.schedule import Schedule, derive_schedule
from runner.run.paths import RunPaths
from runner.text import format_mib

GIB: Final = 2**30
_CUDA_BYTES: Final = 800 * 2**20  # context, cuBLAS workspaces
_FRAGMENTATION: Final = 0.1  # of activations
# TRL's fused LM head computes tiles of this many tokens by this many vocabulary entries, never all
# logits.
_TILE_TOKENS: Final = 4096
_TILE_VOCABULARY: Final = 32768

ASSUMPTIONS: Final = (
    "the longest training row fills every row of the micro-batch",
    "the backward pass of a layer needs as much again as autograd kept for it",
    (
        f"CUDA itself uses {_CUDA_BYTES / GIB:.1f} GiB,"
        f" and {_FRAGMENTATION:.0%} of activations are lost to fragmentation"
    ),
    "attention is fused if the recipe names FlashAttention",
    "paged optimizer states stay on the device",
    "evaluation needs less than a training step",
)
# During generation, the logits of the last token exist in the model's dtype and in float32, and
# once more sorted or compared. The cache is copied layer by layer at each token, which leaves
# equally large holes.
_ANSWER_LOGIT_BYTES: Final = 12
_CACHE_COPIES: Final = 2


@dataclass(frozen=True)
class Sharding:
    """The distribution of a model over processes, from the launch config and its DeepSpeed file."""

    num_processes: int = 1
    uses_cpu: bool = False
    zero_stage: int = 0  # 0: no DeepSpeed
    offloads_optimizer: bool = False
    offloads_parameters: bool = False


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one process at the peak of a training step."""

    weights: int
    adapter: int
    gradients: int
    optimizer: int
    activations: int
    logits: int
    overhead: int
    offloaded: int  # in host memory instead; not in `total`

    @property
    def total(self) -> int:
        """Bytes on the device."""
        return sum(getattr(self, field.name) for field in fields(self) if field.name != "offloaded")


def load_sharding(recipe: Recipe) -> Sharding:
    """Load the sharding of the recipe's launch config; paths are relative to the current folder."""
    config = yaml.safe_load(Path(recipe.launch.accelerate_config).read_text())
    zero: dict[str, Any] = {}
    file = (config.get("deepspeed_config") or {}).get("deepspeed_config_file")
    if file is not None:
        zero = json.loads(Path(file).read_text()).get("zero_optimization", {})
    return Sharding(
        num_processes=recipe.launch.num_processes,
        uses_cpu=bool(config.get("use_cpu")),
        zero_stage=int(zero.get("stage", 0)),
        offloads_optimizer=zero.get("offload_optimizer", {}).get("device", "none") != "none",
        offloads_parameters=zero.get("offload_param", {}).get("device", "none") != "none",
    )


def optimizer_bytes(recipe: Recipe, size: ModelSize, sharding: Sharding) -> int:
    """Bytes of the optimizer's states over all processes; two float32 per element if the optimizer
    is unknown.
    """
    if sharding.zero_stage:
        # DeepSpeed keeps a float32 copy and two float32 states.
        return 12 * size.num_trained_parameters
    optim = str(recipe.training.hugging_face_arguments().get("optim") or "adamw_torch_fused")
    if optim in ("adamw_torch", "adamw_torch_fused"):
        return 2 * size.trained_bytes
    if optim in ("adamw_8bit", "paged_adamw_8bit", "adamw_bnb_8bit"):
        return sum(_eight_bit_bytes(tensor.num_elements) for tensor in size.trained)
    return 0 if optim == "sgd" else 8 * size.num_trained_parameters


def _eight_bit_bytes(num_elements: int) -> int:
    """Bytes of bitsandbytes' two states: one byte per element and a float32 per 256 elements;
    tensors below 4,096 elements stay in float32.
    """
    return (
        8 * num_elements
        if num_elements < 4096
        else 2 * (num_elements + 4 * math.ceil(num_elements / 256))
    )


def estimate_memory(
    recipe: Recipe, size: ModelSize, curve: ActivationCurve, sharding: Sharding, longest_row: int
) -> MemoryEstimate:
    """Estimate the peak of one process. ZeRO-1 and up divide the optimizer states, ZeRO-2 and up
    the gradients, ZeRO-3 the weights.
    """
    is_lora = recipe.adapter.method == "lora"
    share = sharding.num_processes
    weights = size.base_bytes + size.largest_dequantized_bytes
    adapter = size.trained_bytes if is_lora else 0
    gradients = size.trained_bytes
    optimizer = optimizer_bytes(recipe, size, sharding)
    if sharding.zero_stage:
        optimizer //= share
        gradients = gradients // share if sharding.zero_stage >= 2 else gradients
        if sharding.zero_stage == 3:
            weights, adapter = weights // share + _largest_layer_bytes(size), adapter // share
    else:
        gradients *= 2 if share > 1 else 1  # DDP's buckets hold a second copy
    offloaded = 0
    if sharding.offloads_optimizer:
        offloaded, optimizer = offloaded + optimizer, 0
    if sharding.offloads_parameters:
        offloaded, weights = offloaded + size.base_bytes // share, 2 * _largest_layer_bytes(size)
    activations = _activation_bytes(recipe, size, curve, longest_row)
    return MemoryEstimate(
        weights=weights,
        adapter=adapter,
        gradients=gradients,
        optimizer=optimizer,
        activations=activations,
        logits=_logit_bytes(recipe, size, longest_row),
        overhead=round(_FRAGMENTATION * activations) + (0 if sharding.uses_cpu else _CUDA_BYTES),
        offloaded=offloaded,
    )


def estimate_answer_memory(
    recipe: Recipe,
    size: ModelSize,
    curve: ActivationCurve,
    sharding: Sharding,
    *,
    cache_token_bytes: int,
    num_prompt_tokens: int,
    batch_size: int,
) -> int:
    """Bytes on the device of one process while `batch_size` prompts are answered up to
    `max_new_tokens`: the tensors that training keeps between two steps, the cache of keys and
    values, and the pass over the prompts.

    `curve` is for `batch_size` rows; `cache_token_bytes` comes from `trace_cache`.
    """
    generation = recipe.evaluation.generation
    assert isinstance(generation, GenerationOn)
    kept = estimate_memory(recipe, size, curve, sharding, longest_row=0)
    num_tokens = num_prompt_tokens + generation.max_new_tokens
    cache = _CACHE_COPIES * batch_size * num_tokens * cache_token_bytes
    # Nothing is kept for a backward pass: one layer, much of which is freed before its end.
    layers = curve.layer_bytes(num_prompt_tokens) + curve.rest_bytes(num_prompt_tokens)
    logits = batch_size * size.vocab_size * _ANSWER_LOGIT_BYTES
    between_steps = kept.weights + kept.adapter + kept.gradients + kept.optimizer
    overhead = round(_FRAGMENTATION * layers) + (0 if sharding.uses_cpu else _CUDA_BYTES)
    return between_steps + cache + layers + logits + overhead


def _largest_layer_bytes(size: ModelSize) -> int:
    """The bytes that ZeRO-3 gathers at a time, about a layer."""
    return size.base_bytes // max(1, size.num_layers)


def _activation_bytes(
    recipe: Recipe, size: ModelSize, curve: ActivationCurve, longest_row: int
) -> int:
    layer = curve.layer_bytes(longest_row)
    if not recipe.training.gradient_checkpointing:
        return size.num_layers * layer + curve.rest_bytes(longest_row) + layer
    tokens = recipe.training.per_device_train_batch_size * longest_row
    inputs = size.num_layers * tokens * size.hidden_size * _activation_element_bytes(recipe)
    return inputs + curve.rest_bytes(longest_row) + 2 * layer


def _activation_element_bytes(recipe: Recipe) -> int:
    return (
        4
        if recipe.model.dtype == "float32" and not (recipe.training.bf16 or recipe.training.fp16)
        else 2
    )


def _logit_bytes(recipe: Recipe, size: ModelSize, longest_row: int) -> int:
    tokens = recipe.training.per_device_train_batch_size * longest_row
    element = _activation_element_bytes(recipe)
    tile = min(tokens, _TILE_TOKENS) * min(size.vocab_size, _TILE_VOCABULARY) * element
    gradient = 4 * tokens * size.hidden_size  # float32
    if size.trains_output_embedding:
        gradient += 4 * size.vocab_size * size.hidden_size
    stated = recipe.training.hugging_face_arguments()
    whole = tokens * size.vocab_size * (element + 8) if stated.get("label_smoothing_factor") else 0
    return tile + gradient + whole


_SMALL_FILES_BYTES = 32 * 2**20  # tokenizer, records, scores


def estimate_disk(recipe: Recipe, size: ModelSize, sharding: Sharding, schedule: Schedule) -> int:
    """The peak disk use of one run in bytes, reached while it writes or exports the last
    checkpoint that it may keep.
    """
    checkpoints = recipe.checkpoints
    weights = size.trained_bytes
    states = optimizer_bytes(recipe, size, sharding)
    written = schedule.num_checkpoints + schedule.num_evaluations
    # Plus the one being written.
    num_kept = min(checkpoints.keep_latest + checkpoints.keep_best, written) + 1
    num_with_states = num_kept if checkpoints.save_optimizer else min(2, num_kept)
    folders = num_kept * weights + num_with_states * states
    return folders * (2 if checkpoints.archive == "zip" else 1) + weights + _SMALL_FILES_BYTES


def free_bytes(output_root: Path) -> int:
    """Free bytes on the disk of the output root, which need not exist yet."""
    folder = output_root.resolve()
    while not folder.exists():
        folder = folder.parent
    return shutil.disk_usage(folder).free


def require_room(
    recipe: Recipe,
    paths: RunPaths,
    trained: Iterable[tuple[str, torch.nn.Parameter]],
    num_rows: int,
    num_processes: int,
) -> None:
    """Refuse to train if there is no room for all checkpoints and the export; existing checkpoints
    count as written.

    Raises:
        OSError: ENOSPC, with the needed and the free space.
    """
    tensors = tuple(
        TrainedTensor(name, int(getattr(one, "ds_numel", one.numel())), one.element_size())
        for name, one in trained
    )
    size = ModelSize(0, 0, 0, tensors, 0, 0, 0, trains_output_embedding=False)
    whole = estimate_disk(
        recipe, size, load_sharding(recipe), derive_schedule(recipe, num_rows, num_processes)
    )
    there = sum(path.stat().st_size for path in paths.checkpoints_dir.rglob("*") if path.is_file())
    require_space(
        paths.run_dir,
        whole - _SMALL_FILES_BYTES - there,
        "the checkpoints that are kept, and the export,",
    )


def require_room_for_checkpoint(recipe: Recipe, paths: RunPaths, step: int) -> None:
    """Refuse to begin a checkpoint that would not fit, judged by the size of the newest one.

    Raises:
        OSError: ENOSPC, with the needed and the free space.
    """
    for known in reversed(list_committed(paths)):
        try:
            marker = load_marker(paths.checkpoint_dir(known))
        except (CorruptFileError, OSError):
            continue
        if not marker.is_stripped:
            num_bytes = sum(entry.num_bytes for entry in marker.files.values())
            num_copies = 2 if recipe.checkpoints.archive == "zip" else 1
            require_space(
                paths.checkpoints_dir, num_bytes * num_copies, f"the checkpoint of step {step}"
            )
            return


def require_space(folder: Path, num_bytes: int, what: str) -> None:
    """Raises: OSError (ENOSPC), if fewer bytes are free."""
    free = free_bytes(folder)
    if free < num_bytes:
        words = f"{what} would take {format_mib(num_bytes)}, {format_mib(free)} are free"
        raise OSError(errno.ENOSPC, words, str(folder))
