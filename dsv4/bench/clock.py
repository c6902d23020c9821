"""Time of calls: in a CUDA graph, on a CUDA stream, or on a CPU. Seconds of one call, median and spread."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from statistics import median
from typing import Any, Final, NamedTuple

import torch

Call = Callable[[], Any]
SAMPLES: Final = 30
_COPIED: Final = {"cuda": 1 << 30, "cpu": 1 << 26}  # bytes, far more than a cache holds


class Timing(NamedTuple):
    """Seconds of one call: the median of the samples, the least and the largest of them."""

    seconds: float
    low: float
    high: float
    how: str


def in_graph(calls: Sequence[Call], samples: int = SAMPLES) -> Timing:
    """Calls one after another in a CUDA graph; each sample is one replay of them all."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for call in calls:
            call()  # builds, loads and allocates what a capture may not
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    return _timing(_by_events(graph.replay, samples), len(calls), f"graph of {len(calls)} calls")


def in_stream(calls: Sequence[Call], samples: int = SAMPLES) -> Timing:
    """Calls launched one after another, each sample one round of them all: for work that takes longer than a launch."""

    def round_() -> None:
        for call in calls:
            call()

    return _timing(_by_events(round_, samples), len(calls), f"stream, {len(calls)} sets of arguments")


def on_cpu(calls: Sequence[Call], samples: int = SAMPLES) -> Timing:
    """Each sample one round of the calls."""
    found = []
    for _ in range(samples + 1):
        start = time.perf_counter()
        for call in calls:
            call()
        found.append(time.perf_counter() - start)
    return _timing(found[1:], len(calls), "CPU")


def in_turn(calls: Sequence[Call], device: torch.device, samples: int = SAMPLES) -> Timing:
    """In the stream of a GPU, or on a CPU."""
    return (in_stream if device.type == "cuda" else on_cpu)(calls, samples)


def on_host(calls: Sequence[Call], device: torch.device, samples: int = SAMPLES) -> float:
    """Seconds until Python has launched a call, of which several follow one another: only before them is waited."""
    found = []
    for _ in range(samples):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        for call in calls:
            call()
        found.append(time.perf_counter() - start)
    return median(found) / len(calls)


def copy_bandwidth(device: torch.device, samples: int = SAMPLES) -> float:
    """Bytes a second, read and written, of copying a buffer that no cache holds."""
    size = _COPIED[device.type]
    source, target = (torch.zeros(size, dtype=torch.uint8, device=device) for _ in range(2))
    return 2 * size / in_turn([lambda: target.copy_(source)], device, samples).seconds


def fp8_peak(device: torch.device, samples: int = SAMPLES, n: int = 8192) -> float:
    """FLOP a second of the library's product of two n x n matrices of E4M3 with one scale each, in BF16."""
    a, b = (torch.randn(n, n, device=device).to(torch.float8_e4m3fn) for _ in range(2))
    one = torch.ones((), device=device)

    def product() -> None:
        torch._scaled_mm(a, b.t(), scale_a=one, scale_b=one, out_dtype=torch.bfloat16, use_fast_accum=True)

    return 2 * n**3 / in_stream([product] * 4, samples).seconds


def _by_events(call: Call, samples: int) -> list[float]:
    for _ in range(3):
        call()
    found = []
    for _ in range(samples):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        call()
        end.record()
        end.synchronize()
        found.append(start.elapsed_time(end) / 1e3)
    return found


def _timing(samples: Sequence[float], calls: int, how: str) -> Timing:
    return Timing(median(samples) / calls, min(samples) / calls, max(samples) / calls, how)
