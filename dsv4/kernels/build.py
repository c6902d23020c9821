"""From a source to its cubin: the one in the wheel, else the one in the cache, else NVRTC makes it."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from dsv4.errors import KernelError
from dsv4.kernels import prebuilt
from dsv4.kernels.cache import default_folder, entry_name, load, say, store
from dsv4.kernels.compiler import compile_source, compiler
from dsv4.kernels.entry import Entry
from dsv4.kernels.source import CSRC, Source, read


class Found(NamedTuple):
    """origin: "prebuilt", "cache" or "compiled"."""

    entry: Entry
    origin: str


@dataclass(frozen=True)
class Places:
    """csrc: the sources. prebuilt: what the wheel brought. cache: what was compiled before; None keeps nothing."""

    csrc: Path = CSRC
    prebuilt: Path = prebuilt.FOLDER
    cache: Path | None = field(default_factory=default_folder)


_memory: dict[tuple[str, Places], Found] = {}  # by the source's digest


def find(file: str, architecture: str, places: Places | None = None) -> Found:
    """The compiled form of csrc/`file`. KernelError if it does not declare the architecture or cannot be compiled."""
    places = places or Places()
    source = read(file, places.csrc)
    if architecture not in source.architectures:
        raise KernelError(f"kernel source {file}", got=architecture, wanted=" or ".join(source.architectures))
    return find_source(source, architecture, places)


def find_source(source: Source, architecture: str, places: Places) -> Found:
    """As `find`, for a source that has been read. A process asks the disk once for each cubin."""
    key = source.digest(architecture), places
    if key not in _memory:
        _memory[key] = _find(source, architecture, places)
    return _memory[key]


def _find(source: Source, architecture: str, places: Places) -> Found:
    if ready := prebuilt.load(source, architecture, places.prebuilt):
        return Found(ready, "prebuilt")
    file = entry_name(source, architecture, compiler().version)
    if places.cache and (kept := load(places.cache, file)):
        return Found(kept, "cache")
    entry = compile_source(source, architecture)
    if places.cache:
        store(places.cache, file, entry)
    else:
        say("no home directory to keep compiled kernels in, and no DSV4_CACHE: every start builds them again")
    return Found(entry, "compiled")
