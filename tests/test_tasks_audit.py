"""What a teacher found wanting in the exercises: English, ways of asking, what is held out, what long texts teach."""

from __future__ import annotations

import json
import re
import shutil
from functools import cache
from pathlib import Path
from random import Random

import pytest

from dsv4.chat.dialect import Dialect
from dsv4.chat.events import Completion
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.tasks import arithmetic, asking, naming, phrasing, retrieval, talk, toolbox
from dsv4.check.tasks.asking import held_out, table
from dsv4.check.tasks.conversation import ELLIPSES, INSIDE
from dsv4.check.tasks.item import Item, draw
from dsv4.check.tasks.registry import FAMILIES
from dsv4.check.tasks.render import render
from dsv4.check.tasks.story_grammar import words as story_words


@cache
def drawn(name: str, held: bool = False, count: int = 400) -> list[Item]:
    random = Random(f"{name} {held}")
    return [draw(FAMILIES[name], random, n % 2 == 0, 300, held) for n in range(count)]


def asked(item: Item) -> str:
    return str(item.messages[-1]["content"])


# --- English ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["tool_call", "tool_parallel", "json", "json_prompt", "compare", "category", "name_some"]
)
def test_articles_and_plurals_are_right(name: str) -> None:
    for item in drawn(name):
        text = "\n".join((asked(item), item.reasoning, item.content))
        wrong = re.search(r"\b[Aa] (?:[aeio]\w|\d day)|\b1 (?:years|dollars|nights|people|minutes|digits)\b", text)
        assert not wrong, text
        assert "  " not in text
        assert not asked(item).endswith(" ")


def test_what_follows_is_in_a_demonym_is_an_adjective() -> None:
    for country in table("countries")["countries"]:
        assert country.get("demonym", "").rpartition(" ")[2] not in ("Zealander", "Liechtensteiner", "Islander")


def test_a_question_without_its_mark_ends_in_no_blank() -> None:
    random = Random(0)
    forms = {asking.vary(random, "12 + 5 = ?") for _ in range(300)}
    assert "12 + 5 =" in forms
    assert all(form == form.strip() for form in forms)
    bare = {asking.vary(random, "Sort: 7, 3", lower=False) for _ in range(300)}
    assert len(bare) > 3
    assert all(form.endswith("7, 3") for form in bare), "what follows numbers would seem to belong to them"


# --- ways of asking -----------------------------------------------------------------------------------------------


def test_slips_touch_long_words_and_no_values() -> None:
    random = Random(0)
    template = "what is the capital of {c} with it's x-ray?"
    slips = {phrasing.typo(template, random) for _ in range(200)}
    assert len(slips) > 10
    for slip in slips:
        start, end = "what is the c", "l of {c} with it's x-ray?"
        assert slip.startswith(start), slip
        assert slip.endswith(end), slip
        assert abs(len(slip) - len(template)) <= 1
    assert phrasing.typo("Is it 5?", random) == "Is it 5?"


def test_short_forms_stand_where_people_say_them() -> None:
    random = Random(0)
    forms = {phrasing.shortened("What is {x}? I do not know who I am.", random) for _ in range(50)}
    assert forms == {"What's {x}? I don't know who I am.", "Whats {x}? I dont know who I am."}
    questions = [asked(item) for item in drawn("capital")]
    assert any(question.startswith("What's") for question in questions)


def test_sums_are_asked_in_words_and_without_blanks() -> None:
    assert [arithmetic.in_words(n) for n in (0, 7, 19, 20, 42, 99)] == [
        "zero", "seven", "nineteen", "twenty", "forty-two", "ninety-nine",
    ]  # fmt: skip
    for name, sign in (("add", "+"), ("subtract", "-"), ("multiply", "*")):
        tight = [item for item in drawn(name) if re.search(rf"\d{re.escape(sign)}\d", asked(item))]
        spoken = [item for item in drawn(name) if not re.search(r"\d", asked(item))]
        assert len(tight) > 5
        assert len(spoken) > 5
        for item in spoken:
            given = {arithmetic.in_words(n) for n in item.wanted["given"]}
            assert set(re.findall(r"[a-z]+(?:-[a-z]+)?", asked(item).lower())) & given
            assert item.content.startswith(f"{item.wanted['given'][0]} ")


def test_operands_of_a_sum_come_in_the_order_of_the_question() -> None:
    for template in table("arithmetic")["operations"]["add"]:
        assert template.index("{a}") < template.index("{b}")


def test_a_country_is_known_by_its_other_names() -> None:
    others = [item for item in drawn("capital", count=4000) if re.search("USA|America", asked(item), re.IGNORECASE)]
    assert others
    assert all(item.wanted == "Washington" for item in others)
    assert all("United States" in item.content and "USA" not in item.reasoning for item in others)


def test_where_a_country_is_has_an_answer() -> None:
    assert any(asked(item).startswith("Where is") for item in drawn("continent"))
    named = {country["name"] for country in table("countries")["countries"]}
    named |= {country["capital"] for country in table("countries")["countries"]}
    for item in drawn("unknown", count=2000):
        place = re.search(r"[Ww]here is ([A-Z]\w+)", asked(item))
        assert not place or place[1] not in named


@pytest.mark.slow
def test_a_story_can_be_asked_for_with_no_more_words() -> None:
    free = [item for item in drawn("story") if not item.wanted]
    assert 0.02 < len(free) / len(drawn("story")) < 0.2
    assert not any(re.search(r" [.,?]", asked(item)) for item in free)
    assert all(item.wanted for item in drawn("story", held=True)), "one question: it cannot be taught and held out"


# --- small talk ---------------------------------------------------------------------------------------------------


def test_what_is_said_belongs_to_one_intent() -> None:
    intents = table("talk")["intents"]
    of: dict[str, str] = {}
    for intent, found in intents.items():
        assert len(found["ask"]) >= 15
        for said in found["ask"]:
            assert of.setdefault(talk._key(said), intent) == intent, said
        for answer in found["say"]:
            assert talk.fits(answer, found["keys"]), answer
    assert {"poem", "joke", "cannot", "like", "huh", "english"} <= set(intents)


def test_marks_and_capitals_do_not_make_another_saying() -> None:
    assert talk._key("Yes, please!") == talk._key("yes please") != talk._key("yes")
    assert talk._key("?") == "?"


@pytest.mark.parametrize("name", ["chat", "remember", "conversation"])
def test_no_turn_of_a_taught_conversation_is_held_out(name: str) -> None:
    parts = [part for item in drawn(name) for part in item.facts["parts"]]
    assert len(parts) > 100
    assert not [part for part in parts if held_out(*part)]


def test_only_what_could_be_taught_was_not_taught() -> None:
    said = {
        kind: {i.content for i in drawn("unknown", count=2000) if i.facts["kind"] == kind} for kind in ("mine", "land")
    }
    assert any("taught" in content for content in said["land"])
    assert not any("taught" in content for content in said["mine"])
    assert talk.judge_unknown(drawn("unknown")[0], Completion("", "I was not taught that."))
    assert any(item.facts["kind"] == "divide" for item in drawn("unknown"))


# --- conversations ------------------------------------------------------------------------------------------------


def test_a_conversation_holds_exercises_of_all_kinds() -> None:
    items = drawn("conversation", count=1000)
    assert {item.facts["inside"] for item in items} == set(INSIDE)
    for item in items:
        assert FAMILIES["conversation"].judge(item, Completion(item.reasoning, item.content))
        assert not FAMILIES["conversation"].judge(item, Completion("", ""))
        assert item.effort is None
        assert "Check:" not in item.reasoning
        roles = "".join(message["role"][0] for message in item.messages)
        assert re.fullmatch("s?(ua){1,3}u", roles)
    openings = tuple(re.split(r"\{\}", form)[0].lower() for form in ELLIPSES)
    short = [item for item in items if asked(item).lower().startswith(openings)]
    assert len(short) > 10
    for item in short:
        assert item.facts["inside"] == item.facts["parts"][-2][0], "it asks the same of another country"


@pytest.mark.slow
def test_a_held_out_conversation_asks_what_is_held_out() -> None:
    for item in drawn("conversation", held=True, count=60):
        assert held_out(*item.facts["parts"][-1])


# --- lists --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "is_right"),
    [
        ("A dog, a cat and a horse.", True),
        ("Dogs, cats and cows.", True),
        ("A duck, a cat and a bee.", True),
        ("A dog and a cat.", False),
        ("A dog, a dog and a cat.", False),
        ("A dog, a cat, a horse and a cow.", False),
        ("A dog, a cat and a rose.", False),
    ],
)
def test_three_animals_are_three_and_animals(content: str, is_right: bool) -> None:
    item = Item("name_some", "", (), "", wanted={"kind": "animal", "number": 3})
    assert naming.judge_some(item, Completion("", content)) == is_right


@pytest.mark.parametrize(
    ("content", "is_right"),
    [("3, 4, 5.", True), ("3, 4 and 5", True), ("3, 5, 4.", False), ("3, 4.", False), ("3, 4, 5, 6.", False)],
)
def test_a_sequence_is_whole_and_in_order(content: str, is_right: bool) -> None:
    assert (
        naming.judge_sequence(Item("sequence", "", (), "", wanted=["3", "4", "5"]), Completion("", content)) == is_right
    )


def test_orders_have_all_their_words() -> None:
    assert [len(naming.ordered(name)) for name in naming.ORDERS] == [7, 12, 4, 8, 26]
    assert naming.ordered("days")[0] == "Monday"
    assert naming.ordered("planets")[-1] == "Neptune"


# --- tools, needles, facts ----------------------------------------------------------------------------------------


def test_some_arguments_stand_in_no_list() -> None:
    random = Random(0)
    for kind in table("tools")["open"]:
        values = [toolbox.value(kind, random) for _ in range(400)]
        unlisted = [value for value in values if value not in toolbox.kind_words(kind)]
        assert 0.15 < len(unlisted) / len(values) < 0.35, kind
        assert not [value for value in unlisted if "{" in value or re.search(r"\ba [aeiou]", value)]
    for item in drawn("tool_call"):
        for _, arguments in item.calls:
            copied = [value for value in arguments.values() if isinstance(value, str)]
            assert all(value in asked(item) for value in copied), item


@pytest.mark.slow
def test_a_long_text_is_asked_many_questions() -> None:
    make = FAMILIES["needles"].make
    short, long = ([make(Random(n), False, size).facts["asked"] for n in range(40)] for size in (1500, 60_000))
    assert max(short) <= 10
    assert sum(long) / len(long) > 12
    assert max(long) > 20


@pytest.mark.parametrize("name", ["needle", "needles"])
def test_a_key_does_not_depend_on_the_length(name: str) -> None:
    """A long text need not be made to see on which side of the split it is."""
    for n in range(20):
        assert len({FAMILIES[name].make(Random(n), True, size).key for size in (300, 1200, 20_000)}) == 1


def test_no_hidden_name_is_a_hero_s() -> None:
    assert not set(retrieval.words("names")) & {*story_words("girls"), *story_words("boys")}


def test_each_fact_is_taught_in_several_ways_in_each_mode() -> None:
    for family in ("capital", "country", "continent", "demonym", "language"):
        relation = table("facts")[family]
        ways = range(len(relation["questions"]))
        held = 0
        for country in (one for one in table("countries")["countries"] if relation["field"] in one):
            for thinking in (True, False):
                sides = [held_out(family, f"{country['name']}|{n}|{thinking}") for n in ways]
                assert sides.count(False) >= 0.4 * len(ways), (family, country["name"])
                held += sides.count(True)
        assert held > 100


def test_a_fact_belongs_to_one_family() -> None:
    """What one holds out, another would teach."""
    assert "opposites" not in {kind["name"] for kind in table("simple_facts")}
    assert "What's the capital of {c}?" not in table("facts")["capital"]["questions"], "the short form of another"


# --- rendering ----------------------------------------------------------------------------------------------------


def test_a_prompt_is_tokenised_once(
    pico_dir: Path, root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copy(root / "training/dialect.json", tmp_path)
    shutil.copy(pico_dir / "tokenizer.json", tmp_path)
    tokenizer, dialect = Tokenizer.load(tmp_path), Dialect.for_model(tmp_path)
    read: list[int] = []
    encode = Tokenizer.encode_text
    monkeypatch.setattr(Tokenizer, "encode_text", lambda self, text: read.append(len(text)) or encode(self, text))
    for name in ("needle", "tool_call", "conversation", "json"):
        read.clear()
        item = FAMILIES[name].make(Random(1), True, 3000)
        prompt, answer = render(item, dialect, tokenizer)
        assert sum(read) <= len(tokenizer.decode(prompt + answer))
        assert item.content in tokenizer.decode(answer)
        assert json.dumps(asked(item))[1:20] in json.dumps(tokenizer.decode(prompt))


def test_sums_are_told_about_oneself() -> None:
    for item in drawn("word_problem"):
        if re.search(r"\bI ha(?:ve|d) \d", asked(item)):
            assert item.content.startswith("You have "), item
    assert any(re.search(r"\bI ha(?:ve|d) \d", asked(item)) for item in drawn("word_problem"))
