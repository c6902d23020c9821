"""The performance page out of bench/results: `python -m bench.page` writes it, with `--check` it says what differs.

Written are docs/speed.md, docs/decode.svg and, between their marks, those parts of README.md that have figures. None is
typed: each is looked up by a query of bench/page_tables.py, or is another engine's and stands with its source in
bench/page_peers.py. A new file of results is found by itself. The GPU that the page is about, `FIRST`, must have every
figure; others have tables of their own, of what there is.
"""

from __future__ import annotations

import argparse
import difflib
import re
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from bench.page_lines import Lookup, PageError, Query, devices, read, short
from bench.page_peers import CHUNKS, LAYERS, PEERS
from bench.page_picture import curves, draw, drawn
from bench.page_tables import (
    DECODE,
    KINDS,
    NONE,
    PEERED,
    PREFILL,
    Row,
    beside,
    embedded,
    markdown,
    number,
    peer,
    table,
    wrapped,
)
from dsv4.errors import DSV4Error

ROOT: Final = Path(__file__).resolve().parents[1]
FIRST: Final = "NVIDIA H100 80GB HBM3"
PAGE, README, PICTURE = "docs/speed.md", "README.md", "docs/decode.svg"
MARK: Final = re.compile(r"(<!-- page: (\w+) -->)(.*?)(<!-- end -->)", re.DOTALL)

_OPENING: Final = """\
# How fast the kernels are

Written by `python -m bench.page` out of `bench/results/`; do not edit. Microseconds unless said otherwise, inside CUDA
graphs. *Floor*: the time in which the same GPU copies as many bytes as must be read and written. {none}: no figure that
we know of. Below a table: its files, and in brackets the commits whose sources ran.

![A decoded layer's time against context and against sequences]({picture})
"""
_CLOSING: Final = "## Whose figures are not ours\n\nThose of no file here:"


def lookups(folder: Path | None = None) -> list[Lookup]:
    """One for each GPU that has lines, the first one strict."""
    lines = read(folder) if folder else read()
    others = [device for device in devices(lines) if device != FIRST]
    return [Lookup(lines, FIRST), *(Lookup(lines, device, strict=False) for device in others)]


# --- docs/speed.md ---------------------------------------------------------------------------------------------------


def page(looks: Sequence[Lookup]) -> str:
    parts = [_OPENING.format(none=NONE, picture=Path(PICTURE).name)]
    for look in looks:
        tables = [shown for kind in KINDS if (shown := table(kind, look))]
        if tables:
            parts += [f"## {short(look.device)}\n", *(f"{shown}\n" for shown in tables)]
    chunks = CHUNKS.values() if any(look.matching(PREFILL) for look in looks) else ()
    known = dict.fromkeys((one.whose, one.source) for one in (*LAYERS.values(), *PEERS.values(), *chunks))
    parts += [_CLOSING, "", *(wrapped(f"- {whose}: {source}.", "  ") for whose, source in known)]
    return "\n".join(parts) + "\n"


# --- README.md -------------------------------------------------------------------------------------------------------


def blocks(looks: Sequence[Lookup]) -> dict[str, str]:
    """What stands between the marks, by name."""
    return {"step": step(looks[0]), "summary": summary(looks)}


def step(look: Lookup) -> str:
    fast, slow = (f"{embedded(look, 0, graphs):.0f}" for graphs in (True, False))
    us = " and ".join(f"{said['layer_us']:.0f}" for kind in ("HCA", "CSA") if (said := layer(look, kind, 1)))
    first = f" {fast} tokens/s of the embedded model on an {short(look.device)}, {slow} without graphs."
    return f"{first}\nLayers of Flash's width take {us} µs a token there"


def layer(look: Lookup, kind: str, sequences: int) -> dict[str, Any] | None:
    """Of Flash, with 8K of context."""
    where = {"config": "flash", "kind": kind, "sequences": sequences, "context": 8192}
    line = look.newest(Query(DECODE.files, {**DECODE.where, **where}))
    return dict(line.said) if line else None


def summary(looks: Sequence[Lookup]) -> str:
    """Columns of their own for each GPU that has a figure."""
    found = {short(look.device): list(headlines(look)) for look in looks}
    shown = {gpu: rows for gpu, rows in found.items() if any(row[1] != NONE for row in rows)}
    head = ["one token of Flash", *(name for gpu in shown for name in (gpu, "its bytes", "a peer"))]
    beside = zip(*shown.values(), strict=True)
    return f"\n{markdown(head, [[row[0][0], *(cell for one in row for cell in one[1:])] for row in beside])}\n"


def headlines(look: Lookup) -> Iterator[Row]:
    """µs, µs of the bytes and a peer's µs: what a newcomer should see."""
    for kind, n in (("CSA", 1), ("HCA", 1), ("CSA", 8), ("HCA", 8)):
        said = layer(look, kind, n)
        figures = (number(said["layer_us"]), number(said["floor_us"]), peer(beside(look, said))) if said else [NONE] * 3
        yield f"{kind} layer, 8K of context" + f", {n} sequences" * (n > 1), *figures
    yield _headline(look, "matrix of 33.6 MB in FP8 (wq_b)", "scaled_matmul", "flash wq_b 1")
    yield _headline(look, "experts of a layer, MXFP4", "stored_moe", "flash 1")
    yield _headline(look, "the 512 best of 262,144 keys", "select_rows", "flash, 262144 keys 1")
    what = "attention over a window and 512 rows"
    yield _attention(look, what, 1, "planned")
    yield _attention(look, f"{what}, 64 sequences", 64, "planned")
    yield _attention(look, f"{what}, 4,096 tokens of a prompt", 4096, "rows decoded")


def _headline(look: Lookup, name: str, op: str, case: str) -> Row:
    known = PEERS.get((op, "262144" if "262144" in case else case.split()[-1]))
    return name, number(look.us(op, case)), number(look.floor(op, case)), peer(known)


def _attention(look: Lookup, name: str, n: int, form: str) -> Row:
    """Beside FlashMLA's in the same run. What it reads is counted where a case of ours is the same."""
    case = f"flash CSA, 64 heads, 128 + 512 rows, {n}"
    line = look.newest(Query(PEERED.files, {**PEERED.where, "case": case, "form": form}))
    if line is None:
        return name, NONE, NONE, NONE
    floor = look.floor("attend", f"flash csa {n}") if n <= 64 else None
    theirs = f"{number(line.said['theirs_microseconds'])} (FlashMLA)"
    return name, number(line.said["ours_microseconds"]), number(floor), theirs


def filled(text: str, made: Mapping[str, str]) -> str:
    """The text with its blocks anew. PageError for marks without a block and blocks without marks."""
    named = [name for _, name, _, _ in MARK.findall(text)]
    if sorted(named) != sorted(made):
        raise PageError(f"{README}'s marks", got=", ".join(named), wanted=", ".join(made))
    return MARK.sub(lambda mark: f"{mark[1]}{made[mark[2]]}{mark[4]}", text)


# --- all together ----------------------------------------------------------------------------------------------------


def made(root: Path, looks: Sequence[Lookup]) -> dict[str, str]:
    """The files' texts, by name. Of the picture only what it says it shows."""
    readme = (root / README).read_text(encoding="utf-8")
    return {README: filled(readme, blocks(looks)), PAGE: page(looks)}


def differences(root: Path, looks: Sequence[Lookup]) -> list[str]:
    """Lines of a diff, from what is there to what the results say; none if all is as it should be."""
    found: list[str] = []
    for name, text in made(root, looks).items():
        path = root / name
        there = path.read_text(encoding="utf-8") if path.exists() else ""
        found += difflib.unified_diff(there.splitlines(), text.splitlines(), name, "bench/results", lineterm="", n=0)
    if drawn(root / PICTURE) != curves(looks):
        found.append(f"{PICTURE} shows other figures")
    return found


def write(root: Path, looks: Sequence[Lookup]) -> None:
    for name, text in made(root, looks).items():
        (root / name).write_text(text, encoding="utf-8")
    wanted = curves(looks)
    if drawn(root / PICTURE) != wanted:  # a picture of the same figures stays as another matplotlib has drawn it
        draw(wanted, root / PICTURE)


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 and say what differs")
    asked = parser.parse_args(arguments)
    try:
        looks = lookups()
        if not asked.check:
            write(ROOT, looks)
        elif found := differences(ROOT, looks):
            sys.exit("\n".join([*found, "python -m bench.page writes it anew"]))
    except DSV4Error as error:
        sys.exit(f"bench.page: {error}")


if __name__ == "__main__":
    main()
