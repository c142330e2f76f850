"""Weights on disk: makes an export reproducible, reads it again and checks it.

The checks: every trained tensor is there, whole and finite; it equals that of the best checkpoint;
the model has the same score as when that checkpoint was written. This module also loads the whole
tensors of a checkpoint into a model that DeepSpeed may have partitioned.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, Final

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

from runner.errors import RunnerError
from runner.files import load_json, write_json_atomic
from runner.model.load import count_rows
from runner.recipe.hub import load_arguments
from runner.recipe.schema import ModelSection
from runner.run.result import SplitScore


class ExportError(RunnerError):
    """An export that would not load or would load something else."""


# The same weights, rows and code give scores equal to the last bit if kernels are deterministic.
# The tolerance allows for other kernels.
_SCORE_TOLERANCE: Final = 1e-3
# PEFT keeps these as sets and writes them in an order that differs from process to process.
_SETS: Final = ("target_modules", "modules_to_save", "exclude_modules")


# Fields of a tokenizer's configuration that record how it was loaded, which depends on
# HF_HUB_OFFLINE.
_OF_LOADING: Final = ("is_local", "local_files_only")


def drop_loading_options(model_dir: Path) -> None:
    """Remove the loading options from `tokenizer_config.json`, so that equal runs export equal
    bytes.
    """
    path = model_dir / "tokenizer_config.json"
    content = load_json(path)
    if content is not None:
        kept = {name: value for name, value in content.items() if name not in _OF_LOADING}
        write_json_atomic(path, kept)


def sort_adapter_config(model_dir: Path) -> None:
    """Sort the sets in `adapter_config.json`, so that equal runs export equal bytes."""
    path = model_dir / "adapter_config.json"
    content = load_json(path)
    if content is not None:
        is_set = {name: isinstance(content.get(name), list) for name in _SETS}
        write_json_atomic(
            path, content | {name: sorted(content[name]) for name in _SETS if is_set[name]}
        )


def collect_resized_embeddings(model: Any, base: ModelSection) -> dict[str, torch.Tensor]:
    """The frozen embeddings of a PEFT model, by name, if a row was added to them; whole, on every
    rank.

    PEFT saves only trained tensors, and would query the hub for the base's vocabulary size to guess
    the rest. Without these embeddings, an adapter with an added pad token could not be reloaded
    exactly.
    """
    layers = [
        getattr(one, "base_layer", one)
        for one in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    # Tied embeddings are saved once, under the name of the input embedding.
    weights: dict[int, tuple[str, torch.nn.Parameter]] = {}
    for name, module in model.named_modules():
        if module in layers:
            for key, weight in module.named_parameters(recurse=False):
                weights.setdefault(id(weight), (f"{name}.{key}", weight))
    num_base_rows = (
        AutoConfig.from_pretrained(base.path, trust_remote_code=False, **load_arguments(base))
        .get_text_config()
        .vocab_size
    )
    if count_rows(model.get_input_embeddings()) == num_base_rows:
        return {}
    with gathered([weight for _, weight in weights.values()]):
        return {name: weight.detach().cpu().clone() for name, weight in weights.values()}


@contextmanager
def gathered(weights: Sequence[torch.nn.Parameter]) -> Iterator[None]:
    """Hold the weights whole inside the context, even if ZeRO-3 has partitioned them."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed  # `deepspeed.zero` is an attribute, not a module

    with deepspeed.zero.GatheredParameters(list(weights)):
        yield


def hash_trained(
    model: torch.nn.Module, *, is_main: bool = True, sign_of_life: Callable[[], None] = lambda: None
) -> str:
    """SHA-256 over the trained parameters, in order of name: name, dtype, shape, bytes.

    The main process computes it; all other ranks get its weights when training begins. Every rank
    must call this, because ZeRO-3 gathers each parameter. `sign_of_life` is called for each.
    """
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad:
            continue
        sign_of_life()
        with gathered([weight]):
            if is_main:
                head = [name, str(weight.dtype), list(weight.shape)]
                content = weight.detach().cpu().contiguous().flatten().view(torch.uint8)
                digest.update(json.dumps(head).encode() + b"\n")
                digest.update(content.numpy().data)
    return digest.hexdigest()


def add_to_adapter(model_dir: Path, tensors: Mapping[str, torch.Tensor]) -> None:
    """Add tensors to a saved adapter, under names that PEFT loads into the base model."""
    if tensors:
        path = model_dir / "adapter_model.safetensors"
        save_file(load_file(path) | dict(tensors), path, metadata={"format": "pt"})


def exported_name(parameter_name: str) -> str:
    """The name under which PEFT or Transformers saves a parameter.

    >>> exported_name("base_model.model.lm_head.modules_to_save.default.weight")
    'base_model.model.lm_head.weight'
    """
    return parameter_name.replace(".modules_to_save.default", "").replace(".default", "")


def verify_export(model_dir: Path, expected: Mapping[str, tuple[int, ...]]) -> None:
    """Check the safetensors files of `model_dir` against `expected`, which maps the names of
    trained parameters to their shapes.

    Raises:
        ExportError: a tensor is missing, empty, of another shape or not finite.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118 - not a mapping
                tensor = file.get_tensor(name)
                shapes[name] = tuple(tensor.shape)
                if tensor.is_floating_point() and not torch.isfinite(tensor).all():
                    raise ExportError(f"{path}: the exported tensor {name} is not finite")
    for name, shape in expected.items():
        saved = shapes.get(exported_name(name))
        if saved != shape:
            raise ExportError(
                f"{model_dir}: {exported_name(name)} should have the shape {shape}, the export has"
                f" {saved or 'nothing'}"
            )


def verify_same_weights(model_dir: Path, checkpoint_dir: Path) -> None:
    """Check that an export holds every tensor of the checkpoint that it was made from; it may hold
    more.

    A checkpoint with weights only in DeepSpeed's own files is not checked.

    Raises:
        ExportError: a tensor is missing or differs.
    """
    with ExitStack() as files:
        exported = _open_tensors(model_dir, files)
        for name, file in _open_tensors(checkpoint_dir, files).items():
            if name not in exported:
                raise ExportError(
                    f"{model_dir}: the export lacks {name}, which {checkpoint_dir} has"
                )
            one, other = exported[name].get_tensor(name), file.get_tensor(name)
            wider = torch.promote_types(one.dtype, other.dtype)
            if one.shape != other.shape or not torch.equal(one.to(wider), other.to(wider)):
                raise ExportError(
                    f"{model_dir}: the exported tensor {name} differs from that of {checkpoint_dir}"
                )


def _open_tensors(folder: Path, files: ExitStack) -> dict[str, Any]:
    """The open file of every tensor of a folder, by the tensor's name."""
    opened = [
        files.enter_context(safe_open(path, framework="pt"))
        for path in sorted(folder.glob("*.safetensors"))
    ]
    return {name: file for file in opened for name in file.keys()}  # noqa: SIM118 - not a mapping


def verify_score(score: SplitScore, rows: Sequence[Mapping[str, Any]], step: int) -> None:
    """Check the validation score of the best weights against the one recorded at their step in
    `metrics.jsonl`.

    Raises:
        ExportError: the score was not recorded, or differs.
    """
    recorded = next(
        (row for row in rows if row["step"] == step and row.get("split") == "validation"), None
    )
    if recorded is None:
        raise ExportError(
            f"the best weights are those of step {step},"
            " but metrics.jsonl has no evaluation of that step"
        )
    for name in ("completion_nll_sum", "nll_sum"):
        now, before = getattr(score, name), float(recorded[name])
        if not math.isclose(now, before, rel_tol=_SCORE_TOLERANCE):
            raise ExportError(
                f"the weights of step {step} have another {name} than when they were saved:"
                f" {before} -> {now}"
            )


def load_gathered_weights(model: torch.nn.Module, checkpoint_dir: Path) -> None:
    """Load the whole tensors of a checkpoint without DeepSpeed's own files into a DeepSpeed model.

    Transformers can only load from those files. The optimizer's copy of the weights is not updated,
    because no training follows.
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
