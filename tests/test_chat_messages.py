"""Messages of a wrong shape are refused with the number and the field; nothing is dropped in silence."""

from __future__ import annotations

from typing import Any

import pytest

from dsv4.chat.encode import encode_messages
from dsv4.errors import PromptError
from tests.chat_support import stand_in

USER = {"role": "user", "content": "Q"}


def call(**changes: Any) -> dict[str, Any]:
    return {"role": "assistant", "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": "{}"}} | changes]}


WRONG: list[tuple[Any, str]] = [
    ([], "no messages"),
    ("hello", "no messages; got 'hello'"),
    (None, "no messages"),
    ({"role": "user"}, "no messages"),
    (["hello"], "message 0: role; got 'str'"),
    ([{"content": "Q"}], "message 0: role; got None"),
    ([USER, {"role": "function", "content": "x"}], "message 1: role; got 'function'"),
    ([{"role": ["user"], "content": "x"}], r"message 0: role; got \['user'\]"),
    ([{"role": "user"}], "message 0: content of user; got None"),
    ([{"role": "user", "content": 3}], "message 0: content of user; got 3"),
    ([{"role": "user", "content": ["x"]}], "message 0: content of user"),
    ([{"role": "developer", "content": ""}], "message 0: content of developer"),
    ([{"role": "latest_reminder"}, USER], "message 0: content of latest_reminder"),
    ([{"role": "user", "content": [{"type": "image_url"}]}], "content part; got type 'image_url'; .*read text only"),
    ([{"role": "tool", "content": [{"type": "text"}]}], "content part; got type 'text'"),
    ([USER, {"role": "assistant", "reasoning_content": 1}], "message 1: reasoning_content; got int"),
    (
        [USER, {"role": "assistant", "reasoning_content": "a", "reasoning": "b"}],
        "reasoning_content and reasoning differ",
    ),
    ([USER, {"role": "assistant", "tool_calls": {}}], "message 1: tool_calls; got dict"),
    ([USER, {"role": "assistant", "tool_calls": ["f"]}], r"message 1: tool_calls\[0\]; got 'f'"),
    ([USER, call(function={"arguments": "{}"})], r"message 1: tool_calls\[0\]"),
    ([USER, call(function={"name": ""})], r"message 1: tool_calls\[0\]"),
    ([USER, call(function={"name": "f", "arguments": 3})], r"tool_calls\[0\]: arguments; got int"),
    ([USER, call(id=7)], r"tool_calls\[0\]: id; got int"),
    ([{"role": "tool", "content": "x", "tool_call_id": 1}], "message 0: tool_call_id; got int"),
    ([{"role": "system", "tools": "f"}, USER], "message 0: tools; got str"),
    ([{"role": "system", "tools": [{"name": "f"}]}, USER], r"message 0: tools\[0\]"),
    ([{"role": "system", "tools": [{"function": {"name": 1}}]}, USER], r"message 0: tools\[0\]"),
    ([{"role": "system", "tools": [{"function": {"name": "f", "x": {1}}}]}, USER], "is not JSON"),
    ([{"role": "system", "response_format": "json"}, USER], "message 0: response_format; got str"),
    ([USER | {"task": "cook"}], "message 0: task; got 'cook'"),
    ([USER | {"task": ["action"]}], r"message 0: task; got \['action'\]"),
    ([{"role": "tool", "content": "x"}, USER | {"task": "action"}], "a quick task cannot follow"),
    ([USER, {"role": "assistant", "content": "x"}], "no turn; got a last message of role assistant; .*continue_final"),
    ([{"role": "system", "content": "x"}], "no turn; got a last message of role system"),
    ([USER, {"role": "latest_reminder", "content": "x"}], "put the reminder before the user message"),
]


@pytest.mark.parametrize(("messages", "message"), WRONG)
def test_wrong_messages_are_named(messages: Any, message: str) -> None:
    with pytest.raises(PromptError, match=message) as raised:
        encode_messages(messages, stand_in("preview"))
    assert "\n" not in str(raised.value)


def test_request_tools_and_continuation_are_checked() -> None:
    with pytest.raises(PromptError, match=r"request: tools\[0\]"):
        encode_messages([USER], stand_in("preview"), tools=[{"type": "web_search"}])
    with pytest.raises(PromptError, match="nothing to continue; got a last message of role user"):
        encode_messages([USER], stand_in("preview"), continue_final=True)


def test_shapes_that_clients_send_are_taken() -> None:
    def text(*messages: dict[str, Any]) -> str:
        return encode_messages([*messages, USER], stand_in("preview"), drop_thinking=False).text

    parts = {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]}
    assert text(parts) == text({"role": "user", "content": "a\n\nb"})
    assert text(USER, call(function={"name": "f", "arguments": {"a": "ü"}})) == text(
        USER, call(function={"name": "f", "arguments": '{"a": "ü"}'})
    )
    assert text(USER, {"role": "assistant", "reasoning": "r"}) == text(
        USER, {"role": "assistant", "content": None, "reasoning_content": "r", "tool_calls": None}
    )
