"""Attention over stored rows, against a softmax in FP64 of the decoded rows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from dsv4.check.cases.inputs import BF16, INF, normal
from dsv4.check.cases.quantize import searched
from dsv4.check.cases.rope import turn
from dsv4.check.contract import Arguments, Case, Property, Size
from dsv4.check.metrics import METRICS, Bound, Bounds, leaves
from dsv4.ops.attention import attend, attend_quant, vectors
from dsv4.ops.kv import read_kv
from dsv4.quant.formats import FP8_ROW
from dsv4.quant.kv_rows import KvRow

ROW = KvRow(512, 64)
ALLOWED: Bounds = {"bf16": Bound("allowed", 1.0)}
FAR: Bounds = {"bf16": Bound("rms", 2.0**-7)}  # where numbers of very different size cancel
COSINE = 5e-6
# A value that is rounded the other way moves a code now and then, and the scale of a block whose largest it is.
CODES: Bounds = {"data": Bound("rms", 2.0**-5)}
PAGE = 64  # rows
FLASH, PRO = 64, 128  # heads
# Pooled entries that a token attends to (of Pro's CSA twice as many), and among how many times as many they lie.
SIZES = {"csa": (512, 4), "hca 8k": (64, 1), "hca 1m": (8192, 1)}
WINDOW = 128
SMALL = (  # heads, and entries of both lists
    (4, 1, 0),
    (4, 63, 0),
    (4, 64, 0),
    (8, 65, 0),
    (16, 128, 0),
    (4, 3, 62),
    (4, 128, 128),
    (32, 64, 70),
)
LARGE: Final[tuple[tuple[int, int, Size], ...]] = (
    (16, 512, "full"), (64, 512, "full"), (32, 1024, "full"), (128, 1024, "big"),
)  # fmt: skip


def cases() -> Iterator[Case]:
    case = partial(
        Case, op=attend, tokens=(0, 2, 4, 6), bounds=ALLOWED, unfused_bounds=ALLOWED, oracle=exact,
        oracle_bounds=ALLOWED, properties=angle, moved=moved,
    )  # fmt: skip
    for heads, near, far in SMALL:
        yield case(name=f"{heads} heads, {near} + {far} rows", make=partial(given, 2, heads, near, far))
    for heads, far, size in LARGE:
        yield case(name=f"{heads} heads, 128 + {far} rows", make=partial(given, 2, heads, WINDOW, far), size=size)
    yield case(name="more chunks than strands", make=partial(given, 1, 4, 5, 2060))
    for page in (1, 3):
        yield case(name=f"pages of {page}", make=partial(given, 2, 4, 20, 9, page))
    for name, change in CHANGES.items():
        yield case(name=name, make=partial(_changed, change))
    yield case(
        name="scales of any size", make=partial(_changed, _scales), bounds=FAR, unfused_bounds=FAR, oracle_bounds=FAR
    )
    yield case(name="a row listed that is NaN", make=partial(_changed, _listed_nan), properties=None)
    yield case(name="no token", make=partial(given, 0, 4, 64, 1), properties=None)
    yield case(name="other widths", make=_narrow, refusable=True)
    yield case(name="past 2 GiB", make=_far, size="big")
    for model, heads in (("flash", FLASH), ("pro", PRO)):
        for kind, (entries, among) in SIZES.items():
            far = entries * (2 if (model, kind) == ("pro", "csa") else 1)
            for tokens in (1, 64):
                make = partial(given, tokens, heads, WINDOW, far, among=among)
                yield case(name=f"{model} {kind} {tokens}", make=make, size="big", bench=f"{model} {kind}")
    yield from _wide()
    yield from _quantised()


def _wide() -> Iterator[Case]:
    """Rows that were decoded before."""
    case = partial(
        Case, op=attend, tokens=(0, 2, 4, 6), bounds=ALLOWED, unfused_bounds=ALLOWED, oracle=exact,
        oracle_bounds=ALLOWED, properties=angle,
    )  # fmt: skip
    for heads, near, far in (*SMALL[1:6], (32, 64, 70)):
        yield case(
            name=f"{heads} heads, {near} + {far} decoded rows", make=decoding(partial(given, 2, heads, near, far))
        )
    for heads, far, size in LARGE:
        made = decoding(partial(given, 2, heads, WINDOW, far))
        yield case(name=f"{heads} heads, 128 + {far} decoded rows", make=made, size=size)
    yield case(name="more chunks of decoded rows than strands", make=decoding(partial(given, 1, 4, 5, 2060)))
    for name in ("absent entries", "a token without entries", "huge scores", "NaN where nobody looks"):
        yield case(name=f"decoded rows: {name}", make=decoding(partial(_changed, CHANGES[name])))
    listed = decoding(partial(_changed, _listed_nan))
    yield case(name="a decoded row listed that is NaN", make=listed, properties=None)
    for model, heads, far in (("flash", FLASH, 512), ("pro", PRO, 1024)):
        stored = partial(prompt, 4096, heads, far)
        for label, make in (("stored", stored), ("decoded", decoding(stored))):
            bench = f"{model} csa prompt, {label} rows"
            case = partial(case, size="big", oracle=None, properties=None, moved=moved)
            yield case(name=f"{bench} 4096", make=make, bench=bench)


def prompt(tokens: int, heads: int, picked: int) -> Arguments:
    """Tokens of one sequence: windows that overlap, and entries out of the same ones, four times as many, ascending."""
    near_rows = torch.arange(tokens).unsqueeze(1) + torch.arange(WINDOW)
    draw = torch.Generator().manual_seed(picked)
    far_rows = torch.rand(tokens, 4 * picked, generator=draw).argsort(1)[:, :picked].sort(1).values
    stored = pages("near", tokens + WINDOW - 1, PAGE), pages("far", 4 * picked, PAGE)
    q = normal("q", tokens, heads, 512, dtype=BF16, size=2)
    return q, stored[0], near_rows, stored[1], far_rows, normal("sink", heads), turn(tokens, 64)


def decoding(make: Callable[[], Arguments]) -> Callable[[], Arguments]:
    """The same arguments with decoded rows, whose numbers are those of the stored ones."""

    def made() -> Arguments:
        q, near, near_rows, far, far_rows, *more = make()
        wide = [read_kv(one, torch.arange(len(one) * ROW.page_rows(one.shape[1])), 512, 64) for one in (near, far)]
        return q, wide[0], near_rows, wide[1], far_rows, *more

    return made


def _quantised() -> Iterator[Case]:
    case = partial(Case, op=attend_quant, tokens=(0, 2, 4, 6), bounds=CODES, moved=moved)
    case = partial(case, outcome=_decoded, wanted=_stored, unfused_bounds={})
    yield case(name="4 heads", make=partial(given, 2, 4, 70, 9))
    yield case(name="32 heads", make=partial(given, 2, 32, 65, 0))
    yield case(name="a row listed that is NaN", make=partial(_changed, _listed_nan))
    yield case(name="a token without entries", make=partial(_changed, _nothing))
    yield case(name="64 heads", make=partial(given, 2, 64, 128, 512), size="full")
    yield case(name="flash csa 1", make=partial(given, 1, FLASH, WINDOW, 512), size="big", bench="flash csa")


def exact(given: Arguments, found: Any) -> Tensor:
    """FP64 throughout, rounded once before the values are turned back as the op does, and once behind."""
    q, near, near_rows, far, far_rows, sink, by = given
    out = torch.zeros(q.shape, dtype=torch.float64, device=q.device)
    for t, query in enumerate(q.double()):
        lists = ((near, near_rows[t]), (far, far_rows[t]))
        parts = [vectors(pages, rows[rows >= 0], q.shape[-1], 64).double() for pages, rows in lists]
        kv = torch.cat(parts)
        if len(kv):
            scores = torch.cat((query @ kv.T * q.shape[-1] ** -0.5, sink.double().unsqueeze(1)), 1)
            out[t] = torch.softmax(scores, 1)[:, :-1] @ kv
    values = out.to(q.dtype).double()
    cos, sin = by.cos.double().unsqueeze(1), by.sin.double().unsqueeze(1)
    tail = values[..., -64:]
    partner = tail.unflatten(-1, (32, 2)).flip(-1).flatten(-2)
    return torch.cat((values[..., :-64], tail * cos - partner * sin), -1).to(q.dtype)


def angle(given: Arguments, found: Any) -> Iterable[Property]:
    """Between all values and the exact ones."""
    (one,), (other,) = leaves(found).values(), leaves(exact(given, found)).values()
    yield Property("cos", METRICS["cos"](one, other), COSINE)


def _decoded(given: Arguments, found: Any) -> dict[str, Tensor]:
    """Values, and which blocks are stored as NaN."""
    return {"data": found.values().float(), "nan": found.scale.view(torch.uint8) == 255}


def _stored(given: Arguments, found: Any) -> dict[str, Tensor]:
    return _decoded(given, searched(attend.reference(*given).flatten(1).cpu(), FP8_ROW))


def moved(given: Arguments, found: Any) -> int:
    """Every row that is listed once, queries and values, and what stands beside them."""
    q, near, near_rows, far, far_rows, sink, by = given
    lists = {near.data_ptr(): [near_rows], far.data_ptr(): []}
    lists[far.data_ptr()].append(far_rows)
    rows = sum(len(torch.cat([one.flatten() for one in listed]).unique()) for listed in lists.values())
    beside: int = sum(x.nbytes for x in (q, near_rows, far_rows, sink, by.cos, by.sin))
    values: int = q.nbytes if isinstance(found, Tensor) else found.data.nbytes + found.scale.nbytes
    return (
        rows * (ROW.row_bytes + ROW.scale_bytes if near.dtype == torch.uint8 else 2 * near.shape[1]) + beside + values
    )


def pages(name: str, rows: int, page: int) -> Tensor:
    """So many rows of normal numbers, the rest of the last page all 0xFF. Of many rows the first 1000 repeat."""
    data, scales = ROW.encode(normal(name, min(rows, 1000), 512, dtype=BF16, size=0.5))
    count, size = -(-rows // page), ROW.page_bytes(page)
    made = torch.full((count, size), 255, dtype=torch.uint8)
    place, width = page * ROW.row_bytes, (ROW.row_bytes, ROW.scale_bytes)
    for first, part, wide in ((0, data, width[0]), (place, scales, width[1])):
        all_rows = torch.full((count * page, wide), 255, dtype=torch.uint8)
        all_rows[:rows] = part.repeat(-(-rows // len(part)), 1)[:rows]
        made[:, first : first + page * wide] = all_rows.view(count, page * wide)
    return made


def given(tokens: int, heads: int, near: int, far: int, page: int = PAGE, among: int = 0) -> Arguments:
    """A window of its own for each token, and entries of its own.

    among: ascending, of so many times as many; 0: all of them, in no order.
    """
    n, size = max(1, tokens), far * max(1, among)
    near_rows = torch.arange(tokens * near).view(tokens, near)
    draw = torch.Generator().manual_seed(far)
    picked = torch.stack([torch.randperm(size, generator=draw)[:far] for _ in range(n)])
    picked = (picked.sort(1).values if among else picked) + size * torch.arange(n).unsqueeze(1)
    stored = pages("near", n * near, page), pages("far", max(1, n * size), page)
    q = normal("q", tokens, heads, 512, dtype=BF16, size=2)
    return q, stored[0], near_rows, stored[1], picked[:tokens], normal("sink", heads), turn(tokens, 64)


def _changed(change: Any) -> Arguments:
    q, near, near_rows, far, far_rows, sink, by = given(3, 4, 66, 70)
    return tuple(change(q, near, near_rows.clone(), far, far_rows.clone(), sink, by))


def _absent(*of: Any) -> Arguments:
    """In the middle, at the end, a run of 64 and more, and but for one."""
    _, _, near_rows, _, far_rows, *_ = of
    near_rows[0, 5:9], far_rows[0, 60:], near_rows[1, 60:], far_rows[1, :69] = -1, -1, -1, -1
    near_rows[2, 1:], far_rows[2] = -1, -1
    return of


def _nothing(*of: Any) -> Arguments:
    of[2][1], of[4][1] = -1, -1
    return of


def _twice(*of: Any) -> Arguments:
    of[2][:, 1:60], of[4][:, 3:20] = of[2][:, :1], of[4][:, 1:2]
    return of


def _huge(*of: Any) -> Arguments:
    """Scores of thousands, so that one row has all the weight and the running maximum leaps."""
    return of[0] * 3000, *of[1:]


def _sinks(*of: Any) -> Arguments:
    return *of[:5], torch.tensor([1e4, 5.0, -300.0, -INF]), of[6]


def _poisoned(*of: Any) -> Arguments:
    """Rows that nobody lists are NaN, the first of the pool too."""
    q, near, near_rows, far, far_rows, sink, by = of
    near_rows[:, 60:], far_rows[far_rows % 7 == 0] = -1, -1
    broken = far.clone()
    for row in range(0, 210, 7):
        page, slot = row // PAGE, row % PAGE
        broken[page, slot * 576 : slot * 576 + 576] = 255
        broken[page, PAGE * 576 + slot * 8 :][:8] = 255
    return q, near, near_rows, broken, far_rows, sink, by


def _shared(*of: Any) -> Arguments:
    """Both lists in one tensor, and a sequence's second token beside its first: all but one row of the window."""
    q, near, near_rows, _, far_rows, sink, by = of
    near_rows[1] = near_rows[0] + 1
    return q, near, near_rows, near, far_rows % 190, sink, by


def _scales(*of: Any) -> Arguments:
    """The least scale, one that the usual way to widen has no room for, and the sizes beside it."""
    far = of[3].clone()
    far[0, PAGE * 576 :][: 7 * 8] = torch.tensor([0, 1, 134, 135, 100, 127, 120], dtype=torch.uint8).repeat(8)
    return of[0] * 2.0**-12, *of[1:3], far, *of[4:]


def _listed_nan(*of: Any) -> Arguments:
    """By its scale in the first token, by one code in the second; the third is whole."""
    far, rows = of[3].clone(), of[4]
    for token, at in ((0, PAGE * 576), (1, 0)):
        row = int(rows[token, 5])
        page, slot = row // PAGE, row % PAGE
        far[page, at + slot * (8 if at else 576) + 3] = 255
    return *of[:3], far, *of[4:]


CHANGES = {
    "absent entries": _absent,
    "a token without entries": _nothing,
    "rows listed twice": _twice,
    "huge scores": _huge,
    "sinks of any size": _sinks,
    "NaN where nobody looks": _poisoned,
    "both lists in one tensor": _shared,
}


def _narrow() -> Arguments:
    """Heads of 128 numbers, half of them rotated."""
    layout, (rows, page) = KvRow(128, 64), (40, 64)
    data, scales = layout.encode(normal("narrow", rows, 128, dtype=BF16))
    made = torch.zeros(1, layout.page_bytes(page), dtype=torch.uint8)
    made[0, : data.numel()] = data.flatten()
    made[0, page * layout.row_bytes :][: scales.numel()] = scales.flatten()
    listed = torch.arange(rows).view(1, rows)
    q = normal("q", 1, 4, 128, dtype=BF16)
    return q, made, listed[:, :30], made, listed[:, 30:], normal("sink", 4), turn(1, 64)


def _far() -> Arguments:
    """The last pages lie more than 2^31 bytes behind the first."""
    q, near, near_rows, far, far_rows, sink, by = given(2, 16, 64, 64)
    count = 2**31 // far.shape[1] + 3
    wide = torch.full((count, far.shape[1]), 255, dtype=torch.uint8)
    wide[-len(far) :] = far
    return q, near, near_rows, wide, far_rows + (count - len(far)) * PAGE, sink, by
