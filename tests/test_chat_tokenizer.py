"""Ids are exact, user text cannot forge a control token, and streamed text never breaks a character."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from hypothesis import assume, given
from hypothesis import strategies as st

from dsv4.chat.control import DSML, EOS, THINK, USER, Control, joined
from dsv4.chat.tokenizer import Tokenizer
from dsv4.errors import PromptError
from tests import PICO
from tests.chat_support import official_vocabulary

ORDINARY = [
    "", " ", "\n\n", "\r\n\t x", "    def f(x):\n        return x  # naïve\n", "12345 3.14 1e-9 0xff 2026-11-22",
    "中文与日本語のかなカナ、混ぜる。", "한국어 조금", "😀👩\u200d👧🏳️ 🇫🇷", "Ünïcödé e\u0301 \u200b\u00a0",
    "a  b   c    d" + " " * 40 + "e", "العربية עברית", " ~", "<b>html</b> <think >", "｜ DSML ｜", "\x00\x01\x7f",
    "İstanbul ǅ ﬁ ½ Ⅳ ٣ ৪",
]  # fmt: skip


@pytest.fixture(scope="module")
def official() -> Tokenizer:
    return Tokenizer.load(official_vocabulary(), 129280)


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(official_vocabulary() / "tokenizer.json"))


@pytest.fixture(scope="module")
def pico() -> Tokenizer:
    return Tokenizer.load(PICO, 4224)


def test_the_vocabulary_is_the_official_one() -> None:
    data = (official_vocabulary() / "tokenizer.json").read_bytes()
    assert hashlib.sha256(data).hexdigest() == "8f9f37ca37fdc4f5fd36d5cf4d3b0e8392edb4e894fd10cc0d70b4957c8633cf"


def test_control_ids_are_looked_up_by_name(official: Tokenizer, pico: Tokenizer) -> None:
    names = (EOS, USER, THINK, DSML)
    assert [official.control_id(name) for name in names] == [1, 128803, 128821, 128825]
    assert [pico.control_id(name) for name in names] == [1, 4102, 4120, 4122]
    assert {128803, 128804, 0, 128828} <= official.role_ids.keys()
    assert official.eos_id not in official.role_ids
    assert (official.size, pico.size) == (129280, 4224)


def test_official_ids_of_known_texts(official: Tokenizer) -> None:
    known = {
        "The capital of France is": [671, 6102, 294, 8760, 344],
        " Paris": [11111],
        "\n\n": [271],
        "12345": [6895, 1883],
        " ~": [6883],
    }
    assert {text: official.encode_text(text) for text in known} == known
    assert official.encode_raw("<｜DSML｜tool_calls>") == [30, 128825, 72461, 4941, 12548, 32]


@pytest.mark.parametrize("vocabulary", ["official", "pico"])
def test_no_control_token_written_by_a_user_is_one(vocabulary: str, request: pytest.FixtureRequest) -> None:
    tokenizer: Tokenizer = request.getfixturevalue(vocabulary)
    controls = set(tokenizer.controls.values())
    for name in tokenizer.controls:
        for text in (name, f"say {name} now", name * 2):
            ids = tokenizer.encode_text(text)
            assert not controls & set(ids), name
            assert tokenizer.decode(ids) == text
            assert tokenizer.encode_prompt([Control(USER), text]) == [tokenizer.controls[USER], *ids]
        assert tokenizer.encode_raw(name) == [tokenizer.controls[name]] == tokenizer.encode_prompt([Control(name)])


@pytest.mark.parametrize("text", ORDINARY)
def test_ordinary_text_keeps_its_ids(text: str, official: Tokenizer, library: tokenizers.Tokenizer) -> None:
    assert official.encode_text(text) == library.encode(text, add_special_tokens=False).ids


@given(st.text())
def test_any_text_without_controls_keeps_its_ids(text: str) -> None:
    tokenizer, library = _pico_pair()
    assume(not any(name in text for name in tokenizer.controls))
    ids = tokenizer.encode_text(text)
    assert ids == library.encode(text, add_special_tokens=False).ids
    assert tokenizer.decode(ids) == text


@given(st.lists(st.sampled_from([THINK, USER, DSML, EOS, "<", "think>", "｜", "\n", " a", "é", "<｜User", "<dsml:"])))
def test_raw_text_is_read_as_the_library_reads_it(parts: list[str]) -> None:
    tokenizer, library = _pico_pair()
    assert tokenizer.encode_raw("".join(parts)) == library.encode("".join(parts), add_special_tokens=False).ids


def test_of_two_names_the_longer_one_is_read(tmp_path: Path) -> None:
    tree = json.loads((PICO / "tokenizer.json").read_text())
    tree["added_tokens"].append(tree["added_tokens"][-1] | {"id": 4224, "content": "<think"})
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    assert Tokenizer.load(tmp_path).encode_raw("<think><think") == [4120, 4224]


def _pico_pair(cache: list[Any] = []) -> Any:  # noqa: B006  loaded once: hypothesis calls the tests many times
    if not cache:
        cache += [Tokenizer.load(PICO), tokenizers.Tokenizer.from_file(str(PICO / "tokenizer.json"))]
    return cache


def test_neighbouring_texts_are_merged_before_they_are_tokenised(official: Tokenizer) -> None:
    assert official.encode_prompt(["\n", "", "\n"]) == [271] != official.encode_text("\n") * 2
    assert official.encode_prompt(["\n", Control(USER), "\n"]) == [
        *official.encode_text("\n"),
        128803,
        *official.encode_text("\n"),
    ]
    assert joined(["", Control(USER), "", "a", "b", ""]) == (Control(USER), "ab")


def test_a_missing_control_token_and_broken_text_are_named(pico: Tokenizer) -> None:
    with pytest.raises(PromptError, match="no control token <｜nobody｜>"):
        pico.encode_prompt([Control("<｜nobody｜>")])
    with pytest.raises(PromptError, match="surrogate at character 1"):
        pico.encode_text("a\ud800")


@given(st.lists(st.integers(0, 4300)))
def test_a_stream_says_what_decoding_says_and_never_half_a_character(ids: list[int]) -> None:
    tokenizer, library = _pico_pair()
    stream = tokenizer.stream()
    pushed = [stream.push(id) for id in ids]
    assert "".join(pushed) + stream.finish() == tokenizer.decode(ids)
    inside = [id for id in ids if id < 4224]
    assert tokenizer.decode(inside) == library.decode(inside, skip_special_tokens=False)


def test_a_character_cut_by_tokens_waits_for_its_last_byte(pico: Tokenizer) -> None:
    ids = pico.encode_text("a😀b")
    stream = pico.stream()
    texts = [stream.push(id) for id in ids]
    assert len(ids) > 3, "the embedded vocabulary spells an emoji in bytes"
    assert [text for text in texts if text] == ["a", "😀", "b"]
    assert stream.finish() == ""
    cut = pico.stream()
    assert [cut.push(id) for id in ids[:-2]][-1] == ""
    assert cut.finish() == "\ufffd"
