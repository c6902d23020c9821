"""Ready-made cubins: `make` packs them into a wheel (wheel/with_cubins.py calls it), `load` finds them there.

A ready-made cubin counts only if it was made of exactly the text and flags that are here; a source edited in place goes
its way through the cache. Who has them needs no compiler.
"""

from __future__ import annotations

from pathlib import Path
from typing import Final

from dsv4.errors import KernelError
from dsv4.kernels.cache import say
from dsv4.kernels.compiler import compile_source
from dsv4.kernels.entry import Entry, pack, unpack
from dsv4.kernels.source import CSRC, Source, sources

FOLDER: Final = Path(__file__).parent / "prebuilt"
LIMIT: Final = 10_000_000  # bytes that all of them together may take in a wheel


def load(source: Source, architecture: str, folder: Path = FOLDER) -> Entry | None:
    """The ready-made cubin, or None: not there, or made of another text. stderr is told of a damaged one."""
    path = folder / _name(source, architecture)
    try:
        entry = unpack(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{path} is damaged ({error}); the kernel is built instead, and installing dsv4 again mends it")
        return None
    return entry if entry.digest == source.digest(architecture) else None


def make(folder: Path, csrc: Path = CSRC) -> int:
    """Compile every declared pair into `folder` and return how many there are. KernelError if they are too large."""
    folder.mkdir(parents=True)
    pairs = [(source, architecture) for source in sources(csrc) for architecture in source.architectures]
    for source, architecture in pairs:
        (folder / _name(source, architecture)).write_bytes(pack(compile_source(source, architecture)))
    nbytes = sum(path.stat().st_size for path in folder.iterdir())
    if nbytes > LIMIT:
        raise KernelError("all cubins of the wheel together", got=f"{nbytes:,} bytes", wanted=f"at most {LIMIT:,}")
    return len(pairs)


def _name(source: Source, architecture: str) -> str:
    return f"{source.file.replace('/', '.').removesuffix('.cu')}.{architecture}.cubin"
