"""Lets a model answer the prompts of a split, greedily, and has the answers judged.

A prompt is what training saw before the last completion of a row, token for token. Rows are spread
over the ranks as in `evaluate`; each rank judges its own answers, and every rank gets all of them,
so all take the same decisions.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Self

import torch
from accelerate import Accelerator
from peft import PeftModel
from transformers import GenerationConfig

from runner.data.chat_template import get_chat_format
from runner.data.masking import end_of_turn_ids
from runner.data.rows import Row, Samples
from runner.data.tasks.base import Judgement, Task
from runner.errors import DataError
from runner.files import load_jsonl, write_jsonl_atomic
from runner.functions import Metric
from runner.recipe.parse import Recipe
from runner.recipe.schema import EarlyStoppingOn, GenerationOn
from runner.run.result import GenerationScore
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
    # Of the project's own metrics; None: not judged.
    own_scores: Mapping[str, float | None] = field(default_factory=dict)

    def as_json(self) -> dict[str, Any]:
        """For `predictions.jsonl`."""
        own = {"own_scores": dict(self.own_scores)} if self.own_scores else {}
        return {
            "row_id": self.row_id,
            "prediction": self.prediction,
            "references": list(self.references),
            "is_finished": self.is_finished,
            "is_readable": self.judgement.is_readable,
            "scores": self.judgement.scores,
            **own,
        }

    @classmethod
    def from_json(cls, row: Mapping[str, Any]) -> Self:
        """What `as_json` made."""
        return cls(
            row_id=row["row_id"],
            prediction=row["prediction"],
            references=tuple(row["references"]),
            is_finished=row["is_finished"],
            judgement=Judgement(row["scores"], row["is_readable"]),
            own_scores=row.get("own_scores", {}),
        )


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
    metrics: Sequence[Metric] = (),
    tokenizer: Any,
    max_new_tokens: int,
    batch_size: int,
    accelerator: Accelerator,
    sign_of_life: Callable[[], None] = lambda: None,
) -> list[Answer]:
    """The judged answer to every row, in the order of `rows`, on every rank. No random numbers are
    drawn. `sign_of_life` is called for each batch and each answer.

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
        open_scores(metrics) as score,
    ):
        for batch in share.batches:
            sign_of_life()
            texts = _generate_batch(
                generator, [prompts[index] for index in batch], tokenizer, accelerator.device
            )
            for index, (text, is_finished) in zip(batch, texts, strict=True):
                row = rows[index]
                sign_of_life()
                judgement = judge(text, row.references)
                answer = Answer(
                    row.row_id, text, row.references, is_finished, judgement, score(text, row)
                )
                found.append((index, answer))
    return share.gather(found)


@contextmanager
def open_scores(
    metrics: Sequence[Metric],
) -> Iterator[Callable[[str, Row], dict[str, float | None]]]:
    """The scores of `(prediction, row)` by every metric of the project.

    Raises:
        DataError: a function cannot be loaded; or, of a call, that it fails.
    """
    with ExitStack() as stack:
        opened = {metric.name: stack.enter_context(metric.open_score()) for metric in metrics}

        def score(prediction: str, row: Row) -> dict[str, float | None]:
            where = row.where or f"row {row.row_id}"
            return {
                name: one(prediction, row.references, row.columns, where)
                for name, one in opened.items()
            }

        yield score


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
    """The metrics of a split: the task's, and the means of the project's own over the rows that
    they judge.
    """
    metrics = task.summarise([(answer.references, answer.judgement) for answer in answers])
    num_judged_by = {}
    for name in answers[0].own_scores if answers else ():
        scores = [answer.own_scores[name] for answer in answers]
        judged = [score for score in scores if score is not None]
        num_judged_by[name] = len(judged)
        if judged:
            metrics[name] = math.fsum(judged) / len(judged)
    return GenerationScore(
        num_rows=len(answers),
        num_unfinished=sum(not answer.is_finished for answer in answers),
        num_unreadable=sum(not answer.judgement.is_readable for answer in answers),
        num_judged=sum(bool(answer.judgement.scores) for answer in answers),
        metrics=metrics,
        num_judged_by=num_judged_by,
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
    return [Answer.from_json(row) for row in load_jsonl(path) if row["model"] == model]


def refuse_unjudged(recipe: Recipe, score: GenerationScore, step: int) -> None:
    """Raises: DataError, if a metric that selects has no value because no answer was judged."""
    for name in sorted(_list_selecting(recipe)):
        if name in score.num_judged_by and name not in score.metrics:
            raise DataError(
                f"`{name}` judged none of the {score.num_rows} answers to the validation rows at"
                f" step {step}, and it chooses the best checkpoint or stops training",
                hint="let it return a number for every answer, or choose another metric",
            )


def _list_selecting(recipe: Recipe) -> set[str]:
    """The metrics that choose the best checkpoint or stop training."""
    stopping = recipe.early_stopping
    stops_by = {stopping.metric} if isinstance(stopping, EarlyStoppingOn) else set()
    return {recipe.checkpoints.metric} | stops_by


def refuse_what_cannot_be_judged(recipe: Recipe, samples: Samples) -> None:
    """Find out before training whether the rows allow what the recipe asks of generation.

    Raises:
        DataError: a row has no prompt, a metric that selects is not defined on the validation
            rows, or one of the project fails on an empty answer, which any model may give.
    """
    generation, task = recipe.evaluation.generation, recipe.data.task
    if not isinstance(generation, GenerationOn):
        return
    validation = (
        samples.validation.rows[: generation.num_samples] if generation.during_training else ()
    )
    with open_scores(recipe.evaluation.metrics) as score:
        for row in (*samples.test.rows[: generation.num_samples], *validation):
            build_prompt(row)
            score("", row)
    if generated := _list_selecting(recipe) & set(task.METRICS):
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
