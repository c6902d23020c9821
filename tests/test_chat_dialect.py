"""The dialect comes from the checkpoint, is read without running anything, and is an error rather than a guess."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from dsv4.chat import literals
from dsv4.chat.dialect import Dialect
from dsv4.errors import PromptError
from tests import PICO
from tests.chat_support import EFFORT_A, EFFORT_B, RESPONSE_FORMAT, TOOLS, encoding_folder, know_the_stand_ins


@pytest.fixture(autouse=True)
def _stand_ins(monkeypatch: pytest.MonkeyPatch) -> None:
    know_the_stand_ins(monkeypatch)


def own_file(folder: Path, **changes: object) -> Path:
    tree = {"efforts": {"low": "", "high": "Think.\n\n"}, "default_effort": "low", "tools": TOOLS} | changes
    path = folder / "dialect.json"
    path.write_text(json.dumps(tree))
    return path


def test_text_a_alone_is_the_preview(tmp_path: Path) -> None:
    encoding_folder(tmp_path, EFFORT_A, TOOLS, RESPONSE_FORMAT)
    dialect = Dialect.for_model(tmp_path)
    assert dialect.name == "preview"
    assert [dialect.effort_text(effort) for effort in (None, "high", "max")] == ["", "", EFFORT_A]
    assert (dialect.tools_template(), dialect.response_format_template()) == (TOOLS, RESPONSE_FORMAT)
    with pytest.raises(PromptError, match="no such effort; got low; wanted high or max"):
        dialect.effort_text("low")


def test_texts_a_and_b_are_0731(tmp_path: Path) -> None:
    encoding_folder(tmp_path, TOOLS, EFFORT_B, EFFORT_A)
    dialect = Dialect.for_model(tmp_path)
    assert dialect.name == "0731"
    assert [dialect.effort_text(effort) for effort in (None, "low", "high", "max")] == ["", "", EFFORT_A, EFFORT_B]
    with pytest.raises(PromptError, match="no such effort; got minimal; wanted low or high or max"):
        dialect.effort_text("minimal")
    with pytest.raises(PromptError, match=r"response-format sentence of the 0731 .*official checkpoint"):
        dialect.response_format_template()


def test_the_official_texts_are_known_by_their_hashes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    assert {kind: digest[:12] for digest, kind in literals.KNOWN.items()} == {
        "effort A": "f7a24f3b3050",
        "effort B": "53fb31b8392e",
        "tools": "09b7269daadd",
        "response format": "012f31fcc133",
    }


def test_texts_are_found_however_they_are_written(tmp_path: Path) -> None:
    half = len(EFFORT_A) // 2
    more = f"""
TABLE = {{"high": {EFFORT_A[:half]!r} {EFFORT_A[half:]!r}}}
def f(a=({EFFORT_B[:9]!r} + {EFFORT_B[9:30]!r} + {EFFORT_B[30:]!r})):
    '''{RESPONSE_FORMAT}'''
"""
    encoding_folder(tmp_path, TOOLS, more=more)
    dialect = Dialect.for_model(tmp_path)
    assert (dialect.efforts["high"], dialect.efforts["max"]) == (EFFORT_A, EFFORT_B)
    assert dialect.response_format == RESPONSE_FORMAT


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ((), "no known effort text"),
        ((TOOLS,), "no known effort text"),
        ((EFFORT_B,), "effort text B without A"),
        ((EFFORT_A, EFFORT_A.replace("time", "rest")), "an effort text of a dialect unknown"),
        ((EFFORT_A, "Reasoning Effort: 70"), "an effort text of a dialect unknown"),
        ((EFFORT_A, TOOLS + "!"), "a tool template of a dialect unknown"),
        ((EFFORT_A, RESPONSE_FORMAT + "!"), "a response format of a dialect unknown"),
    ],
)
def test_an_unknown_or_incomplete_folder_is_an_error(texts: tuple[str, ...], message: str, tmp_path: Path) -> None:
    encoding_folder(tmp_path, *texts)
    with pytest.raises(PromptError, match=message):
        Dialect.for_model(tmp_path)


def test_an_effort_built_by_a_format_string_is_unknown(tmp_path: Path) -> None:
    encoding_folder(tmp_path, EFFORT_A, more="TEXT = lambda n: f'Reasoning Effort: {n}'")
    with pytest.raises(PromptError, match="an effort text of a dialect unknown"):
        Dialect.for_model(tmp_path)


@pytest.mark.parametrize(
    "source", [b"def (", b"\0", b"x = " + b"(" * 5000, b"x = " + b"-" * 200_000 + b"1", b"\xff\xfe=1"]
)
def test_unreadable_python_is_an_error(source: bytes, tmp_path: Path) -> None:
    folder = encoding_folder(tmp_path, EFFORT_A)
    (folder / "more.py").write_bytes(source)
    with pytest.raises(PromptError, match="is not Python that can be read"):
        Dialect.for_model(tmp_path)


def test_a_bare_directory_needs_to_be_told(tmp_path: Path) -> None:
    for override in (None, "own"):
        with pytest.raises(PromptError, match=r"does not say how.*--dialect preview .*--dialect 0731 .*--dialect PATH"):
            Dialect.for_model(tmp_path, override)


def test_a_named_dialect_without_texts_works_until_a_text_is_needed(tmp_path: Path) -> None:
    dialect = Dialect.for_model(tmp_path, "preview")
    assert dialect.effort_text(None) == dialect.effort_text("high") == ""
    for needs_text in (lambda: dialect.effort_text("max"), dialect.tools_template, dialect.response_format_template):
        with pytest.raises(PromptError, match="encoding/ of the official checkpoint"):
            needs_text()
    august = Dialect.for_model(tmp_path, "0731")
    assert august.effort_text(None) == august.effort_text("low") == ""
    with pytest.raises(PromptError, match="the text of effort high of the 0731 dialect is not at hand"):
        august.effort_text("high")


def test_a_name_must_agree_with_the_checkpoint(tmp_path: Path) -> None:
    encoding_folder(tmp_path, EFFORT_A)
    assert Dialect.for_model(tmp_path, "preview") == Dialect.for_model(tmp_path)
    for other in ("0731", "own"):
        with pytest.raises(PromptError, match=f"--dialect {other} contradicts the checkpoint; got preview"):
            Dialect.for_model(tmp_path, other)


def test_two_shipped_dialects_are_an_error_that_a_path_settles(tmp_path: Path) -> None:
    folder, own = encoding_folder(tmp_path, EFFORT_A), own_file(tmp_path)
    for override in (None, "own", "preview"):
        with pytest.raises(PromptError, match="ships two dialects"):
            Dialect.for_model(tmp_path, override)
    assert Dialect.for_model(tmp_path, str(own)).name == "own"
    for path in (folder, folder / "encoding_dsv4.py"):
        assert Dialect.for_model(tmp_path, str(path)).name == "preview"


def test_a_path_may_be_another_checkpoint_and_must_exist(tmp_path: Path) -> None:
    encoding_folder(tmp_path / "other", EFFORT_A, EFFORT_B)
    assert Dialect.for_model(PICO, str(tmp_path / "other")).name == "0731"
    with pytest.raises(PromptError, match="no such dialect; got nowhere; wanted preview, 0731, own, or the path"):
        Dialect.for_model(PICO, "nowhere")


def test_the_embedded_model_carries_its_own() -> None:
    dialect = Dialect.for_model(PICO)
    assert (dialect.name, dialect.default_effort, dialect.effort_text(None)) == ("own", "high", "")
    assert "{tool_schemas}" in dialect.tools_template()
    assert Dialect.for_model(PICO, "own") == dialect
    with pytest.raises(PromptError, match="the own dialect has no such effort; got max; wanted high"):
        dialect.effort_text("max")
    with pytest.raises(PromptError, match="made without it"):
        dialect.response_format_template()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"effort": {}}, "unknown key; got effort"),
        ({"efforts": ["low"]}, "efforts; got"),
        ({"efforts": {"low": None}}, "efforts; got"),
        ({"default_effort": "middle"}, "default_effort; got 'middle'"),
        ({"default_effort": None}, "default_effort; got None"),
        ({"tools": "no placeholder"}, "tools has the wrong placeholders; got none"),
        ({"tools": TOOLS + "{name}"}, "tools has the wrong placeholders"),
        ({"tools": TOOLS + "{"}, "tools is no template"),
        ({"tools": "{tool_schemas!r}"}, "tools formats a placeholder"),
        ({"tools": "{tool_schemas:>9}"}, "tools formats a placeholder"),
        ({"tools": 3}, "tools; got int"),
        ({"response_format": "{tool_schemas}"}, "response_format has the wrong placeholders"),
    ],
)
def test_a_wrong_dialect_file_names_the_key(changes: dict[str, object], message: str, tmp_path: Path) -> None:
    own_file(tmp_path, **changes)
    with pytest.raises(PromptError, match=message):
        Dialect.for_model(tmp_path)


@pytest.mark.parametrize("content", [b"", b"[]", b"\xff", b"[" * 100_000])
def test_a_dialect_file_that_is_no_object_is_an_error(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "dialect.json").write_bytes(content)
    with pytest.raises(PromptError, match=r"dialect\.json is no"):
        Dialect.for_model(tmp_path)
