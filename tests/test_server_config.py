"""`dsv4 serve --config FILE` and `--print-config`."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from dsv4.cli import config_file
from dsv4.cli.main import main
from dsv4.cli.serve import serve
from dsv4.server import run as run_server

EVERYTHING = """\
# what a file may hold
port: 0
served-model-name: [small, "2"]
max-context: 64
numerics: float
stall: 7
deadline: 2.5
step-limit: 0
force: [rms_norm=reference]
draft: null
"""


def shown(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of `dsv4 serve`."""
    with pytest.raises(SystemExit) as stop:
        main(["serve", *map(str, arguments)])
    out, err = capsys.readouterr()
    return int(stop.value.code or 0), out, err


@pytest.fixture(autouse=True)
def nothing_is_served(monkeypatch: pytest.MonkeyPatch) -> None:
    """No key from outside, no port and no model: who would come that far fails."""
    monkeypatch.delenv("DSV4_API_KEY", raising=False)
    monkeypatch.delattr(run_server, "bind")


def test_what_counts_is_printed_and_can_be_fed_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file, again = tmp_path / "a.yaml", tmp_path / "b.yaml"
    file.write_text(EVERYTHING, encoding="utf-8")
    code, out, err = shown(capsys, "--config", file, "--print-config", "--stall", 9, "--served-model-name", "other")
    assert (code, err) == (0, "")
    found = yaml.safe_load(out)
    assert list(found) == [name for name in config_file.options(serve) if name != "api-key"]
    given = {"served-model-name": ["other"], "max-context": 64, "deadline": 2.5, "step-limit": 0}
    assert found | given | {"stall": 9} == found
    assert (found["port"], found["numerics"], found["force"], found["model"]) == (
        0,
        "float",
        ["rms_norm=reference"],
        None,
    )
    again.write_text(out, encoding="utf-8")
    assert shown(capsys, "--config", again, "--print-config") == (0, out, "")


def test_without_a_file_the_defaults_are_printed(capsys: pytest.CaptureFixture[str]) -> None:
    found = yaml.safe_load(shown(capsys, "--print-config")[1])
    assert (found["host"], found["port"], found["deadline"], found["step-limit"]) == ("127.0.0.1", 8000, None, 120)


def test_an_empty_file_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "a.yaml").write_text("# nothing\n", encoding="utf-8")
    assert shown(capsys, "--print-config") == shown(capsys, "--config", tmp_path / "a.yaml", "--print-config")


@pytest.mark.parametrize("how", ["option", "file", "config"])
def test_no_key_is_printed(how: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "key").write_text("secret-7719\n", encoding="utf-8")
    (tmp_path / "a.yaml").write_text("api-key: secret-7719\n", encoding="utf-8")
    options: dict[str, tuple[object, ...]] = {
        "option": ("--api-key", "secret-7719"),
        "file": ("--api-key-file", tmp_path / "key"),
        "config": ("--config", tmp_path / "a.yaml"),
    }
    code, out, err = shown(capsys, "--print-config", *options[how])
    assert code == 0
    assert "secret" not in out + err
    assert ("is set and not shown" in out) == (how != "file")
    assert yaml.safe_load(out)["api-key-file"] == (str(tmp_path / "key") if how == "file" else None)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("host: x\nprot: 1", "a.yaml:2: no such option; got prot; wanted port"),
        ("zzz: 1", "a.yaml:1: no such option; got zzz; wanted an option's long name, as dsv4 serve --help lists them"),
        ("config: b.yaml", "a.yaml:1: no such option; got config; wanted an option's long name"),
        ("print-config: true", "a.yaml:1: no such option; got print-config"),
        ("max_context: 64", "a.yaml:1: no such option; got max_context; wanted max-context"),
        ("port: '1'", "a.yaml:1: port; got '1'; wanted a whole number, at least 0, at most 65535"),
        ("port: 65536", "a.yaml:1: port; got 65536; wanted a whole number"),
        ("port: true", "a.yaml:1: port; got True; wanted a whole number"),
        ("port: 1.0", "a.yaml:1: port; got 1.0; wanted a whole number"),
        ("port:", "a.yaml:1: port; got None; wanted a whole number"),
        ("stall: 0", "a.yaml:1: stall; got 0; wanted a number, at least 0.1"),
        ("stall: .nan", "a.yaml:1: stall; got nan; wanted a number"),
        ("deadline: soon", "a.yaml:1: deadline; got 'soon'; wanted a number, at least 0.001"),
        ("host: no", "a.yaml:1: host; got False; wanted a text"),
        ("api-key: 7719", "a.yaml:1: api-key; got a value that is not shown; wanted a text"),
        ("host: " + "[" * 5000, "a.yaml: no YAML; got maximum recursion depth"),
        ("numerics: exact", "a.yaml:1: numerics; got 'exact'; wanted official or float"),
        ("numerics: [official]", "a.yaml:1: numerics; got ['official']; wanted official or float"),
        ("served-model-name: x", "a.yaml:1: served-model-name; got 'x'; wanted a list, each a text"),
        ("force: [1]", "a.yaml:1: force; got [1]; wanted a list, each a text"),
        ("port: 1\n\nport: 2", "a.yaml:3: port stands there twice; leave one out"),
        ("- port", "a.yaml:1: options; wanted lines of the form name: value"),
        ("host: [x", "a.yaml:1: no YAML; got expected"),
        ("port: 1\nhost: 'x", "a.yaml:2: no YAML; got found unexpected end of stream"),
        ("host: !!python/name:os.system", "a.yaml:1: no YAML; got could not determine a constructor"),
        ("host: 2026-99-99", "a.yaml: no YAML; got month must be in 1..12"),
        ("? [a]\n: 1", "a.yaml:1: no such option"),
        ("host: \x00", "a.yaml: no YAML; got "),
        ("max-context: 0", "max_context"),
    ],
)
def test_a_mistake_is_one_line_with_file_and_line(
    text: str, said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "a.yaml"
    file.write_text(text, encoding="utf-8")
    code, out, err = shown(capsys, "--config", file, "--print-config")
    assert (code, out) == (1, "")
    (line,) = err.splitlines()
    assert said in line


def test_a_missing_file_and_two_keys(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert re.search(r"^dsv4: .*none\.yaml", shown(capsys, "--config", tmp_path / "none.yaml")[2])
    assert "No such file" in shown(capsys, "--api-key-file", tmp_path / "none")[2]
    (tmp_path / "key").write_text("two words\n", encoding="utf-8")
    assert "wanted printable ASCII" in shown(capsys, "--api-key-file", tmp_path / "key")[2]
    assert "given twice" in shown(capsys, "--api-key-file", tmp_path / "key", "--api-key", "x")[2]


def test_without_the_library_it_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(__import__("sys").modules, "yaml", None)
    said = "dsv4: a configuration in a file needs PyYAML; pip install 'dsv4[server]'\n"
    assert shown(capsys, "--config", tmp_path / "a.yaml") == (1, "", said)


def test_every_option_has_a_name_and_a_type_that_can_be_checked() -> None:
    known = config_file.options(serve)
    assert {"model", "host", "api-key", "served-model-name", "deadline", "kernels"} <= set(known)
    assert all(option.wanted for option in known.values())
