"""`dsv4 bench decode`: what a token costs in layers of full width, beside what its bytes cost."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from dsv4.cli.options import numbers
from dsv4.cli.target import writable
from dsv4.config import ModelConfig
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.bench.decode import Layer


def decode(
    config: Annotated[str, typer.Option(help="flash, pro, or a directory with a config.json")] = "flash",
    layers: Annotated[str, typer.Option(help="two numbers of layers: what one more costs is a layer")] = "2,6",
    kinds: Annotated[str, typer.Option(help="kinds of layers")] = "CSA,HCA",
    contexts: Annotated[str, typer.Option(help="tokens of context of one sequence")] = "8192",
    sequences: Annotated[str, typer.Option(help="numbers of sequences")] = "1,8",
    at: Annotated[int, typer.Option(min=256, help="tokens of context of several sequences")] = 8192,
    samples: Annotated[int, typer.Option(min=1, help="how often each is measured")] = 10,
    out: Annotated[Path | None, typer.Option(help="append a line of JSON for each layer to this file")] = None,
) -> None:
    """Time decode steps of random layers of full width on a GPU, as CUDA graphs; weights are drawn there.

    A layer is what one layer more costs, `rest` what a step has beside its layers. The floor is the time in which this
    machine, in the same run, copies as many bytes as must be read.
    """
    counts, lengths, many = (numbers(name, text) for name, text in
                             (("--layers", layers), ("--contexts", contexts), ("--sequences", sequences)))  # fmt: skip
    if len(set(counts)) != 2:
        raise RequestError("--layers", got=layers, wanted="two different numbers, as in 2,6")
    model = ModelConfig.find(config)
    from dsv4.bench import decode as timing  # takes seconds: not before the usage has been checked

    asked = kinds.split(",")
    if not set(asked) <= timing.LAYERS.keys():
        raise RequestError("--kinds", got=kinds, wanted=" or ".join(timing.LAYERS))
    writable(out)
    timing.check_fits(model, counts)
    err, found = Console(stderr=True, highlight=False), []
    points = timing.points(lengths, many, at)
    with err.status("drawing weights") as status:
        for kind in asked:
            for step in timing.steps(model, kind, counts, points, samples):
                found.append(step)
                status.update(f"{kind}, {step.layers} layers, {step.point.sequences} x {step.point.context:,}")
    shared, copied = timing.circumstances(found)
    measured = timing.layers(found)
    if out is not None:
        with out.open("a", encoding="utf-8") as file:
            file.writelines(
                json.dumps({**shared, "config": config, **timing.line(one, copied)}) + "\n" for one in measured
            )
    _show(measured, copied)
    err.print(f"on {shared['device']}, which copies {copied / 1e9:,.0f} GB/s; weights are random")


def _show(found: Sequence[Layer], copied: float) -> None:
    table = Table("layer")
    for title in (
        "sequences",
        "context",
        "µs a layer",
        "MB",
        "floor µs",
        "of copy",
        "launches",
        "rest µs",
        "its floor",
    ):
        table.add_column(title, justify="right")
    for one in found:
        floor = one.nbytes / copied
        table.add_row(
            one.kind, f"{one.point.sequences}", f"{one.point.context:,}", f"{1e6 * one.seconds:.1f}",
            f"{one.nbytes / 1e6:,.0f}", f"{1e6 * floor:.1f}", f"{floor / one.seconds:.0%}", f"{one.launches:.1f}",
            f"{1e6 * one.rest:.0f}", f"{1e6 * one.rest_bytes / copied:.0f}",
        )  # fmt: skip
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=140)).print(table)
