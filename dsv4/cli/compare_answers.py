"""`dsv4 compare --answers`: whole answers in two ways, and what of their differences is more than rounding."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Final, NamedTuple

from rich.console import Console
from rich.table import Table

from dsv4.chat.tokenizer import Tokenizer
from dsv4.check.compare import kept
from dsv4.check.compare.answers import Asked, Work, answer, draw
from dsv4.check.compare.parting import Held, hold
from dsv4.check.compare.way import parse
from dsv4.checkpoint.hub import find_model
from dsv4.config import ModelConfig
from dsv4.llm import EMBEDDED

_SHOWN: Final = 20  # partings of a table


class Side(NamedTuple):
    """Way a. to: where it is kept, alone then; kept: where it was."""

    words: str
    to: Path | None
    kept: Path | None


def run(
    model: Path | None,
    a: Side,
    b: str,
    device: str,
    asked: tuple[int, int, int],
    sequences: int,
    jobs: int,
    json_path: Path | None,
) -> bool:
    """Whether rounding explains all that differs. asked: how many prompts, tokens of an answer, and seed."""
    directory = find_model(model or EMBEDDED)
    way, other = parse(a.words, device), None if a.to else parse(b, device)
    prompts = draw(directory, *asked)
    work = Work(directory, tuple(one.prompt for one in prompts), asked[1], sequences)
    for one in filter(None, (way, other)):
        one.options(work.context, sequences)  # a way that no engine runs in is told before hours of the other
    if a.kept:
        ours = kept.read(a.kept, work)
    else:
        ours = kept.Kept(way.words, work.digest, answer(work, way, jobs), answer(work, replace(way, shaken=True), jobs))
    console = Console(highlight=False)
    if a.to or other is None:
        assert a.to is not None
        kept.write(a.to, ours)
        console.print(f"{len(ours.answers):,} answers by {way.words}: {a.to}", markup=False, soft_wrap=True)
        return True
    found = hold(ours.answers, ours.moved, answer(work, other, jobs))
    show(console, found, prompts, Tokenizer.load(directory, ModelConfig.load(directory).vocab_size))
    if json_path is not None:
        said = {"a": ours.words, "b": other.words, "seed": asked[2], **found.as_json()}
        json_path.write_text(json.dumps(said) + "\n", encoding="utf-8")
    return found.right


def show(console: Console, found: Held, prompts: list[Asked], tokenizer: Tokenizer) -> None:
    """The partings that moved most, and the verdict."""
    worst = sorted(found.partings, key=lambda one: -one.moved)[:_SHOWN]
    table = Table(box=None, header_style="dim", pad_edge=False)
    for title in ("prompt", "of", "token", "a says", "b says", "margin a", "margin b", "off by"):
        table.add_column(title, justify="left" if title in ("of", "a says", "b says") else "right")
    for one in worst:
        row = prompts[one.prompt].row
        said = [json.dumps(tokenizer.decode([id]), ensure_ascii=False) for id in one.tokens]
        of = f"{row.family}{', thinking' if row.thinking else ''}"
        numbers = [f"{number:.3f}" for number in (*one.margins, one.moved)]
        table.add_row(str(one.prompt), of, str(one.position), *said, *numbers, style="bold red" if one in found.wrong
                      else "")  # fmt: skip
    if worst:
        console.print(table)
    for line in lines(found):
        console.print(line, markup=False, soft_wrap=True)


def lines(found: Held) -> list[str]:
    """What was found, in words; logits in nats."""
    floor, apart = found.floor, found.apart
    told = [
        f"equal: {found.equal:,} of {found.answers:,} answers; by rounding alone {found.by_rounding:,}",
        f"logits differ by {apart.median:.4f} (median) and {apart.largest:.3f} (largest);"
        f" by rounding alone {floor.median:.4f} and {floor.largest:.3f}",
    ]
    if found.wrong:
        told.append(f"wrong: {len(found.wrong):,} answers part where no rounding moves a logit so far")
    if found.all_over:
        told.append("wrong: logits differ all over, by more than rounding makes")
    return told if not found.right else [*told, "rounding explains all that differs"]
