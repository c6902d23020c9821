"""The parser's events: exact, independent of how the text was cut, holding back the least, and never leaking markup."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.chat import dsml
from dsv4.chat.control import DSML, EOS
from dsv4.chat.encode import encode_messages
from dsv4.chat.events import (
    Completion,
    ContentDelta,
    Event,
    ParseProblem,
    RawDelta,
    ReasoningDelta,
    ToolCallArguments,
    ToolCallEnd,
    ToolCallStart,
    coalesce,
    collect,
)
from dsv4.chat.parse import StreamParser, parse_completion
from tests.chat_support import stand_in

PREVIEW = stand_in("preview")


def dsml_text(text: str) -> str:
    """Call markup in shorthand: "[invoke ...]" and "[/invoke]" are tags with the DSML mark."""
    return text.replace("[/", f"</{DSML}").replace("[", f"<{DSML}").replace("]", ">")


def parameter(name: str, value: str, string: str | None = "true") -> str:
    attribute = f' string="{string}"' if string is not None else ""
    return dsml_text(f'[parameter name="{name}"{attribute}]') + value + dsml_text("[/parameter]")


def block(*parameters: str, name: str = "f") -> str:
    lines = "\n".join(parameters)
    return (
        "\n\n" + dsml_text(f'[tool_calls]\n[invoke name="{name}"]\n') + lines + dsml_text("\n[/invoke]\n[/tool_calls]")
    )


def events(pieces: list[str], in_reasoning: bool = False, tools: bool = True) -> list[Event]:
    parser = StreamParser(in_reasoning=in_reasoning, tools=tools)
    out = [event for piece in pieces for event in parser.feed(piece)]
    return coalesce(out + parser.finish())


TWO_CALLS = "\n\n" + dsml_text(
    '[tool_calls]\n[invoke name="f"]\n[parameter name="a" string="true"]x "y"\\\n\u00e9😀[/parameter]\n'
    '[parameter name="b" string="false"]{"c": [1, 2.50]}[/parameter]\n[/invoke]\n'
    '[invoke name="g"]\n\n[/invoke]\n[/tool_calls]'
).replace('{"c": <｜DSML｜1, 2.50>}', '{"c": [1, 2.50]}')

GOOD: dict[str, tuple[bool, str]] = {
    "nothing": (False, ""),
    "content": (False, "Hello.\n\n\nA < b </think <｜ x\n"),
    "reasoning": (True, "Let me see.\n\n</think>\n\nYes"),
    "calls": (True, "I call.</think>One moment" + TWO_CALLS),
    "calls at once": (False, block(parameter("city", "Oslo"))),
    "newlines around": (False, "\n\n\n" + block(parameter("a", "\n\n", "true")) + "\n"),
}
BAD: dict[str, tuple[bool, str]] = {
    "reasoning without end": (True, "Hmm </thin"),
    "call in reasoning": (True, "Hmm" + TWO_CALLS),
    "cut in the mark": (False, "so\n\n<" + DSML + "tool_"),
    "cut in the head": (False, f'so\n\n<{DSML}tool_calls>\n<{DSML}invoke name="f'),
    "cut in text": (False, block(parameter("a", "half"))[:-30]),
    "cut in JSON": (False, block(parameter("a", '{"b": 1', "false")).split("1")[0]),
    "no block": (False, "so " + dsml_text('[invoke name="f"]\n[/invoke]')),
    "closing only": (False, "so " + dsml_text("[/tool_calls]")),
    "unknown tag": (False, "so\n\n" + dsml_text("[function_calls]\n[/function_calls]")),
    "text in block": (False, dsml_text('[tool_calls]\nhello [invoke name="f"]\n[/invoke]\n[/tool_calls]')),
    "text in call": (False, dsml_text('[tool_calls]\n[invoke name="f"]\nhello\n[/invoke]\n[/tool_calls]')),
    "twice": (False, block(parameter("a", "1"), parameter("a", "2"))),
    "no name": (False, dsml_text("[tool_calls]\n[invoke]\n[/invoke]\n[/tool_calls]")),
    "empty name": (False, block(name="")),
    "bad string": (False, block(parameter("a", "1", "maybe"))),
    "unquoted": (False, dsml_text("[tool_calls]\n[invoke name=f]\n[/invoke]\n[/tool_calls]")),
    "open quote": (False, dsml_text('[tool_calls]\n[invoke name="f]\n[/invoke]\n[/tool_calls]')),
    "endless tag": (False, dsml_text("[tool_calls][invoke") + " " * 5000 + 'name="f">'),
    "no JSON": (False, block(parameter("a", "Oslo", "false"), parameter("b", "NaN", "false"))),
}
ALL = GOOD | BAD


def test_a_whole_answer() -> None:
    assert events([GOOD["calls"][1]], in_reasoning=True) == [
        ReasoningDelta("I call."),
        ContentDelta("One moment"),
        ToolCallStart(0, "f", "call_0"),
        ToolCallArguments(0, '{"a": "x \\"y\\"\\\\\\né😀", "b": {"c": [1, 2.50]}}'),
        ToolCallEnd(0),
        ToolCallStart(1, "g", "call_1"),
        ToolCallArguments(1, "{}"),
        ToolCallEnd(1),
    ]
    assert events([GOOD["content"][1]]) == [ContentDelta(GOOD["content"][1])]
    assert events([GOOD["reasoning"][1]], in_reasoning=True) == [
        ReasoningDelta("Let me see.\n\n"),
        ContentDelta("\n\nYes"),
    ]


@pytest.mark.parametrize("name", ALL)
def test_every_cut_gives_the_same_events(name: str) -> None:
    in_reasoning, text = ALL[name]
    whole = events([text], in_reasoning)
    assert events(list(text), in_reasoning) == whole
    step = max(1, len(text) // 400)
    for cut in range(0, len(text) + 1, step):
        assert events([text[:cut], text[cut:]], in_reasoning) == whole, cut


MARKUP = [
    "</think>", "<", "/", DSML, "tool_calls>", "toolcalls>", "tool>", "invoke", "parameter", ' name="a"',
    ' string="true"', ' string="false"', ">", "\n", "\n\n", "1", '"', "é😀", dsml.BLOCK_OPEN[0], dsml.PARAMETER_CLOSE,
    dsml.INVOKE_CLOSE, f'<{DSML}invoke name="f">', f'<{DSML}parameter name="p" string="true">', TWO_CALLS,
]  # fmt: skip


@given(st.lists(st.sampled_from(MARKUP), max_size=14), st.data(), st.booleans(), st.booleans())
def test_random_markup_random_cuts(parts: list[str], data: st.DataObject, in_reasoning: bool, tools: bool) -> None:
    text = "".join(parts)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(text)), max_size=8)))
    pieces = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    whole = events([text], in_reasoning, tools)
    assert events(pieces, in_reasoning, tools) == whole == events(list(text), in_reasoning, tools)
    done = collect(whole)
    assert all(dsml.find_mark(event.text) < 0 for event in whole if isinstance(event, ContentDelta))
    for call in done.calls:
        assert not call.complete or isinstance(json.loads(call.arguments), dict)
    for problem in done.problems:
        assert 0 <= problem.at <= len(text)
        assert not problem.fatal or text.endswith(done.raw)
        assert not problem.fatal or text[problem.at :] == done.raw


def held_too_long(held: str, in_reasoning: bool) -> bool:
    """Whether no continuation could make `held` part of a mark."""
    marks = (
        [dsml.END_REASONING]
        if in_reasoning
        else ["\n" * n + mark for n in range(3) for mark in (*dsml.BLOCK_OPEN, dsml.CLOSING_MARK)]
    )
    return bool(held) and not any(mark.startswith(held) for mark in marks)


@given(st.lists(st.sampled_from([*MARKUP[:9], "\n\n\n", " ", "word"]), max_size=12), st.booleans())
def test_only_what_may_become_a_mark_is_held(parts: list[str], in_reasoning: bool) -> None:
    parser = StreamParser(in_reasoning=in_reasoning)
    seen = ""
    for char in "".join(parts):
        seen += char
        parsed = parser.feed(char)
        if any(isinstance(event, ParseProblem) for event in parsed) or any(mark in seen for mark in dsml.BLOCK_OPEN):
            return
        assert not held_too_long(parser.held, in_reasoning and dsml.END_REASONING not in seen), (seen, parser.held)


def test_long_text_arguments_stream() -> None:
    parser = StreamParser(in_reasoning=False)
    parser.feed(block(parameter("code", "")).split(f"</{DSML}parameter")[0])
    for line in ("def f():\n", '    return "x"\n', "< 3 </"):
        streamed = "".join(event.text for event in parser.feed(line) if isinstance(event, ToolCallArguments))
        assert streamed == dsml.escaped(line.removesuffix("</"))
    assert parser.held == "</"


@pytest.mark.parametrize(
    ("markup", "arguments"),
    [
        (block(parameter("a", "1")), {"a": "1"}),
        (block(parameter("a", "1", None), parameter("b", "[1]", None)), {"a": 1, "b": [1]}),
        (block(parameter("a", "Oslo, 3°", None)), {"a": "Oslo, 3°"}),
        (block(parameter("a", " true ", "false")), {"a": True}),
        (block(parameter("a", "<b>&amp;\\n</b>")), {"a": "<b>&amp;\\n</b>"}),
        (block(parameter("a", "")), {"a": ""}),
        (block(), {}),
        (block(parameter("a", "1")).replace("tool_calls", "toolcalls"), {"a": "1"}),
        (block(parameter("a", "1")).replace("tool_calls", "tool"), {"a": "1"}),
        (block(parameter("a", "1")).replace(f"<{DSML}tool_calls>", f"<{DSML}tool>"), {"a": "1"}),
        (block(parameter("a", "1")).replace("\n", ""), {"a": "1"}),
        (block(parameter("a", "1")).replace("\n", "  \n\n"), {"a": "1"}),
        (block(f'<{DSML}parameter string="false" name="a">2</{DSML}parameter>'), {"a": 2}),
    ],
)
def test_variants_that_models_emit(markup: str, arguments: dict[str, Any]) -> None:
    done = parse_completion("ok" + markup, in_reasoning=False)
    assert (done.content.rstrip(), done.problems, done.raw) == ("ok", [], "")
    assert [(call.name, call.complete, json.loads(call.arguments)) for call in done.calls] == [("f", True, arguments)]


@pytest.mark.parametrize("name", sorted(BAD.keys() - {"no JSON", "reasoning without end", "call in reasoning"}))
def test_broken_markup_is_reported_and_never_passed_off(name: str) -> None:
    text = BAD[name][1]
    done = parse_completion(text, in_reasoning=False)
    assert DSML not in done.content
    assert len(done.problems) == 1
    assert done.problems[0].fatal
    assert "\n" not in done.problems[0].what
    assert not any(call.complete for call in done.calls)
    assert text[done.problems[0].at :] == done.raw
    assert "tool_calls" not in done.message()


def test_a_value_that_is_no_json_is_mended_and_said() -> None:
    done = parse_completion(BAD["no JSON"][1], in_reasoning=False)
    assert [json.loads(call.arguments) for call in done.calls] == [{"a": "Oslo", "b": "NaN"}]
    assert [problem.fatal for problem in done.problems] == [False, False]
    assert done.calls[0].complete


def test_reasoning_without_end_stays_reasoning_and_is_said() -> None:
    for name in ("reasoning without end", "call in reasoning"):
        done = parse_completion(BAD[name][1], in_reasoning=True)
        assert (done.reasoning, done.content, done.calls) == (BAD[name][1], "", [])
        assert [problem.fatal for problem in done.problems] == [False]


def test_calls_without_tools_are_a_problem() -> None:
    done = parse_completion("so" + TWO_CALLS, in_reasoning=False, tools=False)
    assert (done.content, done.calls, done.raw) == ("so", [], TWO_CALLS)
    assert "no tools were offered" in done.problems[0].what


def test_text_and_calls_after_a_block_go_on() -> None:
    done = parse_completion("a" + block(name="f") + "\n\nb" + block(name="g"), in_reasoning=False)
    assert (done.content, [call.name for call in done.calls], done.problems) == ("ab", ["f", "g"], [])
    assert [call.id for call in done.calls] == ["call_0", "call_1"]


def test_call_ids_can_be_given() -> None:
    parser = StreamParser(in_reasoning=False, make_id=lambda index: f"mine-{index}")
    assert ToolCallStart(0, "f", "mine-0") in parser.feed(block())


GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat_prompts.json").read_text(encoding="utf-8"))
ANSWERS = [m for case in GOLDEN for m in case["messages"] if m["role"] == "assistant" and "wo_eos" not in m]


@pytest.mark.parametrize("thinking", [True, False])
def test_parsing_what_was_rendered_and_rendering_what_was_parsed(thinking: bool) -> None:
    """Every assistant turn of the golden conversations, there and back."""
    assert len(ANSWERS) > 50
    question = {"role": "user", "content": "Q"}
    for answer in ANSWERS:
        whole = encode_messages([question, answer], PREVIEW, thinking=thinking, generation=False).text
        opened = encode_messages([question], PREVIEW, thinking=thinking)
        text = whole.removeprefix(opened.text).split(EOS)[0]
        done = parse_completion(text, in_reasoning=opened.in_reasoning)
        assert done.problems == []
        assert done.content == answer["content"]
        assert done.reasoning == (answer["reasoning_content"] if thinking else "")
        again = encode_messages([question, done.message()], PREVIEW, thinking=thinking, generation=False).text
        assert again.split(EOS)[0] == opened.text + text


def test_collecting_is_the_sum_of_the_events() -> None:
    assert collect([]) == Completion()
    assert parse_completion(GOOD["calls"][1], in_reasoning=True).message() == {
        "role": "assistant",
        "content": "One moment",
        "reasoning_content": "I call.",
        "tool_calls": [
            {
                "id": "call_0",
                "type": "function",
                "function": {"name": "f", "arguments": '{"a": "x \\"y\\"\\\\\\né😀", "b": {"c": [1, 2.50]}}'},
            },
            {"id": "call_1", "type": "function", "function": {"name": "g", "arguments": "{}"}},
        ],
    }
    assert coalesce([RawDelta("a"), RawDelta("b"), ContentDelta("c")]) == [RawDelta("ab"), ContentDelta("c")]
