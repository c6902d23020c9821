"""Counters and histograms in Prometheus' text format. All of it is touched by the event loop's thread alone."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping

BOUNDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 300.0)


class Histogram:
    """Durations in seconds by upper bound."""

    def __init__(self) -> None:
        self.counts, self.sum = [0] * (len(BOUNDS) + 1), 0.0

    def observe(self, seconds: float, times: int = 1) -> None:
        """Count one duration, or the same one several times."""
        self.counts[bisect_left(BOUNDS, seconds)] += times
        self.sum += seconds * times

    def lines(self, name: str) -> Iterator[str]:
        """Cumulative buckets, sum and count."""
        total = 0
        for bound, count in zip((*map(str, BOUNDS), "+Inf"), self.counts, strict=True):
            total += count
            yield f'{name}_bucket{{le="{bound}"}} {total}'
        yield f"{name}_sum {self.sum:.9g}"
        yield f"{name}_count {total}"


class Metrics:
    """What the server has done so far. `ended`: requests by outcome, the engine's finish or why there is none."""

    def __init__(self) -> None:
        self.ended: Counter[str] = Counter()
        self.tokens_in = self.tokens_out = 0
        self.first, self.between, self.whole = Histogram(), Histogram(), Histogram()

    def text(self, gauges: Mapping[str, tuple[str, float]], counters: Mapping[str, tuple[str, float]]) -> str:
        """The page. `gauges` and `counters`: name → help and value, from elsewhere."""
        ours = {
            "prompt_tokens_total": ("Tokens of accepted prompts", float(self.tokens_in)),
            "generation_tokens_total": ("Tokens sampled", float(self.tokens_out)),
        }
        outcomes = [f'dsv4_requests_total{{outcome="{name}"}} {count}' for name, count in sorted(self.ended.items())]
        times = {
            "time_to_first_token_seconds": ("From acceptance to the first token", self.first),
            "time_per_output_token_seconds": ("Between tokens of one answer", self.between),
            "request_duration_seconds": ("From acceptance to the end", self.whole),
        }
        lines = _block("requests_total", "Requests that ended, by outcome", "counter", outcomes)
        for name, (about, value) in (ours | dict(counters)).items():
            lines += _block(name, about, "counter", [f"dsv4_{name} {value:.15g}"])
        for name, (about, value) in gauges.items():
            lines += _block(name, about, "gauge", [f"dsv4_{name} {value:.15g}"])
        for name, (about, histogram) in times.items():
            lines += _block(name, about, "histogram", histogram.lines(f"dsv4_{name}"))
        return "\n".join(lines) + "\n"


def _block(name: str, about: str, kind: str, values: Iterable[str]) -> list[str]:
    return [f"# HELP dsv4_{name} {about}", f"# TYPE dsv4_{name} {kind}", *values]
