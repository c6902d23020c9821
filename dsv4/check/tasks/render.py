"""An exercise as token ids: what the model is given, and what it should go on with."""

from __future__ import annotations

from typing import Any, NamedTuple

from dsv4.chat.dialect import Dialect
from dsv4.chat.encode import encode_messages
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.tasks.item import Item


class Rendered(NamedTuple):
    """`prompt` up to the model's turn; `answer` the reference turn, its end of sentence included."""

    prompt: list[int]
    answer: list[int]


def render(item: Item, dialect: Dialect, tokenizer: Tokenizer) -> Rendered:
    """Token ids of an exercise and of its reference answer, in the words of `dialect`.

    PromptError for an item that the dialect or the tokenizer cannot express.
    """
    asked: dict[str, Any] = {
        "thinking": item.thinking,
        "effort": item.effort,
        "tools": item.tools or None,
        "response_format": item.response_format,
    }
    prompt = encode_messages(item.messages, dialect, **asked).pieces
    whole = encode_messages([*item.messages, _turn(item)], dialect, **asked, generation=False).pieces
    assert whole[: len(prompt)] == prompt, "a prompt ends in a control token, so what follows cannot change its ids"
    return Rendered(tokenizer.encode_prompt(prompt), tokenizer.encode_prompt(whole[len(prompt) :]))


def _turn(item: Item) -> dict[str, Any]:
    """The reference answer as an assistant message."""
    turn: dict[str, Any] = {"role": "assistant", "content": item.content, "reasoning_content": item.reasoning}
    if item.calls:
        turn["tool_calls"] = [{"function": {"name": name, "arguments": given}} for name, given in item.calls]
    return turn
