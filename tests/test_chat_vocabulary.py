"""A damaged, foreign or hostile tokenizer.json is one clear error."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dsv4.chat.tokenizer import Tokenizer
from dsv4.errors import CheckpointError, DSV4Error
from tests import PICO

WORDS = PICO / "tokenizer.json"
Tree = dict[str, Any]


def _added(tree: Tree, **changes: Any) -> None:
    tree["added_tokens"][-1].update(changes)


def _without(tree: Tree, name: str) -> None:
    tree["added_tokens"] = [a for a in tree["added_tokens"] if a["content"] != name]


def _split(tree: Tree, **changes: Any) -> None:
    tree["pre_tokenizer"]["pretokenizers"][0].update(changes)


DAMAGE: dict[str, tuple[Callable[[Tree], Any], str]] = {
    "no pre-tokeniser": (lambda t: t.update(pre_tokenizer=None), "unexpected pre_tokenizer"),
    "no byte step": (lambda t: t["pre_tokenizer"]["pretokenizers"].pop(), "unexpected pre_tokenizer"),
    "text removed": (lambda t: _split(t, behavior="Removed"), "loses text"),
    "broken pattern": (lambda t: _split(t, pattern={"Regex": "("}), "cannot be read by the tokenizers"),
    "a normaliser": (lambda t: t.update(normalizer={"type": "NFC"}), "unexpected normalizer"),
    # The library aborts the whole process on this one.
    "subword prefix": (
        lambda t: t["model"].update(continuing_subword_prefix="x"),
        "unexpected model.continuing_subword",
    ),
    "dropout": (lambda t: t["model"].update(dropout=0.1), "unexpected model.dropout"),
    "wrong kind": (lambda t: t["model"].update(type="Unigram"), 'wanted a "model" of type "BPE"'),
    "no model": (lambda t: t.pop("model"), "no byte-level BPE"),
    "no added tokens": (lambda t: t.pop("added_tokens"), "no list of added tokens"),
    "added tokens no list": (lambda t: t.update(added_tokens={"a": 1}), "no list of added tokens"),
    "no think token": (lambda t: _without(t, "</think>"), "got no </think>; wanted a DeepSeek-V4 tokenizer"),
    "no user token": (lambda t: _without(t, "<｜User｜>"), "got no <｜User｜>"),
    "id past the end": (lambda t: _added(t, id=4224), "got id 4224; wanted ids below vocab_size 4224"),
    "vocabulary id past the end": (lambda t: t["model"]["vocab"].update(zzz=99999), "got id 99999"),
    "id is text": (lambda t: _added(t, id="7"), "got '7'; wanted a whole number"),
    "id is negative": (lambda t: _added(t, id=-1), "got -1"),
    "id is a truth value": (lambda t: _added(t, id=True), "got True"),
    "id of another token": (lambda t: _added(t, id=500), "has the id of another token"),
    "one id twice": (lambda t: _added(t, id=0), "a name or an id twice"),
    "one name twice": (lambda t: _added(t, content="<think>"), "a name or an id twice"),
    "name is a list": (lambda t: _added(t, content=["x"]), "names a token wrongly"),
    "id is a list": (lambda t: _added(t, id=[1]), "got [1]; wanted a whole number"),
    "empty name": (lambda t: _added(t, content=""), "names a token wrongly"),
    "name with half a surrogate": (lambda t: _added(t, content="\ud800"), "names a token wrongly"),
    "no vocabulary": (lambda t: t["model"].pop("vocab"), "has no vocabulary"),
    "merges that lead nowhere": (
        lambda t: t["model"].update(merges=[["qqq", "zzz"]]),
        "cannot be read by the tokenizers",
    ),
}


@pytest.mark.parametrize("name", DAMAGE)
def test_damage_is_named(name: str, tmp_path: Path) -> None:
    change, message = DAMAGE[name]
    tree = json.loads(WORDS.read_text())
    change(tree)
    (tmp_path / "tokenizer.json").write_text(json.dumps(tree))
    with pytest.raises(CheckpointError) as raised:
        Tokenizer.load(tmp_path, 4224)
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "is not JSON"),
        (b"\xff\xfe\x00", "is not JSON"),
        (b"[" * 100_000, "is not JSON"),
        (b"[]", "no byte-level BPE"),
    ],
)
def test_a_file_that_is_no_json_tree_is_named(content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(CheckpointError, match=message):
        Tokenizer.load(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json is missing"):
        Tokenizer.load(tmp_path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(st.integers(0, 120_000), st.binary(min_size=1, max_size=8))
def test_overwritten_bytes_load_or_raise_cleanly(tmp_path: Path, at: int, junk: bytes) -> None:
    data = bytearray(WORDS.read_bytes())
    data[at : at + len(junk)] = junk
    (tmp_path / "tokenizer.json").write_bytes(data)
    with suppress(DSV4Error):
        Tokenizer.load(tmp_path, 4224).encode_text("some text 中")
