"""The commands that README.md shows do what they say."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import torch

from dsv4.cli.main import main
from dsv4.engine.request import Sampling
from dsv4.server import run as run_server

README = (Path(__file__).resolve().parents[1] / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
FEW = 60  # tokens: the answers whole, of the stories the beginning
LINES = [line.split("  #")[0].strip() for block in BLOCKS for line in block.splitlines() if line.startswith("dsv4 ")]


def run(command: str) -> int:
    """Exit code of one `dsv4 ...`."""
    with pytest.raises(SystemExit) as stop:
        main(shlex.split(command)[1:])
    return int(stop.value.code or 0)


def test_there_are_commands() -> None:
    verbs = {line.split()[1] for line in LINES}
    assert {"generate", "inspect", "synth"} <= verbs


def test_the_python_of_the_readme_runs(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(Sampling.__init__.__kwdefaults__, "max_tokens", FEW)
    (snippet,) = re.findall(r"^```python\n(.*?)^```", README, re.MULTILINE | re.DOTALL)
    exec(compile(snippet, "README.md", "exec"), {})
    assert "Paris" in capsys.readouterr().out


SLOW = ("dsv4 eval", "dsv4 kernels")  # half a minute


@pytest.mark.parametrize(
    "line", [pytest.param(line, marks=[pytest.mark.slow] * line.startswith(SLOW)) for line in LINES]
)
def test_a_command_of_the_readme_runs(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With exit code 0; one for a checkpoint or a GPU that is not here says so in one line."""
    monkeypatch.chdir(tmp_path)
    if "dsv4 serve" in line:  # all of it but the serving, which does not end, and its port, which may be taken
        bind = run_server.bind
        monkeypatch.setattr(run_server, "bind", lambda host, port: bind(host, 0))
        monkeypatch.setattr(run_server, "serve", lambda service, bound: None)
    if " X " in line and "synth" not in line:
        run("dsv4 synth --config tiny-pro --out X")  # the line before
        capsys.readouterr()
    code = run(f"{line} --max-tokens {FEW}" if " -p " in line and "--max-tokens" not in line else line)
    out, err = capsys.readouterr()
    if "/models/" in line:
        assert code == 1
        assert "does not exist" in err
    elif line.startswith(("dsv4 bench decode", "dsv4 bench prefill")) and not torch.cuda.is_available():
        assert code == 1
        assert "got no GPU" in err
    else:
        assert code == 0
        assert (out + err if "dsv4 serve" in line else out).strip()
