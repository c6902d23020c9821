"""What engine and server cost per token beside the model: many streams, and a model that takes no time.

    python -m bench.overhead [--streams 32] [--tokens 256] [--greedy] [--profile] [--out FILE]

The model's place takes ready-made rows of logits of the real vocabulary. All else is the real way: schedule, choose,
detokenise, parse, hand over, JSON, server-sent events, sockets. Points to go on from are off: this model has no state
to keep. Reported is what the server's process needs per token: of processor time, by thread, and of time on the clock,
in which the client works on the other core.
"""

from __future__ import annotations

import argparse
import asyncio
import cProfile
import json
import os
import pstats
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from dsv4.bench.ops import circumstances
from dsv4.config import EngineOptions
from dsv4.engine.runner import Ran
from dsv4.engine.scheduler import Work
from dsv4.llm import LLM
from dsv4.server import run
from dsv4.server.app import Service
from dsv4.server.options import ServerOptions

ROWS = 64  # different rows of logits that take turns
WARM_UP = 1  # answers of each stream that do not count


class Clock:
    """Processor time of the engine's thread and of the whole process, from the first counted token to the last."""

    def __init__(self, skip: int, until: int) -> None:
        self.skip, self.until, self.count = skip, until, 0
        self.marks: list[tuple[float, float, float]] = []

    def tick(self, tokens: int) -> None:
        before, self.count = self.count, self.count + tokens
        if before <= self.skip < self.count or before < self.until <= self.count:
            self.marks.append((time.perf_counter(), time.process_time(), time.thread_time()))


def null(llm: LLM, clock: Clock) -> Any:
    """A stand-in for `Runner.run` that answers at once. Its rows choose text, never an end."""
    torch.manual_seed(0)
    ready = 4 * torch.randn(ROWS, llm.config.vocab_size)
    ready[:, [llm.tokenizer.eos_id, *llm.tokenizer.role_ids, *llm.tokenizer.controls.values()]] = -100

    def ran(work: Sequence[Work], unread: object = None) -> Ran:
        clock.tick(sum(item.sample for item in work))
        rows = [(item.end + 7 * item.request.number) % ROWS for item in work if item.sample]
        return Ran(torch.zeros(sum(item.end - item.start for item in work), 1, 1), ready[rows])

    return ran


def measure(streams: int, tokens: int, answers: int, greedy: bool, profile: bool) -> dict[str, Any]:
    options = EngineOptions(
        max_sequences=streams, max_context=tokens + 128, prefill_chunk=4096, draft_tokens=0, reuse_points=0
    )
    llm = LLM.load(options=options)
    clock = Clock(streams * tokens * WARM_UP, streams * tokens * (WARM_UP + answers))
    llm.engine._runner.run = null(llm, clock)  # type: ignore[method-assign]
    service = Service(llm, ServerOptions(names=("tiny",)))
    bound, server = run.bind("127.0.0.1", 0), run.Server(service)
    profiler = cProfile.Profile()
    real = service.worker._run
    if profile:
        service.worker._thread = threading.Thread(target=lambda: profiler.runcall(real), daemon=True)
    loop = cProfile.Profile()

    def serving() -> None:
        asyncio.run(server.serve(sockets=[bound]))

    thread = threading.Thread(target=(lambda: loop.runcall(serving)) if profile else serving, daemon=True)
    thread.start()
    extra = {"temperature": 0} if greedy else {}
    command = f"bench serve {run.url(bound)} --concurrency {streams} --requests {streams * answers} --answer {tokens}"
    command += f" --warm-up {streams * WARM_UP} --prompt 16 --extra"
    client = [sys.executable, "-m", "dsv4.cli.main", *command.split(), json.dumps(extra)]
    subprocess.run(client, check=True)
    server.should_exit = True
    thread.join()
    if profile:
        for one in (profiler, loop):
            pstats.Stats(one).sort_stats("tottime").print_stats(28)
    (wall0, process0, engine0), (wall1, process1, engine1) = clock.marks
    count = streams * tokens * answers
    ms = {"wall": wall1 - wall0, "cpu": process1 - process0, "engine_thread": engine1 - engine0}
    ms["event_loop_and_rest"] = ms["cpu"] - ms["engine_thread"]
    return {f"{name}_ms_per_token": round(1e3 * seconds / count, 4) for name, seconds in ms.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=32)
    parser.add_argument("--tokens", type=int, default=256)
    parser.add_argument("--answers", type=int, default=3, help="of each stream, one after another")
    parser.add_argument("--greedy", action="store_true", help="temperature 0 instead of the model's own sampling")
    parser.add_argument("--profile", action="store_true", help="print where the time goes; slows everything")
    parser.add_argument("--out", type=Path, help="append a line of JSON")
    asked = parser.parse_args()
    found = measure(asked.streams, asked.tokens, asked.answers, asked.greedy, asked.profile)
    how = {"streams": asked.streams, "tokens": asked.tokens, "sampling": "greedy" if asked.greedy else "model's own"}
    line = {
        "bench": "overhead",
        **circumstances(torch.device("cpu")),
        "cores": os.cpu_count(),
        **how,
        **found,
    }
    print(json.dumps(line))
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
