"""What a load measured: percentiles, throughput, goodput, errors; as a line of JSON and as a picture."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from dsv4.bench.load import Point, Record
from dsv4.errors import ConfigError, RequestError

PERCENTS: Final = (50, 90, 95, 99)
# What is timed, in ms: from the intended beginning to the first token; between tokens, as a request's mean and one by
# one; from the intended beginning to the end.
MEASURES: Final = ("ttft", "tpot", "itl", "e2e")
LATE: Final = 5.0  # ms; a client that begins later than this is itself what is measured


def timed(record: Record) -> dict[str, list[float]]:
    """The measures of one good request, each a list of ms. One token has no time between tokens."""
    first, last = record.arrivals[0], record.arrivals[-1]
    between = [1e3 * (b - a) for a, b in zip(record.arrivals, record.arrivals[1:], strict=False)]
    mean = [1e3 * (last - first) / (record.tokens - 1)] if record.tokens > 1 else []
    whole = 1e3 * (record.end - record.intended)
    return {"ttft": [1e3 * (first - record.intended)], "tpot": mean, "itl": between, "e2e": [whole]}


def percentile(values: Sequence[float], percent: float) -> float | None:
    """The smallest value that so many percent of all do not exceed; None of nothing."""
    ranked = sorted(values)
    return ranked[max(0, math.ceil(percent / 100 * len(ranked)) - 1)] if ranked else None


def read_slo(text: str) -> dict[str, float]:
    """`ttft:1000,tpot:50`: the most that each may take, in ms. RequestError for what is none."""
    limits: dict[str, float] = {}
    for part in filter(None, text.split(",")):
        name, _, value = part.partition(":")
        try:
            limits[name] = float(value)
        except ValueError:
            limits[name] = -1
        if name not in ("ttft", "tpot", "e2e") or not limits[name] > 0:
            raise RequestError("--slo", got=repr(part), wanted="ttft:MS, tpot:MS or e2e:MS, with commas between")
    return limits


@dataclass(frozen=True)
class Figures:
    """What is known of one point. Latencies are ms by measure and percent; `late`: of ourselves, p99."""

    point: Point
    good: int
    seconds: float
    errors: Mapping[str, int]
    latency: Mapping[str, Mapping[str, float | None]]
    prompt_tokens: int
    cached: int
    tokens: int
    met: int | None
    late: float | None

    @property
    def token_rate(self) -> float:
        """Tokens a second that came out."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def line(self) -> dict[str, Any]:
        """What goes into a file of results, without what all lines share."""
        a_second = {"requests": self.good, "prompt_tokens": self.prompt_tokens, "tokens": self.tokens}
        rates = {f"{name}_per_second": round(n / self.seconds, 3) for name, n in a_second.items() if self.seconds}
        good = {} if self.met is None else {"goodput_per_second": round(self.met / self.seconds, 3), "met": self.met}
        said = {"rate": self.point.rate, "users": self.point.users, "good": self.good, "errors": dict(self.errors)}
        said["cached_tokens"] = self.cached
        latency = {
            f"{name}_ms": {percent: None if ms is None else round(ms, 3) for percent, ms in values.items()}
            for name, values in self.latency.items()
        }
        late = None if self.late is None else round(self.late, 3)
        return said | {"seconds": round(self.seconds, 3)} | rates | good | latency | {"client_late_p99_ms": late}


def figures(point: Point, slo: Mapping[str, float]) -> Figures:
    """Of all requests that ended."""
    good = [record for record in point.records if record.error is None]
    each = [timed(record) for record in good]
    pooled = {name: [ms for one in each for ms in one[name]] for name in MEASURES}
    latency = {
        name: {f"p{percent}": percentile(values, percent) for percent in PERCENTS} for name, values in pooled.items()
    }
    # A request of one token has no time between tokens, and so does not break a promise about it.
    met = sum(all(max(one[name], default=0) <= most for name, most in slo.items()) for one in each)
    return Figures(
        point,
        len(good),
        max((record.end for record in point.records), default=point.begun) - point.begun,
        Counter(record.error for record in point.records if record.error is not None),
        latency,
        sum(record.prompt_tokens for record in good),
        sum(record.cached for record in good),
        sum(record.tokens for record in good),
        met if slo else None,
        percentile([1e3 * (record.begun - record.intended) for record in point.records], 99),
    )


def draw(found: Sequence[Figures], path: Path, title: str) -> None:
    """Latency percentiles against throughput, as PNG or SVG by the file's name. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib", do="pip install 'dsv4[report]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    shown = sorted((one for one in found if one.good), key=lambda one: one.token_rate)
    grid = (("ttft", "Time to first token"), ("tpot", "Time per output token"))
    with matplotlib.rc_context({"svg.hashsalt": "dsv4", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(10, 4.4), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        for axes, (name, label) in zip(figure.subplots(1, 2), grid, strict=True):
            _curves(axes, shown, name)
            axes.set(xlabel="output tokens a second", ylabel=f"{label}, ms", ylim=(0, None))
        figure.axes[0].legend(frameon=False)
        figure.savefig(path)


def _curves(axes: Any, shown: Sequence[Figures], name: str) -> None:
    x = [one.token_rate for one in shown]
    shades = ("#9ecae1", "#6baed6", "#3182bd", "#08306b")
    for percent, colour in zip(PERCENTS, shades, strict=True):
        y = [one.latency[name][f"p{percent}"] or 0.0 for one in shown]
        axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.8, label=f"p{percent}")
    for one in shown:
        above = one.latency[name]["p99"] or 0.0
        axes.annotate(one.point.name, (one.token_rate, above), (0, 6), textcoords="offset points", ha="center", size=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(axis="y", color="#e5e5e5", linewidth=0.8)
    axes.margins(x=0.1)
