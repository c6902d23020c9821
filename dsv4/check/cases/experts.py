"""The mixture of stored experts, against decoded operands in FP64 with the same roundings between the matrices."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor

from dsv4.check.cases import swiglu
from dsv4.check.cases.expert_matrices import matrix, of_format
from dsv4.check.cases.inputs import BF16, FP32, INF, MANY, NAN, normal
from dsv4.check.cases.quantize import searched
from dsv4.check.contract import Arguments, Case
from dsv4.check.metrics import Bound, Bounds
from dsv4.ops.experts import Stored, StoredExperts, stored_expert, stored_moe
from dsv4.ops.linear import dense
from dsv4.ops.moe import Route
from dsv4.ops.quantize import quantize
from dsv4.quant.formats import FP8_BLOCK, FP8_BLOCK_F32, FP8_ROW, MXFP4, NVFP4, Format
from dsv4.quant.packed import Packed, padded, stack
from dsv4.quant.tensor import QTensor

# A sum that is a bit off moves some numbers between the matrices by one step of BF16, and a few of them by one of FP8.
NEAR: Bounds = {"bf16": Bound("rms", 1e-2), "f32": Bound("rms", 1e-2)}
LIMIT = 10.0
FLASH = (4096, 2048, 256, 6)  # hidden size, width of an expert, experts, chosen ones
SLICE = (4096, 256, 256, 6)  # of eight GPUs
PRO = (7168, 3072, 96, 6)  # a quarter of the experts: no more are read at once
SMALL = (256, 128, 8, 3)
OTHERS: tuple[Format, ...] = (FP8_BLOCK, FP8_BLOCK_F32, NVFP4)  # formats that some checkpoints have instead of MXFP4
TIMED = (
    ("flash", FLASH, MXFP4, (1, 8, 32, 64, 8192)),
    ("flash of 8", SLICE, MXFP4, (1, 32, 64)),
    ("pro", PRO, MXFP4, (1, 32)),
    ("flash fp8", FLASH, FP8_BLOCK_F32, (1, 64, 8192)),
    ("flash nvfp4", FLASH, NVFP4, (1, 64, 8192)),
)
Sizes = tuple[int, int, int, int]


def cases() -> Iterator[Case]:
    case = partial(Case, op=stored_moe, tokens=(0, 1), bounds=NEAR, oracle=exact, oracle_bounds=NEAR, moved=moved)
    for tokens in (0, 1, 2, 3, 8, 9, 33):
        yield case(name=f"{tokens} tokens", make=partial(given, tokens, SMALL))
    for tokens in (64, 130, 400):
        yield case(name=f"{tokens} tokens", make=partial(given, tokens, SMALL), size="full")
    for tokens in (1, 9, 70):
        yield case(name=f"{tokens} tokens of longer rows", make=partial(given, tokens, (768, 384, 5, 2)), size="full")
    for fmt in OTHERS:
        for tokens in (1, 9):
            yield case(name=f"{tokens} tokens of {fmt.name}", make=partial(given, tokens, SMALL, fmt=fmt))
        yield case(name=f"70 tokens of {fmt.name}", make=partial(given, 70, SMALL, fmt=fmt), size="full")
        make = partial(given, 33, (768, 384, 5, 2), fmt=fmt)
        yield case(name=f"33 tokens of {fmt.name}", make=make, size="big")
    for tokens in (3, 9):
        yield case(name=f"{tokens} tokens of 128", make=partial(given, tokens, (128, 128, 8, 3)))
    yield case(name="one expert has all tokens", make=partial(_one_expert, 70))
    yield case(name="odd activations", make=_odd_activations)
    yield case(name="scales far apart", make=_far_apart)
    yield case(name="odd scales", make=_odd_scales)
    yield case(name="nvfp4 scales far apart", make=_far_apart_nvfp4)
    yield case(name="odd nvfp4 scales", make=_odd_nvfp4_scales)
    yield case(name="an expert twice", make=partial(_twice, 9))
    yield case(name="few tokens, one twice", make=partial(_twice, 3))
    yield case(name="two experts cancel", make=partial(_cancelling, 2))
    yield case(name="few tokens, two experts cancel", make=partial(_cancelling, 1))
    yield case(name="fp32", make=partial(given, 3, SMALL, dtype=FP32), refusable=True)
    for label, sizes, fmt, counts in TIMED:
        for tokens in counts:
            d, width, _, k = sizes
            make, oracle = partial(given, tokens, sizes, 4, fmt), exact if tokens < MANY else None
            flops = 6 * tokens * (k + 1) * d * width
            yield case(name=f"{label} {tokens}", make=make, size="big", oracle=oracle, bench=label, turn=turned,
                       flops=flops)  # fmt: skip


def exact(given: Arguments, found: Any) -> Tensor:
    """Each product in FP64, rounded once; the quantiser by search."""
    x, picks, experts, limit, dtype = given
    tokens, k = picks.experts.shape
    chosen = torch.nn.functional.pad(picks.experts, (0, 1), value=experts.many)
    weights = torch.nn.functional.pad(picks.weights, (0, 1), value=1.0)
    order = chosen.argsort(dim=1, stable=True)
    rows = x.values().double()
    y = torch.zeros(tokens, k + 1, rows.shape[1], dtype=torch.float32, device=rows.device)
    for number in chosen.unique().tolist():
        w1, w3, w2 = (dense(w).double() for w in stored_expert(experts, number))
        token, slot = (chosen == number).nonzero(as_tuple=True)
        place = (order[token] == slot.unsqueeze(1)).int().argmax(1)
        gate, up = ((rows[token] @ w.T).to(dtype) for w in (w1, w3))
        hidden = swiglu.exact(gate, up, limit) * weights[token, slot].unsqueeze(1)
        stored = searched(hidden.to(dtype).cpu(), FP8_ROW).to(x.device)
        y[token, place] = (stored.values().double() @ w2.T).to(dtype).float()
    total = y[:, 0]
    for place in range(1, k + 1):
        total = total + y[:, place]
    return total.to(dtype)


def moved(given: Arguments, found: Any) -> int:
    """Matrices of experts that are chosen and of the shared one, as they are stored, and what goes in and out."""
    x, picks, experts, _, dtype = given
    routed, shared = (sum(nbytes(part) for part in one) for one in (experts.routed, experts.shared))
    beyond: int = x.nbytes + x.data.numel() * dtype.itemsize + picks.experts.nbytes + picks.weights.nbytes
    return len(picks.experts.unique()) * routed + shared + beyond


def nbytes(part: Packed) -> int:
    """Of one matrix in the format of the checkpoint."""
    rows, columns = part.shape
    fmt, (high, wide) = part.format, part.format.block
    return rows * columns // fmt.values_per_byte + rows // high * (columns // wide) * fmt.scale_dtype.itemsize


def turned(given: Arguments, number: int) -> Arguments:
    """As many other experts: for the clock, which has to find them in memory and in no cache."""
    x, picks, experts, *rest = given
    return x, Route((picks.experts + 41 * number) % experts.many, picks.weights), experts, *rest


def given(
    tokens: int, sizes: Sizes, kinds: int | None = None, fmt: Format = MXFP4, dtype: torch.dtype = BF16
) -> Arguments:
    """kinds: so many experts are unlike each other, and the others repeat them."""
    d, _, count, k = sizes
    x = quantize.reference(normal("x", tokens, d, dtype=BF16), FP8_ROW)
    draw = torch.Generator().manual_seed(tokens)
    chosen = torch.rand(tokens, count, generator=draw).topk(k, 1).indices
    weights = normal("route", tokens, k).abs() + 0.1
    return x, Route(chosen, weights), _experts(sizes, kinds or count, fmt), LIMIT, dtype


def _experts(sizes: Sizes, kinds: int, fmt: Format, change: Callable[[QTensor], None] | None = None) -> StoredExperts:
    """change: what becomes of the first routed expert's matrices."""
    d, width, count, _ = sizes
    parts = []
    for name, rows, columns in (("up", 2 * width, d), ("down", d, width)):
        ones = [_pair(name, number, rows, columns, fmt) for number in range(kinds)]
        if change:
            for one in ones[0]:
                change(one)
        tiles, apart, factor, _ = stack(ones, len(ones))
        repeats = count // len(ones)
        parts.append(Packed(tiles.repeat(repeats, 1, 1, 1), apart.repeat(repeats, 1), factor.repeat(repeats, 1), fmt))
    shared_fmt = FP8_BLOCK if fmt in (MXFP4, NVFP4) else fmt
    shared = [_pair(f"shared {name}", 0, rows, columns, shared_fmt) for name, rows, columns in
              (("up", 2 * width, d), ("down", d, width))]  # fmt: skip
    return StoredExperts(Stored(*parts), Stored(*(stack([one], 1) for one in shared)))


def _pair(name: str, number: int, rows: int, columns: int, fmt: Format) -> list[QTensor]:
    """Gate and up, each half of the rows, or the one second matrix."""
    if "up" not in name:
        return [padded(of_format(f"{name} {number}", rows, columns, fmt))]
    return [of_format(f"{name} {number} {which}", rows // 2, columns, fmt) for which in "ab"]


def _one_expert(tokens: int) -> Arguments:
    """Everybody's first choice; the last expert is nobody's."""
    x, picks, *rest = given(tokens, (256, 128, 8, 2))
    chosen = torch.stack((torch.full((tokens,), 5), torch.arange(tokens) % 4), 1)
    return x, Route(chosen, picks.weights), *rest


def _twice(tokens: int) -> Arguments:
    """As a table of a hash layer may have it."""
    x, picks, *rest = given(tokens, SMALL)
    chosen = picks.experts.clone()
    chosen[:, 2] = chosen[:, 0]
    return x, Route(chosen, picks.weights), *rest


def _cancelling(times: int) -> Arguments:
    """The first expert's results are huge, the second's the same with the other sign: in any other order than by their
    numbers those of the third and of the shared one are lost."""
    x, _, experts, *rest = given(6 * times, SMALL)
    up, down, small = matrix("up", 256, 256), matrix("down", 256, 128, 150, 151), matrix("small", 256, 128, 120, 122)
    gate, above = (QTensor(up.data[start:stop], up.scale[start:stop], MXFP4) for start, stop in ((0, 128), (128, 256)))
    other = QTensor(down.data ^ -120, down.scale, MXFP4)  # both signs of a byte: 0x88
    routed = Stored(stack([(gate, above)] * 3, 3), stack([(down,), (other,), (small,)], 3))
    chosen = torch.tensor([[0, 1, 2], [0, 2, 1], [1, 0, 2], [1, 2, 0], [2, 0, 1], [2, 1, 0]]).repeat(times, 1)
    return x, Route(chosen, torch.ones(chosen.shape)), StoredExperts(routed, experts.shared), *rest


def _odd_activations() -> Arguments:
    """Zeros, a NaN, an infinity, blocks of very different size, a weight of zero, and one that is infinite."""
    _, picks, *rest = given(9, (512, 256, 8, 3))
    x = normal("x", 9, 512, dtype=BF16)
    x[0], x[2, 100], x[3, 300] = 0.0, NAN, INF
    x[1] *= 10.0 ** (torch.arange(512) // 128 * 3 - 5).to(BF16)
    picks.weights[5, 1], picks.weights[6, 2] = 0.0, INF
    return quantize.reference(x, FP8_ROW), picks, *rest


def _scaled(change: Callable[[Tensor], None], fmt: Format = MXFP4) -> Arguments:
    """Experts of which the first has other scales."""
    sizes = (512, 256, 4, 2)
    x, picks, _, *rest = given(5, sizes)
    return x, picks, _experts(sizes, 4, fmt, lambda one: change(one.scale)), *rest


def _far_apart() -> Arguments:
    """In the first 256 rows, scales of 128 columns that differ by more than 2^14."""

    def change(scale: Tensor) -> None:
        for place in range(4):
            scale[place:128:8, place::4] -= 17
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


def _far_apart_nvfp4() -> Arguments:
    """In the first 256 rows, scales of 128 columns that differ by more than 2^11."""

    def change(scale: Tensor) -> None:
        for place in range(8):
            scale.view(torch.uint8)[place:128:16, [place, (place + 3) % 8]] = torch.tensor([1, 80], dtype=torch.uint8)

    return _scaled(change, NVFP4)


def _odd_nvfp4_scales() -> Arguments:
    """Zeros, subnormals, both ends of what still fits, a whole row of zeros, and a NaN and a negative one."""

    def change(scale: Tensor) -> None:
        code = scale.view(torch.uint8)
        code[0], code[1, ::2], code[2] = 0, 0, 5
        code[3, :8] = torch.tensor([0x7E, 0x2F, 0x28, 0x70, 0x30, 0x2C, 0x55, 0], dtype=torch.uint8)
        code[4, :8] = torch.tensor([1, 2, 3, 4, 5, 6, 7, 8], dtype=torch.uint8)
        code[5, :8] = torch.tensor([1, 0x44, 3, 4, 0x40, 6, 7, 8], dtype=torch.uint8)
        if scale.shape[1] == 16:  # of the second matrix alone
            code[300, 3], code[301, 4] = 0x7F, 0xB8

    return _scaled(change, NVFP4)
