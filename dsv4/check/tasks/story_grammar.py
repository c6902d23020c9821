"""A grammar of short English stories.

`stories.txt` holds the plots, `stories.json` the words. A plot is a line `@ name slot=kind …`, one sentence a line, and
lines `? question = slot`; sections that begin `=` hold sentences for all plots. In a sentence `[a|b]` picks one, and
`{slot}` is filled in.
"""

from __future__ import annotations

import re
from functools import cache
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from dsv4.check.tasks.asking import table
from dsv4.check.tasks.phrasing import says

SHORTEST, LONGEST = 60, 160  # words of a story
CHOICE = re.compile(r"\[([^\[\]]*)\]")
VOWEL = re.compile(r"\b([Aa]) (?=[aeiouAEIO](?!ne\b|nce\b|ni[cfvt]|s[eu])|hour|honest)")
CAPITAL = re.compile(r'((?:^|[.!?:] |\." |, )"|^|[.!?] |\." )([a-z])')
# A plot that says itself when it happens, or in what weather.
WHEN = re.compile(r"morning|afternoon|night|evening|day\b|snow|wind|storm|hot|rain|fog", re.IGNORECASE)
WHEN_SLOTS = ("{time}", "{part}", "{weather}")
ANIMAL_SHARE, STRANGER_SHARE, TRAIT_SHARE, DETAIL_SHARE, LESSON_SHARE = 0.35, 0.2, 0.5, 0.65, 0.4
PRONOUNS = {"girl": ("she", "her", "her"), "boy": ("he", "him", "his")}
# Words that any sentence may use, by their list; a number makes a second slot of the same list.
FREE = {
    **{
        slot: slot + "s"
        for slot in ("colour", "feeling", "trait", "size", "home", "time", "part", "hobby", "smell", "sound")
    },
    **{"creature": "creatures", "creature2": "creatures", "colour2": "colours", "hobby2": "hobbys", "trait2": "traits"},
    **{"plant": "plants", "seen": "seens", "way": "ways", "weather": "weather", "grown": "grown"},
}


class Plot(NamedTuple):
    """`slots`: what the words of this plot must be. `questions`: pairs of a question and the slot that answers it."""

    name: str
    slots: dict[str, str]
    sentences: list[str]
    questions: list[tuple[str, str]]


class Question(NamedTuple):
    """Of a story: `slot` says what kind of word answers it, `answer` is that word."""

    text: str
    slot: str
    answer: str


class Story(NamedTuple):
    """A story with the words it was made of. `who` is what the hero is, `at` the place with its preposition."""

    text: str
    plot: str
    hero: str
    who: str
    friend: str
    place: str
    at: str
    thing: str
    colour: str
    adjective: str
    feeling: str
    questions: tuple[Question, ...]


@cache
def plots() -> tuple[list[Plot], dict[str, list[str]]]:
    """The plots, and the sentences that all of them share by section."""
    found: list[Plot] = []
    shared: dict[str, list[str]] = {}
    text = Path(__file__).with_name("stories.txt").read_text(encoding="utf-8")
    for block in text.strip().split("\n\n"):
        head, *lines = [line.strip() for line in block.splitlines()]
        if head.startswith("="):
            shared[head[1:].strip()] = lines
        else:
            found.append(_plot(head, lines))
    return found, shared


def _plot(head: str, lines: list[str]) -> Plot:
    _, name, *slots = head.split()
    questions = [line[1:].rpartition("=") for line in lines if line.startswith("?")]
    return Plot(
        name,
        dict(slot.split("=") for slot in slots),
        [line for line in lines if not line.startswith("?")],
        [(question.strip(), slot.strip()) for question, _, slot in questions],
    )


def choose(text: str, random: Random) -> str:
    """`text` with each `[a|b]` replaced by one of its choices, the innermost first."""
    while CHOICE.search(text):
        text = CHOICE.sub(lambda match: random.choice(match[1].split("|")), text)
    return text


def sentence_case(text: str) -> str:
    """Capitals at the beginnings of sentences and of quoted speech, and "an" before a vowel.

    After `!"` and `?"` the sentence goes on: `"Look!" she said.`
    """
    return articles(CAPITAL.sub(lambda match: match[1] + match[2].upper(), text))


def articles(text: str) -> str:
    """With "an" for "a" before a vowel."""
    return VOWEL.sub(r"\1n ", text)


@cache
def words(name: str) -> tuple[str, ...]:
    """A list of stories.json; `nouns.toy` is a list in a list."""
    found: Any = table("stories")
    for key in name.split("."):
        found = found[key]
    return tuple(str(found).split("|" if "|" in found else None))


def tell(random: Random) -> Story:
    """A new story: 60 to 160 words."""
    while True:
        story = _tell(random)
        if SHORTEST <= len(story.text.split()) <= LONGEST:
            return story


def _tell(random: Random) -> Story:
    found, shared = plots()
    plot = random.choice(found)
    slots = _slots(plot, random)
    before = _before(plot, shared, random)
    if any("{friend}" in line for line in before):
        slots["a_friend"] = slots["friend"]  # no stranger any more
    after = [random.choice(shared["endings"]), *_some(shared[plot.slots["theme"]], LESSON_SHARE, random)]
    lines = [choose(line, random).format_map(slots) for line in (*before, *plot.sentences, *after)]
    text = " ".join(map(sentence_case, lines))
    fields = {name: slots[name] for name in Story._fields if name not in ("text", "plot", "questions")}
    return Story(text=text, plot=plot.name, questions=_questions(plot, slots, text), **fields)


def _before(plot: Plot, shared: dict[str, list[str]], random: Random) -> list[str]:
    """What stands before the plot: who this is about, and some details that do not contradict it."""
    own_time = WHEN.search(" ".join(plot.sentences[:2])) is not None

    def fitting(section: str) -> list[str]:
        return [line for line in shared[section] if not (own_time and any(slot in line for slot in WHEN_SLOTS))]

    opening = random.choice(fitting("openings"))
    details = [] if own_time else _some(shared["details"], DETAIL_SHARE, random)
    return [opening, *_some(fitting("traits"), TRAIT_SHARE, random), *details]


def _some(lines: list[str], share: float, random: Random) -> list[str]:
    return [random.choice(lines)] if random.random() < share else []


def _questions(plot: Plot, slots: _Slots, text: str) -> tuple[Question, ...]:
    asked = [Question(sentence_case(asks.format_map(slots)) + "?", slot, slots[slot]) for asks, slot in plot.questions]
    asked.append(Question("Who is the story about?", "hero", slots["hero"]))
    asked.append(Question(f"How did {slots['hero']} feel in the end?", "feeling", slots["feeling"]))
    return tuple(question for question in asked if says(text, question.answer))


class _Slots(dict[str, str]):
    """The words of one story. A word of `FREE` is drawn when a sentence first asks for it."""

    def __init__(self, known: dict[str, str], random: Random) -> None:
        super().__init__(known)
        self.random = random

    def __missing__(self, slot: str) -> str:
        return self.draw(slot, FREE[slot])

    def draw(self, slot: str, name: str) -> str:
        """A word of a list that is not yet in the story: a question has one answer."""
        word = self.random.choice(words(name))
        while word in self.values():
            word = self.random.choice(words(name))
        self[slot] = word
        return word


def _slots(plot: Plot, random: Random) -> _Slots:
    out = _Slots(_people(random), random)
    preposition, out["place"] = random.choice(_places(plot.slots["place"]))
    out["at"] = f"{preposition} the {out['place']}"
    out.draw("thing", "nouns." + plot.slots["thing"])
    out.draw("pet", "nouns.pet")
    described = "food" if plot.slots["thing"] in ("food", "bake") else "pet" if "pet" in plot.slots else "thing"
    out.draw("adjective", "adjectives." + described)
    return out


@cache
def _places(kind: str) -> list[tuple[str, str]]:
    """Prepositions with their places."""
    groups = [group.split() for group in table("stories")["places"][kind].split("|")]
    return [(preposition, place) for preposition, *places in groups for place in places]


def _people(random: Random) -> dict[str, str]:
    """The hero and the friend with their pronouns, and `a_friend`: how the friend is brought in."""
    hero_kind, friend_kind = random.choice(("girl", "boy")), random.choice(("girl", "boy"))
    hero = random.choice(words(hero_kind + "s"))
    friend = random.choice([name for name in words(friend_kind + "s") if name != hero])
    he, him, his = PRONOUNS[hero_kind]
    fhe, him_f, fhis = PRONOUNS[friend_kind]
    animal, other = random.sample(words("hero_animals"), 2)
    is_animal = random.random() < ANIMAL_SHARE
    friends = [f"{his} friend {friend}", f"{his} good friend {friend}", friend]
    if is_animal or random.random() < STRANGER_SHARE:
        friends += [
            f"a {other} named {friend}",
            f"an old {other} called {friend}",
            f"a friendly {other} named {friend}",
        ]
    else:
        family = {"girl": "sister", "boy": "brother"}[friend_kind]
        friends += [f"a {friend_kind} named {friend}", f"{his} {family} {friend}", f"{his} neighbour {friend}"]
    return {
        "hero": hero, "who": animal if is_animal else hero_kind, "he": he, "him": him, "his": his,
        "friend": friend, "fhe": fhe, "him_f": him_f, "fhis": fhis, "a_friend": random.choice(friends),
    }  # fmt: skip
