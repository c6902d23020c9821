"""Kernel sources: one text of a `.cu` and our headers, and what it declares.

A `.cu` of csrc/ says on a line of its own for which architectures it is:

    // arch: sm_90a sm_100a sm_103a sm_120a

`#include "common/x.cuh"` is resolved relative to csrc alone, from headers too, and stands once, where it is first met.
There are no other headers. What is hashed is exactly what is compiled: the text after all of this.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from dsv4.errors import KernelError
from dsv4.kernels.architectures import ARCHITECTURES

CSRC: Final = Path(__file__).parent / "csrc"
FLAGS: Final[dict[str, object]] = {  # of cuda.core.ProgramOptions
    "std": "c++17",
    "fma": False,  # a multiply and an add are fused where the text says fmaf, as on the host, and nowhere else
    "ptxas_options": "-v",  # registers and spills, in the log
    "no_cache": True,  # NVRTC's own, of which we know neither the key nor the locks
}
_INCLUDE: Final = re.compile(r'\s*#\s*include\s*"([^"]+)"')
_DECLARED: Final = re.compile(r"^// arch:(.*)$", re.MULTILINE)


class Source(NamedTuple):
    """file: below csrc. text: with our headers in it. architectures: those that it declares, at least one."""

    file: str
    text: str
    architectures: tuple[str, ...]

    def digest(self, architecture: str) -> str:
        """SHA-256 of all that decides the cubin but the compiler: name, text, flags and architecture."""
        return hashlib.sha256(json.dumps([self.file, self.text, architecture, FLAGS]).encode()).hexdigest()


def read(file: str, folder: Path = CSRC) -> Source:
    """One source. KernelError if it or a header is missing or outside `folder`, or if the declaration is."""
    text = "\n".join(_lines(file, folder, set(), file)) + "\n"
    declared = _DECLARED.search((folder / file).read_text(encoding="utf-8"))
    names = tuple(declared[1].split()) if declared else ()
    if not names or not set(names) <= ARCHITECTURES.keys():
        wanted = f"a line '// arch: …' with some of {', '.join(ARCHITECTURES)}"
        raise KernelError(f"kernel source {file}", got=" ".join(names) or "no declaration", wanted=wanted)
    return Source(file, text, names)


def sources(folder: Path = CSRC) -> list[Source]:
    """All of them, by name."""
    return [read(path.relative_to(folder).as_posix(), folder) for path in sorted(folder.rglob("*.cu"))]


def _lines(file: str, folder: Path, seen: set[str], wanted_by: str) -> Iterator[str]:
    """The lines of a file, headers in place, with the `#line`s by which the compiler names what we wrote."""
    path = (folder / file).resolve()
    if not path.is_relative_to(folder.resolve()) or not path.is_file():
        raise KernelError(f"kernel source {wanted_by} wants {file}", got="no such file", wanted="one below csrc/")
    yield f'#line 1 "{file}"'
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        include = _INCLUDE.match(line)
        if include and include[1] not in seen:
            seen.add(include[1])
            yield from _lines(include[1], folder, seen, file)
            yield f'#line {number + 1} "{file}"'
        else:
            yield "" if include or line.split() == ["#pragma", "once"] else line
