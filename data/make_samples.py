"""Writes the sample files of this folder, each in the schema of a real data set; `README.md`
describes them.

Run as `python data/make_samples.py`; the same bytes come out every time. The sentences are our own
(`sample_texts.py`): nothing of the real data sets is in them but their columns.
"""

from __future__ import annotations

import json
import random
import uuid
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import sample_texts as words

SEED = 23
FOLDER = Path(__file__).parent
Row = dict[str, Any]


def take_distinct(make: Callable[[random.Random], Any], count: int) -> list[Any]:
    """`count` different results of `make`, which gets a generator of its own."""
    rng = random.Random(SEED)
    found: dict[str, Any] = {}
    while len(found) < count:
        item = make(rng)
        found.setdefault(json.dumps(item, sort_keys=True), item)
    return list(found.values())


def chat(*turns: str) -> list[dict[str, str]]:
    """Turns that alternate, user first."""
    return [{"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(turns)]


def guess_a_word(rng: random.Random) -> list[dict[str, str]]:
    """A game of two to six rounds; users say "user", "model" and "assistant", as people do."""
    word, *others = rng.sample(sorted(words.HINTS), 5)
    hints = rng.sample(words.HINTS[word], 4)
    turns = [rng.choice(words.OPENINGS), f"Here is a hint: {hints.pop()}."]
    for other in others[: rng.randrange(4)]:
        if rng.random() < 0.6:
            article = "an" if other[0] in "aeiou" else "a"
            turns += [
                f"Is it {article} {other}?",
                f"No, that is not it. Think of this: {hints.pop()}.",
            ]
        else:
            turns += [rng.choice(words.DOUBTS), f"One more: {hints.pop()}."]
    turns += [f"Then it must be the {word}!", f"Yes, the secret word is {word}. Well done!"]
    return chat(*turns)


def solve_with_tools(rng: random.Random) -> Row:
    """A word problem; the tool's output is a user turn, sometimes an error that is corrected."""
    name, other = rng.sample(words.NAMES, 2)
    thing = rng.choice(words.THINGS)
    count, price, rest = rng.randint(3, 40), rng.randint(2, 15), rng.randint(1, 30)
    problem, lines, answer, unit = rng.choice(
        [
            (
                (
                    f"{name} buys {count} {thing} at ${price} each and pays with"
                    f" ${count * price + rest}. How many dollars come back?"
                ),
                [f"paid = {count * price + rest}", f"cost = {count} * {price}", "paid - cost"],
                rest,
                f"{name} gets back \\boxed{{{rest}}} dollars.",
            ),
            (
                (
                    f"{name} has {count} {thing}, {other} has {price} times as many. How many do"
                    " they have together?"
                ),
                [f"first = {count}", f"second = {price} * first", "first + second"],
                count + price * count,
                f"Together they have \\boxed{{{count + price * count}}} {thing}.",
            ),
            (
                (
                    f"A shop packs {count * price} {thing} into boxes of {price} and adds {rest}"
                    " empty boxes. How many boxes are there?"
                ),
                [f"full = {count * price} // {price}", f"full + {rest}"],
                count + rest,
                f"There are \\boxed{{{count + rest}}} boxes.",
            ),
        ]
    )
    kind = rng.random()
    if kind < 0.2:  # without a tool
        return {
            "messages": chat(problem, f"The numbers are small, so this can be done by hand. {unit}")
        }
    code = "\n".join(lines)
    turns = [problem, f"Python can work this out.\n```python\n{code}\n```"]
    if kind < 0.4:
        broken = "\n".join([*lines[:-1], "total"])
        error = "```output\nNameError: name 'total' is not defined\n```"
        turns[1:] = [f"Let the interpreter do it.\n```python\n{broken}\n```", error]
        turns.append(f"The last name was never set.\n```python\n{code}\n```")
    return {"messages": chat(*turns, f"```output\n{answer}\n```", unit)}


def message(
    rng: random.Random,
    parent: Row | None,
    text: str,
    lang: str,
    *,
    rank: int | None = None,
    state: str = "kept",
) -> Row:
    """One message of a tree with all the columns of OASST1; `state` is kept, deleted or
    unreviewed.
    """
    message_id = str(uuid.UUID(int=rng.getrandbits(128), version=4))
    is_answer = parent is not None and parent["role"] == "prompter"
    judged = {"spam": 0.0, "lang_mismatch": 0.0, "quality": round(rng.uniform(0.4, 1.0), 2)}
    return {
        "message_id": message_id,
        "parent_id": parent and parent["message_id"],
        "user_id": str(uuid.UUID(int=rng.getrandbits(128), version=4)),
        "created_date": (
            f"2023-02-{rng.randint(1, 28):02d}T{rng.randrange(24):02d}:00:00.000000+00:00"
        ),
        "text": text,
        "role": "assistant" if is_answer else "prompter",
        "lang": lang,
        "review_count": 0 if state == "unreviewed" else 3,
        "review_result": {"kept": True, "deleted": False, "unreviewed": None}[state],
        "deleted": state == "deleted",
        "rank": rank,
        "synthetic": False,
        "model_name": None,
        "detoxify": {
            "toxicity": round(rng.uniform(0.0, 0.01), 5),
            "insult": round(rng.uniform(0.0, 0.01), 5),
        },
        "message_tree_id": parent["message_tree_id"] if parent else message_id,
        "tree_state": "ready_for_export",
        "emojis": {"name": ["+1"], "count": [rng.randint(1, 9)]},
        "labels": {
            "name": list(judged),
            "value": list(judged.values()),
            "count": [3] * len(judged),
        },
    }


def grow_tree(rng: random.Random, question: str, topic: str) -> list[Row]:
    """An English tree: two or three ranked answers, some deleted or unreviewed, below some of them
    another round.
    """
    facts = rng.sample(words.ADVICE[topic], 3)
    rows = [root := message(rng, None, question, "en")]
    answers = [f"{facts[0]} {facts[1]}", facts[1], f"That depends. {facts[2]} {facts[0]}"][
        : rng.randint(2, 3)
    ]
    for rank, answer in enumerate(answers):
        state = rng.choice(("kept", "kept", "kept", "deleted", "unreviewed")) if rank else "kept"
        rows.append(reply := message(rng, root, answer, "en", rank=rank, state=state))
        if rng.random() < 0.6:
            rows.append(ask := message(rng, reply, rng.choice(words.FOLLOW_UPS), "en"))
            rows.append(
                message(rng, ask, f"{facts[2]} Apart from that, take your time.", "en", rank=0)
            )
            rows.append(message(rng, ask, "I do not know.", "en", rank=1))
    return rows


def grow_foreign_tree(rng: random.Random, lang: str) -> list[Row]:
    """One path in another language, and an answer in English that does not belong there."""
    question, answer, thanks, end = words.OTHER_LANGUAGES[lang]
    root = message(rng, None, question, lang)
    first = message(rng, root, answer, lang, rank=0)
    again = message(rng, first, thanks, lang)
    return [
        root,
        first,
        message(rng, root, "Sorry, English only.", "en", rank=1),
        again,
        message(rng, again, end, lang),
    ]


def grow_trees(rng: random.Random, questions: Iterable[str]) -> list[Row]:
    """Rows of all trees, a tree after another as in the real files."""
    trees = [
        grow_tree(rng, question.format(topic=topic), topic)
        for topic in sorted(words.ADVICE)
        for question in questions
    ]
    trees += [grow_foreign_tree(rng, lang) for lang in words.OTHER_LANGUAGES]
    return [row for tree in trees for row in tree]


def judge_a_film(rng: random.Random) -> tuple[str, int]:
    """A phrase in the manner of SST-2, in lower case with a space at the end, and 1 for praise."""
    label = rng.randrange(2)
    verdict = rng.choice(words.PRAISE if label else words.BLAME)
    return (
        " ".join(
            filter(None, (rng.choice(words.SUBJECTS), verdict, rng.choice(words.ADDITIONS), ""))
        )
        + " ",
        label,
    )


def ask_about_a_town(rng: random.Random, *, num_golds: int) -> Row:
    """A SQuAD 2.0 row; a third of the questions cannot be answered. `num_golds` people marked each
    answer.
    """
    town, other = rng.sample(words.TOWNS, 2)
    river, craft, year, people = (
        rng.choice(words.RIVERS),
        rng.choice(words.CRAFTS),
        rng.randint(1200, 1890),
        rng.randint(2, 90),
    )
    facts = [
        f"{town} is a town on the {river}.",
        f"It was founded in {year}.",
        f"For a long time its workshops made {craft}.",
        f"About {people},000 people live there today.",
    ]
    rest = [
        (
            f"The road to {other} follows the river for most of the way, past three locks and an"
            " old customs house."
        ),
        "A market is held every Thursday.",
        "Its mill was rebuilt twice, after a fire and after a flood.",
        (
            f"Schools from {other} come here once a year to see the workshops, of which two are"
            " still at work."
        ),
    ]
    context = " ".join(facts + rest[: rng.randrange(5)])
    question, answer = rng.choice(
        [
            (f"On which river does {town} lie?", f"the {river}"),
            (f"When was {town} founded?", str(year)),
            (f"What did the workshops of {town} make?", craft),
            (f"How many people live in {town}?", f"{people},000"),
            (f"Who was the first mayor of {town}?", None),
            (f"When was {other} founded?", None),
        ]
    )
    golds = [answer] * num_golds if answer else []
    if num_golds > 1 and answer and answer.startswith("the "):
        golds[-1] = answer.removeprefix("the ")
    return {
        "id": f"{rng.getrandbits(96):024x}",
        "title": town,
        "context": context,
        "question": question,
        "answers": {"text": golds, "answer_start": [context.index(gold) for gold in golds]},
    }


def chat_about_plans(rng: random.Random) -> Row:
    """A chat of two friends and its summary."""
    one, two = rng.sample(words.NAMES, 2)
    place, event, hour, excuse = (
        rng.choice(words.PLACES),
        rng.choice(words.EVENTS),
        rng.randint(2, 9),
        rng.choice(words.EXCUSES),
    )
    lines = [f"{one}: are you coming to {event}?", f"{two}: yes, but {excuse}"]
    if rng.random() < 0.5:
        lines += [f"{one}: no problem", f"{two}: where do we meet?"]
    lines += [f"{one}: at {place}, {hour} o'clock", f"{two}: see you there"]
    summary = f"{one} and {two} meet at {place} at {hour} o'clock for {event}. {two} may be late."
    return {"document": "\n".join(lines), "summary": summary}


def write_jsonl(name: str, rows: Iterable[Row]) -> None:
    """One row a line."""
    path = FOLDER / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(
        "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8"
    )


def write_splits(folder: str, rows: list[Row], sizes: dict[str, int]) -> None:
    """The rows, cut into files of these sizes."""
    for split, size in sizes.items():
        write_jsonl(f"{folder}/{split}.jsonl", rows[:size])
        rows = rows[size:]


def main() -> None:
    """Write every sample file next to this script, each from a generator of its own."""
    games = take_distinct(guess_a_word, 64)
    text = "[\n" + ",\n".join(json.dumps(game, ensure_ascii=False) for game in games) + "\n]\n"
    (FOLDER / "secret_word_dataset.json").write_text(text, encoding="utf-8")

    problems = take_distinct(solve_with_tools, 64)
    write_splits("math_tools", problems, {"train": 64})

    write_jsonl("oasst1/train.jsonl", grow_trees(random.Random(SEED), words.QUESTIONS[:-1]))
    write_jsonl(
        "oasst1/validation.jsonl", grow_trees(random.Random(SEED + 1), words.QUESTIONS[-1:])
    )

    phrases = take_distinct(judge_a_film, 88)
    rows = [
        {"idx": idx, "sentence": sentence, "label": label}
        for idx, (sentence, label) in enumerate(phrases)
    ]
    write_splits("sst2", rows, {"train": 64, "validation": 24})

    rng = random.Random(SEED)
    write_jsonl("squad_v2/train.jsonl", [ask_about_a_town(rng, num_golds=1) for _ in range(64)])
    write_jsonl(
        "squad_v2/validation.jsonl", [ask_about_a_town(rng, num_golds=3) for _ in range(24)]
    )

    chats = take_distinct(chat_about_plans, 72)
    write_splits("summaries_sample", chats, {"train": 40, "validation": 16, "test": 16})


if __name__ == "__main__":
    main()
