"""The cache of compiled kernels: whoever dies, nobody waits; whatever is on the disk, the kernel is the right one."""

from __future__ import annotations

import io
import os
import random
import resource
import signal
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import redirect_stderr, suppress
from pathlib import Path

import pytest

from dsv4.kernels import cache
from dsv4.kernels.build import Found, Places, find
from dsv4.kernels.cache import default_folder, health, load, store, sweep
from dsv4.kernels.compiler import compiler
from dsv4.kernels.entry import Entry, pack, unpack
from dsv4.settings import Settings
from tests.kernel_support import ended_well, forget, forked, places

UNDISTURBED_S = (
    30.0  # a build takes a quarter of a second, on a busy machine some; who waits for a ghost waits for ever
)


@pytest.fixture(autouse=True)
def _fresh() -> None:
    forget()
    compiler()  # the library is loaded before a process is copied or loses its rights


@pytest.fixture(scope="module")
def entry(tmp_path_factory: pytest.TempPathFactory) -> Entry:
    """What copy.cu comes to for sm_90a."""
    return find("copy.cu", "sm_90a", places(tmp_path_factory.mktemp("sound"))).entry


def folder_of(where: Places) -> Path:
    assert where.cache is not None
    return where.cache


def build(where: Places, entry: Entry) -> Found:
    """A build by a process that remembers nothing; it has to come to `entry`."""
    forget()
    found = find("copy.cu", "sm_90a", where)
    assert found.entry == entry
    return found


# --- killed --------------------------------------------------------------------------------------------------------


def kill_one(work: Callable[[], object], begun: Callable[[], bool], after: float) -> None:
    """SIGKILL for a process that does `work`, a time after it has begun with it."""
    child = forked(work)
    until = time.monotonic() + 60
    while not begun() and time.monotonic() < until:
        time.sleep(0.001)
    time.sleep(after)
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)


@pytest.fixture(scope="module")
def large(entry: Entry) -> bytes:
    """A sound entry of some megabytes."""
    return pack(entry._replace(cubin=random.Random(0).randbytes(4 << 20)))


def kill_a_build(where: Places, moments: random.Random) -> None:
    kill_one(lambda: find("copy.cu", "sm_90a", where), lambda: True, moments.uniform(0, 0.3))


def kill_a_write(where: Places, entry: Entry, packed: bytes, moments: random.Random) -> None:
    """The one that is killed stores entries without end. They are packed already, so most kills fall into a write."""
    folder = folder_of(where)

    def work() -> None:
        cache.pack = lambda entry: packed  # in this copy of the process alone
        for number in range(10**6):
            store(folder, f"other.{number % 4}.cubin", entry)

    for path in folder.glob("other.*"):
        path.unlink()
    kill_one(work, lambda: any(folder.glob("other.*")), moments.uniform(0, 0.02))


@pytest.mark.parametrize("kills", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_killed_build_makes_nobody_wait(kills: int, tmp_path: Path, entry: Entry, large: bytes, seed: int) -> None:
    """SIGKILL at random moments of a build, and of a write; then a build, timed, from what was left behind."""
    where, moments = places(tmp_path), random.Random(seed)
    for number in range(kills):
        for path in folder_of(where).glob("copy.*"):
            path.unlink()
        if number % 2:
            kill_a_build(where, moments)
        else:
            kill_a_write(where, entry, large, moments)
        assert ended_well(forked(lambda: build(where, entry)), UNDISTURBED_S)
        assert build(where, entry).origin == "cache"
    found = health(where.cache)
    assert found.damaged == ()
    assert found.entries <= 5


def test_a_killed_write_leaves_an_unfinished_file_and_no_damaged_entry(
    tmp_path: Path, entry: Entry, large: bytes, seed: int
) -> None:
    """So that the test above tests something: of these kills some fall between the first byte and the rename."""
    where = places(tmp_path)
    for number in range(50):
        kill_a_write(where, entry, large, random.Random(seed + number))
        if health(where.cache).unfinished:
            break
    assert health(where.cache).unfinished
    assert health(where.cache).damaged == ()


def test_a_young_unfinished_file_is_left_to_its_writer(tmp_path: Path, entry: Entry) -> None:
    young, old = tmp_path / ".tmp-young", tmp_path / ".tmp-old"
    for path in (young, old):
        path.write_bytes(b"")
    os.utime(old, (time.time() - 61, time.time() - 61))
    assert sweep(tmp_path) == 1
    assert young.exists()
    assert not old.exists()


def test_whoever_stores_sweeps(tmp_path: Path, entry: Entry) -> None:
    left = tmp_path / ".tmp-left"
    left.write_bytes(b"")
    os.utime(left, (0, 0))
    assert store(tmp_path, "one.cubin", entry)
    assert [path.name for path in tmp_path.iterdir()] == ["one.cubin"]


def test_a_writer_whose_file_was_swept_goes_on(
    tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """Stopped for a minute between write and rename, say."""
    replace = Path.replace

    def swept(self: Path, target: Path) -> Path:
        self.unlink()
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", swept)
    assert build(places(tmp_path), entry).origin == "compiled"
    assert "takes no kernels (No such file or directory)" in capfd.readouterr().err


# --- together ------------------------------------------------------------------------------------------------------


def test_eight_builders_at_once(tmp_path: Path, entry: Entry) -> None:
    where = places(tmp_path)
    children = [forked(lambda: build(where, entry)) for _ in range(8)]
    assert [ended_well(child, 8 * UNDISTURBED_S) for child in children] == [True] * 8
    found = health(where.cache)
    assert (found.entries, found.damaged, found.unfinished) == (1, (), ())
    assert build(where, entry).origin == "cache"


def test_readers_never_see_half_an_entry(tmp_path: Path, entry: Entry) -> None:
    """One process writes the same name over and over while this one reads it."""
    big, folder = entry._replace(cubin=bytes(1 << 20)), tmp_path
    store(folder, "one.cubin", big)
    child = forked(lambda: [store(folder, "one.cubin", big) for _ in range(10**6)])
    try:
        for _ in range(200):
            assert load(folder, "one.cubin") == big
    finally:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


# --- damaged -------------------------------------------------------------------------------------------------------


def damages(data: bytes) -> Iterator[tuple[str, bytes]]:
    for keep in (0, 1, 12, 13, 60, 78, 100, len(data) // 2, len(data) - 1):
        yield f"cut to {keep}", data[:keep]
    for place in range(0, len(data), 97):
        yield f"bit of byte {place}", data[:place] + bytes([data[place] ^ 1]) + data[place + 1 :]
    yield "zeros", bytes(len(data))
    yield "more", data + b"\0"
    yield "another format", data.replace(b"cubin 1", b"cubin 2", 1)


def test_no_damage_goes_unnoticed(entry: Entry) -> None:
    for what, data in damages(pack(entry)):
        try:
            unpack(data)
        except ValueError:
            continue
        pytest.fail(f"{what} was not noticed")


@pytest.mark.parametrize("damage", ["cut to 0", "cut to 100", "bit of byte 0", "zeros"])
def test_a_damaged_entry_is_said_and_built_again(
    damage: str, tmp_path: Path, entry: Entry, capfd: pytest.CaptureFixture[str]
) -> None:
    where = places(tmp_path)
    build(where, entry)
    (path,) = folder_of(where).iterdir()
    path.write_bytes(dict(damages(path.read_bytes()))[damage])
    assert health(where.cache).damaged == (path,)
    assert build(where, entry).origin == "compiled"
    err = capfd.readouterr().err
    assert err.count("\n") == 1
    assert path.name in err
    assert build(where, entry).origin == "cache"
    assert health(where.cache).damaged == ()


def test_an_entry_that_is_a_directory_hurts_nobody(tmp_path: Path, entry: Entry) -> None:
    where = places(tmp_path)
    build(where, entry)
    (path,) = folder_of(where).iterdir()
    path.unlink()
    path.mkdir()
    assert build(where, entry).origin == "compiled"


# --- no room, no right, no home ------------------------------------------------------------------------------------


def unwritable(where: Places, entry: Entry, words: str) -> None:
    """In a process that cannot write: the right kernel, again and again, and one line on stderr."""
    with redirect_stderr(io.StringIO()) as said:
        assert build(where, entry).origin == "compiled"
        assert find("copy.cu", "sm_90a", where).entry == entry
        assert find("copy.cu", "sm_120a", where).origin == "compiled"
    wanted = f"dsv4: {where.cache} takes no kernels ({words}); those built here are used from memory\n"
    assert said.getvalue() == wanted


def no_long_files(nbytes: int) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (nbytes, resource.getrlimit(resource.RLIMIT_FSIZE)[1]))


@pytest.mark.parametrize("nbytes", [0, 100])
def test_files_that_may_not_grow_leave_the_kernel_in_memory(nbytes: int, tmp_path: Path, entry: Entry) -> None:
    where = places(tmp_path)

    def work() -> None:
        no_long_files(nbytes)
        unwritable(where, entry, "File too large")

    assert ended_well(forked(work))
    assert list(folder_of(where).iterdir()) == []


def test_a_full_disk_leaves_the_kernel_in_memory(tmp_path: Path, entry: Entry) -> None:
    """A file system of 16 KiB, filled. Who may not mount one has the test above alone."""
    where = places(tmp_path)
    folder = folder_of(where)
    folder.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=16k", "tmpfs", str(folder)]
    if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
        return
    try:
        with suppress(OSError), (folder / "filler").open("wb") as file:
            file.write(bytes(1 << 20))
        assert ended_well(forked(lambda: unwritable(where, entry, "No space left on device")))
        assert os.listdir(folder) == ["filler"]
        assert "No space left on device" in str(health(folder).trouble)
        (folder / "filler").unlink()
        assert build(where, entry).origin == "compiled"
        assert build(where, entry).origin == "cache"
    finally:
        subprocess.run(["umount", str(folder)], check=True)


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """A folder that every user can reach, which those of pytest are not."""
    with tempfile.TemporaryDirectory() as made:
        Path(made).chmod(0o755)
        yield Path(made)


def give_up_root() -> None:
    if os.geteuid() == 0:
        os.setuid(65534)


def test_without_the_right_to_write_entries_are_read_and_others_used_from_memory(
    open_folder: Path, entry: Entry
) -> None:
    where = places(open_folder)
    build(where, entry)
    folder_of(where).chmod(0o555)
    names = sorted(os.listdir(folder_of(where)))

    def work() -> None:
        give_up_root()
        with redirect_stderr(io.StringIO()) as said:
            assert build(where, entry).origin == "cache"
            assert find("copy.cu", "sm_120a", where).origin == "compiled"
            assert find("copy.cu", "sm_100a", where).origin == "compiled"
        assert said.getvalue().startswith(f"dsv4: {where.cache} takes no kernels (Permission denied); those built")
        assert said.getvalue().count("\n") == 1
        assert "Permission denied" in str(health(where.cache).trouble)

    assert ended_well(forked(work))
    assert sorted(os.listdir(folder_of(where))) == names
    folder_of(where).chmod(0o755)


@pytest.mark.parametrize("kind", ["file", "below a file", "nowhere"])
def test_a_place_that_is_none_leaves_the_kernel_in_memory(
    kind: str, tmp_path: Path, entry: Entry, capfd: pytest.CaptureFixture[str]
) -> None:
    where = places(tmp_path)
    (tmp_path / "file").write_text("")
    place = {"file": tmp_path / "file", "below a file": tmp_path / "file" / "x", "nowhere": Path("/proc/nowhere/x")}[
        kind
    ]
    assert build(Places(where.csrc, where.prebuilt, place), entry).origin == "compiled"
    err = capfd.readouterr().err
    assert "used from memory" in err.splitlines()[-1]


def test_without_a_home_every_start_builds_and_says_so(
    tmp_path: Path, entry: Entry, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert default_folder(Settings()) is None
    where = places(tmp_path)
    assert build(Places(where.csrc, where.prebuilt, None), entry).origin == "compiled"
    assert capfd.readouterr().err.count("no home directory") == 1
    assert "no home" in str(health(None).trouble)


def test_where_the_cache_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Path, "home", lambda: Path("/x/ann"))
    assert default_folder(Settings()) == Path("/x/ann/.cache/dsv4/kernels")
    assert default_folder(Settings(user_cache=Path("/x/fast"))) == Path("/x/fast/dsv4/kernels")
    assert default_folder(Settings(user_cache=Path("/x/fast"), cache=Path("mine"))) == Path("mine/kernels")


def test_a_healthy_cache_is_counted_and_a_missing_one_not_made(tmp_path: Path, entry: Entry) -> None:
    where = places(tmp_path)
    assert health(where.cache) == (where.cache, 0, 0, (), (), None)
    assert not folder_of(where).exists()
    build(where, entry)
    (path,) = folder_of(where).iterdir()
    assert health(where.cache) == (where.cache, 1, path.stat().st_size, (), (), None)
