"""`dsv4 compare`: where two ways to run a model part."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsv4.checkpoint.hub import find_model
from dsv4.cli.options import ModelPath
from dsv4.cli.target import writable
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.check.compare.compare import Comparison
    from dsv4.check.compare.measure import Gap


def compare(
    model: ModelPath = None,
    a: Annotated[
        str, typer.Option("--a", help="one way to run it: pure, fused, a format, chunk=64, … with commas")
    ] = "pure",
    b: Annotated[str, typer.Option("--b", help="another; a wrong word lists all")] = "float",
    force: Annotated[
        list[str] | None, typer.Option(help="op=implementation in way b, as rms_norm_quant=unfused; repeat it")
    ] = None,
    layers: Annotated[
        int | None, typer.Option(min=1, help="look at the first n alone, and show every op of them")
    ] = None,
    tokens: Annotated[
        int | None, typer.Option(min=2, help="how many are read (128), or of an answer at most (48)")
    ] = None,
    text: Annotated[Path | None, typer.Option(help="a file to read; without it, held-out text")] = None,
    device: Annotated[str, typer.Option(help="where both run, if a way does not say")] = "cpu",
    json_path: Annotated[Path | None, typer.Option("--json", help="write everything here")] = None,
    plot: Annotated[Path | None, typer.Option(help="write a picture (SVG) here; needs matplotlib")] = None,
    answers: Annotated[
        int | None, typer.Option(min=1, help="compare so many greedy answers to held-out prompts, and no ops")
    ] = None,
    seed: Annotated[int, typer.Option(help="of --answers: the same seed asks the same prompts")] = 0,
    sequences: Annotated[int, typer.Option(min=1, help="of --answers: how many at once")] = 32,
    jobs: Annotated[int, typer.Option(min=1, help="of --answers: processes")] = 1,
    to: Annotated[Path | None, typer.Option("--record", help="of --answers: run way a alone, and keep it here")] = None,
    against: Annotated[Path | None, typer.Option(help="of --answers: way a is what --record kept here")] = None,
) -> None:
    """Read the same text in two ways and say where they first part, op by op, beside what rounding alone would do.

    The noise floor is way a again with every embedded number moved by one unit in its last place. With --answers whole
    answers are compared, token for token: exit code 1 if rounding does not explain what differs.
    """
    writable(json_path, plot, to)
    if answers is None and (to or against):
        raise RequestError("--record and --against keep answers", got="no --answers", do="say how many: --answers 1000")
    if answers is not None:
        if layers or text or plot or (to and against):
            got = "--layers, --text, --plot, or both of --record and --against"
            raise RequestError("--answers", got=got, wanted="none of these")
        from dsv4.cli.compare_answers import Side
        from dsv4.cli.compare_answers import run as compare_answers

        side = Side(a, to, against)
        other = ",".join((b, *(force or ())))
        right = compare_answers(model, side, other, device, (answers, tokens or 48, seed), sequences, jobs, json_path)
        raise typer.Exit(not right)
    from dsv4.check.compare.compare import compare as run
    from dsv4.check.compare.way import parse
    from dsv4.check.study import plots
    from dsv4.llm import EMBEDDED

    if plot is not None:
        plots.require()
    ways = (parse(a, device), parse(",".join((b, *(force or ()))), device))
    given = text.read_text(encoding="utf-8") if text else None
    found = run(find_model(model or EMBEDDED), *ways, given, tokens or 128, layers)
    _show(found, every=layers is not None)
    if json_path is not None:
        json_path.write_text(json.dumps(found.as_json(), ensure_ascii=False) + "\n", encoding="utf-8")
    if plot is not None:
        from dsv4.check.compare.picture import picture

        plot.write_text(picture(found), encoding="utf-8")


def _show(found: Comparison, every: bool) -> None:
    console = Console(highlight=False)
    table = Table(box=None, header_style="dim", pad_edge=False)
    table.add_column("layer", no_wrap=True)
    table.add_column("result", overflow="fold", min_width=20)  # the only one that may be broken over lines
    for title, width in {"bits differ": 6, "largest": 7, "|a-b|/|a|": 9, "floor": 7, "cosine": 8}.items():
        table.add_column(title, justify="right", min_width=width)
    firsts = [gap for gap in (found.first_parted, found.first_beyond) if gap]
    for gap in found.gaps:
        if every or gap in firsts or gap.name == "streams":
            table.add_row(*_cells(gap), style="bold red" if gap.beyond else "")
    console.print(table)
    for line in _lines(found):
        console.print(line, markup=False, soft_wrap=True)


def _cells(gap: Gap) -> tuple[str, ...]:
    if gap.note:
        return str(gap.layer), f"{gap.name}: {gap.note}", "", "", "", "", ""
    share = 100 * gap.differing / max(gap.elements, 1)
    bits = f"{share:.0f} %" if share >= 10 else f"{share:.2g} %" if share else "none"
    numbers = (_number(gap.largest), _number(gap.error), _number(gap.floor), _cosine(gap.cosine))
    return str(gap.layer), gap.name, bits, *numbers


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.1e}"


def _cosine(value: float | None) -> str:
    return "" if value is None else f"{value:.6f}"


def _lines(found: Comparison) -> list[str]:
    told = {"bits part": found.first_parted, "by more than rounding does:": found.first_beyond}
    lines = [f"{what} {_where(gap)}" for what, gap in told.items()]
    return [*lines, f"predictions: {_end(found.end)}; by rounding alone: {_end(found.floor)}"]


def _where(gap: Gap | None) -> str:
    if gap is None:
        return "nowhere"
    return f"first in layer {gap.layer}, {gap.name}{f' ({gap.note})' if gap.note else ''}"


def _end(end: Any) -> str:
    if end["bitwise"]:
        return "equal to the bit"
    return f"KL {end['kl']:.2e} nats a token, most probable token equal in {100 * end['same_first']:.1f} %"
