"""What stands between a machine and our kernels: driver, devices, compiler, caches, and locks that other tools left."""

from __future__ import annotations

import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Final, NamedTuple

import torch

from dsv4 import __version__, settings
from dsv4.errors import KernelError
from dsv4.kernels import prebuilt, torch_locks
from dsv4.kernels.architectures import architecture
from dsv4.kernels.build import Places
from dsv4.kernels.cache import default_folder, health, sweep
from dsv4.kernels.compiler import INSTALL, compiler
from dsv4.kernels.driver import call
from dsv4.kernels.source import sources

OK: Final = "ok"
NOTE: Final = "note"  # good to know
WRONG: Final = "wrong"  # needs somebody
OLDEST_CUDA: Final = 13000  # that a driver must know to load what NVRTC 13 makes
_DRIVER: Final = Path("/proc/driver/nvidia/version")


class Finding(NamedTuple):
    """state: OK, NOTE or WRONG. do: what helps, or ""."""

    name: str
    state: str
    found: str
    do: str = ""


def examine(fix: bool) -> list[Finding]:
    """Everything, mending what can be mended if `fix`."""
    asked = settings.load()
    where = Places(cache=default_folder(asked))
    gpu = torch.cuda.is_available()
    return [
        *_versions(),
        *_driver(gpu),
        *_devices(gpu),
        *_compiler(gpu, where),
        *_prebuilt(where),
        *_cache(fix, where),
        *_locks(fix, asked),
    ]


def _versions() -> Iterator[Finding]:
    yield Finding("dsv4", OK, f"{__version__}, Python {platform.python_version()}, {sys.platform}")
    yield Finding("torch", OK, f"{torch.__version__}, CUDA {torch.version.cuda or 'not built in'}")


def _driver(gpu: bool) -> Iterator[Finding]:
    """The NVIDIA driver, and whether it, the compiler and torch belong together."""
    loaded = _DRIVER.read_text() if _DRIVER.exists() else ""
    number = re.search(r"\b\d+\.\d+(\.\d+)?\b", loaded)
    try:
        cuda = int(call("cuDriverGetVersion"))
    except KernelError:
        cuda = 0
    parts = (number[0] if number else "", f"for CUDA {cuda // 1000}.{cuda % 1000 // 10}" if cuda else "")
    shown = " ".join(filter(None, parts))
    if not (shown or gpu):
        yield Finding("driver", NOTE, "no NVIDIA driver", "without a GPU the references run on the CPU")
    elif cuda and cuda < OLDEST_CUDA:
        yield Finding("driver", WRONG, shown, "update it to one for CUDA 13 (580 or later)")
    else:
        yield Finding("driver", OK, shown or "there")
    if shown and not gpu:
        built = "is built without CUDA" if torch.version.cuda is None else "sees no GPU"
        yield Finding("torch and the driver", WRONG, f"torch {built}", "install a torch with CUDA, or show it a device")


def _devices(gpu: bool) -> Iterator[Finding]:
    for index in range(torch.cuda.device_count() if gpu else 0):
        found = torch.cuda.get_device_properties(index)
        shown = f"{found.name}, {found.total_memory / 2**30:.0f} GiB, {found.multi_processor_count} multiprocessors"
        try:
            yield Finding(f"cuda:{index}", OK, f"{shown}, {architecture((found.major, found.minor))}")
        except KernelError as error:
            yield Finding(f"cuda:{index}", NOTE, f"{shown}; {error}")


def _compiler(gpu: bool, where: Places) -> Iterator[Finding]:
    """A GPU needs the bindings to launch at all; the compiler, only where no ready-made cubin serves."""
    packages = {name: _version(name) for name in ("cuda-core", "cuda-bindings")}
    missing = [name for name, found in packages.items() if found is None]
    if missing:
        yield Finding("cuda-core", WRONG if gpu else NOTE, f"no {' and no '.join(missing)}", INSTALL)
    else:
        yield Finding("cuda-core", OK, ", ".join(f"{name} {found}" for name, found in packages.items()))
    try:
        found = compiler()
        yield Finding("NVRTC", OK, f"{found.version.partition('-')[0]}, {found.library or 'built in'}")
    except KernelError as error:
        ready, wanted = _ready(where)
        incomplete = gpu and ready < wanted
        yield Finding("NVRTC", WRONG if incomplete else NOTE, str(error.got), INSTALL)
    if nvcc := shutil.which("nvcc"):
        said = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False).stdout
        release = re.search(r"release ([\d.]+)", said)
        yield Finding("toolkit", NOTE, f"{release[1] if release else 'unknown'}, {nvcc}; not needed")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _ready(where: Places) -> tuple[int, int]:
    """Ready-made cubins that fit the sources, and how many there might be."""
    pairs = [(source, name) for source in sources(where.csrc) for name in source.architectures]
    return sum(prebuilt.load(*pair, where.prebuilt) is not None for pair in pairs), len(pairs)


def _prebuilt(where: Places) -> Iterator[Finding]:
    ready, wanted = _ready(where)
    lying = len(list(where.prebuilt.glob("*.cubin")))
    if not lying:
        yield Finding("ready-made kernels", NOTE, f"none of {wanted}", "they are compiled when first used")
    elif ready < lying:
        odd = f"{ready} of {wanted}; {lying - ready} are damaged or of other sources than these"
        yield Finding("ready-made kernels", WRONG, odd, "install dsv4 again")
    else:
        yield Finding("ready-made kernels", OK, f"{ready} of {wanted}")


def _cache(fix: bool, where: Places) -> Iterator[Finding]:
    found = health(where.cache)
    if found.trouble:
        do = "kernels are compiled at every start; name a place that can be written with DSV4_CACHE"
        yield Finding("kernel cache", WRONG, f"cannot be written: {found.trouble}", do)
    else:
        shown = f"{found.folder}: {found.entries} entries, {found.nbytes / 2**20:.1f} MiB"
        yield Finding("kernel cache", OK, shown)
    for path in found.damaged:
        gone = fix and _unlinked(path)
        yield _mended("damaged entry", str(path), gone, "it is built again when needed; --fix removes it")
    if found.folder and found.unfinished:
        swept = f"; {sweep(found.folder)} removed" if fix else ""
        shown = f"{len(found.unfinished)}, of writers that are at work or died{swept}"
        yield Finding("unfinished entries", NOTE, shown, "" if fix else "the next that is stored sweeps old ones away")


def _locks(fix: bool, asked: settings.Settings) -> Iterator[Finding]:
    root = torch_locks.folder(asked)
    found = torch_locks.locks(root) if root else []
    if not found:
        yield Finding("torch's extension locks", OK, f"none below {root}" if root else "no home directory")
    for lock in found:
        if lock.kept:
            yield Finding("torch's extension lock", NOTE, f"{lock.path}: {lock.kept}")
        else:
            gone = fix and torch_locks.remove(lock)
            shown = f"{lock.path}: its owner is gone, {lock.age_s:.0f} s after it was made"
            yield _mended("torch's extension lock", shown, gone, "builds of it wait for ever; --fix removes the lock")


def _mended(name: str, found: str, gone: bool, do: str) -> Finding:
    return Finding(name, OK, f"{found}; removed") if gone else Finding(name, WRONG, found, do)


def _unlinked(path: Path) -> bool:
    try:
        path.unlink(missing_ok=True)
        return True
    except OSError:
        return False
