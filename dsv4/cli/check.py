"""`dsv4 check`: every case of the contract through every implementation that this machine has."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any, Final, Literal, get_args

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from rich.text import Text

from dsv4.errors import RequestError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from dsv4.check.contract import Case, Verdict

_JOBS: Final = 4  # processes on a GPU: references take most of the time, and up to 18 GB of memory
Size = Literal["small", "full", "big"]  # big: tens of thousands of tokens
SIZES: Final[tuple[Size, ...]] = get_args(Size)


def check(
    families: Annotated[list[str] | None, typer.Argument(help="families of cases, as norm; without, all")] = None,
    op: Annotated[str | None, typer.Option(help="only this op")] = None,
    only: Annotated[str, typer.Option("--case", help="only cases whose name has this in it")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; without it, a GPU if there is one")] = None,
    size: Annotated[
        Size | None, typer.Option(help="cases up to this size; without it, big on a GPU, else full")
    ] = None,
    every: Annotated[
        bool, typer.Option("--all", help="a line for each case, as a named family has, not for each op alone")
    ] = False,
    jobs: Annotated[
        int | None,
        typer.Option(min=1, help="processes, each with the cases of one op at a time; without it, 4 on a GPU"),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Judge the implementations of ops: kernels on a GPU, on a CPU the references against independent oracles.

    Fences around memory, bits that repeat and do not depend on company, and distances under the bound of each case.
    Exits with 1 if anything is wrong.
    """
    from dsv4.check import verify  # takes seconds: not before the usage has been checked
    from dsv4.check.cases import cases

    target = verify.device_for(device)
    sizes = SIZES[: 1 + SIZES.index(size or ("big" if target.type == "cuda" else "full"))]
    listed = {number: case for number, case in enumerate(cases(*families or ())) if case.size in sizes}
    chosen = {n: case for n, case in listed.items() if op in (None, case.op.name) and only in case.name}
    if not chosen:
        names = dict.fromkeys(case.op.name for case in listed.values())
        asked = " ".join(f"--{name} {given}" for name, given in (("op", op), ("case", only)) if given)
        raise RequestError(
            "no case has this name", got=asked, wanted=f"one of the ops {', '.join(names)}, or of their cases"
        )
    processes = jobs or (_JOBS if target.type == "cuda" else 1)
    judged = verify.check_side_by_side(families or (), chosen, target, processes)
    pairs = list(track(judged, "checking", len(chosen), console=Console(stderr=True), transient=True))
    unseen = verify.unseen(list(chosen.values()), target)
    wrong = [verdict for verdicts in pairs for verdict in verdicts if not verdict.ok]
    if as_json:
        print(json.dumps(_report(verify.about(target), pairs, unseen), indent=1))
    else:
        _show(pairs, wrong, every or bool(families or op or only))
        for line in (verify.about(target), _closing(list(chosen.values()), pairs, wrong), *_not_run(unseen)):
            Console(highlight=False).print(line, markup=False, soft_wrap=True)
    raise typer.Exit(bool(wrong))


def _report(about: str, pairs: Sequence[Sequence[Verdict]], unseen: dict[str, list[str]]) -> dict[str, Any]:
    lines = [
        {**verdict._asdict(), "distance": verdict.distance._asdict() | {"ok": verdict.ok}}
        for verdicts in pairs
        for verdict in verdicts
    ]
    return {"device": about, "ok": all(line["distance"]["ok"] for line in lines), "verdicts": lines, "not_run": unseen}


def _show(pairs: Sequence[Sequence[Verdict]], wrong: Sequence[Verdict], each: bool) -> None:
    """One line for each case and implementation, or for each op and implementation with the case nearest its bound."""
    table = Table("op", "case", "implementation", "metric", "bound", "verdict")
    if each:
        for verdicts in pairs:
            table.add_row(*_row(verdicts, verdicts[0].case))
    else:
        groups: dict[tuple[str, str], list[Sequence[Verdict]]] = {}
        for verdicts in pairs:
            groups.setdefault((verdicts[0].op, verdicts[0].implementation), []).append(verdicts)
        for listed in groups.values():
            table.add_row(*_row([verdict for verdicts in listed for verdict in verdicts], f"{len(listed)} cases"))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
    for verdict in wrong:
        where = ", ".join((verdict.op, verdict.case, verdict.implementation, f"{verdict.check} {verdict.leaf}".strip()))
        said = f"{where}: {_measured(verdict)}"
        Console(stderr=True, highlight=False).print(said, style="red", markup=False, soft_wrap=True)


def _row(verdicts: Sequence[Verdict], case: str) -> tuple[str | Text, ...]:
    worst = max(verdicts, key=_tightness)
    bad = sum(not verdict.ok for verdict in verdicts)
    refused = all(verdict.check == "accepts" for verdict in verdicts)
    said = Text(f"{bad} WRONG", "red") if bad else Text("refused, as it may" if refused else "ok", "green")
    metric = worst.leaf if refused else f"{worst.distance.metric} {worst.distance.value:.3g} {worst.leaf}".strip()
    return worst.op, Text(case), worst.implementation, Text(metric), f"{worst.distance.limit:.3g}", said


def _tightness(verdict: Verdict) -> tuple[bool, float, bool]:
    """Wrong ones first, then by how much of the bound is used up, then what was compared with another result."""
    limit = verdict.distance.limit
    used = verdict.distance.value / limit if 0 < limit < float("inf") else 0.0
    return not verdict.ok, used, verdict.check in ("reference", "oracle")


def _measured(verdict: Verdict) -> str:
    one = verdict.distance
    return one.why or f"{one.metric} {one.value:.6g}, bound {one.limit:.6g}"


def _closing(chosen: Sequence[Case], pairs: Sequence[Sequence[Verdict]], wrong: Sequence[Verdict]) -> str:
    ops = len({case.op.name for case in chosen})
    checks = sum(map(len, pairs))
    failed = len({(verdict.op, verdict.case, verdict.implementation) for verdict in wrong})
    return f"{len(chosen)} cases of {ops} ops, {checks:,} checks: {f'{failed} cases WRONG' if failed else 'all ok'}"


def _not_run(unseen: dict[str, list[str]]) -> Iterable[str]:
    if unseen:
        names = "; ".join(f"{name}: {', '.join(ops)}" for name, ops in unseen.items())
        yield f"not run here, for want of a GPU that has them ({names})"
