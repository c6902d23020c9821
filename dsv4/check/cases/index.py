"""Index logits over stored keys, against FP64 of bytes that are decoded here once more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any, Final

import torch
from torch import Tensor

from dsv4.check.cases.inputs import NAN, normal
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.index_logits import index_logits
from dsv4.quant.index_keys import FP4_KEYS, FP8_KEYS, KEY_LAYOUTS, KeyLayout

HEADS: Final = 64
NEAR: Final[Bounds] = {"f32": Bound("rms", 1e-5)}
LENGTHS: Final = (2048, 65_536, 262_144)  # keys of a sequence: at 8 thousand, 262 thousand and a million tokens
PREFILL: Final = (1024, 8192)  # tokens, keys
REPEATED: Final = 4096  # keys of a large pool that are made; the others repeat them


def cases() -> Iterator[Case]:
    for name, layout in KEY_LAYOUTS.items():
        case = partial(
            Case, op=index_logits, tokens=(0, 1, 2, 5, 6), bounds=NEAR, oracle=exact, oracle_bounds=NEAR, moved=moved
        )  # fmt: skip
        for tokens, width, page in ((1, 64, 64), (3, 192, 32), (8, 192, 64), (20, 64, 32), (1, 1216, 32), (5, 640, 16)):
            make = partial(given, layout, tokens, width, page)
            yield case(name=f"{name} {tokens} x {width} pages of {page}", make=make)
        for change in CHANGES:
            yield case(name=f"{name} {change.__doc__}", make=partial(_changed, change, layout))
        yield case(name=f"{name} no token", make=partial(given, layout, 0, 64, 32))
        yield case(name=f"{name} pages of 3", make=partial(given, layout, 2, 64, 3), refusable=True)
        for heads in (4, 16, 24):
            yield case(name=f"{name} {heads} heads", make=partial(given, layout, 2, 64, 32, heads=heads))
        yield case(name=f"{name} 65 heads", make=partial(given, layout, 2, 64, 32, heads=65), refusable=True)
        yield case(name=f"{name} long", make=partial(given, layout, 2, 5056, 32), size="full")
        yield case(name=f"{name} past 2 GiB", make=partial(_far, layout), size="big")
        yield from _timed(case, layout)


def _timed(case: Any, layout: KeyLayout) -> Iterator[Case]:
    name = layout.name
    for keys in LENGTHS:
        for tokens in (1, 64):
            make, flops = partial(_decode, layout, tokens, keys), 2 * tokens * keys * HEADS * 128
            label = f"{name} {keys} keys"
            yield case(name=f"{label} {tokens}", make=make, size="big", bench=label, flops=flops, oracle=None)
    tokens, keys = PREFILL
    make, flops = partial(_prefill, layout), 2 * tokens * keys * HEADS * 128
    yield case(name=f"{name} prefill", make=make, size="big", bench=f"{name} prefill", flops=flops, oracle=None)


def given(layout: KeyLayout, tokens: int, width: int, page: int, heads: int = HEADS) -> Arguments:
    """Sequences of three tokens each, all of whose pages lie scattered; every token sees what is no multiple of 64."""
    sequences = max(1, -(-tokens // 3))
    pages, table = pool(layout, sequences, width, page)
    slots = torch.arange(tokens) // 3
    visible = (width - 7 * torch.arange(tokens)).clamp(min=0)
    return *queries(layout, tokens, heads), pages, table, slots, visible, width


def queries(layout: KeyLayout, tokens: int, heads: int = HEADS) -> tuple[Tensor, Tensor, Tensor]:
    """Numbers, scales and head weights."""
    return *layout.encode(normal("index q", tokens, heads, 128)), 0.1 * normal("index weights", tokens, heads)


def pool(layout: KeyLayout, sequences: int, width: int, page: int) -> tuple[Tensor, Tensor]:
    """Pages in no order, and the table of them; one page that is nobody's is all 0xFF."""
    each = -(-width // page)
    count = sequences * each + 1
    keys = layout.encode(normal("index keys", min(count * page, REPEATED), 128))
    data, scales = (part.repeat(-(-count * page // len(part)), 1)[: count * page] for part in keys)
    pages = torch.zeros(count, layout.page_bytes(page), dtype=torch.uint8)
    edge = page * layout.data_bytes
    pages[:, :edge], pages[:, edge : edge + 4 * page] = data.view(count, -1), scales.view(count, -1)
    order = torch.randperm(count, generator=torch.Generator().manual_seed(count))
    pages[order[-1]] = 255
    return pages, order[:-1].view(sequences, each).contiguous()


def exact(given: Arguments, found: Any) -> Tensor:
    """FP64, bytes decoded one key after another."""
    q, q_scales, weights, pages, table, slots, visible, width = given
    size = q.shape[-1]
    logits = torch.full((len(q), width), -math.inf, dtype=torch.float64, device=q.device)
    page = pages.shape[1] // (size + 4)
    for t in range(len(q)):
        seen = int(visible[t])
        number = torch.arange(seen, device=q.device)
        own = pages[table[slots[t], number // page]]
        at = (number % page).unsqueeze(1)
        data = own.gather(1, at * size + torch.arange(size, device=q.device))
        scales = own.gather(1, page * size + at * 4 + torch.arange(4, device=q.device))
        dots = _decoded(data, scales) @ _decoded(q[t], q_scales[t]).T
        logits[t, :seen] = dots.relu() @ weights[t].double()
    return logits.float()


def _decoded(data: Tensor, scales: Tensor) -> Tensor:
    """FP64 [n, 128]."""
    if data.shape[1] == 128:
        steps = scales.contiguous().view(torch.float32).double()
        return data.contiguous().view(torch.float8_e4m3fn).double() * steps
    sizes = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6], dtype=torch.float64, device=data.device)
    codes = torch.stack((data & 15, data >> 4), -1).flatten(1).long()
    signed = sizes[codes & 7] * torch.where(codes > 7, -1.0, 1.0)
    powers = torch.exp2(scales.double() - 127).masked_fill(scales == 255, NAN)
    return signed * powers.repeat_interleave(32, 1)


def moved(given: Arguments, found: Any) -> int:
    """Every key once that some token sees, queries, weights, and a logit for every place."""
    q, q_scales, weights, pages, table, slots, visible, width = given
    page = int(pages.shape[1] // (q.shape[-1] + 4))
    longest = torch.zeros(len(table), dtype=torch.int64, device=q.device).scatter_reduce_(0, slots, visible, "amax")
    keys, size = int(longest.sum()), int(q.shape[-1] + 4)
    beside: int = sum(x.nbytes for x in (q, q_scales, weights, slots, visible))
    return keys * size + keys // page * 8 + beside + 4 * len(q) * int(width)


def _changed(change: Any, layout: KeyLayout) -> Arguments:
    made = given(layout, 6, 192, 32)
    return tuple(change(layout, *(x.clone() if isinstance(x, Tensor) else x for x in made)))


def _visible(layout: KeyLayout, *of: Any) -> Arguments:
    """keys at every edge, and pages that nobody has"""
    table, slots = of[4], of[5]
    visible = torch.tensor([0, 1, 63, 64, 65, 192])
    slots = torch.arange(6) % 2
    table = torch.nn.functional.pad(table, (0, 3), value=-1)
    table[0, 3:] = -1  # of tokens that see 65 and less
    return *of[:4], table, slots, visible, of[7]


def _one_sequence(layout: KeyLayout, *of: Any) -> Arguments:
    """one sequence, each token sees one more"""
    return *of[:5], torch.ones(6, dtype=torch.int64), torch.arange(125, 131), of[7]


def _parted(layout: KeyLayout, *of: Any) -> Arguments:
    """sequences in turn, the longest not first"""
    return *of[:5], torch.tensor([0, 1, 0, 0, 0, 1]), torch.tensor([20, 150, 90, 191, 1, 77]), of[7]


def _signs(layout: KeyLayout, *of: Any) -> Arguments:
    """weights of one sign, zeros and minus zeros"""
    of[2][0], of[2][1], of[2][2], of[2][3, ::2] = -of[2][0].abs(), 0.0, -0.0, 0.0
    return of


def _zeros(layout: KeyLayout, *of: Any) -> Arguments:
    """zeros for a key, a query, a block of each"""
    q, q_scales, weights, pages, *rest = of
    zeros = layout.encode(torch.zeros(1, 128))
    q[0], q_scales[0] = zeros[0][0], zeros[1][0]
    part = layout.data_bytes // 4
    q[1, :, part : 2 * part], q[2, 5], q_scales[2, 5] = 0, zeros[0][0], zeros[1][0]
    if layout == FP4_KEYS:
        q_scales[1, :, 1] = zeros[1][0, 0]
    page = pages[rest[0][0, 1]]
    page[: layout.data_bytes], page[32 * layout.data_bytes :][:4] = zeros[0][0], zeros[1][0]
    return q, q_scales, weights, pages, *rest


def _small(layout: KeyLayout, *of: Any) -> Arguments:
    """scales of 2^-26 and less"""
    q_scales, pages, edge = of[1], of[3], 32 * layout.data_bytes
    if layout == FP4_KEYS:
        q_scales[:] = torch.tensor([101, 99, 98, 92], dtype=torch.uint8)
        pages[:, edge : edge + 128] = torch.tensor([97, 101, 95, 100], dtype=torch.uint8).repeat(32)
    else:
        q_scales[:], pages[:, edge : edge + 128] = (
            torch.tensor([1.37 * 2.0**-26]).view(torch.uint8).repeat(n) for n in (1, 32)
        )
    return of


def _spread(layout: KeyLayout, *of: Any) -> Arguments:
    """blocks of very different size"""
    q, q_scales, weights, pages, *rest = of
    if layout == FP4_KEYS:
        by = torch.tensor([[127, 113, 112, 141], [141, 127, 113, 90], [100, 99, 98, 97], [127, 127, 160, 127]])
        q_scales[:] = by[torch.arange(HEADS) % 4].to(torch.uint8)
        q_scales[1::2] = torch.tensor([120, 134, 121, 127], dtype=torch.uint8)  # these fit one scale
        pages[:, 32 * 64 : 32 * 68] = torch.tensor([127, 107, 140, 87], dtype=torch.uint8).repeat(32)
    else:
        powers = torch.exp2(torch.arange(HEADS) % 40 - 20.0) * 1.37
        q_scales[:] = powers.unsqueeze(1).view(torch.uint8)
        pages[:, 32 * 128 :] = powers[:32].view(torch.uint8)
    return q, q_scales, weights, pages, *rest


def _nan_keys(layout: KeyLayout, *of: Any) -> Arguments:
    """a NaN key, by its scale alone, beside others"""
    q, q_scales, weights, pages, table, slots, visible, width = of
    nan = torch.tensor([127, 255, 127, 127] if layout == FP4_KEYS else [0, 0, 192, 127], dtype=torch.uint8)
    for page, slot in ((0, 0), (1, 9), (5, 31)):
        pages[table[0, page]][32 * layout.data_bytes + 4 * slot :][:4] = nan
    if layout == FP8_KEYS:
        pages[table[1, 2], 7 * 128 + 50] = 255  # by a number
    return q, q_scales, weights, pages, table, slots, visible, width


def _nan_queries(layout: KeyLayout, *of: Any) -> Arguments:
    """a NaN query, a NaN weight"""
    nan = torch.tensor([120, 127, 127, 255] if layout == FP4_KEYS else [0, 0, 192, 127], dtype=torch.uint8)
    of[1][1, 40], of[2][4, 63] = nan, NAN
    return of


def _scales(layout: KeyLayout, *of: Any) -> Arguments:
    """keys of scale 2^-127 and of a large one"""
    pages, edge = of[3], 32 * layout.data_bytes
    if layout == FP4_KEYS:
        pages[:, edge : edge + 128] = torch.tensor([0, 1, 0, 2, 200, 190, 150, 200], dtype=torch.uint8).repeat(16)
        of[1][:] = 134
    else:
        small, large = torch.tensor([2.0**-127, 3e30]).view(torch.uint8).view(2, 4)
        pages[:, edge : edge + 128] = torch.cat((small, large)).repeat(16)
    return of


CHANGES: Final = (
    _visible, _one_sequence, _parted, _signs, _zeros, _small, _spread, _nan_keys, _nan_queries, _scales,
)  # fmt: skip


def _decode(layout: KeyLayout, tokens: int, keys: int) -> Arguments:
    """A sequence for each token."""
    pages, table = pool(layout, tokens, keys, 32)
    return *queries(layout, tokens), pages, table, torch.arange(tokens), torch.full((tokens,), keys), keys


def _prefill(layout: KeyLayout) -> Arguments:
    """The last tokens of one prompt, of four to a key."""
    tokens, keys = PREFILL
    pages, table = pool(layout, 1, keys, 32)
    visible = (torch.arange(tokens) + 4 * keys - tokens + 1) // 4
    return *queries(layout, tokens), pages, table, torch.zeros(tokens, dtype=torch.int64), visible, keys


def _far(layout: KeyLayout) -> Arguments:
    """The last pages lie more than 2^31 bytes behind the first."""
    q, q_scales, weights, pages, table, *rest = given(layout, 3, 192, 64)
    count = 2**31 // pages.shape[1] + 8
    wide = torch.full((count, pages.shape[1]), 255, dtype=torch.uint8)
    wide[-len(pages) :] = pages
    return q, q_scales, weights, wide, table + (count - len(pages)), *rest
