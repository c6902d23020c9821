"""What a compiled kernel takes: registers, shared memory, stack and spills of ptxas' log, parameters of the cubin."""

from __future__ import annotations

import re
import struct
from collections.abc import Iterator
from typing import Final, NamedTuple

_ENTRY: Final = re.compile(r"Compiling entry function '(.+?)'")
_FUNCTION: Final = re.compile(r"Function properties for (\S+)")
_FRAME: Final = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_USED: Final = re.compile(r"Used (\d+) registers")
_SHARED: Final = re.compile(r"(\d+) bytes smem")
_OF_PTXAS: Final = re.compile(r"ptxas (info|\s*\.)(?!.*\(C\d+\))")
_SERIAL: Final = re.compile(r"\(C\d+\).*wgmma.*function '(.+?)'")
_PARAMETER: Final = 0x17  # EIATTR_KPARAM_INFO of .nv.info.NAME: u32 index, u16 ordinal, u16 offset, u32 size << 18
_VALUE: Final = 4  # EIFMT_SVAL: the attribute's u16 is the size of what follows


class Figures(NamedTuple):
    """Of one kernel; `registers` is None for a device function that was not inlined.

    Bytes: shared (static), stack, spill_stores and spill_loads per thread, and of each parameter.
    """

    registers: int | None = None
    shared: int = 0
    stack: int = 0
    spill_stores: int = 0
    spill_loads: int = 0
    parameters: tuple[int, ...] = ()

    @property
    def spills(self) -> bool:
        return self.spill_stores + self.spill_loads > 0


def figures(log: str, cubin: bytes) -> dict[str, Figures]:
    """By function. ValueError if the log and the cubin do not speak of the same kernels."""
    found, wide = _of_log(log), parameters(cubin)
    kernels = {name for name, of in found.items() if of.registers is not None}
    if kernels != wide.keys():
        raise ValueError(f"ptxas reports {sorted(kernels)}, the cubin holds {sorted(wide)}")
    return {name: of._replace(parameters=wide.get(name, ())) for name, of in found.items()}


def remarks(log: str) -> str:
    """What a compiler said besides figures: warnings, and ptxas' numbered advice."""
    lines = (line for line in log.splitlines() if not _OF_PTXAS.match(line) and not _FRAME.search(line))
    return "\n".join(line for line in lines if line.strip(" \0"))


def serialised(remarks: str) -> list[str]:
    """The functions in which ptxas makes tensor core products wait where their text does not (C7514, C7517)."""
    return list(dict.fromkeys(found[1] for found in map(_SERIAL.search, remarks.splitlines()) if found))


def _of_log(log: str) -> dict[str, Figures]:
    found: dict[str, Figures] = {}
    kernel = function = ""
    for line in log.splitlines():
        if name := _ENTRY.search(line):
            kernel = name[1]
        elif name := _FUNCTION.search(line):
            function = name[1]
        elif frame := _FRAME.search(line):
            stack, stores, loads = map(int, frame.groups())
            found[function] = found.get(function, Figures())._replace(
                stack=stack, spill_stores=stores, spill_loads=loads
            )
        elif used := _USED.search(line):
            shared = _SHARED.search(line)
            found[kernel] = found.get(kernel, Figures())._replace(
                registers=int(used[1]), shared=int(shared[1]) if shared else 0
            )
    return found


def parameters(cubin: bytes) -> dict[str, tuple[int, ...]]:
    """Kernel -> bytes of each of its parameters, of the cubin's sections `.nv.info.NAME`. ValueError if damaged."""
    try:
        infos = {name[len(".nv.info.") :]: body for name, body in _sections(cubin) if name.startswith(".nv.info.")}
        return {name: _parameters(body) for name, body in infos.items()}
    except (struct.error, UnicodeDecodeError) as error:
        raise ValueError(f"not a cubin: {error}") from None


def _parameters(info: bytes) -> tuple[int, ...]:
    sizes: dict[int, int] = {}
    place = 0
    while place < len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, place)
        place += 4
        if form != _VALUE:
            continue
        if attribute == _PARAMETER:
            _, ordinal, _, packed = struct.unpack_from("<IHHI", info, place)
            sizes[ordinal] = packed >> 18
        place += size
    return tuple(sizes[ordinal] for ordinal in sorted(sizes))


def _sections(elf: bytes) -> Iterator[tuple[str, bytes]]:
    """Name and bytes of every section of a 64-bit ELF file."""
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("not a cubin: no 64-bit ELF header")
    (table,) = struct.unpack_from("<Q", elf, 0x28)
    size, count, names = struct.unpack_from("<HHH", elf, 0x3A)
    headers = [struct.unpack_from("<IIQQQQ", elf, table + number * size) for number in range(count)]
    start = headers[names][4] if names < count else 0
    for name, _, _, _, offset, length in headers:
        end = elf.index(b"\0", start + name)
        yield elf[start + name : end].decode(), elf[offset : offset + length]
