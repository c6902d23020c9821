"""Where the time of a start goes: stages, how far each has come, and what each took."""

from __future__ import annotations

import os
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

import torch

from dsv4.checkpoint.load import LoadProgress, Progress, part_of

_STARTED: Final = 19  # of the fields of /proc/self/stat behind the name: ticks from the machine's start to ours
_ORIGINS: Final = {"prebuilt": "ready-made", "cache": "in the cache", "compiled": "compiled"}


@dataclass(frozen=True)
class Started:
    """A start that is over. seconds: of each stage, in their order, from the process's start to a loaded model.

    nbytes: of weights that were read. kernels: sources by where their cubins came from (`kernels.build.Found`).
    """

    seconds: Mapping[str, float]
    nbytes: int
    kernels: Mapping[str, int]

    @property
    def total(self) -> float:
        """Seconds in all: the stages leave out nothing."""
        return sum(self.seconds.values())

    def line(self) -> str:
        """In words. Tenths are those between rounded moments, so that they add up; stages without one are left out."""
        told, end, shown = [], 0.0, 0
        for stage, seconds in self.seconds.items():
            end += seconds
            tenths, shown = round(10 * end) - shown, round(10 * end)
            if tenths:
                told.append(f"{stage} {tenths / 10:.1f}{self._about(stage, seconds)}")
        return f"ready after {shown / 10:.1f} s: {', '.join(told)}"

    def _about(self, stage: str, seconds: float) -> str:
        if stage == "weights":
            size = f"{self.nbytes / 1e9:.1f} GB" if self.nbytes >= 1e9 else f"{self.nbytes / 1e6:.1f} MB"
            return f" ({size}, {self.nbytes / 1e9 / seconds:.1f} GB/s)"
        if stage == "kernels":
            return f" ({', '.join(f'{self.kernels[name]} {word}' for name, word in _ORIGINS.items())})"
        return ""

    def as_json(self) -> dict[str, Any]:
        """Seconds, bytes, counts."""
        stages = {stage: round(seconds, 4) for stage, seconds in self.seconds.items()}
        return {"seconds": round(self.total, 4), "stages": stages, "bytes": self.nbytes, "kernels": dict(self.kernels)}


@dataclass
class Stages:
    """A start under way. Every moment belongs to the stage that was entered last, so nothing is counted twice or never.

    `progress` is told of each stage as it begins, and of what `step` says. device: whose work is waited for where a
    stage ends, since it would count as the next one's.
    """

    progress: Progress | None
    device: str = "cpu"
    kernels: Counter[str] = field(default_factory=lambda: Counter(dict.fromkeys(_ORIGINS, 0)))
    _entered: list[tuple[str, float]] = field(default_factory=list)
    _total: int = 0
    _unit: str = ""

    def __post_init__(self) -> None:
        age = process_age()
        if age is not None:
            self._entered.append(("process", time.monotonic() - age))

    def enter(self, stage: str, total: int = 0, unit: str = "") -> None:
        """The stage before is over. total, unit: as `LoadProgress` has them."""
        if torch.device(self.device).type == "cuda":
            torch.cuda.synchronize(self.device)
        self._entered.append((stage, time.monotonic()))
        self._total, self._unit = total, unit
        self.step(0, "")

    def step(self, done: int, what: str) -> None:
        """So much of the stage is done."""
        if self.progress is not None:
            stage, begun = self._entered[-1]
            seconds = time.monotonic() - begun
            self.progress(LoadProgress(done, self._total, seconds, what, stage, self._unit))

    def kernel(self, done: int, total: int, file: str) -> None:
        """As `kernels.ready.load_all` tells it."""
        self._total = total
        self.step(done, file)

    def taking(self) -> Callable[[str], None]:
        """For `Handed`: as the first weight of a layer is taken, those before it are done."""
        begun: list[str] = []

        def taken(name: str) -> None:
            part = part_of(name)
            if "." in part and part not in begun:
                self.step(len(begun), part)
                begun.append(part)

        return taken

    def over(self, nbytes: int) -> Started:
        """All is done. nbytes: of weights."""
        self.enter("")
        seconds: dict[str, float] = {}
        for (stage, begun), (_, end) in zip(self._entered, self._entered[1:], strict=False):
            seconds[stage] = seconds.get(stage, 0.0) + end - begun
        return Started(seconds, nbytes, dict(self.kernels))


def process_age() -> float | None:
    """Seconds since this process began, to a hundredth; None where there is no /proc to say so.

    The interpreter's start and imports, of which torch is the longest, are seconds in which the user waits; only the
    system knows when they began. A shell that waited and then became this process (`exec`) counts too.
    """
    try:
        ticks = int(Path("/proc/self/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[_STARTED])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, AttributeError, ValueError, IndexError):
        return None
    return age if age >= 0 else None
