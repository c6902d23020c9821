"""One paragraph that says what was found. Every sentence is chosen by the figures, none is typed in."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Final

from dsv4.check.study.formats import HARMFUL, NOISE
from dsv4.check.study.results import Results, average

BREAKS: Final = 0.10  # perplexity up by this part, or
LOSES: Final = 0.05  # so large a share of the exercises lost: a format that breaks the model
OVERFLOWS, BREAKS_IT, COSTS = "overflows", "breaks the model", "costs something that can be measured"
_HARM: Final = (OVERFLOWS, BREAKS_IT, COSTS)
NVFP4: Final = ("nvfp4-calibrated", "nvfp4-tensor", "nvfp4-token", "nvfp4")
_LOSSES: Final = ("perplexity", "answer_perplexity", "score")


def findings(results: Results) -> list[str]:
    """The sentences, those that the runs allow."""
    return [sentence for write in _SENTENCES if (sentence := write(results))]


def verdict(results: Results, name: str) -> str:
    """What a format does to the model, in one clause."""
    worse = [metric for metric in _LOSSES if results.effect(name, metric) == "worse"]
    if results.mean(name, "kl") is None:
        return OVERFLOWS
    if any(_large(results.change(name, metric), metric) for metric in worse):
        return BREAKS_IT
    if worse:
        return COSTS
    if results.effect(name, "kl") == "worse":
        return "moves the predictions, at no cost that stands beyond the spread"
    return "cannot be told from the noise of BF16"


def number(value: float | None) -> str:
    """Three digits that mean something."""
    if value is None:
        return "no finite number"
    return f"{value:.3g}" if value == 0 or 1e-3 <= abs(value) < 1e5 else f"{value:.1e}"


def cosine(value: float | None) -> str:
    """A cosine with two digits of what it lacks to 1."""
    if value is None:
        return "unknown"
    digits = 2 if value >= 1 else min(max(1 - math.floor(math.log10(1 - value)), 2), 8)
    return f"{value:.{digits}f}"


def _large(change: float | None, metric: str) -> bool:
    return change is None or abs(change) > (LOSES if metric == "score" else BREAKS)


def _cost(results: Results, name: str) -> str:
    """KL, perplexity and exercises of a run, in words."""
    parts = [f"KL {number(results.mean(name, 'kl'))} nats a token"]
    told = {"perplexity": ("perplexity", "%"), "score": ("exercises answered", "points")}
    for metric, (what, unit) in told.items():
        if results.mean("official", metric):  # of nothing answered nothing can be lost
            change = results.change(name, metric)
            amount = "beyond all numbers" if change is None else f"{float(f'{100 * change:.2g}'):+g} {unit}"
            parts.append(f"{what} {amount}{'' if results.effect(name, metric) else ' (within the spread)'}")
    return ", ".join(parts)


def _scope(results: Results) -> str:
    seeds = results.tree["samples"]["seeds"]
    predicted, exercises = (sum(seed[name] for seed in seeds) for name in ("predicted", "exercises"))
    right = results.mean("official", "score")
    share = "" if right is None else f", of which the official numerics answer {100 * right:.0f} %"
    asked = f" and {exercises} held-out exercises{share}" if exercises else ""
    return f"{results.layers} layers, {predicted:,} predicted tokens in {len(seeds)} disjoint held-out samples{asked}."


def _noise(results: Results) -> str:
    if NOISE not in results.runs:
        return ""
    kl = number(results.mean(NOISE, "kl"))
    return f"Storing activations as FP32 instead of BF16 moves the predictions by {kl} nats a token: less is noise."


def _sense(results: Results) -> str:
    perplexity, words = results.mean("official", "perplexity"), results.tree["vocabulary"]
    if perplexity is None or perplexity < words / 2:
        return ""
    return (
        f"A perplexity of {number(perplexity)} on this text, with {words:,} tokens to choose from, is that of a model"
        " which does not know such text: what a format costs there says nothing."
    )


def _harm(results: Results) -> str:
    there = [name for name in HARMFUL if name in results.runs]
    if not there:
        return "No format known to be bad was run, so that silence proves nothing."
    seen = next((name for name in there if verdict(results, name) in _HARM), None)
    shown = seen or there[-1]
    told = f"{shown}, known to be too coarse, {verdict(results, shown)} ({_cost(results, shown)})"
    if seen:
        return f"The study can see harm: {told}."
    return f"The study does not see harm where it must: {told}; no format is shown to be harmless by this."


def _nvfp4(results: Results) -> str:
    name = next((name for name in NVFP4 if name in results.runs), None)
    if name is None:
        return ""
    eight, four = (average(results.tensors(run, "cosine")) for run in ("official", name))
    inputs = (
        f"At the inputs of the matrices FP8 keeps a cosine of {cosine(eight)} and NVFP4 ({name}) of {cosine(four)}. "
    )
    last = _last(results, name)
    streams = f"Behind the last layer NVFP4's streams are off by {_share(last)}"
    if "bf16" in results.runs:
        streams += f", where taking FP8's rounding away altogether moves them by {_share(_last(results, 'bf16'))}"
    return f"{inputs}{streams}. NVFP4 {verdict(results, name)}: {_cost(results, name)}."


def _last(results: Results, name: str) -> float | None:
    curve = results.curve(name, "streams_error")
    return curve[-1] if curve else None


def _share(value: float | None) -> str:
    return "more than can be counted" if value is None else f"{float(f'{100 * value:.2g}'):g} %"


def _growth(results: Results) -> str:
    name = next((name for name in (*NVFP4, "mxfp4", *HARMFUL) if name in results.runs), None)
    curve = results.curve(name, "streams_error") if name else []
    if name is None or len(curve) < 2 or any(not value for value in curve):
        return ""
    power = slope(curve)
    how = (
        f"grows with depth like its power {power:.2f}"
        if power > 0.1
        else f"shrinks with depth (power {power:.2f})"
        if power < -0.1
        else "does not grow with depth"
    )
    kinds = " (0.5 is what independent errors add up to, 1 what errors of one direction do)" if power > 0.1 else ""
    size, ours = (results.curve(run, "rms") for run in ("official", name))
    grown, larger = (_quotient(size[-1], size[0]), _quotient(ours[-1], size[-1]))
    return (
        f"The error of the streams under {name} goes from {_share(curve[0])} behind the first layer to"
        f" {_share(curve[-1])} behind the last and {how}{kinds}; the streams themselves grow {number(grown)} times as"
        f" large, and with the format become {number(larger)} times that."
    )


def _quotient(over: float | None, under: float | None) -> float | None:
    return over / under if over is not None and under else None


def slope(curve: list[float | None]) -> float:
    """The power p of a least-squares fit error ~ (layer + 1)^p over all layers."""
    xs = [math.log(layer + 1) for layer in range(len(curve))]
    ys = [math.log(value or math.nan) for value in curve]
    mx, my = sum(xs) / len(xs), sum(ys) / len(ys)
    return sum((x - mx) * (y - my) for x, y in zip(xs, ys, strict=True)) / sum((x - mx) ** 2 for x in xs)


def _scales(results: Results) -> str:
    there = {name: kl for name in NVFP4 if (kl := results.mean(name, "kl")) is not None}
    if len(there) < 2:
        return ""
    best, worst = min(there, key=there.__getitem__), max(there, key=there.__getitem__)
    spreads = [results.spread(name, "kl") or 0.0 for name in (best, worst)]
    if there[worst] - there[best] <= 2 * max(spreads):
        return "How NVFP4's global scale is chosen makes no difference beyond the spread."
    return (
        f"Of NVFP4's global scales {best} is nearest to official (KL {number(there[best])}) and {worst} farthest"
        f" (KL {number(there[worst])})."
    )


def _places(results: Results) -> str:
    found = []
    for format in dict.fromkeys(run["format"] for run in results.runs.values()):
        at = {
            run["places"]: kl
            for name, run in results.runs.items()
            if run["format"] == format and run["depth"] is None and run["places"] != "all"
            if (kl := results.mean(name, "kl")) is not None
        }
        if len(at) > 1:
            parts = [f"{place} {number(at[place])}" for place in sorted(at, key=at.__getitem__, reverse=True)]
            found.append(f"{format}: {', '.join(parts)}")
    return f"By place, in KL a token: {'; '.join(found)}." if found else ""


def _caches(results: Results) -> str:
    told = {"kv-bf16": "FP8 of keys and values", "index-bf16": "FP4 of index vectors"}
    parts = [
        f"Leaving out the {what} {verdict(results, name)} (KL {number(results.mean(name, 'kl'))})."
        for name, what in told.items()
        if name in results.runs
    ]
    return " ".join(parts)


def _depth(results: Results) -> str:
    parts = []
    for format in dict.fromkeys(run["format"] for run in results.runs.values()):
        swept = {depth: results.mean(name, "text_kl") for depth, name in sorted(results.swept(format).items())}
        whole = swept.get(results.layers)
        if len(swept) > 1 and whole:
            half = next(depth for depth, kl in swept.items() if kl is None or kl >= whole / 2)
            parts.append(f"{format} in {half}")
    if not parts:
        return ""
    return f"Half of the distance on text, or more, is there with {', '.join(parts)} of {results.layers} layers."


_SENTENCES: Final[tuple[Callable[[Results], str], ...]] = (
    _scope,
    _sense,
    _harm,
    _noise,
    _nvfp4,
    _growth,
    _scales,
    _places,
    _caches,
    _depth,
)
