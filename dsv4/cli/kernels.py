"""`dsv4 kernels`: registers, shared memory and spills of every kernel, and the ops that an architecture lacks."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dsv4.kernels.figures import Figures
    from dsv4.kernels.report import Pair

WIDTH = 160  # of a table that goes into a file


def kernels(
    sources: Annotated[list[str] | None, typer.Argument(help="only these, as in norm.cu; without, all")] = None,
    arch: Annotated[list[str] | None, typer.Option(help="only this architecture, as in sm_90a; repeatable")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Show what every kernel takes on every architecture that it is for, compiling what is not compiled yet.

    Needs no GPU. Exits with 1 if a kernel spills registers, runs its products one by one where its text does not, or
    cannot be compiled.
    """
    from dsv4.kernels.report import as_json as told

    found = _build(sources or [], arch or [])
    lacks = {name: _lacking(name) for name in _architectures(found)}
    if as_json:
        print(json.dumps({"pairs": [told(pair) for pair in found], "lacks": lacks}, indent=1))
    else:
        console = Console(highlight=False)
        _show(found, lacks, console if console.is_terminal else Console(highlight=False, width=WIDTH))
    troubles = _troubles(found)
    for line in troubles:
        Console(stderr=True, highlight=False).print(line, markup=False, soft_wrap=True)
    raise typer.Exit(bool(troubles))


def _build(files: list[str], architectures: list[str]) -> list[Pair]:
    from dsv4.errors import KernelError
    from dsv4.kernels.architectures import ARCHITECTURES
    from dsv4.kernels.build import Places
    from dsv4.kernels.report import pairs
    from dsv4.kernels.source import sources

    places = Places()
    known = [source.file for source in sources(places.csrc)]
    for given, among in ((architectures, list(ARCHITECTURES)), (files, known)):
        if wrong := [name for name in given if name not in among]:
            raise KernelError(
                "dsv4 kernels", got=wrong[0], wanted=" or ".join(among) or "nothing: there are no sources"
            )
    found: list[Pair] = []
    with Console(stderr=True).status("") as status:
        for pair in pairs(places, architectures, files):
            found.append(pair)
            status.update(f"{pair.file} for {pair.architecture}, {len(found)} done")
    return found


def _lacking(architecture: str) -> list[str]:
    """The ops for which `auto` has no kernel on this architecture."""
    from dsv4.kernels import explain, install

    install()
    return [op.op for op in explain(architecture) if op.runs is None]


def _architectures(found: list[Pair]) -> list[str]:
    return list(dict.fromkeys(pair.architecture for pair in found))


def _troubles(found: list[Pair]) -> list[str]:
    spills = [f"{pair.file} for {pair.architecture}: {name} spills" for pair in found for name in pair.spilling]
    serial = [
        f"{pair.file} for {pair.architecture}: the products of {name} are serialised"
        for pair in found
        for name in pair.serialised
    ]
    return [*dict.fromkeys(pair.error for pair in found if pair.error), *spills, *serial]


def _show(found: list[Pair], lacks: dict[str, list[str]], console: Console) -> None:
    if not found:
        console.print("no kernel sources")
        return
    names = _architectures(found)
    table = Table(caption="registers of a thread; bytes of static shared memory, stack and spills (stores, loads)")
    table.add_column("kernel", overflow="fold", min_width=24)
    for name in names:
        table.add_column(name)
    files = dict.fromkeys(pair.file for pair in found)
    for file in files:
        mine = {pair.architecture: pair for pair in found if pair.file == file}
        table.add_section()
        table.add_row(Text(file, "bold"), *(_origin(mine.get(name)) for name in names))
        for function in dict.fromkeys(name for pair in mine.values() for name in pair.functions):
            cells = [_cell(mine[name].functions.get(function)) if name in mine else Text() for name in names]
            table.add_row(Text(f"  {function}"), *cells)
    console.print(table)
    for line in _closing(found, lacks):
        console.print(line, markup=False, soft_wrap=True)


def _origin(pair: Pair | None) -> Text:
    if pair is None:
        return Text("not for it", "dim")
    if pair.found is None:
        return Text("not compiled", "red")
    return Text(f"{pair.found.origin}, {len(pair.found.entry.cubin):,} B", "dim")


def _cell(figures: Figures | None) -> Text:
    if figures is None:
        return Text()
    text = Text("inside" if figures.registers is None else str(figures.registers))
    for name in ("shared", "stack"):
        if size := getattr(figures, name):
            text.append(f" {name} {size:,}")
    if figures.spills:
        text.append(f" spills {figures.spill_stores:,}, {figures.spill_loads:,}", "red")
    return text


def _closing(found: list[Pair], lacks: dict[str, Any]) -> list[str]:
    lines = []
    for name in _architectures(found):
        mine = [pair for pair in found if pair.architecture == name]
        count = sum(figures.registers is not None for pair in mine for figures in pair.functions.values())
        nbytes = sum(len(pair.found.entry.cubin) for pair in mine if pair.found)
        without = f"; no kernel for {', '.join(lacks[name])}" if lacks[name] else ""
        lines.append(f"{name}: {count} kernels of {len(mine)} sources, {nbytes:,} bytes{without}")
    remarks = {(pair.file, pair.found.entry.remarks) for pair in found if pair.found and pair.found.entry.remarks}
    return [*lines, *(f"NVRTC on {file}:\n{remark}" for file, remark in sorted(remarks))]
