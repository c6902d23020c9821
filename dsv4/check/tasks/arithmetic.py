"""Arithmetic with whole numbers: sums, differences, products, comparisons, and short stories about them.

Asked: one calculation in one of many phrasings. Judged: the final number is exact, and no number stands in the answer
but it and those of the question. The key is the operands without order or phrasing, so a held-out pair was never
taught in any words; stories stay on the side of the split on which their sum or difference is. The reasoning goes
digit by digit from the ones. With effort "max" it then checks the result by working out the way back.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from random import Random
from typing import Any, NamedTuple

from dsv4.chat.events import Completion
from dsv4.check.tasks.asking import held_out, numbers, pick, sentence, table, vary
from dsv4.check.tasks.columns import add_steps, compare_steps, multiply_steps, subtract_steps
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import asked, plain

SPOKEN_SHARE = 0.2  # of calculations with numbers below a hundred: asked in words, "seven plus forty-two"
MAX_SHARE = 0.15  # of sums and differences in thinking mode: worked with effort "max"
DIGITS = {True: (1, 2, 2, 2, 3, 3, 3, 3), False: (1, 1, 2, 2, 2)}  # of an operand, with reasoning and without
MORE = ("larger", "bigger", "greater", "more", "higher", ">")
LESS = ("smaller", "less", "lower", "fewer", "<")
STATEMENT = re.compile(rf"(\d{{1,12}}) (?:is )?({'|'.join(MORE + LESS)}) (?:than )?(\d{{1,12}})")


class Operation(NamedTuple):
    """A calculation: its sign, its result, its steps, and the operation that leads back from the result."""

    sign: str
    value: Callable[[int, int], int]
    steps: Callable[[int, int], list[str]]
    back: str = ""


OPERATIONS = {
    "add": Operation("+", int.__add__, add_steps, "subtract"),
    "subtract": Operation("-", int.__sub__, subtract_steps, "add"),
    "multiply": Operation("x", int.__mul__, multiply_steps),
}


def _number(random: Random, digits: int) -> int:
    return random.randrange(10 ** (digits - 1) if digits > 1 else 0, 10**digits)


def _pair(random: Random, name: str, thinking: bool) -> tuple[int, int]:
    """Operands; a product has a digit on its right, a difference is never negative."""
    if name == "multiply":
        return _number(random, random.choice((1, 2, 2)) if thinking else 1), _number(random, 1)
    a, b = (_number(random, random.choice(DIGITS[thinking])) for _ in range(2))
    return (max(a, b), min(a, b)) if name == "subtract" else (a, b)


def key_of(name: str, a: int, b: int) -> str:
    """The same for both orders of the operands."""
    return f"{name} {min(a, b)} {max(a, b)}"


def _check(name: str, a: int, b: int) -> list[str]:
    """The steps that lead back from the result to `a`."""
    back, result = OPERATIONS[name].back, OPERATIONS[name].value(a, b)
    first, *steps = OPERATIONS[back].steps(result, b)
    return [f"Check: {first}", *steps, f"Check: {result} {OPERATIONS[back].sign} {b} = {a}. It fits."]


def _checkable(name: str, a: int, b: int) -> bool:
    """Whether there is a way back, and on the same side of the split."""
    back, result = OPERATIONS[name].back, OPERATIONS[name].value(a, b)
    return bool(back) and held_out(name, key_of(name, a, b)) == held_out(back, key_of(back, result, b))


def _known(a: int, b: int, result: int) -> dict[str, Any]:
    """What the judge and the reports need."""
    return {"wanted": {"result": result, "given": [a, b]}, "facts": {"digits": max(len(str(a)), len(str(b)))}}


def in_words(number: int) -> str:
    """A number below a hundred as it is said: "forty-two"."""
    units, tens = (table("arithmetic")[name].split() for name in ("units", "tens"))
    if number < len(units):
        return str(units[number])
    return str(tens[number // 10 - 2]) + (f"-{units[number % 10]}" if number % 10 else "")


def _question(random: Random, name: str, a: int, b: int) -> str:
    tables = table("arithmetic")
    if max(a, b) < 100 and random.random() < SPOKEN_SHARE:
        return sentence(random.choice(tables["spoken"][name]).format(a=in_words(a), b=in_words(b)))
    return str(random.choice(tables["operations"][name]).format(a=a, b=b))


def _make(name: str, random: Random, thinking: bool, size: int) -> Item:
    operation = OPERATIONS[name]
    a, b = _pair(random, name, thinking)
    question = _question(random, name, a, b)
    check = thinking and _checkable(name, a, b) and random.random() < MAX_SHARE
    lines = [*operation.steps(a, b), *(_check(name, a, b) if check else [])]
    return Item(
        name,
        key_of(name, a, b),
        asked(vary(random, question), random),
        f"{a} {operation.sign} {b} = {operation.value(a, b)}.",
        "\n".join(lines) if thinking else "",
        thinking=thinking,
        effort="max" if check else None,
        **_known(a, b, operation.value(a, b)),
    )


def judge_number(item: Item, completion: Completion) -> bool:
    """The last number, or the one behind the last `=`, is the result; all others are the given ones."""
    content, result = completion.content, item.wanted["result"]
    final = numbers(content.rpartition("=")[2])
    if not plain(completion) or not final:
        return False
    return final[0 if "=" in content else -1] == result and {*numbers(content)} <= {result, *item.wanted["given"]}


def make_compare(random: Random, thinking: bool, size: int) -> Item:
    """Which of two different numbers is larger or smaller; mostly they have equally many digits."""
    digits = random.choice((1, 2, 2, 3, 3))
    a, b = 0, 0
    while a == b:
        a, b = _number(random, digits), _number(random, digits if random.random() < 0.8 else random.choice((1, 2, 3)))
    word = random.choice(("larger", "smaller"))
    best, other = (max(a, b), min(a, b)) if word == "larger" else (min(a, b), max(a, b))
    question = random.choice(table("arithmetic")["comparisons"][word]).format(a=a, b=b)
    return Item(
        "compare",
        key_of("compare", a, b),
        asked(vary(random, question), random),
        f"{best} is {word} than {other}.",
        "\n".join(compare_steps(a, b)) if thinking else "",
        thinking=thinking,
        **_known(a, b, best),
    )


def judge_compare(item: Item, completion: Completion) -> bool:
    """A true statement about the two numbers, or the right one alone or at the end (`… is 58.`)."""
    content, result = completion.content, item.wanted["result"]
    if not plain(completion) or not {*numbers(content)} <= {*item.wanted["given"]}:
        return False
    statement = STATEMENT.search(content)
    if statement:
        a, word, b = int(statement[1]), statement[2], int(statement[3])
        return a > b if word in MORE else a < b
    return {*numbers(content)} == {result} or bool(re.search(rf"\bis {result}\W*$", content))


def make_word_problem(random: Random, thinking: bool, size: int) -> Item:
    """A story that is a sum or a difference."""
    tables = table("arithmetic")
    name = random.choice(list(tables["stories"]))
    a, b, result = 0, 0, 0
    while min(b, result) < 2 or held_out(name, key_of(name, a, b)) != held_out("word_problem", key_of(name, a, b)):
        a, b = _pair(random, name, thinking)
        result = OPERATIONS[name].value(a, b)
    story = random.choice(tables["stories"][name])
    n, m = random.sample(tables["names"].split(), 2)
    words = {"n": n, "m": m, "t": pick(random, tables["things"]), "a": a, "b": b, "r": result}
    why = "The numbers are put together." if name == "add" else "One number is taken from the other."
    return Item(
        "word_problem",
        key_of(name, a, b),
        asked(vary(random, story["question"].format(**words), lower=False), random),
        story["answer"].format(**words),
        "\n".join([why, *OPERATIONS[name].steps(a, b)]) if thinking else "",
        thinking=thinking,
        **_known(a, b, result),
    )


FAMILIES: dict[str, Family] = {
    **{name: Family(partial(_make, name), judge_number) for name in OPERATIONS},
    "compare": Family(make_compare, judge_compare),
    "word_problem": Family(make_word_problem, judge_number),
}
