"""Wheels: with ready-made kernels, or without because somebody said so, and never without by accident."""

from __future__ import annotations

import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

from dsv4.kernels.prebuilt import LIMIT
from dsv4.kernels.source import sources
from tests.kernel_support import ROOT, ran
from tests.kernel_support import places as write_sources

BUILD = """
import os, sys
sys.path.insert(0, "wheel")
import with_cubins
print(with_cubins.build_wheel(sys.argv[1], {"cubins": sys.argv[2]} if sys.argv[2:] else None))
"""
NEEDS = """
import sys
sys.path.insert(0, "wheel")
import with_cubins
for hook in ("wheel", "editable", "sdist"):
    print(hook, *(need.split(">")[0] for need in getattr(with_cubins, f"get_requires_for_build_{hook}")({})))
print("plain", *with_cubins.get_requires_for_build_wheel({"cubins": "none"}))
"""
HIDE = "import sys; sys.modules['cuda'] = None\n"
FIND = """
from dsv4.kernels.build import find
for architecture in ("sm_90a", "sm_120a"):
    found = find("copy.cu", architecture)
    print(found.origin, len(found.entry.cubin))
"""


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """This project with two small kernels in place of its own."""
    tree = tmp_path / "tree"
    for name in ("pyproject.toml", "README.md", "LICENSE", "wheel/with_cubins.py"):
        (tree / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, tree / name)
    for part in ("__init__.py", "errors.py", "settings.py", "kernels"):
        source = ROOT / "dsv4" / part
        target = tree / "dsv4" / part
        target.parent.mkdir(exist_ok=True)
        if source.is_dir():
            shutil.copytree(source, target, ignore=shutil.ignore_patterns("csrc", "__pycache__", "prebuilt"))
        else:
            shutil.copy(source, target)
    written = write_sources(tmp_path / "sources")
    shutil.copytree(written.csrc, tree / "dsv4" / "kernels" / "csrc")
    return tree


@pytest.fixture
def out(tmp_path: Path) -> Path:
    (tmp_path / "out").mkdir()
    return tmp_path / "out"


def python(script: str, tree: Path, *arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", script, *map(str, arguments)]
    return subprocess.run(command, cwd=tree, capture_output=True, text=True, check=False)


def names(folder: Path) -> set[str]:
    (wheel,) = folder.glob("*.whl")
    return set(zipfile.ZipFile(wheel).namelist())


def test_a_wheel_holds_a_cubin_of_every_pair_and_its_user_compiles_nothing(
    tree: Path, tmp_path: Path, out: Path
) -> None:
    before = sorted(path.relative_to(tree) for path in tree.rglob("*"))
    done = python(BUILD, tree, out)
    assert done.returncode == 0, done.stderr
    assert "4 cubins made" in done.stderr
    made = {f"dsv4/kernels/prebuilt/copy.{name}.cubin" for name in ("sm_90a", "sm_100a", "sm_103a", "sm_120a")}
    assert {name for name in names(out) if name.endswith(".cubin")} == made
    after = sorted(path.relative_to(tree) for path in tree.rglob("*") if "__pycache__" not in path.parts)
    assert after == before
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    used = python(HIDE + FIND, tmp_path / "installed")
    assert used.returncode == 0, used.stderr
    assert [line.split()[0] for line in used.stdout.splitlines()] == ["prebuilt", "prebuilt"]
    assert used.stderr == ""


def test_a_header_edited_in_an_installed_package_sends_its_user_to_the_compiler(
    tree: Path, tmp_path: Path, out: Path
) -> None:
    assert python(BUILD, tree, out).returncode == 0
    (wheel,) = out.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "installed")
    (tmp_path / "installed/dsv4/kernels/csrc/common/deeper.cuh").write_text("#pragma once\n#define ONE 1.5f\n")
    used = python(HIDE + FIND, tmp_path / "installed")
    assert used.returncode != 0
    assert "kernels cannot be compiled here; got no cuda" in used.stderr


def test_without_a_compiler_there_is_no_wheel(tree: Path, out: Path) -> None:
    done = python(HIDE + BUILD, tree, out)
    assert done.returncode != 0
    last = done.stderr.strip().splitlines()[-1]
    assert "kernels cannot be compiled here; got no cuda" in last
    assert "-C cubins=none" in last
    assert list(out.iterdir()) == []


def test_a_kernel_that_does_not_compile_makes_no_wheel(tree: Path, out: Path) -> None:
    (tree / "dsv4/kernels/csrc/common/deeper.cuh").write_text("#pragma once\n")
    done = python(BUILD, tree, out)
    assert done.returncode != 0
    assert 'identifier "ONE" is undefined' in done.stderr


def test_a_wheel_without_kernels_has_to_be_asked_for_and_says_so(tree: Path, out: Path) -> None:
    done = python(HIDE + BUILD, tree, out, "none")
    assert done.returncode == 0, done.stderr
    assert "cubins=none: kernels of this wheel are compiled where they first run" in done.stderr
    assert not [name for name in names(out) if name.endswith(".cubin")]
    assert python(BUILD, tree, out, "few").returncode != 0


def test_only_a_wheel_fetches_the_compiler() -> None:
    """An editable install, which `make demo` does, and a source archive fetch nothing."""
    said, _ = ran(NEEDS)
    assert said.splitlines() == [
        "wheel cuda-bindings cuda-core nvidia-cuda-nvrtc",
        "editable",
        "sdist",
        "plain",
    ]


def test_a_source_archive_has_what_a_wheel_is_built_with(tree: Path, out: Path) -> None:
    script = BUILD.replace("build_wheel", "build_sdist")
    done = python(script, tree, out)
    assert done.returncode == 0, done.stderr
    (archive,) = out.glob("*.tar.gz")
    with tarfile.open(archive) as opened:
        inside = {name.split("/", 1)[1] for name in opened.getnames()}
    assert {"wheel/with_cubins.py", "dsv4/kernels/csrc/copy.cu", "dsv4/kernels/csrc/common/move.cuh"} <= inside


@pytest.mark.slow
def test_the_projects_own_wheel(out: Path) -> None:
    """Every declared pair is in it, and all of them together are small."""
    done = python(BUILD, ROOT, out)
    assert done.returncode == 0, done.stderr
    (wheel,) = out.glob("*.whl")
    made = [one for one in zipfile.ZipFile(wheel).infolist() if one.filename.endswith(".cubin")]
    assert len(made) == sum(len(source.architectures) for source in sources())
    assert sum(one.file_size for one in made) <= LIMIT == 10_000_000
