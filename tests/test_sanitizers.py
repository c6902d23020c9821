"""What `make gpu` asks of compute-sanitizer finds faults in our kernels, though torch's are left out."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from tests.sanitizers import FOUND, ROOT, SANITIZER, sanitized

# tool -> a source, what stands there, what a fault makes of it, and a part of what the tool says. None for synccheck: a
# barrier that a part of a warp leaves out stops the GPU before the tool can speak.
FAULTS = {
    "memcheck": ("vector.cuh", "  if (wide && count >= 8) {", "  if (count >= 8) {", "misaligned"),
    "racecheck": ("rows.cuh", "  __syncthreads();\n  return ordered_sum", "  return ordered_sum", "hazard"),
}


@pytest.mark.gpu
@pytest.mark.parametrize("tool", FAULTS)
def test_a_planted_fault_is_found(tool: str, tmp_path: Path) -> None:
    if not shutil.which(SANITIZER):
        pytest.skip(f"no {SANITIZER}")
    shutil.copytree(ROOT / "dsv4", tmp_path / "dsv4", ignore=shutil.ignore_patterns("assets", "__pycache__"))
    file, right, wrong, said = FAULTS[tool]
    source = tmp_path / "dsv4" / "kernels" / "csrc" / "common" / file
    text = source.read_text(encoding="utf-8")
    assert text.count(right) == 1
    source.write_text(text.replace(right, wrong), encoding="utf-8")
    found = sanitized(tool, "quantize" if tool == "memcheck" else "norm", tmp_path)
    assert found.code == FOUND, found.text[-4000:]
    assert said in found.text
