"""Facts: capitals and other facts about countries, and simple facts about animals, days, colours, numbers.

Asked: one fact in one of many phrasings. Judged: the answer names the right thing and no other of its kind. Each fact
is taught; which of its phrasings are held out goes by fact, phrasing and mode.

`facts.json` holds for each family what is asked of a country: the field that answers, questions, answers (question n
goes with answer n modulo their number) and what the reasoning recalls; a country may `also` have other names, used in
questions alone; `{c}` is the country as in a sentence, `{C}` the same at its start. `simple_facts.json` holds pairs of
`{x}` and `{y}`, right answers divided by `|`.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cache, partial
from random import Random
from typing import Any

from dsv4.chat.events import Completion
from dsv4.check.tasks.asking import named, sentence, table, vary
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import asked, plain

Country = Mapping[str, Any]
ALSO_SHARE = 0.3  # of the questions about a country of other names: asked by one of these


@cache
def known(field: str) -> tuple[Country, ...]:
    """The countries of which this field is known: all have name, capital, continent and subregion; most a demonym (one
    that follows "is"), some a language."""
    return tuple(country for country in table("countries")["countries"] if field in country)


def called(country: Country) -> str:
    """Its name as it stands in a sentence: "the Gambia"."""
    return ("the " if country.get("the") else "") + str(country["name"])


def say(template: str, country: Country, name: str = "") -> str:
    """A template filled in, with a capital at its start; `name` is another one of the country."""
    name = name or called(country)
    return sentence(template.format(c=name, C=sentence(name), **country))


def ellipsis(family: str, form: str, random: Random, thinking: bool) -> Item:
    """What is asked of another country behind a question of this family: "And of Spain?"."""
    relation = table("facts")[family]
    country = random.choice(known(relation["field"]))
    about = country["capital"] if family == "country" else called(country)
    return _item(
        family, country, f"{form}|{thinking}", sentence(form.format(about)), relation["answers"][0], random, thinking
    )


def fact_sentence(random: Random) -> str:
    """A true sentence about a country, for texts that hold other things too."""
    relation = table("facts")[random.choice(("capital", "continent", "language"))]
    return say(relation["answers"][0], random.choice(known(relation["field"])))


def _make(family: str, random: Random, thinking: bool, size: int) -> Item:
    relation = table("facts")[family]
    country = random.choice(known(relation["field"]))
    number = random.randrange(len(relation["questions"]))
    name = random.choice(country["also"]) if "also" in country and random.random() < ALSO_SHARE else ""
    question = vary(random, say(relation["questions"][number], country, name))
    answer = relation["answers"][number % len(relation["answers"])]
    return _item(family, country, f"{number}|{thinking}", question, answer, random, thinking)


def _item(family: str, country: Country, way: str, question: str, answer: str, random: Random, thinking: bool) -> Item:
    """`way`: how it is asked, for the key."""
    relation = table("facts")[family]
    return Item(
        family,
        f"{country['name']}|{way}",
        asked(question, random),
        say(answer, country),
        say(relation["reasoning"], country) if thinking else "",
        thinking=thinking,
        wanted=country[relation["field"]],
    )


@cache
def _names() -> frozenset[str]:
    return frozenset(country[field] for country in known("name") for field in ("name", "capital"))


def _judge(family: str, item: Item, completion: Completion) -> bool:
    """The wanted thing and no other of its kind. Names count whole: there is no Spain in `Port of Spain`."""
    field = table("facts")[family]["field"]
    kind = {country[field] for country in known(field)}
    return plain(completion) and named(completion.content, kind | _names()) & kind == {item.wanted}


@cache
def _pairs() -> tuple[tuple[int, str], ...]:
    return tuple((index, x) for index, kind in enumerate(table("simple_facts")) for x in kind["pairs"])


def make_simple(random: Random, thinking: bool, size: int) -> Item:
    """A simple fact."""
    index, x = random.choice(_pairs())
    kind = table("simple_facts")[index]
    number = random.randrange(len(kind["questions"]))
    right = kind["pairs"][x].split("|")
    answer = sentence(kind["answer"].format(x=x, y=right[0]))
    return Item(
        "simple_facts",
        f"{kind['name']}|{x}|{number}|{thinking}",
        asked(vary(random, sentence(kind["questions"][number].format(x=x))), random),
        answer,
        f"{kind['reasoning'].format(x=x)} {answer}" if thinking else "",
        thinking=thinking,
        wanted={"right": right, "asked": x, "kind": index},
    )


def judge_simple(item: Item, completion: Completion) -> bool:
    """One of the right words, and no answer to another question of this kind but for the word asked about."""
    right = {word.lower() for word in item.wanted["right"]}
    answers = table("simple_facts")[item.wanted["kind"]]["pairs"].values()
    all_of_kind = {word.lower() for answer in answers for word in answer.split("|")}
    found = named(completion.content.lower(), all_of_kind | {item.wanted["asked"].lower()})
    rest = found & all_of_kind - ({item.wanted["asked"].lower()} - right)
    return plain(completion) and bool(rest) and rest <= right


RELATIONS: tuple[str, ...] = tuple(table("facts"))
FAMILIES: dict[str, Family] = {
    **{family: Family(partial(_make, family), partial(_judge, family)) for family in RELATIONS},
    "simple_facts": Family(make_simple, judge_simple),
}
