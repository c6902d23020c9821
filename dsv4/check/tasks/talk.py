"""Small talk: greetings, who the model is, what it does not know, what it was told, and rules of a system message.

`talk.json` holds the intents: what people say, what the model answers, and the words of which an answer must have one.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from random import Random
from typing import Any

from dsv4.chat.events import Completion
from dsv4.check.tasks import words
from dsv4.check.tasks.asking import table
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.parts import keeping
from dsv4.check.tasks.phrasing import Message, ask, asked, says, short
from dsv4.check.tasks.story_grammar import sentence_case
from dsv4.check.tasks.story_grammar import words as story_words
from dsv4.check.tasks.toolbox import made_up, value


def phrases() -> dict[str, Any]:
    """What `talk.json` says."""
    return dict(table("talk"))


def fits(content: str, keys: str) -> bool:
    """`a|b+c`: the text has a, or both b and c."""
    return any(says(content, *each.split("+")) for each in keys.split("|"))


# --- intents ------------------------------------------------------------------------------------------------------


def _turn(random: Random) -> tuple[str, str, str]:
    """An intent, what a user says for it and what the model answers."""
    name = random.choice(list(phrases()["intents"]))
    intent = phrases()["intents"][name]
    return name, random.choice(intent["ask"]), random.choice(intent["say"])


def _key(said: str) -> str:
    """What makes a saying itself: "Yes, please!" is "yes please"."""
    return re.sub(r"[^\w' ]", "", said.lower()).strip() or said


def make_talk(random: Random, thinking: bool, size: int) -> Item:
    """One sentence of small talk."""
    name, question, answer = _turn(random)
    return _talk("talk", asked(ask(question, random, polite=False), random), name, _key(question), answer, thinking)


def make_chat(random: Random, thinking: bool, size: int) -> Item:
    """Two to four turns of small talk, the last to be answered."""
    before = [_turn(random) for _ in range(random.randint(1, 3))]
    name, question, answer = _turn(random)
    first, *later = [ask(said, random, polite=False) for said in (*(turn[1] for turn in before), question)]
    messages = list(asked(first, random))
    for (_, _, reply), following in zip(before, later, strict=True):
        messages += [{"role": "assistant", "content": reply}, {"role": "user", "content": following}]
    turns = [(each, _key(said)) for each, said, _ in before] + [(name, _key(question))]
    key = "|".join(said for _, said in turns)
    return _talk("chat", tuple(messages), name, key, answer, thinking, turns)


def _talk(
    family: str,
    messages: tuple[Message, ...],
    intent: str,
    key: str,
    answer: str,
    thinking: bool,
    turns: Sequence[tuple[str, str]] = (),
) -> Item:
    """`turns`: the intents and questions of a conversation, each of which may be held out by itself."""
    found = phrases()["intents"][intent]
    why = found["why"] if thinking else ""
    facts = {"intent": intent, "parts": [("talk", f"{each}|{said}") for each, said in turns]}
    return Item(family, f"{intent}|{key}", messages, answer, why, thinking=thinking, wanted=found["keys"], facts=facts)


def judge_talk(item: Item, completion: Completion) -> bool:
    """A short answer with a word that this intent needs."""
    return short(completion) and fits(completion.content, item.wanted)


# --- not knowing --------------------------------------------------------------------------------------------------

REAL_SHARE = 0.25  # of the towns that nothing is known of
IGNORANCE = re.compile(
    r"(do not|don't|cannot|can't|could not) (really )?(know|tell|say)|not sure|no idea"
    r"|not (been )?(taught|learnt|learned)",
    re.IGNORECASE,
)


def make_unknown(random: Random, thinking: bool, size: int) -> Item:
    """A question that the model cannot know the answer of."""
    kind = random.choice(list(phrases()["unknown"]))
    template = random.choice(phrases()["unknown"][kind])
    values = {
        "person": value("person", random) if random.random() < 0.5 else f"{made_up(random)} {made_up(random)}",
        "town": _town(template, random),
        "land": made_up(random) + random.choice(("", "ia", "land", "stan", "onia")),
        "n": random.randint(2, 999),
        "m": random.randint(2, 99),
        "team": value("team", random),
        "thing": _thing(random),
        "part": random.choice(phrases()["parts"].split()),
        "year": random.randint(1200, 2020),
    }
    untaught = phrases()["unknown_untaught"]
    answers = [*phrases()["unknown_say"], *(untaught["say"] if kind in untaught["kinds"].split() else ())]
    answer = random.choice(answers)
    more = phrases()["unknown_more"].get(kind)
    content = f"{answer} {more}" if more and random.random() < 0.5 else answer
    why = phrases()["unknown_why"][kind] if thinking else ""
    question = ask(template, random, **values)
    key = template.format(**values)
    return Item("unknown", key, asked(question, random), content, why, thinking=thinking, facts={"kind": kind})


def judge_unknown(item: Item, completion: Completion) -> bool:
    """It says that it does not know, and no more."""
    return short(completion, 25) and bool(IGNORANCE.search(completion.content))


def _town(template: str, random: Random) -> str:
    """One that exists only in questions that no fact answers: where a capital is has been taught."""
    if random.random() < REAL_SHARE and not template.startswith("Where is"):
        return str(value("city", random))
    return made_up(random) + random.choice(("", "", "ton", "ville", "burg"))


def _thing(random: Random) -> str:
    return random.choice(story_words("nouns." + random.choice(("toy", "tool", "gift", "wear", "instrument"))))


# --- remembering --------------------------------------------------------------------------------------------------

VALUES: dict[str, Callable[[Random], str]] = {
    "name": lambda random: str(value("person", random)).split()[0],
    "colour": lambda random: random.choice(story_words("colours")),
    "town": lambda random: str(value("city", random)),
    "age": lambda random: str(random.randint(5, 99)),
    "thing": _thing,
    "number": lambda random: str(random.randint(10, 99999)),
}


def make_remember(random: Random, thinking: bool, size: int) -> Item:
    """The user tells something, talks of another thing, and asks for the first."""
    facts = random.sample(phrases()["facts"], random.randint(1, 3))
    known = [(fact, VALUES[fact["kind"]](random)) for fact in facts]
    messages: list[Message] = []
    parts: list[tuple[str, str]] = []
    for fact, told in known:
        messages += _exchange(random.choice(fact["tell"]), random.choice(fact["reply"]), told)
        if random.random() < 0.3:
            intent, said, reply = _turn(random)
            messages += _exchange(said, reply, "")
            parts.append(("talk", f"{intent}|{_key(said)}"))
    fact, wanted = random.choice(known)
    question, answer = random.choice(fact["ask"]), random.choice(fact["say"]).format(v=wanted)
    messages.append({"role": "user", "content": ask(question, random)})
    why = f"The user told me: {wanted}." if thinking else ""
    key = f"{question}|{wanted}|{len(known)}"
    return Item(
        "remember", key, tuple(messages), sentence_case(answer), why,
        thinking=thinking, wanted=wanted, facts={"parts": parts},
    )  # fmt: skip


def _exchange(said: str, reply: str, told: str) -> list[Message]:
    texts = (sentence_case(said.format(v=told)), sentence_case(reply.format(v=told)))
    return [{"role": role, "content": text} for role, text in zip(("user", "assistant"), texts, strict=True)]


def judge_remember(item: Item, completion: Completion) -> bool:
    """What was told, in a short answer."""
    return short(completion, 20) and says(completion.content, item.wanted)


# --- rules --------------------------------------------------------------------------------------------------------

# What is asked under a rule: families with answers of one word.
ONE_WORD = ("opposite", "plural", "past_tense")

# rule → the text of the answer `word`, given the rule's own word.
APPLY: dict[str, Callable[[str, str], str]] = {
    "upper": lambda word, _: f"{word}.".upper(),
    "lower": lambda word, _: f"it is {word}.",
    "end": lambda word, mark: f"{word.capitalize()}. {mark}",
    "begin": lambda word, mark: f"{mark} {word}.",
    "one": lambda word, _: word.capitalize(),
    "twice": lambda word, _: f"{word.capitalize()}. {word.capitalize()}.",
    "quotes": lambda word, _: f'"{word.capitalize()}"',
    "brackets": lambda word, _: f"[{word}]",
    "call": lambda word, name: f"It is {word}, {name}.",
    "plainly": lambda word, _: f"The answer is {word}.",
}
WORD = r"[\w'-]+"
# rule → whether a text obeys it, given the rule's own word and the right words.
OBEYS: dict[str, Callable[[str, str, tuple[str, ...]], bool]] = {
    "upper": lambda text, _, right: text == text.upper(),
    "lower": lambda text, _, right: text == text.lower(),
    "end": lambda text, mark, right: text.endswith(mark),
    "begin": lambda text, mark, right: text.startswith(mark),
    "one": lambda text, _, right: bool(re.fullmatch(WORD + r"[.!]?", text)),
    "twice": lambda text, _, right: any(len(re.findall(rf"\b{word}\b", text, re.IGNORECASE)) == 2 for word in right),
    "quotes": lambda text, _, right: bool(re.fullmatch(r'["“][^"“”]+["”]\.?', text)),
    "brackets": lambda text, _, right: bool(re.fullmatch(r"\[[^\[\]]+\]\.?", text)),
    "call": lambda text, name, right: says(text, name),
    "plainly": lambda text, _, right: len(text.split()) >= 3 and text[0].isupper() and text.endswith("."),
}


def make_obey(random: Random, thinking: bool, size: int) -> Item:
    """A simple question under a rule of the system message."""
    base = words.FAMILIES[random.choice(ONE_WORD)].make(random, thinking, size)
    word = base.wanted[0]
    rule = random.choice(list(APPLY))
    mark = _mark(rule, random)
    system = random.choice(phrases()["rules"][rule]).format(mark=mark, name=mark)
    content = APPLY[rule](word, mark)
    why = f"{base.reasoning} The rule: {system}" if thinking else ""
    messages = asked(base.messages[-1]["content"], random, _dressed(system, random))
    return Item(
        "obey", f"{rule}|{mark}|{base.family}|{base.key}", messages, content, why, thinking=thinking,
        wanted=(rule, mark, base.wanted), facts={"rule": rule, "parts": [(base.family, base.key)]},
    )  # fmt: skip


def _dressed(system: str, random: Random) -> str:
    """The rule alone, or with a usual sentence before it."""
    return f"You are a helpful assistant. {system}" if random.random() < 0.3 else system


def _mark(rule: str, random: Random) -> str:
    if rule == "call":
        return VALUES["name"](random)
    if rule not in ("end", "begin"):
        return ""
    own = {"end": f"{made_up(random)}.", "begin": f"{made_up(random)}:"}[rule]
    usual = random.choice(phrases()[{"end": "marks", "begin": "starts"}[rule]].split("|"))
    return random.choice((own, usual))


def judge_obey(item: Item, completion: Completion) -> bool:
    """The right word, and the rule kept."""
    rule, mark, right = item.wanted
    text = completion.content.strip()
    return short(completion, 15) and any(says(text, word) for word in right) and OBEYS[rule](text, mark, tuple(right))


FAMILIES: dict[str, Family] = {
    "talk": Family(make_talk, judge_talk),
    "chat": Family(keeping(make_chat), judge_talk),
    "unknown": Family(make_unknown, judge_unknown),
    "remember": Family(keeping(make_remember), judge_remember),
    "obey": Family(keeping(make_obey), judge_obey),
}
