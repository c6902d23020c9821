"""`dsv4 doctor`: whether this machine can build and run the kernels, and what is in the way."""

from __future__ import annotations

import json
from typing import TYPE_CHECKING, Annotated, Final

import typer
from rich.console import Console
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from dsv4.kernels.doctor import Finding

_STYLES: Final = {"ok": "green", "note": "yellow", "wrong": "red"}


def doctor(
    fix: Annotated[bool, typer.Option("--fix", help="remove dead locks and damaged cache entries")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="print one JSON object")] = False,
) -> None:
    """Look at driver, GPUs, compiler, kernel cache and the lock files that torch's extension builder leaves behind.

    Exits with 1 if something is wrong that needs attention.
    """
    from dsv4.kernels.doctor import WRONG, examine

    findings = examine(fix)
    well = all(finding.state != WRONG for finding in findings)
    if as_json:
        print(json.dumps({"well": well, "findings": [finding._asdict() for finding in findings]}, indent=1))
    else:
        Console(highlight=False).print(_table(findings))
    raise typer.Exit(not well)


def _table(findings: list[Finding]) -> Table:
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(no_wrap=True)
    table.add_column(no_wrap=True)
    table.add_column(overflow="fold")
    for finding in findings:
        words = Text(finding.found)
        if finding.do:
            words.append(f"\n{finding.do}", "dim")
        table.add_row(Text(finding.state, _STYLES[finding.state]), Text(finding.name), words)
    return table
