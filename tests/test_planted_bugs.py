"""Bugs that are kept as patches to the kernels: each has to be caught by everyday cases, or these have gone blind.

A patch says in words what it breaks, then `caught by:` and the label of a case or of a probe, once or more.
"""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from tests import shim
from tests.shim.build import CSRC
from tests.shim.everyday import cases, played, problems
from tests.shim.probes import PROBES

PATCHES = sorted((Path(__file__).parent / "planted").glob("*.patch"))
CAUGHT_BY = re.compile(r"^caught by: (.+)$", re.MULTILINE)


def planted(patch: Path, folder: Path) -> Path:
    """The kernels with the bug. A patch that no longer fits is an error."""
    csrc = Path(shutil.copytree(CSRC, folder / "csrc"))
    done = subprocess.run(["git", "apply", str(patch)], cwd=csrc, capture_output=True, text=True)
    assert not done.returncode, f"{patch.name} no longer fits the kernels: {done.stderr}"
    return csrc


@pytest.mark.slow
@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_a_planted_bug_is_caught(patch: Path, tmp_path: Path) -> None:
    labels, csrc = CAUGHT_BY.findall(patch.read_text(encoding="utf-8")), planted(patch, tmp_path)
    assert [label for label in labels if not problems(label, csrc)] == []


@pytest.mark.parametrize("patch", PATCHES, ids=lambda p: p.stem)
def test_a_patch_fits_the_kernels_and_names_a_case(patch: Path, tmp_path: Path) -> None:
    assert planted(patch, tmp_path)
    assert CAUGHT_BY.findall(patch.read_text(encoding="utf-8"))


def test_the_cases_that_are_named_exist() -> None:
    """That they pass on the kernels as they are is a test of its own."""
    labels = {label for patch in PATCHES for label in CAUGHT_BY.findall(patch.read_text(encoding="utf-8"))}
    assert labels <= cases().keys() | played().keys() | PROBES.keys()


def test_a_patch_that_fits_nothing_is_an_error(tmp_path: Path) -> None:
    patch = tmp_path / "old.patch"
    patch.write_text("--- a/norm.cu\n+++ b/norm.cu\n@@ -1 +1 @@\n-gone\n+new\n", encoding="utf-8")
    with pytest.raises(AssertionError, match=r"old\.patch no longer fits"):
        planted(patch, tmp_path)


@pytest.mark.slow
def test_a_missing_barrier_is_a_race(tmp_path: Path) -> None:
    """Whatever the numbers: ThreadSanitizer sees it."""
    case = cases()["rms_norm_quant: fp8 3 x 336 bf16"]
    csrc = planted(Path(__file__).parent / "planted" / "missing_barrier.patch", tmp_path)
    with shim.machine(csrc=csrc, threads=True), pytest.raises(shim.Fault, match="data race"):
        case.op.implementations["fused"].run(*case.make())
