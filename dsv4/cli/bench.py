"""`dsv4 bench`: how fast ops and layers are, how far from what the memory allows; how long users of a server wait."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dsv4.cli.bench_decode import decode
from dsv4.cli.bench_prefill import prefill
from dsv4.cli.bench_serve import serve
from dsv4.cli.target import writable
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.bench.ops import Measured

app = typer.Typer(no_args_is_help=True, help="Measure speed: of ops and layers on this machine, of a server.")
app.command()(serve)
app.command()(decode)
app.command()(prefill)


@app.callback()
def bench() -> None:
    """Measure speed: of ops and layers on this machine, of a server."""


@app.command()
def ops(
    families: Annotated[list[str] | None, typer.Argument(help="families of cases, as norm; without, all")] = None,
    op: Annotated[str | None, typer.Option(help="only this op")] = None,
    only: Annotated[str, typer.Option("--case", help="only cases whose name has this in it, as in flash")] = "",
    device: Annotated[str | None, typer.Option(help="cpu or cuda; without it, a GPU if there is one")] = None,
    samples: Annotated[int, typer.Option(min=1, help="how often each is measured")] = 30,
    out: Annotated[Path | None, typer.Option(help="append a line of JSON for each to this file")] = None,
) -> None:
    """Time ops at the sizes of Flash and Pro, one token and 8,192 rows, in a CUDA graph.

    The floor is the time in which this machine, in the same run, copies as many bytes as the op reads and writes.
    """
    from dsv4.bench import ops as timing  # takes seconds: not before the usage has been checked
    from dsv4.check.verify import device_for

    writable(out)
    chosen, target = timing.timed(*families or (), op=op, only=only), device_for(device)
    if not chosen:
        asked = " ".join(f"--{name} {given}" for name, given in (("op", op), ("case", only)) if given)
        raise RequestError("no timed case has this name", got=asked, wanted="flash or pro, say")
    err = Console(stderr=True, highlight=False)
    found: list[Measured] = []
    with err.status("copying") as status:
        for one in timing.measure(chosen, target, samples):
            found.append(one)
            status.update(f"{one.case.op.name}, {one.case.name}, {one.implementation}")
    shared = timing.circumstances(target)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps({**shared, **one.line()}) + "\n" for one in found)
    _show(found)
    if found:
        err.print(f"on {shared['device']}, which copies {found[0].copy / 1e9:,.0f} GB/s (read and written)")
    if found and found[0].peak:
        err.print(f"peak: cuBLASLt's FP8 product of 8,192 cubed, {found[0].peak / 1e12:,.0f} TFLOP/s")
    if target.type == "cpu":
        err.print("a CPU has no kernels: these are the references, of one token")


def _show(found: list[Measured]) -> None:
    table = Table("op", "case", "implementation")
    for title in ("µs", "least to most", "kB", "floor µs", "of copy", "TFLOP/s", "of peak"):
        table.add_column(title, justify="right")
    for one in found:
        median, low, high = (1e6 * seconds for seconds in one.timing[:3])
        numbers = f"{median:.2f}", f"{low:.2f} to {high:.2f}", f"{one.nbytes / 1e3:,.1f}", f"{1e6 * one.floor:.2f}"
        work = (f"{one.speed / 1e12:,.0f}", f"{one.speed / one.peak:.1%}") if one.peak and one.case.flops else ("", "")
        of_copy = f"{one.floor / one.timing.seconds:.1%}"
        table.add_row(one.case.op.name, one.case.name, one.implementation, *numbers, of_copy, *work)
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=160)).print(table)
