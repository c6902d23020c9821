"""What the compiled kernels take, pair by pair of source and architecture."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

from dsv4.errors import KernelError
from dsv4.kernels.build import Found, Places, find_source
from dsv4.kernels.figures import Figures, serialised
from dsv4.kernels.source import sources


class Pair(NamedTuple):
    """A declared pair. found: its compiled form, or None with the reason in `error`."""

    file: str
    architecture: str
    found: Found | None
    error: str = ""

    @property
    def functions(self) -> dict[str, Figures]:
        return dict(self.found.entry.functions) if self.found else {}

    @property
    def spilling(self) -> list[str]:
        return [name for name, figures in self.functions.items() if figures.spills]

    @property
    def serialised(self) -> list[str]:
        return serialised(self.found.entry.remarks) if self.found else []


def pairs(places: Places, architectures: Iterable[str] = (), files: Iterable[str] = ()) -> Iterator[Pair]:
    """Every declared pair, of these architectures and files if any are given, found or compiled one after another."""
    wanted, named = set(architectures), set(files)
    for source in sources(places.csrc):
        for architecture in source.architectures:
            if (not wanted or architecture in wanted) and (not named or source.file in named):
                try:
                    yield Pair(source.file, architecture, find_source(source, architecture, places))
                except KernelError as error:
                    yield Pair(source.file, architecture, None, str(error))


def as_json(pair: Pair) -> dict[str, Any]:
    """All that is known of a pair."""
    known: dict[str, Any] = {"source": pair.file, "architecture": pair.architecture, "error": pair.error or None}
    if pair.found:
        entry, origin = pair.found
        known |= {"origin": origin, "nvrtc": entry.compiler, "bytes": len(entry.cubin), "remarks": entry.remarks}
        known["serialised"] = pair.serialised
    functions = {name: {**of._asdict(), "spills": of.spills} for name, of in pair.functions.items()}
    return {**known, "kernels": functions}
