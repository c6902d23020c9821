"""Finding again what was said: a sentence in a long text, several in one text, facts from earlier in a conversation.

Asked: "needle" hides a sentence in about `size` characters of stories and facts, with up to three of the same form
about other names; "needles" hides several and asks for them turn after turn; "memory" tells facts about the user and
asks for them later. Judged: the (last) answer holds the value asked for and none of the others. The key is what was
said of whom and the question's phrasing. `facts` of an item: `depth` of the needle (0 at the start of the text, 1 at
its end) and the text's `characters`.

`retrieval.json` holds the forms: `{n}` is a name, `{v}` the value, `{t}` a thing. A form's `value` is a number of
digits, a range of numbers or the name of a word list.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from functools import cache, partial
from random import Random
from typing import Any, NamedTuple

from dsv4.chat.events import Completion
from dsv4.check.tasks import stories
from dsv4.check.tasks.asking import held_out, named, table
from dsv4.check.tasks.facts import fact_sentence
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.lists import nouns
from dsv4.check.tasks.phrasing import Message, asked, plain

SHORTEST, LONGEST = 300, 1500  # characters of a text when no size is asked for
MOST_DISTRACTORS, FEWEST_TURNS, MOST_TURNS, MOST_KINDS, MOST_TOLD = 3, 2, 10, 3, 5
PER_TURN = 3000  # characters of a text for one question more: reading a long text costs much, an answer little
TURNS_AT_ALL = 40
TRIES = 100
STORY_SHARE = 0.7  # of the passages in a text; the others are facts


class Said(NamedTuple):
    """Something said once, the question for it, its answer, and the value that makes an answer right."""

    sentence: str
    question: str
    answer: str
    value: str
    key: str


@cache
def words(name: str) -> tuple[str, ...]:
    """A word list of `retrieval.json`, or the nouns."""
    return nouns() if name == "nouns" else tuple(table("retrieval")["words"][name].split())


def _value(random: Random, form: Mapping[str, Any]) -> str:
    kind = form["value"]
    if isinstance(kind, int):
        return str(random.randrange(10 ** (kind - 1), 10**kind))
    return random.choice(words(kind)) if isinstance(kind, str) else str(random.randint(*kind))


def draw_needle(random: Random, form: Mapping[str, Any], name: str) -> Said:
    """A sentence of this form about this name."""
    number = random.randrange(len(form["questions"]))
    slots = {"n": name, "v": _value(random, form), "t": random.choice(words("things"))}
    said = form["sentence"].format(**slots)
    return Said(said, form["questions"][number].format(**slots), said, slots["v"], f"{said}|{number}")


def draw_memory(random: Random, about: str) -> Said:
    """Something that users say about themselves."""
    form = table("retrieval")["told"][about]
    number, value = random.randrange(len(form["questions"])), _value(random, form)
    said, answer = random.choice(form["said"]).format(v=value), form["answer"].format(v=value)
    return Said(said, form["questions"][number], answer, value, f"{about}|{value}|{number}")


def _confused(one: Said, other: Said) -> bool:
    """Whether the value of either stands in the answer of the other."""
    pairs = ((one.value, other.answer), (other.value, one.answer))
    return any(value.lower() in answer.lower().rstrip(".").split() for value, answer in pairs)


def draw_all(family: str, draws: Sequence[Callable[[], Said]], given: Sequence[Said] = ()) -> list[Said]:
    """`given` and one of each, none confused with another, all on one side of the split: no turn teaches what is held
    out.

    One that does not come to fit in `TRIES` draws is left out; the first always fits.
    """
    drawn = list(given)
    for draw in draws:
        for said in (draw() for _ in range(TRIES)):
            same_side = not drawn or held_out(family, said.key) == held_out(family, drawn[0].key)
            if same_side and not any(_confused(said, other) for other in drawn):
                drawn.append(said)
                break
    return drawn


def filler(random: Random, size: int) -> list[str]:
    """Sentences of stories and facts, `size` characters of them or up to one sentence more."""
    sentences: list[str] = []
    while size > 0:
        passage = stories.tell(random).text if random.random() < STORY_SHARE else fact_sentence(random)
        for one in re.split(r"(?<=[.!?])\s+", passage):
            if size > 0:
                sentences.append(one)
                size -= len(one) + 1
    return sentences


def hide(random: Random, needles: Sequence[Said], size: int) -> str:
    """A text of about `size` characters, needles included, in which each needle stands once at a random place."""
    hidden = [needle.sentence for needle in random.sample(needles, len(needles))]
    sentences = filler(random, max(size - sum(len(one) + 1 for one in hidden), 1))
    places = sorted(random.randrange(len(sentences) + 1) for _ in hidden)
    for earlier, (place, one) in enumerate(zip(places, hidden, strict=True)):
        sentences.insert(place + earlier, one)
    return " ".join(sentences)


def _asking(said: Sequence[Said]) -> list[Message]:
    """A question and its answer each, the answer to the last left out."""
    turns = [({"role": "user", "content": one.question}, {"role": "assistant", "content": one.answer}) for one in said]
    return [turn for exchange in turns for turn in exchange][:-1]


def _item(
    family: str, turns: Sequence[Message], said: Sequence[Said], thinking: bool, facts: Mapping[str, Any]
) -> Item:
    """The exercise that asks for the last of what was said, with `facts` for the reports."""
    *others, last = said
    source = "The user said" if family == "memory" else "The text says"
    return Item(
        family,
        last.key,
        tuple(turns),
        last.answer,
        f'{source}: "{last.sentence}" So the answer is {last.value}.' if thinking else "",
        thinking=thinking,
        wanted={"value": last.value, "others": [other.value for other in others]},
        facts=facts,
    )


def _search(family: str, random: Random, thinking: bool, size: int, needles: list[Said], asked_for: int) -> Item:
    """The needles in one text, and questions for the last `asked_for` of them, a turn each."""
    text = hide(random, needles, size or random.randint(SHORTEST, LONGEST))
    first, *more = needles[-asked_for:]
    question = random.choice(table("retrieval")["layouts"]).format(text=text, q=first.question)
    _, *turns = _asking([first, *more])
    place = text.index(needles[-1].sentence) / max(len(text) - len(needles[-1].sentence), 1)
    facts = {"depth": place, "characters": len(text), "hidden": len(needles), "asked": asked_for}
    return _item(family, [*asked(question, random), *turns], needles, thinking, facts)


def make_needle(random: Random, thinking: bool, size: int) -> Item:
    """One question for one of a few sentences of the same form."""
    form = random.choice(table("retrieval")["hidden"])
    names = random.sample(words("names"), 1 + random.randint(0, MOST_DISTRACTORS))
    needles = draw_all("needle", [partial(draw_needle, random, form, name) for name in names])
    return _search("needle", random, thinking, size, needles, 1)


def make_needles(random: Random, thinking: bool, size: int) -> Item:
    """Questions for all of several sentences, a turn each; the longer the text, the more.

    The last question, and so the key, is the same for any `size`.
    """
    hidden, names = table("retrieval")["hidden"], random.sample(words("names"), TURNS_AT_ALL)
    count = random.randint(FEWEST_TURNS, MOST_TURNS)
    last = _needles(random, random.sample(hidden, random.randint(1, MOST_KINDS)), names[:count])
    more = random.randint(0, min(size // PER_TURN, TURNS_AT_ALL - count))
    every = _needles(random, hidden, names[count : count + more], last)
    return _search("needles", random, thinking, size, [*every[len(last) :], *last], len(every))


def _needles(
    random: Random, forms: Sequence[Mapping[str, Any]], names: Sequence[str], given: Sequence[Said] = ()
) -> list[Said]:
    """`given` and one about each name."""
    return draw_all("needles", [partial(draw_needle, random, random.choice(forms), name) for name in names], given)


def _telling(random: Random, memories: Sequence[Said]) -> list[Message]:
    """Turns in which the user tells them in a random order, one or two at a time, and gets a short reply."""
    left = [memory.sentence for memory in random.sample(memories, len(memories))]
    turns: list[Message] = []
    while left:
        together = random.choice((1, 1, 2))
        reply = random.choice(table("retrieval")["replies"])
        turns += [{"role": "user", "content": " ".join(left[:together])}, {"role": "assistant", "content": reply}]
        left = left[together:]
    return turns


def make_memory(random: Random, thinking: bool, size: int) -> Item:
    """Questions for some of what the user has told, a turn each."""
    about = random.sample(list(table("retrieval")["told"]), random.randint(1, MOST_TOLD))
    memories = draw_all("memory", [partial(draw_memory, random, matter) for matter in about])
    asked_for = random.randint(1, len(memories))
    first, *turns = [*_telling(random, memories), *_asking(memories[-asked_for:])]
    facts = {"told": len(memories), "asked": asked_for}
    return _item("memory", [*asked(first["content"], random), *turns], memories, thinking, facts)


def judge(item: Item, completion: Completion) -> bool:
    """The value asked for and none of the others, in any case."""
    value = item.wanted["value"].lower()
    found = named(completion.content.lower(), {value, *(other.lower() for other in item.wanted["others"])})
    return plain(completion) and found == {value}


FAMILIES: dict[str, Family] = {
    "needle": Family(make_needle, judge),
    "needles": Family(make_needles, judge),
    "memory": Family(make_memory, judge),
}
