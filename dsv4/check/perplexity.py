"""How well a model predicts texts that it was not taught, beside what counting words would reach."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.forced import losses, served
from dsv4.errors import ConfigError
from dsv4.llm import EMBEDDED, LLM

HELDOUT: Final = EMBEDDED.parent / "heldout.jsonl"


@dataclass(frozen=True)
class Text:
    """A held-out text and where it is from."""

    source: str
    text: str


@dataclass(frozen=True)
class Loss:
    """Sums over texts: nats of the model, nats of the best unigram model, and what they are sums over.

    The unigram model knows the frequencies of these very tokens over all texts, so that no other one is better.
    Every token of a text is predicted, the first one behind the begin-of-sentence token; that one and an end are not.
    """

    nats: float
    unigram: float
    tokens: int
    characters: int
    bytes: int

    def __add__(self, other: Loss) -> Loss:
        return Loss(
            self.nats + other.nats,
            self.unigram + other.unigram,
            self.tokens + other.tokens,
            self.characters + other.characters,
            self.bytes + other.bytes,
        )

    def as_json(self) -> dict[str, float | int]:
        """The sums' counts and their ratios, those per character and byte comparable between tokenizers."""
        return {
            "tokens": self.tokens,
            "characters": self.characters,
            "bytes": self.bytes,
            "nats_per_token": self.nats / self.tokens,
            "perplexity": math.exp(self.nats / self.tokens),
            "unigram_perplexity": math.exp(self.unigram / self.tokens),
            "nats_per_character": self.nats / self.characters,
            "bits_per_byte": self.nats / self.bytes / math.log(2),
        }


def read_texts(path: Path = HELDOUT) -> list[Text]:
    """The texts of a file with one {"source": …, "text": …} a line. ConfigError for anything else."""
    return [_read_line(line, f"{path.name}:{number}") for number, line in enumerate(_lines(path), 1)]


def _lines(path: Path) -> list[str]:
    try:
        return path.read_text(encoding="utf-8").rstrip("\n").split("\n")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"held-out texts: {path}", got=str(error), wanted="JSON lines") from None


def _read_line(line: str, where: str) -> Text:
    try:
        found = json.loads(line)
    except ValueError as error:
        raise ConfigError(where, got=str(error), wanted="a JSON object") from None
    source, text = (found.get(name) if isinstance(found, Mapping) else None for name in ("source", "text"))
    if not (isinstance(source, str) and isinstance(text, str) and source and text):
        raise ConfigError(where, got=line[:60], wanted='{"source": "…", "text": "…"}')
    return Text(source, text)


def encoded(
    texts: Iterable[Text], tokenizer: Tokenizer, limit: int | None, longest: int
) -> list[tuple[Text, list[int]]]:
    """Texts with their ids, cut at `longest` tokens each and ended at `limit` tokens a source (None: all)."""
    used: Counter[str] = Counter()
    out = []
    for text in texts:
        room = longest if limit is None else min(longest, limit - used[text.source])
        ids = tokenizer.encode_text(text.text)[: max(room, 0)]
        if ids:
            used[text.source] += len(ids)
            out.append((Text(text.source, tokenizer.decode(ids)), ids))
    return out


def measure(llm: LLM, texts: Iterable[tuple[Text, Sequence[int]]], unigram: Mapping[int, float]) -> Loss:
    """The loss over texts with their ids; `unigram` has the nats of each id (`unigram_nats`)."""
    model, options = served(llm)
    parts = []
    for text, ids in texts:
        nats = float(losses(model, options, [llm.tokenizer.bos_id, *ids]).sum())
        counts = (len(ids), len(text.text), len(text.text.encode()))
        parts.append(Loss(nats, math.fsum(unigram[id] for id in ids), *counts))
    return total(parts)


def total(parts: Iterable[Loss]) -> Loss:
    """All of them together."""
    return sum(parts, start=Loss(0, 0, 0, 0, 0))


def unigram_nats(texts: Iterable[Sequence[int]]) -> dict[int, float]:
    """-ln of the relative frequency of each id over all texts."""
    counts = Counter(id for ids in texts for id in ids)
    total = counts.total()
    return {id: math.log(total / count) for id, count in counts.items()}
