"""The chat in a real terminal and through pipes, its answers compared with plain greedy
generation.
"""

from __future__ import annotations

import fcntl
import os
import pty
import re
import select
import shutil
import subprocess
import termios
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from runner.run.paths import RunPaths
from tests.conftest import RUNNER, Project, build_environment, run_cli
from tests.support.training_runs import DEADLINE_SECONDS, forget_end

pytestmark = pytest.mark.slow

QUESTIONS = ("Where is the parcel?", "And what color is it?")
NUM_TOKENS = 300
PROMPT = re.compile(rb"(^|\n)> $")


class Terminal:
    """A process in its own terminal, and its output."""

    def __init__(self, arguments: list[str], cwd: Path) -> None:
        self._master, slave = pty.openpty()
        self.process = subprocess.Popen(
            [str(RUNNER), *arguments],
            cwd=cwd,
            env=build_environment({"TERM": "dumb"}),
            stdin=slave,
            stdout=slave,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
            preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0),  # so that Ctrl-C is a signal
        )
        os.close(slave)

    def type(self, text: str) -> None:
        os.write(self._master, text.encode())

    def read_until(self, pattern: re.Pattern[bytes]) -> str:
        """The text shown since the last call, up to a matching end."""
        shown, deadline = b"", time.monotonic() + DEADLINE_SECONDS
        while not pattern.search(shown):
            assert select.select([self._master], [], [], max(0.0, deadline - time.monotonic()))[
                0
            ], shown
            shown += os.read(self._master, 4096).replace(b"\r\n", b"\n")
        return shown.decode(errors="replace")

    def ask(self, question: str) -> str:
        """The answers, without the echo of the question and the next prompt."""
        self.type(f"{question}\n")
        return self.read_until(PROMPT).removeprefix(f"{question}\n").removesuffix("> ")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self._master)


@contextmanager
def terminal(cwd: Path, *arguments: str) -> Iterator[Terminal]:
    opened = Terminal(list(arguments), cwd)
    try:
        opened.read_until(PROMPT)
        yield opened
    finally:
        opened.close()


def generate_plainly(model_dir: Path, tokenizer_dir: Path, questions: tuple[str, ...]) -> list[str]:
    """Greedy answers to a conversation, by Transformers alone."""
    tokenizer = AutoTokenizer.from_pretrained(tokenizer_dir)
    model = AutoModelForCausalLM.from_pretrained(model_dir, attn_implementation="eager").eval()
    messages, answers = [], []
    for question in questions:
        messages.append({"role": "user", "content": question})
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_dict=True, return_tensors="pt"
        )
        with torch.no_grad():
            output = model.generate(**inputs, max_new_tokens=NUM_TOKENS, do_sample=False)
        answers.append(
            tokenizer.decode(output[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
        )
        messages.append({"role": "assistant", "content": answers[-1]})
    return answers


def test_a_terminal_session(finished: Project) -> None:
    base_dir, model_dir = finished.root / "models" / "llama", finished.paths("llama-lora").model_dir
    first, second = generate_plainly(base_dir, model_dir, QUESTIONS)
    (alone,) = generate_plainly(base_dir, model_dir, QUESTIONS[1:])
    assert second != alone, "or the history could not be seen"
    options = ("--base", "--max-new-tokens", str(NUM_TOKENS))
    with terminal(finished.root, "chat", "runs/tests/llama-lora", *options) as chat:
        answers = [chat.ask(question) for question in QUESTIONS]
        assert [answer.partition("\ntuned: ")[0] for answer in answers] == [
            f"base: {first}",
            f"base: {second}",
        ]
        assert all(answer.partition("\ntuned: ")[2].strip() for answer in answers)
        assert chat.ask("/reset") == ""
        assert chat.ask(QUESTIONS[1]).partition("\ntuned: ")[0] == f"base: {alone}", (
            "the history is forgotten"
        )
        chat.type("\x04")
        assert chat.process.wait(timeout=DEADLINE_SECONDS) == 0


def test_ctrl_c_stops_one_answer(finished: Project) -> None:
    with terminal(
        finished.root, "chat", "runs/tests/llama-lora", "--base", "--max-new-tokens", "1800"
    ) as chat:
        chat.type(f"{QUESTIONS[0]}\n")
        shown = chat.read_until(re.compile(rb"base: "))
        chat.type("\x03")
        shown += chat.read_until(PROMPT)
        stopped, _, tuned = shown.partition("base: ")[2].partition("\ntuned: ")
        assert len(stopped) < 1800, "1800 tokens are more characters than that"
        assert tuned.removesuffix("> ").strip(), "only that answer was stopped"
        chat.type("/exit\n")
        assert chat.process.wait(timeout=DEADLINE_SECONDS) == 0


def test_a_prompt_is_answered_on_stdout_alone(finished: Project) -> None:
    model_dir = finished.paths("phi-full").model_dir
    (tuned,) = generate_plainly(model_dir, model_dir, QUESTIONS[:1])
    (base,) = generate_plainly(finished.root / "models" / "phi", model_dir, QUESTIONS[:1])
    options = ("--prompt", QUESTIONS[0], "--max-new-tokens", str(NUM_TOKENS))
    done = finished.cli("chat", "runs/tests/phi-full", *options)
    assert (done.returncode, done.stdout) == (0, f"{tuned}\n"), done.stderr
    both = finished.cli("chat", "runs/tests/phi-full", "--base", *options)
    assert (both.returncode, both.stdout) == (0, f"base: {base}\ntuned: {tuned}\n"), both.stderr


def test_a_checkpoint_of_a_run_that_is_not_completed(finished: Project) -> None:
    run_dir = finished.root / "runs" / "tests" / "chat-unfinished"
    shutil.copytree(finished.paths("llama-lora").run_dir, run_dir)
    (run_dir / "result.json").unlink()
    forget_end(RunPaths(run_dir))
    refused = run_cli(["chat", run_dir, "--prompt", "Hello"], finished.root)
    assert (
        refused.returncode == 2
        and "is not completed, it is" in refused.stderr
        and refused.stdout == ""
    )
    lines = f"{QUESTIONS[0]}\n\n{QUESTIONS[1]}\n/exit\n{QUESTIONS[0]}\n"
    piped = subprocess.run(
        [str(RUNNER), "chat", str(run_dir), "--checkpoint", "best", "--max-new-tokens", "4"],
        cwd=finished.root,
        env=build_environment(),
        input=lines,
        capture_output=True,
        text=True,
        timeout=DEADLINE_SECONDS,
        check=False,
    )
    assert piped.returncode == 0 and piped.stdout.count("\n") == 2, piped.stderr


def test_a_template_that_refuses_says_so_before_the_model_is_loaded(finished: Project) -> None:
    done = finished.cli(
        "chat", "runs/tests/gemma-full", "--system", "Be brief.", "--prompt", "Hello"
    )
    assert (
        done.returncode == 2
        and "System role not supported" in done.stderr
        and "loading" not in done.stderr
    )
