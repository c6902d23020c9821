"""`dsv4 bench ops`: the timed cases of the contract through every implementation, one line of JSON for each.

A case runs in a CUDA graph over as many sets of arguments as overflow the L2 cache, for a layer's weights are cold when
it begins. (Launched one by one, thousands of rows take the GPU less time than Python.) The floor is the time in which
the same machine, in the same run, copies as many bytes as the op has to read and write. FP8 products are also held
against what the library's own of 8,192 x 8,192 x 8,192 reaches there.
"""

from __future__ import annotations

import json
import math
import platform
import subprocess
from collections.abc import Iterator, Mapping, Sequence
from datetime import date
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from torch import Tensor

from dsv4 import __version__
from dsv4.bench.clock import SAMPLES, Call, Timing, copy_bandwidth, fp8_peak, in_graph, on_cpu
from dsv4.check.cases import cases
from dsv4.check.contract import Arguments, Case, Run, placed
from dsv4.check.fences import transform
from dsv4.check.verify import implementations, prepare
from dsv4.ops.op import pure

FEW: Final = 64  # tokens up to which a call takes microseconds
_CALLS: Final = {True: 64, False: 8}  # of a graph, at least: of few tokens, and of more
_LASTS: Final = 400e-6  # seconds of a replay, at least: it takes about 5 µs beside the calls
_MOST_COPIES: Final = 64
TURNS: Final = 16  # sets of arguments that share what is large


class Measured(NamedTuple):
    """One implementation of one case. nbytes: what the op has to read and write. copy: bytes a second.

    peak: of FP8 products, FLOP a second; 0 where that was not measured.
    """

    case: Case
    implementation: str
    timing: Timing
    nbytes: int
    copy: float
    peak: float = 0.0

    @property
    def floor(self) -> float:
        """Seconds in which the machine copies as much."""
        return self.nbytes / self.copy

    @property
    def speed(self) -> float:
        """FLOP a second."""
        return self.case.flops / self.timing.seconds

    def line(self) -> dict[str, Any]:
        """What goes into a file of results, without what all lines share."""
        micro = [round(1e6 * seconds, 3) for seconds in self.timing[:3]]
        line = {
            "op": self.case.op.name,
            "case": self.case.name,
            "implementation": self.implementation,
            "how": self.timing.how,
            "microseconds": micro[0],
            "spread": micro[1:],
            "bytes": self.nbytes,
            "floor_microseconds": round(1e6 * self.floor, 3),
            "of_copy_bandwidth": round(self.floor / self.timing.seconds, 4),
            "copy_GB_per_s": round(self.copy / 1e9, 1),
        }
        if self.peak and self.case.flops:
            line["TFLOP_per_s"] = round(self.speed / 1e12, 1)
            line["of_fp8_peak"] = round(self.speed / self.peak, 4)
            line["fp8_peak_TFLOP_per_s"] = round(self.peak / 1e12, 1)
        return line


def timed(*families: str, op: str | None = None, only: str = "") -> list[Case]:
    """The cases that have a named size."""
    return [case for case in cases(*families) if case.bench and op in (None, case.op.name) and only in case.name]


def measure(chosen: Sequence[Case], device: torch.device, samples: int = SAMPLES) -> Iterator[Measured]:
    """Time every implementation of every case; on a CPU the references, of one token alone."""
    prepare()
    copy = copy_bandwidth(device, samples)
    hopper = device.type == "cuda" and torch.cuda.get_device_capability(device) >= (9, 0)
    peak = fp8_peak(device, samples) if hopper and any(case.flops for case in chosen) else 0.0
    for case in chosen:
        if device.type == "cpu" and case.size in ("big", "timed"):
            continue
        given = placed(case.make(), device)
        runs = {
            name: run
            for name, run in implementations(case.op, device).items()
            if name != "auto" and _accepts(case, name, given)
        }
        first = next(iter(runs.values()), case.op.reference)  # a kernel: a reference takes seconds for what is large
        with torch.no_grad(), pure():
            nbytes = moved(case, given, first(*given))
        for name, run in runs.items():
            yield Measured(case, name, clocked(case, run, given, samples), nbytes, copy, peak)


def moved(case: Case, given: Arguments, found: Any) -> int:
    """Bytes that the op has to read and write at least: every tensor once, or what the case says."""
    if case.moved is not None:
        return case.moved(given, found)
    seen: dict[tuple[int, int], int] = {}

    def count(x: Tensor) -> Tensor:
        seen[x.data_ptr(), x.nbytes] = x.nbytes
        return x

    transform((given, found), count)
    return sum(seen.values())


def _accepts(case: Case, name: str, given: Arguments) -> bool:
    return case.op.implementations[name].accepts(*given) is None


def clocked(case: Case, run: Run, given: Arguments, samples: int = SAMPLES) -> Timing:
    """In a CUDA graph, of as many calls as make a replay last; on a CPU alone."""
    device, tokens = given[0].device, len(given[case.tokens[0]])
    if device.type != "cuda":
        return on_cpu([partial(run, *given)], samples)
    with torch.no_grad():
        turns = [case.turn(given, n) for n in range(TURNS)] if case.turn else sets(given, l2_cache(device))
        calls: list[Call] = [partial(run, *one) for one in turns]
        calls *= -(-_CALLS[tokens <= FEW] // len(calls))
        found = in_graph(calls, samples)
        if tokens > FEW and (more := math.ceil(_LASTS / (found.seconds * len(calls)))) > 1:
            found = in_graph(calls * more, samples)
        return found


def l2_cache(device: torch.device) -> int:
    """Bytes."""
    return int(torch.cuda.get_device_properties(device).L2_cache_size)


def sets(given: Arguments, cache: int) -> list[Arguments]:
    """The arguments, as often as it takes to overflow a cache of so many bytes twice."""
    total: list[int] = []
    transform(given, lambda x: total.append(x.nbytes) or x)  # type: ignore[func-returns-value]
    count = min(_MOST_COPIES, max(1, -(-2 * cache // max(1, sum(total)))))
    return [given, *(tuple(transform(one, torch.clone) for one in given) for _ in range(count - 1))]


def record(path: Path, line: Mapping[str, Any], device: torch.device) -> None:
    """Append a line to a file of results, with where it was measured."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps({**line, **circumstances(device)}) + "\n")


def circumstances(device: torch.device) -> dict[str, Any]:
    """What every line of a file of results says of where it was measured."""
    gpu = device.type == "cuda"
    return {
        "date": date.today().isoformat(),
        "commit": _commit(),
        "dsv4": __version__,
        "device": torch.cuda.get_device_name(device) if gpu else f"CPU, {platform.machine()}",
        "driver": _asked("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader") if gpu else None,
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }


def _commit() -> str | None:
    """Of the sources that run, with a + where they were changed since."""
    here = str(Path(__file__).parent)
    commit = _asked("git", "-C", here, "rev-parse", "--short", "HEAD")
    return commit and commit + "+" * bool(_asked("git", "-C", here, "status", "--porcelain", "--", here + "/.."))


def _asked(*command: str) -> str | None:
    """The first line that a program prints, None if there is no such program or it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=20)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.partition("\n")[0].strip() or None
