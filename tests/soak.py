"""Thousands of clients of every kind against one server in a process of its own (`make soak`).

Nothing may be lost, nothing may be left, and nobody may see another's words:

- every completed answer is bit for bit (tokens, logprobs, end) that of the same request alone;
- every prompt holds a word of its own, and an answer with another's is a fault; for a third of the clients the answer
  itself can be made of nothing but tokens that are theirs;
- every request ends in an answer, in a refusal that says why, or because its client went away;
- at the end there is no request, no slot in use, no thread and no open file more than before;
- the server's memory grows by less than GROWTH after its first quarter.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import platform
import random
import re
import socket
import statistics
import struct
import subprocess
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

import httpx

from dsv4.config import EngineOptions
from tests import PICO
from tests.serving import ENDLESS, OFF, WORDS, running, until

ROOT = Path(__file__).resolve().parents[1]
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
KEY = "key-5501"
CLIENTS, POOL, LONG = 24, 24, 4  # clients at once; different requests that are answered alone first, and long ones
SLOTS, QUEUE, STALL = 6, 12, 3.0
GROWTH = 6.0, 0.3  # MiB that the server's memory may grow by: at all, and more for each thousand requests
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


# --- the server's process --------------------------------------------------------------------------------------------


def serve(pipe: Any) -> None:
    """Serve until told otherwise; show what it looks like inside when asked."""
    from dsv4.llm import LLM
    from dsv4.server import run

    bind = run.bind

    def small(host: str, port: int) -> socket.socket:
        bound = bind(host, port)
        bound.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)  # its connections inherit it
        return bound

    run.bind = small
    llm = LLM.load(PICO, EngineOptions(max_sequences=SLOTS, max_context=256, prefill_chunk=24))
    with running(llm, queue=QUEUE, key=KEY, unread=8, stall=STALL, body=100_000) as server:
        pipe.send(server.url)
        while pipe.recv() == "look":
            pipe.send(look(server.service))


LEFT = re.compile("busy|live|waiting|running|held|referenced|reserved|in_use|pinned")  # nothing of it when idle


def look(service: Any) -> dict[str, Any]:
    """`left`: what is in use; `inside`: what has to be the same before and after; `ended`: outcomes so far."""
    engine, worker = service.llm.engine, service.worker
    left = {"clients": len(worker._clients), "posted": len(worker._inbox)}
    for thing in (engine, engine._scheduler, worker):
        for name in filter(LEFT.search, dir(thing)):
            value = getattr(thing, name)
            if not callable(value):
                left[f"{type(thing).__name__}.{name}"] = len(value) if hasattr(value, "__len__") else int(value)
    files = len(os.listdir("/proc/self/fd")) if Path("/proc/self/fd").exists() else 0
    inside = {"free slots": sorted(engine._scheduler._free), "open files": files}
    return {"left": left, "inside": inside, "ended": dict(service.metrics.ended), "crash": worker.crash}


def resident(pid: int) -> float:
    """Memory of a process in MiB; 0 where there is no /proc."""
    with contextlib.suppress(OSError):
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    return 0.0


# --- the whole -------------------------------------------------------------------------------------------------------


def soak(requests: int, seed: int, tell: Callable[[str], None] = lambda _: None) -> dict[str, Any]:
    """Run it. The record says what was asked, what came of it, and in `faults` all that was not as it should be."""
    context = multiprocessing.get_context("spawn")
    pipe, theirs = context.Pipe()
    process = context.Process(target=serve, args=(theirs,), daemon=True)
    process.start()
    theirs.close()
    assert pipe.poll(300), "the server does not start"
    shared = Soak(pipe.recv())
    try:
        return _soak(shared, pipe, process.pid or 0, requests, seed, tell)
    finally:
        shared.http.close()
        with contextlib.suppress(OSError):
            pipe.send("end")
        process.join(60)
        process.kill()


def _soak(shared: Soak, pipe: Any, pid: int, requests: int, seed: int, tell: Callable[[str], None]) -> dict[str, Any]:
    def looked() -> dict[str, Any]:
        pipe.send("look")
        found: dict[str, Any] = pipe.recv()
        return found

    before = looked()["inside"]
    for number in range(POOL):
        shared.alone[f"short {number}"] = found_in(shared.http.post(CHAT, json=sent(number)).json(), False)
    for number in range(LONG):
        shared.alone[f"long {number}"] = found_in(shared.http.post(CHAT, json=long_one(number)).text, True)
    draw, began = random.Random(seed), time.monotonic()
    kinds = draw.choices(list(SHARES), list(SHARES.values()), k=requests)
    curve: list[tuple[float, int, float]] = []
    over = threading.Event()

    def watch() -> None:
        while not over.wait(max(0.1, min(5.0, requests / 2000))):
            curve.append((round(time.monotonic() - began, 1), shared.ended, round(resident(pid), 1)))
            if len(curve) % 12 == 0:
                tell(f"{curve[-1][1]} of {requests} requests, {curve[-1][2]} MiB, {len(shared.faults)} faults")

    def client(one: tuple[int, Callable[[Soak, random.Random, int], str]]) -> None:
        number, act = one
        try:
            shared.end(act.__name__, act(shared, random.Random(f"{seed} {number}"), number))
        except Exception as error:
            shared.end(act.__name__, "fault", f"request {number}: {type(error).__name__}: {error}"[:500])

    watching = threading.Thread(target=watch)
    watching.start()
    try:
        with ThreadPoolExecutor(CLIENTS) as pool:
            list(pool.map(client, enumerate(kinds)))
    finally:
        over.set()
        watching.join()
    seconds = time.monotonic() - began
    again = [found_in(shared.http.post(CHAT, json=sent(number)).json(), False) for number in range(POOL)]
    if again != [shared.alone[f"short {number}"] for number in range(POOL)]:
        shared.faults.append("afterwards the same requests have other answers")
    shared.http.close()
    with contextlib.suppress(AssertionError):  # what is left then is told below
        until(lambda: not any((now := looked())["left"].values()) and now["inside"] == before, 60)
    after = looked()
    shared.faults += [f"left at the end: {name} {count}" for name, count in after["left"].items() if count]
    shared.faults += [
        f"{name}: {before[name]} before, {now} after" for name, now in after["inside"].items() if now != before[name]
    ]
    shared.faults += [f"{name}: {after['ended'][name]} requests" for name in ("error",) if after["ended"].get(name)]
    grown, limit = growth(curve), GROWTH[0] + GROWTH[1] * requests / 1000
    if grown > limit:
        shared.faults.append(f"memory grew by {grown:.1f} MiB after warm-up, more than {limit:g}")
    about = {"what": "soak", **around(), "requests": requests, "seed": seed, "seconds": round(seconds, 1)}
    about |= {"clients": CLIENTS, "slots": SLOTS, "queue": QUEUE, "kinds": outcomes(shared), **after}
    about |= {"memory_grown_mib": round(grown, 1), "memory_limit_mib": limit, "faults": shared.faults[:50]}
    return about | {"memory": {"of": "seconds, requests ended, MiB resident", "curve": curve[:: len(curve) // 100 + 1]}}


def growth(curve: list[tuple[float, int, float]]) -> float:
    """MiB from the median of the second quarter of the samples to that of the last."""
    memory = [sample[2] for sample in curve]
    quarter = len(memory) // 4
    return statistics.median(memory[-quarter:]) - statistics.median(memory[quarter : 2 * quarter]) if quarter else 0.0


def outcomes(shared: Soak) -> dict[str, dict[str, int]]:
    """Kind → outcome → clients."""
    kinds: dict[str, dict[str, int]] = {}
    for (kind, outcome), count in sorted(shared.outcomes.items()):
        kinds.setdefault(kind, {})[outcome] = count
    return kinds


def around() -> dict[str, Any]:
    """When, of what and where a run was."""
    git = subprocess.run(
        ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True, check=False
    )
    return {
        "when": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": git.stdout.strip() or None,
        "model": "tests/pico, on a CPU",
        "python": platform.python_version(),
        "versions": {name: version(name) for name in ("torch", "fastapi", "starlette", "uvicorn", "pydantic", "httpx")},
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m tests.soak", description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 31))
    parser.add_argument("--out", type=Path, help="a file to which the record is added, as one line of JSON")
    asked = parser.parse_args()
    found = soak(asked.requests, asked.seed, lambda line: print(line, flush=True))
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
    shown = {name: value for name, value in found.items() if name != "memory"}
    print(json.dumps(shown, indent=1))
    raise SystemExit(bool(found["faults"]))


if __name__ == "__main__":
    main()
