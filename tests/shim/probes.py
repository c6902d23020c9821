"""Checks that are no case, for they need launches of their own: offsets beyond 2^31 without the memory.

Each yields what is wrong with the kernels of a folder.
"""

from __future__ import annotations

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor

from dsv4.ops.norm import rms_norm_quant
from dsv4.ops.rope import frequencies, rope, rotation
from dsv4.quant.formats import FP8_ROW
from dsv4.quant.kv_rows import KvRow
from tests import shim
from tests.devices import normal

PROBES: dict[str, Callable[[Path], Iterator[str]]] = {}
FAR = 2**31  # what an int cannot hold


def probe(name: str) -> Callable[[Callable[[Path], Iterator[str]]], Callable[[Path], Iterator[str]]]:
    """List a function under a name."""

    def listed(function: Callable[[Path], Iterator[str]]) -> Callable[[Path], Iterator[str]]:
        PROBES[name] = function
        return function

    return listed


def reserved(dtype: torch.dtype) -> Tensor:
    """Zeros with FAR of them before and after: those that are never touched take no memory.

    A kernel whose offset wraps around at 2^31 writes in here as well, and does no other harm.
    """
    flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
    room = mmap.mmap(-1, (2 * FAR + (1 << 20)) * dtype.itemsize, flags=flags)
    return torch.frombuffer(room, dtype=dtype)[FAR:]


def last_block(source: str, name: str, rows: int, block: int, *args: Tensor | int | float | None, csrc: Path) -> None:
    """Of a grid of one block a row, on the tensors' own memory."""
    shim.launch(source, name, rows, block, *args, blocks=(rows - 1, rows), fenced=False, csrc=csrc)


@probe("a row behind 2^31 numbers")
def far_row(csrc: Path) -> Iterator[str]:
    """Norm and FP8 of the last of 262,145 rows of 8192: every offset into x, y and the bytes is 2^31."""
    n, rows = 8192, FAR // 8192 + 1
    row, weight = normal("far", 1, n, dtype=torch.bfloat16), normal("weight", n)
    x, y, data, scale = (reserved(t) for t in (torch.bfloat16, torch.bfloat16, torch.uint8, torch.uint8))
    x[FAR : FAR + n] = row[0]
    sizes = (rows, n, 1, 32)
    args = (x, n, weight, 1e-6, y, *sizes, data, scale, None, None)
    last_block("norm.cu", "rms_norm_fp8_row_bf16_1", rows, 1024, *args, csrc=csrc)
    wanted, stored = rms_norm_quant(row, weight, 1e-6, FP8_ROW)
    blocks = n // 128
    if (y[FAR : FAR + n] != wanted[0]).sum() > 4:  # by the order of the sum
        yield "y is not there"
    if (data[FAR : FAR + n] != stored.data.view(torch.uint8)[0]).sum() > 4:
        yield "the bytes are not there"
    if not torch.equal(scale[(rows - 1) * blocks : rows * blocks], stored.scale[0]):
        yield "the scales are not there"


@probe("a token behind 2^31 numbers")
def far_token(csrc: Path) -> Iterator[str]:
    """Two tokens of two heads, 2^31 numbers apart."""
    n, step = 64, FAR + 1024
    tokens = normal("far", 2, 2, n, dtype=torch.bfloat16)
    x, y = reserved(torch.bfloat16), torch.zeros(2, 2, n, dtype=torch.bfloat16)
    turn = rotation(torch.tensor([5, 9]), frequencies(n, 10000.0))
    for token in range(2):
        for head in range(2):
            x[token * step + head * 128 :][:n] = tokens[token, head]
    shim.launch("rope.cu", "rope_bf16", 1, 128, x, step, 128, 4, 2, n, *turn, n, 0, y, fenced=False, csrc=csrc)
    if not torch.equal(y, rope(tokens, turn)):
        yield "the vectors are other ones"


@probe("a page behind 2^31 bytes")
def far_page(csrc: Path) -> Iterator[str]:
    """Rows of keys and values written to the first page that begins behind 2^31 bytes, and read back."""
    layout, page_rows = KvRow(512, 64), 64
    size = layout.page_bytes(page_rows)
    page = FAR // size + 1
    pages, rows = reserved(torch.uint8), torch.tensor([page * page_rows + 5, page * page_rows + 9])
    turn = rotation(torch.tensor([7]), frequencies(64, 10000.0))
    kv, found = normal("far", 1, 512, dtype=torch.bfloat16), torch.zeros(2, 512, dtype=torch.bfloat16)
    place = (pages, size, page_rows, layout.row_bytes, layout.scale_bytes)
    source = (kv, 512, 1, 512, torch.ones(512), 1e-6, *turn, 64)
    shim.launch("kv.cu", "write_kv_bf16_2", 1, 32, *source, *place, rows, fenced=False, csrc=csrc)
    usual = (kv, 512, 1, torch.ones(512), 1e-6, *turn, pages, size, 6, rows[1:].clone())
    shim.launch("kv.cu", "write_kv_usual", 1, 32, *usual, fenced=False, csrc=csrc)
    shim.launch("kv.cu", "read_kv", 1, 64, *place, rows, 2, 512, 64, found, fenced=False, csrc=csrc)
    for slot in (5, 9):
        start = page * size + slot * layout.row_bytes
        if not pages[start : start + layout.row_bytes].any():
            yield "the row is not there"
    wanted = rope(kv.float() * torch.rsqrt(kv.float().square().mean(1, keepdim=True) + 1e-6), turn)
    if float((found.float() - wanted).abs().max()) > 0.07 * float(wanted.abs().max()):
        yield "another row is read"


@probe("terms behind 2^31 numbers")
def far_terms(csrc: Path) -> Iterator[str]:
    """Two tokens 2^31 numbers apart, their ring and the page of their block as far, against the same nearby."""
    length, width, size = 16, 2048, KvRow(512, 64).page_bytes(64)
    x, older, ape = normal("terms", 2, width), normal("older", length, width), normal("ape", 4, width)
    turn, positions = rotation(torch.tensor([4, 4]), frequencies(64, 10000.0)), torch.tensor([6, 7])
    found = []
    for far in (False, True):
        slot, page, stride = (FAR // (length * width), FAR // size + 1, FAR) if far else (1, 1, width)
        given, ring = (reserved(torch.float32) if far else torch.zeros(2 * length * width) for _ in range(2))
        pages = reserved(torch.uint8) if far else torch.zeros(2 * size, dtype=torch.uint8)
        given[:width], given[stride : stride + width] = x
        own = ring[slot * length * width :][: length * width]
        own.copy_(older.flatten())
        slots, rows = torch.full((2,), slot), torch.full((2,), page * 64 + 5)
        step = (given, stride, ape, slots, positions, rows, 2, 1, ring, length)
        finish = (torch.ones(512), 1e-6, *turn, 1)
        places = (pages, size, 64, 576, 8)
        shim.launch("compress.cu", "compress_kv_4", 2, 128, *step, *finish, *places, fenced=False, csrc=csrc)
        found.append((own.clone(), pages[page * size :][:size].clone()))
    if not torch.equal(found[0][0], found[1][0]):
        yield "the ring is another one"
    if not torch.equal(found[0][1], found[1][1]) or not found[0][1].any():
        yield "the row is another one"
