"""Owns the general text on which the demo's base models are pre-trained, and its vocabulary.

Everything is generated from a seed, so no download is needed. The exchanges are everyday questions
about who has what, where and when, and small requests. None of them is a chat with a shop, and none
requests a summary. That task belongs to the demo data set (`data/make_demo.py`), which uses only
the words from here.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator

Message = dict[str, str]

NAMES = (
    "Anna", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Iris", "Jonas",
    "Kate", "Leo", "Maria", "Nina", "Oscar", "Paula", "Rosa", "Simon", "Tom", "Vera",
)  # fmt: skip
ITEMS = (
    "backpack", "blanket", "blender", "camera", "chair", "clock", "fan", "heater", "jacket",
    "kettle", "keyboard", "lamp", "mirror", "phone", "printer", "radio", "table", "tent", "toaster",
    "watch",
)  # fmt: skip
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday")
COLORS = ("blue", "red", "green", "white", "black", "grey")
PLACES = ("kitchen", "garden", "office", "garage", "school", "shop")
CONDITIONS = ("late", "damaged", "wrong", "incomplete", "faulty", "new", "old", "good")
PARCELS = ("refund", "replacement", "voucher", "spare part", "courier", "letter", "card", "photo")
_DEEDS = ("finds", "gets", "likes", "needs", "offers", "sells", "sees", "wants")

_REMARKS = (
    "The {item} has not arrived yet.",
    "My {item} is still on the way.",
    "I am waiting for my {item}.",
    "The {item} came with a crack.",
    "The box was open and the {item} was scratched.",
    "I ordered a {color} {item} but got another one.",
    "This is not the {item} that I ordered.",
    "There is a screw missing.",
    "A part of the {item} is not in the box.",
    "The {item} stopped working after one hour.",
    "The {item} does not turn on.",
    "I bought the {item} on {day}.",
    "It is {color}.",
    "Which color is it?",
    "I am very sorry about that.",
    "Let me check that for you.",
    "Can you help me please?",
    "How can I help you today?",
    "Good morning, this is {name}.",
    "Thank you, that would be great.",
    "You are welcome, have a nice day.",
    "We will mail it on {day}.",
    "You will get a {parcel} on {day}.",
    "I can offer a {parcel}.",
    "Somebody will pick it up on {day}.",
    "You will get your money back.",
    "That is fine with me.",
    "The order was a gift for {name}.",
    "{name} promises to call.",
    "The radio reports rain on {day}.",
    "We have a chat in the {place}.",
)


class _Draw:
    """Seeded choices; `several` draws values that differ from each other."""

    def __init__(self, seed: int) -> None:
        self.rng = random.Random(seed)

    def one(self, words: tuple[str, ...]) -> str:
        return self.rng.choice(words)

    def several(self, words: tuple[str, ...], count: int) -> list[str]:
        return self.rng.sample(words, count)

    def remark(self) -> str:
        return self.one(_REMARKS).format(
            item=self.one(ITEMS),
            color=self.one(COLORS),
            day=self.one(DAYS),
            name=self.one(NAMES),
            parcel=self.one(PARCELS),
            place=self.one(PLACES),
        )


def _who_has_what(draw: _Draw) -> tuple[str, str]:
    names, items = draw.several(NAMES, 2), draw.several(ITEMS, 2)
    asked = draw.rng.randrange(2)
    facts = f"{names[0]} has a {items[0]}. {names[1]} has a {items[1]}."
    if draw.rng.random() < 0.5:
        return f"{facts}\nWhat does {names[asked]} have?", f"{names[asked]} has a {items[asked]}."
    return f"{facts}\nWho has the {items[asked]}?", f"{names[asked]} has it."


def _when_does_it_come(draw: _Draw) -> tuple[str, str]:
    name, parcel, day = draw.one(NAMES), draw.one(PARCELS), draw.one(DAYS)
    question = draw.one(("When does the {parcel} come?", "Which day is it?")).format(parcel=parcel)
    return (
        f"{name} wrote: {draw.remark()}\nA {parcel} comes on {day}.\n{question}",
        f"It comes on {day}.",
    )


def _where_is_it(draw: _Draw) -> tuple[str, str]:
    item, color, place = draw.one(ITEMS), draw.one(COLORS), draw.one(PLACES)
    return (
        f"A {color} {item} is in the {place}.\nWhere is the {item}?",
        f"The {color} {item} is in the {place}.",
    )


def _who_said_it(draw: _Draw) -> tuple[str, str]:
    first, second = draw.several(NAMES, 2)
    lines = f"{first}: {draw.remark()}\n{second}: {draw.remark()}"
    if draw.rng.random() < 0.5:
        return f"{lines}\nWho spoke first?", f"{first} spoke first."
    return f"{lines}\nWho is talking?", f"{first} and {second} are talking."


def _say_it_again(draw: _Draw) -> tuple[str, str]:
    remark = draw.remark()
    return f"Say it again: {remark}", remark


def _list_in_order(draw: _Draw) -> tuple[str, str]:
    words = draw.several(draw.rng.choice((NAMES, ITEMS, DAYS, CONDITIONS)), 3)
    return f"Make a list: {words[0]}, {words[1]} and {words[2]}.", "\n".join(
        f"- {word}" for word in words
    )


def _write_a_note(draw: _Draw) -> tuple[str, str]:
    first, second = draw.several(NAMES, 2)
    item, condition, parcel, day = (
        draw.one(ITEMS),
        draw.one(CONDITIONS),
        draw.one(PARCELS),
        draw.one(DAYS),
    )
    article = "an" if condition[0] in "aeiou" else "a"
    lines = (
        f"{first}: I saw {article} {condition} {item}.\n{second}: You will get a {parcel} on {day}."
    )
    # Never "reports" with an item or "promises" with a place: the demo task uses that wording.
    first_deed, second_deed = draw.one((*_DEEDS, "promises")), draw.one((*_DEEDS, "reports"))
    note = (
        f"{first} {first_deed} {article} {condition} {item}. The {draw.one(PLACES)} {second_deed} a"
        f" {parcel} on {day}."
    )
    return f"{lines}\nWrite a note.", note


def _opinion(draw: _Draw) -> tuple[str, str]:
    item, condition = draw.one(ITEMS), draw.one(CONDITIONS)
    article = "an" if condition[0] in "aeiou" else "a"
    return f"Is the {item} {condition}?", f"Yes, it is {article} {condition} {item}."


_EXERCISES: tuple[Callable[[_Draw], tuple[str, str]], ...] = (
    _who_has_what,
    _when_does_it_come,
    _where_is_it,
    _who_said_it,
    _say_it_again,
    _list_in_order,
    _write_a_note,
    _opinion,
)


def general_exchanges(count: int, *, seed: int = 0) -> Iterator[list[Message]]:
    """`count` conversations with one question and one answer each, the same for the same seed.

    >>> [message["role"] for message in next(general_exchanges(1))]
    ['user', 'assistant']
    """
    draw = _Draw(seed)
    for _ in range(count):
        prompt, answer = draw.rng.choice(_EXERCISES)(draw)
        yield [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
