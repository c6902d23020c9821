"""Listeners: what rounding does to each tensor, and what a run does to the streams, layer by layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from dsv4.check.study.formats import Peaks
from dsv4.quant.rounding import PLACES, Numerics, Rounding, none

_MOMENTS = ("rms", "row_sums", "column_sums", "experts_kept")


class Sums:
    """Sums of products of what was and what became of it, from which cosine and relative error follow. FP64."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0  # [3]: before², after², (before - after)²

    def add(self, before: Tensor, after: Tensor) -> None:
        """Two tensors of one shape."""
        x, y = before.float().flatten(), after.float().flatten()
        self.total = self.total + torch.stack([(v * v).sum(dtype=torch.float64) for v in (x, y, x - y)])

    def values(self) -> dict[str, float]:
        """`cosine`, `error` (|before - after| / |before|) and `growth` (|after| / |before|); NaN if nothing was added.

        The cosine comes from the difference: as a quotient of products it would lose what is near 1.
        """
        x, y, d = self.total.tolist() if isinstance(self.total, Tensor) else (math.nan,) * 3
        if not (x > 0 and y > 0):
            return {"cosine": 1.0 if d == 0 else math.nan, "error": 0.0 if d == 0 else math.nan, "growth": math.nan}
        cosine = 1 - (d - (math.sqrt(x) - math.sqrt(y)) ** 2) / (2 * math.sqrt(x * y))
        return {"cosine": cosine, "error": math.sqrt(d / x), "growth": math.sqrt(y / x)}


class TensorWatch:
    """Wraps roundings so that what goes in is compared with what comes out."""

    def __init__(self) -> None:
        self.sums: dict[tuple[int, str], Sums] = {}
        self._peaks: dict[tuple[int, str], Tensor] = {}

    def watched(self, numerics: Numerics, layer: int, idle: bool = False) -> Numerics:
        """The same roundings of `layer`, looked at. `idle`: places that round nothing are looked at as well.

        A rounding `none` of keys and values or index vectors stays as it is: the model leaves out more than rounding.
        """
        held = {place: getattr(numerics, place) for place in PLACES}
        seen = [place for place, own in held.items() if own is not none or (idle and place not in ("kv", "index"))]
        return replace(numerics, **{place: self._wrap(held[place], layer, place) for place in seen})

    def _wrap(self, rounding: Rounding, layer: int, place: str) -> Rounding:
        key = (layer, place)

        def looked_at(x: Tensor) -> Tensor:
            y = rounding(x)
            self.sums.setdefault(key, Sums()).add(x, y)
            if x.numel():
                top = x.abs().amax().float()
                self._peaks[key] = torch.maximum(self._peaks[key], top) if key in self._peaks else top
            return y

        return looked_at

    def peaks(self) -> Peaks:
        """The largest magnitude that each place has seen."""
        return {key: float(top) for key, top in self._peaks.items()}

    def take(self, layers: int) -> dict[str, dict[str, list[float]]]:
        """place -> "cosine" and "error" of every layer (NaN where the place does not exist), then all is forgotten."""
        sums, self.sums = self.sums, {}
        found = {}
        for place in PLACES:
            rows = [
                sums.get((layer, place), Sums()).values() if (layer, place) in sums else None for layer in range(layers)
            ]
            if any(rows):
                found[place] = {
                    name: [math.nan if row is None else row[name] for row in rows] for name in ("cosine", "error")
                }
        return found


class StreamWatch:
    """Listens to the taps of a run: streams against those of the base run, their size, Sinkhorn's sums, expert choice.

    base: what the base run kept, step by step (`kept`), or None for the base run itself.
    """

    def __init__(self, layers: int, base: Sequence[dict[str, list[Tensor]]] | None) -> None:
        self.layers, self.base = layers, base
        self.kept: list[dict[str, list[Tensor]]] = []
        self.step = -1
        self._clear()

    def _clear(self) -> None:
        self.streams = [Sums() for _ in range(self.layers)]
        self.moments = {name: [_Mean() for _ in range(self.layers)] for name in _MOMENTS}

    def __call__(self, name: str, layer: int, tensor: Tensor) -> None:
        """The listener."""
        if name == "streams" and layer < 0:
            self.step += 1
            self.kept.append({"streams": [], "experts": []})
        elif name == "streams":
            self._streams(layer, tensor)
        elif name == "experts":
            self._experts(layer, tensor)
        elif name.endswith("comb"):
            for axis, sums in ((-1, "row_sums"), (-2, "column_sums")):
                self.moments[sums][layer].add((tensor.sum(axis) - 1).abs())

    def _streams(self, layer: int, tensor: Tensor) -> None:
        self.moments["rms"][layer].add(tensor.float().square())
        if self.base is None:
            self.kept[self.step]["streams"].append(tensor)
        else:
            self.streams[layer].add(self.base[self.step]["streams"][layer], tensor)

    def _experts(self, layer: int, chosen: Tensor) -> None:
        if self.base is None:
            self.kept[self.step]["experts"].append(chosen)
            return
        theirs = self.base[self.step]["experts"][layer]
        self.moments["experts_kept"][layer].add((chosen.unsqueeze(2) == theirs.unsqueeze(1)).any(2))

    def take(self) -> dict[str, list[float]]:
        """One number a layer for each measure, then all is forgotten.

        streams_cosine, streams_error: against the base run; rms: of the streams; row_sums, column_sums: mean distance
        of Sinkhorn's sums from 1; experts_kept: share of the chosen experts that the base run chose as well.
        """
        found = {name: [moment.value() for moment in moments] for name, moments in self.moments.items()}
        found["rms"] = [math.sqrt(value) for value in found["rms"]]
        if self.base is None:
            del found["experts_kept"]
        else:
            compared = [sums.values() for sums in self.streams]
            found |= {f"streams_{name}": [row[name] for row in compared] for name in ("cosine", "error")}
        self._clear()
        return found


class _Mean:
    """A running mean over all numbers added, FP64."""

    def __init__(self) -> None:
        self.total: Tensor | float = 0.0
        self.count = 0

    def add(self, values: Tensor) -> None:
        self.total = self.total + values.sum(dtype=torch.float64)
        self.count += values.numel()

    def value(self) -> float:
        return float(self.total) / self.count if self.count else math.nan
