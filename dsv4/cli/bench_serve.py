"""`dsv4 bench serve`: how long users of a server wait, under loads of one's choice."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dsv4 import __version__
from dsv4.check.wire import PATIENCE, Client
from dsv4.cli.options import KeyFile, key_of
from dsv4.cli.target import writable
from dsv4.errors import RequestError

if TYPE_CHECKING:
    from dsv4.bench.load import Point
    from dsv4.bench.load_figures import Figures


def serve(
    url: Annotated[str, typer.Argument(help="where the server is, with or without /v1")],
    model: Annotated[str | None, typer.Option(help="without it, the first that the server lists")] = None,
    key_file: KeyFile = None,
    rate: Annotated[
        str, typer.Option(help="requests a second that arrive by chance; 1,2,4 for one after another")
    ] = "",
    concurrency: Annotated[str, typer.Option(help="users who ask again when answered; 1,8,32 likewise")] = "",
    requests: Annotated[int, typer.Option(min=1, help="that count, for each load")] = 100,
    warm_up: Annotated[int, typer.Option(min=0, help="requests before them that do not")] = 4,
    prompt: Annotated[str, typer.Option(help="tokens, about: 128, or 64-512 for any of these")] = "128",
    answer: Annotated[str, typer.Option(help="max_tokens, likewise")] = "64",
    prompts: Annotated[Path | None, typer.Option(help='JSON lines: {"prompt": ...} or {"messages": ...}')] = None,
    shared_prefix: Annotated[int, typer.Option(min=0, help="tokens that all prompts begin with")] = 0,
    extra: Annotated[str, typer.Option(help='JSON for every body, as in {"ignore_eos": true}')] = "{}",
    seed: Annotated[
        int, typer.Option(help="of prompts and arrivals; a server that was asked before may know those of the last one")
    ] = 0,
    slo: Annotated[str, typer.Option(help="what counts as served in time, in ms: ttft:1000,tpot:50")] = "",
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that one answer may take")] = PATIENCE,
    out: Annotated[Path | None, typer.Option(help="append a line of JSON for each load to this file")] = None,
    plot: Annotated[Path | None, typer.Option(help="draw latency against throughput: a .png or .svg")] = None,
) -> None:
    """Put loads on a server and say what its users waited for.

    ttft: to the first token, from when the request should have begun; tpot: a request's mean between tokens; itl: each
    time between tokens; e2e: to the end.
    """
    from dsv4.bench.load import Length, Traffic, measure, read_prompts
    from dsv4.bench.load_figures import figures, read_slo

    points, limits = _points(rate, concurrency), read_slo(slo)
    if plot is not None and plot.suffix not in (".png", ".svg"):
        raise RequestError("--plot", got=str(plot), wanted="a name that ends in .png or .svg")
    writable(out, plot)
    given = [] if prompts is None else read_prompts(prompts)
    lengths = {"prompt": Length.parse(prompt, "--prompt"), "answer": Length.parse(answer, "--answer")}
    shape: dict[str, Any] = {**lengths, "seed": seed, "shared": shared_prefix, "prompts": given, "extra": _extra(extra)}
    client, err = Client(url, key_of(key_file), timeout), Console(stderr=True, highlight=False)
    stopped = False
    with err.status("warming up") as status:
        try:
            seen = partial(_count, status, points, requests)
            measure(
                client,
                lambda name: Traffic(model=name, **shape),
                points,
                model,
                count=requests,
                warm_up=warm_up,
                seen=seen,
            )
        except KeyboardInterrupt:
            stopped = True
    found = [figures(point, limits) for point in points if point.records]
    _show(found, err)
    if out is not None and found:
        asked = {"url": client.base, "prompt": prompt, "answer": answer, "seed": seed, "shared_prefix": shared_prefix}
        _write(out, found, asked | {"prompts": prompts and prompts.name, "extra": shape["extra"], "slo": limits})
    if plot is not None and found:
        from dsv4.bench.load_figures import draw

        draw(found, plot, f"{client.base}: {requests} requests a load, prompts of {prompt}, answers of {answer} tokens")
    if stopped:
        raise KeyboardInterrupt


def _points(rate: str, concurrency: str) -> list[Point]:
    from dsv4.bench.load import Point

    if bool(rate) == bool(concurrency):
        raise RequestError("how much load", wanted="either --rate or --concurrency", do="--concurrency 8, say")
    texts = (rate or concurrency).split(",")
    try:
        points = [Point(rate=float(text)) if rate else Point(users=int(text)) for text in texts]
    except ValueError:
        points = []
    if not points or not all(0 < (point.rate or point.users or 0) < 1e6 for point in points):
        name = "--rate" if rate else "--concurrency"
        raise RequestError(name, got=repr(rate or concurrency), wanted="numbers above 0 with commas between")
    return points


def _extra(text: str) -> dict[str, Any]:
    try:
        tree = json.loads(text)
    except ValueError:
        tree = None
    if not isinstance(tree, dict):
        raise RequestError("--extra", got=repr(text[:60]), wanted="a JSON object")
    return tree


def _count(status: Any, points: Sequence[Point], requests: int) -> None:
    point = [point for point in points if point.records][-1]
    status.update(f"{point.name}: {len(point.records)} of {requests}")


def _show(found: Sequence[Figures], err: Console) -> None:
    table = Table("load", "", box=None, pad_edge=False)
    for title in ("p50", "p90", "p95", "p99"):
        table.add_column(f"{title} ms", justify="right")
    table.add_column("in all")
    for one in found:
        met = [] if one.met is None else [f"{one.met / one.seconds:.2f}/s in time"]
        facts = [f"{one.good / one.seconds:.2f} requests/s", f"{one.token_rate:.1f} tokens/s", *met]
        facts += [f"{one.cached / one.prompt_tokens:.0%} of prompts cached"] if one.cached else []
        facts += [f"{count} × {kind}" for kind, count in sorted(one.errors.items())]
        names = [*one.latency, *[""] * (len(facts) - len(one.latency))]
        for row, name in enumerate(names):
            values = [] if not name else ["–" if ms is None else f"{ms:,.1f}" for ms in one.latency[name].values()]
            fact = facts[row] if row < len(facts) else ""
            table.add_row(one.point.name if not row else "", name, *(values or [""] * 4), fact)
        table.add_section()
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=80)).print(table)
    from dsv4.bench.load_figures import LATE

    late = max((one.late or 0.0 for one in found), default=0.0)
    if late > LATE:
        err.print(f"requests began up to {late:.1f} ms late (p99): this client is part of what was measured")


def _write(out: Path, found: Sequence[Figures], asked: dict[str, Any]) -> None:
    import torch  # takes a second

    from dsv4.bench.ops import circumstances

    shared = circumstances(torch.device("cpu"))
    client = {name: shared[name] for name in ("date", "commit", "device", "python")}
    with out.open("a", encoding="utf-8") as file:
        for one in found:
            file.write(json.dumps({"bench": "serve", **client, "dsv4": __version__, **asked, **one.line()}) + "\n")
