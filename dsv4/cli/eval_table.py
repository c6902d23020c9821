"""An evaluation for people: scores, perplexity, draft and speed, and what became of the bars."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Final

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from dsv4.check.answers import Result, splits
from dsv4.check.evaluate import Evaluation
from dsv4.check.evaluate_report import all_score, answer_tokens, draft_score, judged_bars, mode
from dsv4.check.malformed import Damage
from dsv4.check.perplexity import Loss, total
from dsv4.check.score import CONFIDENCE, Score, wilson

_STYLES: Final = {"met": "green", "not met": "red", "cannot be asked": "red", "not measured": "yellow"}
_WORTH_SPLITTING: Final = 40  # answers, below which the parts of a row say nothing
_SPLITS: Final = ("prompt_mod_4", "depth")


def show(found: Evaluation, out: Console) -> None:
    """Print everything but the answers."""
    out.print(_scores(found.results))
    for line in _lines(found.results):
        out.print(line, style="dim", markup=False, soft_wrap=True)
    readings = [(reading.source, reading.loss) for reading in found.readings if reading.loss.tokens]
    if readings:
        out.print(_perplexities([*readings, ("all", total(loss for _, loss in readings))]))
    if any(damage.answers for damage in found.damages):
        out.print(_mistakes(found.damages))
    out.print(_bars(found))
    out.print(_closing(found), style="dim", markup=False, soft_wrap=True)


def _table(title: str, left: Iterable[str], right: Iterable[str]) -> Table:
    table = Table(title=title, title_justify="left", title_style="bold", box=None, header_style="dim", pad_edge=False)
    for name in left:
        table.add_column(name, no_wrap=True)
    for name in right:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _scores(results: Sequence[Result]) -> Table:
    table = _table("held-out items", ("family", "mode", "context"), ("right", "of", "share", "at least", "cut off"))
    for result in results:
        row = result.row
        about = (row.family, mode(row), f"{row.context:,}" if row.context else "")
        if result.why:
            table.add_row(*about, "[red]–[/]", "0", "cannot", "be asked")
            continue
        cut = sum(answer.finish != "stop" for answer in result.answers)
        table.add_row(*about, *_numbers(result.score), str(cut) if cut else "")
    table.add_row("all", "", "", *_numbers(all_score(results)), "")
    return table


def _numbers(score: Score) -> tuple[str, str, str, str]:
    share = "" if score.share is None else f"{score.share:.1%}"
    return str(score.right), str(score.n), share, f"{wilson(*score)[0]:.1%}"


def _lines(results: Iterable[Result]) -> Iterable[str]:
    """What the table has no room for: why a family cannot be asked, and long prompts by length and place."""
    for result in results:
        name = f"{result.row.family}, {mode(result.row)}" + (f", {result.row.context:,}" if result.row.context else "")
        if result.why:
            yield f"{name}: {result.why}"
        elif result.row.context and result.score.n >= _WORTH_SPLITTING:
            for split, scores in splits(result.answers).items():
                if split in _SPLITS:
                    yield f"{name} by {split}: " + ", ".join(f"{k}: {s.right}/{s.n}" for k, s in scores.items())


def _perplexities(losses: Iterable[tuple[str, Loss]]) -> Table:
    columns = ("tokens", "nats", "perplexity", "unigram", "nats/char", "bits/byte")
    table = _table("held-out texts", ("source",), columns)
    for source, loss in losses:
        row = loss.as_json()
        cells = [f"{row['tokens']:,}", f"{row['nats_per_token']:.3f}", f"{row['perplexity']:.2f}"]
        cells += [f"{row['unigram_perplexity']:.1f}", f"{row['nats_per_character']:.3f}", f"{row['bits_per_byte']:.3f}"]
        table.add_row(escape(source), *cells)
    return table


def _mistakes(damages: Iterable[Damage]) -> Table:
    table = _table("prompts gone wrong", ("mistake",), ("nats a token of its own answer", "same answer", "of"))
    for damage in damages:
        nats = "" if not damage.tokens else f"{damage.nats / damage.tokens:.3f}"
        table.add_row(damage.mistake, nats, str(damage.same), str(damage.answers))
    return table


def _bars(found: Evaluation) -> Table:
    table = _table("bars", ("bar", "verdict"), ("wanted", "at least"))
    for bar, verdict, lower in judged_bars(found):
        shown = "" if lower is None else f"{lower:.1%}"
        table.add_row(bar.name, f"[{_STYLES[verdict]}]{verdict}[/]", f"{bar.wanted:.0%}", shown)
    return table


def _closing(found: Evaluation) -> str:
    draft, speed = draft_score(found), found.speed
    kept = f"{draft.right} of {draft.n} first guesses of the draft kept" if draft.n else "no draft"
    return (
        f"{kept}; {speed.rate:.1f} tokens/s for one request alone; {answer_tokens(found):,} tokens"
        f" of answers, {found.seconds:.0f} s in all\n"
        f'"at least" is the lower one of the {CONFIDENCE}; a bar that too few items could show is not measured'
    )
