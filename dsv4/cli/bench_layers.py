"""What `dsv4 bench decode` and `dsv4 bench prefill` do alike: check what is asked, time layers, write and show them."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NamedTuple

import typer
from rich.console import Console
from rich.table import Table

from dsv4.cli.options import numbers
from dsv4.cli.target import writable
from dsv4.config import ModelConfig
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.bench.layers import At, Layer, Machine, Whole
    from dsv4.bench.slices import Bench

ConfigName = Annotated[str, typer.Option(help="flash, pro, or a directory with a config.json")]
LayerCounts = Annotated[str, typer.Option(help="two numbers of layers: what one more costs is a layer")]
Kinds = Annotated[str, typer.Option(help="kinds of layers: CSA, HCA, SWA")]
Samples = Annotated[int, typer.Option(min=1, help="how often each is measured")]
Out = Annotated[Path | None, typer.Option(help="append a line of JSON for each layer, and for the model, to this file")]


class Asked(NamedTuple):
    """Which layers, how many of them at a time, and how often each is timed."""

    name: str
    config: ModelConfig
    counts: Sequence[int]
    kinds: Sequence[str]
    samples: int
    out: Path | None


def asked(config: str, layers: str, kinds: str, samples: int, out: Path | None) -> Asked:
    """RequestError or ConfigError for what cannot be."""
    counts = numbers("--layers", layers)
    if len(set(counts)) != 2:
        raise RequestError("--layers", got=layers, wanted="two different numbers, as in 2,6")
    found = ModelConfig.find(config)
    from dsv4.bench.layers import KINDS  # takes seconds: not before the usage has been checked

    if not set(kinds.split(",")) <= KINDS.keys():
        raise RequestError("--kinds", got=kinds, wanted=" or ".join(KINDS))
    writable(out)
    return Asked(config, found, counts, list(dict.fromkeys(kinds.split(","))), samples, out)


def time_layers(bench: Bench, given: Asked, points: Sequence[At]) -> None:
    """Measure, append to the file, print. ConfigError where there is no GPU, or too little memory."""
    from dsv4.bench.layers import layers, wholes
    from dsv4.bench.slices import Slice, check_fits, circumstances, machine, steps

    device = check_fits(bench, given.config, given.kinds, max(given.counts), points)
    err, found = Console(stderr=True, highlight=False), []
    with err.status("drawing weights") as status:
        for kind in given.kinds:
            drawn = Slice(given.config, kind, max(given.counts), device)
            for step in steps(bench, drawn, given.counts, points, given.samples):
                found.append(step)
                at = ", ".join(f"{n:,} {name}" for name, n in step.at._asdict().items())
                status.update(f"{kind}, {step.layers} layers, {at}")
            del drawn  # before the next are drawn
    shared, of = {**circumstances(found, device), "config": given.name}, machine(bench, device)
    measured = layers(found)
    whole = wholes(measured, given.config)
    if given.out is not None:
        lines = [one.line(bench.what, of) for one in measured] + [one.line(bench.what, of) for one in whole]
        write(given.out, shared, lines)
    show(Console(highlight=False), measured, whole, of)
    peak = f" and multiplies {of.peak / 1e12:,.0f} TFLOP/s in FP8" if of.peak else ""
    err.print(f"on {shared['device']}, which copies {of.copied / 1e9:,.0f} GB/s{peak}; weights are random")


def write(out: Path, shared: Mapping[str, Any], lines: Sequence[Mapping[str, Any]]) -> None:
    """Append lines, each with what all share."""
    with out.open("a", encoding="utf-8") as file:
        file.writelines(json.dumps({**shared, **line}) + "\n" for line in lines)


def show(console: Console, found: Sequence[Layer], whole: Sequence[Whole], machine: Machine) -> None:
    """A table of the layers, and below it what all layers of the model come to."""
    work = ("GFLOP",) if machine.peak else ()
    table = Table("layer")
    for title in (
        *found[0].at._fields, "µs a layer", "MB", *work, "floor µs", "share", "launches", "rest µs", "its floor",
        "host µs",
    ):  # fmt: skip
        table.add_column(title, justify="right")
    for one in found:
        floor, flop = machine.floor(one.nbytes, one.flop), (f"{one.flop / 1e9:,.0f}",) if machine.peak else ()
        table.add_row(
            one.kind, *(f"{n:,}" for n in one.at), f"{1e6 * one.seconds:,.1f}", f"{one.nbytes / 1e6:,.0f}", *flop,
            f"{1e6 * floor:,.1f}", f"{floor / one.seconds:.0%}", f"{one.launches:.1f}", f"{1e6 * one.rest:,.0f}",
            f"{1e6 * machine.floor(one.rest_bytes):,.0f}", f"{1e6 * one.host:,.0f}",
        )  # fmt: skip
    shown = console if console.is_terminal else Console(file=console.file, highlight=False, width=160)
    shown.print(table)
    for model in whole:
        at = ", ".join(f"{n:,} {name}" for name, n in model.at._asdict().items())
        shown.print(f"{at}: {model}", soft_wrap=True)
