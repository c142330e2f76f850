"""The model card: the README.md next to a tuned model, without clock times. Does not need torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

import yaml

from runner.publish.tuned import TunedRun
from runner.recipe.contents import list_content_paths
from runner.recipe.data_section import DataSection
from runner.recipe.identity import build_digest_payload
from runner.run.paths import RunPaths
from runner.run.record import list_trained, load_record
from runner.run.result import TrainResult
from runner.strict import thaw
from runner.text import format_count

_LOSSES: Final = {
    "completion": "completion: the assistant's turns with their end-of-turn tokens",
    "full": "full: every token that is not padding",
}


def build_model_card(
    run: TunedRun, *, is_adapter: bool, result: TrainResult | None, versions: Mapping[str, str]
) -> str:
    """Markdown with the hub's metadata block. Paths appear as in the recipe.

    `result` is None for a checkpoint: a run's scores belong to its best weights.
    """
    parts = [
        _front_matter(run, is_adapter=is_adapter),
        f"# {run.recipe.run.name}",
        _describe(run, is_adapter=is_adapter),
        "## Scores\n\n" + _scores(run, result),
        "## Loading\n\n" + _loading(run, is_adapter=is_adapter),
        "## Recipe\n\n~~~~yaml\n" + _dump(build_digest_payload(run.stored.recipe)) + "~~~~",
        "## Versions\n\n"
        + ", ".join(f"{name} {version}" for name, version in sorted(versions.items())),
    ]
    return "\n\n".join(parts) + "\n"


def _front_matter(run: TunedRun, *, is_adapter: bool) -> str:
    metadata: dict[str, object] = {
        "library_name": "peft" if is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["sft", *(["lora"] if run.recipe.adapter.method == "lora" else [])],
    }
    if "model.path" not in list_content_paths(run.recipe):  # its name on the hub
        metadata["base_model"] = run.recipe.model.path
        metadata["base_model_relation"] = "adapter" if is_adapter else "finetune"
    return "---\n" + _dump(metadata) + "---"


def _describe(run: TunedRun, *, is_adapter: bool) -> str:
    recipe, data, training = run.recipe, run.recipe.data, run.recipe.training
    lora = recipe.adapter.method == "lora"
    what = (
        "a LoRA adapter"
        if is_adapter
        else "all weights, with a LoRA adapter merged into them"
        if lora
        else "all weights"
    )
    if lora:
        adapter = recipe.adapter.model_dump(mode="json")
        method = (
            f"LoRA, r {adapter['r']}, alpha {adapter['lora_alpha']}, dropout"
            f" {adapter['lora_dropout']}"
        )
    else:
        method = "full fine-tune"
    if recipe.quantization.method != "none":
        method += f", on {recipe.quantization.method} weights"
    length = (
        format_count(training.max_steps, "step")
        if training.max_steps
        else f"{training.num_train_epochs:g} epoch{'' if training.num_train_epochs == 1 else 's'}"
    )
    stated = training.hugging_face_arguments()
    rows = {
        "base model": (
            f"`{recipe.model.path}`"
            + (f", revision `{recipe.model.revision}`" if recipe.model.revision else "")
        ),
        "what this is": (
            what + (f", of the checkpoint `{run.checkpoint}`" if run.checkpoint else "")
        ),
        "training data": (
            f"{_name_sources(data)}, {data.num_train_rows or 'all'} rows, seed {data.seed}"
        ),
        "task": data.task.name,
        "loss": _LOSSES[recipe.loss],
        "method": method,
        "training": (
            f"{length}, global batch {recipe.global_batch_size}, learning rate"
            f" {stated.get('learning_rate', '(library default)')},"
            f" {stated.get('lr_scheduler_type', 'default')} schedule, seed {training.seed}"
        ),
        "chosen by": (
            f"{recipe.checkpoints.metric} on the validation rows, {recipe.checkpoints.mode}"
        ),
        "recipe": f"{recipe.run.full_name}, digest `{run.stored.recipe_digest}`",
    }
    return "\n".join(
        ["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())]
    )


def _name_sources(data: DataSection) -> str:
    shares = data.train_shares
    if shares is None:
        return f"`{data.train_sources[0].path}`"
    named = zip(data.train_sources, shares, strict=True)
    return ", ".join(f"`{source.path}` (share {share:g})" for source, share in named)


def _scores(run: TunedRun, result: TrainResult | None) -> str:
    if result is None:
        return (
            f"These are the weights of the checkpoint `{run.checkpoint}`;"
            " a run is scored at its end."
        )
    lines = ["| split | metric | base model | tuned |", "|---|---|---:|---:|"]
    for split, base in result.base.items():
        tuned = result.tuned[split]
        for metric, words in (
            ("nll_per_completion_token", "completion token"),
            ("nll_per_token", "token"),
        ):
            values = f"{getattr(base, metric):.4f} | {getattr(tuned, metric):.4f}"
            lines.append(f"| {split} | negative log-likelihood per {words} | {values} |")
    generation = result.generation
    if "base" in generation and "tuned" in generation:
        base_metrics, tuned_metrics = generation["base"].metrics, generation["tuned"].metrics
        for metric in dict.fromkeys([*base_metrics, *tuned_metrics]):
            # One of the project's own metrics may judge no answer of a model.
            cells = [
                f"{metrics[metric]:.4f}" if metric in metrics else "none judged"
                for metrics in (base_metrics, tuned_metrics)
            ]
            lines.append(f"| test | {metric} | {cells[0]} | {cells[1]} |")
    steps = (
        f"Step {result.best_step} of {result.num_steps}, trained on"
        f" {format_count(result.num_train_rows, 'row')}."
    )
    return "\n".join([*lines, "", steps])


def _loading(run: TunedRun, *, is_adapter: bool) -> str:
    kind, library = (
        ("AutoPeftModelForCausalLM", "peft")
        if is_adapter
        else ("AutoModelForCausalLM", "transformers")
    )
    others = (
        "AutoTokenizer, GenerationConfig" if is_adapter else "AutoModelForCausalLM, AutoTokenizer"
    )
    template_kwargs = thaw(run.recipe.model.chat_template_kwargs)
    lines = [
        *([f"from {library} import {kind}"] if is_adapter else []),
        f"from transformers import {others}",
        "",
        'folder = "."  # or the id on the hub',
        "tokenizer = AutoTokenizer.from_pretrained(folder)",
        f'model = {kind}.from_pretrained(folder, dtype="{run.recipe.model.dtype}")',
        *(
            ["model.generation_config = GenerationConfig.from_pretrained(folder)"]
            if is_adapter
            else []
        ),
        'messages = [{"role": "user", "content": "Hello"}]',
        "inputs = tokenizer.apply_chat_template(",
        '    messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"'
        + ("," if template_kwargs else ""),
        *([f"    **{template_kwargs!r},"] if template_kwargs else []),
        ")",
        "output = model.generate(**inputs, max_new_tokens=200)",
        (
            'print(tokenizer.decode(output[0, inputs["input_ids"].shape[1] :],'
            " skip_special_tokens=True))"
        ),
    ]
    notes = []
    if is_adapter and "model.path" in list_content_paths(run.recipe):
        notes = [
            "",
            (
                f"The base model is loaded from `{run.recipe.model.path}`,"
                " relative to the current directory."
            ),
        ]
    if run.recipe.model.template_date is not None:
        notes += [
            "",
            (
                "During training, the chat template printed the date"
                f" {run.recipe.model.template_date}; `apply_chat_template` prints today's."
            ),
        ]
    return "\n".join(["```python", *lines, "```", *notes])


def _dump(value: object) -> str:
    text: str = yaml.safe_dump(value, sort_keys=False, allow_unicode=True, width=100)
    return text


def load_versions(paths: RunPaths) -> Mapping[str, str]:
    """The versions that the model was trained under; a repair may run under others."""
    trained = list_trained(load_record(paths).attempts)
    return trained[-1].versions if trained else {}
