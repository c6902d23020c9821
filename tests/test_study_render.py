"""An exercise's ids: the prompt is what a user would send, the answer is all that follows up to the end of sentence."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from dsv4.chat.dialect import Dialect
from dsv4.chat.encode import encode_messages
from dsv4.chat.parse import parse_completion
from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.tasks.item import Item
from dsv4.check.tasks.render import render

ASK = Item(
    family="sums", key="2+3", content="It is 5.", reasoning="2 and 3 are 5.",
    messages=({"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is 2 + 3?"}),
)  # fmt: skip
TOOL = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
TURNS = (
    {"role": "user", "content": "What is 1 + 1?"},
    {"role": "assistant", "content": "2", "reasoning_content": "one more than 1"},
    {"role": "user", "content": "And 2 + 3?"},
)
CALL = replace(ASK, tools=(TOOL,), calls=(("add", {"a": 2, "b": "drei"}),), content="")
ITEMS = {
    "thinking": ASK,
    "plain": replace(ASK, thinking=False, reasoning=""),
    "call": CALL,
    "plain call": replace(CALL, thinking=False, reasoning=""),
    "several turns": replace(ASK, messages=TURNS),
    "several turns with tools": replace(CALL, messages=TURNS),
    "structured": replace(ASK, response_format={"type": "object"}, content='{"sum": 5}'),
    "empty reasoning": replace(ASK, reasoning=""),
    "control tokens as text": replace(ASK, content="</think><｜end▁of▁sentence｜>"),
}


@pytest.fixture(scope="module")
def words(pico_dir: Path) -> tuple[Dialect, Tokenizer]:
    dialect = Dialect.for_model(pico_dir)
    known = replace(dialect, tools=dialect.tools or "Tools:\n{tool_schemas}\n", response_format="Schema: {schema}")
    return known, Tokenizer.load(pico_dir)


@pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS.keys())
def test_the_prompt_is_a_prefix_of_the_whole_conversation(item: Item, words: tuple[Dialect, Tokenizer]) -> None:
    dialect, tokenizer = words
    prompt, answer = render(item, dialect, tokenizer)
    asked = {"thinking": item.thinking, "tools": item.tools or None, "response_format": item.response_format}
    sent = encode_messages(item.messages, dialect, **asked)  # type: ignore[arg-type]
    assert prompt == tokenizer.encode_prompt(sent.pieces)
    assert prompt[0] == tokenizer.bos_id
    assert answer[-1] == tokenizer.eos_id
    assert tokenizer.decode(prompt[-1:]) == ("<think>" if item.thinking else "</think>")


@pytest.mark.parametrize("item", ITEMS.values(), ids=ITEMS.keys())
def test_the_answer_reads_back_as_the_item(item: Item, words: tuple[Dialect, Tokenizer]) -> None:
    dialect, tokenizer = words
    _, answer = render(item, dialect, tokenizer)
    assert answer.count(tokenizer.eos_id) == 1  # what an answer only writes is no control token
    text = tokenizer.decode(answer[:-1])
    found = parse_completion(text, in_reasoning=item.thinking, tools=bool(item.tools))
    if item is not ITEMS["control tokens as text"]:
        assert (found.reasoning, found.content) == (item.reasoning, item.content)
    assert [(call.name, json.loads(call.arguments)) for call in found.calls] == list(item.calls)
