"""What can be studied: the formats, the places they go to, and the runs that a study consists of."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Final, NamedTuple

from dsv4.errors import ConfigError
from dsv4.quant.rounding import FLOAT, LINEARS, OFFICIAL, PLACES, ROUNDINGS, Numerics, Rounding, none
from dsv4.quant.scaled import nvfp4_global, nvfp4_simulate

Peaks = Mapping[tuple[int, str], float]  # largest magnitude at a layer's place


class Format(NamedTuple):
    """A way to round. `at(layer, place)` is asked for the places that a run changes."""

    title: str
    at: Callable[[Peaks, int, str], Rounding]


def _same(name: str) -> Callable[[Peaks, int, str], Rounding]:
    return lambda peaks, layer, place: ROUNDINGS[name]


def _calibrated(peaks: Peaks, layer: int, place: str) -> Rounding:
    return partial(nvfp4_simulate, scale=nvfp4_global(peaks[layer, place]))


# Formats of the matrices' inputs; they go to the places that a run names.
FORMATS: Final[Mapping[str, Format]] = {
    "fp8": Format(
        "FP8 E4M3 per 128, scales powers of two: the official rounding once more, as a control", _same("fp8")
    ),
    "bf16": Format("BF16: inputs of matrices not rounded", _same("none")),
    "fp8-tensor": Format("FP8 E4M3, one scale a step", _same("fp8-tensor")),
    "int8-token": Format("INT8, one scale a token", _same("int8-token")),
    "mxfp4": Format("MXFP4: E2M1 per 32, scales powers of two", _same("mxfp4")),
    "nvfp4": Format("NVFP4: E2M1 per 16, E4M3 scales, global scale fixed at 1", _same("nvfp4")),
    "nvfp4-calibrated": Format("NVFP4, global scale from the largest magnitude on other text", _calibrated),
    "nvfp4-tensor": Format("NVFP4, global scale from each step", _same("nvfp4-tensor")),
    "nvfp4-token": Format("NVFP4, global scale from each token", _same("nvfp4-token")),
    "fp4-128": Format("E2M1 per 128, scales powers of two: known to be too coarse", _same("fp4-128")),
    "fp4-tensor": Format("E2M1, one scale a step: coarser still", _same("fp4-tensor")),
}
HARMFUL: Final = ("fp4-128", "fp4-tensor")  # formats whose damage the study has to see, the finer one first

# Whole numerics, which have places of their own.
WHOLE: Final[Mapping[str, tuple[str, Numerics]]] = {
    "official": ("FP8 per 128 at matrices, FP8 keys and values, FP4 index vectors", OFFICIAL),
    "kv-bf16": ("keys and values not rounded", replace(OFFICIAL, kv=none)),
    "index-bf16": ("index vectors not rounded, and not spread", replace(OFFICIAL, index=none)),
    "float": ("nothing rounded", FLOAT),
    "float32": ("the official roundings, all else stored as FP32", OFFICIAL),
}
NOISE: Final = "float32"  # how far this one is from the official run is what BF16 itself does

GROUPS: Final[Mapping[str, tuple[str, ...]]] = {
    # All inputs that the reference rounds. It leaves wo_a's alone, and a draft does not take part.
    "all": tuple(place for place in LINEARS if place not in ("group_output", "draft_input")),
    "attention": ("attn_input", "latent", "attn_output"),
    "experts": ("expert_input", "expert_hidden"),
    "shared": ("shared_input", "shared_hidden"),
    **{place: (place,) for place in PLACES if place != "draft_input"},
}
PLACED: Final = ("mxfp4", "nvfp4-calibrated")  # those tried at single places as well
SWEPT: Final = ("mxfp4", "nvfp4-calibrated", "fp4-128")  # those tried in the first n layers


@dataclass(frozen=True)
class Run:
    """One way to run the model: `format` at `places` of the first `depth` layers, the official numerics elsewhere."""

    format: str
    places: str = "all"
    depth: int | None = None  # None: every layer

    @property
    def name(self) -> str:
        """Such as "mxfp4", "mxfp4 at experts", "mxfp4 in 8 layers"."""
        at = "" if self.places == "all" or self.format in WHOLE else f" at {self.places}"
        return self.format + at + ("" if self.depth is None else f" in {self.depth} layers")

    @property
    def title(self) -> str:
        """What it is, in words."""
        return WHOLE[self.format][0] if self.format in WHOLE else FORMATS[self.format].title

    @property
    def dtype(self) -> str | None:
        """How activations are stored, where the run has a say in it."""
        return "float32" if self.format == NOISE else None

    def numerics(self, layer: int, peaks: Peaks) -> Numerics:
        """What `layer` rounds."""
        if self.depth is not None and layer >= self.depth:
            return OFFICIAL
        if self.format in WHOLE:
            return WHOLE[self.format][1]
        at = FORMATS[self.format].at
        return replace(OFFICIAL, **{place: at(peaks, layer, place) for place in GROUPS[self.places]})


def depths(layers: int) -> list[int]:
    """1, 2, 4, … below the number of layers."""
    return [1 << n for n in range(layers.bit_length()) if 1 << n < layers]


def plan(
    layers: int, formats: Sequence[str] = (), places: Sequence[str] = (), sweep: Sequence[str] = SWEPT
) -> list[Run]:
    """The runs of a study. Without `formats` all; without `places` all, and the groups for some formats.

    `sweep`: formats for the first n layers. The run with nothing changed is no part of it. ConfigError for a name that
    does not exist.
    """
    _known("format", formats, (*FORMATS, *WHOLE))
    _known("format to sweep", sweep, FORMATS)
    _known("place", places, GROUPS)
    chosen = [name for name in formats or (*FORMATS, *WHOLE) if name != "official"]  # which always runs
    groups = places or ("all", "attention", "experts", "shared")
    runs = [
        Run(name, group)
        for name in chosen
        for group in (("all",) if name in WHOLE else groups)
        if places or group == "all" or name in PLACED
    ]
    swept = [name for name in sweep if name in chosen]
    return runs + [Run(name, groups[0], depth) for name in swept for depth in depths(layers)]


def _known(kind: str, names: Sequence[str], known: Sequence[str] | Mapping[str, object]) -> None:
    for name in names:
        if name not in known:
            raise ConfigError(f"unknown {kind}", got=name, wanted=", ".join(known))
