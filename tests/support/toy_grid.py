"""A small grid in a temporary project, for the tests of grids, rendering and rendered files."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from runner.errors import GridError
from runner.grid.render import render_grid

TEMPLATE = """\
run:
  grid: {{ grid | yaml }}
  name: {{ name | yaml }}
  axes: {{ axes | yaml }}
model:
  path: {{ model.path | yaml }}
  dtype: float32
adapter: {method: none}
quantization: {method: none}
data:
  train:
    path: data/demo.jsonl
  task: {name: conversations}
  num_train_samples: {{ num_train_samples | yaml }}
  num_validation_samples: 10
  num_test_samples: 10
  seed: 1
  max_length: 64
loss: {{ loss | yaml }}
training:
  seed: 1
  global_batch_size: 4
  per_device_train_batch_size: 4
  max_steps: 2
  learning_rate: 1e-5
  gradient_checkpointing: false
evaluation: {eval_strategy: "no", per_device_eval_batch_size: 4}
early_stopping: {enabled: false}
checkpoints: {save_strategy: "no"}
launch:
  accelerate_config: accelerate_configs/cpu.yaml
"""

GRID = """\
name: "{{ model }}_{{ loss }}_{{ '%03d' % num_train_samples }}"
axes:
  model:
    - {name: gemma, path: models/gemma}
    - {name: phi, path: models/phi}
  loss: [full, completion]
  num_train_samples: [60, 180]
"""

CONDITIONAL = """\
name: "{{ [model, adapter, lora_r | default(''), tied | default('') | lower] \
| select | join('_') }}"
axes:
  model: [a, b]
  adapter: [none, lora]
  lora_r: {values: [8, 16], when: {adapter: lora}}
  tied: {values: [true, false], when: {lora_r: 16, model: [a]}}
"""


Toy = Callable[..., Path]


def build_toy(folder: Path) -> Toy:
    """A function that writes the grid `toy` and returns the root of its project; `old` in the
    template becomes `new`.
    """

    def build(grid: str = GRID, template: str = TEMPLATE, old: str = "", new: str = "") -> Path:
        toy = folder / "recipe_templates" / "toy"
        toy.mkdir(parents=True, exist_ok=True)
        (toy / "grid.yaml").write_text(grid)
        assert old in template
        (toy / "recipe.yaml.j2").write_text(template.replace(old, new) if old else template)
        return folder

    return build


def grid_error(root: Path, grid: str = "toy") -> str:
    """The message with which rendering fails."""
    with pytest.raises(GridError) as caught:
        render_grid(root / "recipe_templates", grid)
    return str(caught.value)
