"""What one layer more costs, and what all layers of a model would: arithmetic of measured steps, without a GPU."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, Final, NamedTuple

from dsv4.bench.clock import Timing
from dsv4.bench.work import Chunk
from dsv4.checkpoint.reads import INDEXED, Point
from dsv4.config import ModelConfig

KINDS: Final = {"CSA": INDEXED, "HCA": 128, "SWA": 0}  # tokens of an entry; 0: a window and no entries
_STAND_IN: Final = {"SWA": "HCA"}  # what a kind that was not measured is priced as: it does that, and more
At = Point | Chunk


class Machine(NamedTuple):
    """Bytes a second of a copy, read and written; FLOP a second of FP8 products, 0 where that does not count."""

    copied: float
    peak: float = 0.0

    def floor(self, nbytes: float, flop: float = 0.0) -> float:
        """Seconds: the larger of what the bytes take to be copied, and the products at the peak."""
        return max(nbytes / self.copied, flop / self.peak if self.peak else 0.0)


class Step(NamedTuple):
    """A step of some layers of one kind: its time, how many launches it is, what it must read and multiply.

    host: seconds until it is launched, while nothing is waited for. flop: of its layers, 0 where that is not counted.
    """

    kind: str
    layers: int
    at: At
    timing: Timing
    host: float
    launches: int
    nbytes: int
    head: int  # of the bytes, those that belong to no layer
    flop: float = 0.0


class Layer(NamedTuple):
    """Of one layer, and of what a step has beside its layers. Seconds, bytes that must be read, FLOP.

    host: of the step with more layers, all of it.
    """

    kind: str
    at: At
    seconds: float
    rest: float
    nbytes: int
    rest_bytes: int
    launches: float
    host: float
    flop: float = 0.0

    def line(self, what: str, machine: Machine) -> dict[str, Any]:
        """A line of a file of results, without what all lines share."""
        said = {
            "what": f"{what} layer", "kind": self.kind, **self.at._asdict(),
            "layer_us": _us(self.seconds, 2), "rest_us": _us(self.rest), "host_us": _us(self.host),
            "launches": self.launches, "bytes": self.nbytes, "rest_bytes": self.rest_bytes,
            "floor_us": _us(machine.floor(self.nbytes, self.flop), 2), "copy_gb_s": round(machine.copied / 1e9, 1),
        }  # fmt: skip
        if machine.peak:
            said |= {"flop": round(self.flop), "fp8_peak_tflop_s": round(machine.peak / 1e12, 1)}
        return said


def layers(found: Iterable[Step]) -> list[Layer]:
    """What one layer more costs, of each kind at each point."""
    by: dict[tuple[str, At], list[Step]] = {}
    for step in found:
        by.setdefault((step.kind, step.at), []).append(step)
    return [_layer(*sorted(pair, key=lambda step: step.layers)) for pair in by.values()]


def _layer(few: Step, many: Step) -> Layer:
    more = many.layers - few.layers
    each = (many.timing.seconds - few.timing.seconds) / more
    rest = few.timing.seconds - few.layers * each
    nbytes, launches = (many.nbytes - few.nbytes) // more, (many.launches - few.launches) / more
    flop = many.flop / many.layers
    return Layer(many.kind, many.at, each, rest, nbytes, few.head, launches, many.host, flop)


# --- a whole model ----------------------------------------------------------------------------------------------------


class Part(NamedTuple):
    """So many layers of a kind, each priced as one that was measured, of the same kind or of another."""

    layers: int
    kind: str
    each: Layer


class Whole(NamedTuple):
    """A step of all layers of a model, added up. rest: of the kind that has the most of it."""

    parts: Sequence[Part]
    rest: Layer

    @property
    def at(self) -> At:
        return self.rest.at

    @property
    def seconds(self) -> float:
        return sum(part.layers * part.each.seconds for part in self.parts) + self.rest.rest

    @property
    def tokens(self) -> int:
        """That a step brings forward."""
        return self.at.tokens if isinstance(self.at, Chunk) else self.at.sequences

    def floor(self, machine: Machine) -> float:
        """Seconds, of layers and of what is beside them."""
        each = (part.layers * machine.floor(part.each.nbytes, part.each.flop) for part in self.parts)
        return sum(each) + machine.floor(self.rest.rest_bytes)

    def __str__(self) -> str:
        """The sum, as in: 43 layers = 21 x CSA 155.4 + 20 x HCA 136.2 + rest 448.3 µs = 6.44 ms: 155 tokens/s."""
        shown = [
            f"{part.layers} x {part.kind} {'' if part.kind == part.each.kind else f'as {part.each.kind} '}"
            f"{1e6 * part.each.seconds:.1f}"
            for part in self.parts
        ]
        count = sum(part.layers for part in self.parts)
        terms = " + ".join([*shown, f"rest {1e6 * self.rest.rest:.1f} µs"])
        return f"{count} layers = {terms} = {1e3 * self.seconds:.2f} ms: {self.tokens / self.seconds:,.0f} tokens/s"

    def line(self, what: str, machine: Machine) -> dict[str, Any]:
        """A line of a file of results, without what all lines share."""
        return {
            "what": f"{what} step extrapolated", **self.at._asdict(),
            "of_layers": {part.kind: part.layers for part in self.parts},
            "priced_as": {part.kind: part.each.kind for part in self.parts if part.kind != part.each.kind},
            "layer_us": {part.kind: _us(part.each.seconds, 2) for part in self.parts}, "rest_us": _us(self.rest.rest),
            "step_us": _us(self.seconds), "tokens_per_s": round(self.tokens / self.seconds, 1),
            "floor_us": _us(self.floor(machine)), "copy_gb_s": round(machine.copied / 1e9, 1),
        }  # fmt: skip


def kind_of(ratio: int) -> str:
    """Of a layer with this compression ratio: all that compress without an indexer are one kind."""
    return {INDEXED: "CSA", 0: "SWA"}.get(ratio, "HCA")


def pattern(config: ModelConfig) -> dict[str, int]:
    """How many main layers there are of each kind that there is."""
    kinds = [kind_of(ratio) for ratio in config.layer_ratios]
    return {kind: kinds.count(kind) for kind in KINDS if kind in kinds}


def wholes(found: Sequence[Layer], config: ModelConfig) -> list[Whole]:
    """Of each point at which every kind of layer was measured, or one that stands in for it."""
    made = []
    for at in dict.fromkeys(one.at for one in found):
        here = {one.kind: one for one in found if one.at == at}
        priced = {kind: here.get(kind) or here.get(_STAND_IN.get(kind, kind)) for kind in pattern(config)}
        parts = [Part(count, kind, one) for kind, count in pattern(config).items() if (one := priced[kind])]
        if len(parts) == len(priced):
            made.append(Whole(parts, max((part.each for part in parts), key=lambda one: one.rest)))
    return made


def _us(seconds: float, digits: int = 1) -> float:
    return round(1e6 * seconds, digits)
