"""Routed experts, against decoded operands in FP64 with the same roundings between the matrices."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases import swiglu
from dsv4.check.cases.inputs import BF16, INF, MANY, NAN, normal
from dsv4.check.cases.quantize import searched
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.experts import StoredExperts, routed_experts, stored_expert
from dsv4.ops.moe import Route
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_ROW, MXFP4
from dsv4.quant.packed import Packed, pack
from dsv4.quant.tensor import QTensor

# A sum that is a bit off moves some numbers between the matrices by one step of BF16, and a few of them by one of FP8.
NEAR: Bounds = {"bf16": Bound("rms", 1e-2), "f32": Bound("rms", 1e-2)}
LIMIT = 10.0
FLASH = (4096, 2048, 256, 6)  # hidden size, width of an expert, experts, chosen ones
SLICE = (4096, 256, 256, 6)  # of eight GPUs
PRO = (7168, 3072, 96, 6)  # a quarter of the experts: no more are read at once
Sizes = tuple[int, int, int, int]


def cases() -> Iterator[Case]:
    case = partial(
        Case, op=routed_experts, tokens=(0, 1, 3), bounds=NEAR, oracle=exact, oracle_bounds=NEAR, moved=moved
    )
    small = (256, 128, 8, 3)
    for tokens in (0, 1, 2, 3, 8, 9, 33):
        yield case(name=f"{tokens} tokens", make=partial(given, tokens, small))
    for tokens in (64, 130, 400):
        yield case(name=f"{tokens} tokens", make=partial(given, tokens, small), size="full")
    for tokens in (1, 9, 70):
        yield case(name=f"{tokens} tokens of longer rows", make=partial(given, tokens, (768, 384, 5, 2)), size="full")
    yield case(name="one expert has all tokens", make=partial(_one_expert, 70))
    yield case(name="odd activations", make=_odd_activations)
    yield case(name="scales far apart", make=_far_apart)
    yield case(name="odd scales", make=_odd_scales)
    yield case(name="an expert twice", make=_twice)
    yield case(name="two experts cancel", make=_cancelling)
    yield case(name="fp32", make=partial(_wide, small), refusable=True)
    for label, sizes, counts in (("flash", FLASH, (1, 8, 32, 64, 8192)), ("flash of 8", SLICE, (1, 32, 64)),
                                 ("pro", PRO, (1, 32))):  # fmt: skip
        for tokens in counts:
            make, oracle = partial(given, tokens, sizes, 4), exact if tokens < MANY else None
            yield case(name=f"{label} {tokens}", make=make, size="big", oracle=oracle, bench=label, turn=turned)


def exact(given: Arguments, found: Any) -> Tensor:
    """Each product in FP64, rounded once; the quantiser by search."""
    x, picks, experts, beside, limit = given
    tokens, k = picks.experts.shape
    y = torch.zeros(tokens, k + 1, beside.shape[1], dtype=torch.float32, device=beside.device)
    y[:, k] = beside.float()
    order = picks.experts.argsort(dim=1, stable=True)
    rows = x.values().double()
    for number in picks.experts.unique().tolist():
        w1, w3, w2 = (w.values().double() for w in stored_expert(experts, number))
        token, slot = (picks.experts == number).nonzero(as_tuple=True)
        place = (order[token] == slot.unsqueeze(1)).int().argmax(1)
        gate, up = ((rows[token] @ w.T).to(beside.dtype) for w in (w1, w3))
        hidden = swiglu.exact(gate, up, limit) * picks.weights[token, slot].unsqueeze(1)
        stored = searched(hidden.to(beside.dtype).cpu(), FP8_ROW).to(x.device)
        y[token, place] = (stored.values().double() @ w2.T).to(beside.dtype).float()
    return torch.stack([_in_order(row) for row in y.unbind(0)]).to(beside.dtype) if tokens else beside.clone()


def _in_order(rows: Tensor) -> Tensor:
    total = rows[0]
    for row in rows[1:]:
        total = total + row
    return total


def moved(given: Arguments, found: Any) -> int:
    """The matrices of the experts that are chosen, as MXFP4 stores them, and what goes in and out beside them."""
    x, picks, experts, beside, _ = given
    weights: int = sum(rows * columns for rows, columns in (part.shape for part in experts))
    chosen = len(picks.experts.unique())
    beyond: int = x.nbytes + 2 * beside.nbytes + picks.experts.nbytes + picks.weights.nbytes
    return chosen * (weights // 2 + weights // 32) + beyond


def turned(given: Arguments, number: int) -> Arguments:
    """As many other experts: for the clock, which has to find them in memory and in no cache."""
    x, picks, experts, beside, limit = given
    count = len(experts.up.tiles)
    return x, Route((picks.experts + 41 * number) % count, picks.weights), experts, beside, limit


def matrix(name: str, rows: int, columns: int, low: int = 116, high: int = 122) -> QTensor:
    """Every code as often as another, under scales of about a hundredth that differ by up to fifty."""
    draw = torch.Generator().manual_seed(sum(map(ord, name)) + rows + columns)
    data = torch.randint(-128, 128, (rows, columns // 2), generator=draw, dtype=torch.int8)
    scale = torch.randint(low, high, MXFP4.scale_shape(rows, columns), generator=draw, dtype=torch.uint8)
    return QTensor(data, scale, MXFP4)


def given(tokens: int, sizes: Sizes, kinds: int | None = None) -> Arguments:
    """kinds: so many experts are unlike each other, and the others repeat them."""
    d, width, count, k = sizes
    parts = []
    for name, rows, columns in (("up", 2 * width, d), ("down", d, width)):
        ones = [pack(matrix(f"{name} {number}", rows, columns)) for number in range(kinds or count)]
        tiles, apart = (torch.stack(part) for part in zip(*ones, strict=True))
        repeats = count // len(ones)
        parts.append(Packed(tiles.repeat(repeats, 1, 1, 1), apart.repeat(repeats, 1)))
    x = quantize.reference(normal("x", tokens, d, dtype=BF16), FP8_ROW)
    draw = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, count, generator=draw).topk(k, 1).indices
    weights = normal("route", tokens, k).abs() + 0.1
    return x, Route(chosen, weights), StoredExperts(*parts), normal("beside", tokens, d, dtype=BF16), LIMIT


def _one_expert(tokens: int) -> Arguments:
    """Everybody's first choice; the last expert is nobody's."""
    x, picks, *rest = given(tokens, (256, 128, 8, 2))
    chosen = torch.stack((torch.full((tokens,), 5), torch.arange(tokens) % 4), 1)
    return x, Route(chosen, picks.weights), *rest


def _twice() -> Arguments:
    """As a table of a hash layer may have it."""
    x, picks, *rest = given(9, (256, 128, 8, 3))
    chosen = picks.experts.clone()
    chosen[:, 2] = chosen[:, 0]
    return x, Route(chosen, picks.weights), *rest


def _cancelling() -> Arguments:
    """The first expert's results are huge, the second's the same with the other sign: in any other order than by their
    numbers the third's are lost."""
    x, _, _, beside, limit = given(6, (256, 128, 8, 3))
    up, down, small = matrix("up", 256, 256), matrix("down", 256, 128, 150, 151), matrix("small", 256, 128, 100, 102)
    other = QTensor(down.data ^ -120, down.scale, MXFP4)  # both signs of a byte: 0x88
    parts = [[pack(one) for one in ones] for ones in ((up, up, up), (down, other, small))]
    experts = StoredExperts(*(Packed(*(torch.stack(part) for part in zip(*ones, strict=True))) for ones in parts))
    chosen = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]])
    return x, Route(chosen, torch.ones(6, 3)), experts, beside * 2.0**-20, limit


def _odd_activations() -> Arguments:
    """Zeros, a NaN, an infinity, blocks of very different size, a weight of zero, and one that is infinite."""
    _, picks, experts, beside, limit = given(9, (512, 256, 8, 3))
    x = normal("x", 9, 512, dtype=BF16)
    x[0], x[2, 100], x[3, 300] = 0.0, NAN, INF
    x[1] *= 10.0 ** (torch.arange(512) // 128 * 3 - 5).to(BF16)
    picks.weights[5, 1], picks.weights[6, 2] = 0.0, INF
    return quantize.reference(x, FP8_ROW), picks, experts, beside, limit


def _scaled(change: Any) -> Arguments:
    """Experts of which the first has other scales."""
    d, width, count, k = 512, 256, 4, 2
    parts = []
    for name, rows, columns in (("up", 2 * width, d), ("down", d, width)):
        ones = [matrix(f"{name} {number}", rows, columns) for number in range(count)]
        change(ones[0].scale)
        parts.append(Packed(*(torch.stack(part) for part in zip(*map(pack, ones), strict=True))))
    x, picks, _, beside, limit = given(12, (d, width, count, k))
    return x, picks, StoredExperts(*parts), beside, limit


def _far_apart() -> Arguments:
    """In the first 256 rows, scales of 128 columns that differ by more than 2^14."""

    def change(scale: Tensor) -> None:
        for place in range(4):
            scale[place:256:8, place::4] -= 17
        scale[7, 4:8] = torch.tensor([121, 106, 121, 107], dtype=torch.uint8)

    return _scaled(change)


def _odd_scales() -> Arguments:
    """The smallest scale, the two ends of what still fits, and a NaN, which takes one number of a result."""

    def change(scale: Tensor) -> None:
        scale[0] = 0
        scale[1, :4] = torch.tensor([108, 122, 109, 121], dtype=torch.uint8)
        scale[2, :4] = torch.tensor([0, 14, 3, 7], dtype=torch.uint8)
        if scale.shape[1] == 8:  # of the second matrix alone: one of the first takes all of a token
            scale[300, 3] = 255

    return _scaled(change)


def _wide(sizes: Sizes) -> Arguments:
    x, picks, experts, beside, limit = given(3, sizes)
    return x, picks, experts, beside.float(), limit
