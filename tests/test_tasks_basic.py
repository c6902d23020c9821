"""The families with exact answers: references are accepted, wrong answers refused, nothing held out is taught."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import cache, partial
from itertools import pairwise
from random import Random
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dsv4.chat.events import Completion, ParseProblem, ToolCall
from dsv4.check.tasks import arithmetic, columns, facts, lists, retrieval, stories, structured
from dsv4.check.tasks.asking import held_out, named, numbers, table
from dsv4.check.tasks.item import Family, Item, draw

FAMILIES: dict[str, Family] = {
    **facts.FAMILIES,
    **arithmetic.FAMILIES,
    **lists.FAMILIES,
    **retrieval.FAMILIES,
    **structured.FAMILIES,
}
DRAWS, SIZE = 200, 100  # of a family on each side; characters of a text


@pytest.fixture(scope="module", autouse=True)
def _few_stories() -> Iterator[None]:
    """Telling a story takes longer than all else here: forty of them are enough to hide needles in."""
    told = [stories.tell(Random(seed)) for seed in range(40)]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stories, "tell", lambda random: random.choice(told))
        yield


def right(item: Item) -> Completion:
    return Completion(item.reasoning, item.content)


def draw_some(name: str, held_out: bool, seed: int, count: int) -> list[Item]:
    """Both modes in turn."""
    random = Random(f"{name} {held_out} {seed}")
    return [draw(FAMILIES[name], random, n % 2 == 0, SIZE, held_out) for n in range(count)]


@cache
def drawn(name: str, held_out: bool) -> list[Item]:
    return draw_some(name, held_out, 0, DRAWS)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_reference_answer_is_right_and_another_ones_is_wrong(name: str) -> None:
    family = FAMILIES[name]
    items = [item for side in (False, True) for item in drawn(name, side)]
    refused = 0
    for item, other in pairwise(items):
        assert item.family == name
        assert family.judge(item, right(item)), item
        assert not family.judge(item, Completion(item.reasoning, "")), "reasoning is no answer"
        assert not family.judge(item, Completion("", "I do not know that."))
        assert not family.judge(item, replace(right(item), problems=[ParseProblem("broken", 0)])), (
            "a broken format is no answer"
        )
        assert not family.judge(item, replace(right(item), calls=[ToolCall("f", "1", "{}", True)])), (
            "a call is no answer"
        )
        refused += not family.judge(item, Completion("", other.content))
    few_answers = {"continent": 0.6, "membership": 0.3, "count": 0.7, "language": 0.7}
    assert refused >= few_answers.get(name, 0.85) * (len(items) - 1)


@pytest.mark.parametrize("name", FAMILIES)
def test_the_mode_is_the_one_asked_for(name: str) -> None:
    for n, item in enumerate(drawn(name, False)):
        assert item.thinking == (n % 2 == 0)
        assert bool(item.reasoning) == item.thinking
        assert item.content.strip() == item.content != ""
        roles = "".join(message["role"][0] for message in item.messages)
        assert re.fullmatch("s?(ua)*u", roles), roles
        assert (item.content + item.reasoning).isascii()
        assert not re.search(r"\{\w*\}", item.messages[-1]["content"] + item.reasoning), "an unfilled slot"


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_held_out_is_taught_and_a_seed_gives_the_same(name: str) -> None:
    taught, held_out = (drawn(name, side) for side in (False, True))
    assert not {item.key for item in taught} & {item.key for item in held_out}
    assert draw_some(name, True, 0, 10) == held_out[:10]
    assert draw_some(name, True, 1, 10) != held_out[:10]


@settings(max_examples=40, deadline=None)
@given(st.text(alphabet="0123456789,.:-{}[]\"' \nabandsure=<>yes", max_size=60))
def test_no_answer_breaks_a_judge(content: str) -> None:
    for name, family in FAMILIES.items():
        assert family.judge(family.make(Random(name), False, 0), Completion("", content)) in (True, False)


@pytest.mark.parametrize("content", ["9" * 5000, "[" * 100_000, '{"a": ' + "9" * 5000 + "}"])
def test_no_monstrous_answer_breaks_a_judge(content: str) -> None:
    for name, family in FAMILIES.items():
        assert not family.judge(family.make(Random(name), False, 0), Completion("", content))


def judged(family: str, content: str, **wanted: Any) -> bool:
    return FAMILIES[family].judge(Item(family, "", (), "", wanted=wanted.pop("value", wanted)), Completion("", content))


@pytest.mark.parametrize(
    ("content", "is_right"),
    [
        ("347 + 285 = 632.", True),
        ("It is 632", True),
        ("632 = 347 + 285", False),
        ("347 + 285 = 633.", False),
        ("347 + 285 = 1632", False),
        ("It is 632 or 633.", False),
        ("It is 633 or 632.", False),
        ("It is 632.5", False),
        ("347 + 285 = -632", False),
    ],
)
def test_a_final_number_is_exact(content: str, is_right: bool) -> None:
    assert judged("add", content, result=632, given=[347, 285]) == is_right


@pytest.mark.parametrize(
    ("content", "is_right"),
    [
        ("58", True),
        ("58 is larger than 21.", True),
        ("21 is smaller than 58.", True),
        ("58 > 21", True),
        ("Of 21 and 58 the larger is 58.", True),
        ("21", False),
        ("58 is smaller than 21.", False),
        ("21 is larger than 58.", False),
        ("21 > 58", False),
        ("58, 21", False),
        ("59 is larger than 21.", False),
    ],
)
def test_a_comparison_is_true(content: str, is_right: bool) -> None:
    assert judged("compare", content, result=58, given=[21, 58]) == is_right


@pytest.mark.parametrize(
    ("family", "wanted", "content", "is_right"),
    [
        ("capital", "Paris", "Paris", True),
        ("capital", "Paris", "It's Paris, of course.", True),
        ("capital", "Paris", "paris", False),
        ("capital", "Paris", "Paris or London.", False),
        ("capital", "Brasilia", "The capital of Brazil is Brasília.", True),
        ("country", "Guinea", "It is Guinea-Bissau.", False),
        ("country", "Trinidad and Tobago", "Port of Spain is the capital of Trinidad and Tobago.", True),
        ("continent", "Asia", "South Africa is in Africa.", False),
        ("continent", "Africa", "South Africa is in Africa.", True),
        ("continent", "Africa", "South Africa is in Asia.", False),
        ("reverse", ["b", "a"], "The list is b and a.", True),
        ("reverse", ["b", "a"], "1. b\n2. a", True),
        ("reverse", ["b", "a"], "Reversed: b, a", True),
        ("reverse", ["b", "a"], "a, b", False),
        ("reverse", ["b", "a"], "apple b, a", False),
        ("reverse", ["b", "a"], "b, a, c", False),
        ("count", 3, "There are three words.", True),
        ("count", 3, "There are 3 or 4 words.", False),
        ("copy", "Cat dog.", "Cat dog.", True),
        ("copy", "Cat dog.", '"Cat dog."', True),
        ("copy", "Cat dog.", "cat dog.", False),
        ("copy", "Cat dog.", "Cat dog", False),
        ("membership", True, "Yes.", True),
        ("membership", True, "Yes and no.", False),
        ("membership", False, "It is not.", False),
    ],
)
def test_right_and_wrong_answers(family: str, wanted: Any, content: str, is_right: bool) -> None:
    assert judged(family, content, value=wanted) == is_right


@pytest.mark.parametrize(
    ("content", "is_right"),
    [
        ('{"n": 1, "b": true, "e": "x"}', True),
        ('{"e":"x","b":true,"n":1}', True),
        ('{"n": 1, "b": 1, "e": "x"}', False),
        ('{"n": true, "b": true, "e": "x"}', False),
        ('{"n": 1.0, "b": true, "e": "x"}', False),
        ('{"n": "1", "b": true, "e": "x"}', False),
        ('{"n": 1, "b": true, "e": "y"}', False),
        ('{"n": 1, "b": true}', False),
        ('{"n": 1, "b": true, "e": "x", "more": 0}', False),
        ('Here: {"n": 1, "b": true, "e": "x"}', False),
        ('[{"n": 1, "b": true, "e": "x"}]', False),
    ],
)
def test_an_object_is_compared_type_by_type(content: str, is_right: bool) -> None:
    properties = {"n": {"type": "integer"}, "b": {"type": "boolean"}, "e": {"type": "string", "enum": ["x", "y"]}}
    required = {"type": "object", "properties": properties, "required": ["n", "b", "e"], "additionalProperties": False}
    assert judged("json", content, object={"n": 1, "b": True, "e": "x"}, schema=required) == is_right


@pytest.mark.parametrize("name", ["json", "json_prompt"])
def test_the_reference_is_compact_json_that_fits(name: str) -> None:
    for item in drawn(name, True):
        value = json.loads(item.content)
        assert json.dumps(value, ensure_ascii=False) == item.content
        assert structured.fits(value, item.wanted["schema"])
        assert not structured.fits({**value, "more": 1}, item.wanted["schema"])
        assert not structured.fits({}, item.wanted["schema"])
        assert (item.response_format == item.wanted["schema"]) == (name == "json")
        shown = item.messages[-1]["content"]
        spoken = [one for many in value.values() for one in (many if isinstance(many, list) else [many])]
        assert all(str(one) in shown for one in spoken if not isinstance(one, bool))


SIGNS = {"+": int.__add__, "-": int.__sub__, "x": int.__mul__}


def assert_true(reasoning: str) -> None:
    """Every equation of the text holds."""
    equations = re.findall(r"(?<![\w-] )(\d+(?: [-+x] \d+)+) = (\d+)", reasoning)
    assert equations
    for left, result in equations:
        first, *rest = re.findall(r"[-+x] \d+|\d+", left)
        value = int(first)
        for term in rest:
            value = SIGNS[term[0]](value, int(term[2:]))
        assert value == int(result), (left, result)


@pytest.mark.parametrize("name", ["add", "subtract", "multiply"])
def test_every_step_of_the_reasoning_is_true(name: str) -> None:
    for item in drawn(name, True):
        a, b = item.wanted["given"]
        sign = {"add": "+", "subtract": "-", "multiply": "x"}[name]
        assert item.wanted["result"] == SIGNS[sign](a, b)
        assert item.content == f"{a} {sign} {b} = {item.wanted['result']}."
        if not item.thinking:
            assert max(a, b) < 100
            continue
        assert_true(item.reasoning)
        work = item.reasoning.partition("\nCheck: ")[0]
        assert work.endswith(f": {item.wanted['result']}.")
        written = re.findall(r"so (\d+)\.", work)
        assert len(written) == max(len(str(a)), len(str(b)) if name != "multiply" else 0), "a line a column"
        padded = str(item.wanted["result"]).zfill(len(written))
        assert all(padded.endswith(done) for done in written), "each line adds a digit in front"


def test_a_carry_and_a_borrow_go_all_the_way() -> None:
    item = next(item for item in drawn("add", False) if item.effort == "max")
    assert re.search(r"\nCheck: \d+ - \d+\nDigits", item.reasoning)
    assert item.reasoning.endswith(f"= {item.wanted['given'][0]}. It fits.")
    assert columns.add_steps(999, 1)[-1] == "Carry 1 in front: 1000."
    assert columns.subtract_steps(1000, 1)[2] == "Ones: 0 - 1 - 0, too small, 10 - 1 - 0 = 9, borrow 1, so 9."
    assert columns.subtract_steps(1000, 1)[-1] == "Borrow 0: 999."
    assert columns.multiply_steps(10, 0)[-1] == "Carry 0: 0."
    assert columns.compare_steps(121, 125)[1:] == [
        "Hundreds: 1 and 1, 1 = 1.",
        "Tens: 2 and 2, 2 = 2.",
        "Ones: 1 and 5, 1 < 5.",
        "So 125 is larger and 121 is smaller.",
    ]


@pytest.mark.parametrize("name", ["add", "subtract"])
def test_some_sums_are_checked_with_the_greatest_effort(name: str) -> None:
    items = drawn(name, False) + draw_some(name, False, 1, 400)
    share = sum(item.effort == "max" for item in items) / sum(item.thinking for item in items)
    assert 0.05 < share < 0.25
    assert all(("Check:" in item.reasoning) == (item.effort == "max") for item in items)


def test_a_story_is_on_the_side_of_its_sum() -> None:
    for side in (False, True):
        for item in drawn("word_problem", side):
            name = item.key.split()[0]
            assert replace(item, family=name).held_out == side
            assert item.wanted["given"] == numbers(item.messages[-1]["content"])
            if item.thinking:
                assert_true(item.reasoning.replace("\n", ".\n"))


@pytest.mark.parametrize("size", [0, 500, 3000])
def test_a_needle_stands_once_and_where_it_is_said(size: int) -> None:
    random = Random(size)
    for _ in range(30):
        item = FAMILIES["needle"].make(random, True, size)
        shown, needle = item.messages[-1]["content"], item.content
        assert shown.count(needle) == 1
        assert f'"{needle}"' in item.reasoning
        assert all(re.search(rf"\b{other}\b", shown) for other in item.wanted["others"])
        if size:
            assert abs(item.facts["characters"] - size) < 250
        before = shown.index(needle)
        place = item.facts["depth"] * (item.facts["characters"] - len(needle))
        assert -1e-6 <= before - place <= len(shown) - item.facts["characters"] + 1e-6


def test_needles_lie_at_all_depths() -> None:
    random = Random(0)
    depths = sorted(FAMILIES["needle"].make(random, False, 1000).facts["depth"] for _ in range(200))
    assert depths[10] < 0.15
    assert 0.35 < depths[100] < 0.65
    assert depths[189] > 0.85


@pytest.mark.parametrize("name", ["needles", "memory"])
def test_earlier_turns_are_right_and_on_the_same_side(name: str) -> None:
    for side in (False, True):
        for item in drawn(name, side):
            answers = [message["content"] for message in item.messages if message["role"] == "assistant"]
            told = {item.wanted["value"], *item.wanted["others"]}
            replies = set(table("retrieval")["replies"])
            assert all(len(named(answer, told)) == 1 for answer in answers if answer not in replies), answers
            whole = "\n".join(message["content"] for message in item.messages if message["role"] == "user")
            assert all(named(whole, {value}) for value in told)


def test_the_facts_are_plain() -> None:
    countries = table("countries")["countries"]
    assert len(countries) >= 150
    assert len({country["name"] for country in countries}) == len(countries)
    assert len({country["capital"] for country in countries}) == len(countries), "the inverse question has one answer"
    assert all(value.isascii() for country in countries for value in country.values() if isinstance(value, str))
    known = {country["name"]: country["capital"] for country in countries}
    newest = {"Kazakhstan": "Astana", "Burundi": "Gitega", "Myanmar": "Naypyidaw", "Tanzania": "Dodoma"}
    assert {name: known[name] for name in newest} == newest


def test_the_words_are_different_and_short() -> None:
    words = lists.nouns()
    assert len(set(words)) == len(words) >= 390
    assert all(re.fullmatch("[a-z]{2,8}", word) for word in words)


def test_a_sorted_list_is_sorted_and_its_reasoning_holds_it() -> None:
    for item in drawn("sort", True):
        ordered = item.content.split(", ")
        key = int if ordered[0].isdigit() else str
        assert ordered == sorted(ordered, key=key)
        if item.thinking and key is str:
            assert item.reasoning.endswith(", ".join(f"{word[0]} {word[1]} {word}" for word in ordered) + ".")


def test_a_pair_has_one_key_in_any_order_and_words() -> None:
    for name in ("add", "subtract", "multiply", "compare", "word_problem"):
        for item in drawn(name, False):
            operation, *operands = item.key.split()
            assert [int(operand) for operand in operands] == sorted(item.wanted["given"])
            assert operation in (name, "add", "subtract")


@pytest.mark.parametrize("seed", range(20))
def test_no_turn_of_a_conversation_teaches_what_another_is_measured_on(seed: int) -> None:
    random = Random(seed)
    form = table("retrieval")["hidden"][seed % 8]
    names = random.sample(retrieval.words("names"), 10)
    said = retrieval.draw_all("needles", [partial(retrieval.draw_needle, random, form, name) for name in names])
    assert len({held_out("needles", one.key) for one in said}) == 1
    values = {one.value for one in said}
    assert all(named(one.answer, values) == {one.value} for one in said)


@pytest.mark.parametrize(
    ("content", "is_right"),
    [
        ("The code is 4821.", True),
        ("4821", True),
        ("It is 4821 or 1234.", False),
        ("It is 1234.", False),
        ("It is 48210.", False),
        ("It is 14821.", False),
    ],
)
def test_a_needle_is_told_from_the_others(content: str, is_right: bool) -> None:
    assert judged("needle", content, value={"value": "4821", "others": ["1234"]}) == is_right
