"""The contract of an op, written once: every implementation is judged by it on every case.

Ours runs first and the reference after it, for freed memory may hold the right answer. Inputs lie between fences, and
what the implementation allocates does too; no input changes but those that the op is there to write. Two runs give the
same bits. A token alone gives the bits that it has in company. Then the distances: from the reference (or from what the
smaller ops make of the results that came before), and from an oracle that was written apart from both.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor

from dsv4.check.fences import Allocations, Fence, fenced, transform
from dsv4.check.metrics import EXACT, Bounds, Distance, Leaf, differing, distance, leaves
from dsv4.errors import DSV4Error
from dsv4.ops.op import Op, pure

Arguments = tuple[Any, ...]
Run = Callable[..., Any]
Wanted = Callable[[Arguments, Any], Any]  # the arguments after the run, and what it returned
Size = Literal["small", "full", "big", "timed"]


def returned(arguments: Arguments, found: Any) -> Any:
    """What most ops are judged by."""
    return found


class Property(NamedTuple):
    """A number that has to stay within a limit whatever the reference says; None: it is only reported."""

    name: str
    value: float
    limit: float | None


@dataclass(frozen=True, kw_only=True)
class Case:
    """One set of arguments for one op, and how far its results may be off.

    make: the arguments on the CPU, the same at every call.
    tokens: places of the arguments whose tensors have one entry a token; none: a token alone is not tried.
    writes: places of the arguments that the op writes.
    bounds: by name of the result or kind of number; what is not named is exact. Those of the oracle and of the smaller
    ops' results too.
    outcome: what is judged, from the arguments after the run and the result.
    wanted: the same from the reference; it may start from results that `outcome` found. None: the op's reference.
    oracle: the same, by other means. properties: see `Property`.
    size: "small" is fit for threads that play a GPU; "big" runs on a GPU alone unless asked for; "timed" is but another
    width of a big one, for the clock alone.
    refusable: an implementation need not accept it.
    bench: the name under which `dsv4 bench ops` times it.
    moved: bytes that the op has to read and write, from arguments and result; None: every tensor once.
    flops: of a product of FP8, multiplications and additions, where they may count for more than the bytes.
    turn: the arguments of the clock's n-th call, which share what is too large to be copied; None: copies of all.
    """

    op: Op[..., Any]
    name: str
    make: Callable[[], Arguments]
    tokens: tuple[int, ...] = ()
    writes: tuple[int, ...] = ()
    bounds: Bounds = field(default_factory=dict)
    unfused_bounds: Bounds = field(default_factory=dict)
    outcome: Wanted = returned
    wanted: Wanted | None = None
    oracle: Wanted | None = None
    oracle_bounds: Bounds = field(default_factory=dict)
    properties: Callable[[Arguments, Any], Iterable[Property]] | None = None
    size: Size = "small"
    refusable: bool = False
    bench: str = ""
    moved: Callable[[Arguments, Any], int] | None = None
    flops: int = 0
    turn: Callable[[Arguments, int], Arguments] | None = None

    @property
    def label(self) -> str:
        """Op and name."""
        return f"{self.op.name}: {self.name}"


class Verdict(NamedTuple):
    """One line of a judgement. check: accepts, memory, again, alone, unfused, reference, oracle, property or run."""

    op: str
    case: str
    implementation: str
    check: str
    leaf: str
    distance: Distance

    @property
    def ok(self) -> bool:
        return self.distance.ok


def judge(
    case: Case,
    run: Run,
    implementation: str = "fused",
    device: torch.device | str = "cpu",
    twin: Run | None = None,
    accepts: Callable[..., str | None] | None = None,
    given: Arguments | None = None,
    spare: bool = False,
    company: bool = False,
) -> list[Verdict]:
    """Judge one function of the op's signature.

    twin: another one, whose results are the same to the last bit, or near. accepts: asked first, where there is one.
    given: the arguments of the case, where they are made already. spare: another kernel takes them, so this may refuse.
    company: a token may have other bits alone.
    """
    judged = _Judged(case, run, implementation, device, given)
    refused = accepts(*judged.given) if accepts else None
    if refused:
        why = "" if case.refusable or spare else "refused"
        return [judged.said("accepts", refused, Distance("refused", 0, 0, why))]
    try:
        return list(judged.verdicts(twin, company))
    except torch.OutOfMemoryError:  # says nothing of the implementation
        raise
    except (DSV4Error, RuntimeError, AssertionError) as error:  # the next case may still tell something
        return [judged.said("run", "", Distance("error", math.nan, 0, f"{type(error).__name__}: {error}"))]


class _Attempt(NamedTuple):
    arguments: Arguments
    found: Any
    leaves: Mapping[str, Leaf]
    problems: list[str]


class _Judged:
    def __init__(
        self, case: Case, run: Run, implementation: str, device: torch.device | str, given: Arguments | None
    ) -> None:
        self.case, self.run, self.implementation, self.device = case, run, implementation, torch.device(device)
        self.beside = self.device if case.size in ("big", "timed") else torch.device("cpu")  # where references run
        self.given = placed(case.make() if given is None else given, self.device)

    def said(self, check: str, leaf: str, distance: Distance) -> Verdict:
        return Verdict(self.case.op.name, self.case.name, self.implementation, check, leaf, distance)

    def verdicts(self, twin: Run | None, company: bool) -> Iterator[Verdict]:
        case = self.case
        first = self.attempt(self.run, self.given)
        second = self.attempt(self.run, self.given)
        problems = list(dict.fromkeys(first.problems + second.problems))
        yield self.said("memory", "", Distance("bytes", len(problems), 0, "; ".join(problems)))
        for name, leaf in first.leaves.items():
            count = differing(leaf.tensor, second.leaves[name].tensor) if name in second.leaves else math.nan
            yield self.said("again", name, Distance("bits", count, 0))
        if not company:
            yield from self.alone(first)
        if twin is not None:
            other = self.attempt(twin, self.given)
            yield from self.compared("unfused", first.leaves, other.leaves, case.unfused_bounds)
        if case.wanted is not None:
            yield from self.compared("reference", first.leaves, self.from_results(case.wanted, first), case.bounds)
        elif self.implementation != "reference":
            yield from self.compared("reference", first.leaves, self.by_reference(), case.bounds)
        if case.oracle is not None:
            wanted = self.from_results(case.oracle, first)
            yield from self.compared("oracle", first.leaves, wanted, case.oracle_bounds)
        if case.properties is not None:
            for one in case.properties(placed(first.arguments, self.beside), placed(first.found, self.beside)):
                limit = math.inf if one.limit is None else one.limit
                yield self.said("property", one.name, Distance(one.name, one.value, limit))

    def attempt(self, run: Run, given: Arguments) -> _Attempt:
        """One run between fences. Its leaves are only valid while it lives."""
        fences: list[tuple[int, Fence, Tensor]] = []

        def place(at: int, x: Tensor) -> Tensor:
            fences.append((at, fenced(x, self.device), x))
            return fences[-1][1].view

        arguments = tuple(transform(one, lambda x, at=at: place(at, x)) for at, one in enumerate(given))  # type: ignore[misc]
        with torch.no_grad(), Allocations() as made:
            found = run(*arguments)
        problems = [f"{count} bytes beside an input were written" for _, one, _ in fences if (count := one.trespass())]
        problems += [f"{count} bytes beside an output were written" for one in made.fences if (count := one.trespass())]
        problems += [
            f"argument {at} was changed"
            for at, one, x in fences
            if at not in self.case.writes and differing(one.view, x)
        ]
        return _Attempt(arguments, found, leaves(self.case.outcome(arguments, found)), problems)

    def alone(self, whole: _Attempt) -> Iterator[Verdict]:
        """A few tokens by themselves, the first and the last among them."""
        count = len(self.given[self.case.tokens[0]]) if self.case.tokens else 0
        if count < 2:
            return
        off: dict[str, int] = {}
        for start, end in {(0, 1), (count - 1, count), (count // 3, min(count, count // 3 + 5))}:
            given = tuple(
                transform(one, lambda x: x[start:end]) if at in self.case.tokens else one  # noqa: B023 (used at once)
                for at, one in enumerate(self.given)
            )
            for name, leaf in self.attempt(self.run, given).leaves.items():
                if leaf.tensor.dim() and name in whole.leaves:
                    off[name] = off.get(name, 0) + differing(leaf.tensor, whole.leaves[name].tensor[start:end])
        for name, bits in off.items():
            yield self.said("alone", name, Distance("bits", bits, 0))

    def fresh(self) -> Arguments:
        """The arguments once more, for the reference."""
        return tuple(transform(one, lambda x: _copy(x, self.beside)) for one in self.given)

    def by_reference(self) -> Mapping[str, Leaf]:
        """What the reference makes of fresh arguments."""
        arguments = self.fresh()
        with torch.no_grad(), pure():
            found = self.case.op(*arguments)
        return leaves(self.case.outcome(arguments, found))

    def from_results(self, wanted: Wanted, attempt: _Attempt) -> Mapping[str, Leaf]:
        """`wanted` of fresh arguments and of what was found."""
        with torch.no_grad(), pure():
            return leaves(wanted(self.fresh(), placed(attempt.found, self.beside)))

    def compared(
        self, check: str, found: Mapping[str, Leaf], wanted: Mapping[str, Leaf], bounds: Bounds
    ) -> Iterator[Verdict]:
        for name in sorted(wanted.keys() - found.keys()):
            yield self.said(check, name, Distance("bits", math.nan, 0, "is missing"))
        for name, leaf in found.items():
            if name in wanted:
                bound = bounds.get(name) or bounds.get(leaf.kind) or EXACT
                yield self.said(check, name, distance(leaf, wanted[name], bound))


def _copy(x: Tensor, device: torch.device) -> Tensor:
    """A copy with the same strides, also where it is on the device already."""
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device=device).copy_(x)


def placed(value: Any, device: torch.device) -> Any:
    """`value` with all its tensors on a device, those that are there already as they are."""
    return transform(value, lambda x: x if x.device == device else _copy(x, device))
