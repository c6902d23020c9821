"""The lines of bench/results, and how a figure of the performance page is looked up in them.

A query names files, fields and what these have to be. Of the lines that match the newest counts: by its date, then by
its file's name, then by its place. What is looked up is remembered, so that a table can say where it is from.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from fnmatch import fnmatch
from itertools import groupby
from pathlib import Path
from typing import Any, Final, NamedTuple

from dsv4.errors import DSV4Error
from dsv4.kernels import PREFER

RESULTS: Final = Path(__file__).parent / "results"
# Files that time an op as it is called in a model: `dsv4 bench ops`, and what else says it, as `told` knows.
TIMES: Final = (
    "*-ops*", "*-printed", "*-attend", "*-expert-parts", "*-index-logits", "*-linear-mixed", "*-linear-wide", "*-nvfp4",
)  # fmt: skip
# Lines of kernels that others have replaced though no later date or name says so: file, op.
REPLACED: Final = (
    ("*-first", "*"),
    ("*-before", "*"),
    ("2026-11-27-ops-second", "shared_input"),  # its plan was chosen after that, by 2026-11-27-linear-mixed
    ("2026-11-28-ops", "attend"),  # mma.sync; 2026-11-28-attend has what came after
    ("2026-11-28-ops", "index_logits"),  # mma.sync; the same of 2026-11-28-index-logits
)
_PROFILE: Final = "torch.profiler, one call of stored_moe"


class PageError(DSV4Error):
    """A figure of the page that no line has."""


@dataclass(frozen=True)
class Line:
    """A line of a file, `stem` its name without ending. Dated, and of a device."""

    stem: str
    number: int
    said: Mapping[str, Any]

    @property
    def age(self) -> tuple[str, str]:
        return self.said["date"], self.stem

    @property
    def run(self) -> tuple[str, str, str]:
        """Lines of one file and one commit belong together."""
        return *self.age, self.tree

    @property
    def tree(self) -> str:
        """The commit whose sources ran."""
        return str(self.said.get("tree") or self.said.get("commit"))

    @property
    def replaced(self) -> bool:
        op = self.said.get("op", "")
        return any(fnmatch(self.stem, stem) and fnmatch(op, known) for stem, known in REPLACED)


class Query(NamedTuple):
    """Which lines: patterns of their files' stems, and what fields have to be."""

    files: tuple[str, ...]
    where: Mapping[str, Any]

    def takes(self, line: Line) -> bool:
        same = all(line.said.get(name) == value for name, value in self.where.items())
        return same and any(fnmatch(line.stem, pattern) for pattern in self.files)

    def __str__(self) -> str:
        return ", ".join(f"{name} {value!r}" for name, value in self.where.items()) + f" in {', '.join(self.files)}"


# --- reading ---------------------------------------------------------------------------------------------------------


def read(folder: Path = RESULTS) -> list[Line]:
    """All dated lines of a device, the newest last; those of other benches as `dsv4 bench ops` would say them."""
    lines = [line for path in sorted(folder.glob("*.jsonl")) for line in _lines(path)]
    return sorted(lines, key=lambda line: (*line.age, line.number))


def _lines(path: Path) -> Iterator[Line]:
    every = [json.loads(text) for text in path.read_text(encoding="utf-8").splitlines()]
    found = [said for said in every if "date" in said and "device" in said]
    uniform = [one for said in found for one in told(said) if one.get("microseconds", 0) is not None]
    uniform += _profiled(found)
    yield from (Line(path.stem, number, said) for number, said in enumerate(uniform))


def told(said: Mapping[str, Any]) -> Iterator[Mapping[str, Any]]:
    """A line as it is, or as lines of `dsv4 bench ops` where another bench timed what runs now."""
    match said:
        case {"what": "wide linear plans", "matrix": matrix, "tokens": tokens, "us": us}:
            for form, name in (("chosen", "fused"), ("cublaslt", "cublaslt")):
                yield _timed(said, "scaled_matmul", f"{matrix} {tokens}", us.get(form), name)
        case {"what": "wide linear plans" | "wide linear variants", "variant": "tokens_m", "plan": "chosen"}:
            yield _timed(said, "scaled_matmul", f"{said['matrix']} {said['tokens']}", said["microseconds"])
        case {"what": "wide linear plans" | "wide linear variants", "variant": "cublaslt"}:
            yield _timed(said, "scaled_matmul", f"{said['matrix']} {said['tokens']}", said["microseconds"], "cublaslt")
        case {"what": "index logits forms", "shipped": True, "case": case, "microseconds": us}:
            floor = {"floor_microseconds": us * said["of_copy_bandwidth"]}
            yield _timed(said, "index_logits", case, us) | floor
        case {"what": "NVFP4 before and after", "op": op, "case": case, "us": us}:
            yield _timed(said, op, case, us.get("two chunks 2048", us["after"]))  # the form that was chosen by it
        case {"what": "linear mixed", "case": case, "us": us}:  # two turns, 16 dense rows, two blocks a multiprocessor:
            yield _timed(said, "shared_input", case, us.get("2 16 264"))  # what `linear_mixed.plan` gives since
        case _:
            yield said


def _timed(said: Mapping[str, Any], op: str, case: str, us: float | None, name: str = "fused") -> dict[str, Any]:
    return {**said, "op": op, "case": case, "implementation": name, "microseconds": us}


def _profiled(lines: Iterable[Mapping[str, Any]]) -> Iterator[Mapping[str, Any]]:
    """A call of the experts, the sum of its kernels."""
    parts = [said for said in lines if said.get("what") == _PROFILE]
    for _, group in groupby(parts, key=lambda said: (said["tree"], said["case"])):
        kernels = list(group)
        us = sum(kernel["microseconds"] for kernel in kernels)
        yield _timed({**kernels[0], "from": "a profile, kernels added up"}, "stored_moe", kernels[0]["case"], us)


# --- looking up ------------------------------------------------------------------------------------------------------


@dataclass
class Lookup:
    """Figures of one device. strict: PageError for one that is not there; else it is None."""

    lines: list[Line]
    device: str
    strict: bool = True
    used: list[Line] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Its own lines, found by their op: most queries name one."""
        self.own: defaultdict[str | None, list[Line]] = defaultdict(list)
        for line in self.lines:
            if line.said["device"] == self.device:
                for op in {None, line.said.get("op")}:
                    self.own[op].append(line)

    def matching(self, query: Query, replaced: bool = False) -> list[Line]:
        """The newest last."""
        own = self.own[query.where.get("op")]
        return [line for line in own if query.takes(line) and (replaced or not line.replaced)]

    def newest(self, query: Query) -> Line | None:
        found = self.matching(query)
        return self._keep(found[-1] if found else None, query)

    def run(self, query: Query) -> list[Line]:
        """All matching lines of the newest run that has one."""
        found = self.matching(query)
        last = self._keep(found[-1] if found else None, query)
        lines = [line for line in found if last and line.run == last.run]
        self.used += lines
        return lines

    def timed(self, op: str, case: str, name: str | None = None) -> Line | None:
        """Of an implementation; without a name, of that which Hopper prefers of those that the newest run timed."""
        query = Query(TIMES, {"op": op, "case": case})
        order = (name,) if name else PREFER["sm_90a"].get(op, ())
        found = [line for line in self.matching(query) if line.said.get("implementation") in order]
        latest = [line for line in found if line.age == found[-1].age]
        best = min(latest[::-1], key=lambda line: order.index(line.said["implementation"]), default=None)
        return self._keep(best, query)

    def us(self, op: str, case: str, name: str | None = None) -> float | None:
        line = self.timed(op, case, name)
        return line.said["microseconds"] if line else None

    def floor(self, op: str, case: str) -> float | None:
        """Microseconds of the bytes: by the run that timed the op, or by the newest that counted them."""
        line = self.timed(op, case)
        name = "floor_microseconds"
        return line.said[name] if line and name in line.said else self.counted(op, case, name)

    def counted(self, op: str, case: str, name: str) -> float | None:
        """What an implementation does not change: a replaced kernel's line will do, if there is no other."""
        query = Query(TIMES, {"op": op, "case": case})
        found = [line for line in self.matching(query, replaced=True) if name in line.said]
        line = self._keep(max(found, key=lambda line: (not line.replaced, line.age), default=None), query)
        return line.said[name] if line else None

    def _keep(self, line: Line | None, query: Query) -> Line | None:
        if line is None and self.strict:
            raise PageError(f"no line of {self.device} for the performance page", wanted=str(query))
        self.used += [line] if line else []
        return line


def devices(lines: Iterable[Line]) -> list[str]:
    return sorted({line.said["device"] for line in lines if line.said["device"].startswith("NVIDIA")})


def short(device: str) -> str:
    """H100, H200; H100 PCIe."""
    return re.sub(r" \d+GB.*", "", device.removeprefix("NVIDIA "))


def sources(used: Iterable[Line]) -> str:
    """Files, the commits whose sources ran, and the dates where a file's name has another."""
    found: dict[str, dict[str, None]] = {}
    for line in sorted(used, key=lambda line: (line.stem, line.tree)):
        said = [line.tree, *([line.said["date"]] * (not line.stem.startswith(line.said["date"])))]
        said += [line.said["from"]] if "from" in line.said else []
        found.setdefault(line.stem, {})[", ".join(said)] = None
    return "; ".join(f"`{stem}.jsonl` ({' · '.join(trees)})" for stem, trees in found.items())
