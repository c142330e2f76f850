"""Weights on disk: makes an export reproducible, reads it again and checks it.

Every trained tensor is there, whole and finite; it equals that of the best checkpoint; the model
scores what it scored when that checkpoint was written. Also loads the whole tensors of a checkpoint
into a model that DeepSpeed may have partitioned.
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


# The same weights, rows and code: equal to the last bit where kernels are deterministic. This
# leaves room for others.
_SCORE_TOLERANCE: Final = 1e-3
# PEFT keeps these as sets and writes them in an order that differs from process to process.
_SETS: Final = ("target_modules", "modules_to_save", "exclude_modules")


# Of a tokenizer's configuration: how it was loaded here, which depends on HF_HUB_OFFLINE.
_OF_LOADING: Final = ("is_local", "local_files_only")


def drop_loading_options(model_dir: Path) -> None:
    """Take out of `tokenizer_config.json` how the tokenizer was loaded, so that equal runs export
    equal bytes.
    """
    path = model_dir / "tokenizer_config.json"
    content = load_json(path)
    if content is not None:
        kept = {name: value for name, value in content.items() if name not in _OF_LOADING}
        write_json_atomic(path, kept)


def sort_adapter_config(model_dir: Path) -> None:
    """Write the sets of `adapter_config.json` in order, so that equal runs export equal bytes."""
    path = model_dir / "adapter_config.json"
    content = load_json(path)
    if content is not None:
        is_set = {name: isinstance(content.get(name), list) for name in _SETS}
        write_json_atomic(
            path, content | {name: sorted(content[name]) for name in _SETS if is_set[name]}
        )


def collect_resized_embeddings(model: Any, base: ModelSection) -> dict[str, torch.Tensor]:
    """The frozen embeddings of a PEFT model, by their names, if a row was added to them; whole, on
    every rank.

    PEFT saves what it trains, and would guess the rest by asking the hub for the base's vocabulary
    size. Without these an adapter with an added pad token could not be loaded again as it was.
    """
    layers = [
        getattr(one, "base_layer", one)
        for one in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    # Tied ones once, under the name of the input.
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
    """Whole weights inside, also where ZeRO-3 has partitioned them."""
    if not any(hasattr(weight, "ds_id") for weight in weights):
        yield
        return
    import deepspeed  # `deepspeed.zero` is an attribute of it, no module

    with deepspeed.zero.GatheredParameters(list(weights)):
        yield


def hash_trained(
    model: torch.nn.Module, *, is_main: bool = True, sign_of_life: Callable[[], None] = lambda: None
) -> str:
    """SHA-256 over the parameters that are trained, in order of name: name, dtype, shape, bytes.

    Of the main process, whose weights all others are given when training begins; every rank must
    call it, because ZeRO-3 gathers each parameter. `sign_of_life` is called for each.
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
    """Put more tensors into a saved adapter, under names that PEFT loads into the base model."""
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
    """Check the safetensors files of `model_dir` against `expected`, trained parameter names and
    their shapes.

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

    A checkpoint whose weights only DeepSpeed's own files hold is not looked into.

    Raises:
        ExportError: a tensor is missing or another one.
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
                    f"{model_dir}: the exported tensor {name} is not that of {checkpoint_dir}"
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
        ExportError: it was not recorded, or is another one.
    """
    recorded = next(
        (row for row in rows if row["step"] == step and row.get("split") == "validation"), None
    )
    if recorded is None:
        raise ExportError(
            f"the best weights are those of step {step},"
            " but metrics.jsonl holds no evaluation of it"
        )
    for name in ("completion_nll_sum", "nll_sum"):
        now, before = getattr(score, name), float(recorded[name])
        if not math.isclose(now, before, rel_tol=_SCORE_TOLERANCE):
            raise ExportError(
                f"the weights of step {step} score another {name} than when they were saved:"
                f" {before} -> {now}"
            )


def load_gathered_weights(model: torch.nn.Module, checkpoint_dir: Path) -> None:
    """Put the whole tensors of a checkpoint into a model of DeepSpeed, whose own files were
    stripped from it.

    Transformers only loads those. The optimizer's copy of the weights is left as it is: nothing is
    trained afterwards.
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
