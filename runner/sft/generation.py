"""Lets a model answer the prompts of a split, greedily, and has the answers judged.

A prompt is what training saw before the last completion of a row, token for token. Rows are spread
over the ranks as in `evaluate`; each rank judges its own answers, and every rank gets all of them,
so all take the same decisions.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import GenerationConfig

from runner.data.chat_template import get_chat_format
from runner.data.masking import end_of_turn_ids
from runner.data.rows import Row, Samples
from runner.data.tasks.base import Judge, Judgement, Task
from runner.errors import DataError
from runner.files import load_jsonl, write_jsonl_atomic
from runner.recipe.parse import Recipe
from runner.recipe.schema import EarlyStoppingOn, GenerationOn
from runner.run.record import GenerationScore
from runner.sft.evaluate import share_rows


@dataclass(frozen=True)
class Answer:
    """What a model answered to one row. Finished means that it ended its turn before
    `max_new_tokens`.
    """

    row_id: str
    prediction: str
    references: tuple[str, ...]
    is_finished: bool
    judgement: Judgement

    def as_json(self) -> dict[str, Any]:
        """For `predictions.jsonl`."""
        return {
            "row_id": self.row_id,
            "prediction": self.prediction,
            "references": list(self.references),
            "is_finished": self.is_finished,
            "is_readable": self.judgement.is_readable,
            "scores": self.judgement.scores,
        }


def build_prompt(row: Row) -> list[int]:
    """The tokens before the last completion of a row.

    Raises:
        DataError: the row begins with its completion.
    """
    prompt = list(row.input_ids[: row.spans[-1].start])
    if not prompt:
        raise DataError(
            f"row {row.row_id} begins with its completion, so there is nothing to answer",
            hint=(
                "use a chat template that writes a beginning-of-sequence token"
                " or a role before each turn"
            ),
        )
    return prompt


def build_generation_config(tokenizer: Any, max_new_tokens: int) -> GenerationConfig:
    """Greedy decoding up to the end of the turn or of the text, or to where the base model's own
    settings stop: a call may end otherwise than an answer.
    """
    known = tokenizer.convert_tokens_to_ids(sorted(get_chat_format(tokenizer).stop_tokens))
    stop_ids = {*end_of_turn_ids(tokenizer), tokenizer.eos_token_id, *known} - {None}
    return GenerationConfig(
        do_sample=False,
        num_beams=1,
        use_cache=True,
        max_new_tokens=max_new_tokens,
        eos_token_id=sorted(stop_ids),
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=tokenizer.bos_token_id,
    )


def generate_answers(
    model: torch.nn.Module,
    rows: Sequence[Row],
    *,
    task: Task,
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    accelerator: Accelerator,
) -> list[Answer]:
    """The judged answer to every row, in the order of `rows`, on every rank. No random numbers are
    drawn.

    Every rank makes the same number of calls, and under ZeRO-3, which gathers weights in each
    forward, the same number of steps in each: Transformers goes on until the slowest rank is done.
    """
    prompts = [build_prompt(row) for row in rows]
    config = build_generation_config(tokenizer, max_new_tokens)
    share = share_rows([len(prompt) for prompt in prompts], batch_size, accelerator)
    found: list[tuple[int, Answer]] = []
    with (
        _ready_to_generate(accelerator.unwrap_model(model), config) as generator,
        task.open_judge() as judge,
    ):
        for batch in share.batches:
            texts = _generate_batch(
                generator, [prompts[index] for index in batch], tokenizer, accelerator.device
            )
            for index, (text, is_finished) in zip(batch, texts, strict=True):
                found.append((index, _judge_answer(rows[index], text, is_finished, judge)))
    return share.gather(found)


def _judge_answer(row: Row, text: str, is_finished: bool, judge: Judge) -> Answer:
    return Answer(row.row_id, text, row.references, is_finished, judge(text, row.references))


@contextmanager
def _ready_to_generate(model: Any, config: GenerationConfig) -> Iterator[Any]:
    """The model that has `generate`, out of training mode and under no defaults but `config`;
    restored afterwards.

    Out of training mode, layers neither drop out nor checkpoint activations, and the cache stays
    on. LoRA's layers are in the model that PEFT wraps. A model's own defaults (a repetition
    penalty, say) would fill what `config` leaves open.
    """
    was_training = model.training
    generator = model.get_base_model() if isinstance(model, PeftModel) else model
    defaults = generator.generation_config
    generator.generation_config = config
    model.eval()
    try:
        yield generator
    finally:
        model.train(was_training)
        generator.generation_config = defaults


@torch.no_grad()
def _generate_batch(
    generator: Any, prompts: Sequence[Sequence[int]], tokenizer: Any, device: torch.device
) -> list[tuple[str, bool]]:
    """`(text, is_finished)` of each prompt; padded on the left, so that all answers begin at the
    same place.
    """
    config = generator.generation_config
    width = max(len(prompt) for prompt in prompts)
    padding = [[config.pad_token_id] * (width - len(prompt)) for prompt in prompts]
    input_ids = torch.tensor(
        [[*pads, *prompt] for pads, prompt in zip(padding, prompts, strict=True)]
    )
    attention_mask = torch.tensor([[0] * len(pads) + [1] * (width - len(pads)) for pads in padding])
    output = generator.generate(
        input_ids=input_ids.to(device),
        attention_mask=attention_mask.to(device),
        generation_config=config,
    )
    return [_read_answer(ids, config.eos_token_id, tokenizer) for ids in output[:, width:].tolist()]


def _read_answer(new_ids: list[int], stop_ids: Sequence[int], tokenizer: Any) -> tuple[str, bool]:
    """The text before the first stop token, without whitespace around it, and whether there is
    one.
    """
    end = next((at for at, token in enumerate(new_ids) if token in stop_ids), None)
    text: str = tokenizer.decode(new_ids[:end], skip_special_tokens=True)
    return text.strip(), end is not None


def score_answers(task: Task, answers: Sequence[Answer]) -> GenerationScore:
    """The task's metrics of a split."""
    metrics = task.summarise([(answer.references, answer.judgement) for answer in answers])
    return GenerationScore(
        num_rows=len(answers),
        num_unfinished=sum(not answer.is_finished for answer in answers),
        num_unreadable=sum(not answer.judgement.is_readable for answer in answers),
        num_judged=sum(bool(answer.judgement.scores) for answer in answers),
        metrics=metrics,
    )


def write_answers(path: Path, by_model: Mapping[str, Sequence[Answer]]) -> None:
    """`predictions.jsonl`: the answers of each model, `base` or `tuned`, in the order of the
    split.
    """
    write_jsonl_atomic(
        path,
        [
            {"model": model, **answer.as_json()}
            for model, answers in by_model.items()
            for answer in answers
        ],
    )


def load_answers(path: Path, model: str) -> list[Answer]:
    """The answers of one model as `write_answers` left them; none where there is no file."""
    return [
        Answer(
            row_id=row["row_id"],
            prediction=row["prediction"],
            references=tuple(row["references"]),
            is_finished=row["is_finished"],
            judgement=Judgement(row["scores"], row["is_readable"]),
        )
        for row in load_jsonl(path)
        if row["model"] == model
    ]


def refuse_what_cannot_be_judged(recipe: Recipe, samples: Samples) -> None:
    """Find out before training whether the rows allow what the recipe asks of generation.

    Raises:
        DataError: a row has no prompt, or a metric that selects is not defined on the validation
            rows.
    """
    generation, task = recipe.evaluation.generation, recipe.data.task
    if not isinstance(generation, GenerationOn):
        return
    validation = (
        samples.validation.rows[: generation.num_samples] if generation.during_training else ()
    )
    for row in (*samples.test.rows[: generation.num_samples], *validation):
        build_prompt(row)
    selecting = {recipe.checkpoints.metric}
    if isinstance(recipe.early_stopping, EarlyStoppingOn):
        selecting.add(recipe.early_stopping.metric)
    if generated := selecting & set(task.METRICS):
        with task.open_judge() as judge:
            defined = task.summarise(
                [(row.references, judge("", row.references)) for row in validation]
            )
        if missing := sorted(generated - set(defined)):
            raise DataError(
                f"no validation row can be judged by {', '.join(f'`{name}`' for name in missing)},"
                " which chooses the best checkpoint or stops training",
                hint="choose another metric, or validation rows that have what it needs",
            )
