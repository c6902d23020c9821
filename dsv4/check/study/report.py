"""The page: what was found in a paragraph, the pictures, the numbers. One file that needs nothing else."""

from __future__ import annotations

from html import escape
from typing import Final

from dsv4.check.study.findings import findings, number
from dsv4.check.study.plots import pictures
from dsv4.check.study.results import Results

_COLUMNS: Final = {
    "kl": "KL", "top1": "same first choice", "perplexity": "perplexity", "answer_perplexity": "answers' perplexity",
    "score": "exercises", "text_kl": "KL on text",
}  # fmt: skip
_MARK: Final = {"worse": "▲", "better": "▼", "": ""}
_STYLE: Final = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 68rem; margin: 2rem auto; padding: 0 1rem; color: #222 }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(30rem, 1fr)); gap: 1rem 2rem }
figure { margin: 0 } figcaption { font-weight: 600 } svg { width: 100%; height: auto }
.found { font-size: 1.05rem; border-left: 4px solid #cc79a7; padding-left: 1rem }
table { border-collapse: collapse; font-size: .85rem; width: 100% }
th, td { padding: .2rem .6rem; text-align: right; border-bottom: 1px solid #ddd }
td:first-child, th:first-child { text-align: left }
.worse { color: #b03a00 } .better { color: #00695c } small { color: #777 }
"""


def page(results: Results) -> str:
    """The report as HTML. Needs matplotlib."""
    about = results.tree.get("model", {})
    title = f"What a number format does to {about.get('name', 'a model')}"
    figures = "".join(
        f"<figure><figcaption>{escape(caption)}</figcaption>{svg}</figure>"
        for caption, svg in pictures(results).items()
    )
    return (
        f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{escape(title)}</title><style>{_STYLE}</style>'
        f"<h1>{escape(title)}</h1>"
        f'<p class="found">{escape(" ".join(findings(results)))}</p>'
        f'<div class="pictures">{figures}</div>'
        f"<h2>The numbers</h2>{_table(results)}"
        "<p><small>Mean ± standard deviation between the samples. ▲ worse and ▼ better than official beyond the spread "
        "(KL and first choice: worse than BF16's own noise), each sample compared with itself.</small></p></html>\n"
    )


def _table(results: Results) -> str:
    head = "".join(f"<th>{escape(title)}</th>" for title in ("run", *_COLUMNS.values()))
    rows = "".join(
        f'<tr><td title="{escape(run["title"])}">{escape(name)}</td>'
        + "".join(f"<td>{_cell(results, name, metric)}</td>" for metric in _COLUMNS)
        + "</tr>"
        for name, run in results.runs.items()
    )
    return f"<table><tr>{head}</tr>{rows}</table>"


def _cell(results: Results, name: str, metric: str) -> str:
    if metric not in results.runs[name]["summary"]:
        return ""
    effect, spread = results.effect(name, metric), results.spread(name, metric)
    around = "" if spread is None else f" <small>± {number(spread)}</small>"
    return f'<span class="{effect}">{number(results.mean(name, metric))}{_MARK[effect]}</span>{around}'
