"""The page at /, in a real Chromium without a screen: what a user sees and does, and what the page must never do."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from dsv4.server.static import FILES, FOLDER
from tests import PICO
from tests.browser import THOUGHT, Tab, ending, expect, opened, paced
from tests.serving import Running, dictated, running, until
from tests.test_server_tools import ARGUMENTS, BOTH, TOOLS, block, invoke, parameter


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0, reuse_points=0))


@pytest.fixture
def tab(chromium: Any, server: Running) -> Iterator[Tab]:
    with opened(chromium, server.url) as tab:
        yield tab


# --- the files -------------------------------------------------------------------------------------------------------


def test_the_page_is_served_with_its_types_and_a_policy_and_asked_for_again(server: Running) -> None:
    kinds = {"/": "text/html", "/page/main.js": "text/javascript", "/page/style.css": "text/css"}
    assert set(kinds) < set(FILES)
    for path in FILES:
        answer = server.get(path)
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(kinds.get(path, ""))
        assert "default-src 'none'" in answer.headers["content-security-policy"]
        assert answer.headers["cache-control"] == "no-cache"
        assert server.http.head(path).headers["etag"] == answer.headers["etag"]
        again = server.get(path, **{"if-none-match": f"W/{answer.headers['etag']}"})
        assert (again.status_code, again.content) == (304, b"")
        assert server.get(path, **{"if-none-match": '"other"'}).status_code == 200
    assert {file.name for file in FILES.values()} == {file.name for file in FOLDER.iterdir()}
    assert server.get("/page/").status_code == server.get("/page/../app.py").status_code == 404


def test_the_page_needs_no_key_and_the_api_does(llm: LLM) -> None:
    with running(llm, key="right") as server:
        assert {server.get(path).status_code for path in FILES} == {200}
        assert server.get("/v1/models").status_code == 401
        assert server.post("/v1/chat/completions", {}).status_code == 401


def test_no_file_names_another_place() -> None:
    """Works offline and below a proxy's prefix: no address at all, no path from the root."""
    for file in FILES.values():
        text = file.read_text(encoding="utf-8").replace('xmlns="http://www.w3.org/2000/svg"', "")
        assert not re.search(r"""https?:|["'(]/\w|@import|url\(|style=|\son\w+=""", text), file


# --- a conversation --------------------------------------------------------------------------------------------------


def test_the_model_itself_thinks_and_answers(tab: Tab) -> None:
    expect(tab.page.get_by_label("Model")).to_have_text("pico · 1,024 tokens")
    tab.set(Temperature="0", Seed="7")
    tab.ask("What is the capital of France?")
    tab.answer("Paris")
    expect(tab.page.get_by_label("You")).to_have_text("What is the capital of France?")
    figures = [r"^\d+ tokens$", r"^[\d.,]+ tokens/s$", r"^prompt \d+$", "^seed 7$"]
    expect(tab.page.locator("footer span")).to_have_text([re.compile(figure) for figure in figures])
    assert tab.sent[0]["temperature"] == 0
    assert tab.sent[0]["stream_options"] == {"include_usage": True}


def test_it_grows_as_it_comes_and_thinking_is_folded_when_it_is_over(tab: Tab, llm: LLM) -> None:
    ids = llm.tokenizer.encode_raw(THOUGHT)
    before = ids.index(llm.tokenizer.encode_raw("</think>")[0])
    thinking, text = tab.page.locator("details"), tab.page.locator(".text")
    with paced(llm, THOUGHT) as steps:
        tab.ask("Well?")
        steps.release(before)
        expect(thinking).to_have_attribute("open", "")
        expect(thinking.locator("p")).to_have_text("I know this one.")
        expect(thinking.locator("summary")).to_contain_text("Thinking for")
        expect(text).to_be_empty()
        steps.release(2)
        expect(text).to_have_text("It")
        expect(thinking).not_to_have_attribute("open", "")
        expect(tab.page.get_by_label("Answer")).to_have_attribute("aria-busy", "true")
        expect(tab.page.get_by_role("button", name="Send")).to_be_hidden()
        thinking.locator("summary").click()  # from now on it stays as it is wanted
        steps.release(99)
        tab.answer("It is Paris.")
    expect(text.locator("strong")).to_have_text("Paris")
    expect(thinking).to_have_attribute("open", "")
    expect(thinking.locator("summary")).to_have_text(re.compile(rf"^Thought for \d+\.\d s · {before} tokens$"))
    expect(tab.page.get_by_role("button", name="Stop")).to_be_hidden()


def test_a_second_turn_sends_the_first_with_its_reasoning_and_a_new_chat_nothing(tab: Tab, llm: LLM) -> None:
    tab.set(System_prompt="Be short.", Max_tokens="40")
    with dictated(llm, THOUGHT):
        tab.ask("Well?")
        tab.answer("Paris")
        tab.page.get_by_label("Message").press_sequentially("And")
        tab.page.get_by_label("Message").press("Shift+Enter")
        tab.page.get_by_label("Message").press_sequentially("now?")
        tab.page.get_by_label("Message").press("Enter")
        expect(tab.page.get_by_label("Answer")).to_have_count(2)
        tab.answer("Paris")
        tab.page.get_by_role("button", name="New chat").click()
        expect(tab.page.get_by_label("Answer")).to_have_count(0)
        tab.page.get_by_role("button", name="Settings").click()
        tab.page.get_by_label("Thinking").select_option("Off")
        tab.page.keyboard.press("Escape")
        tab.ask("Afresh")
        tab.answer("know")
    system, said = {"role": "system", "content": "Be short."}, {"role": "user", "content": "Well?"}
    heard = {"role": "assistant", "content": "It is **Paris**.", "reasoning_content": "I know this one."}
    assert tab.sent[1]["messages"] == [system, said, heard, {"role": "user", "content": "And\nnow?"}]
    assert tab.sent[1]["max_tokens"] == 40
    assert tab.sent[2]["messages"] == [system, {"role": "user", "content": "Afresh"}]
    assert [sent.get("reasoning_effort") for sent in tab.sent] == [None, None, "none"]


def test_calls_are_shown_as_they_come_and_their_results_go_back(tab: Tab, llm: LLM) -> None:
    tab.set(Tools=json.dumps(TOOLS))
    call = tab.page.locator(".call").first
    with paced(llm, "I must look.</think>" + BOTH) as steps:
        tab.ask("How warm is it?")
        steps.release(len(llm.tokenizer.encode_raw("I must look.</think>" + BOTH.partition("</")[0])))
        expect(call.locator("h3")).to_have_text("Call of warmth")
        expect(call.locator("pre")).to_have_text('{\n  "city": "Paris')
        steps.release(199)
        tab.answer("I look it up.")
    expect(tab.page.locator(".call pre")).to_have_text(
        [json.dumps(json.loads(arguments), indent=2) for arguments in ARGUMENTS]
    )
    paris, rome = tab.page.get_by_label("Result of warmth").all()
    paris.fill("20")
    rome.fill("27")
    with dictated(llm, "Good.</think>Go to Rome."):
        rome.press("Enter")
        tab.answer("Go to Rome.")
    expect(tab.page.get_by_label("Result", exact=True)).to_have_text(["Result of warmth20", "Result of warmth27"])
    assert tab.sent[1]["tools"] == TOOLS
    _, heard, *results = tab.sent[1]["messages"]
    assert (heard["content"], heard["reasoning_content"]) == ("I look it up.", "I must look.")
    assert [call["function"]["arguments"] for call in heard["tool_calls"]] == ARGUMENTS
    assert results == [
        {"role": "tool", "tool_call_id": call["id"], "content": content}
        for call, content in zip(heard["tool_calls"], ("20", "27"), strict=True)
    ]


def test_a_call_is_answered_even_if_something_else_is_said(tab: Tab, llm: LLM) -> None:
    """A history with a call that nothing answers would be refused."""
    tab.set(Tools=json.dumps(TOOLS))
    with dictated(llm, "</think>" + BOTH):
        tab.ask("How warm is it?")
        tab.answer("I look it up.")
    tab.page.get_by_label("Result of warmth").first.fill("20")
    with dictated(llm, THOUGHT):
        tab.ask("Never mind")
        tab.answer("Paris")
    expect(tab.page.locator("article.user")).to_have_text(
        ["How warm is it?", "Result of warmth20", "Result of warmth(empty)", "Never mind"]
    )
    assert [(one["role"], one["content"]) for one in tab.sent[1]["messages"][2:]] == [
        ("tool", "20"), ("tool", ""), ("user", "Never mind")
    ]  # fmt: skip


def test_half_a_call_is_shown_and_not_sent_back(tab: Tab, server: Running, llm: LLM) -> None:
    tab.set(Tools=json.dumps(TOOLS), Max_tokens="60")
    with dictated(llm, "</think>Well." + block(invoke(parameter("city", "a long name " * 20)))):
        tab.ask("How warm is it?")
        tab.answer("the limit of tokens was reached")
        expect(tab.page.locator(".call pre")).to_contain_text('"city": "a long name')
        expect(tab.page.locator(".results")).to_have_count(0)
    with paced(llm, "</think>" + block(invoke(parameter("city", "a long name " * 20)))) as steps:
        tab.ask("And now?")
        steps.release(50)
        expect(tab.page.locator(".call")).to_have_count(2)  # the last one is not the first answer's
        expect(tab.page.locator(".call pre").last).to_contain_text("a long")
        with ending(server, steps):
            tab.page.get_by_role("button", name="Stop").click()
        tab.answer("Stopped.")
    expect(tab.page.locator(".call")).to_have_count(2)
    with dictated(llm, THOUGHT):
        tab.ask("Go on")
        tab.answer("Paris")
    assert tab.sent[1]["messages"][1] == {"role": "assistant", "content": "Well."}
    assert tab.sent[2]["messages"][3] == {"role": "assistant", "content": ""}


def test_what_the_model_wrote_against_its_format_is_shown(tab: Tab, llm: LLM) -> None:
    tab.set(Tools=json.dumps(TOOLS))
    with dictated(llm, BOTH.replace("invoke", "invite")):
        tab.page.get_by_role("button", name="Settings").click()
        tab.page.get_by_label("Thinking").select_option("Off")
        tab.page.get_by_role("button", name="Done").click()
        tab.ask("How warm is it?")
        tab.answer("The model broke its own format")
    expect(tab.page.get_by_role("alert").locator("pre")).to_contain_text("invite")


@pytest.mark.parametrize(("text", "why"), [("[{", "no JSON"), ('{"a": 1}', "A list is wanted"), ("[{}]", "A list")])
def test_tools_that_are_none_are_not_sent(tab: Tab, text: str, why: str) -> None:
    tab.set(Tools=text)
    tab.ask("Hello")
    expect(tab.page.locator("#tools-error")).to_contain_text(why)  # the panel is open again
    expect(tab.page.locator("#tools-error")).to_be_visible()
    assert tab.sent == []


def test_stop_ends_the_request_and_keeps_what_came(tab: Tab, server: Running, llm: LLM) -> None:
    with paced(llm, THOUGHT + " And so on." * 40) as steps:
        tab.ask("Well?")
        steps.release(len(llm.tokenizer.encode_raw(THOUGHT)))
        expect(tab.page.locator(".text")).to_contain_text("It is Paris")
        assert server.metric("requests_running") == 1
        with ending(server, steps):
            tab.page.get_by_role("button", name="Stop").click()
        tab.answer("Stopped.")
    expect(tab.page.locator(".text")).to_contain_text("It is Paris")
    with dictated(llm, THOUGHT):
        tab.ask("Go on")
        tab.answer("Paris")
    assert tab.sent[1]["messages"][1]["content"].startswith("It is **Paris")


def test_a_new_chat_ends_what_runs(tab: Tab, server: Running, llm: LLM) -> None:
    with paced(llm, THOUGHT) as steps:
        tab.ask("Well?")
        steps.release(2)
        expect(tab.page.locator("details p")).to_contain_text("I")
        with ending(server, steps):
            tab.page.get_by_role("button", name="New chat").click()
    with dictated(llm, THOUGHT):
        tab.ask("Afresh")
        tab.answer("Paris")
    assert len(tab.sent[1]["messages"]) == 1


MARKDOWN = """First **bold `x`**, *it*, 2 * 3 * 4
and a second line.

# Title
- one
  - two, nested
  goes on

- three
1. first
---
```py
a = "**b**"
```still code
```
Last ** and ` open"""


def test_a_little_markdown_is_shown_and_what_has_not_changed_stays(tab: Tab, llm: LLM) -> None:
    text = tab.page.locator(".text")
    with paced(llm, f"</think>{MARKDOWN}") as steps:
        tab.ask("Well?")
        steps.release(len(llm.tokenizer.encode_raw(f"</think>{MARKDOWN[: MARKDOWN.index('# T')]}")) + 1)
        expect(text.locator("p").first).to_have_text("First bold x, it, 2 * 3 * 4\nand a second line.")
        first = text.locator("p").first.element_handle()
        steps.release(999)
        tab.answer("open")
    assert first.evaluate("(one) => one.isConnected")
    kinds = text.evaluate("(text) => [...text.children].map((one) => one.localName).join(' ')")
    assert kinds == "p h3 ul ul hr pre p"
    items = text.locator("li").evaluate_all("(all) => all.map((one) => [one.innerText, one.style.listStyleType])")
    assert items == [["one", "disc"], ["two, nested\ngoes on", "disc"], ["three", "disc"], ["first", '"1. "']]
    expect(text.locator("pre code")).to_have_text('a = "**b**"\n```still code')
    expect(text.locator("p").last).to_have_text("Last ** and ` open")
    expect(text.locator("strong code")).to_have_text("x")
    expect(text.locator("em")).to_have_text("it")


def test_the_end_stays_in_sight_unless_somebody_reads_further_up(tab: Tab, llm: LLM) -> None:
    tab.page.set_viewport_size({"width": 600, "height": 400})
    text = "</think>" + "One more line.\n\n" * 30
    below = "() => { const talk = document.querySelector('main'); return talk.scrollHeight - talk.clientHeight - %s; }"
    with paced(llm, text) as steps:
        tab.ask("Well?")
        steps.release(len(llm.tokenizer.encode_raw(text)) // 2)
        until(lambda: tab.page.evaluate(below % 0) > 0, 20)
        assert tab.page.evaluate(below % "talk.scrollTop") < 2
        tab.page.locator("main").evaluate("(talk) => (talk.scrollTop = 0)")
        steps.release(999)
        tab.answer("seed")
    assert tab.page.locator("main").evaluate("(talk) => talk.scrollTop") == 0
    with dictated(llm, text):
        tab.ask("Again")
        expect(tab.page.get_by_label("Answer")).to_have_count(2)
        tab.answer("seed")
    assert tab.page.evaluate(below % "talk.scrollTop") < 2


def test_the_efforts_are_those_of_the_dialect(
    chromium: Any, llm: LLM, server: Running, monkeypatch: pytest.MonkeyPatch
) -> None:
    efforts = {"low": "Think little.", "max": "Think.", "lost": None, "high": ""}
    monkeypatch.setitem(vars(llm), "dialect", replace(llm.dialect, efforts=efforts, default_effort="high"))
    assert server.get("/v1/models/pico").json()["reasoning_efforts"] == ["high", "low", "max"]
    with opened(chromium, server.url) as tab, dictated(llm, THOUGHT):
        choices = tab.page.get_by_label("Thinking")
        expect(choices.locator("option")).to_have_text(["On, high", "On, low", "On, max", "Off"])
        tab.page.get_by_role("button", name="Settings").click()
        choices.select_option("On, low")
        tab.page.keyboard.press("Escape")
        tab.ask("Well?")
        tab.answer("Paris")
    assert tab.sent[0]["reasoning_effort"] == "low"
