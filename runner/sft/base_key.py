"""The key of the base model's scores and answers: everything that they depend on.

Two runs share scores only if every part is equal. An unnecessary part costs a computation, but a
missing part gives a run wrong numbers. Anything not known to have no effect is therefore included.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import random
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from operator import attrgetter
from pathlib import Path
from typing import Any, Final

import numpy
import torch
from transformers import Trainer

from runner.data.provenance import SOURCE_OF_RUNNER, hash_installed, list_editable
from runner.data.rows import Row, Samples
from runner.model.load import count_rows
from runner.recipe.evaluation_section import GenerationOn
from runner.recipe.hub import is_commit
from runner.recipe.identity import list_library_versions, load_launch_settings
from runner.recipe.libraries import find_unused_libraries
from runner.recipe.parse import Recipe
from runner.run.record import AskedBase
from runner.secrets import names_secret
from runner.sft.context import RunContext
from runner.sft.generation import build_generation_config
from runner.sft.startup import uses_deepspeed

# The layout of the files of an entry.
FORMAT: Final = 1
# LoRA fields that may have any value: at the start one factor of each product is zero, so the model
# computes the same as the base model.
_NEUTRAL_LORA_FIELDS: Final = frozenset(
    {
        "alpha_pattern",
        "bias",
        "exclude_modules",
        "fan_in_fan_out",
        "layers_pattern",
        "layers_to_transform",
        "lora_alpha",
        "lora_dropout",
        "r",
        "rank_pattern",
        "target_modules",
        "use_rslora",
    }
)
# Fields of `training` that affect only updates, order or logging. All others are part of the key.
_TRAINING_WITHOUT_EFFECT: Final = frozenset(
    {
        "adam_beta1",
        "adam_beta2",
        "adam_epsilon",
        "global_batch_size",
        "gradient_accumulation_steps",
        "gradient_checkpointing",
        "gradient_checkpointing_kwargs",
        "learning_rate",
        "log_level",
        "log_level_replica",
        "lr_scheduler_kwargs",
        "lr_scheduler_type",
        "max_grad_norm",
        "max_steps",
        "num_train_epochs",
        "optim_args",
        "per_device_train_batch_size",
        "seed",
        "train_sampling_strategy",
        "warmup_steps",
        "weight_decay",
    }
)
# Environment variables that change how libraries compute.
_OF_COMPUTATION: Final = re.compile(
    r"(?!.*_(CACHE|DIR|HOME|PATH)$)"
    r"((ATEN|BNB|CUBLAS|CUBLASLT|CUDNN|DNNL|FLASH_ATTENTION|HIPBLASLT|KMP|MIOPEN|MKL|OMP|ONEDNN"
    r"|OPENBLAS|PYTORCH|ROCBLAS|TORCH|TRITON)_.*"
    r"|LD_PRELOAD|NVIDIA_TF32_OVERRIDE|USE_HUB_KERNELS)"
)

# Attributes of `torch.backends`; reading the older `allow_tf32` raises if these were set.
_PRECISIONS: Final = tuple(
    f"{name}.fp32_precision" for name in ("cuda.matmul", "cudnn.conv", "mkldnn.matmul")
)


def explain_own_base(
    recipe: Recipe, asked: AskedBase, distributed_type: str, dynamo: str = "NO"
) -> str | None:
    """The reason why a run must compute its own base scores; None if it may share them. `dynamo` is
    the backend with which Accelerate compiles.
    """
    if asked == "own":
        return "`--own-base` was given"
    if distributed_type not in ("NO", "MULTI_CPU", "MULTI_GPU"):
        return f"{distributed_type} holds the weights and may compute in another order"
    training = recipe.training.hugging_face_arguments()
    if dynamo != "NO":
        return "`dynamo_config`: the compiled code depends on earlier computations"
    compiled = [name for name, value in training.items() if name.startswith("torch_comp") and value]
    if compiled:
        return f"`training.{compiled[0]}`: the compiled code depends on earlier computations"
    if recipe.list_python_files() and (names := list_editable()):
        return (
            f"its Python functions may import editable installs ({', '.join(names)}), whose code"
            " can change under the same version"
        )
    if recipe.adapter.method == "none":
        return None
    stated = recipe.adapter.lora_arguments()
    if stated.pop("init_lora_weights", True) is not True:
        return "`adapter.init_lora_weights` may change what the model computes at the start"
    for name, value in sorted(stated.items()):
        if name not in _NEUTRAL_LORA_FIELDS and value not in (None, False, [], {}):
            return f"`adapter.{name}` may change what the model computes at the start"
    return None


@dataclass(frozen=True)
class AsRun:
    """The parts of the key that only a running trainer knows."""

    base: str | None  # content hash or hub commit of model and tokenizer; None: unknown
    tokenizer: str | None  # content hash, if `base` is a commit
    num_embedding_rows: int
    pad_token_id: int
    attn_implementation: str | None
    per_device_eval_batch_size: int
    micro_batch_divisor: int
    num_processes: int
    num_machines: int
    num_threads: int
    precision: Mapping[str, Any]
    devices: tuple[str, ...]  # by rank, with driver
    variables: Mapping[str, str]  # hashes: an entry stores no value of the environment
    generation: Mapping[str, Any] | None  # Transformers' settings, if texts are generated
    launch: Any  # settings of the accelerate config
    hidden_libraries: tuple[str, ...]
    versions: Mapping[str, str]
    installed: str  # hash of everything that is installed
    runner: str  # hash of the runner's sources


def read_as_run(context: RunContext, trainer: Trainer, devices: Sequence[str]) -> AsRun:
    """Collect these parts from the process; `devices` are those of all ranks."""
    recipe, model = context.recipe, trainer.accelerator.unwrap_model(trainer.model)
    tokenizer, generation = trainer.processing_class, recipe.evaluation.generation
    base, is_here = context.contents.get(recipe.model.path), Path(recipe.model.path).exists()
    if not is_here and is_commit(recipe.model.revision):
        base = recipe.model.revision
    launch_path = Path(recipe.launch.accelerate_config)
    return AsRun(
        base=base,
        tokenizer=None if is_here else _hash_text(tokenizer.backend_tokenizer.to_str()),
        num_embedding_rows=count_rows(model.get_input_embeddings()),
        pad_token_id=tokenizer.pad_token_id,
        attn_implementation=getattr(model.config, "_attn_implementation", None),
        per_device_eval_batch_size=trainer.args.per_device_eval_batch_size,
        micro_batch_divisor=context.micro_batch_divisor,
        num_processes=context.num_processes,
        num_machines=recipe.launch.num_machines,
        num_threads=torch.get_num_threads(),
        precision={
            "mixed": str(trainer.accelerator.mixed_precision),
            **{name: attrgetter(name)(torch.backends) for name in _PRECISIONS},
            "is_deterministic": torch.are_deterministic_algorithms_enabled(),
        },
        devices=tuple(devices),
        variables={
            name: _hash_text(value)
            for name, value in os.environ.items()
            if _OF_COMPUTATION.fullmatch(name) and not names_secret(name)
        },
        generation=(
            build_generation_config(tokenizer, generation.max_new_tokens).to_dict()
            if isinstance(generation, GenerationOn)
            else None
        ),
        launch=load_launch_settings(launch_path),
        hidden_libraries=tuple(find_unused_libraries(recipe, uses_deepspeed=uses_deepspeed())),
        versions=list_library_versions(),
        installed=hash_installed(),
        runner=SOURCE_OF_RUNNER,
    )


def build_parts(
    recipe: Recipe, contents: Mapping[str, str], samples: Samples, as_run: AsRun
) -> dict[str, Any]:
    """The parts of the key; their hash is the key. Pure."""
    generation, metrics = recipe.evaluation.generation, recipe.evaluation.metrics
    dumped = recipe.model_dump(mode="json")
    answers = {}
    if isinstance(generation, GenerationOn):
        answers = {
            "generation": dumped["evaluation"]["generation"],
            "metrics": dumped["evaluation"]["metrics"],
            "task": dumped["data"]["task"],
            "python_files": {
                path: contents.get(path) for path in recipe.list_python_files().values()
            },
            "judged": {
                split: _hash_judged(getattr(samples, split).rows, with_columns=bool(metrics))
                for split in ("test", "validation")
            },
        }
    return {
        "format": FORMAT,
        "adapter": dumped["adapter"],
        "dtype": recipe.model.dtype,
        "pad_token": recipe.model.pad_token,
        "quantization": dumped["quantization"],
        "training": {
            name: value
            for name, value in dumped["training"].items()
            if name not in _TRAINING_WITHOUT_EFFECT
        },
        "rows": {
            split: _hash_scored(getattr(samples, split).rows) for split in ("test", "validation")
        },
        "answers": answers,
        "as_run": json.loads(json.dumps(asdict(as_run), default=str)),
    }


def describe_device(device: torch.device) -> str:
    """The type of a device, with its model and its driver or CPU capability."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)}, driver {_read_driver()}"
    capability = torch.backends.cpu.get_cpu_capability()
    return f"{device.type}, {_read_processor()}, {capability}"


def _read_driver() -> str:
    for path in ("/proc/driver/nvidia/version", "/sys/module/amdgpu/version"):
        with contextlib.suppress(OSError):
            return Path(path).read_text().partition("\n")[0]
    return "unknown"


def _read_processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return "unknown processor"
    return next((line.partition(": ")[2] for line in lines if line.startswith("model name")), "")


def _hash_scored(rows: Iterable[Row]) -> str:
    """A hash of everything that `RowScore` is computed from."""
    return _hash_each(
        [row.row_id, row.group, row.input_ids, row.num_bytes]
        + [_list_ends(spans) for spans in (row.spans, row.contents, row.untrained)]
        for row in rows
    )


def _list_ends(spans: Sequence[Any]) -> list[tuple[int, int]]:
    return [(span.start, span.end) for span in spans]


def _hash_judged(rows: Iterable[Row], *, with_columns: bool) -> str:
    """A hash of everything that the answers to these rows are judged by."""
    return _hash_each([row.references, dict(row.columns) if with_columns else None] for row in rows)


def _hash_each(described: Iterable[Any]) -> str:
    """A hash of all items, serialized one by one because a split may be large."""
    digest = hashlib.sha256()
    for one in described:
        digest.update(json.dumps(one, default=repr).encode() + b"\n")
    return digest.hexdigest()


def _hash_text(text: str) -> str:
    return hashlib.sha256(text.encode(errors="surrogatepass")).hexdigest()


def _list_gpu_generators() -> list[torch.Tensor]:
    is_used = torch.cuda.is_initialized()  # type: ignore[no-untyped-call]
    return torch.cuda.get_rng_state_all() if is_used else []


class ModelState:
    """State that a forward could change in a model or in the random generators.

    Weights are not compared. Only the first forward of a quantized layer changes them, and every
    run makes one before it trains. Some models do keep state, such as rotary frequencies that grow
    with the longest text seen.
    """

    def __init__(self, model: torch.nn.Module) -> None:
        # References keep the tensors alive, so no new tensor can get the id of an old one.
        self._tensors: list[torch.Tensor] = []
        self._model = {
            name: self._describe_module(module) for name, module in model.named_modules()
        }
        self._random_states = (
            random.getstate(),
            repr(numpy.random.get_state()),
            torch.get_rng_state().numpy().tobytes(),
            [one.numpy().tobytes() for one in _list_gpu_generators()],
        )

    def _describe_module(self, module: torch.nn.Module) -> dict[str, Any]:
        described: dict[str, Any] = {}
        for name, value in {**vars(module), **module._buffers}.items():
            if isinstance(value, torch.Tensor):
                self._tensors.append(value)
                described[name] = (id(value), value._version)
            # `training` is set before each step.
            elif name != "training" and (
                value is None or isinstance(value, bool | int | float | str)
            ):
                described[name] = value
        return described

    def find_change(self, later: ModelState) -> str | None:
        """Describe the first difference from a later state; None if nothing changed."""
        if self._random_states != later._random_states:
            return "random numbers were drawn"
        for name in {**self._model, **later._model}:
            if self._model.get(name) != later._model.get(name):
                before, after = self._model.get(name, {}), later._model.get(name, {})
                key = next(key for key in {**before, **after} if before.get(key) != after.get(key))
                return f"{name}.{key} has changed" if name else f"{key} has changed"
        return None
