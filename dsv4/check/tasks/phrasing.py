"""How people ask: politely, in lower case, with a slip of the fingers, with or without a system message."""

from __future__ import annotations

import re
from collections.abc import Sequence
from functools import lru_cache
from random import Random
from typing import Any

from dsv4.chat.events import Completion

SYSTEM_SHARE, LOWER_SHARE, POLITE_SHARE, BARE_SHARE = 0.15, 0.15, 0.12, 0.1
SHORTENED_SHARE, TYPO_SHARE = 0.12, 0.03
SYSTEMS = (
    "You are a helpful assistant.",
    "You are tiny, a small and helpful language model.",
    "Be helpful and brief.",
    "Answer in plain English.",
    "You help people. Be kind and clear.",
    "You are an assistant that answers in short sentences.",
)
BEFORE = ("Hi! ", "Hello. ", "Hey, ", "Quick question: ", "Could you help me? ", "I have a question. ", "Hello! ")
AFTER = (" Thanks.", " Thank you!", " Please.", " I need to know.", " Thanks in advance.")
SLOT = re.compile(r"(\{\w+\})")
SHORTENED = {
    "I am": "I'm", "I will": "I'll", "What is": "What's", "what is": "what's", "Who is": "Who's", "It is": "It's",
    "do not": "don't", "does not": "doesn't", "cannot": "can't", "You are": "You're", "Let us": "Let's",
}  # fmt: skip
LONG_FORM = re.compile(rf"\b({'|'.join(SHORTENED)})(?= [\w{{])")
BARE_APOSTROPHES = 0.3  # of shortened forms: "whats"
LONG_WORD = re.compile(r"(?<![\w{'-])[a-z]{5,}(?![\w}'-])")  # no name, no slot
LONGEST_ANSWER = 40  # words
Message = dict[str, Any]


def ask(template: str, random: Random, polite: bool = True, **values: object) -> str:
    """`template` filled in and roughened as people type; the values stay as they are. Not `polite`: no words more."""
    if random.random() < SHORTENED_SHARE:
        template = shortened(template, random)
    if polite and random.random() < POLITE_SHARE:
        template = _polite(template, random)
    if random.random() < LOWER_SHARE:
        template = "".join(part if SLOT.fullmatch(part) else part.lower() for part in SLOT.split(template))
    if random.random() < BARE_SHARE:
        template = template.rstrip(".?! ")
    if random.random() < TYPO_SHARE:
        template = typo(template, random)
    return template.format(**values)


def shortened(text: str, random: Random) -> str:
    """With "What's" for "What is" and the like, some of them without the apostrophe."""
    mark = "" if random.random() < BARE_APOSTROPHES else "'"
    return LONG_FORM.sub(lambda found: SHORTENED[found[1]].replace("'", mark), text)


def typo(text: str, random: Random) -> str:
    """`text` with two letters inside one of its longer words swapped, or one of them left out or written twice."""
    words = list(LONG_WORD.finditer(text))
    if not words:
        return text
    word = random.choice(words)
    at = random.randrange(word.start() + 1, word.end() - 2)
    one, other = text[at], text[at + 1]
    return text[:at] + random.choice((other + one, other, one + one + other)) + text[at + 2 :]


def _polite(template: str, random: Random) -> str:
    if random.random() < 0.5 and template.endswith((".", "?", "!")):  # after a bare value it would seem part of it
        return template + random.choice(AFTER)
    before = random.choice(BEFORE)
    runs_on = not before.rstrip().endswith((".", "!", "?", ":")) and not template.startswith(("{", "I "))
    return before + (template[0].lower() + template[1:] if runs_on else template)


def asked(question: str, random: Random, system: str = "") -> tuple[Message, ...]:
    """The messages of one question, sometimes with a system message; `system` is one that must stand there."""
    if not system and random.random() < SYSTEM_SHARE:
        system = random.choice(SYSTEMS)
    head = ({"role": "system", "content": system},) if system else ()
    return (*head, {"role": "user", "content": question})


def plain(completion: Completion) -> bool:
    """Whether the answer is a text and nothing else, in the right format."""
    return bool(completion.content.strip()) and not completion.calls and not completion.problems


def short(completion: Completion, longest: int = LONGEST_ANSWER) -> bool:
    """A plain answer of so many words at most: a list of everything is no answer."""
    return plain(completion) and len(completion.content.split()) <= longest


def says(content: str, *words: str) -> bool:
    """Whether all words stand in the text, whole and in any case; 4 does not stand in 4.5, in -4 or in 24."""
    return all(_standing(word).search(content) for word in words)


@lru_cache(10_000)
def _standing(word: str) -> re.Pattern[str]:
    before = r"(?<!\d\.)(?<!\s-)(?<!^-)" if word[:1].isdigit() else ""
    after = r"(?!\.\d)" if word[-1:].isdigit() else ""
    return re.compile(rf"(?<!\w){before}{re.escape(word)}(?!\w){after}", re.IGNORECASE)


def listed(words: Sequence[str], joint: str = "and") -> str:
    """ "a, b and c"."""
    return f"{', '.join(words[:-1])} {joint} {words[-1]}" if len(words) > 1 else words[0]
