"""The clients of the soak: what they ask, how they behave, and what each of them must find."""

from __future__ import annotations

import contextlib
import json
import random
import re
import socket
import struct
import threading
import time
from collections import Counter
from collections.abc import Callable
from functools import cache
from typing import Any

import httpx

from tests.serving import ENDLESS, OFF, WORDS

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = "key-5501"
POOL, LONG = 24, 4  # different requests that are answered alone first, and long ones
STALL = 3.0
REASONS = {429: "queue_full", 504: "deadline_exceeded", 401: "invalid_api_key", 413: "body_too_large"}


class Soak:
    """What clients share: where the server is, what is right, what was found."""

    def __init__(self, url: str) -> None:
        self.url = httpx.URL(url)
        self.http = httpx.Client(base_url=url, timeout=120, headers={"Authorization": f"Bearer {KEY}"}, verify=False)
        self.alone: dict[str, Any] = {}
        self.outcomes: Counter[tuple[str, str]] = Counter()
        self.faults: list[str] = []
        self.ended = 0
        self._lock = threading.Lock()

    def end(self, kind: str, outcome: str, fault: str | None = None) -> None:
        """One client is done."""
        with self._lock:
            self.outcomes[kind, outcome] += 1
            self.ended += 1
            if fault is not None:
                self.faults.append(f"{kind}: {fault}")


# --- requests --------------------------------------------------------------------------------------------------------


def sent(number: int, **changes: Any) -> dict[str, Any]:
    """One of the requests that can be compared: lengths, sampling and text are drawn, the same for the same number."""
    draw = random.Random(number)
    words = " ".join(draw.choices(("capital", "France", "story", "fish", "king"), k=draw.randint(1, 40)))
    return {
        "messages": [{"role": "user", "content": f"canary-{number}. {words}"}],
        "temperature": draw.choice((0, 1, 1.7)),
        "seed": number,
        "max_tokens": draw.randint(1, 12),
        "logprobs": True,
        "top_logprobs": 2,
    } | OFF | changes  # fmt: skip


def long_one(number: int) -> dict[str, Any]:
    """An answer of more bytes than all the buffers on its way hold."""
    return sent(number, stream=True, max_tokens=90, top_logprobs=20, logit_bias=ENDLESS)


def found_in(answer: Any, stream: bool) -> list[Any]:
    """Tokens with logprobs, and why it ended; of a stream that ended with an error, that."""
    if not stream:
        (choice,) = answer["choices"]
        return [choice["logprobs"]["content"], choice["finish_reason"]]
    lines = [json.loads(line[6:]) for line in answer.split("\n\n") if line.startswith("data: {")]
    choices = [choice for line in lines for choice in line.get("choices", ())]
    entries = [entry for choice in choices for entry in choice.get("logprobs", {}).get("content", ())]
    return [entries, lines[-1].get("error", {}).get("code") or choices[-1]["finish_reason"]]


def refusal(answer: httpx.Response, kind: str) -> str:
    """What a refused client counts as; AssertionError if it is not told why, in the form that is promised."""
    error = answer.json()["error"]
    assert error["message"], answer.text
    wanted = REASONS.get(answer.status_code)
    assert wanted is None or error["code"] == wanted, answer.text
    assert answer.status_code != 429 or int(answer.headers["retry-after"]) >= 1
    assert answer.status_code in REASONS or answer.status_code == 400, (kind, answer.status_code, answer.text)
    return f"refused {answer.status_code}"


# --- clients: each returns its outcome, or raises --------------------------------------------------------------------


def taken(soak: Soak, draw: random.Random, path: str, asked: Any) -> httpx.Response:
    """The answer of those who come again when the queue is full."""
    while (answer := soak.http.post(path, json=asked)).status_code == 429:
        refusal(answer, "taken")
        time.sleep(draw.uniform(0.05, 0.2))
    assert answer.status_code == 200, answer.text
    return answer


def compared(soak: Soak, draw: random.Random, number: int) -> str:
    """Whole or streamed, in the end it has the answer that it would have alone."""
    stream, which = draw.random() < 0.5, number % POOL
    answer = taken(soak, draw, CHAT, sent(which, stream=stream))
    found = found_in(answer.text if stream else answer.json(), stream)
    assert found == soak.alone[f"short {which}"], "not what it is alone"
    return "answered"


def own_words(soak: Soak, draw: random.Random, number: int) -> str:
    """A prompt that comes back and an answer of three tokens that are its own: nothing of anybody else's fits in."""
    ids = random.Random(number).sample(letters(), 3)
    canary, count = f"canary-{number}. " + "fish " * draw.randint(0, 30), draw.randint(1, 10)
    asked = {"prompt": canary, "echo": True, "max_tokens": count, "seed": number, "stream": draw.random() < 0.5}
    answer = taken(soak, draw, TEXT, asked | {"logit_bias": dict.fromkeys(map(str, ids), 100)})
    if asked["stream"]:
        lines = [json.loads(line[6:]) for line in answer.text.split("\n\n") if line.startswith("data: {")]
        said = "".join(choice["text"] for line in lines for choice in line["choices"])
    else:
        said = answer.json()["choices"][0]["text"]
    mine = "|".join(re.escape(WORDS.decode([id])) for id in ids)
    assert re.fullmatch(f"{re.escape(canary)}({mine}){{{count}}}", said), f"{said!r} is more than {canary!r} and {mine}"
    return "answered"


@cache
def letters() -> list[int]:
    """Tokens that are whole characters."""
    return [id for id in range(300, 4000) if (text := WORDS.decode([id])) and "\ufffd" not in text]


def many(soak: Soak, draw: random.Random, number: int) -> str:
    """Three answers of one prompt: the first is that of the prompt alone, as far as it goes."""
    choices = taken(soak, draw, CHAT, sent(number % POOL, n=3, max_tokens=2)).json()["choices"]
    assert [choice["index"] for choice in choices] == [0, 1, 2]
    assert choices[0]["logprobs"]["content"] == soak.alone[f"short {number % POOL}"][0][:2]
    return "answered"


def leaving(soak: Soak, draw: random.Random, number: int) -> str:
    """Reads a little of a stream, or waits a little for a whole answer, and goes."""
    asked = sent(number % POOL, stream=draw.random() < 0.5, max_tokens=150, logit_bias=ENDLESS)
    with (
        contextlib.suppress(httpx.ReadTimeout),
        soak.http.stream("POST", CHAT, json=asked, timeout=httpx.Timeout(120, read=0.3)) as answer,
    ):
        if answer.status_code != 200:
            answer.read()
            return refusal(answer, "leaving")
        lines = answer.iter_lines()
        for _ in range(draw.randrange(12)):
            next(lines, None)
    return "left"


def cutting(soak: Soak, draw: random.Random, number: int) -> str:
    """Resets its connection: with half a request on the way, at once behind it, or in the middle of a stream."""
    asked = request(soak, sent(number % POOL, stream=True, max_tokens=150, logit_bias=ENDLESS))
    with dialled(soak) as line:
        line.sendall(asked[: draw.choice((len(asked) // 2, len(asked)))])
        if draw.random() < 0.5:
            line.settimeout(0.3)
            with contextlib.suppress(TimeoutError):
                line.recv(draw.randint(1, 2000))
        line.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    return "left"


def slow(soak: Soak, draw: random.Random, number: int) -> str:
    """Reads less at a time than the server has for it."""
    return trickle(soak, draw, number, lambda _: time.sleep(0.002))


def not_reading(soak: Soak, draw: random.Random, number: int) -> str:
    """Reads no more than the beginning until the server has given it up."""
    waits = iter([STALL + 2])
    return trickle(soak, draw, number, lambda read: time.sleep(next(waits, 0) if read > 3000 else 0))


def trickle(soak: Soak, draw: random.Random, number: int, pause: Callable[[int], None]) -> str:
    """A long answer, with a pause after each piece, given what has been read by then."""
    which, status = number % LONG, 429
    while status == 429:
        with dialled(soak) as line:
            line.sendall(request(soak, long_one(which)))
            pieces = []
            while piece := line.recv(2048):
                pieces.append(piece)
                pause(sum(map(len, pieces)))
        head, _, body = b"".join(pieces).partition(b"\r\n\r\n")
        status = int(head.split()[1])
        time.sleep(draw.uniform(0.05, 0.2))
    assert status == 200, body
    entries, why = found_in(unchunked(body).decode(), True)
    right, end = soak.alone[f"long {which}"]
    if why == "reader_stalled":
        assert entries == right[: len(entries)], "not what it is alone"
        return "stalled"
    assert (entries, why) == (right, end), "not what it is alone"
    return "answered"


def late(soak: Soak, draw: random.Random, number: int) -> str:
    """Has less time than its answer takes."""
    stream = draw.random() < 0.5
    asked = sent(number % POOL, stream=stream, max_tokens=150, logit_bias=ENDLESS, timeout=draw.uniform(0.01, 3))
    answer = soak.http.post(CHAT, json=asked)
    if answer.status_code != 200:
        return refusal(answer, "late")
    end = found_in(answer.text if stream else answer.json(), stream)[1]
    assert end in ("deadline_exceeded", "length"), end
    return "deadline in the stream" if end == "deadline_exceeded" else "answered"


def malformed(soak: Soak, draw: random.Random, number: int) -> str:
    whole = json.dumps(sent(number % POOL)).encode()
    cut = whole[: draw.randrange(len(whole))]
    hurt = bytearray(whole)
    hurt[draw.randrange(len(hurt))] = draw.choice((0, 0x22, 0x7B, 0x80, 0xFF))
    wrong = json.dumps(sent(number % POOL) | {draw.choice(("messages", "n", "seed", "stop")): {"x": [1]}}).encode()
    answer = soak.http.post(CHAT, content=draw.choice((cut, wrong)), headers={"content-type": "application/json"})
    assert answer.status_code == 400, answer.text
    said = refusal(answer, "malformed")
    answer = soak.http.post(CHAT, content=bytes(hurt), headers={"content-type": "application/json"})
    if answer.status_code != 200:  # a byte inside a text may leave a good request
        refusal(answer, "malformed")
    return said


def oversized(soak: Soak, draw: random.Random, number: int) -> str:
    """A prompt that does not fit, or a body that is too large."""
    words = draw.choice((400, 30000))
    answer = soak.http.post(CHAT, json={"messages": [{"role": "user", "content": "fish " * words}]})
    assert answer.status_code == (400 if words == 400 else 413), answer.text
    return refusal(answer, "oversized")


def wrong_key(soak: Soak, draw: random.Random, number: int) -> str:
    answer = soak.http.post(CHAT, json=sent(number % POOL), headers={"Authorization": f"Bearer {number}"})
    assert answer.status_code == 401, answer.text
    return refusal(answer, "wrong_key")


# kind: its share of the clients.
SHARES: dict[Callable[[Soak, random.Random, int], str], int] = {
    compared: 36, own_words: 32, many: 4, leaving: 6, cutting: 6, malformed: 6, oversized: 3, wrong_key: 3, late: 2,
    slow: 1, not_reading: 1,
}  # fmt: skip


# --- sockets ---------------------------------------------------------------------------------------------------------


def dialled(soak: Soak) -> socket.socket:
    """A connection with the least of buffers."""
    line = socket.socket()
    line.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    line.settimeout(120)
    line.connect((soak.url.host, soak.url.port))
    return line


def request(soak: Soak, asked: Any) -> bytes:
    body = json.dumps(asked).encode()
    head = f"POST {CHAT} HTTP/1.1\r\nHost: {soak.url.host}\r\nAuthorization: Bearer {KEY}\r\nConnection: close\r\n"
    return f"{head}Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


def unchunked(body: bytes) -> bytes:
    out = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        out, body = out + body[: int(size, 16)], body[int(size, 16) + 2 :]
    return out
