"""Mean and spread over the evaluation seeds, and which effects stand beyond it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import mean, stdev
from typing import Any, Final

from dsv4.check.study.formats import NOISE

# Which way is worse. KL and agreement are never better than the official run's, so only worse than noise counts.
WORSE: Final[dict[str, int]] = {
    "kl": 1, "text_kl": 1, "top1": -1, "perplexity": 1, "answer_perplexity": 1, "score": -1,
}  # fmt: skip
_AGAINST_NOISE: Final = ("kl", "text_kl", "top1")
_RATIOS: Final = ("perplexity", "answer_perplexity")
_TIMES: Final = 2.0  # standard deviations that an effect has to be away from none


def summary(values: Sequence[float | None]) -> dict[str, float | None]:
    """`mean` and `spread` (standard deviation between seeds, None for a single one); None if a seed has no number."""
    known = [value for value in values if value is not None]
    if not known or len(known) < len(values):
        return {"mean": None, "spread": None}
    return {"mean": mean(known), "spread": stdev(known) if len(known) > 1 else None}


def direction(gaps: Sequence[float]) -> int:
    """1 or -1 if the seeds agree on a sign and their mean is more than two standard deviations from 0; otherwise 0."""
    if not gaps or not (min(gaps) > 0 or max(gaps) < 0):
        return 0
    clear = len(gaps) == 1 or abs(mean(gaps)) > _TIMES * stdev(gaps)
    return (1 if gaps[0] > 0 else -1) if clear else 0


def effect(metric: str, run: Sequence[float | None], other: Sequence[float | None]) -> str:
    """ "worse", "better" or "" (within the spread): the seeds of `run`, each compared with its own in `other`.

    A number that is missing because it overflowed is worse than any that is there. Perplexities compare by ratio.
    """
    if any(a is None and b is not None for a, b in zip(run, other, strict=True)):
        return "worse"
    return {0: "", WORSE[metric]: "worse", -WORSE[metric]: "better"}[direction(changes(metric, run, other))]


def changes(metric: str, run: Sequence[float | None], other: Sequence[float | None]) -> list[float]:
    """What each seed changes against its own in `other`: by which part for perplexities, by how much otherwise."""
    known = [(a, b) for a, b in zip(run, other, strict=True) if a is not None and b is not None]
    return [a / b - 1 if metric in _RATIOS else a - b for a, b in known]


def summarise(runs: Sequence[dict[str, Any]]) -> None:
    """Add `summary` to every run: of each metric mean and spread, change with its own spread, and effect.

    The first run is the official one. Perplexities and scores are held against it. KL and agreement are held against
    the run that differs by its storage alone, if there is one: BF16's own noise; to be nearer than that is no effect.
    """
    official = runs[0]["seeds"]
    noise = next((run["seeds"] for run in runs if run["name"] == NOISE), official)
    for run in runs:
        run["summary"] = {}
        for metric in (name for name in WORSE if all(name in seed for seed in run["seeds"])):
            base = noise if metric in _AGAINST_NOISE else official
            mine, theirs = ([seed[metric] for seed in seeds] for seeds in (run["seeds"], base))
            found = effect(metric, mine, theirs)
            quiet = found == "better" and metric in _AGAINST_NOISE
            changed = summary(changes(metric, mine, theirs) if None not in mine else [None])
            run["summary"][metric] = {
                **summary(mine),
                "change": changed["mean"],
                "change_spread": changed["spread"],
                "effect": "" if quiet else found,
            }


def finite(value: Any) -> Any:
    """The same tree of dicts and lists with None for every number that is not finite: what JSON can hold."""
    if isinstance(value, dict):
        return {name: finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
