"""Run the SIMT kernels of dsv4/kernels/csrc on this CPU, from the same text that the GPU's compiler reads.

    shim.launch("norm.cu", "rms_norm_bf16_1", grid, block, x, weight, y, rows, eps)

takes CPU tensors (or None), ints and floats, as the kernel declares them, and writes into the tensors. A tensor map
(bytes) is read where its matrix lies, without fences. Every tensor lies between fences for the time of the call, shared
memory is poisoned before each block, and a fault of the kernel raises `Fault` with the source line. `order` is the
order in which the threads of a block run: 0 upwards, 1 downwards, else a random one of that seed; a right kernel gives
the same bits in all of them.

Tensor cores, copy engines and clusters are played where the headers are those of tests/shim/hopper (`on_hopper`); else
a cluster is one block of all its threads, for kernels that play it so (csrc/common/team.cuh). PDL is a no-op. Shared
arrays are declared in the kernels themselves.
"""

from __future__ import annotations

import ctypes
import os
import struct
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import cycle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.shim.build import CSRC, build, library, source_line

ORDERS = (0, 1, 5)


class Fault(Exception):
    """What a kernel did wrong on the host: which block and thread, and where."""


class _Launch(ctypes.Structure):
    _fields_ = (
        ("kernel", ctypes.c_void_p),
        ("arguments", ctypes.c_void_p),
        *((name, ctypes.c_uint) for name in ("grid", "block", "shared_bytes", "first", "last", "order", "cluster")),
    )


class _Entry(ctypes.Structure):
    _fields_ = (
        ("name", ctypes.c_char_p),
        ("kernel", ctypes.c_void_p),
        ("letters", ctypes.c_char_p),
        ("most_threads", ctypes.c_uint),
    )


def _map(content: bytes) -> Any:
    """A tensor map, at a multiple of 64 bytes as kernels demand."""
    room = (ctypes.c_ubyte * (len(content) + 64))()
    placed = (ctypes.c_ubyte * len(content)).from_buffer(room, -ctypes.addressof(room) % 64)
    placed[:] = content
    return placed


_C_TYPES = {"i": ctypes.c_int32, "l": ctypes.c_int64, "f": ctypes.c_float, "m": _map}


def launch(
    source: str,
    name: str,
    grid: int,
    block: int,
    *args: Tensor | int | float | bytes | None,
    smem: int = 0,
    order: int = 0,
    blocks: tuple[int, int] | None = None,
    fenced: bool = True,
    csrc: Path = CSRC,
    cluster: int = 1,
) -> None:
    """Run one kernel. `blocks`: these alone, of a grid that may be huge. `fenced=False`: on the tensors' own memory.

    cluster: so many blocks at once, of a kernel that has no static shared memory.
    """
    path = build(source, csrc, kernel=name)
    lib = library(path)
    entry = lib.simt_find(name.encode())
    if not entry:
        raise Fault(f"{source} has no kernel {name}")
    _check(entry.contents, block, args)
    with _placed(lib, args, fenced) as addresses:
        letters = entry.contents.letters.decode()
        values = [_C_TYPES.get(letter, ctypes.c_void_p)(a) for letter, a in zip(letters, addresses, strict=True)]
        pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
        first, last = blocks or (0, grid)
        plan = _Launch(
            entry.contents.kernel, ctypes.addressof(pointers), grid, block, smem, first, last, order, cluster
        )
        if lib.simt_launch(ctypes.byref(plan)):
            raise Fault(f"{name}: {source_line(path, lib.simt_message().decode())}")


def _check(entry: _Entry, block: int, args: tuple[Any, ...]) -> None:
    name, wanted = entry.name.decode(), entry.letters.decode()
    kinds = {Tensor: "p", type(None): "p", bool: "il", int: "il", float: "f", bytes: "m"}
    found = [next((kind for type_, kind in kinds.items() if isinstance(arg, type_)), "?") for arg in args]
    if len(found) != len(wanted) or any(letter not in kind for letter, kind in zip(wanted, found, strict=True)):
        raise Fault(f"{name} takes {wanted}, not {' '.join(found)}")
    if not 0 < block <= entry.most_threads:
        raise Fault(f"{name} is bounded to {entry.most_threads} threads; got {block}")


@contextmanager
def _placed(lib: Any, args: tuple[Any, ...], fenced: bool) -> Iterator[list[Any]]:
    """The arguments with tensors as addresses, of fenced copies that are copied back."""
    storages = _storages(args)
    places = {start: start for start in storages}
    if fenced:
        for start, storage in storages.items():
            places[start] = lib.simt_fenced(storage.nbytes())
            ctypes.memmove(places[start], start, storage.nbytes())
    try:
        yield [_address(arg, places) if isinstance(arg, Tensor) else arg for arg in args]
    finally:
        changed = 0
        for start, place in places.items():
            if place != start:
                ctypes.memmove(start, place, storages[start].nbytes())
                changed += lib.simt_unfence(place, storages[start].nbytes())
    if changed:
        raise Fault(f"{changed} bytes outside the tensors were written")


def _storages(args: tuple[Any, ...]) -> dict[int, torch.UntypedStorage]:
    """The memory behind the tensors, by its address; that of empty ones is nowhere."""
    found = {arg.untyped_storage().data_ptr(): arg.untyped_storage() for arg in args if isinstance(arg, Tensor)}
    found.pop(0, None)
    return found


def _address(tensor: Tensor, places: dict[int, int]) -> int | None:
    """None for a tensor without memory, as a GPU's allocator gives."""
    start = tensor.untyped_storage().data_ptr()
    return tensor.data_ptr() - start + places[start] if start else None


def sanitized(
    source: str, name: str, grid: int, block: int, *args: Tensor | float | None, smem: int = 0, csrc: Path = CSRC
) -> None:
    """`launch` in a process of its own, threads as OS threads, under ThreadSanitizer. A race raises `Fault`."""
    program = build(source, csrc, threads=True, kernel=name)
    entry = library(build(source, csrc, kernel=name)).simt_find(name.encode())
    _check(entry.contents, block, args)
    letters = entry.contents.letters.decode()
    storages = list(_storages(args).values())
    numbers = {storage.data_ptr(): number for number, storage in enumerate(storages)}
    with tempfile.NamedTemporaryFile(suffix=".simt") as file:
        file.write(struct.pack("<q", len(storages)))
        for storage in storages:
            file.write(struct.pack("<q", storage.nbytes()) + ctypes.string_at(storage.data_ptr(), storage.nbytes()))
        file.write(struct.pack("<q", len(args)))
        for letter, arg in zip(letters, args, strict=True):
            file.write(_packed(letter, arg, numbers))
        file.flush()
        done = _sanitizer([str(program), name, str(grid), str(block), str(smem), file.name])
        if done.returncode:
            raise Fault(f"{name}: {done.stderr[:4000]}")
        _read_back(Path(file.name).read_bytes(), storages)


def _sanitizer(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run it; once more at fixed addresses where the sanitizer cannot live with those that the system picked."""
    for before in ([], ["setarch", "-R"]):
        done = subprocess.run(
            [*before, *command],
            env={**os.environ, "TSAN_OPTIONS": "exitcode=66"},
            capture_output=True,
            text=True,
            timeout=300,
        )
        if "unexpected memory mapping" not in done.stderr:
            break
    return done


def _packed(letter: str, arg: Any, numbers: dict[int, int]) -> bytes:
    if isinstance(arg, Tensor):
        start = arg.untyped_storage().data_ptr()
        return struct.pack("<qq", numbers[start], arg.data_ptr() - start)
    form = {"f": "<qfxxxx"}.get(letter, "<qq")
    return struct.pack(form, -1, arg or 0)


def _read_back(content: bytes, storages: list[torch.UntypedStorage]) -> None:
    at = 8
    for storage in storages:
        ctypes.memmove(storage.data_ptr(), content[at + 8 : at + 8 + storage.nbytes()], storage.nbytes())
        at += 8 + storage.nbytes()


@contextmanager
def machine(
    order: int | None = None, csrc: Path = CSRC, threads: bool = False, idle: bool = False, clusters: bool = False
) -> Iterator[list[str]]:
    """Inside, the wrappers of dsv4/kernels launch on this CPU. Yields the names of the kernels that ran, in order.

    order: None takes those of ORDERS in turn, so that two runs of an op are not alike. threads: everything through
    `sanitized`. idle: launches are noted, and nothing runs. clusters: blocks of one run at once. Memory from
    `torch.empty` holds ones in all its bits until it is written: NaN. A machine of two multiprocessors, so that blocks
    have to walk over the rows.
    """
    from dsv4.kernels import index_logits, rows, tiles
    from dsv4.kernels.launch import Kernel
    from dsv4.kernels.matmul import Machine

    ran: list[str] = []
    orders, empty = cycle(ORDERS if order is None else (order,)), torch.empty

    def call(kernel: Kernel, grid: int, block: int, *args: Any, smem: int = 0, cluster: int = 0, **how: Any) -> None:
        size = max(1, cluster)
        if not clusters:  # for kernels that play a cluster as one block
            grid, block, size = grid // size, block * size, 1
        found = library(build(kernel.file, csrc, kernel=kernel.name)).simt_find(kernel.name.encode())
        if not found or found.contents.letters.decode() != kernel.signature:
            raise Fault(f"{kernel} is launched as {kernel.signature}, not as it is declared")
        ran.append(kernel.name)
        if idle:
            return
        if threads and grid:
            sanitized(kernel.file, kernel.name, grid, block, *args, smem=smem, csrc=csrc)
        elif grid:
            launch(kernel.file, kernel.name, grid, block, *args, smem=smem, order=next(orders), csrc=csrc, cluster=size)

    def poisoned(*args: Any, **how: Any) -> Tensor:
        made = empty(*args, **how)
        made.untyped_storage().fill_(255)
        return made

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Kernel, "__call__", call)
        patch.setattr(rows, "multiprocessors", lambda device: 2)
        patch.setattr(index_logits, "machine_of", lambda device: Machine(1, 228 << 10))
        patch.setattr(tiles, "_made", lambda *given: struct.pack("6Q80x", *given))
        patch.setattr(torch, "empty", poisoned)
        yield ran


@contextmanager
def posing() -> Iterator[None]:
    """Inside, tensors say that they are on a GPU, so that kernels accept them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Tensor, "is_cuda", True, raising=False)
        yield
