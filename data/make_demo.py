"""Writes `data/demo.jsonl`: chats of a customer with a shop, each with a summary of fixed style.

Run as `python data/make_demo.py`; the same bytes come out every time. The facts to find in a chat
are the customer's name, the item, the problem, what the shop promises and for which day. Wording,
small talk and decoys (the day of the order, the name of the person who gets the present) vary.
"""

from __future__ import annotations

import json
import random
from pathlib import Path

from runner.demo.corpus import COLORS, DAYS, ITEMS, NAMES

NUM_ROWS = 480
SEED = 20
OUTPUT_PATH = Path(__file__).with_name("demo.jsonl")

# What the summary says: how a customer says it.
PROBLEMS = {
    "late": (
        "my {item} has not arrived yet",
        "I am still waiting for my {item}",
        "the {item} is still on the way",
    ),
    "damaged": (
        "the {item} came with a crack",
        "the box was open and the {item} was scratched",
    ),
    "wrong": (
        "this is not the {item} that I ordered",
        "I ordered a {color} {item} but got another one",
    ),
    "incomplete": (
        "a part of the {item} is not in the box",
        "there is a screw missing for the {item}",
    ),
    "faulty": (
        "the {item} stopped working after one hour",
        "the {item} does not turn on",
    ),
}

# What the summary says: how the shop says it.
PROMISES = {
    "a refund": ("You will get your money back on {day}.", "We can offer a refund on {day}."),
    "a replacement": ("You will get a new one on {day}.", "We will mail another one on {day}."),
    "a voucher": ("I can offer a voucher on {day}.", "You will get a voucher on {day}."),
    "a spare part": (
        "We will mail the missing part on {day}.",
        "You will get a spare part on {day}.",
    ),
    "a courier": ("Somebody will pick it up on {day}.", "A courier will come on {day}."),
}
PROMISES_FOR = {
    "late": ("a refund", "a replacement", "a voucher"),
    "damaged": ("a refund", "a replacement", "a voucher", "a courier"),
    "wrong": ("a replacement", "a courier", "a refund"),
    "incomplete": ("a spare part", "a voucher", "a replacement"),
    "faulty": ("a courier", "a refund", "a replacement", "a spare part"),
}

REQUEST = "Summarize this chat."
GREETINGS = ("Hello,", "Good morning,", "Please help,")
APOLOGIES = ("I am very sorry about that.", "I am sorry.", "Let me check that for you.")
DETAILS = ("I bought it on {decoy_day}.", "It was a gift for {decoy_name}.", "It is {color}.")
THANKS = ("Thank you, that is fine.", "That would be great.", "That is fine with me.")


def chat_and_summary(rng: random.Random) -> tuple[str, str]:
    """A random chat and the one summary that is right for it."""
    name, decoy_name = rng.sample(NAMES, 2)
    day, decoy_day = rng.sample(DAYS, 2)
    item, color = rng.choice(ITEMS), rng.choice(COLORS)
    problem = rng.choice(tuple(PROBLEMS))
    promise = rng.choice(PROMISES_FOR[problem])

    complaint = rng.choice(PROBLEMS[problem]).format(item=item, color=color)
    detail = rng.choice(DETAILS).format(decoy_day=decoy_day, decoy_name=decoy_name, color=color)
    first_line = f"{name}: {rng.choice(GREETINGS)} {complaint}."
    if rng.random() < 0.5:
        first_line += f" {detail}"
    lines = [
        first_line,
        f"Shop: {rng.choice(APOLOGIES)} {rng.choice(PROMISES[promise]).format(day=day)}",
    ]
    if rng.random() < 0.5:
        lines.append(f"{name}: {rng.choice(THANKS)}")

    article = "an" if problem[0] in "aeiou" else "a"
    summary = f"{name} reports {article} {problem} {item}. The shop promises {promise} on {day}."
    return "\n".join(lines), summary


def build_rows(num_rows: int, seed: int) -> list[dict[str, list[dict[str, str]]]]:
    """`num_rows` rows with different chats and different summaries, so no test answer is seen in
    training.
    """
    rng = random.Random(seed)
    summaries: set[str] = set()
    rows: list[dict[str, list[dict[str, str]]]] = []
    while len(rows) < num_rows:
        chat, summary = chat_and_summary(rng)
        if summary in summaries:
            continue
        summaries.add(summary)
        user = {"role": "user", "content": f"{REQUEST}\n\n{chat}"}
        rows.append({"messages": [user, {"role": "assistant", "content": summary}]})
    return rows


def main() -> None:
    """Write the data set next to this script."""
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in build_rows(NUM_ROWS, SEED)]
    OUTPUT_PATH.write_text("".join(lines), encoding="utf-8")


if __name__ == "__main__":
    main()
