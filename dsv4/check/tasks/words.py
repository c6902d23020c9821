"""Words: what they mean, their opposites, plurals and past tenses, what kind of thing they name, how they are spelt."""

from __future__ import annotations

import re
from functools import cache
from random import Random
from typing import Any

from dsv4.chat.events import Completion
from dsv4.check.tasks.asking import table
from dsv4.check.tasks.item import Family, Item
from dsv4.check.tasks.phrasing import ask, asked, says, short
from dsv4.check.tasks.story_grammar import sentence_case

# Words too common to show that a definition was known.
FILLERS = re.compile(
    r"(a|an|and|or|the|of|to|in|on|with|for|from|is|that|it|you|your|who|which|what|when|where|as|at|by)"
)
NEEDED_SHARE = 0.6  # of a definition's other words


@cache
def lexicon() -> dict[str, Any]:
    """The words; pairs as lists of two."""
    found = table("lexicon")
    pairs = {name: [pair.split() for pair in found[name].split("|")] for name in ("opposites", "plurals", "pasts")}
    return {**found, **pairs}


@cache
def meanings() -> dict[str, str]:
    """Word → its meaning."""
    others: dict[str, str] = lexicon()["others"]
    return {word: meaning for word, (_, meaning) in lexicon()["nouns"].items()} | others


@cache
def opposites() -> dict[str, tuple[str, ...]]:
    """Word → its opposites, either way; some have two."""
    found: dict[str, tuple[str, ...]] = {}
    for one, other in lexicon()["opposites"]:
        found[one] = (*found.get(one, ()), other)
        found[other] = (*found.get(other, ()), one)
    return found


def _item(
    family: str,
    word: str,
    answer: str,
    wanted: Any,
    why: str,
    templates: tuple[str, ...],
    random: Random,
    thinking: bool,
) -> Item:
    """The item of a word asked about by one of `templates`. The key has both and the mode: facts are taught, and some
    ways of asking for them are held out."""
    which = random.randrange(len(templates))
    article = named(word) if family == "category" else word
    return Item(
        family, f"{word}|{which}|{thinking}", asked(ask(templates[which], random, word=word, named=article), random),
        answer, why if thinking else "", thinking=thinking, wanted=wanted,
    )  # fmt: skip


# --- meanings -----------------------------------------------------------------------------------------------------

DEFINE = (
    "What does {word} mean?",
    "What does the word {word} mean?",
    "Define {word}.",
    'Define the word "{word}".',
    "What is the meaning of {word}?",
    'Explain the word "{word}".',
    "Can you explain {word}?",
    "Tell me what {word} means.",
    "I do not know the word {word}. What does it mean?",
    "Give me a definition of {word}.",
    "How would you define {word}?",
    "Meaning of {word}?",
    "My little brother asks what {word} means.",
    "Explain in one sentence what {word} means.",
)


def make_define(random: Random, thinking: bool, size: int) -> Item:
    """The meaning of a word, in a sentence."""
    word, meaning = random.choice(list(meanings().items()))
    stated = f"{named(word)} is {meaning}." if word in lexicon()["nouns"] else f'"{word}" means {meaning}.'
    answer = random.choice((stated, stated, f"{meaning}."))
    why = f"The user asks for the meaning of {word}. It is {meaning}."
    return _item("define", word, sentence_case(answer), meaning, why, DEFINE, random, thinking)


def judge_define(item: Item, completion: Completion) -> bool:
    """Most of the words that carry the meaning."""
    needed = {word for word in re.findall(r"\w+", item.wanted.lower()) if not FILLERS.fullmatch(word)}
    found = {word for word in needed if says(completion.content, word)}
    return short(completion, 40) and len(found) >= NEEDED_SHARE * len(needed)


# --- opposites ----------------------------------------------------------------------------------------------------

OPPOSITE = (
    "What is the opposite of {word}?",
    "Opposite of {word}?",
    "Tell me the opposite of {word}.",
    "Give me the opposite of the word {word}.",
    'What is the opposite of "{word}"?',
    "Which word means the opposite of {word}?",
    "Name the opposite of {word}.",
    "I need a word that means the opposite of {word}.",
    "What word is the contrary of {word}?",
    "{word} and its opposite?",
    "If it is not {word}, what is the opposite?",
    "Find an antonym of {word}.",
)


def make_opposite(random: Random, thinking: bool, size: int) -> Item:
    """The opposite of a word."""
    word, others = random.choice(list(opposites().items()))
    answer = random.choice(("The opposite of {word} is {other}.", "{other}.", 'It is "{other}".'))
    text = answer.format(word=word, other=others[0])
    why = f"The opposite of {word} is {others[0]}."
    return _item("opposite", word, sentence_case(text), others, why, OPPOSITE, random, thinking)


def judge_any(item: Item, completion: Completion) -> bool:
    """One of the right words, in a short answer."""
    return short(completion, 15) and any(says(completion.content, word) for word in item.wanted)


# --- forms --------------------------------------------------------------------------------------------------------

PLURAL = (
    "What is the plural of {word}?",
    "Plural of {word}?",
    "Give me the plural of {word}.",
    'What is the plural form of "{word}"?',
    "Write the plural of {word}.",
    "One {word}, two what?",
    "How do I write more than one {word}?",
    "I have one {word}. What do I say for two?",
    "How is the plural of {word} spelled?",
    "Tell me the plural of the noun {word}.",
    "What do you call more than one {word}?",
)
PAST = (
    "What is the past tense of {word}?",
    "Past tense of {word}?",
    "Give me the past tense of {word}.",
    'What is the past form of "{word}"?',
    "Put the verb {word} into the past.",
    "Today I {word}. Yesterday I what?",
    "Tell me the simple past of {word}.",
    "Write the past tense of the verb {word}.",
    "How do you say {word} in the past?",
    "I need the past tense of {word}.",
    "Which form does {word} have in the past?",
)


def make_plural(random: Random, thinking: bool, size: int) -> Item:
    """The plural of a noun."""
    word, form = random.choice(lexicon()["plurals"])
    answer = random.choice((f"The plural of {word} is {form}.", f"{form}.", f'It is "{form}".', f"two {form}."))
    return _item("plural", word, sentence_case(answer), (form,), f"One {word}, two {form}.", PLURAL, random, thinking)


def make_past(random: Random, thinking: bool, size: int) -> Item:
    """The past tense of a verb."""
    word, form = random.choice(lexicon()["pasts"])
    answer = random.choice((f"The past tense of {word} is {form}.", f"{form}.", f"yesterday I {form}."))
    return _item(
        "past_tense",
        word,
        sentence_case(answer),
        (form,),
        f"Today I {word}, yesterday I {form}.",
        PAST,
        random,
        thinking,
    )


# --- spelling -----------------------------------------------------------------------------------------------------

SPELL = (
    "How do you spell {word}?",
    "Spell {word}.",
    "Spell the word {word}.",
    "Spell {word} letter by letter.",
    "Can you spell {word} for me?",
    'Which letters are in the word "{word}", in order?',
    "Write {word} with a dash between the letters.",
    "Tell me the letters of {word} one by one.",
    "How is {word} spelled?",
    "Say {word} letter by letter.",
    "I cannot spell {word}. Please spell it.",
    "Take the word {word} apart into letters.",
)


def make_spell(random: Random, thinking: bool, size: int) -> Item:
    """The letters of a word."""
    word = random.choice(list(meanings()))
    letters = "-".join(word)
    why = f"{word} has {len(word)} letters: {', '.join(word)}."
    return _item("spell", word, letters, word, why, SPELL, random, thinking)


def judge_spell(item: Item, completion: Completion) -> bool:
    """The letters in their order, apart from each other."""
    apart = r"[\s,.\-]+".join(item.wanted)
    return short(completion) and bool(re.search(rf"(?<![\w\-]){apart}(?![\w\-])", completion.content, re.IGNORECASE))


# --- kinds --------------------------------------------------------------------------------------------------------

CATEGORY = (
    "What kind of thing is {named}?",
    "What is {named}?",
    "To which group does {named} belong?",
    "Which category does {named} belong to?",
    "Is {named} an animal, a plant, or what else?",
    "Put {word} into a category.",
    "Name the category of {word}.",
    "Under which heading would you put {word}?",
    "What sort of thing is {named}?",
    "Sort this word into a group: {word}",
    "In which group of things is {named}?",
)
BARE = {"colour", "season", "metal", "weather", "food", "drink", "clothing", "sport", "game"}
UNCOUNTED = {"spinach"}
COUNTED = {"cake", "egg", "storm", "shirt", "coat", "hat", "shoe", "glove", "scarf", "sock"}
KIND_OF = {"furniture", "clothing", "food", "weather"}
# Other right answers, and other spellings.
ALSO = {
    "bird": {"animal"}, "fish": {"animal"}, "insect": {"animal"}, "fruit": {"food"}, "vegetable": {"food"},
    "sport": {"game"}, "game": {"sport"},
}  # fmt: skip


def named(word: str) -> str:
    """The word as a sentence has it: "a rose", but "milk"."""
    kind = lexicon()["nouns"][word][0]
    return word if word in UNCOUNTED or (kind in BARE and word not in COUNTED) else sentence_case(f"a {word}").lower()


def make_category(random: Random, thinking: bool, size: int) -> Item:
    """What a word names."""
    word, (kind, _) = random.choice(list(lexicon()["nouns"].items()))
    group = f"a kind of {kind}" if kind in KIND_OF else f"a {kind}"
    why = sentence_case(f"{named(word)} is {group}.")
    answer = random.choice((why, sentence_case(f"it is {group}.")))
    return _item("category", word, answer, kind, why, CATEGORY, random, thinking)


def judge_category(item: Item, completion: Completion) -> bool:
    """The kind, and no wrong one beside it."""
    text = re.sub(r"\bcolor", "colour", completion.content, flags=re.IGNORECASE)
    kinds = {kind for kind, _ in lexicon()["nouns"].values()}
    found = {kind for kind in kinds if says(text, kind)}
    right = {item.wanted} | ALSO.get(item.wanted, set())
    return short(completion, 15) and bool(found) and found <= right


FAMILIES: dict[str, Family] = {
    "define": Family(make_define, judge_define),
    "opposite": Family(make_opposite, judge_any),
    "plural": Family(make_plural, judge_any),
    "past_tense": Family(make_past, judge_any),
    "spell": Family(make_spell, judge_spell),
    "category": Family(make_category, judge_category),
}
