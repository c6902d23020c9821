"""The study's pictures, each an SVG text to put into a page. Needs matplotlib, which is imported on the first call."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, Final

from dsv4.check.study.formats import HARMFUL, NOISE, WHOLE
from dsv4.check.study.results import Curve, Results
from dsv4.errors import ConfigError

if TYPE_CHECKING:
    from matplotlib.axes import Axes

# One colour a kind of format, the same in every picture; colours that colour-blind people tell apart.
_COLOURS: Final = {
    "official": "#000000", "bf16": "#0072b2", "fp8-tensor": "#56b4e9", "int8-token": "#009e73", "mxfp4": "#e69f00",
    "nvfp4": "#f0b6d3", "nvfp4-calibrated": "#cc79a7", "nvfp4-tensor": "#9b4f7d", "nvfp4-token": "#6a2c52",
    "fp4-128": "#d55e00", "fp4-tensor": "#7a3600",
}  # fmt: skip
_GREY: Final = "#8a8a8a"
_LINES: Final = ("official", NOISE, "bf16", "mxfp4", "nvfp4-calibrated", "nvfp4", *HARMFUL)


def require() -> None:
    """ConfigError if matplotlib is not installed: to be asked before half an hour of work."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ConfigError(
            "the report needs matplotlib", do="pip install 'dsv4[report]', or leave --report out: --json needs nothing"
        ) from None


def pictures(results: Results) -> dict[str, str]:
    """Title -> SVG, those for which the results have numbers."""
    drawn = {title: _figure(results, draw) for title, draw in _PICTURES.items()}
    return {title: svg for title, svg in drawn.items() if svg}


def _figure(results: Results, draw: Callable[[Any, Results], bool]) -> str:
    """An SVG that is the same text for the same numbers; "" if `draw` had nothing to draw."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "dsv4", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(7.6, 4.2), layout="constrained")
        FigureCanvasSVG(figure)
        if not draw(figure.add_subplot(), results):
            return ""
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    text = out.getvalue()
    return text[text.index("<svg") :]


Bar = tuple[str, float, float]  # run, length, spread


def _bars(axes: Axes, results: Results, bars: Sequence[Bar], metric: str, label: str) -> bool:
    """Horizontal bars with their spread; pale where nothing stands beyond it."""
    for row, (name, length, spread) in enumerate(bars):
        axes.barh(
            row,
            length,
            xerr=spread,
            color=_COLOURS.get(results.runs[name]["format"], _GREY),
            alpha=1.0 if results.effect(name, metric) else 0.35,
            error_kw={"elinewidth": 1, "capsize": 2},
        )
    axes.set_yticks(range(len(bars)), [name for name, _, _ in bars])
    axes.invert_yaxis()
    axes.set_xlabel(label)
    _bare(axes)
    return bool(bars)


def _bare(axes: Axes) -> None:
    axes.spines[["top", "right"]].set_visible(False)


def _distances(axes: Axes, results: Results, names: Sequence[str], label: str) -> bool:
    """KL of some runs on a logarithmic axis, BF16's own noise as a dotted line."""
    bars = [(name, kl, results.spread(name, "kl") or 0.0) for name in names if (kl := results.mean(name, "kl"))]
    noise = results.mean(NOISE, "kl")
    if noise:
        axes.axvline(noise, color=_GREY, linestyle=":", linewidth=1)
    drawn = _bars(axes, results, bars, "kl", label)
    if drawn:
        axes.set_xscale("log")
        lengths = [length for _, length, _ in bars]
        axes.set_xlim(0.5 * min(lengths), 2 * max(lengths))
    return drawn


def _kl(axes: Axes, results: Results) -> bool:
    return _distances(axes, results, results.whole, "KL(official || format), nats a token; dotted: BF16's own noise")


def _placed(axes: Axes, results: Results) -> bool:
    names = [name for name, run in results.runs.items() if run["depth"] is None and run["places"] != "all"]
    return _distances(axes, results, names, "KL(official || format at one place), nats a token")


def _changed(axes: Axes, results: Results, metric: str, label: str) -> bool:
    """What each run changes, in hundredths; the spread is that of the change."""
    bars = [
        (name, 100 * change, 100 * (results.change_spread(name, metric) or 0.0))
        for name in results.whole
        if name != "official" and (change := results.change(name, metric)) is not None
    ]
    axes.axvline(0, color="black", linewidth=1)
    return _bars(axes, results, bars, metric, label)


def _perplexity(axes: Axes, results: Results) -> bool:
    return _changed(axes, results, "perplexity", "perplexity of held-out text, change in %; pale: within the spread")


def _score(axes: Axes, results: Results) -> bool:
    base = results.mean("official", "score")
    return bool(base) and _changed(
        axes, results, "score", f"exercises answered exactly, change in points (official: {100 * (base or 0):.0f} %)"
    )


def _curves(axes: Axes, results: Results, curves: dict[str, Curve], label: str, logarithmic: bool) -> bool:
    """One line a run over the layers."""
    for name, curve in curves.items():
        points = [(layer, value) for layer, value in enumerate(curve) if value]
        colour = _COLOURS.get(results.runs[name]["format"], _GREY)
        axes.plot(*zip(*points, strict=True), color=colour, label=name, marker="." if len(curve) < 16 else "")
    if curves:
        axes.set_xlabel("layer")
        axes.locator_params("x", integer=True)
        axes.set_ylabel(label)
        axes.legend(fontsize=8, frameon=False)
        if logarithmic:
            axes.set_yscale("log")
    _bare(axes)
    return bool(curves)


def _lines(results: Results) -> list[str]:
    return [name for name in _LINES if name in results.runs]


def _kept(curves: dict[str, Curve]) -> dict[str, Curve]:
    return {name: curve for name, curve in curves.items() if any(curve)}


def _streams(axes: Axes, results: Results) -> bool:
    curves = _kept({name: results.curve(name, "streams_error") for name in _lines(results)})
    for name in curves:
        low, high = zip(*results.extremes(name, "streams_error"), strict=True)
        colour = _COLOURS.get(results.runs[name]["format"], _GREY)
        axes.fill_between(range(len(low)), low, high, color=colour, alpha=0.2, linewidth=0)
    return _curves(axes, results, curves, "|streams - official| / |official|; band: all seeds", True)


def _tensors(axes: Axes, results: Results) -> bool:
    lost = {
        name: [None if value is None else max(1 - value, 1e-9) for value in results.tensors(name, "cosine")]
        for name in _lines(results)
        if results.runs[name]["format"] not in WHOLE or name == "official"
    }
    return _curves(axes, results, _kept(lost), "1 - cosine of what a matrix reads, rounded and not", True)


def _size(axes: Axes, results: Results) -> bool:
    curves = _kept({name: results.curve(name, "rms") for name in _lines(results)})
    return _curves(axes, results, curves, "root mean square of the streams", False)


def _sinkhorn(axes: Axes, results: Results) -> bool:
    curves = _kept({name: results.curve(name, "row_sums") for name in _lines(results)})
    return _curves(axes, results, curves, "mean |row sum - 1| of the mixing matrices", True)


def _depth(axes: Axes, results: Results) -> bool:
    drawn = False
    for format in dict.fromkeys(run["format"] for run in results.runs.values()):
        swept = sorted(results.swept(format).items())
        points = [
            (n, kl, results.spread(name, "text_kl")) for n, name in swept if (kl := results.mean(name, "text_kl"))
        ]
        if len(points) > 1:
            depths, values, spreads = zip(*points, strict=True)
            bars = [spread or 0.0 for spread in spreads]
            axes.errorbar(
                depths, values, yerr=bars, color=_COLOURS.get(format, _GREY), marker="o", capsize=2, label=format
            )
            drawn = True
    if drawn:
        axes.set_xscale("log", base=2)
        axes.xaxis.set_major_formatter("{x:.0f}")
        axes.set_yscale("log")
        axes.set_xlabel("layers in the format, counted from the first")
        axes.set_ylabel("KL on text, nats a token")
        axes.legend(fontsize=8, frameon=False)
    _bare(axes)
    return drawn


_PICTURES: Final[dict[str, Callable[[Any, Results], bool]]] = {
    "How far each format moves the predictions": _kl,
    "What that costs on text": _perplexity,
    "What that costs on exercises": _score,
    "The streams' error, layer by layer": _streams,
    "What rounding does to each matrix's input": _tensors,
    "The first n layers in a format, the rest official": _depth,
    "Where it hurts": _placed,
    "The streams' size": _size,
    "Sinkhorn's row sums": _sinkhorn,
}
