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
import subprocess
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime, timezone
from importlib.metadata import version
from pathlib import Path
from typing import Any

from dsv4.config import EngineOptions
from tests import PICO
from tests.serving import running, until
from tests.soak_clients import CHAT, KEY, LONG, POOL, SHARES, STALL, Soak, found_in, long_one, sent

ROOT = Path(__file__).resolve().parents[1]
CLIENTS, SLOTS, QUEUE = 24, 6, 12
GROWTH = 6.0, 0.3  # MiB that the server's memory may grow by: at all, and more for each thousand requests


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
