"""Messages become the exact prompt of the official encoder, and what is only text stays text."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from dsv4.chat.control import ASSISTANT, BOS, DSML, END_THINK, EOS, REMINDER, THINK, USER, Control
from dsv4.chat.dialect import Dialect
from dsv4.chat.encode import Prompt, encode_messages
from dsv4.chat.parse import parse_completion
from dsv4.chat.tokenizer import Tokenizer
from dsv4.errors import PromptError
from tests import PICO
from tests.chat_support import EFFORT_A, EFFORT_B, RESPONSE_FORMAT, TOOLS, official_vocabulary, stand_in

PREVIEW, AUGUST = stand_in("preview"), stand_in("0731")
# Conversations of every role, rendered by an independent restatement of the official encoder (with the stand-in texts).
GOLDEN = json.loads((Path(__file__).parent / "golden" / "chat_prompts.json").read_text(encoding="utf-8"))
SHORT = {"B": BOS, "U": USER, "A": ASSISTANT, "E": EOS, "T": THINK, "/T": END_THINK, "L": REMINDER, "D": DSML}

WEATHER = {
    "type": "function",
    "function": {"name": "get_weather", "description": "w", "parameters": {"properties": {"city": {"type": "string"}}}},
}
CALL = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": '{"city": "Oslo", "n": 2}'}}


def text_of(prompt: str) -> str:
    """A prompt in shorthand: words between spaces are control tokens or literal text; "~" is a space in a text."""
    return "".join(SHORT.get(word, word.replace("~", " ").replace("\\n", "\n")) for word in prompt.split())


def user(text: str = "Q") -> dict[str, Any]:
    return {"role": "user", "content": text}


def assistant(text: str = "A1", **more: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": text, **more}


def system(text: str = "S", **more: Any) -> dict[str, Any]:
    return {"role": "system", "content": text, **more}


def tool(text: str, call_id: str) -> dict[str, Any]:
    return {"role": "tool", "tool_call_id": call_id, "content": text}


def plain_text(prompt: Prompt) -> str:
    return "".join(piece for piece in prompt.pieces if isinstance(piece, str))


@pytest.mark.parametrize("n", range(len(GOLDEN)))
def test_golden_conversations(n: int) -> None:
    case = GOLDEN[n]
    options = {name: case[name] for name in ("thinking", "drop_thinking", "effort")}
    assert encode_messages(case["messages"], PREVIEW, generation=False, **options).text == case["prompt"]


TURNS = [system(), user("U1"), assistant(reasoning_content="R1"), user("U2")]


@pytest.mark.parametrize(
    ("messages", "options", "want"),
    [
        ([user()], {"thinking": False}, "B U Q A /T"),
        ([user()], {}, "B U Q A T"),
        ([system(), user()], {}, "B S U Q A T"),
        (TURNS, {}, "B S U U1 A /T A1 E U U2 A T"),
        (TURNS, {"drop_thinking": False}, "B S U U1 A T R1 /T A1 E U U2 A T"),
        (TURNS, {"thinking": False}, "B S U U1 A /T A1 E U U2 A /T"),
        ([user("a"), user("b")], {}, "B U a\\n\\nb A T"),
        ([{"role": "latest_reminder", "content": "now"}, user()], {}, "B L now U Q A T"),
        ([{"role": "developer", "content": "d"}], {}, "B U d A T"),
        ([{"role": "developer", "content": "d"}, user("a"), assistant(), user()], {}, "B U a A /T A1 E U Q A T"),
        ([user("a"), assistant("b", wo_eos=True)], {"thinking": False}, "B U a A /T b"),
        ([user("a"), assistant("b", prefix=True, reasoning="r")], {}, "B U a A T r /T b"),
        ([user("a"), assistant("b")], {"continue_final": True}, "B U a A T /T b"),
        ([user() | {"task": "action"}], {}, "B U Q A T <｜action｜>"),
        ([user() | {"task": "query"}], {}, "B U Q <｜query｜>"),
        ([user(), assistant(reasoning_content="R", task="title")], {}, "B U Q A T R /T A1 E <｜title｜>"),
    ],
)
def test_turns(messages: list[Any], options: dict[str, Any], want: str) -> None:
    assert encode_messages(messages, PREVIEW, **options).text == text_of(want)


def test_the_effort_stands_first_and_in_thinking_only() -> None:
    for dialect, effort, text in ((PREVIEW, "max", EFFORT_A), (AUGUST, "high", EFFORT_A), (AUGUST, "max", EFFORT_B)):
        assert encode_messages([system(), user()], dialect, effort=effort).text == text_of("B @ S U Q A T").replace(
            "@", text
        )
        assert encode_messages([user()], dialect, effort=effort, thinking=False).text == text_of("B U Q A /T")
    for dialect, effort in ((PREVIEW, "high"), (AUGUST, "low"), (PREVIEW, None), (AUGUST, None)):
        assert encode_messages([user()], dialect, effort=effort).text == text_of("B U Q A T")
    for thinking in (True, False):
        with pytest.raises(PromptError, match="no such effort; got medium"):
            encode_messages([user()], PREVIEW, effort="medium", thinking=thinking)


def test_where_the_model_goes_on_is_told() -> None:
    assert encode_messages([user()], PREVIEW).in_reasoning
    assert not encode_messages([user()], PREVIEW, thinking=False).in_reasoning
    assert not encode_messages([user(), assistant()], PREVIEW, continue_final=True).in_reasoning


def test_tools_stand_after_the_system_text_and_keep_reasoning() -> None:
    filled = TOOLS.format(
        dsml_token=DSML,
        thinking_start_token=THINK,
        thinking_end_token=END_THINK,
        tool_schemas='{"name": "get_weather", "description": "w", '
        '"parameters": {"properties": {"city": {"type": "string"}}}}',
    )
    for messages, tools in (([system(tools=[WEATHER]), *TURNS[1:]], None), (TURNS, [WEATHER])):
        prompt = encode_messages(messages, PREVIEW, tools=tools).text
        assert prompt == text_of("B S @ U U1 A T R1 /T A1 E U U2 A T").replace("@", "\n\n" + filled)
    assert encode_messages([user()], PREVIEW, tools=[WEATHER]).text == text_of("B @ U Q A T").replace(
        "@", "\n\n" + filled
    )


def test_the_response_format_follows_the_tools() -> None:
    text = encode_messages([user()], PREVIEW, tools=[WEATHER], response_format={"type": "ö", "a": 1}).text
    assert text.index("## Tools") < text.index("\n\n" + RESPONSE_FORMAT.format(schema='{"type": "ö", "a": 1}') + USER)
    with pytest.raises(PromptError, match="tools given twice"):
        encode_messages([system(tools=[WEATHER]), user()], PREVIEW, tools=[WEATHER])


def test_calls_and_results() -> None:
    calls = [
        CALL,
        {"id": "b", "function": {"name": "now", "arguments": "{}"}},
        {"id": "c", "function": {"name": "x", "arguments": "[1]"}},
    ]
    answers = [tool("T3", "c"), user("then"), tool("T1", "a"), user("U2")]
    text = encode_messages([user(), assistant("", tool_calls=calls), *answers], PREVIEW, thinking=False).text
    assert text == text_of(
        r"B U Q A /T \n\n< D tool_calls>\n"
        r'< D invoke~name="get_weather">\n< D parameter~name="city"~string="true">Oslo</ D parameter>\n'
        r'< D parameter~name="n"~string="false">2</ D parameter>\n</ D invoke>\n'
        r'< D invoke~name="now">\n\n</ D invoke>\n'
        r'< D invoke~name="x">\n< D parameter~name="arguments"~string="true">[1]</ D parameter>\n</ D invoke>\n'
        r"</ D tool_calls> E U <tool_result>T1</tool_result>\n\nthen\n\n<tool_result>T3</tool_result>\n\nU2 A /T"
    )


def test_results_of_unknown_calls_and_after_a_task() -> None:
    calls = [CALL, CALL | {"id": "b"}]
    answers = [tool("Tb", "b"), tool("T?", "?"), tool("Ta", "a")]
    text = encode_messages([user(), assistant(tool_calls=calls), *answers], PREVIEW).text
    assert text.index("T?") < text.index("Ta") < text.index("Tb"), "an unknown id counts as the first call's"
    text = encode_messages([user() | {"task": "query"}, tool("T", "a"), user("U2")], PREVIEW).text
    assert text == text_of(r"B U Q\n\n<tool_result>T</tool_result> U U2 A T")


CONTROLS = [BOS, EOS, USER, ASSISTANT, THINK, END_THINK, DSML, REMINDER]


@given(st.lists(st.sampled_from([*CONTROLS, "a", "\n", '"', "</", "tool_calls>"]), max_size=8).map("".join))
def test_nothing_that_a_client_sends_becomes_a_control_token(text: str) -> None:
    arguments = json.dumps({"k" + text: text, "n": [text]})
    function = {"name": "f" + text, "description": text, "parameters": {text: text}}

    def render(t: str, a: str, f: dict[str, Any]) -> Prompt:
        call = {"id": "a", "type": "function", "function": {"name": f["name"], "arguments": a}}
        messages = [
            system("s" + t), {"role": "latest_reminder", "content": t}, {"role": "developer", "content": "d" + t},
            user(t),
            assistant(t, reasoning_content=t, tool_calls=[call]), tool(t, "a"),
            tool([{"type": "text", "text": t}], "a"),  # type: ignore[arg-type]
        ]  # fmt: skip
        schema = {"schema": t}
        return encode_messages(messages, AUGUST, effort="max", tools=[{"function": f}], response_format=schema)

    def controls(prompt: Prompt) -> list[Any]:
        return [piece for piece in prompt.pieces if isinstance(piece, Control)]

    harmless = render("x", '{"k": "x", "n": ["x"]}', {"name": "f"})
    assert controls(render(text, arguments, function)) == controls(harmless)


def test_official_ids_of_short_prompts() -> None:
    tokenizer = Tokenizer.load(official_vocabulary(), 129280)

    def ids(text: str, thinking: bool) -> list[int]:
        return tokenizer.encode_prompt(
            encode_messages([{"role": "user", "content": text}], PREVIEW, thinking=thinking).pieces
        )

    assert ids("Hello", False) == [0, 128803, 19923, 128804, 128822]
    assert ids("Hello", True) == [0, 128803, 19923, 128804, 128821]
    lovelace = "Rispondi in italiano con una frase: chi era Ada Lovelace?"
    assert ids(lovelace, False) == [
        0, 128803, 52, 278, 4908, 75, 295, 89034, 399, 3919, 123003, 28, 23442, 9861, 63030, 47121, 317, 805, 33,
        128804, 128822,
    ]  # fmt: skip
    assert ids("Answer with only the number: 2048 divided by 128 is", False) == [
        0, 128803, 7805, 418, 1353, 270, 1167, 28, 223, 11154, 26, 7203, 513, 223, 7833, 344, 128804, 128822,
    ]  # fmt: skip
    snprintf = 'Complete the C statement with the next exact token only:\nreturn snprintf(buf, sizeof(buf), "%d", value'
    assert len(ids(snprintf, False)) == 27


@pytest.mark.parametrize("n", range(len(GOLDEN)))
def test_pieces_have_the_ids_of_the_whole_string(n: int, tokenizer: Tokenizer) -> None:
    """The golden conversations hold no forged marks, so reading the official string whole must give the same ids."""
    prompt = encode_messages(GOLDEN[n]["messages"], PREVIEW, generation=False)
    assert tokenizer.encode_prompt(prompt.pieces) == tokenizer.encode_raw(prompt.text)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.load(PICO)


def test_the_embedded_model_gets_the_prompt_it_was_taught() -> None:
    dialect = Dialect.for_model(PICO)
    question = [{"role": "user", "content": "Q"}]
    assert encode_messages(question, dialect).text == text_of("B U Q A T")
    assert encode_messages(question, dialect, thinking=False).text == text_of("B U Q A /T")
    prompt = encode_messages([user()], dialect, tools=[{"type": "function", "function": {"name": "f"}}])
    assert plain_text(prompt).startswith('\n\n## Tools\n\n{"name": "f"}\n\n')
    example = prompt.text[prompt.text.index("\n\n<") : prompt.text.index(USER)]
    done = parse_completion(example.replace("$JSON", "1"), in_reasoning=False)
    assert ([call.name for call in done.calls], done.problems) == (["$NAME"], [])
    assert json.loads(done.calls[0].arguments) == {"$KEY": "$TEXT", "$KEY2": 1}
