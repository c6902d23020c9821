"""`dsv4 doctor`: what it says of a machine, and which lock files of torch's builder it removes."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch.utils.file_baton import FileBaton

from dsv4.cli.main import main
from dsv4.errors import KernelError
from dsv4.kernels import doctor, prebuilt, torch_locks
from dsv4.kernels.build import Places, find
from dsv4.kernels.torch_locks import locks, remove
from dsv4.settings import Settings
from tests.kernel_support import ROOT, forget, places

HOLD = """
import sys, time
from torch.utils.file_baton import FileBaton
assert FileBaton(sys.argv[1]).try_acquire()
print("held", flush=True)
time.sleep(600)
"""
Run = Callable[..., tuple[int, dict[str, object]]]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A folder as torch makes it, with one extension in it."""
    (tmp_path / "extensions" / "py311_cu130" / "mine").mkdir(parents=True)
    return tmp_path / "extensions"


@pytest.fixture
def holder(root: Path) -> Iterator[subprocess.Popen[str]]:
    """A process that holds the lock of that extension, by torch's own class."""
    path = root / "py311_cu130" / "mine" / "lock"
    process = subprocess.Popen([sys.executable, "-c", HOLD, str(path)], cwd=ROOT, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "held\n"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


# --- torch's locks ---------------------------------------------------------------------------------------------------


def test_a_held_lock_is_never_touched_and_a_dead_one_goes(root: Path, holder: subprocess.Popen[str]) -> None:
    (lock,) = locks(root)
    os.utime(lock.path, (0, 0))  # whatever its age
    (lock,) = locks(root)
    assert lock.holders == (holder.pid,)
    assert lock.kept == f"held open by process {holder.pid}"
    assert not remove(lock)
    assert lock.path.exists()
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    (lock,) = locks(root)
    assert lock.kept is None
    assert remove(lock)
    assert locks(root) == []
    assert FileBaton(str(lock.path)).try_acquire()


def test_a_lock_of_a_dead_owner_goes_however_young(root: Path) -> None:
    (root / "py311_cu130" / "mine" / "lock").touch()
    (lock,) = locks(root)
    assert lock.age_s < 60
    assert lock.kept is None


def test_a_lock_taken_again_since_it_was_found_stays(root: Path) -> None:
    path = root / "py311_cu130" / "mine" / "lock"
    path.touch()
    (lock,) = locks(root)
    path.unlink()
    baton = FileBaton(str(path))
    assert baton.try_acquire()
    assert not remove(lock)
    baton.release()
    assert remove(lock)  # its owner did


@pytest.mark.parametrize(("age", "stays"), [(60, True), (590, True), (610, False), (10**6, False)])
def test_on_a_disk_of_the_network_only_an_old_lock_goes(
    age: int, stays: bool, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch_locks, "_shared", lambda path: "nfs4")
    path = root / "py311_cu130" / "mine" / "lock"
    path.touch()
    os.utime(path, (time.time() - age, time.time() - age))
    (lock,) = locks(root)
    assert bool(lock.kept) == stays
    assert not stays or "nfs4, where another host may hold it" in str(lock.kept)
    assert remove(lock) != stays


def test_a_process_that_shows_nothing_may_be_the_owner(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch_locks, "_processes", lambda path, file: ((), (17,)))
    path = root / "py311_cu130" / "mine" / "lock"
    path.touch()
    (lock,) = locks(root)
    assert "may be held by process 17" in str(lock.kept)
    assert not remove(lock)
    assert path.exists()


def test_only_torchs_locks_are_locks(root: Path) -> None:
    mine = root / "py311_cu130" / "mine"
    (mine / "lock.txt").touch()
    (mine / "lock").mkdir()
    (root / "lock").write_text("not torch's: it writes nothing into a lock")
    (root / "py311_cu130" / "lock").symlink_to(mine / "lock.txt")
    assert locks(root) == []


@pytest.mark.parametrize(
    ("mounts", "kind"),
    [
        ("22 1 8:1 / / rw - ext4 /dev/x rw", ""),
        ("22 1 8:1 / / rw - ext4 /dev/x rw\n30 22 0:5 / {} rw shared:1 - nfs4 host:/x rw", "nfs4"),
        ("30 22 0:5 / {} rw - nfs host:/x rw\n31 30 0:6 / {} rw - tmpfs tmpfs rw", ""),
        ("22 1 8:1 / / rw - fuse.sshfs host: rw", "fuse.sshfs"),
        ("22 1 8:1 / / rw - ext4 /dev/x rw\n30 22 0:5 / {}\\040more rw - nfs4 host:/x rw", ""),
    ],
)
def test_the_file_system_is_that_of_the_nearest_mount(
    mounts: str, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = mounts.replace("{}", str(tmp_path))
    monkeypatch.setattr(Path, "read_text", lambda self, encoding: text)
    assert torch_locks._shared(tmp_path / "lock") == kind


def test_where_torch_builds() -> None:
    assert torch_locks.folder(Settings(torch_extensions=Path("x"))) == Path("x")
    assert torch_locks.folder(Settings(user_cache=Path("y"))) == Path("y/torch_extensions")


# --- the verb --------------------------------------------------------------------------------------------------------


@pytest.fixture
def run(root: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """`dsv4 doctor` with folders of the test's own: exit code and findings by name."""
    forget()
    monkeypatch.setenv("DSV4_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_EXTENSIONS_DIR", str(root))

    def call(*options: str) -> tuple[int, dict[str, object]]:
        with pytest.raises(SystemExit) as stop:
            main(["doctor", "--json", *options])
        told = json.loads(capsys.readouterr().out)
        assert told["well"] == (not stop.value.code)
        return int(stop.value.code or 0), {one["name"]: one for one in told["findings"]}

    return call


def test_a_machine_in_order(run: Run) -> None:
    code, found = run()
    assert code == 0
    assert {"dsv4", "torch", "driver", "cuda-core", "NVRTC", "ready-made kernels", "kernel cache"} <= found.keys()


def test_a_dead_lock_is_named_and_removed_with_fix(root: Path, run: Run) -> None:
    path = root / "py311_cu130" / "mine" / "lock"
    path.touch()
    for fix, code, state in (((), 1, "wrong"), (("--fix",), 0, "ok")):
        assert path.exists()
        found_code, found = run(*fix)
        finding = found["torch's extension lock"]
        assert isinstance(finding, dict)
        assert (found_code, finding["state"]) == (code, state)
        assert str(path) in finding["found"]
    assert not path.exists()
    assert run()[0] == 0


@pytest.mark.slow
def test_a_held_lock_is_no_fault(run: Run, holder: subprocess.Popen[str]) -> None:
    code, found = run("--fix")
    finding = found["torch's extension lock"]
    assert isinstance(finding, dict)
    assert (code, finding["state"]) == (0, "note")
    assert f"process {holder.pid}" in finding["found"]


def test_a_damaged_entry_is_named_and_removed_with_fix(tmp_path: Path, run: Run) -> None:
    where = places(tmp_path / "x")
    assert where.cache is not None
    find("copy.cu", "sm_90a", where)
    (entry,) = where.cache.iterdir()
    mine = tmp_path / "cache" / "kernels"
    mine.mkdir(parents=True)
    (mine / "sound.cubin").write_bytes(entry.read_bytes())
    (mine / "cut.cubin").write_bytes(entry.read_bytes()[:50])
    (mine / ".tmp-old").write_bytes(b"")
    os.utime(mine / ".tmp-old", (0, 0))
    code, found = run()
    assert code == 1
    assert str(mine / "cut.cubin") in str(found["damaged entry"])
    assert "1 entries" in str(found["kernel cache"])
    code, found = run("--fix")
    assert code == 0
    assert "1 removed" in str(found["unfinished entries"])
    assert sorted(path.name for path in mine.iterdir()) == ["sound.cubin"]


def test_a_cache_that_cannot_be_written_is_wrong(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DSV4_CACHE", "/proc/nowhere")
    code, found = run()
    assert code == 1
    assert "cannot be written" in str(found["kernel cache"])


def test_the_table_is_for_people(run: Run, root: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (root / "py311_cu130" / "mine" / "lock").touch()
    with pytest.raises(SystemExit) as stop:
        main(["doctor"])
    out = capsys.readouterr().out
    assert stop.value.code == 1
    assert "wrong" in out
    assert "--fix removes the lock" in " ".join(out.split())


# --- driver, devices, compiler ---------------------------------------------------------------------------------------


def states(findings: object) -> dict[str, str]:
    return {one.name: one.state for one in findings}  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("loaded", "cuda", "gpu", "wanted"),
    [
        ("", None, False, {"driver": "note"}),
        ("NVRM version: NVIDIA UNIX Module  580.159.04  Release", 13000, True, {"driver": "ok"}),
        ("NVRM version: NVIDIA UNIX Module  550.54.15  Release", 12040, True, {"driver": "wrong"}),
        (
            "NVRM version: NVIDIA UNIX Module  580.159.04  Release",
            13000,
            False,
            {"driver": "ok", "torch and the driver": "wrong"},
        ),
    ],
)
def test_driver_and_torch_have_to_belong_together(
    loaded: str, cuda: int | None, gpu: bool, wanted: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def call(function: str) -> int:
        if cuda is None:
            raise KernelError("no driver")
        return cuda

    if loaded:
        (tmp_path / "version").write_text(loaded)
    monkeypatch.setattr(doctor, "_DRIVER", tmp_path / "version")
    monkeypatch.setattr(doctor, "call", call)
    found = list(doctor._driver(gpu))
    assert states(found) == wanted
    assert not loaded or loaded.split()[5] in found[0].found


def test_devices_are_named_with_their_architecture(monkeypatch: pytest.MonkeyPatch) -> None:
    def properties(index: int) -> SimpleNamespace:
        major, minor = ((9, 0), (8, 9))[index]
        return SimpleNamespace(name="X", total_memory=80 << 30, multi_processor_count=132, major=major, minor=minor)

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_properties", properties)
    hopper, older = doctor._devices(True)
    assert (hopper.state, hopper.found) == ("ok", "X, 80 GiB, 132 multiprocessors, sm_90a")
    assert older.state == "note"
    assert "8.9" in older.found
    assert list(doctor._devices(False)) == []


def no_compiler() -> None:
    raise KernelError("kernels cannot be compiled here", got="no cuda")


@pytest.mark.parametrize(
    ("gpu", "ready", "wanted"),
    [
        (False, (0, 4), {"cuda-core": "note", "NVRTC": "note"}),
        (True, (0, 4), {"cuda-core": "wrong", "NVRTC": "wrong"}),
        (True, (4, 4), {"cuda-core": "wrong", "NVRTC": "note"}),
    ],
)
def test_a_missing_package_is_wrong_where_it_is_needed(
    gpu: bool, ready: tuple[int, int], wanted: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "_version", lambda package: None)
    monkeypatch.setattr(doctor, "compiler", no_compiler)
    monkeypatch.setattr(doctor, "_ready", lambda where: ready)
    found = [one for one in doctor._compiler(gpu, Places(cache=None)) if one.name != "toolkit"]
    assert states(found) == wanted
    assert all("pip install" in one.do for one in found)


@pytest.mark.parametrize(
    ("damage", "state", "shown"),
    [("", "ok", "4 of 4"), ("damaged", "wrong", "3 of 4"), ("stale", "wrong", "0 of 4"), ("none", "note", "none of 4")],
)
def test_ready_made_kernels_have_to_fit_the_sources(damage: str, state: str, shown: str, tmp_path: Path) -> None:
    where = places(tmp_path)
    if damage != "none":
        prebuilt.make(where.prebuilt, where.csrc)
    if damage == "damaged":
        (where.prebuilt / "copy.sm_90a.cubin").write_bytes(b"")
    if damage == "stale":
        (where.csrc / "copy.cu").write_text((where.csrc / "copy.cu").read_text() + "// more\n")
    (found,) = doctor._prebuilt(where)
    assert found.state == state
    assert found.found.startswith(shown)
