"""Load on an OpenAI-compatible server: who asks what and when, and when each token came.

Open loop: requests begin at the moments of a Poisson process, whatever the server does, and what a request waits
counts from the moment at which it should have begun. Closed loop: so many users, each of whom asks again when answered.
"""

from __future__ import annotations

import asyncio
import hashlib
import itertools
import json
import random
import time
from collections.abc import AsyncIterator, Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Final

from dsv4.check.wire import Broken, Client, data
from dsv4.errors import DSV4Error, RequestError

CHAT: Final = "/chat/completions"
QUESTION: Final = "Tell me a short story about a dog."  # behind the words, to which a model may have nothing to say
OVERHEAD: Final = 14  # tokens of that, of the request's own name and of a turn
WORDS: Final = [
    "time",
    "year",
    "people",
    "way",
    "day",
    "man",
    "thing",
    "woman",
    "life",
    "child",
    "world",
    "school",
    "state",
    "family",
    "hand",
    "part",
    "place",
]


@dataclass(frozen=True)
class Length:
    """A number of tokens, each as likely as the next from `low` to `high`."""

    low: int
    high: int

    @classmethod
    def parse(cls, text: str, name: str) -> Length:
        """`128` or `64-512`. RequestError for anything else."""
        low, dash, high = text.partition("-")
        if not (low.isdecimal() and (high.isdecimal() or not dash) and 1 <= int(low) <= int(high or low)):
            raise RequestError(name, got=repr(text), wanted="a number of tokens, or two as in 64-512")
        return cls(int(low), int(high or low))

    def draw(self, chance: random.Random) -> int:
        """One of them."""
        return chance.randint(self.low, self.high)


@dataclass(frozen=True, kw_only=True)
class Traffic:
    """What is asked. Number n of a seed is always the same request.

    `prompts`: bodies or texts to go through in turn, instead of synthetic words, of which each is about a token. These
    begin differently in each request, behind `shared` words that are the same in all. `extra` goes into every body.
    """

    model: str
    seed: int = 0
    prompt: Length = Length(128, 128)
    answer: Length = Length(64, 64)
    shared: int = 0
    prompts: Sequence[Mapping[str, Any]] = ()
    extra: Mapping[str, Any] = field(default_factory=dict)

    def body(self, number: int) -> bytes:
        """Request `number` as JSON."""
        chance = random.Random(f"{self.seed}/{number}")
        limit, length = self.answer.draw(chance), self.prompt.draw(chance)
        if self.prompts:
            asked = dict(self.prompts[number % len(self.prompts)])
        else:
            asked = {"messages": [{"role": "user", "content": self._text(number, length, chance)}]}
        options = {"model": self.model, "stream": True, "stream_options": {"include_usage": True}}
        return json.dumps({"max_tokens": limit, **asked, **options, **self.extra}).encode()

    def _text(self, number: int, length: int, chance: random.Random) -> str:
        common = random.Random(f"{self.seed}/shared").choices(WORDS, k=self.shared)
        name = hashlib.sha256(f"{self.seed}/{number}".encode()).hexdigest()[:8]
        return " ".join([*common, name, *chance.choices(WORDS, k=max(0, length - OVERHEAD)), QUESTION])


def read_prompts(path: Path) -> list[dict[str, Any]]:
    """Lines of JSON, each {"prompt": text} or {"messages": [...]}, with max_tokens if it has its own."""
    found = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        try:
            tree = json.loads(line)
            if "prompt" in tree:
                tree["messages"] = [{"role": "user", "content": tree.pop("prompt")}]
            found.append({name: tree[name] for name in ("messages", "max_tokens") if name in tree or name[1] == "e"})
        except (ValueError, TypeError, KeyError, AttributeError):
            wanted = '{"prompt": "..."} or {"messages": [...]}'
            raise RequestError(f"{path}, line {number}", got=line[:60], wanted=wanted) from None
    if not found:
        raise RequestError(f"{path} has no prompts")
    return found


@dataclass
class Record:
    """One request. Times in seconds of one clock; `tokens` as the server counts them, else its events with text.

    `cached`: tokens of the prompt that the server says it had.
    """

    intended: float
    begun: float = 0.0
    arrivals: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached: int = 0
    tokens: int = 0
    error: str | None = None


@dataclass
class Point:
    """One load: `rate` requests a second that arrive by chance, or `users` at a time. `records`: those that ended."""

    rate: float | None = None
    users: int | None = None
    records: list[Record] = field(default_factory=list)
    begun: float = 0.0

    @property
    def name(self) -> str:
        """For tables."""
        return f"{self.rate:g}/s" if self.users is None else f"{self.users} users"


async def ask(client: Client, body: bytes, record: Record) -> None:
    """Send one request and note what came when. What goes wrong is in `record.error`, by its kind."""
    record.begun = time.perf_counter()
    try:
        async with client.open("POST", CHAT, body) as answer:
            if answer.status != 200:
                record.error = f"HTTP {answer.status}"
            elif not await _read(answer.lines(), record):
                record.error = "no end"
            elif not record.arrivals:
                record.error = "no text"
    except Broken as error:
        record.error = error.kind
    record.end = time.perf_counter()


async def _read(lines: AsyncIterator[bytes], record: Record) -> bool:
    """Note the events of a stream; whether it came to its end. Lines that are read together arrived together."""
    usage: Any = None
    async for line in lines:
        value = data(line)
        if value == b"[DONE]":
            usage = usage or {}
            record.prompt_tokens = usage.get("prompt_tokens", 0)
            record.cached = (usage.get("prompt_tokens_details") or {}).get("cached_tokens") or 0
            record.tokens = usage.get("completion_tokens") or len(record.arrivals)
            return True
        if value:
            now = time.perf_counter()
            chunk = json.loads(value)
            if chunk.get("error"):
                raise Broken("error in stream", str(chunk["error"])[:300])
            usage = chunk.get("usage") or usage
            if any(_says(choice) for choice in chunk.get("choices") or ()):
                record.arrivals.append(now)
    return False


def _says(choice: Mapping[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    return any(delta.get(name) for name in ("content", "reasoning_content", "reasoning", "tool_calls"))


def arrivals(rate: float, count: int, seed: int) -> Iterator[float]:
    """Moments of a Poisson process, seconds from its beginning."""
    chance, now = random.Random(f"{seed}/arrivals"), 0.0
    for _ in range(count):
        now += chance.expovariate(rate)
        yield now


async def run(
    client: Client,
    bodies: Iterator[bytes],
    point: Point,
    seed: int,
    count: int,
    warm_up: int,
    seen: Callable[[], object],
) -> None:
    """Put one load on the server: `warm_up` requests that do not count, then `count` that do. `seen` after each."""
    warming, counted = list(islice(bodies, warm_up)), list(islice(bodies, count))  # before the clock runs
    await _warm(client, warming, point)
    point.begun = time.perf_counter()

    async def one(body: bytes, intended: float) -> None:
        record = Record(intended)
        await ask(client, body, record)
        point.records.append(record)
        seen()

    if point.rate is not None:
        await _open(one, counted, [point.begun + at for at in arrivals(point.rate, count, seed)])
    else:
        waiting = iter(counted)

        async def user() -> None:
            for body in waiting:  # shared: each body goes to one
                await one(body, time.perf_counter())

        await _together([user() for _ in range(point.users or 1)])


async def _warm(client: Client, bodies: Sequence[bytes], point: Point) -> None:
    """As many at once as later, at most. RequestError if nothing at all is answered."""
    records = [Record(0.0) for _ in bodies]
    for start in range(0, len(bodies), width := point.users or 1):
        some = zip(bodies[start : start + width], records[start : start + width], strict=True)
        await _together([ask(client, body, record) for body, record in some])
    if records and all(record.error for record in records):
        raise RequestError(
            "no request of the warm-up was answered", got=records[0].error, do="try `dsv4 conform` first"
        )


async def _open(one: Callable[[bytes, float], Any], bodies: Sequence[bytes], moments: Sequence[float]) -> None:
    async def later(body: bytes, moment: float) -> None:
        await asyncio.sleep(max(0.0, moment - time.perf_counter()))
        await one(body, moment)

    await _together([later(body, moment) for body, moment in zip(bodies, moments, strict=True)])


async def _together(jobs: Sequence[Any]) -> None:
    """All of them; if one fails or we are told to stop, none goes on."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


def measure(
    client: Client, traffic: Callable[[str], Traffic], points: Sequence[Point], model: str | None, **how: Any
) -> None:
    """Run the points one after another; they hold what is known, also when KeyboardInterrupt ends this."""

    async def all_of_them() -> None:
        asked = traffic(model or await client.first_model())
        bodies = map(asked.body, itertools.count())  # a server may remember what it was asked before
        for point in points:
            await run(client, bodies, point, asked.seed, **how)

    try:
        asyncio.run(all_of_them())
    except asyncio.CancelledError:
        raise KeyboardInterrupt from None
    except json.JSONDecodeError as error:
        raise DSV4Error("the server streams what is no JSON", got=str(error)) from None
