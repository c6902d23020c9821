"""The official texts, where a checkpoint's folder is at hand: OFFICIAL_ENCODING=/path/to/encoding pytest ...

They are not ours to copy, so nothing is collected here without that folder; `test_chat_encode.py` covers the grammar
with stand-ins. Expected lengths, counts and hashes are those of the official encoder and tokenizer.
"""

from __future__ import annotations

import hashlib
import os
from typing import Any

from dsv4.chat.dialect import Dialect
from dsv4.chat.encode import Prompt, encode_messages
from dsv4.chat.tokenizer import Tokenizer
from tests.chat_support import official_vocabulary

FOLDER = os.environ.get("OFFICIAL_ENCODING")
HELLO = [{"role": "user", "content": "Hello"}]
PROPERTIES = {"city": {"type": "string"}, "n": {"type": "integer"}}
FUNCTION = {"name": "get_weather", "description": "w", "parameters": {"type": "object", "properties": PROPERTIES}}
CALL = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "n": 2}'}}
WITH_TOOLS: list[dict[str, Any]] = [
    {"role": "system", "content": "S", "tools": [{"type": "function", "function": FUNCTION}]},
    {"role": "user", "content": "U1"},
    {"role": "assistant", "content": "", "reasoning_content": "R1", "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "a", "content": "T1"},
    {"role": "user", "content": "U2"},
]


def measured(prompt: Prompt) -> tuple[int, int, str]:
    """Bytes, tokens and SHA-256 of a prompt; read piecewise and whole alike."""
    tokenizer = Tokenizer.load(official_vocabulary(), 129280)
    ids = tokenizer.encode_prompt(prompt.pieces)
    assert ids == tokenizer.encode_raw(prompt.text)
    return len(prompt.text.encode()), len(ids), hashlib.sha256(prompt.text.encode()).hexdigest()


if FOLDER:

    def test_the_largest_shipped_effort_a() -> None:
        dialect = Dialect.for_model(".", FOLDER)
        effort = {"preview": "max", "0731": "high"}[dialect.name]
        _, tokens, digest = measured(encode_messages(HELLO, dialect, effort=effort))
        assert (tokens, digest[:16]) == (84, "12e7a3a0adc6ca79")

    def test_tools_and_a_result() -> None:
        assert measured(encode_messages(WITH_TOOLS, Dialect.for_model(".", FOLDER))) == (
            1561,
            354,
            "05b9b3dd18051981df8851f5a70d684d450f31a74628bc71d965703f727c308a",
        )
