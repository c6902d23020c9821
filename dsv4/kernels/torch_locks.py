"""Lock files of torch's extension builder whose owner died: later builds of that extension wait for them for ever.

torch makes an empty file `lock` beside the extension, holds it open while it builds, and removes it. No other process
opens it: the others look whether it exists. So a lock that no process holds open has no owner, whatever its age. On a
disk of the network the owner may be on another host, whose processes are not seen from here: there it also has to be
ten minutes old. Processes in other containers are not seen either.
"""

from __future__ import annotations

import os
import re
import stat
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Final, NamedTuple

from dsv4.kernels.cache import clock, user_cache
from dsv4.settings import Settings

OLD_S: Final = 600
# File systems whose files other hosts may hold open.
_SHARED: Final = re.compile(
    r"(nfs|cifs|smb|lustre|gpfs|beegfs|ceph|gluster|fuse\.|9p|afs|orangefs|pvfs|wekafs|virtiofs|ocfs2|gfs2)"
)


class Lock(NamedTuple):
    """holders: processes that have it open. unseen: processes of its owner that do not show us what they hold.

    shared: the type of a file system that other hosts may use, or "". age_s: by that file system's own clock.
    """

    path: Path
    holders: tuple[int, ...]
    unseen: tuple[int, ...]
    shared: str
    age_s: float

    @property
    def kept(self) -> str | None:
        """Why it has to stay, or None: its owner is gone."""
        if self.holders:
            return f"held open by process {', '.join(map(str, self.holders))}"
        if self.unseen:
            return f"may be held by process {self.unseen[0]}, which does not show its files to this user"
        if self.shared and self.age_s < OLD_S:
            return f"on {self.shared}, where another host may hold it, and only {self.age_s:.0f} s old"
        return None


def folder(asked: Settings) -> Path | None:
    """Where torch builds extensions, or None without a home."""
    home = user_cache(asked)
    return asked.torch_extensions or (home / "torch_extensions" if home else None)


def locks(root: Path) -> list[Lock]:
    """Every lock file below `root`."""
    return [_lock(path) for path in sorted(_lock_files(root))]


def remove(lock: Lock) -> bool:
    """Remove a lock whose owner is gone, having looked once more; False if it is not, or if it cannot be removed."""
    try:
        if _lock(lock.path).kept is None:
            lock.path.unlink()
            return True
    except OSError:
        pass
    return not lock.path.exists()


def _lock_files(root: Path) -> Iterator[Path]:
    """Regular, empty, named as torch names them."""
    for directory, _, files in os.walk(root):
        path = Path(directory, "lock")
        if path.name in files:
            try:
                found = path.lstat()
            except OSError:  # its owner has just removed it
                continue
            if stat.S_ISREG(found.st_mode) and found.st_size == 0:
                yield path


def _lock(path: Path) -> Lock:
    found = path.stat()
    holders, unseen = _processes(path, found)
    return Lock(path, holders, unseen, _shared(path), _now(path.parent) - found.st_mtime)


def _now(folder: Path) -> float:
    try:
        return clock(folder)
    except OSError:
        return time.time()


def _processes(path: Path, file: os.stat_result) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Those that have the file open, and those of its owner that cannot be asked."""
    holders, unseen = [], []
    if not Path("/proc/self/fd").exists():  # a system that does not tell
        return (), (1,)
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        try:
            if any(_same(link, path, file) for link in (process / "fd").iterdir()):
                holders.append(int(process.name))
        except PermissionError:
            if _owner(process) == file.st_uid:
                unseen.append(int(process.name))
        except OSError:  # it ended
            continue
    return tuple(sorted(holders)), tuple(sorted(unseen))


def _same(link: Path, path: Path, file: os.stat_result) -> bool:
    """Whether a descriptor is of this file, by number or, where an overlay has two numbers for it, by name."""
    try:
        if Path(os.readlink(link)).name != path.name:
            return False
        found = link.stat()
    except OSError:  # closed meanwhile
        return False
    same = (found.st_dev, found.st_ino) == (file.st_dev, file.st_ino)
    return same or os.readlink(link) == str(path.resolve())


def _owner(process: Path) -> int | None:
    try:
        return process.stat().st_uid
    except OSError:
        return None


def _shared(path: Path) -> str:
    """The type of the file system that `path` is on, if other hosts may be on it too."""
    try:
        mounts = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return ""
    real, best, kind = path.resolve(), -1, ""
    for mount in mounts:  # a later mount on the same place covers the earlier
        left, _, right = mount.partition(" - ")
        place = re.sub(r"\\([0-7]{3})", lambda octal: chr(int(octal[1], 8)), left.split()[4])
        if real.is_relative_to(place) and len(place) >= best:
            best, kind = len(place), right.split()[0]
    return kind if _SHARED.match(kind) else ""
