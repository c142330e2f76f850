"""The runs of `gpu.py`: models, rows and recipes of six short LoRA runs, for a GPU or in small.

Everything is built on the spot and needs no network. It measures nothing itself.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_context
from pathlib import Path
from typing import Any, Final

from small_runs import ROOT, SmallGrid, write_rows

from runner.demo.plans import ModelShape

NUM_EVAL_ROWS: Final = 24  # of validation, and of test
GLOBAL_BATCH: Final = 16

_RECIPE: Final = """\
run:
  grid: {grid}
  name: {name}
  axes: {{model: {model}, num_train_samples: {num_train}}}
  schema_version: 1
model: {{path: models/{model}, dtype: {dtype}, attn_implementation: sdpa}}
adapter: {{method: lora, r: 16, lora_alpha: 32, lora_dropout: 0.0, target_modules: all-linear}}
quantization: {{method: none}}
data:
  train: {{path: rows.jsonl}}
  task: {{name: conversations}}
  num_train_samples: {num_train}
  num_validation_samples: {num_eval}
  num_test_samples: {num_eval}
  seed: 1
  max_length: 1024
loss: completion
training:
  seed: 1
  global_batch_size: {global_batch}
  per_device_train_batch_size: {micro_batch}
  num_train_epochs: 1
  learning_rate: 1e-4
  lr_scheduler_type: linear
  optim: adamw_torch
  max_grad_norm: 1.0
  bf16: {is_bf16}
  gradient_checkpointing: false
  train_sampling_strategy: group_by_length
evaluation:
  eval_strategy: "no"
  per_device_eval_batch_size: {eval_batch}
  generation: {{enabled: true, max_new_tokens: {num_new_tokens}{answers}}}
early_stopping: {{enabled: false}}
checkpoints: {{save_strategy: "no"}}
launch: {{accelerate_config: launch.yaml, num_processes: 1, num_cpu_threads_per_process: 1}}
"""


@dataclass(frozen=True)
class Scale:
    """Sizes of everything: for a GPU, or for a trial on the CPU."""

    models: Mapping[str, ModelShape]
    num_train_rows: tuple[int, ...]
    num_prompt_words: tuple[int, int]
    num_answer_words: tuple[int, int]
    num_new_tokens: int
    uses_cpu: bool


# Qwen2.5's shapes, with its vocabulary: most of its entries are unused here.
LARGE: Final = Scale(
    models={
        "0.5B": ModelShape(151_936, 896, 4864, 24, 14, 2),
        "1.5B": ModelShape(151_936, 1536, 8960, 28, 12, 2),
    },
    num_train_rows=(60, 120, 180),
    num_prompt_words=(150, 250),
    num_answer_words=(20, 40),
    num_new_tokens=24,
    uses_cpu=False,
)
SMALL: Final = Scale(
    models={
        "tiny": ModelShape(4352, 64, 128, 2, 4, 2),
        "wide": ModelShape(4352, 128, 256, 2, 4, 2),
    },
    num_train_rows=(16, 32, 48),
    num_prompt_words=(5, 10),
    num_answer_words=(3, 6),
    num_new_tokens=4,
    uses_cpu=True,
)


@dataclass(frozen=True)
class Batches:
    """The batch sizes of a grid; `answers` None leaves it to `per_device_eval_batch_size`."""

    micro_batch: int
    evaluation: int
    answers: int | None = None


ONES: Final = Batches(1, 4)


@dataclass(frozen=True)
class Cell:
    """One run: what differs from the others of its arm."""

    model: str
    num_train: int

    @property
    def name(self) -> str:
        """The run's name.

        >>> Cell("0.5B", 60).name
        '0.5B_060'
        """
        return f"{self.model}_{self.num_train:03d}"


def list_cells(scale: Scale, num_runs: int) -> list[Cell]:
    """The first cells, of most rows first.

    >>> [cell.name for cell in list_cells(LARGE, 3)]
    ['0.5B_180', '1.5B_180', '0.5B_120']
    """
    cells = [
        Cell(model, rows)
        for rows in sorted(scale.num_train_rows, reverse=True)
        for model in scale.models
    ]
    return cells[:num_runs]


def write_recipes(
    folder: Path, grid: str, cells: Sequence[Cell], scale: Scale, batches: Batches
) -> None:
    """Write `recipes/<grid>/<run>.yaml` of every cell."""
    (folder / "recipes" / grid).mkdir(parents=True)
    for cell in cells:
        text = _RECIPE.format(
            grid=grid,
            name=cell.name,
            model=cell.model,
            num_train=cell.num_train,
            num_eval=NUM_EVAL_ROWS,
            dtype="float32" if scale.uses_cpu else "bfloat16",
            is_bf16="false" if scale.uses_cpu else "true",
            global_batch=GLOBAL_BATCH,
            micro_batch=batches.micro_batch,
            eval_batch=batches.evaluation,
            num_new_tokens=scale.num_new_tokens,
            answers="" if batches.answers is None else f", batch_size: {batches.answers}",
        )
        (folder / "recipes" / grid / f"{cell.name}.yaml").write_text(text)


def build_folder(folder: Path, scale: Scale) -> dict[str, Any]:
    """Fill a folder with rows, models and the launch config; the device, and sizes of models."""
    config = "cpu.yaml" if scale.uses_cpu else "single_gpu.yaml"
    (folder / "launch.yaml").write_bytes((ROOT / "accelerate_configs" / config).read_bytes())
    words = SmallGrid("rows", scale.num_prompt_words, scale.num_answer_words, (), 0)
    write_rows(folder / "rows.jsonl", max(scale.num_train_rows) + 2 * NUM_EVAL_ROWS, words)
    # In a separate process: this one stays small, and leaves the GPU to the measured one.
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
        return pool.submit(build_models, folder, scale).result()


def build_models(folder: Path, scale: Scale) -> dict[str, Any]:
    """Save the models under `models/`; what device there is, and how large they are.

    Raises:
        RuntimeError: there is no GPU that PyTorch can use.
    """
    import torch
    from transformers import AutoModelForCausalLM, GenerationConfig, Qwen2Config
    from transformers.utils.logging import disable_progress_bar

    from runner.demo.families import build_tokenizer

    disable_progress_bar()
    device = {"name": "CPU", "bytes": None}
    if not scale.uses_cpu:
        if not torch.cuda.is_available():
            raise RuntimeError("PyTorch finds no GPU here; `--small` runs tiny models on the CPU")
        properties = torch.cuda.get_device_properties(0)
        device = {"name": properties.name, "bytes": properties.total_memory}
    rows = [json.loads(line) for line in (folder / "rows.jsonl").read_text().splitlines()]
    texts = [message["content"] for row in rows for message in row["messages"]]
    tokenizer = build_tokenizer("llama", texts, vocab_size=4096)
    ids = {
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
    }
    sizes = {}
    for name, shape in scale.models.items():
        config = Qwen2Config(
            **asdict(shape), **ids, max_position_embeddings=2048, tie_word_embeddings=True
        )
        torch.manual_seed(0)
        with torch.device("cpu" if scale.uses_cpu else "cuda"):
            dtype = torch.float32 if scale.uses_cpu else torch.bfloat16
            model = AutoModelForCausalLM.from_config(config, dtype=dtype)
        model.generation_config = GenerationConfig(**ids)
        model.save_pretrained(folder / "models" / name)
        tokenizer.save_pretrained(folder / "models" / name)
        sizes[name] = model.num_parameters()
        del model
    return {"device": device, "num_parameters": sizes}
