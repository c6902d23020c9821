"""What the context costs a decode step: `python -m bench.context_curves [--out FILE]`, then `--plot PICTURE --of FILE`.

Microseconds of each op that reads or writes the context, in a CSA and in an HCA layer of Flash and of Pro: against the
tokens of context, of one sequence and of 64 beside each other, and against the sequences, each of 8K. Arguments, copies
of them and clock are those of `dsv4 bench ops`; the ops choose for themselves, as in a model. A line of JSON for each
op and point: one of `dsv4 bench ops`, and which layer and point it is of.

Where a layer attends to all its entries nobody asks the indexer: its ops have no line there. The step is one that ends
a block, the dearer kind. Attention to picked entries reads as many as are picked, out of four times as many, however
long the context is; such an op, with equal arguments at several points, is timed once.
"""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final, NamedTuple

import torch
from rich.console import Console
from rich.table import Table

from bench.amounts import short
from dsv4.bench.clock import copy_bandwidth
from dsv4.bench.layers import KINDS
from dsv4.bench.ops import Measured, circumstances, clocked, moved
from dsv4.check.cases import (
    attend,
    compress_exact,
    compress_given,
    compress_keys,
    compress_steps,
    index,
    queries,
    select,
)
from dsv4.check.contract import Case, placed
from dsv4.check.verify import device_for, prepare
from dsv4.checkpoint.reads import Point as Point
from dsv4.errors import ConfigError
from dsv4.ops import attention, compress
from dsv4.ops.index import select_rows
from dsv4.ops.index_logits import index_logits
from dsv4.ops.index_queries import index_queries
from dsv4.ops.op import use
from dsv4.quant.index_keys import KEY_LAYOUTS, KeyLayout

WHAT: Final = "context curves"
HEADS: Final = {"flash": attend.FLASH, "pro": attend.PRO}
RATIOS: Final = {kind: ratio for kind, ratio in KINDS.items() if ratio}  # a window alone has no context
AMONG: Final = 4  # times as many entries as are picked
# Colours that colour-blind people tell apart, in the order of a step.
COLOURS: Final = {
    "compress_kv": "#56b4e9", "compress_keys": "#009e73", "index_queries": "#e69f00", "index_logits": "#d55e00",
    "select_rows": "#cc79a7", "attend": "#0072b2",
}  # fmt: skip


class Grid(NamedTuple):
    """The contexts, for the first and the last of the numbers of sequences; and all of these, `at` one context."""

    contexts: tuple[int, ...]
    sequences: tuple[int, ...]
    at: int

    def points(self) -> list[Point]:
        ends = self.sequences[0], self.sequences[-1]
        return sorted({Point(n, c) for n in ends for c in self.contexts} | {Point(n, self.at) for n in self.sequences})


FULL: Final = Grid(tuple(1024 << n for n in range(11)), tuple(1 << n for n in range(7)), 8192)
QUICK: Final = Grid((1024, 4096), (1, 2), 4096)


class Place(NamedTuple):
    """A layer of a model at a point."""

    model: str
    layer: str
    point: Point


Times = dict[Place, dict[str, float]]  # microseconds by op


# --- what is timed ---------------------------------------------------------------------------------------------------


def parts(place: Place, layout: KeyLayout) -> Iterator[Case]:
    """The ops of the context's side, in the order of a step. Equal names: equal arguments."""
    model, layer, (tokens, context) = place
    ratio, most = RATIOS[layer], select.PICKED[model]
    entries = context // ratio
    picked = min(most, entries) if layer == "CSA" else entries
    yield remembered(ratio, tokens)
    if layer == "CSA":
        yield remembered_keys(ratio, tokens, layout)
        if entries > most:
            yield from chosen(tokens, entries, most, layout)
    near, among = min(attend.WINDOW, context), min(AMONG, entries // picked)
    make = partial(attend.given, tokens, HEADS[model], near, picked, among=among)
    name = f"{HEADS[model]} heads, {near} + {picked} of {picked * among} rows, {tokens}"
    yield Case(op=attention.attend, name=name, make=make, tokens=(0, 2, 4, 6), moved=attend.moved)


def ending(ratio: int, tokens: int) -> dict[str, Any]:
    """A token of each sequence, with which a block ends; rings that hold what they will be given."""
    runs = [compress_given.Run(n, 4096 - 1, 1) for n in range(tokens)]
    length = compress_given.rings(ratio) if ratio == compress.OVERLAPPED else 2 * ratio
    return {"ratio": ratio, "runs": runs, "length": length, "settled": True}


def remembered(ratio: int, tokens: int) -> Case:
    make = partial(compress_given.given_kv, **ending(ratio, tokens))
    nbytes = partial(compress_exact.moved, row=sum(attend.ROW.sizes))
    name = f"ending of {ratio}, {tokens}"
    return Case(op=compress.compress_kv, name=name, make=make, tokens=compress_steps.ALONE, moved=nbytes)


def remembered_keys(ratio: int, tokens: int, layout: KeyLayout) -> Case:
    make = partial(compress_given.given_keys, layout, True, **ending(ratio, tokens))
    nbytes = partial(compress_exact.moved, row=sum(compress_keys.SIZES[layout.name]))
    name = f"ending of {ratio}, {layout.name}, {tokens}"
    return Case(op=compress.compress_keys, name=name, make=make, tokens=compress_steps.ALONE, moved=nbytes)


def chosen(tokens: int, entries: int, most: int, layout: KeyLayout) -> Iterator[Case]:
    """The indexer."""
    more = f"{entries} keys {tokens}"
    made = partial(queries._given, layout, True, tokens, queries.HEADS)
    yield Case(op=index_queries, name=f"{layout.name} {tokens}", make=made, tokens=(0, 1, 2))
    made = partial(index._decode, layout, tokens, entries)
    yield Case(op=index_logits, name=f"{layout.name} {more}", make=made, tokens=(0,), moved=index.moved)
    made = partial(select._random, tokens, entries, most)
    yield Case(op=select_rows, name=f"{most} of {more}", make=made, tokens=(0, 1), moved=select._moved)


def measured(case: Case, device: torch.device, samples: int, copy: float) -> Measured:
    """By what the op chooses. Its arguments are made for it alone: there may be gigabytes of them."""
    given = placed(case.make(), device)
    with torch.no_grad(), use("auto"):
        nbytes = moved(case, given, case.op(*given))
        return Measured(case, case.op.explain(*given).runs or "", clocked(case, case.op, given, samples), nbytes, copy)


def measure(grid: Grid, layout: KeyLayout, device: torch.device, samples: int) -> Iterator[dict[str, Any]]:
    """A line for each op and point, without what all lines share."""
    prepare()
    copy = copy_bandwidth(device, samples)
    known: dict[str, dict[str, Any]] = {}
    for point in grid.points():
        for place in (Place(model, layer, point) for model in HEADS for layer in RATIOS):
            for case in parts(place, layout):
                if case.label not in known:
                    known[case.label] = measured(case, device, samples, copy).line()
                    if device.type == "cuda":
                        torch.cuda.empty_cache()
                said = {"model": place.model, "layer": place.layer, **point._asdict()}
                yield {"what": WHAT, **said, **known[case.label]}


# --- what is shown ---------------------------------------------------------------------------------------------------


def times(lines: Iterable[Mapping[str, Any]]) -> Times:
    """By place and op; of equal ones the last line counts, and lines of other benches do not."""
    found: Times = {}
    for line in lines:
        if line.get("what") == WHAT:
            place = Place(line["model"], line["layer"], Point(line["sequences"], line["context"]))
            found.setdefault(place, {})[line["op"]] = line["microseconds"]
    return found


def table(found: Times) -> Table:
    shown = Table("model", "layer")
    for title in ("sequences", "context", *COLOURS, "sum"):
        shown.add_column(title, justify="right")
    for (model, layer, point), us in sorted(found.items()):
        numbers = [f"{us[op]:.2f}" if op in us else "" for op in COLOURS]
        named = model, layer, str(point.sequences), short(point.context)
        shown.add_row(*named, *numbers, f"{sum(us.values()):.2f}")
    return shown


class Sweep(NamedTuple):
    """A row of pictures: the points where one number stays and the other, `along`, does not."""

    title: str
    along: str
    points: list[Point]


def sweeps(points: Iterable[Point]) -> list[Sweep]:
    """The longest of either kind."""
    every, found = sorted(set(points)), []
    for along, fixed in (("context", "sequences"), ("sequences", "context")):
        counts = Counter(getattr(point, fixed) for point in every)
        for n in sorted(n for n in counts if 1 < counts[n] == max(counts.values())):
            title = f"{n} sequence{'s' * (n > 1)}" if fixed == "sequences" else f"{short(n)} tokens of context"
            found.append(Sweep(title, along, [point for point in every if getattr(point, fixed) == n]))
    return found


def draw(found: Times, path: Path, title: str) -> None:
    """Time against context and against sequences, as PNG or SVG by the file's name. ConfigError without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        raise ConfigError("--plot needs matplotlib", do="pip install 'dsv4[report]'") from None
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = sweeps(place.point for place in found)
    columns = sorted({place[:2] for place in found})
    with matplotlib.rc_context({"svg.hashsalt": "dsv4", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(3.6 * len(columns), 3.2 * len(rows) + 0.8), layout="constrained")
        FigureCanvasAgg(figure)
        figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        grid = figure.subplots(len(rows), len(columns), squeeze=False, sharex="row", sharey="row")
        for sweep, row in zip(rows, grid, strict=True):
            row[0].set_ylabel("µs")
            for (model, layer), axes in zip(columns, row, strict=True):
                curves(axes, sweep, {point: found.get(Place(model, layer, point), {}) for point in sweep.points})
                axes.set_title(f"{model.capitalize()} {layer}, {sweep.title}", fontsize=10)
        lines = {line.get_label(): line for axes in figure.axes for line in axes.get_lines()}
        names = [name for name in (*COLOURS, "sum") if name in lines]
        figure.legend([lines[name] for name in names], names, loc="outside lower center", ncols=7, frameon=False)
        figure.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def curves(axes: Any, sweep: Sweep, us: Mapping[Point, Mapping[str, float]]) -> None:
    """A line for each op, where it runs, and one for all together."""
    for op, colour in (*COLOURS.items(), ("sum", "#000000")):
        at = [point for point in sweep.points if (us[point] if op == "sum" else op in us[point])]
        y = [sum(us[point].values()) if op == "sum" else us[point][op] for point in at]
        if at:
            x = [getattr(point, sweep.along) for point in at]
            axes.plot(x, y, "o-", color=colour, markersize=3, linewidth=2.2 if op == "sum" else 1.4, label=op)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    ticks = [getattr(point, sweep.along) for point in sweep.points]
    ticks = ticks[:: 2 if len(ticks) > 8 else 1]
    axes.set_xticks(ticks, [short(n) for n in ticks])
    axes.yaxis.get_major_locator().set_params(subs=(1, 2, 5))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.minorticks_off()
    axes.set_xlabel("tokens of context" if sweep.along == "context" else sweep.along)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(color="#e5e5e5", linewidth=0.8)


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--device", help="cpu or cuda; without it, a GPU if there is one")
    parser.add_argument("--keys", choices=KEY_LAYOUTS, default="fp4", help="how index keys are stored")
    parser.add_argument("--samples", type=int, default=10, help="how often each is measured")
    parser.add_argument("--quick", action="store_true", help="a few small points, to see that it runs")
    parser.add_argument("--out", type=Path, help="append the lines to this file")
    parser.add_argument("--plot", type=Path, help="draw them: a .png or .svg")
    parser.add_argument("--of", type=Path, help="the lines of this file, and measure nothing")
    asked = parser.parse_args(arguments)
    if asked.of:
        lines = read(asked.of)
    else:
        began, device = time.monotonic(), device_for(asked.device)
        grid, samples = (QUICK, 1) if asked.quick else (FULL, asked.samples)
        shared = circumstances(device)
        lines = [{**line, **shared} for line in measure(grid, KEY_LAYOUTS[asked.keys], device, samples)]
        print(f"on {shared['device']}: {len(lines)} lines in {time.monotonic() - began:.0f} s")
    if asked.out:
        with asked.out.open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in lines)
    found = times(lines)
    Console(highlight=False, width=160).print(table(found))
    if asked.plot:
        last = next(line for line in reversed(lines) if line.get("what") == WHAT)
        title = "The context's side of a decode step, µs a layer: {device}, torch {torch}, {commit}, {date}"
        draw(found, asked.plot, title.format(**last))


if __name__ == "__main__":
    main()
