"""`runner chat`: a terminal conversation with the tuned model of a run, optionally next to its base
model.

Answers are greedy, so the same question gets the same answer. They go to stdout, everything else to
stderr.
"""

from __future__ import annotations

import contextlib
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from transformers import GenerationConfig, StoppingCriteria, StoppingCriteriaList, TextStreamer

from runner.data.chat_template import ChatTemplate
from runner.data.skeleton import Shape, Skeletons
from runner.errors import DataError
from runner.model.load import load_model, load_tuned_model
from runner.publish.tuned import TunedRun, open_tuned_run, quieten
from runner.recipe.parse import Recipe

_PROMPT = "> "
_HELP = "/reset forgets the conversation, /exit or Ctrl-D quits, Ctrl-C stops an answer"


def chat(
    run_dir: Path,
    *,
    checkpoint: str | None,
    with_base: bool,
    prompt: str | None,
    system: str | None,
    max_new_tokens: int,
) -> int:
    """Answer one prompt, or every line typed in the terminal until the user quits."""
    quieten()
    with open_tuned_run(run_dir, checkpoint) as run:
        responder = Responder(run.load_tokenizer(), max_new_tokens)
        opening = [] if system is None else [{"role": "system", "content": system}]
        # If the template refuses, it does so before the model is loaded.
        responder.encode([*opening, {"role": "user", "content": "?"}])
        print(f"loading {run.weights_dir}", file=sys.stderr, flush=True)
        speakers = load_speakers(run, responder, with_base=with_base)
    conversations = [
        Conversation(speaker, responder, opening, shows_label=with_base) for speaker in speakers
    ]
    if prompt is not None:
        for conversation in conversations:
            if not conversation.ask(prompt):
                raise KeyboardInterrupt
        return 0
    return _converse(conversations)


@dataclass(frozen=True)
class Speaker:
    """A model, with the label of its answers. Under LoRA, the base shares its weights with the
    tuned model.
    """

    label: str
    generate: Callable[..., Any]
    device: torch.device


def load_speakers(run: TunedRun, responder: Responder, *, with_base: bool) -> list[Speaker]:
    """The base model if requested, then the tuned model."""
    recipe = run.recipe
    tuned = _to_device(load_tuned_model(recipe, responder.tokenizer, run.weights_dir), recipe)
    speakers = [Speaker("tuned", tuned.generate, tuned.device)]
    if with_base and recipe.adapter.method == "lora":

        def generate_without_adapter(**arguments: Any) -> Any:
            with tuned.disable_adapter():
                return tuned.generate(**arguments)

        speakers.insert(0, Speaker("base", generate_without_adapter, tuned.device))
    elif with_base:
        base = _to_device(load_model(recipe, responder.tokenizer).eval(), recipe)
        speakers.insert(0, Speaker("base", base.generate, base.device))
    return speakers


def _to_device(model: Any, recipe: Recipe) -> Any:
    """Move the model to the GPU if there is one; quantized weights are already there."""
    return (
        model.to("cuda")
        if torch.cuda.is_available() and recipe.quantization.method == "none"
        else model
    )


class Responder:
    """Encodes a conversation with the chat template, and lets a model answer it."""

    def __init__(self, tokenizer: Any, max_new_tokens: int) -> None:
        self.tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)
        shape: Shape = (("user", None), ("assistant", None))
        self._method = Skeletons(self._template).find(shape).method
        self._settings = GenerationConfig(
            max_new_tokens=max_new_tokens, do_sample=False, use_cache=True
        )

    def encode(self, messages: list[dict[str, str]]) -> torch.Tensor:
        """Token ids, (1, length). Raises: MaskError, with the message of a template that refuses
        the conversation.
        """
        text = self._template.render(messages, self._method, add_generation_prompt=True)
        ids: torch.Tensor = self.tokenizer(text, add_special_tokens=False, return_tensors="pt")[
            "input_ids"
        ]
        return ids

    def answer(
        self, speaker: Speaker, messages: list[dict[str, str]], interrupted: threading.Event
    ) -> str:
        """The answer, which is also printed piece by piece; `interrupted` ends it at its next
        token.
        """
        input_ids = self.encode(messages).to(speaker.device)
        streamer = _Streamer(self.tokenizer)
        speaker.generate(
            input_ids=input_ids,
            attention_mask=torch.ones_like(input_ids),
            generation_config=self._settings,
            streamer=streamer,
            stopping_criteria=StoppingCriteriaList([_Interruption(interrupted)]),
        )
        return "".join(streamer.pieces)


class _Interruption(StoppingCriteria):  # type: ignore[misc]
    """Stops every sequence once the event is set."""

    def __init__(self, interrupted: threading.Event) -> None:
        self._interrupted = interrupted

    def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
        """Called after each token."""
        return torch.full(
            (input_ids.shape[0],),
            self._interrupted.is_set(),
            device=input_ids.device,
            dtype=torch.bool,
        )


class _Streamer(TextStreamer):  # type: ignore[misc]
    """Prints the answer word by word, and collects it."""

    def __init__(self, tokenizer: Any) -> None:
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.pieces: list[str] = []

    def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
        """Called by the base class for each piece."""
        self.pieces.append(text)
        print(text, end="", flush=True)


@contextlib.contextmanager
def _catching_interrupts() -> Iterator[threading.Event]:
    """An event that Ctrl-C sets. An exception can get lost: if it is raised in a callback, Python
    only prints it.
    """
    interrupted = threading.Event()
    previous = signal.signal(signal.SIGINT, lambda *_: interrupted.set())
    try:
        yield interrupted
    finally:
        signal.signal(signal.SIGINT, previous)


@dataclass
class Conversation:
    """One model's side of the chat; each model remembers its own answers."""

    speaker: Speaker
    responder: Responder
    opening: list[dict[str, str]]
    shows_label: bool
    messages: list[dict[str, str]] = field(default_factory=list)

    def reset(self) -> None:
        """Forget everything but the system text."""
        self.messages = []

    def ask(self, question: str) -> bool:
        """Print the answer and remember both; True if it is complete, False if Ctrl-C
        stopped it.
        """
        asked = [*self.messages, {"role": "user", "content": question}]
        with _catching_interrupts() as interrupted:
            if self.shows_label:
                print(f"{self.speaker.label}: ", end="", flush=True)
            answer = self.responder.answer(self.speaker, [*self.opening, *asked], interrupted)
            print(flush=True)
        self.messages = [*asked, {"role": "assistant", "content": answer}]
        return not interrupted.is_set()


def _converse(conversations: list[Conversation]) -> int:
    if sys.stdin.isatty():
        print(_HELP, file=sys.stderr, flush=True)
    for line in _lines():
        if line == "/exit":
            break
        for conversation in conversations:
            if line == "/reset":
                conversation.reset()
                continue
            try:
                conversation.ask(line)
            except DataError as error:  # the template refuses the conversation so far
                print(f"error: {error}", file=sys.stderr, flush=True)
    return 0


def _lines() -> Iterator[str]:
    """The typed lines, without empty ones; Ctrl-C at the prompt drops a line, Ctrl-D ends."""
    if sys.stdin.isatty():
        import readline  # noqa: F401 - gives `input` a line editor
    while True:
        try:
            line = (input(_PROMPT) if sys.stdin.isatty() else _read_line()).strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            print(f"\n{_HELP}", file=sys.stderr, flush=True)
            continue
        if line:
            yield line


def _read_line() -> str:
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line
