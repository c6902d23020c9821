"""Chromium without a screen, and the server's page in it."""

from __future__ import annotations

import json
import os
import re
import shutil
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import pytest

from dsv4.engine.runner import Ran
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.model.batch import Unread
from tests.serving import Running, dictated, until

playwright = pytest.importorskip("playwright.sync_api", reason="no playwright (pip install 'dsv4[test]')")
expect = playwright.expect

THOUGHT = "I know this one.</think>It is **Paris**."  # what most of its tests have said
FLAGS = [  # without them it would look for the network
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--no-first-run",
]


@contextmanager
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


@contextmanager
def paced(llm: LLM, text: str) -> Iterator[threading.Semaphore]:
    """Inside the block every answer is this text, and each step of the engine waits for a release."""
    with dictated(llm, text):
        runner, steps = llm.engine._runner, threading.Semaphore(0)
        real = runner.run

        def run(work: Sequence[Work], unread: Unread | None = None) -> Ran:
            steps.acquire(timeout=60)
            return real(work, unread)

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
