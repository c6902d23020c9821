"""A server in a thread on a free port of 127.0.0.1, and a model whose words are dictated."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import httpx
import openai
import torch

from dsv4.chat.tokenizer import Tokenizer
from dsv4.engine.runner import Ran
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.model.batch import Unread
from dsv4.server import run
from dsv4.server.app import Service
from dsv4.server.options import ServerOptions
from tests import PICO
from tests.ran import joined

FRANCE = [{"role": "user", "content": "What is the capital of France?"}]
STORY = [{"role": "user", "content": "Tell me a story."}]
OFF = {"thinking": {"type": "disabled"}}
WORDS = Tokenizer.load(PICO)
ENDLESS = {str(id): -100 for id in (WORDS.eos_id, *WORDS.role_ids)}  # a bias against every end but the last


class Running(NamedTuple):
    """A server that answers at `url`."""

    service: Service
    server: run.Server
    url: str
    thread: threading.Thread
    http: httpx.Client

    def client(self, key: str = "none") -> openai.OpenAI:
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=60)

    def post(self, path: str, sent: Any, **headers: str) -> httpx.Response:
        content = {"content": sent} if isinstance(sent, bytes) else {"json": sent}
        named = {name.replace("_", "-"): value for name, value in headers.items()}
        return self.http.post(path, **content, headers={"content-type": "application/json", **named})

    def get(self, path: str, **headers: str) -> httpx.Response:
        return self.http.get(path, headers=headers)

    def metric(self, name: str) -> float:
        lines = self.get("/metrics").text.splitlines()
        return sum(float(line.rpartition(" ")[2]) for line in lines if line.startswith(f"dsv4_{name} "))

    def ended(self, outcome: str) -> float:
        return self.metric(f'requests_total{{outcome="{outcome}"}}')


@contextmanager
def running(llm: LLM, **options: Any) -> Iterator[Running]:
    """Serve `llm` inside the block."""
    service = Service(llm, ServerOptions(**({"names": ("pico",)} | options)))
    bound, server = run.bind("127.0.0.1", 0), run.Server(service)
    thread = threading.Thread(target=lambda: asyncio.run(server.serve(sockets=[bound])), daemon=True)
    thread.start()
    until(lambda: server.started)
    url = run.url(bound)
    try:
        with httpx.Client(base_url=url, timeout=60, verify=False) as http:  # without TLS there is nothing to verify
            yield Running(service, server, url, thread, http)
    finally:
        server.should_exit = True
        thread.join(60)
        assert not thread.is_alive()


def until(done: Callable[[], Any], seconds: float = 60) -> None:
    """Wait for it, but not for ever."""
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def named_events(server: Running, path: str, sent: Any) -> list[tuple[str, dict[str, Any]]]:
    """The wire of a stream, event by event; each says its type twice."""
    answer = server.post(path, {"stream": True} | sent)
    assert answer.headers["content-type"].startswith("text/event-stream"), answer.text
    out = []
    for event in answer.text.removesuffix("\n\n").split("\n\n"):
        name, data = event.split("\n")
        assert data.startswith("data: ")
        said = json.loads(data.removeprefix("data: "))
        assert name == f"event: {said['type']}"
        out.append((said["type"], said))
    return out


@contextmanager
def changed(llm: LLM, change: Callable[[Work, torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """Inside the block the logits of each piece of work [n, V] are what `change` makes of them."""
    runner = llm.engine._runner
    real = runner.run

    def wrapped(work: Sequence[Work], unread: Unread | None = None) -> Ran:
        streams, logits = real(work, unread)
        parts = zip(work, logits.split([item.asked for item in work]), strict=True)
        return Ran(streams, torch.cat([change(*part) for part in parts]))

    runner.run = wrapped  # type: ignore[method-assign]
    try:
        yield
    finally:
        del runner.run


@contextmanager
def slowly(llm: LLM) -> Iterator[None]:
    """Inside the block a step takes 20 ms or more."""

    def wait(_: Work, logits: torch.Tensor) -> torch.Tensor:
        time.sleep(0.02)
        return logits

    with changed(llm, wait):
        yield


@contextmanager
def gated(llm: LLM) -> Iterator[threading.Event]:
    """Inside the block no step ends before the event is set: what is looked at meanwhile cannot be over already."""
    gate = threading.Event()

    def wait(_: Work, logits: torch.Tensor) -> torch.Tensor:
        gate.wait(120)
        return logits

    with changed(llm, wait):
        try:
            yield gate
        finally:
            gate.set()


@contextmanager
def dictated(llm: LLM, text: str) -> Iterator[list[int]]:
    """Inside the block every answer is this text, control tokens written in it included, and the end of sentence.

    The model itself does not run, which saves time; so `llm` must be loaded without a draft, and without points to go
    on from.
    """
    ids = [*llm.tokenizer.encode_raw(text), llm.tokenizer.eos_id]
    runner = llm.engine._runner
    assert not runner.store.points, "load it with reuse_points=0"

    def dictate(work: Sequence[Work], unread: object = None) -> Ran:
        return joined(Ran(torch.zeros(item.end - item.start, 1, 1), logits(item)) for item in work)

    def logits(item: Work) -> torch.Tensor:
        rows = torch.zeros(int(item.sample), llm.config.vocab_size)
        rows[:, ids[item.end - len(item.request.prompt)] if item.sample else 0] = 100
        return rows

    runner.run = dictate  # type: ignore[method-assign]
    try:
        yield ids
    finally:
        del runner.run
