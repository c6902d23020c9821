"""A study's results, asked by name."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from statistics import mean
from typing import Any

Curve = list[float | None]  # one number a layer


@dataclass(frozen=True)
class Results:
    """What `study` returned, or what its JSON says."""

    tree: Mapping[str, Any]

    @cached_property
    def runs(self) -> dict[str, Mapping[str, Any]]:
        """Runs by name, the official one first."""
        return {run["name"]: run for run in self.tree["runs"]}

    @property
    def layers(self) -> int:
        """Main layers of the model."""
        return int(self.tree["layers"])

    @property
    def whole(self) -> list[str]:
        """Names of the runs that change every layer, at every place."""
        return [name for name, run in self.runs.items() if run["depth"] is None and run["places"] == "all"]

    def mean(self, name: str, metric: str) -> float | None:
        """Mean over the seeds; None where it was not measured or overflowed."""
        return self._summary(name, metric).get("mean")

    def spread(self, name: str, metric: str) -> float | None:
        """Standard deviation over the seeds."""
        return self._summary(name, metric).get("spread")

    def change(self, name: str, metric: str) -> float | None:
        """Mean of what each seed changes against its own: part of a perplexity, amount of anything else."""
        return self._summary(name, metric).get("change")

    def change_spread(self, name: str, metric: str) -> float | None:
        """Standard deviation of the change over the seeds."""
        return self._summary(name, metric).get("change_spread")

    def effect(self, name: str, metric: str) -> str:
        """ "worse" or "better" if beyond the spread, else ""."""
        return str(self._summary(name, metric).get("effect", ""))

    def _summary(self, name: str, metric: str) -> Mapping[str, Any]:
        found: Mapping[str, Any] = self.runs[name]["summary"].get(metric, {}) if name in self.runs else {}
        return found

    def curve(self, name: str, measure: str) -> Curve:
        """A measure of the streams layer by layer, mean over the seeds; empty where the run was not looked into."""
        seeds = [seed["layers"][measure] for seed in self.runs[name]["seeds"] if measure in seed.get("layers", {})]
        return _means(seeds)

    def extremes(self, name: str, measure: str) -> list[tuple[float, float]]:
        """Least and largest seed of `curve`, layer by layer."""
        seeds = [seed["layers"][measure] for seed in self.runs[name]["seeds"] if measure in seed.get("layers", {})]
        return [(min(known), max(known)) for layer in zip(*seeds, strict=True) if (known := _known(layer))]

    def tensors(self, name: str, measure: str, places: Iterable[str] | None = None) -> Curve:
        """ "cosine" or "error" of the rounded tensors layer by layer, mean over places (None: all but the caches)."""
        seeds = []
        for seed in self.runs[name]["seeds"]:
            held = seed.get("tensors", {})
            chosen = [place for place in held if place not in ("kv", "index")] if places is None else places
            seeds.append(_means([held[place][measure] for place in chosen if place in held]))
        return _means([curve for curve in seeds if curve])

    def swept(self, format: str) -> dict[int, str]:
        """Depth -> name of the run with `format` in so many layers, the whole model included."""
        found = {run["depth"]: name for name, run in self.runs.items() if run["format"] == format and run["depth"]}
        return {**found, self.layers: format} if found and format in self.runs else found


def average(curve: Curve) -> float | None:
    """Mean over the layers that have a number."""
    known = _known(curve)
    return mean(known) if known else None


def _known(values: Iterable[float | None]) -> list[float]:
    return [value for value in values if value is not None]


def _means(curves: list[Curve]) -> Curve:
    return [average(list(layer)) for layer in zip(*curves, strict=True)]
