"""The page at / in a real Chromium: when things go wrong, what it must never do, and how it looks."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dsv4.config import EngineOptions
from dsv4.llm import LLM
from tests import PICO
from tests.browser import THOUGHT, Tab, cut, ending, expect, opened, paced
from tests.serving import Running, dictated, running
from tests.test_server_tools import TOOLS, block, invoke, parameter

pytestmark = pytest.mark.slow  # what test_page.py shows of it changes more often

CANARY = "<img src=x onerror='window.hit=1'><script>window.hit=2</script><a href='javascript:window.hit=3'>here</a>"


@pytest.fixture(scope="module")
def llm() -> LLM:
    return LLM.load(PICO, EngineOptions(max_sequences=2, max_context=1024, draft_tokens=0, reuse_points=0))


@pytest.fixture
def server(llm: LLM) -> Iterator[Running]:
    with running(llm) as server:
        yield server


@pytest.fixture
def tab(chromium: Any, server: Running) -> Iterator[Tab]:
    with opened(chromium, server.url) as tab:
        yield tab


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
