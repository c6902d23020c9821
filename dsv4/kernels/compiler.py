"""NVRTC through cuda-core: a source and an architecture become a cubin. It needs no GPU, driver or toolkit."""

from __future__ import annotations

import io
from functools import cache
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsv4.errors import KernelError
from dsv4.kernels.entry import Entry
from dsv4.kernels.figures import figures, remarks
from dsv4.kernels.source import FLAGS, Source

INSTALL: Final = 'pip install "dsv4[cuda]"'


class Compiler(NamedTuple):
    """version: that of NVRTC and the size of its library, since two builds may share a number. library: its file."""

    version: str
    library: str


@cache
def compiler() -> Compiler:
    """The NVRTC that is here; KernelError if there is none, or no cuda-core."""
    try:
        from cuda.bindings import nvrtc
        from cuda.pathfinder import load_nvidia_dynamic_lib

        library = load_nvidia_dynamic_lib("nvrtc").abs_path
        error, major, minor = nvrtc.nvrtcVersion()
    except ImportError as missing:
        raise _cannot(f"no {missing.name}") from None
    except RuntimeError as missing:  # the finder's way to say that it found no library
        raise _cannot(str(missing).strip().splitlines()[0]) from None
    assert not int(error), error
    size = Path(library).stat().st_size if library else 0
    return Compiler(f"{major}.{minor}-{size}", library or "")


def _cannot(got: str) -> KernelError:
    return KernelError("kernels cannot be compiled here", got=got, wanted="cuda-core and NVRTC", do=INSTALL)


def compile_source(source: Source, architecture: str) -> Entry:
    """The compiled source; KernelError with the compiler's words if it has none for this text."""
    version = compiler().version
    code, log = _run(source, architecture)
    try:
        told = figures(log, code)
    except ValueError as error:
        what = f"kernel source {source.file} for {architecture}: the log of NVRTC {version} cannot be read"
        raise KernelError(what, got=error) from None
    return Entry(source.file, architecture, source.digest(architecture), version, told, remarks(log), code)


def _run(source: Source, architecture: str) -> tuple[bytes, str]:
    """The cubin and what NVRTC and ptxas said."""
    program, options = _core()
    log = io.StringIO()
    try:
        asked = options(name=source.file, arch=architecture, **FLAGS)
        return bytes(program(source.text, "c++", asked).compile("cubin", logs=log).code), log.getvalue()
    except Exception as error:  # cuda-core has no public name for its errors
        raise KernelError(f"kernel source {source.file} does not compile for {architecture}: {error}") from error


@cache
def _core() -> tuple[Any, Any]:
    try:
        from cuda.core import Program, ProgramOptions
    except ImportError as missing:
        raise _cannot(f"no {missing.name}") from None
    return Program, ProgramOptions
