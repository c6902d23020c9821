"""WordNet as text: entries, documents of neighbouring entries, and definitions of the words that people use.

A line of data.noun, data.verb, data.adj and data.adv is one meaning, as the package's wndb manual describes:

    02084071 05 n 03 dog 0 domestic_dog 0 Canis_familiaris 0 023 @ 02083346 n 0000 … | a member of …; "the dog barked"
    offset  file kind words (hex), then word and lex_id    pointers: sign offset kind which     gloss
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

KINDS = {"n": "noun", "v": "verb", "a": "adjective", "s": "adjective", "r": "adverb"}
FILES = {"noun": "n", "verb": "v", "adj": "a", "adv": "r"}
FOLDER = "usr/share/wordnet"
SIZE = 1000  # characters of a document of neighbouring entries: of one field, since the files are sorted by field
KIND_OF = ("@", "@i")  # pointers to what a meaning is a kind, or an instance, of


class Meaning(NamedTuple):
    """One meaning: words that have it, the place of what it is a kind of, its definition and examples."""

    key: tuple[str, str]  # file ("n", "v", "a", "r") and offset
    field: str
    kind: str
    words: tuple[str, ...]
    above: tuple[tuple[str, str], ...]
    definition: str
    examples: tuple[str, ...]


def parse(line: str) -> Meaning:
    """The meaning on one line of a data file."""
    head, gloss = line.rstrip().split(" | ", 1)
    offset, field, kind, count, *rest = head.split()
    words = rest[: 2 * int(count, 16) : 2]
    pointers = rest[2 * len(words) + 1 :]
    signs = zip(*(pointers[n : 4 * int(rest[2 * len(words)]) : 4] for n in range(4)), strict=True)
    above = tuple((where, there) for sign, there, where, _ in signs if sign in KIND_OF)
    definition, examples = _gloss(gloss)
    shown = tuple(re.sub(r"\(\w+\)$", "", word).replace("_", " ") for word in words)
    return Meaning(("a" if kind == "s" else kind, offset), field, KINDS[kind], shown, above, definition, examples)


def _gloss(gloss: str) -> tuple[str, tuple[str, ...]]:
    """Definition and examples. Only what follows a semicolon in quotes is an example."""
    definition, *quoted = re.split(r"""[;:,.]?\s+(?="[^"]+")""", gloss.replace("`", "'"), maxsplit=1)
    examples = tuple(text.strip(" ;,") for text in re.findall(r'"([^"]+)"', "".join(quoted)))
    return definition.strip(" ;"), tuple(text for text in examples if text)


def read(root: Path) -> dict[tuple[str, str], Meaning]:
    """All meanings, in the order of the files."""
    lines = [line for name in FILES for line in _lines(root / f"data.{name}")]
    return {meaning.key: meaning for meaning in map(parse, lines)}


def _lines(path: Path) -> Iterator[str]:
    """The lines of a file after its licence, which is indented."""
    with path.open(encoding="utf-8") as file:
        yield from (line for line in file if not line.startswith("  "))


def entry(meaning: Meaning, meanings: dict[tuple[str, str], Meaning]) -> str:
    """One line of text for a meaning."""
    word, *others = meaning.words
    above = [meanings[key].words[0] for key in meaning.above]
    parts = [f"{word} ({meaning.kind}): {meaning.definition}"]
    parts += [f'"{example}"' for example in meaning.examples]
    parts += [f"Also: {', '.join(others)}"] if others else []
    parts += [f"A kind of: {', '.join(above)}"] if above else []
    return " ".join(part if re.search(r'[.!?]"?$', part) else f"{part}." for part in parts)


def groups(meanings: dict[tuple[str, str], Meaning]) -> Iterator[tuple[str, list[Meaning]]]:
    """Documents with their meanings: neighbours of one field, one a line."""
    text, held = "", list[Meaning]()
    for meaning in meanings.values():
        line = entry(meaning, meanings)
        if held and (len(text) + len(line) > SIZE or (meaning.field, meaning.kind) != (held[0].field, held[0].kind)):
            yield text, held
            text, held = "", []
        text = f"{text}\n{line}" if text else line
        held.append(meaning)
    if held:
        yield text, held


def uses(root: Path) -> Counter[tuple[str, str]]:
    """How often texts that WordNet's makers tagged use a word as which kind (n, v, a, r)."""
    out: Counter[tuple[str, str]] = Counter()
    for line in _lines(root / "cntlist.rev"):
        sense, _, count = line.split()
        lemma, numbers = sense.split("%")
        out[lemma, "nvara"[int(numbers[0]) - 1]] += int(count)
    return out


def first_meanings(root: Path) -> Iterator[tuple[str, tuple[str, str]]]:
    """Each word of the index files with its most common meaning."""
    for name, kind in FILES.items():
        for line in _lines(root / f"index.{name}"):
            lemma, _, _, signs, *rest = line.split()
            yield lemma, (kind, rest[int(signs) + 2])


def definitions(root: Path) -> Iterator[tuple[dict[str, Any], tuple[str, str]]]:
    """Words that tagged texts use, as {word, pos, definition, example, count}, with their meaning's key."""
    meanings, count = read(root), uses(root)
    for lemma, key in first_meanings(root):
        if count[lemma, key[0]]:
            meaning = meanings[key]
            word = next(w for w in meaning.words if w.lower().replace(" ", "_") == lemma)
            example = next((e for e in meaning.examples if word.lower() in e.lower()), "")
            facts = {"word": word, "pos": meaning.kind, "definition": meaning.definition, "example": example}
            yield {**facts, "count": count[lemma, key[0]]}, key
