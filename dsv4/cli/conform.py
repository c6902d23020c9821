"""`dsv4 conform`: does a server, ours or another's, speak the protocol?"""

from __future__ import annotations

import json
from collections import Counter
from typing import Annotated

import typer
from rich.console import Console
from rich.table import Table

from dsv4.check.conform.cases import CASES
from dsv4.check.conform.run import Verdict
from dsv4.check.conform.run import conform as judge
from dsv4.check.wire import Client
from dsv4.cli.options import KeyFile, key_of
from dsv4.errors import RequestError

GROUPS = tuple(dict.fromkeys(case.group for case in CASES))


def conform(
    url: Annotated[str, typer.Argument(help="where the server is, with or without /v1")],
    model: Annotated[str | None, typer.Option(help="without it, the first that the server lists")] = None,
    key_file: KeyFile = None,
    group: Annotated[list[str] | None, typer.Option(help=f"only these: {', '.join(GROUPS)}; repeatable")] = None,
    all: Annotated[bool, typer.Option("--all", help="what is not offered is a failure")] = False,
    timeout: Annotated[float, typer.Option(min=0.1, help="seconds that one answer may take")] = 120,
    as_json: Annotated[bool, typer.Option("--json", help="a line of JSON for each case")] = False,
) -> None:
    """Judge a server by the form of its answers, case by case. Exit code 1 if any fails.

    unclear: the model did not do what the case takes. absent: the server does not offer it.
    """
    wrong = set(group or ()) - set(GROUPS)
    if wrong:
        raise RequestError("there is no such group of cases", got=", ".join(wrong), wanted=" or ".join(GROUPS))
    err, found = Console(stderr=True, highlight=False), list[Verdict]()
    with err.status("asking") as status:
        for one in judge(Client(url, key_of(key_file), timeout), model, tuple(group or ()), all):
            found.append(one)
            status.update(f"{one.case.group}: {one.case.name}")
            if as_json:
                said = {"group": one.case.group, "case": one.case.name, "verdict": one.verdict}
                print(json.dumps(said | {"got": one.got, "wanted": one.wanted}), flush=True)
    if not as_json:
        _show(found)
    counts = Counter(one.verdict for one in found)
    err.print(", ".join(f"{count} {verdict}" for verdict, count in counts.items()))
    if counts["FAIL"]:
        raise typer.Exit(1)


def _show(found: list[Verdict]) -> None:
    table = Table("case", "verdict", "got / wanted", box=None, pad_edge=False)
    for group in GROUPS:
        mine = [one for one in found if one.case.group == group]
        if mine:
            table.add_row(f"{group}:", "", "")
        for one in mine:
            said = f"got {one.got}; wanted {one.wanted}" if one.wanted else one.got
            table.add_row(f"  {one.case.name}", one.verdict, said.replace("[", "\\["))
    console = Console(highlight=False)
    (console if console.is_terminal else Console(highlight=False, width=80)).print(table)
