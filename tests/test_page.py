"""The page at /, in a real Chromium without a screen: what a user sees and does, and what the page must never do."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import pytest

from dsv4.config import EngineOptions
from dsv4.engine.runner import Ran
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.server.static import FILES, FOLDER
from tests import PICO
from tests.serving import Running, dictated, running, until
from tests.test_server_tools import ARGUMENTS, BOTH, TOOLS, block, invoke, parameter

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install 'dsv4[test]')")
expect = playwright.expect

FLAGS = [  # without them it would look for the network
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]
THOUGHT = "I know this one.</think>It is **Paris**."
CANARY = "<img src=x onerror='window.hit=1'><script>window.hit=2</script><a href='javascript:window.hit=3'>here</a>"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0, reuse_points=0))


@pytest.fixture
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """Debian's or whichever there is: playwright would fetch one of its own."""
    path = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if path is None:
        pytest.skip("no Chromium (Debian: apt install chromium)")
    expect.set_options(timeout=20_000)
    with playwright.sync_playwright() as driver:
        root = os.geteuid() == 0  # Chromium's sandbox does not start for root
        browser = driver.chromium.launch(executable_path=path, args=FLAGS, chromium_sandbox=not root)
        yield browser
        browser.close()


class Tab(NamedTuple):
    """A page, and what it did: complaints in its console, addresses that it asked for, bodies that it sent."""

    page: Any
    complaints: list[str]
    addresses: list[str]
    sent: list[dict[str, Any]]

    def ask(self, text: str) -> None:
        self.page.get_by_label("Message").fill(text)
        self.page.get_by_label("Message").press("Enter")

    def answer(self, text: str | re.Pattern[str]) -> None:
        """The last answer is whole, and this is in it."""
        answer = self.page.get_by_label("Answer").last
        expect(answer).to_contain_text(text)
        expect(answer).to_have_attribute("aria-busy", "false")

    def set(self, **values: str) -> None:
        self.page.get_by_role("button", name="Settings").click()
        for label, value in values.items():
            self.page.get_by_label(label.replace("_", " ")).fill(value)
        self.page.get_by_role("button", name="Done").click()


@contextmanager
def opened(chromium: Any, url: str, complaints: int = 0, **context: Any) -> Iterator[Tab]:
    """The page in a fresh context. It asks nobody but its server, and its console has so many complaints at the end."""
    with chromium.new_context(**context) as fresh:
        fresh.set_default_timeout(10_000)
        page = fresh.new_page()
        tab = Tab(page, [], [], [])
        page.on("console", lambda line: tab.complaints.append(line.text) if line.type in ("error", "warning") else None)
        page.on("pageerror", lambda error: tab.complaints.append(str(error)))
        page.on("request", lambda request: _note(tab, request))
        page.goto(url)
        yield tab
        assert len(tab.complaints) == complaints, tab.complaints
        assert {address for address in tab.addresses if not address.startswith(f"{url}/")} == set()


def _note(tab: Tab, request: Any) -> None:
    tab.addresses.append(request.url)
    if request.method == "POST":
        tab.sent.append(json.loads(request.post_data))


@pytest.fixture
def tab(chromium: Any, server: Running) -> Iterator[Tab]:
    with opened(chromium, server.url) as tab:
        yield tab


@contextmanager
def paced(llm: LLM, text: str) -> Iterator[threading.Semaphore]:
    """Inside the block every answer is this text, and each step of the engine waits for a release."""
    with dictated(llm, text):
        runner, steps = llm.engine._runner, threading.Semaphore(0)
        real = runner.run

        def run(work: Sequence[Work]) -> list[Ran]:
            steps.acquire(timeout=60)
            return real(work)

        runner.run = run  # type: ignore[method-assign]
        try:
            yield steps
        finally:
            steps.release(10_000)


@contextmanager
def ending(server: Running, steps: threading.Semaphore, count: int = 1) -> Iterator[None]:
    """What is done inside the block ends all `count` requests that run: the server has let go of them behind it."""
    before = server.ended("cancelled")
    yield
    until(lambda: server.ended("cancelled") == before + count)
    steps.release(1)  # not before: the engine would wait in the step after, and hear of nothing
    until(lambda: server.metric("requests_running") == 0)


def cut(server: Running) -> None:
    """End every connection that carries half an answer."""

    def end(connection: Any) -> None:
        if connection.cycle and not connection.cycle.response_complete:
            connection.transport.abort()

    for connection in list(server.server.server_state.connections):
        connection.loop.call_soon_threadsafe(end, connection)  # there nothing is between two states


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


# --- what goes wrong -------------------------------------------------------------------------------------------------


def test_a_key_is_asked_for_until_it_is_right_and_gone_with_the_tab(chromium: Any, llm: LLM) -> None:
    with running(llm, key="right") as server, opened(chromium, server.url, complaints=3) as tab:
        tab.page.get_by_role("textbox", name="Key").fill("wrong")
        tab.page.get_by_role("button", name="Use it").click()
        expect(tab.page.locator("#key-error")).to_have_text(re.compile("^401: the API key is wrong or missing"))
        tab.page.get_by_role("button", name="Cancel").click()
        expect(tab.page.get_by_role("alert")).to_contain_text("401")
        with dictated(llm, THOUGHT):
            tab.ask("Well?")
            tab.page.get_by_role("textbox", name="Key").fill("right")
            tab.page.get_by_role("textbox", name="Key").press("Enter")
            tab.answer("Paris")
        expect(tab.page.get_by_label("Model")).to_contain_text("pico")
        assert tab.page.evaluate("[sessionStorage.length, localStorage.length, document.cookie]") == [1, 0, ""]
        tab.page.reload()
        expect(tab.page.get_by_label("Model")).to_contain_text("pico")


def test_what_the_server_refuses_is_shown_in_its_words_and_can_be_sent_again(chromium: Any, server: Running) -> None:
    with opened(chromium, server.url, complaints=2) as tab:
        tab.set(Max_tokens="100000")
        tab.ask("Well?")
        expect(tab.page.get_by_role("alert")).to_contain_text("400: prompt and answer do not fit into the context")
        expect(tab.page.get_by_label("Message")).to_have_value("Well?")
        expect(tab.page.get_by_label("You")).to_have_count(0)
        tab.set(Max_tokens="")
        server.service.worker.drain()
        tab.page.get_by_role("button", name="Send").click()
        shutting = "503: the server is shutting down (try again in 5 s)"
        expect(tab.page.get_by_role("alert").last).to_have_text(shutting)
        assert len(tab.sent[1]["messages"]) == 1


def test_a_full_queue_is_told(chromium: Any, llm: LLM) -> None:
    asked = {"messages": [{"role": "user", "content": "x"}], "n": 2, "stream": True}
    with (
        running(llm, queue=0) as server,
        opened(chromium, server.url, complaints=1) as tab,
        paced(llm, THOUGHT) as steps,
        ending(server, steps, count=2),
        server.http.stream("POST", "/v1/chat/completions", json=asked),
    ):
        tab.ask("Well?")
        expect(tab.page.get_by_role("alert")).to_contain_text("429: the queue is full")


def test_a_deadline_in_the_middle_is_told(chromium: Any, llm: LLM) -> None:
    with running(llm, deadline=1.0) as server, opened(chromium, server.url) as tab, paced(llm, THOUGHT) as steps:
        tab.ask("Well?")
        steps.release(4)
        expect(tab.page.locator("details p")).to_contain_text("I know")
        tab.page.wait_for_timeout(1000)  # until it is over
        steps.release(1)
        tab.answer("the deadline has passed")
        expect(tab.page.locator("details p")).to_contain_text("I know")


def test_a_lost_connection_keeps_what_came_and_a_missing_server_is_named(chromium: Any, llm: LLM) -> None:
    with running(llm) as server, opened(chromium, server.url, complaints=2) as tab:
        with paced(llm, THOUGHT) as steps:
            tab.ask("Well?")
            steps.release(4)
            expect(tab.page.locator("details p")).to_contain_text("I know")
            with ending(server, steps):
                cut(server)
            tab.answer("The connection was lost")
            expect(tab.page.locator("details p")).to_contain_text("I know")
        half = 'data: {"choices": [{"index": 0, "delta": {"content": "Half"}, "finish_reason": null}]}\n\n'
        tab.page.route(
            "**/chat/completions", lambda route: route.fulfill(body=half)
        )  # as a proxy ends it: in good order
        tab.ask("Well?")
        tab.answer("Half")
        tab.answer("The connection was lost")
        tab.page.unroute_all()
        server.server.should_exit = True
        server.thread.join(60)
        tab.ask("And now?")
        expect(tab.page.get_by_role("alert").last).to_have_text("The server cannot be reached.")
        expect(tab.page.get_by_label("Message")).to_have_value("And now?")


# --- what must never happen ------------------------------------------------------------------------------------------


def test_markup_stays_text_whoever_wrote_it(tab: Tab, llm: LLM) -> None:
    code = f"```html\n{CANARY}\n```"
    call = block(invoke(parameter("city", CANARY)))
    tab.set(Tools=json.dumps(TOOLS))
    with dictated(llm, f"{CANARY}</think>{CANARY}\n\n# {CANARY}\n- **{CANARY}**\n{code}{call}"):
        tab.ask(CANARY)
        tab.answer(CANARY)
    tab.page.get_by_label("Result of warmth").fill(CANARY)
    with dictated(llm, THOUGHT):
        tab.page.get_by_label("Result of warmth").press("Enter")
        tab.answer("Paris")
    expect(tab.page.get_by_label("You")).to_have_text(CANARY)
    expect(tab.page.get_by_label("Result", exact=True)).to_contain_text(CANARY)
    expect(tab.page.locator("pre").first).to_have_text(f"html{CANARY}")
    assert tab.page.locator("main :is(img, script, a)").count() == 0
    assert tab.page.evaluate("window.hit") is None


HOLES = [  # what a hole in the page could do, and which part of the policy says no
    ("document.head.append(Object.assign(document.createElement('script'), {text: 'window.hit = 1'}))", "Trusted"),
    ("document.body.innerHTML = '<b>x</b>'", "Trusted"),
    ("document.body.append(Object.assign(new Image(), {src: 'http://127.0.0.1:9/x'}))", "img-src 'self'"),
    ("fetch('http://127.0.0.1:9/x').catch(() => 0)", "connect-src 'self'"),
    ("document.body.setAttribute('style', 'color: red')", "style-src 'self'"),
    (
        "document.body.append(document.createElement('iframe')), frames[0].location = 'http://127.0.0.1:9'",
        "default-src",
    ),
]


def test_the_policy_is_in_force(chromium: Any, server: Running) -> None:
    with chromium.new_context() as fresh:
        page = fresh.new_page()
        page.goto(server.url)
        for script, why in HOLES:
            with page.expect_console_message(lambda line, why=why: why in line.text, timeout=20_000):
                page.evaluate(f"() => {{ try {{ {script} }} catch (error) {{ console.log(error.message) }} }}")
        assert page.evaluate("window.hit") is None


# --- how it looks ----------------------------------------------------------------------------------------------------

LONG = "y" * 300
WIDE = f"{LONG}</think>{LONG}\n\n- {LONG}\n\n```\n{LONG}\n```\n\n# {LONG}" + block(invoke(parameter("city", LONG)))


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_shows_all_of_it_without_scrolling_sideways(
    chromium: Any, server: Running, llm: LLM, scheme: str, tmp_path: Path
) -> None:
    phone = {"viewport": {"width": 360, "height": 640}, "color_scheme": scheme}
    with opened(chromium, server.url, **phone) as tab, dictated(llm, WIDE):
        tab.set(Tools=json.dumps(TOOLS))
        tab.ask(LONG)
        tab.answer(LONG)
        tab.page.locator("summary").click()
        assert overflowing(tab.page) == []
        tab.page.get_by_role("button", name="Settings").click()
        assert overflowing(tab.page) == []
        back = tab.page.evaluate("getComputedStyle(document.body).backgroundColor")
        brightness = sum(map(int, re.findall(r"\d+", back)[:3])) / 3
        assert brightness > 200 if scheme == "light" else brightness < 60


def overflowing(page: Any) -> list[str]:
    """What can be seen and reaches out of the window, or would have to be scrolled sideways; code may."""
    return page.evaluate("""() => [...document.querySelectorAll("body, body *")].filter((one) => {
        const box = one.getBoundingClientRect();
        const inCode = one.parentElement.closest("pre");
        const clipped = one.scrollWidth > one.clientWidth && getComputedStyle(one).overflowX !== "hidden";
        const scrolls = clipped && one.clientWidth && !one.matches("pre, textarea, select, code, span");
        return box.width && !inCode && (box.left < 0 || box.right > innerWidth || scrolls);
    }).map((one) => one.outerHTML.slice(0, 80))""")


def test_every_control_has_a_name_and_texts_can_be_read(chromium: Any, server: Running, llm: LLM) -> None:
    for scheme in ("light", "dark"):
        with opened(chromium, server.url, color_scheme=scheme) as tab, dictated(llm, THOUGHT):
            tab.ask("Well?")
            tab.answer("Paris")
            tab.page.get_by_role("button", name="Settings").click()
            for control in tab.page.locator(":is(button, input, textarea, select):visible").all():
                assert re.match(r'- \w+ "', control.aria_snapshot()) or 'combobox "' in control.aria_snapshot()
            for place in ("#model", ".user", "summary", ".text p", "footer span", "#settings label"):
                assert contrast(tab.page.locator(place).first) >= 4.5, (scheme, place)


def contrast(element: Any) -> float:
    """Of a text with what is behind it, as WCAG counts it."""
    front, back = element.evaluate("""(one) => {
        let behind = one;
        while (getComputedStyle(behind).backgroundColor === "rgba(0, 0, 0, 0)") behind = behind.parentElement;
        return [getComputedStyle(one).color, getComputedStyle(behind).backgroundColor];
    }""")
    lighter, darker = sorted((luminance(front), luminance(back)), reverse=True)
    return (lighter + 0.05) / (darker + 0.05)


def luminance(color: str) -> float:
    parts = [int(part) / 255 for part in re.findall(r"\d+", color)[:3]]
    linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
