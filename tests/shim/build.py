"""A .cu as a shared library of the host, or as a program under ThreadSanitizer; kept among temporary files."""

from __future__ import annotations

import atexit
import ctypes
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import dsv4

CSRC = Path(dsv4.__file__).parent / "kernels" / "csrc"
_HERE = Path(__file__).parent
_unchanged: set[Path] = set()  # copies of the package's kernels as they are
_FLAGS = ("-std=c++20", "-ffp-contract=off", "-fno-strict-aliasing", "-fcf-protection=none", "-fPIC", "-w")
_LINES = ("-g1", "-gdwarf-4")  # version 5 confuses addr2line about the file
# Undefined behaviour becomes a trap that the launcher catches: no run-time library has to be loaded into Python.
_CHECKED = (
    "-shared",
    "-fsanitize=bounds-strict,signed-integer-overflow,shift,alignment,float-cast-overflow",
    "-fsanitize-undefined-trap-on-error",
)
_THREADED = ("-DSIMT_THREADS", "-fsanitize=thread", "-pthread")
_KERNEL = re.compile(
    r'extern\s+"C"\s+__global__\s+(?:void\s+)?(?:__launch_bounds__\s*\((?P<bounds>[^()]*)\)\s*)?(?:void\s+)?(?P<name>\w+)\s*\('
)


def kernels(source: str, csrc: Path = CSRC) -> dict[str, str]:
    """Name -> most threads a block (a C++ expression) of every `extern "C" __global__` function, macros expanded."""
    command = ["g++", "-E", "-P", "-x", "c++", "-I", str(csrc), str(csrc / source)]
    text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    return {found["name"]: (found["bounds"] or "1024").split(",")[0] for found in _KERNEL.finditer(text)}


def build(source: str, csrc: Path = CSRC, threads: bool = False, kernel: str = "") -> Path:
    """Compile csrc/source, unless that was done before. RuntimeError with the compiler's words.

    A copy of the package's kernels is there to run a few cases: of it `kernel` alone is compiled. Where nothing but
    machinery is played these are many; a copy with a bug runs one, and soon.
    """
    own = csrc == CSRC
    level = "-O1" if own else "-O2" if csrc in _unchanged else "-O0"
    flags = (level, *_FLAGS, *_LINES, *(_THREADED if threads else _CHECKED))
    kernel = "" if own else kernel
    path = _place(source, csrc, (*flags, kernel))
    if path.exists():
        return path
    folders = [part for folder in (_parsed(flags), _HERE, csrc) for part in ("-I", str(folder))]
    text = _unit(source, csrc, kernel)
    _made(path, lambda unit, made: ["g++", *flags, *folders, unit, "-o", made, "-ldl"], text, source)
    return path


@cache
def _parsed(flags: tuple[str, ...]) -> Path:
    """A folder with simt.hpp as the compiler has read it, for these flags: half of the work on a small kernel."""
    path = _place("simt.hpp", _HERE, flags).with_suffix(".parsed") / "simt.hpp.gch"
    if not path.exists():
        head = f'#include "{_HERE / "simt.hpp"}"\n'
        _made(path, lambda unit, made: ["g++", *flags, "-x", "c++-header", unit, "-o", made], head, "simt.hpp")
    return path.parent


def _made(path: Path, command: Callable[[str, str], list[str]], text: str, what: str) -> None:
    """Compile `text` to `path`, whoever else does the same."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as own:
        unit, made = Path(own) / "unit.cpp", Path(own) / "made"
        unit.write_text(text, encoding="utf-8")
        done = subprocess.run(command(str(unit), str(made)), capture_output=True, text=True)
        if done.returncode:
            raise RuntimeError(f"g++ cannot compile {what}:\n{done.stderr[:4000]}")
        os.replace(made, path)


def _unit(source: str, csrc: Path, kernel: str) -> str:
    """The text that is compiled: shim, kernels, and the table by which they are found. `kernel`: of it alone."""
    found = {name: most for name, most in kernels(source, csrc).items() if kernel in ("", name)}
    enter = [f"static void enter_{name}(void** arguments) {{ simt::call(::{name}, arguments); }}" for name in found]
    rows = [f'{{"{name}", enter_{name}, simt::letters(::{name}), {most}}},' for name, most in found.items()]
    head = [f'#include "{name}"' for name in ("simt.hpp", csrc / source, "entry.hpp")]
    return "\n".join((*head, *enter, "const simt::Entry simt::entries[] = {", *rows, "{}};\n"))


@cache  # sources do not change once they are built, and are launched thousands of times
def _place(source: str, csrc: Path, flags: tuple[str, ...]) -> Path:
    parts = [*sorted(_HERE.glob("*.hpp")), csrc / source, *sorted((csrc / "common").glob("*.cuh"))]
    state = hashlib.sha256(repr(flags).encode())
    for part in parts:
        state.update(part.read_bytes())
    name = f"{Path(source).stem}-{state.hexdigest()[:24]}"
    return Path(tempfile.gettempdir()) / f"dsv4-shim-{os.getuid()}" / name


@cache
def library(path: Path) -> Any:
    """The library at `path`, its functions declared."""
    from tests.shim import _Entry

    lib = ctypes.CDLL(str(path))
    lib.simt_find.argtypes, lib.simt_find.restype = [ctypes.c_char_p], ctypes.POINTER(_Entry)
    lib.simt_message.restype = ctypes.c_char_p
    lib.simt_fenced.argtypes, lib.simt_fenced.restype = [ctypes.c_size_t], ctypes.c_void_p
    lib.simt_unfence.argtypes, lib.simt_unfence.restype = [ctypes.c_void_p, ctypes.c_size_t], ctypes.c_size_t
    lib.simt_launch.argtypes = [ctypes.c_void_p]
    return lib


def source_line(path: Path, message: str) -> str:
    """The message with the source lines that its code offset stands for."""
    found = re.search(r"at (0x[0-9a-f]+)", message)
    if not found:
        return message
    command = ["addr2line", "-i", "-s", "-e", str(path), found[1]]
    lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    return f"{message} ({' < '.join(line.split()[0] for line in lines if '?' not in line)})"


@cache
def on_hopper(csrc: Path = CSRC) -> Path:
    """A copy of these sources in which tests/shim/hopper plays barriers, copy engines and tensor cores."""
    copy = Path(shutil.copytree(csrc, Path(tempfile.mkdtemp(prefix="dsv4-hopper-")) / "csrc"))
    atexit.register(shutil.rmtree, copy.parent, ignore_errors=True)
    for header in (_HERE / "hopper").iterdir():
        shutil.copy(header, copy / "common" / header.name)
    for source in copy.rglob("*.cu*"):
        source.write_text(source.read_text().replace("DYNAMIC_SHARED(__align__(1024) u8,", "DYNAMIC_SHARED(u8,"))
    if csrc == CSRC:
        _unchanged.add(copy)
    return copy
