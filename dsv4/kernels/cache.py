"""The cache of compiled kernels: one file an entry, in one folder, and nobody ever waits for anybody.

An entry is written under a name of its own and renamed into place, so that it is there whole or not at all. There are
no locks: two processes that need the same kernel both compile it, and the later rename puts the same bytes in place of
the same bytes. What cannot be read whole is built again; what cannot be written is used from memory, and a line on
stderr says so once.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import sys
import tempfile
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Final, NamedTuple

from dsv4 import settings
from dsv4.kernels.entry import Entry, pack, unpack
from dsv4.kernels.source import Source

_SUFFIX: Final = ".cubin"
_UNFINISHED: Final = ".tmp-"
# Writing takes milliseconds. Who is slower than this, stopped by a debugger say, finds its file gone when it wants to
# rename it, and goes on from memory like everyone who cannot write.
_STALE_S: Final = 60


def default_folder(asked: settings.Settings | None = None) -> Path | None:
    """Where entries are kept: below DSV4_CACHE, or dsv4/ in the user's folder for caches; None if there is no home."""
    found = asked or settings.load(report=lambda line: None)  # who starts the program has reported already
    if found.cache is not None:
        return found.cache / "kernels"
    user = user_cache(found)
    return user / "dsv4" / "kernels" if user else None


def user_cache(asked: settings.Settings) -> Path | None:
    """The user's folder for caches, or None for a user without a home."""
    try:
        return asked.user_cache or Path.home() / ".cache"
    except RuntimeError:
        return None


def entry_name(source: Source, architecture: str, compiler: str) -> str:
    """The file of an entry: readable in front, and behind it all that the entry's bytes depend on."""
    key = hashlib.sha256(f"{source.digest(architecture)} {compiler}".encode()).hexdigest()
    return f"{Path(source.file).stem}.{architecture}.{key[:40]}{_SUFFIX}"


def load(folder: Path, file: str) -> Entry | None:
    """A sound entry, or None: not there, or, which stderr is told, not readable or damaged."""
    try:
        return unpack((folder / file).read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        say(f"{folder / file} cannot be used ({_words(error)}); the kernel is built again")
        return None


def store(folder: Path, file: str, entry: Entry) -> bool:
    """Keep an entry. False if the place does not let us, and stderr is told once a process."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _write(folder / file, pack(entry))
    except OSError as error:
        say(f"{folder} takes no kernels ({_words(error)}); those built here are used from memory")
        return False
    sweep(folder)
    return True


def _write(path: Path, data: bytes) -> None:
    unfinished = path.with_name(f"{_UNFINISHED}{secrets.token_hex(8)}")
    try:
        with unfinished.open("xb") as file:  # not by tempfile, whose files nobody else may read
            file.write(data)
        unfinished.replace(path)
    except BaseException:
        with suppress(OSError):
            unfinished.unlink()
        raise


def sweep(folder: Path) -> int:
    """Remove what writers that died left behind, and say how many files that were."""
    try:
        now = clock(folder)
    except OSError:
        return 0
    old = [path for path in _unfinished(folder) if now - _written(path, now) > _STALE_S]
    for path in old:
        with suppress(OSError):
            path.unlink()
    return len(old)


def clock(folder: Path) -> float:
    """The time by the file system's own clock, which on a network need not be ours; OSError if it takes no file."""
    with tempfile.TemporaryFile(prefix=_UNFINISHED, dir=folder) as file:
        file.write(b"\0" * 4096)
        file.flush()
        return os.fstat(file.fileno()).st_mtime


def _unfinished(folder: Path) -> list[Path]:
    return sorted(folder.glob(f"{_UNFINISHED}*"))


def _written(path: Path, otherwise: float) -> float:
    try:
        return path.stat().st_mtime
    except OSError:
        return otherwise


class Health(NamedTuple):
    """entries, nbytes: the sound ones. damaged: those that cannot be read. unfinished: files of writers that died.

    folder: None where there is no home. trouble: why nothing can be stored there, or None.
    """

    folder: Path | None
    entries: int = 0
    nbytes: int = 0
    damaged: tuple[Path, ...] = ()
    unfinished: tuple[Path, ...] = ()
    trouble: str | None = None


def health(folder: Path | None) -> Health:
    """Reads every entry and tries to write."""
    if folder is None:
        return Health(None, trouble="there is no home directory; DSV4_CACHE names a place")
    sizes = {path: _size_if_sound(path) for path in sorted(folder.glob(f"*{_SUFFIX}"))}
    sound = [size for size in sizes.values() if size is not None]
    damaged = tuple(path for path, size in sizes.items() if size is None)
    return Health(folder, len(sound), sum(sound), damaged, tuple(_unfinished(folder)), _trouble(folder))


def _size_if_sound(path: Path) -> int | None:
    try:
        data = path.read_bytes()
        unpack(data)
        return len(data)
    except (OSError, ValueError):
        return None


def _trouble(folder: Path) -> str | None:
    """Why nothing can be written there, or None. A folder that is not there yet is not made for that."""
    place = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    try:
        clock(place)
        return None
    except OSError as error:
        return f"{place}: {_words(error)}"


def _words(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)


@cache
def say(line: str) -> None:
    """One line on stderr; the same line a second time is not printed."""
    print(f"dsv4: {line}", file=sys.stderr)
