"""A comparison as a picture: the error of each result along the depth of the model, beside the noise floor."""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Final

from dsv4.check.compare.compare import Comparison
from dsv4.check.compare.measure import Gap

_SHOWN: Final = {"streams": "#000000", "project attn.wq_a": "#0072b2", "project attn.wkv": "#e69f00", "moe": "#009e73"}


def picture(found: Comparison) -> str:
    """An SVG. Needs matplotlib (see `study.plots.require`)."""
    import matplotlib
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    with matplotlib.rc_context({"svg.hashsalt": "dsv4", "svg.fonttype": "none", "font.size": 10}):
        figure = Figure(figsize=(8, 4.5), layout="constrained")
        FigureCanvasSVG(figure)
        axes = figure.add_subplot()
        for name, colour in _SHOWN.items():
            own = [gap for gap in found.gaps if gap.name == name and gap.error]
            axes.plot([gap.layer for gap in own], _errors(own), ".-", color=colour, label=name)
            floors = [gap for gap in own if gap.floor]
            axes.plot([gap.layer for gap in floors], [gap.floor or 0.0 for gap in floors], ":", color=colour, alpha=0.6)
        axes.set(xlabel="layer", ylabel="|a - b| / |a|", title=f"a: {found.a.words}   b: {found.b.words}")
        if any(gap.error for gap in found.gaps):
            axes.set_yscale("log")
        axes.legend(title="dotted: one last place at the embedding")
        out = io.StringIO()
        figure.savefig(out, format="svg", metadata={"Date": None})
    return out.getvalue()


def _errors(found: Sequence[Gap]) -> list[float]:
    return [gap.error or 0.0 for gap in found]
