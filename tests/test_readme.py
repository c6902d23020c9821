"""The commands that README.md shows do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from dsv4.cli.main import main

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("dsv4 ")]


def run(command: str) -> int:
    """Exit code of one `dsv4 ...`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command)[1:])
    return int(stop.value.code or 0)


def test_there_are_commands() -> None:
    verbs = {line.split()[1] for line in LINES}
    assert {"generate", "inspect", "synth"} <= verbs


@pytest.mark.parametrize("line", LINES)
def test_a_command_of_the_readme_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 0; the one for a checkpoint that is not here says so in one line."""
    monkeypatch.chdir(tmp_path)
    codes = [run(command) for command in line.split(" && ")]
    out, err = capsys.readouterr()
    if "/models/" in line:
        assert codes == [1]
        assert "does not exist" in err
    else:
        assert codes == [0] * len(codes)
        assert out.strip()
